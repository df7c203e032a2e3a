"""data/mixture.py and the caption columns: who is drawn how often, in which order, for ever."""

import contextlib
import pickle
from collections import Counter

import grain
import numpy as np
import pytest
from helpers import CONFIG, StubStep, make_pairs, read_lines
from test_pipeline import (
    SEED,
    assert_same_batches,
    captions_of,
    make_record,
    stack,
    take,
)

from align_jax import config as config_lib
from align_jax import config_checks
from align_jax.cli import main as cli
from align_jax.data import mixture
from align_jax.data.sources.open_source import InMemory
from align_jax.data.sources.record import Record, weigh_captions
from align_jax.hf import model_card
from align_jax.run import workdir


def make_mixture(sizes=None, weights=None):
    """Returns a Mixture of in-memory sources; the captions begin with the source's name."""
    sizes = sizes or {"a": 50, "b": 200, "c": 40}
    sources = {
        name: InMemory(
            Record(f"{name}{index}", make_record(index).image, (f"{name}{index}",))
            for index in range(size)
        )
        for name, size in sizes.items()
    }
    return mixture.Mixture(sources, weights or {"a": 0.5, "b": 0.3, "c": 0.2})


def first_of(order, count):
    return [order[position] for position in range(count)]


@pytest.mark.parametrize("weights", [[1], [7, 3], [1, 1, 1], [3, 1, 13, 2], [1, 1000]])
def test_share_stays_next_to_the_exact_share_at_every_position(weights):
    before = [0] * len(weights)
    for position in range(3000):
        counts = mixture.share(weights, position)
        assert sum(counts) == position
        assert all(0 <= now - then <= 1 for now, then in zip(counts, before, strict=True))
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - position * weight / sum(weights)) < len(weights)
        before = counts


def test_turns_are_those_of_grains_mix():
    parts = [grain.MapDataset.range(10**6).map(lambda x, n=n: n) for n in range(3)]
    mixed = grain.MapDataset.mix(parts, [2.0, 1.0, 4.0])
    turns = [mixed[position] for position in range(500)]
    for position in range(500):
        assert mixture.share([2, 1, 4], position) == [turns[:position].count(n) for n in range(3)]


def test_weights_count_exactly_as_they_are_written():
    mixed = make_mixture(weights={"a": 0.7, "b": 0.2, "c": 0.1})
    assert mixture.epochs(mixed, 10**15) == {
        "epochs/a": 7 * 10**14 / 50,
        "epochs/b": 2 * 10**14 / 200,
        "epochs/c": 10**14 / 40,
    }


def test_each_record_comes_once_in_every_epoch_of_its_source():
    mixed = make_mixture()
    drawn = first_of(mixture.Order(mixed, SEED), 1000)
    for start, size, num_epochs in ((0, 50, 10), (50, 200, 1), (250, 40, 5)):
        own = [index for index in drawn if start <= index < start + size]
        epochs = [tuple(own[i * size : (i + 1) * size]) for i in range(num_epochs)]
        assert all(sorted(epoch) == list(range(start, start + size)) for epoch in epochs)
        assert len(set(epochs)) == num_epochs
        assert len(own) < (num_epochs + 1) * size
    counts = Counter("a" if index < 50 else "b" if index < 250 else "c" for index in drawn)
    assert counts == {"a": 500, "b": 300, "c": 200}


def test_epochs_are_the_rows_drawn_over_the_size():
    mixed = make_mixture()
    drawn = first_of(mixture.Order(mixed, SEED), 333)
    assert mixture.epochs(mixed, 333) == {
        "epochs/a": sum(index < 50 for index in drawn) / 50,
        "epochs/b": sum(50 <= index < 250 for index in drawn) / 200,
        "epochs/c": sum(index >= 250 for index in drawn) / 40,
    }
    assert mixture.epochs(mixed.sources["b"], 500) == {"epochs": 2.5}


