"""CLIP_benchmark's JSON and results side by side."""

import json

import pytest
from helpers import error_of

from align_jax.cli import main as cli
from align_jax.data.sources.open_source import InMemory
from align_jax.data.sources.record import Record
from align_jax.evals.comparison import compare
from align_jax.evals.peers import write_clip_benchmark
from align_jax.evals.retrieval import Retrieval
from align_jax.evals.similarity import Words
from align_jax.evals.zeroshot import ZeroShot


def test_clip_benchmark_files_have_its_schema_and_names(tmp_path):
    (tmp_path / "w.tsv").write_text("a\tb\t1\nc\td\t2\n")
    evaluators = [
        Retrieval("flickr30k", InMemory([Record("a", b"", ("x",))])),
        ZeroShot("shape", "scenes?size=4&label=shape"),
        Words("words", str(tmp_path / "w.tsv")),  # has no task there
    ]
    results = {
        "flickr30k/image_to_text_r5": 90.0,
        "flickr30k/text_to_image_r5": 70.0,
        "shape/top1": 50.0,
        "shape/mean_per_class": 40.0,
        "shape/num_classes": 4,
        "words/spearman": 3.0,
    }
    paths = write_clip_benchmark(
        tmp_path / "out", results, evaluators, model="org/align", pretrained="step7"
    )
    assert [path.name for path in paths] == [
        "flickr30k_step7_org-align_en_zeroshot_retrieval.json",
        "shape_step7_org-align_en_zeroshot_classification.json",
    ]
    retrieval, zeroshot = (json.loads(path.read_text()) for path in paths)
    assert retrieval == {
        "dataset": "flickr30k",
        "model": "org/align",
        "pretrained": "step7",
        "task": "zeroshot_retrieval",
        "metrics": {"image_retrieval_recall@5": 0.7, "text_retrieval_recall@5": 0.9},
        "language": "en",
    }
    assert zeroshot["metrics"] == {"acc1": 0.5, "mean_per_class_recall": 0.4}


def _write(path, step, fingerprint, results, k=5):
    protocol = {"type": "knn", "arguments": {"k": k}, "fingerprint": fingerprint}
    provenance = {"workdir": "mine", "step": step, "protocols": {"near": protocol}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance, "results": results}))


def test_results_side_by_side_warn_where_protocols_differ(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.json", 3, "x" * 16, {"near/r1": 12.345, "near/num_images": 1000})
    _write(tmp_path / "run/eval/align_eval.json", 9, "x" * 16, {"near/r1": 20.0, "b/top1": 1.0})
    text, warnings = compare(["a.json", "run"])
    assert warnings == []
    assert text.splitlines() == [
        "| metric | mine, step 3 | mine, step 9 |",
        "|---|---|---|",
        "| near/r1 | 12.35 | 20.00 |",
        "| near/num_images | 1,000 | - |",
        "| b/top1 | - | 1.00 |",
    ]
    _write(tmp_path / "c.json", 4, "y" * 16, {"near/r1": 1.0}, k=1)
    assert cli.main(["eval", "--report", "a.json", "c.json", "--out", "report.md"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "warning: near: the protocols differ in arguments.k.\n"
    text = (tmp_path / "report.md").read_text()
    assert "| near/r1* | 12.35 | 1.00 |" in text and "\\* near: the protocols differ" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--report", "a.json"), "A report compares two or more results"),
        (("--report", "a.json", "none.json"), "none.json does not exist"),
        (("--report", "a.json", "b.json"), "b.json holds no results of `align eval`."),
        (("--retrieval", "scenes?size=4"), "--model (or --workdir) is missing"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.json", 3, "x" * 16, {"near/r1": 12.345})
    (tmp_path / "b.json").write_text("[]")
    assert error_of(capfd, "eval", *arguments).startswith(message)
