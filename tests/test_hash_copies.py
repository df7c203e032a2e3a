"""Copies as people make them: hashes of 16 of each evaluation image find them in training data."""

import imagehash
import numpy as np
import pytest
from helpers import error_of, write_table
from PIL import Image, ImageOps
from pyarrow import parquet

from align_jax.curate.near_duplicates.decontaminate import decontaminate
from align_jax.curate.scan import scan
from align_jax.data.perceptual_hash import COPIES, parse_hashes, phash_copies

WIDTH, HEIGHT = 180, 120


def make_photo(seed, size=(WIDTH, HEIGHT)):
    """A picture of few large shapes, as photos are."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def cropped(image, share):
    x, y = round(share * image.width), round(share * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


def square(image):
    left = (image.width - image.height) // 2
    return image.crop((left, 0, left + image.height, image.height))


MADE = {
    "as it is": lambda image: image,
    "5% cropped": lambda image: cropped(image, 0.05),
    "10% cropped": lambda image: cropped(image, 0.1),
    "17% cropped": lambda image: cropped(image, 0.17),
    "centre square": square,
    "black border": lambda image: ImageOps.expand(image, (9, 6), "black"),
    "white border": lambda image: ImageOps.expand(image, (9, 6), "white"),
    "letterbox": lambda image: ImageOps.expand(image, (0, 30), "black"),
}
MADE |= {
    f"mirrored, {name}": lambda i, f=made: ImageOps.mirror(f(i)) for name, made in MADE.items()
}


def test_hashes_of_copies_are_those_of_imagehash_of_the_copies():
    assert tuple(MADE) == COPIES
    image = make_photo(1)
    made = parse_hashes([str(imagehash.phash(alter(image))) for alter in MADE.values()])
    bits = np.bitwise_count(made ^ parse_hashes(phash_copies(np.asarray(image))))
    assert bits.max() <= 2  # mirrored before shrinking or after: values on the median flip
    assert (bits == 0).mean() > 0.6
    for size in ((1, 1), (2, 9), (3, 1)):
        assert len(phash_copies(np.asarray(make_photo(2, size)))) == 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with evaluation photos, and training images that are copies of them and others."""
    folder = tmp_path_factory.mktemp("copies")
    for name in ("eval", "train"):
        (folder / name).mkdir()
    for seed in range(3):
        make_photo(seed).save(folder / "eval" / f"{seed}.png")
        for number, alter in enumerate(MADE.values()):
            small = alter(make_photo(seed))
            small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BICUBIC)
            small.save(folder / "train" / f"{seed}-{number:02d}.jpg", quality=60)
        make_photo(100 + seed).save(folder / "train" / f"other-{seed}.jpg")
    for name in ("eval", "train"):
        rows = [{"image": path.name, "captions": ["a"]} for path in (folder / name).iterdir()]
        write_table(folder / f"{name}.jsonl", sorted(rows, key=str))
    return folder


def test_copies_of_evaluation_images_are_found_by_default(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures)
    pairs = "eval.jsonl?images=eval"
    scan("train.jsonl?images=train", tmp_path / "train.parquet")
    train = str(tmp_path / "train.parquet")
    report = decontaminate(train, [pairs], tmp_path / "out", sheet=True)
    rows = parquet.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    wanted = [(f"{s}-{n:02d}.jpg", f"{s}.png") for s in range(3) for n in range(len(COPIES))]
    assert [(row["key"], row["match_key"]) for row in rows] == wanted
    assert {row["copy"] for row in rows} == set(COPIES)
    against = report["against"][0]
    assert against["hashes_per_image"] == 16 and sum(against["copies"].values()) == 48
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size[0] > 1000
    as_is = decontaminate(train, [pairs], tmp_path / "as_is", copies=False)
    assert as_is["against"][0]["hashes_per_image"] == 1 and as_is["dropped"] < 10


def test_tables_without_pictures_say_so(pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval").symlink_to(pictures / "eval")
    (tmp_path / "eval.jsonl").write_bytes((pictures / "eval.jsonl").read_bytes())
    scan("eval.jsonl?images=eval", "eval.parquet")
    table = parquet.read_table("eval.parquet")
    parquet.write_table(table.replace_schema_metadata(), "plain.parquet")
    capfd.readouterr()
    report = decontaminate("eval.parquet", ["plain.parquet"], "out")
    assert report["against"][0]["hashes_per_image"] == 1 and report["dropped"] == 3
    assert capfd.readouterr().err.startswith("plain.parquet does not say where its images are, ")
    (tmp_path / "eval.jsonl").unlink()
    arguments = ("decontaminate", "plain.parquet", "--against", "eval.parquet", "--out", "other")
    line = error_of(capfd, *arguments)
    assert line.startswith("eval.parquet is a scan of eval.jsonl?images=eval, which cannot be ope")
    assert "--as-is" in line
