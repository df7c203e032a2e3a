"""Training input of align_jax and of six other loaders, by turns: CPU time an image.

    python experiments/benchmarks/input_pipeline.py --photos photos.zip

Photos of --size are packed as `align pack --resize 346x346` does. All loaders read the same JPEGs,
decode, cut out 289 px at random, mirror half of them and deliver shuffled uint8 batches of 256 on 2
cores; align_jax also chooses and tokenises a caption. With --as-is the photos are packed as they
are, and each loader resizes them to 346 px. Each loader lives in a process of its own, all with the
same settings of the C library's allocator, and is measured for some batches in each round, the
others idle. CPU time is that of the process and of its workers. Peers whose packages are missing
are left out:

    pip install tensorflow-cpu torch webdataset datasets simplejpeg
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
DCT = "INTEGER_ACCURATE"  # as Pillow and simplejpeg decode; TensorFlow's own choice is the fast one
WARM_UP = 6  # batches that a loader may have read ahead when it begins
# As `align` sets it for itself, see huge_pages.py.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
PACKAGES = {
    "align_jax, simplejpeg": "simplejpeg",
    "align_jax, simplejpeg, processes": "simplejpeg",
    "align_jax": "PIL",
    "tf.data": "tensorflow",
    "torch DataLoader": "torch",
    "torch DataLoader, simplejpeg": "torch",
    "webdataset": "webdataset",
    "webdataset, simplejpeg": "webdataset",
    "Grain": "grain",
    "Grain, simplejpeg": "grain",
    "datasets, DataLoader": "datasets",
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", help=".zip of photos, of which four make an image; else scenes")
    parser.add_argument("--size", default="461x346", help="of the photos (default: 461x346)")
    parser.add_argument("--as-is", action="store_true", help="pack them without resizing")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="timed in each round (default: 8)")
    parser.add_argument("--loaders", help="some of them, with ; between them (default: all)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve[0], Path(args.serve[1]), args.batches)
    names = args.loaders.split(";") if args.loaders else list(PACKAGES)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        size = tuple(map(int, args.size.split("x")))
        mean_bytes = write_data(Path(folder), args.photos, size, args.images, args.as_is)
        print(f"{args.images} JPEGs, {mean_bytes / 1000:.1f} kB each; {CORES} cores")
        results = compare(names, folder, args.rounds, args.batches)
    base = next(iter(results))
    print(f"| loader | CPU ms an image | of {base} | images/s |\n|---|---:|---:|---:|")
    for name, rows in results.items():
        # By turns: each round has its own ratio, whatever else the machine did then.
        ratios = [own[1] / first[1] for own, first in zip(rows, results[base], strict=True)]
        cpu_ms, rate = (statistics.median(row[i] for row in rows) for i in (1, 0))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {cpu_ms:.3f} | {spread} | {rate:.0f} |")


def compare(names, folder, rounds, batches):
    """Returns loader -> (images/s, CPU ms an image) of each round."""
    loaders = {}
    for name in names:
        command = [sys.executable, __file__, "--serve", name, folder, "--batches", str(batches)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALLOCATOR,
        )
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
    return results


def serve(name, folder, batches):
    """Measures one loader each time a line comes in."""
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        print(f"left out ({error})", flush=True)
        return
    if "simplejpeg" not in name:
        sys.modules["simplejpeg"] = None  # as if it were not installed
    else:
        importlib.import_module("simplejpeg")
    make = LOADERS[name](folder)
    print(f"ready, {package.__name__} {getattr(package, '__version__', '')}", flush=True)
    for _ in sys.stdin:
        loader = make()
        for _ in range(WARM_UP):
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


def write_data(folder, photos, size, count, as_is):
    """Writes the same images as files, tars, Parquet and ArrayRecord; returns their mean bytes."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from align_jax.curate.pack.pack import pack
    from align_jax.data.sources import open_source as sources
    from align_jax.data.sources.record import Record

    records = []
    for i, image in enumerate(itertools.islice(mosaics(photos), count)):
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        caption = f"a dog number {i} runs over the grass towards a man with a red hat"
        records.append(Record(f"{i:06d}", buffer.getvalue(), (caption,)))
    square = None if as_is else (RESIZE_PX, RESIZE_PX)
    pack(sources.InMemory(records), folder / "pairs", resize_px=square)
    packed = sources.open_source(str(folder / "pairs"))
    (folder / "files").mkdir()
    for i in range(count):
        (folder / "files" / f"{packed[i].key}.jpg").write_bytes(packed[i].image)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in sorted((folder / "files").iterdir())[shard::SHARDS]:
                tar.add(path, path.name)
    return statistics.mean(path.stat().st_size for path in (folder / "files").iterdir())


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