def test_source_keeps_its_order_whatever_it_is_mixed_with():
    def order_of_b(mixed, start):
        drawn = first_of(mixture.Order(mixed, SEED), 200)
        return [index - start for index in drawn if start <= index < start + 200][:50]

    other = make_mixture({"b": 200, "z": 90}, {"b": 1.0, "z": 1.0})
    assert order_of_b(make_mixture(), 50) == order_of_b(other, 0)


def test_sources_of_equal_size_have_different_orders():
    mixed = make_mixture({"a": 90, "b": 90}, {"a": 1.0, "b": 1.0})
    drawn = np.array(first_of(mixture.Order(mixed, SEED), 180))
    assert list(drawn[drawn < 90]) != list(drawn[drawn >= 90] - 90)


def test_single_source_has_the_order_that_it_always_had():
    source = make_mixture().sources["b"]
    expected = grain.MapDataset.range(200).seed(SEED).shuffle().repeat()
    assert first_of(mixture.Order(source, SEED), 450) == first_of(expected, 450)


def test_records_of_a_mixture_are_those_of_its_sources():
    mixed = pickle.loads(pickle.dumps(make_mixture()))
    names = [f"{name}{i}" for name, size in (("a", 50), ("b", 200), ("c", 40)) for i in range(size)]
    assert [mixed[index].key for index in range(len(mixed))] == names
    assert [mixed.captions(index) for index in range(len(mixed))] == [(name,) for name in names]
    assert mixed.where(50) == "b: b0"
    assert mixed.describe() == (
        "a (0.5 of the rows) in memory: 50 pairs; b (0.3 of the rows) in memory: 200 pairs; "
        "c (0.2 of the rows) in memory: 40 pairs"
    )
    with pytest.raises(IndexError):
        mixed[290]


