"""The registry: the example of the docs, embedding once, protocols, `align eval --config`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import StubStep, decoded, error_of, read_lines

from align_jax import evals
from align_jax.cli import main as cli
from align_jax.data.sources.open_source import open_labelled
from align_jax.evals.tables import format_table

ROOT = Path(__file__).parents[1]


def example():
    """The two Python blocks of docs/evaluation.md: an evaluator, and its line in a config."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)


def test_the_example_of_the_docs_shows_up_in_table_metrics_and_json(
    project, tmp_path, monkeypatch, capfd
):
    code, line = example()
    assert len(code.splitlines()) <= 21
    monkeypatch.chdir(project)
    (tmp_path / "word_order.py").write_text(code)
    line = line.replace("word_order.py", str(tmp_path / "word_order.py"))
    text = (project / "config.py").read_text()
    (tmp_path / "config.py").write_text(text.replace("    return c\n", f"    {line}    return c\n"))
    StubStep().patch(monkeypatch)
    workdir = str(tmp_path / "run")
    assert cli.main(["train", "--config", f"{tmp_path}/config.py:plain", "--workdir", workdir]) == 0
    printed = capfd.readouterr().err
    assert "word order  cosine with itself reversed [%]  captions" in printed
    (metrics,) = (m for m in read_lines(tmp_path / "run/metrics.jsonl") if "eval/order" in str(m))
    assert metrics["eval/order/num_captions"] == 12
    (step,) = (tmp_path / "run/eval").glob("step_*.json")
    assert json.loads(step.read_text())["results"]["order/num_captions"] == 12
    # Once more, complete: the last results are shown in the same table.
    assert cli.main(["train", "--config", f"{tmp_path}/config.py:plain", "--workdir", workdir]) == 0
    assert "word order  cosine with itself reversed [%]  captions" in capfd.readouterr().err
    # And by `align eval`, with the protocol.
    assert cli.main(["eval", "--workdir", workdir]) == 0
    assert "word order  cosine" in capfd.readouterr().out
    content = json.loads((tmp_path / "run/eval/align_eval.json").read_text())
    assert content["results"]["order/same_reversed"] == metrics["eval/order/same_reversed"]
    protocol = content["provenance"]["protocols"]["order"]
    assert len(protocol["fingerprint"]) == 16 and len(content["provenance"]["model_fingerprint"])


def test_metrics_of_unknown_evaluators_are_a_plain_table():
    results = {"a/b": 1.5, "a/num": 12345, "c/problems/image_missing": 3}
    lines = format_table(results).splitlines()
    assert lines[0].split() == ["evaluator", "metric", "value"]
    assert [line.split() for line in lines[2:4]] == [["a", "b", "1.5"], ["a", "num", "12,345"]]


def test_every_type_can_be_imported_and_says_what_it_needs():
    for evaluator_type in evals.TYPES:
        with pytest.raises(ValueError, match=r"Evaluator 'x' needs '\w+'"):
            evals.make_evaluator("x", {"type": evaluator_type})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class Other:\n    pass\n", "AttributeError: module 'mine' has no attribute 'Mine'"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named"),
        (None, "mine.py of evaluator type '.*mine.py:Mine' does not exist"),
    ],
)
def test_an_evaluator_file_that_cannot_be_used_is_named(tmp_path, content, message):
    if content:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        evals.make_evaluator("x", {"type": f"{tmp_path}/mine.py:Mine"})


class Model:
    """Counts what it embeds."""

    def __init__(self):
        self.num_images = 0

    def encode_image(self, images, on_error):
        images = list(decoded(images, on_error))
        self.num_images += len(images)
        angle = np.array([image.mean() for image in images]) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def encode_text(self, texts):
        angle = np.arange(len(texts)) / 20
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_images_of_equal_sources_are_embedded_once_with_the_same_results():
    config = {
        "shape": {"type": "zeroshot", "source": "scenes?size=9&label=shape"},
        "near": {"type": "knn", "source": "scenes?size=9&label=shape", "k": 2},
        "other": {"type": "knn", "source": "scenes?size=9&label=colour", "k": 2},
    }
    model = Model()
    together = evals.run_evaluators(evals.make_evaluators(config), model)
    assert model.num_images == 18
    alone = {}
    for evaluator in evals.make_evaluators(config):
        alone |= evals.run_evaluators([evaluator], model)
    assert together == alone


