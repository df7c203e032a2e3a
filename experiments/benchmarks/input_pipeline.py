"""Training input of align_jax, tf.data, torch's DataLoader with Pillow, and webdataset, in turns.

    python experiments/benchmarks/input_pipeline.py --photos photos.zip [--size 400x300]

All read the same JPEGs, decode, resize to 346 px where they are not, cut out 289 px at random,
mirror half of them and deliver shuffled uint8 batches of 256 on 2 cores; align_jax also tokenises
the captions. Each loader lives in a process of its own and is measured for some batches in each
round, the others idle. Peers whose packages are missing are left out:

    pip install tensorflow-cpu torch webdataset simplejpeg
"""

import argparse
import importlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

RESIZE_PX, CROP_PX, BATCH, CORES = 346, 289, 256, 2
SHARDS = 4
PACKAGES = {
    "align_jax, pil": "PIL",
    "align_jax, tf": "PIL",
    "align_jax, pil, simplejpeg, processes": "simplejpeg",
    "align_jax, pil, simplejpeg": "simplejpeg",
    "align_jax, tf, simplejpeg": "simplejpeg",
    "tf.data": "tensorflow",
    "torch DataLoader": "torch",
    "webdataset": "webdataset",
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", help=".zip of photos, of which four make an image; else scenes")
    parser.add_argument("--size", default="346x346", help="of the JPEGs (default: 346x346)")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="timed in each round (default: 8)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve[0], Path(args.serve[1]), args.batches)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        size = tuple(map(int, args.size.split("x")))
        mean_bytes = write_data(Path(folder), args.photos, size, args.images)
        print(f"{args.images} JPEGs of {args.size}, {mean_bytes / 1000:.1f} kB each; {CORES} cores")
        rows = compare(folder, args.rounds, args.batches)
    best = max((rate for name, (rate, _) in rows.items() if "align_jax" not in name), default=None)
    print("| loader | images/s | of the best peer | CPU ms an image |\n|---|---|---|---|")
    for name, (rate, cpu_ms) in rows.items():
        ratio = f"{rate / best:.2f}" if best else "-"
        print(f"| {name} | {rate:.0f} | {ratio} | {cpu_ms:.2f} |")


def compare(folder, rounds, batches):
    """Returns loader -> (median images/s, median CPU ms an image)."""
    loaders = {}
    for name in PACKAGES:
        command = [sys.executable, __file__, "--serve", name, folder, "--batches", str(batches)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = child.stdout.readline().strip()
        if answer.startswith("ready"):
            loaders[name] = child
        print(f"{name}: {answer or 'failed'}", flush=True)
    results = {name: [] for name in loaders}
    for number in range(rounds):
        for name, child in loaders.items():
            print("go", file=child.stdin, flush=True)
            results[name].append(json.loads(child.stdout.readline()))
        last = [f"{name} {r[-1][0]:.0f}/s {r[-1][1]:.2f} ms" for name, r in results.items()]
        print(f"round {number + 1}: {'; '.join(last)}", flush=True)
    for child in loaders.values():
        child.stdin.close()
        child.wait()
    return {
        name: tuple(statistics.median(column) for column in zip(*found, strict=True))
        for name, found in results.items()
    }


def serve(name, folder, batches):
    """Measures one loader each time a line comes in."""
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        print(f"left out ({error})", flush=True)
        return
    if "align_jax" in name and "simplejpeg" not in name:
        sys.modules["simplejpeg"] = None  # as if it were not installed
    make = LOADERS[name](folder)
    print(f"ready, {package.__name__} {getattr(package, '__version__', '')}", flush=True)
    for _ in sys.stdin:
        loader = make()
        for _ in range(8):  # whatever a loader reads ahead at its start
            check(next(loader))
        cpu_s, start_s = tree_cpu_s(os.getpid()), time.perf_counter()
        for _ in range(batches):
            check(next(loader))
        took_s, cpu_s = time.perf_counter() - start_s, tree_cpu_s(os.getpid()) - cpu_s
        loader.close()
        images = batches * BATCH
        print(json.dumps((images / took_s, cpu_s / images * 1000)), flush=True)


def check(images):
    assert images.shape == (BATCH, CROP_PX, CROP_PX, 3) and str(images.dtype).endswith("uint8")


def tree_cpu_s(pid):
    """Returns the CPU seconds of a process and those it started, while they live."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = [p.read_text().split() for p in Path(f"/proc/{pid}/task").glob("*/children")]
    return own + sum(map(tree_cpu_s, itertools.chain(*children)))


def write_data(folder, photos, size, count):
    """Writes the same images as files, tars and ArrayRecord; returns their mean size in bytes."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from align_jax.curate.pack import pack
    from align_jax.data.sources import open_source as sources
    from align_jax.data.sources.record import Record

    (folder / "files").mkdir()
    records = []
    for i, image in enumerate(itertools.islice(mosaics(photos), count)):
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        key = f"{i:06d}"
        (folder / "files" / f"{key}.jpg").write_bytes(buffer.getvalue())
        caption = f"a dog number {i} runs over the grass towards a man with a red hat"
        records.append(Record(key, buffer.getvalue(), (caption,)))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in sorted((folder / "files").iterdir())[shard::SHARDS]:
                tar.add(path, path.name)
    pack.pack(sources.InMemory(records), folder / "pairs")
    return statistics.mean(len(record.image) for record in records)


def mosaics(photos):
    """Yields endless images of as much detail as photos have: 2 x 2 photos of 128 px each."""
    from align_jax.data.sources import scenes

    if photos:
        archive = zipfile.ZipFile(photos)
        names = [n for n in archive.namelist() if n.endswith((".jpg", ".png"))][:1000]
        tiles = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    else:
        pictures = scenes.Scenes(size=1000, seed=0, image_size_px=128)
        tiles = [Image.fromarray(pictures[i].image) for i in range(len(pictures))]
    for start in itertools.count():
        mosaic = Image.new("RGB", (256, 256))
        for part in range(4):
            tile = tiles[(4 * start + part + start // 250) % len(tiles)].resize((128, 128))
            mosaic.paste(tile, (part % 2 * 128, part // 2 * 128))
        yield mosaic


def ours(method, num_threads, num_workers, folder):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from align_jax import config
    from align_jax.data import pipeline, tokenizer
    from align_jax.data.sources import open_source as sources

    source = sources.open_source(str(folder / "pairs"))
    wordpieces = tokenizer.train_wordpiece(
        itertools.chain(*map(source.captions, range(500))), vocab_size=300
    )

    def batches():
        data = config.default_config().data
        data.image_size, data.resize_size, data.resize = CROP_PX, RESIZE_PX, method
        data.num_threads, data.num_workers = num_threads, num_workers
        found = pipeline.train_batches(source, wordpieces, data, batch_size=BATCH, seed=0)
        try:
            for batch in found:
                yield batch.arrays["image"]
        finally:
            found.close()

    return batches


def tf_data(folder):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    paths = sorted((folder / "files").iterdir())
    for shard in range(SHARDS):
        with tf.io.TFRecordWriter(str(folder / f"{shard}.tfrecord")) as writer:
            for path in paths[shard::SHARDS]:
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[path.read_bytes()]))
                features = tf.train.Features(feature={"image": image})
                writer.write(tf.train.Example(features=features).SerializeToString())
    size = Image.open(paths[0]).size

    def view(example):
        features = {"image": tf.io.FixedLenFeature([], tf.string)}
        jpeg = tf.io.parse_single_example(example, features)["image"]
        start = tf.random.uniform([2], 0, RESIZE_PX - CROP_PX + 1, tf.int32)
        if size == (RESIZE_PX, RESIZE_PX):
            window = tf.concat([start, [CROP_PX, CROP_PX]], 0)
            image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)
        else:
            image = tf.image.resize(tf.io.decode_jpeg(jpeg, channels=3), [RESIZE_PX, RESIZE_PX])
            image = tf.slice(image, tf.concat([start, [0]], 0), [CROP_PX, CROP_PX, 3])
            image = tf.cast(tf.round(image), tf.uint8)
        return tf.ensure_shape(tf.image.random_flip_left_right(image), [CROP_PX, CROP_PX, 3])

    def batches():
        options = tf.data.Options()
        options.deterministic = False
        files = tf.data.Dataset.list_files(str(folder / "*.tfrecord")).repeat()
        dataset = files.interleave(tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE)
        dataset = dataset.shuffle(1000).map(view, num_parallel_calls=tf.data.AUTOTUNE)
        dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        yield from dataset.with_options(options).as_numpy_iterator()

    return batches


def view_pil(image, rng):
    image = image.convert("RGB")
    if image.size != (RESIZE_PX, RESIZE_PX):
        image = image.resize((RESIZE_PX, RESIZE_PX), Image.Resampling.BILINEAR)
    top, left = rng.integers(RESIZE_PX - CROP_PX + 1, size=2)
    image = image.crop((left, top, left + CROP_PX, top + CROP_PX))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


class Photos:
    """A dataset for torch's DataLoader."""

    def __init__(self, folder):
        self.paths = sorted((folder / "files").iterdir())
        self.rng = np.random.default_rng()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        import torch

        return torch.from_numpy(view_pil(Image.open(self.paths[index]), self.rng))


def torch_loader(folder):
    import torch
    from torch.utils import data

    torch.set_num_threads(1)
    photos = Photos(folder)

    def batches():
        sampler = data.RandomSampler(photos, num_samples=10**6)
        loader = data.DataLoader(photos, BATCH, sampler=sampler, num_workers=CORES)
        yield from loader

    return batches


def web_dataset(folder):
    import webdataset

    rng = np.random.default_rng()

    def view(sample):
        return (view_pil(Image.open(io.BytesIO(sample["jpg"])), rng),)

    def batches():
        urls = [str(folder / f"{shard}.tar") for shard in range(SHARDS)]
        dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000)
        dataset = dataset.map(view).batched(BATCH, partial=False)
        for (images,) in webdataset.WebLoader(dataset, batch_size=None, num_workers=CORES):
            yield images

    return batches


LOADERS = {
    "align_jax, pil": partial(ours, "pil", CORES, 0),
    "align_jax, tf": partial(ours, "tf", CORES, 0),
    "align_jax, pil, simplejpeg, processes": partial(ours, "pil", 1, CORES),
    "align_jax, pil, simplejpeg": partial(ours, "pil", CORES, 0),
    "align_jax, tf, simplejpeg": partial(ours, "tf", CORES, 0),
    "tf.data": tf_data,
    "torch DataLoader": torch_loader,
    "webdataset": web_dataset,
}

if __name__ == "__main__":
    sys.exit(main())