def test_batches_hold_each_source_by_weight_with_its_own_index_and_caption():
    mixed = make_mixture()
    batches = take(10, mixed, batch_size=20)
    order = mixture.Order(mixed, SEED)
    assert list(stack(batches, "index")) == first_of(order, 200)
    for batch in batches:
        names = Counter(caption[0] for caption in captions_of([batch]))
        assert all(abs(names[n] - want) < 3 for n, want in (("a", 10), ("b", 6), ("c", 4)))
    assert captions_of(batches) == [mixed[i].captions[0] for i in stack(batches, "index")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_mixture_is_the_same_for_any_start_process_and_worker(num_workers):
    mixed = make_mixture()
    whole = take(9, mixed, batch_size=8, num_threads=1)
    assert_same_batches(
        whole[4:], take(5, mixed, batch_size=8, start_step=4, num_workers=num_workers)
    )
    parts = [take(9, mixed, batch_size=8, rows=range(4 * i, 4 * i + 4)) for i in range(2)]
    for step, batch in enumerate(whole):
        index = np.concatenate([part[step].arrays["index"] for part in parts])
        np.testing.assert_array_equal(index, batch.arrays["index"])


def test_bad_records_are_replaced_from_the_same_source():
    good, bad = make_record(0), Record("bad", b"", ("x",))
    sources = {"a": InMemory([bad] * 50 + [good] * 10), "b": InMemory([good] * 60)}
    batches = take(20, mixture.Mixture(sources, {"a": 1.0, "b": 1.0}), batch_size=10)
    index = stack(batches, "index")
    assert (index < 60).sum() == (index >= 60).sum() == 100
    assert index[index < 60].min() >= 50
    assert sum(batch.dropped["image_empty"] for batch in batches) > 90


def test_problems_of_all_sources_are_counted():
    mixed = make_mixture()
    for name, count in (("a", 2), ("b", 3)):
        mixed.sources[name].problems.add("tar_truncated", f"{name}.tar", count)
    again = mixture.Mixture(mixed.sources, mixed.weights)
    assert dict(again.problems) == {"tar_truncated": 5}
    assert str(again.problems) == "tar_truncated: 5 (first: a: a.tar)"


def test_captions_are_drawn_by_weight_and_blank_columns_leave_their_share():
    columns = [{"alt": ["a"], "long": ["l", "m"], "own": ["o"]}] * 300
    columns += [{"alt": [" "], "long": ["l", ""], "own": ["o"]}] * 300
    weights = {"alt": 6.0, "long": 3.0, "own": 1.0}
    source = InMemory(
        Record(f"key{i}", make_record(0).image, *weigh_captions(row, weights))
        for i, row in enumerate(columns)
    )
    batches = take(20, source, batch_size=300)  # 10 epochs
    drawn, index = np.array(captions_of(batches)), stack(batches, "index")
    for rows, expected in (
        (index < 300, {"a": 0.6, "l": 0.15, "m": 0.15, "o": 0.1}),
        (index >= 300, {"l": 0.75, "o": 0.25}),
    ):
        counts = Counter(drawn[rows])
        assert counts.keys() == expected.keys() and rows.sum() == 3000
        for caption, share in expected.items():
            # Binomial(3000, share): five standard deviations.
            limit = 5 * (3000 * share * (1 - share)) ** 0.5
            assert abs(counts[caption] - 3000 * share) < limit
    assert_same_batches(batches[11:], take(9, source, batch_size=300, start_step=11))


# The configuration and the workdir.


def mixed_config(**entries):
    config = config_lib.default_config()
    config.data.mixture = entries or {"a": {"source": "x"}, "b": {"source": "y", "weight": 2}}
    return config


def write_config(path, body):
    path.write_text(
        "from align_jax.config import default_config\n\n\ndef get_config():\n"
        f"    c = default_config()\n    {body}\n    return c\n"
    )
    return str(path)


def test_override_changes_a_weight_that_the_file_left_out_or_gave_as_integer(tmp_path):
    file = write_config(
        tmp_path / "c.py",
        'c.data.mixture = {"a": {"source": "x"}, "b": {"source": "y", "weight": 2}}',
    )
    overrides = ["--config.data.mixture.a.weight=0.25", "--config.data.mixture.b.source=z?max=3"]
    config = config_lib.load_config(file, overrides)
    config_checks.validate(config, num_devices=1)
    assert config.data.mixture.to_dict() == {
        "a": {"source": "x", "weight": 0.25},
        "b": {"source": "z?max=3", "weight": 2.0},
    }
    assert config_lib.from_json(config_lib.to_json(config)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="config.data.mixture.a.wieght. Did you mean 'weight'"):
        config_lib.load_config(file, ["--config.data.mixture.a.wieght=1"])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": {"source": "x", "weights": 1.0}}, "Unknown key config.data.mixture.a.weights. Did"),
        ({"a": {"source": "x", "weight": 0.0}}, "config.data.mixture.a.weight=0.0 must be pos"),
        ({"a": {"source": "x", "weight": -1}}, "config.data.mixture.a.weight=-1 must be pos"),
        ({"a": {"source": "x", "weight": "2"}}, "config.data.mixture.a.weight='2' must be a n"),
        ({"a": {"source": "x", "weight": float("inf")}}, "a.weight=inf must be positive and fin"),
        ({"a": {"weight": 1.0}}, "config.data.mixture.a.source is empty"),
        ({"a": "x"}, "config.data.mixture.a='x' must be a group of keys"),
        ({"a/b": {"source": "x"}}, "config.data.mixture.a/b: names of a mixture are"),
    ],
)
def test_bad_mixture_is_refused_with_its_path(entries, words):
    with pytest.raises(ValueError, match=words) as caught:
        config_checks.validate(mixed_config(**entries), num_devices=1)
    assert "\n" not in str(caught.value)


def test_source_and_mixture_exclude_one_another():
    config = mixed_config()
    config_checks.validate(config, num_devices=1)
    config.data.source = "x"
    with pytest.raises(ValueError, match="config.data.source='x' and config.data.mixture of 2"):
        config_checks.validate(config, num_devices=1)
    config.data.source, config.data.mixture = "", {}
    with pytest.raises(ValueError, match="config.data.source='' and config.data.mixture of 0"):
        config_checks.validate(config, num_devices=1)


