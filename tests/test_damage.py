"""One source of many kinds of damage through every verb: the same counts by the same reasons."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from test_problems import Model

import align_jax
from align_jax import embed
from align_jax.cli import main as cli
from align_jax.config import default_config
from align_jax.curate.filter import curate
from align_jax.curate.pack.pack import pack
from align_jax.curate.scan import scan
from align_jax.data import tokenizer
from align_jax.data.pipeline import train_batches
from align_jax.data.sources.open_source import open_source
from align_jax.evals.retrieval import Retrieval

# Line of the table, and the reason by which it, or its image, is counted.
TABLE = (
    (b'{"image": "good.jpg", "caption": "a red dog"}', None),
    (b'{"image": "./good2.jpg", "caption": ["a red cat", null]}', None),
    (b'{"image": "return.jpg", "caption": "a lone \\r return"}', None),
    (b'{"image": "half.jpg", "caption": "cut emoji \\ud83d"}', "text_repaired"),
    (b'{"image": "latin.jpg", "caption": "caf\xe9"}', "text_repaired"),
    (b'{"image": "cut.jpg", "caption": "cut', "row_malformed"),
    (b'["list.jpg", "no object"]', "row_malformed"),
    (b'{"image": "number.jpg", "caption": 5}', "row_malformed"),
    (b'{"image": "long.jpg", "caption": "' + b"x" * 140_000 + b'"}', "row_malformed"),
    (b'{"image": "deep.jpg", "caption": ' + b"[" * 100_000 + b"}", "row_malformed"),
    (b'{"caption": "without a name"}', "row_malformed"),
    (b'{"image": "missing.jpg", "caption": "a picture"}', "image_missing"),
    (b'{"image": "null.jpg", "caption": null}', "caption_empty"),
    (b'{"image": "blank.jpg", "caption": " \\t"}', "caption_empty"),
    (b'{"image": "nothing.jpg", "caption": "a picture"}', "image_empty"),
    (b'{"image": "page.jpg", "caption": "a picture"}', "image_not_an_image"),
    (b'{"image": "truncated.jpg", "caption": "a picture"}', "image_truncated"),
    (b'{"image": "pixel.jpg", "caption": "a picture"}', "image_too_small"),
)
# Files beside good images.
SIDECARS = (
    ("good.txt", b"a red dog", None),
    ("mark.txt", b"\xef\xbb\xbfa red cat", None),
    ("mark2.json", b'\xef\xbb\xbf{"caption": "a red cow"}', None),
    ("latin.txt", b"caf\xe9", "caption_not_utf8"),
    ("wide.txt", "a dog".encode("utf-16"), "caption_not_utf8"),
    ("page.txt", b"x" * 30_000_000, "caption_too_long"),
    ("long.txt", b"x" * 140_000, "caption_too_long"),
    ("long2.json", b'{"caption": "' + b"x" * 140_000 + b'"}', "caption_too_long"),
    ("blank.txt", b" \r\n", "caption_empty"),
    ("cut.json", b'{"caption": "', "caption_empty"),
    ("half.json", b'{"caption": "cut \\ud83d"}', None),
    ("half2.json", b'{"caption": "\\ud83d"}', "caption_empty"),
)
OF_TEXT = {"row_malformed": 5, "text_repaired": 2}  # that which needs no images


def picture(side):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(params=["table", "sidecars"])
def damaged(request, tmp_path, monkeypatch):
    """(spec, Counter of reasons)"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    if request.param == "sidecars":
        for name, data, _ in SIDECARS:
            (tmp_path / "in" / name).write_bytes(data)
            (tmp_path / "in" / f"{name.partition('.')[0]}.jpg").write_bytes(picture(32))
        return "in", Counter(reason for *_, reason in SIDECARS if reason)
    odd = {
        "nothing": b"",
        "page": b"<html>",
        "truncated": picture(64)[:700],
        "pixel": picture(1),
    }
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(line for line, _ in TABLE))
    for line, reason in TABLE:
        name = line.partition(b'"image": "')[2].partition(b".jpg")[0].decode().removeprefix("./")
        if name and reason not in ("image_missing", "row_malformed"):
            data = odd[name] if name in odd else picture(32)
            (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
    return "t.jsonl?images=in", Counter(reason for _, reason in TABLE if reason)


def plain(problems):
    return {reason: entry["count"] for reason, entry in problems.items()}


def test_scan_pack_eval_and_embed_count_the_same(damaged, tiny_hf, capfd):
    spec, expected = damaged
    assert plain(scan(spec, "scan.parquet")["problems"]) == expected
    packed = pack(open_source(spec), "packed")
    assert Counter(packed["source_problems"]) + Counter(packed["skipped"]) == expected
    source = open_source("packed")
    texts = {text for index in range(len(source)) for text in source[index].captions}
    assert {"a red dog", "a red cat"} < texts and not any("\ufeff" in text for text in texts)

    evaluator = Retrieval("r", spec)
    results = evaluator(Model())
    assert evaluator.problems == expected
    lost = sum(expected.values()) - expected["text_repaired"]
    assert results["num_skipped"] == lost

    model = align_jax.load(tiny_hf[0], batch_size=16)
    embed.embed(model, embed.open_texts(spec), "texts", on_error="skip")
    found = plain(json.loads(open("texts/report.json").read())["problems"])
    needs_no_pixels = [r for r in expected if r == "image_missing" or not r.startswith("image_")]
    assert found == {reason: expected[reason] for reason in needs_no_pixels}


def test_training_draws_what_the_others_use(damaged):
    spec, expected = damaged
    source = open_source(spec)
    words = tokenizer.train_wordpiece(["a red dog cat cow"] * 2, 100)
    data = default_config().data
    data.update({"image_size": 8, "resize_size": 10, "max_tokens": 8, "num_threads": 1})
    batches = train_batches(source, words, data, batch_size=4, seed=0)
    dropped = Counter()
    for _ in range(2 * len(source)):
        dropped.update(next(batches).dropped)
    batches.close()
    found = {reason for reason, count in dropped.items() if count}
    assert found | set(source.problems) == set(expected)
    assert all(source.problems[reason] == expected[reason] for reason in source.problems)


@pytest.mark.parametrize("damaged", ["table"], indirect=True)
def test_vocab_and_curate_count_what_needs_no_images(damaged, capfd, tmp_path):
    assert cli.main(["vocab", "t.jsonl", "--out", "vocab", "--size", "200"]) == 0
    said = "text_repaired: 2 (first: t.jsonl:4); row_malformed: 5 (first: t.jsonl:6)"
    assert f"t.jsonl: problems: {said}" in capfd.readouterr().err
    preset = tmp_path / "p.py"
    preset.write_text(
        "from align_jax.curate.filter import rules\nRULES = [rules.has_text(source='-')]\n"
    )
    made = curate.curate("t.jsonl", "curated", preset=str(preset))
    assert made["unusable"] == {"row_malformed": OF_TEXT["row_malformed"], "not_downloaded": 0}
    assert made["text_repaired"] == OF_TEXT["text_repaired"]
    kept = parquet.read_table("curated/kept.parquet").to_pydict()
    assert "cut emoji \ufffd" in kept["text"] and "caf\ufffd" in kept["text"]
    report = pack(open_source("t.jsonl?images=in"), "packed", keep="curated/kept.parquet")
    assert report["skipped"].get("not_kept", 0) == 2  # of null and blank captions