def ours(num_threads, num_workers, folder):
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
        data.image_size, data.resize_size = CROP_PX, RESIZE_PX
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
            image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method=DCT)
        else:
            image = tf.io.decode_jpeg(jpeg, channels=3, dct_method=DCT)
            image = tf.image.resize(image, [RESIZE_PX, RESIZE_PX])
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


def view_pil(jpeg, rng):
    """Returns the view of a file's content, by simplejpeg where it is there and by Pillow."""
    simplejpeg = sys.modules["simplejpeg"]
    image = Image.fromarray(simplejpeg.decode_jpeg(jpeg)) if simplejpeg else None
    image = image or Image.open(io.BytesIO(jpeg)).convert("RGB")
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

        return torch.from_numpy(view_pil(self.paths[index].read_bytes(), self.rng))


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
        return (view_pil(sample["jpg"], rng),)

    def batches():
        urls = [str(folder / f"{shard}.tar") for shard in range(SHARDS)]
        dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000)
        dataset = dataset.map(view).batched(BATCH, partial=False)
        for (images,) in webdataset.WebLoader(dataset, batch_size=None, num_workers=CORES):
            yield images

    return batches


def grain_loader(folder):
    import grain
    from tensorflow_datasets.proto import tf_example_pb2

    shards = sorted(map(str, (folder / "pairs").glob("*.array_record*")))
    source = grain.sources.ArrayRecordDataSource(shards)

    def view(record, rng):
        features = tf_example_pb2.Example.FromString(record).features.feature
        return view_pil(features["image"].bytes_list.value[0], rng)

    def batches():
        dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().random_map(view)
        options = grain.ReadOptions(num_threads=CORES, prefetch_buffer_size=2 * BATCH)
        yield from dataset.to_iter_dataset(options).batch(BATCH)

    return batches


def hugging_face(folder):
    import datasets
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng()
    paths = sorted(map(str, (folder / "files").iterdir()))
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    written = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    written.to_parquet(str(folder / "photos.parquet"))
    found = datasets.load_dataset(
        "parquet", data_files=str(folder / "photos.parquet"), cache_dir=str(folder / "cache")
    )["train"].cast_column("image", datasets.Image(decode=False))

    def views(rows):
        return {"image": [torch.from_numpy(view_pil(i["bytes"], rng)) for i in rows["image"]]}

    def batches():
        sampler = torch.utils.data.RandomSampler(found, num_samples=10**6)
        loader = torch.utils.data.DataLoader(
            found.with_transform(views), BATCH, sampler=sampler, num_workers=CORES
        )
        for batch in loader:
            yield batch["image"]

    return batches


LOADERS = {
    "align_jax, simplejpeg": partial(ours, CORES, 0),
    "align_jax, simplejpeg, processes": partial(ours, 1, CORES),
    "align_jax": partial(ours, CORES, 0),
    "tf.data": tf_data,
    "torch DataLoader": torch_loader,
    "torch DataLoader, simplejpeg": torch_loader,
    "webdataset": web_dataset,
    "webdataset, simplejpeg": web_dataset,
    "Grain": grain_loader,
    "Grain, simplejpeg": grain_loader,
    "datasets, DataLoader": hugging_face,
}

if __name__ == "__main__":
    sys.exit(main())
