"""cli/: mistakes with the arguments of every verb, and what pack and vocab do with data."""

import json
import os

import pytest
from helpers import error_of, write_table
from transformers import AutoTokenizer

from align_jax.cli import main as cli
from align_jax.data import tokenizer
from align_jax.data.sources import open_source as sources

VERBS = (
    *("train", "eval", "compile", "bench", "embed", "classify", "convert"),
    *("scan", "curate", "decontaminate", "pack", "vocab"),
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--workdir", "images"),
            "images is no model: config.json is missing; name a workdir of ",
        ),
        (
            ("--workdir", "nowhere"),
            "nowhere does not exist; name a workdir of `align train`, a Hugging Face folder or a ",
        ),
        (
            ("--workdir", "run", "--retrieval", "data", "--step", "7"),
            "run has no checkpoint of step 7; it has [8, 10].",
        ),
        (
            ("--workdir", "run", "--retrieval", "nowhere"),
            "Evaluator 'retrieval': nowhere does not exist; accepted: ",
        ),
        (
            ("--workdir", "run", "--zeroshot", "scenes?size=4&label=shap"),
            "Evaluator 'zeroshot': label=shap of scenes is unknown; use ",
        ),
        (
            (
                *("--workdir", "run", "--zeroshot", "scenes?size=4&label=shape"),
                *("--template", "a shape"),
            ),
            "Evaluator 'zeroshot': Template 'a shape' has no {} to put the class name at.",
        ),
        (
            ("--workdir", "run", "--template", "a {}"),
            "--template is of no use without --zeroshot SOURCE.",
        ),
    ],
)
def test_wrong_eval_arguments_are_one_line(inside, capfd, arguments, message):
    assert error_of(capfd, "eval", *arguments).startswith(message)


def test_eval_of_a_workdir_without_evaluators_says_what_to_give(inside, capfd):
    assert error_of(capfd, "eval", "--workdir", "run") == (
        "run has no evaluator to run: give --config, --retrieval or --zeroshot."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "nowhere", "--out", "new"), "nowhere does not exist; accepted: "),
        (("pack", "captions.jsonl", "--out", "new"), "captions.jsonl does not say where its "),
        (
            ("pack", "captions.jsonl?images=images", "--out", "config.py"),
            "{here}/config.py is a file; name a folder.",
        ),
        (
            ("pack", "captions.jsonl?images=images", "--out", "data"),
            "{here}/data already has a split 'train'; choose another split or folder.",
        ),
        (("vocab", "nowhere", "--out", "new"), "nowhere does not exist; accepted: "),
        (("vocab", "data", "--out", "new", "--size", "10"), "--size 10 is too small; use at "),
        (("vocab", "data", "--out", "config.py"), "config.py is a file; name a folder."),
    ],
)
def test_wrong_pack_and_vocab_arguments_are_one_line(inside, capfd, arguments, message):
    assert error_of(capfd, *arguments).startswith(message.format(here=os.getcwd()))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("train", "--config", "config.py"),
        ("train", "--workdir", "new"),
        ("eval", "--workdir", "run", "--step", "x"),
        ("eval", "--workdir", "run", "--config.eval.batch_size=3"),
        ("pack", "captions.jsonl?images=images"),
        ("vocab", "data", "--out", "new", "--size", "many"),
        ("embed", "--model", "run", "--out", "new"),
        ("embed", "--model", "run", "--images", "images", "--texts", "a.txt", "--out", "new"),
        ("embed", "--model", "run", "--images", "images", "--out", "new", "--format", "csv"),
        ("classify", "--model", "run", "--labels", "a,b"),
        ("classify", "images/0.jpg", "--model", "run"),
        ("convert", "run"),
        ("convert", "run", "new", "--to", "onnx"),
    ],
)
def test_wrong_arguments_exit_with_2(inside, capfd, arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("align: ") and line.endswith(" --help`.")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_one_example(capfd, verb):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([verb, "--help"])
    assert exit_info.value.code == 0
    assert capfd.readouterr().out.count(f"example: align {verb} ") == 1


def test_pack_prints_its_report_and_drops_what_cannot_be_used(inside, tmp_path, capfd):
    with open("captions.jsonl") as file:
        rows = [json.loads(line) for line in file]
    rows[2]["captions"] = [" "]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    rows.append({"image": "broken.jpg", "captions": ["broken"]})
    write_table(tmp_path / "captions.jsonl", rows)
    spec = f"{tmp_path}/captions.jsonl?images=images,{tmp_path}"
    assert cli.main(["pack", spec, "--out", str(tmp_path / "out"), "--split", "dev"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["records_written"] == 11
    assert report["skipped"] == {"caption_empty": 1, "image_truncated": 1}
    packed = sources.open_source(f"{tmp_path / 'out'}?split=dev")
    assert len(packed) == 11 and packed[0].captions == tuple(rows[0]["captions"])


def test_vocab_writes_a_tokenizer_that_hugging_face_reads(inside, tmp_path, capfd):
    assert cli.main(["vocab", "data", "--out", str(tmp_path), "--size", "200"]) == 0
    ours = tokenizer.load_tokenizer(tmp_path)
    assert capfd.readouterr().out == (
        f"wrote {ours.vocab_size} wordpieces to {tmp_path} ({ours.fingerprint()})\n"
    )
    ids, mask = ours.encode(["a red square"], 8)
    theirs = AutoTokenizer.from_pretrained(tmp_path)("a red square")["input_ids"]
    assert ids[0][mask[0] == 1].tolist() == theirs
    assert "square" in ours.tokens
