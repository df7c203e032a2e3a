"""The recipe for real pairs from end to end, on made data in the files that it expects."""

import io
import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import environment, read_lines, run_align
from PIL import Image

from align_jax import config, config_checks
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.scenes import Scenes

ROOT = Path(__file__).parents[1]


def pictures(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in images.items():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder):
    def scenes(seed, count, side=64):
        made = Scenes(count, seed=seed, image_size_px=side)
        return [(np.asarray(made[i].image), made[i].captions) for i in range(count)]

    train, dev = scenes(1, 60), scenes(2, 12)
    train[7] = (dev[3][0][:, ::-1].copy(), train[7][1])  # a mirrored photo of the evaluation
    for name, pairs in (("train", train), ("dev", dev)):
        pictures(folder / f"flickr8k/{name}.zip", {f"{i}.png": x for i, (x, _) in enumerate(pairs)})
        rows = [
            {"image": f"{i}.png", "captions": texts, "zh": [f"图 {i}"], "ar": [f"صورة {i}"]}
            | {"multi30k": {code: f"{code} {i}" for code in ("en", "de", "fr", "cs")}}
            for i, (_, texts) in enumerate(pairs)
        ]
        lines(folder / f"flickr8k/{name}.jsonl", rows)
    web = scenes(3, 30, side=128)
    pictures(folder / "cc3m/00000.zip", {f"{i}.png": image for i, (image, _) in enumerate(web)})
    rows = [
        {"shard": "00000.zip", "image": f"{i}.png", "captions": texts[:1]}
        for i, (_, texts) in enumerate(web)
    ]
    lines(folder / "cc3m/train.jsonl", rows)
    for vendor, seed in (("twemoji", 4), ("openmoji", 5)):
        drawn = {f"{i:X}.png": image for i, (image, _) in enumerate(scenes(seed, 20))}
        pictures(folder / f"emoji/{vendor}.zip", drawn)
    both = ["twemoji", "openmoji"]
    rows = [
        {"hex": f"{i:X}", "label": f"thing {i}", "tags": ["a", "b"] * (i % 2), "vendors": both}
        for i in range(20)
    ]
    lines(folder / "emoji/emoji.jsonl", rows)


def captions(folder):
    source = open_source(f"{folder}?split=train")
    return {source[index].key: tuple(source[index].captions) for index in range(len(source))}


def test_points_of_the_studies_are_valid_and_differ():
    file = ROOT / "experiments/real_pairs/studies/config.py"
    points = runpy.run_path(str(file))["POINTS"]
    found = set()
    for point in points:
        c = config.load_config(f"{file}:{point}")
        config_checks.validate(c, num_devices=1, num_processes=1)
        found.add(c.to_json())
    assert len(found) == len(points) == 21
    with pytest.raises(ValueError, match="point 'wrong10' is unknown; use one of wrong0, "):
        config.load_config(f"{file}:wrong10")


@pytest.mark.slow
def test_sets_are_packed_without_copies_and_the_config_trains_and_evaluates_on_them(tmp_path):
    make_data(tmp_path / "data")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("align", "-m align_jax.cli.main"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    env = environment(tmp_path / "cache")
    packed = tmp_path / "packed"

    def prepare(script):
        done = subprocess.run(
            ["bash", ROOT / "experiments/real_pairs" / script, tmp_path / "data", packed],
            env=env | {"PATH": f"{programs}:{env['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    prepare("prepare.sh")
    reports = {
        name: json.loads((packed / name / "pack_report.json").read_text())
        for name in ("flickr8k", "cc3m", "emoji")
    }
    assert "7.png" in reports["flickr8k"]["train"]["skipped_keys"]["dropped_by_list"]
    assert reports["flickr8k"]["dev"]["records_written"] == 12
    assert reports["emoji"]["openmoji"]["records_written"] == 20

    (tmp_path / "data/text").mkdir()
    words = ["[CLS]", "##ing", "a", "red", "blue", "circle", "square"]
    (tmp_path / "data/text/bert-base-uncased-vocab.txt").write_text("\n".join(words) + "\n")
    prepare("prepare_studies.sh")
    straight = captions(packed / "flickr8k")
    assert "7.png" not in straight
    different = set()
    for percent in (25, 50, 75):
        found = captions(packed / f"wrong{percent}/flickr8k")
        assert found.keys() == straight.keys()
        wrong = {key for key in found if found[key] != straight[key]}
        # Some scenes have the captions of another.
        assert 0.8 * percent / 100 * 60 <= len(wrong) <= percent / 100 * 60
        assert different <= wrong
        different = wrong
    assert captions(packed / "flickr8k_zh")["3.png"] == ("图 3",)
    assert captions(packed / "flickr8k_en") == straight
    assert (packed / "entries.txt").read_text().split() == ["red", "blue", "circle", "square"]
    assert captions(packed / "cc3m_align").keys() <= captions(packed / "cc3m").keys()

    done = run_align(
        *("train", "--config", f"{ROOT}/configs/real_pairs.py:{packed}", "--workdir", "run"),
        *("--config.train.steps=2", "--config.train.batch_size=64"),
        *("--config.data.vocab_size=300", "--config.optim.warmup_steps=1"),
        cwd=tmp_path,
        env=env,
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"eval/dev/image_to_text_r10", "eval/emoji/text_to_image_r10"} <= last.keys()
