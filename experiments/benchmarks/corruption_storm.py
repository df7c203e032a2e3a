"""What damaged web data costs: `align pack` and the training input with 5 % of records damaged.

Writes the pairs of a source as img2dataset shards, once whole and once with every kind of damage,
and packs and reads both in turn. Fails if a count of dropped records is not the one injected.

    python experiments/benchmarks/corruption_storm.py 'train.jsonl?images=train.zip' --workers 2

tests/test_corruption_storm.py uses `damage` and `write_shards`.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import resource
import shutil
import tarfile
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from align_jax import config
from align_jax.curate.pack.pack import pack
from align_jax.data import pipeline, tokenizer
from align_jax.data.sources.open_source import open_source


@dataclasses.dataclass(frozen=True)
class Sample:
    """A pair as it lies in a tar: key.suffix and key.txt."""

    key: str
    image: bytes
    caption: bytes
    suffix: str = "jpg"


def damage(samples: list[Sample], every: int = 20, kinds=None) -> tuple[list[Sample], dict]:
    """Returns the samples with every `every`-th damaged, the kinds in turn, and reason -> count."""
    kinds = list(kinds or KINDS)
    samples, counts = list(samples), collections.Counter()
    for number, place in enumerate(range(every // 2, len(samples), every)):
        change, reason = KINDS[kinds[number % len(kinds)]]
        samples[place] = change(samples[place], samples[place - 1])
        if reason is not None:
            counts[reason] += 1
    return samples, dict(counts)


def write_shards(folder: str, samples: list[Sample], shard_size: int) -> None:
    """Writes the samples as img2dataset does."""
    os.makedirs(folder)
    for number, start in enumerate(range(0, len(samples), shard_size)):
        part = samples[start : start + shard_size]
        stem = os.path.join(folder, f"{number:05d}")
        with tarfile.open(f"{stem}.tar", "w") as archive:
            for sample in part:
                add_file(archive, f"{sample.key}.{sample.suffix}", sample.image)
                add_file(archive, f"{sample.key}.txt", sample.caption)
        keys = [sample.key for sample in part]
        pq.write_table(
            pa.table({"key": keys, "status": ["success"] * len(keys)}), f"{stem}.parquet"
        )
        with open(f"{stem}_stats.json", "w") as file:
            json.dump({"count": len(keys), "successes": len(keys)}, file)


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _image(data):
    """Changes the image by a function of its bytes."""
    return lambda sample, _: dataclasses.replace(sample, image=data(sample.image))


def _saved(kind, convert=lambda image: image, **options):
    def change(sample, _):
        file = io.BytesIO()
        with Image.open(io.BytesIO(sample.image)) as image:
            convert(image.convert("RGB")).save(file, kind, **options)
        return dataclasses.replace(sample, image=file.getvalue())

    return change


def _caption(text):
    return lambda sample, _: dataclasses.replace(sample, caption=text)


def _sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)


@functools.cache
def _blank(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


_STEPS, _BATCH_SIZE = 40, 128  # read from the training input
_FRAME = Image.new("RGB", (128, 128), "red")

# kind -> (change of (sample, its whole predecessor), reason to drop it or None if it is usable)
KINDS = {
    "zero bytes": (_image(lambda data: b""), "image_empty"),
    "HTML": (_image(lambda data: b"<!DOCTYPE html><html>404</html>"), "image_not_an_image"),
    "cut off": (_image(lambda data: data[: len(data) * 2 // 3]), "image_truncated"),
    "header damaged": (_image(lambda data: data[:3] + b"\0" * 200), "image_damaged"),
    "100 megapixels": (_image(lambda data: _blank(10_000, 10_000)), "image_too_large"),
    "tracking pixel": (_image(lambda data: _blank(1, 1)), "image_too_small"),
    "empty caption": (_caption(b""), "caption_empty"),
    "blank caption": (_caption(b" \n\t"), "caption_empty"),
    "caption not UTF-8": (_caption("Café".encode("latin-1") + b"\xff\xfe"), "caption_not_utf8"),
    "key twice": (lambda own, last: dataclasses.replace(own, key=last.key), "key_duplicate"),
    "CMYK": (_saved("JPEG", lambda image: image.convert("CMYK")), None),
    "16 bits": (_saved("PNG", _sixteen_bits), None),
    "palette": (_saved("PNG", lambda image: image.convert("P")), None),
    "animated": (_saved("GIF", save_all=True, append_images=[_FRAME]), None),
    "turned by EXIF": (_saved("JPEG", exif=_turned()), None),
    "PNG named .jpg": (_saved("PNG"), None),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="whole pairs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shard-size", type=int, default=1000)
    args = parser.parse_args()
    pairs = open_source(args.source)
    samples = []
    for index in range(len(pairs)):
        record = pairs[index]
        samples.append(Sample(f"{index:09d}", record.image, record.captions[0].encode()))
    stormy, expected = damage(samples)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"whole": samples, "storm": stormy}
        for name, content in sets.items():
            write_shards(os.path.join(folder, name), content, args.shard_size)
        whole = open_source(os.path.join(folder, "whole"))
        texts = (whole.captions(index)[0] for index in range(len(whole)))
        words = tokenizer.train_wordpiece(texts, vocab_size=2000)
        seconds = collections.defaultdict(list)  # (stage, set) -> (wall, CPU) of each repeat
        for _ in range(args.repeats):
            for name in sets:
                source = os.path.join(folder, name)
                with _stopwatch(seconds["pack", name]):
                    report = pack(
                        open_source(source), os.path.join(folder, "out"), num_workers=args.workers
                    )
                shutil.rmtree(os.path.join(folder, "out"))
                assert report["skipped"] == (expected if name == "storm" else {}), report["skipped"]
                _read_batches(open_source(source), words, seconds["input", name])
    print(json.dumps({"pairs": len(samples), "dropped, as injected": expected}, indent=2))
    pairs = {"pack": len(samples), "input": _STEPS * _BATCH_SIZE}
    for stage, count in pairs.items():
        for column, clock in enumerate(("wall", "CPU")):
            rates = {name: count / np.array(seconds[stage, name])[:, column] for name in sets}
            whole, storm = (np.median(rates[name]) for name in ("whole", "storm"))
            print(
                f"{stage}, pairs per {clock} second: whole {whole:.0f}, storm {storm:.0f}, loss "
                f"{100 * (1 - storm / whole):.1f} % (medians; whole {rates['whole'].round()}, "
                f"storm {rates['storm'].round()})"
            )


@contextlib.contextmanager
def _stopwatch(seconds):
    def now():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return np.array([time.monotonic(), sum(u.ru_utime + u.ru_stime for u in used)])

    start = now()
    yield
    seconds.append(now() - start)


def _read_batches(source, words, seconds):
    len(source)  # indexed before the clock starts
    data = config.default_config().data
    data.image_size, data.resize_size, data.resize, data.max_tokens = 96, 112, "pil", 32
    batches = pipeline.train_batches(source, words, data, batch_size=_BATCH_SIZE, seed=0)
    next(batches)
    with _stopwatch(seconds):
        for _ in range(_STEPS):
            next(batches)
    batches.close()


if __name__ == "__main__":
    main()