def test_protocols_follow_data_and_arguments_and_not_paths(tmp_path):
    class Preprocessed(Model):
        from align_jax.hf.processor import Preprocessing

        preprocessing = Preprocessing(32, 40, "pil", 12, 200, "0" * 16)

    def fingerprint(**entry):
        config = {"k": {"type": "knn", "k": 2, **entry}}
        evaluators = evals.make_evaluators(config)
        return evals.protocols(config, evaluators, Preprocessed())["k"]["fingerprint"]

    first = fingerprint(source="scenes?size=9&label=shape")
    assert first == fingerprint(source=open_labelled("scenes?size=9&label=shape"))
    assert first != fingerprint(source="scenes?size=8&label=shape")
    assert first != fingerprint(source="scenes?size=9&label=shape", temperatures=(0.1,))


EVAL_CONFIG = """
from align_jax.config import default_config


def get_config():
    c = default_config()
    c.eval.evaluators.near = {"type": "knn", "source": "scenes?size=9&label=shape", "k": 2}
    c.eval.evaluators.words = {"type": "words", "pairs": "words.tsv"}
    c.eval.evaluators.lost = {"type": "knn", "source": "lost.zip"}
    return c
"""


def test_eval_runs_a_config_on_a_hugging_face_folder(tiny_hf, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evals.py").write_text(EVAL_CONFIG)
    (tmp_path / "words.tsv").write_text("a\tb\t1\nc\td\t2\na\td\t4\n")
    command = ["eval", "--model", str(tiny_hf[0]), "--config", "evals.py"]
    assert error_of(capfd, *command).startswith("Evaluator 'lost': lost.zip does not exist")
    command += ["--skip-missing", "--out", "out.json", "--set", "near.k=1,3"]
    command += ["--format", f"clip_benchmark:{tmp_path}/peer"]
    assert cli.main(command) == 0
    printed = capfd.readouterr().out
    assert "nearest images [%]" in printed and "lost: not run: lost.zip does not exist" in printed
    content = json.loads(Path("out.json").read_text())
    assert {"near/r1", "near/r3", "words/spearman"} <= set(content["results"])
    assert "near/r2" not in content["results"]
    assert content["provenance"]["skipped"]["lost"].startswith("lost.zip does not exist")
    assert len(content["provenance"]["model_fingerprint"]) == 16
    assert set(content["provenance"]["protocols"]) == {"near", "words"}
    assert cli.main([*command[:4], "evals.py", "--skip-missing", "--only", "lost"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "lost is left out: lost.zip does not exist",
        f"align: {tiny_hf[0]} has no evaluator to run: the data of none of the 1 are there, "
        "see above.",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "neer"), "--only: no evaluator 'neer'. Did you mean 'near'? There are: lost, "),
        (("--set", "near=3"), "--set 'near=3' must look like NAME.KEY=VALUE."),
        (("--set", "x.k=3"), "--set: no evaluator 'x'."),
        (("--only", "near", "--set", "near.kk=3"), "Evaluator 'near': Unknown argument of knn 'k"),
        (("--retrieval", "scenes?size=4"), "Give either --config or --retrieval and --zeroshot."),
        (("--config.trian.steps=3",), "Unknown key config.trian."),
    ],
)
def test_bad_arguments_of_eval_are_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evals.py").write_text(EVAL_CONFIG)
    (tmp_path / "words.tsv").write_text("a\tb\t1\nc\td\t2\na\td\t4\n")
    found = error_of(capfd, "eval", "--model", "none", "--config", "evals.py", *arguments)
    assert found.startswith(message)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"type": "retrieval", "source": "scenes?size=9", "max_pairs": "abc"}, "max_pairs='abc' "),
        ({"type": "retrieval", "source": "scenes?size=9", "max_pairs": 1.5}, "max_pairs=1.5 must"),
        ({"type": "retrieval", "source": 3}, ""),
        ({"type": "knn", "source": "a", "train": "b", "k": "x"}, "k='x' must be: "),
        ({"type": "similarity", "pairs": "p.tsv", "rounds": "x"}, "rounds='x' must be: int"),
        ({"type": "words", "pairs": 3}, "pairs=3 must be: "),
        ({"type": "zeroshot", "source": "a", "templates": 3}, "templates=3 must be: "),
    ],
)
def test_argument_of_another_type_is_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=re.escape(f"Evaluator 'mine': {message}")):
        evals.make_evaluators({"mine": entry})
