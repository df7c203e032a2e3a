"""The files of other evaluation tools; results side by side and beside published ones."""

import json

import numpy as np
import pytest
import torch
from helpers import LevelModel, error_of
from PIL import Image

from align_jax.cli import main as cli
from align_jax.data.sources.open_source import InMemory
from align_jax.data.sources.record import Record
from align_jax.evals import peers
from align_jax.evals.comparison import compare, to_markdown, write_picture
from align_jax.evals.retrieval import Retrieval, index_ranks, retrieval_recalls
from align_jax.evals.similarity import Words
from align_jax.evals.zeroshot import ZeroShot, zeroshot_accuracy


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
    about = {"model": "org/align", "pretrained": "step7"}
    paths = peers.write("clip_benchmark", tmp_path / "out", results, evaluators, **about)
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
    found = compare(["a.json", "run"])
    assert found.warnings == {}
    assert to_markdown(found).splitlines() == [
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
        (("--model", "m", "--format", "csv"), "--format 'csv' is unknown; use one of: clip_b"),
        (("--model", "m", "--format", "mteb"), "--format mteb: m is no workdir; add :DIR to say"),
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


def test_published_numbers_stand_beside_evaluators_of_their_name_and_type(tmp_path):
    results = {
        "flickr30k/image_to_text_r1": 80.0,
        "flickr30k/image_to_text_r1_low": 78.0,
        "flickr30k/image_to_text_r1_high": 82.04,
        "flickr30k/num_images": 1000,
        "flickr30k/num_captions": 5000,
        "imagenet/top1": 50.0,
    }
    types = {"flickr30k": "retrieval", "imagenet": "probe"}  # published is zero-shot
    protocols = {name: {"type": t, "fingerprint": "x"} for name, t in types.items()}
    content = {"provenance": {"workdir": "mine", "protocols": protocols}, "results": results}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = compare([tmp_path / "a.json"])
    lines = to_markdown(found).splitlines()
    assert lines[0] == "| metric | mine | ALIGN | COYO-ALIGN | align-base (MIEB) |"
    assert lines[2] == "| flickr30k/image_to_text_r1 | 80.00 [78.0, 82.0] | 88.60 | 88.10 | 87.30 |"
    assert lines[5] == "| imagenet/top1 | 50.00 | - | - | - |"
    assert any("Jia et al. 2021" in line for line in lines)
    write_picture(tmp_path / "a.png", found)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_mteb_and_open_clip_have_their_keys(tmp_path):
    images = [Record(str(i), np.full((2, 2, 3), 40 * i, np.uint8), texts)
              for i, texts in enumerate([("0", "41"), ("40",), ("80", "79")])]  # fmt: skip
    retrieval = Retrieval("flickr30k", InMemory(images))
    shapes = ZeroShot("imagenet_v2", "scenes?size=9&label=shape")
    metrics = {f"flickr30k/{key}": value for key, value in retrieval(LevelModel()).items()}
    metrics |= {"imagenet_v2/top1": 25.0, "imagenet_v2/top5": 75.0}
    about = {"model": "m", "pretrained": "p"}
    paths = peers.write("mteb", tmp_path / "m", metrics, [retrieval, shapes], **about)
    assert [path.name for path in paths] == [
        "flickr30kI2T.json", "flickr30kT2I.json", "imagenet_v2ZeroShot.json"
    ]  # fmt: skip
    (scores,) = json.loads(paths[1].read_text())["scores"]["test"]
    # The caption 41 finds image 0 third: the others are first.
    assert scores["main_score"] == pytest.approx((4 + 1 / np.log2(4)) / 5)
    assert scores["hit_rate_at_1"] == pytest.approx(0.8) and scores["languages"] == ["eng-Latn"]
    (scores,) = json.loads(paths[0].read_text())["scores"]["test"]
    # Image 0: right at 1 and 3 of two; image 1: right at 1 of one; image 2: right at 1 and 2.
    ideal = 1 + 1 / np.log2(3)
    assert scores["ndcg_at_10"] == pytest.approx(((1 + 1 / 2) / ideal + 1 + 1) / 3)
    (path,) = peers.write("open_clip", tmp_path / "o", metrics, [retrieval, shapes], **about)
    first, second = map(json.loads, path.read_text().splitlines())
    assert second["imagenetv2-zeroshot-val-top1"] == 0.25 and second["dataset"] == "imagenet_v2"
    assert first["text_to_image_R@1"] == pytest.approx(0.8) and first["num_samples"] == 3


def test_numbers_equal_the_functions_of_clip_benchmark(monkeypatch):
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    # It gives float() an array of one number, which NumPy no longer takes.
    of_one = lambda x: np.asarray(x).item()  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", of_one, raising=False)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    owner = np.repeat(np.arange(60), 4)
    found = retrieval_recalls(*index_ranks(z[:60], z[60:], owner))
    scores = torch.tensor(z[60:] @ z[:60].T)
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(240), torch.tensor(owner)] = True
    for k in (1, 5, 10):
        recall = zeroshot_retrieval.recall_at_k
        for key, value in (
            ("text_to_image", recall(scores, positive, k)),
            ("image_to_text", recall(scores.T, positive.T, k)),
        ):
            expected = (value > 0).double().mean().item()
            assert found[f"{key}_r{k}"] / 100 == pytest.approx(expected, abs=1e-6)
    labels = rng.integers(0, 9, 240)
    found = zeroshot_accuracy(z[60:], z[:9], labels, ties="index")
    logits, target = torch.tensor(z[60:] @ z[:9].T), torch.tensor(labels)
    acc1, acc5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
    balanced = zeroshot_classification.balanced_accuracy_score(target, logits.argmax(axis=1))
    expected = {"top1": 100 * acc1, "top5": 100 * acc5, "mean_per_class": 100 * balanced}
    assert found == pytest.approx(expected, abs=1e-4)
