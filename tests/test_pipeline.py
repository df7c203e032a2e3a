"""data/pipeline.py: which records, captions and pixels each batch holds, and what it survives."""

import subprocess
import sys
import textwrap

import grain
import numpy as np
import pytest

from align_jax import config
from align_jax.data import images, pipeline
from align_jax.data.sources.open_source import InMemory
from align_jax.data.sources.record import Record

SEED = 11
DATA = dict(image_size=6, resize_size=8, resize="pil", max_tokens=12, num_threads=4)


class LetterTokenizer:
    """One id a letter: the ids spell the caption."""

    def encode(self, texts, max_tokens):
        ids = np.zeros((len(texts), max_tokens), np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = [ord(letter) for letter in text[:max_tokens]]
        return ids, (ids > 0).astype(np.int32)


class UnreadableSource(InMemory):
    """Record 2 lies on a damaged disk."""

    def __getitem__(self, index):
        if index == 2:
            raise OSError("input/output error")
        return super().__getitem__(index)


def make_record(index, num_captions=1):
    pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
    return Record(f"key{index}", pixels, tuple(f"c{index}-{n}" for n in range(num_captions)))


def make_source(size=23, num_captions=3):
    return InMemory([make_record(index, num_captions) for index in range(size)])


def open_batches(source, batch_size=2, seed=0, **options):
    """The iterator; options are keys of the config's group `data` or arguments."""
    data = config.default_config().data
    given = DATA | options
    data.update({name: given.pop(name) for name in list(given) if name in data})
    return pipeline.train_batches(
        source, LetterTokenizer(), data, batch_size=batch_size, seed=seed, **given
    )


def take(num_batches, source, batch_size=5, seed=SEED, **options):
    batches = open_batches(source, batch_size, seed, **options)
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return taken


def stack(batches, name):
    return np.concatenate([batch.arrays[name] for batch in batches])


def captions_of(batches):
    return ["".join(map(chr, ids[ids > 0])) for ids in stack(batches, "ids")]


def assert_same_batches(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)
        assert (a.dropped, a.dropped_keys) == (b.dropped, b.dropped_keys)


def reference_row(source, position):
    """Returns (index, image, caption, dropped keys) by following the documented rule by hand."""
    order, dropped = grain.MapDataset.range(len(source)).seed(SEED).shuffle().repeat(), []
    for attempt in range(100):
        rng = np.random.Generator(np.random.Philox([SEED, position, attempt]))
        index = int(order[position] if attempt == 0 else rng.integers(len(source)))
        record = source[index]
        captions = [caption for caption in record.captions if caption.strip()]
        try:
            if captions:
                caption = captions[int(rng.integers(len(captions)))]
                image = images.decode_image(record.image)
                view = images.train_view(
                    image, resize_px=8, crop_px=6, method="pil", rng=rng, flip=True
                )
                return index, view, caption, dropped
        except images.BadImage:
            pass
        dropped.append(record.key)
    raise AssertionError("no usable record")


def test_train_batches_shapes_and_types_are_the_contract():
    (batch,) = take(1, make_source(), hash_pairs=True)
    found = {name: (array.shape, array.dtype.name) for name, array in batch.arrays.items()}
    assert found == {
        "image": ((5, 6, 6, 3), "uint8"),
        "ids": ((5, 12), "int32"),
        "mask": ((5, 12), "int32"),
        "index": ((5,), "int32"),
        "caption_hash": ((5, 2), "uint32"),
        "image_hash": ((5, 2), "uint32"),
    }
    assert batch.dropped == {} and batch.dropped_keys == {}


def test_every_epoch_is_another_permutation_and_no_remainder_is_dropped():
    batches = take(23, make_source(size=23), batch_size=5)  # 115 rows: exactly 5 epochs
    epochs = stack(batches, "index").reshape(5, 23)
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_another_seed_gives_another_order():
    first, second = (stack(take(4, make_source(), seed=s), "index") for s in (1, 2))
    assert not np.array_equal(first, second)


def test_batch_larger_than_the_source_wraps_around():
    index = take(1, make_source(size=3), batch_size=8)[0].arrays["index"]
    assert sorted(index[:3]) == sorted(index[3:6]) == [0, 1, 2]


def test_batches_equal_the_reference_implementation():
    source = make_source()
    batches = take(10, source)
    rows = [reference_row(source, position) for position in range(50)]
    np.testing.assert_array_equal(stack(batches, "index"), [row[0] for row in rows])
    np.testing.assert_array_equal(stack(batches, "image"), [row[1] for row in rows])
    assert captions_of(batches) == [row[2] for row in rows]


def test_start_at_step_k_equals_continuing_to_it():
    source = make_source()
    assert_same_batches(take(12, source)[7:], take(5, source, start_step=7))


def test_row_i_of_a_process_is_the_row_of_the_whole_batch_that_it_asked_for():
    source = make_source()
    whole = take(6, source, batch_size=8)
    for rows in ([0, 1], [4, 5], [0, 3, 6, 7]):
        part = take(6, source, batch_size=8, rows=rows)
        for step, batch in enumerate(whole):
            for name, array in batch.arrays.items():
                np.testing.assert_array_equal(part[step].arrays[name], array[rows], err_msg=name)


@pytest.mark.parametrize(("num_workers", "num_threads"), [(0, 4), (1, 2), (2, 1)])
def test_workers_and_threads_do_not_change_the_batches(num_workers, num_threads):
    records = [make_record(index, 3) for index in range(22)] + [Record("bad", b"", ("x",))]
    source = InMemory(records)
    plain = take(9, source, num_threads=1, hash_pairs=True)
    other = take(
        9, source, num_threads=num_threads, num_workers=num_workers, hash_pairs=True, start_step=0
    )
    assert_same_batches(plain, other)


def test_captions_are_drawn_anew_each_epoch_and_about_equally_often():
    records = [Record(f"key{index}", make_record(index).image, "abc") for index in range(200)]
    batches = take(12, InMemory(records), batch_size=200)  # 12 epochs
    drawn = np.array(captions_of(batches)).reshape(12, 200)
    by_record = np.take_along_axis(drawn, np.argsort(stack(batches, "index").reshape(12, 200)), 1)
    assert all(len(set(captions)) > 1 for captions in by_record.T)
    names, counts = np.unique(drawn, return_counts=True)
    assert list(names) == ["a", "b", "c"]
    # Binomial(2400, 1/3): mean 800, standard deviation 23; five of them.
    assert counts.min() > 800 - 115 and counts.max() < 800 + 115


def test_crops_and_flips_differ_between_epochs():
    batches = take(8, make_source(size=20), batch_size=20)
    views = stack(batches, "image")[stack(batches, "index") == 0]
    assert len({view.tobytes() for view in views}) > 4  # of 3 * 3 crops, mirrored or not


def test_bad_records_are_replaced_and_counted_exactly():
    bad = {
        "no-bytes": Record("no-bytes", b"", ("x",)),
        "html": Record("html", b"<html>404</html>", ("x",)),
        "blank": Record("blank", make_record(0).image, ("", "  ")),
    }
    source = InMemory([make_record(index) for index in range(7)] + list(bad.values()))
    batches = take(20, source)  # 100 rows: 10 epochs
    rows = [reference_row(source, position) for position in range(100)]
    dropped_keys = [key for row in rows for key in row[3]]
    assert {dropped_keys.count(key) >= 10 for key in bad} == {True}
    total = {}
    for batch in batches:
        assert set(batch.dropped) <= set(pipeline.DROP_REASONS)
        assert batch.dropped.keys() == batch.dropped_keys.keys()
        for reason, count in batch.dropped.items():
            total[reason] = total.get(reason, 0) + count
    assert total == {
        "image_empty": dropped_keys.count("no-bytes"),
        "image_not_an_image": dropped_keys.count("html"),
        "caption_empty": dropped_keys.count("blank"),
    }
    assert stack(batches, "index").max() < 7
    np.testing.assert_array_equal(stack(batches, "index"), [row[0] for row in rows])


def test_first_bad_key_of_each_reason_is_named():
    source = InMemory([make_record(0), Record("a.jpg", b"", ("x",))])
    batches = take(2, source, batch_size=2)
    assert batches[0].dropped_keys == {"image_empty": "a.jpg"}


def test_unreadable_record_is_dropped_and_counted():
    source = UnreadableSource([make_record(index) for index in range(4)])
    batches = take(4, source, batch_size=4)
    assert sum(batch.dropped["record_unreadable"] for batch in batches) >= 4
    assert batches[0].dropped_keys == {"record_unreadable": "record 2"}
    assert 2 not in stack(batches, "index")


def test_blank_captions_beside_others_are_never_drawn():
    source = InMemory([Record("k", make_record(0).image, ("", "yes", " \n"))])
    assert set(captions_of(take(10, source))) == {"yes"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_source_of_only_bad_records_fails_with_its_name_and_reasons(num_workers):
    source = InMemory([Record(f"key{index}", b"", ("x",)) for index in range(3)])
    with pytest.raises(RuntimeError) as caught:
        take(1, source, num_workers=num_workers)
    message = str(caught.value)
    assert "in memory: 3 pairs" in message and "image_empty 100" in message
    assert "\n" not in message


def test_hashes_are_equal_exactly_for_equal_captions_and_images():
    pixels, other = make_record(0).image, make_record(1).image
    records = [
        Record("a", pixels, ("A dog",)),
        Record("b", pixels.copy(), (" a DOG ",)),
        Record("c", other, ("a cat",)),
        Record("d", other.reshape(4, 16, 3), ("a dog!",)),
    ]
    (batch,) = take(1, InMemory(records), batch_size=4, hash_pairs=True)
    row = np.argsort(batch.arrays["index"])
    caption = [tuple(value) for value in batch.arrays["caption_hash"][row]]
    image = [tuple(value) for value in batch.arrays["image_hash"][row]]
    assert caption[0] == caption[1] and len(set(caption)) == 3
    assert image[0] == image[1] and len(set(image)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(source=InMemory([])), "holds no pairs"),
        (dict(seed=-1), "config.train.seed=-1"),
        (dict(seed=2**32), "config.train.seed=4294967296"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        take(1, **({"source": make_source()} | options))
    assert "\n" not in str(caught.value)


def test_closed_iterator_is_exhausted():
    batches = open_batches(make_source(), batch_size=4)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_program_that_never_closes_the_iterator_ends_silently(tmp_path, num_workers):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import test_pipeline
        if __name__ == "__main__":
            batches = test_pipeline.open_batches(
                test_pipeline.make_source(), batch_size=4, num_workers={num_workers}
            )
            print(next(batches).arrays["index"].shape)
        """)
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-W", "always", script],
        env={"PYTHONPATH": ":".join(path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "(4,)")
    assert done.stderr == ""