@pytest.mark.parametrize(
    ("sources", "words"),
    [({}, "names no source"), ({"a": InMemory([])}, "config.data.mixture.a: in memory: 0 pairs")],
)
def test_empty_mixture_is_refused(sources, words):
    with pytest.raises(ValueError, match=words):
        mixture.Mixture(sources, {"a": 1.0})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with packed pairs, a vocabulary and a config that mixes the pairs with scenes."""
    folder = tmp_path_factory.mktemp("mixed")
    make_pairs(folder)
    mixed = (
        '    c.data.source = ""\n'
        '    c.data.mixture = {"pairs": {"source": "data", "weight": 3}, '
        '"scenes": {"source": "scenes?size=80"}}\n    return c\n'
    )
    (folder / "config.py").write_text(CONFIG.replace("    return c\n", mixed))
    with contextlib.chdir(folder):
        assert cli.main(["pack", "captions.jsonl?images=images", "--out", "data"]) == 0
        assert cli.main(["vocab", "data", "--out", "tokenizer", "--size", "200"]) == 0
    return folder


def train(*overrides, workdir):
    steps = "--config.train.steps=16"
    return cli.main(
        ["train", "--config", "config.py:plain", "--workdir", workdir, steps, *overrides]
    )


def test_training_on_a_mixture_resumes_exactly_and_counts_epochs(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    StubStep().patch(monkeypatch)
    assert train(workdir="straight") == 0
    printed = capfd.readouterr().err
    assert "pairs (0.75 of the rows) data: 44 pairs; scenes (0.25 of the rows) scenes" in printed
    lines = read_lines(project / "straight" / "metrics.jsonl")
    assert [line["data/epochs/pairs"] for line in lines] == [6 * n / 44 for n in range(1, 17)]
    assert [line["data/epochs/scenes"] for line in lines] == [2 * n / 80 for n in range(1, 17)]
    timing = read_lines(project / "straight" / "perf.jsonl")[:-1]  # the last is of the whole run
    assert all(0 <= line["perf/data_wait_share"] <= 1 for line in timing[1:]) and len(timing) == 16
    assert "data wait " in printed

    def fail(step):
        if step == 11:
            raise RuntimeError("stop")

    StubStep(fail).patch(monkeypatch)
    assert train(workdir="resumed") == 1
    stub = StubStep().patch(monkeypatch)
    assert train(workdir="resumed") == 0
    assert min(stub.batches) == 9  # after the checkpoint of step 8
    metrics = [project / name / "metrics.jsonl" for name in ("straight", "resumed")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()

    capfd.readouterr()
    weight = "--config.data.mixture.scenes.weight=2"
    assert train(weight, workdir="resumed") == 2
    assert capfd.readouterr().err == (
        "align: config.data.mixture.scenes.weight=2.0, but the run in resumed was started with "
        "1.0; change it back or use another --workdir.\n"
    )
    source = "--config.data.mixture.pairs.source=nowhere"
    assert train(source, workdir="new") == 2
    assert "align: config.data.mixture.pairs.source: nowhere does" in capfd.readouterr().err


def test_other_data_behind_the_same_path_is_refused_on_resume(tmp_path):
    config = config_lib.default_config()
    config.data.source = "x"
    config.data.vocab_size = 100

    def open_again(size):
        source = make_mixture({"a": size, "b": 9}, {"a": 1.0, "b": 1.0})
        return workdir.open_for_training(tmp_path, config, source, log=lambda line: None)

    open_again(12)
    workdir.write_config(tmp_path, config)
    open_again(12)
    with pytest.raises(ValueError, match="is now 'a .* 13 pairs.* started on 'a .* 12 pairs"):
        open_again(13)
    (tmp_path / "source.txt").unlink()  # a run of an earlier version
    open_again(13)


def test_model_card_names_every_source_with_its_weight():
    config = mixed_config(a={"source": "/mnt/x?split=train"}, b={"source": "y/", "weight": 2.5})
    assert model_card._training(config, None)[0] == ("data", "`x?split=train` x 1, `y` x 2.5")
