"""Rows per second and peak memory of `align curate` on a synthetic table.

    python experiments/benchmarks/curate.py                           # 5 M rows, preset align
    python experiments/benchmarks/curate.py --top 1000000             # rare tokens really looked up
    python experiments/benchmarks/curate.py --rows 200000 --engine duckdb --engine spark://local
    python experiments/benchmarks/curate.py --workers 1 --workers 2 --partitioned
    python experiments/benchmarks/curate.py --rows 1000000 --preset align --preset coyo \\
        --preset metaclip --partitioned --engine duckdb --engine spark://HOST:PORT  # a cluster
    python experiments/benchmarks/curate.py --words captions.txt --preset metaclip2  # languages
    python experiments/benchmarks/curate.py --preset datacomp-text --preset datacomp-image  # made
    python experiments/benchmarks/curate.py --scan SOURCE --workers 1 --workers 2

Every combination of presets, engines and workers runs; all engines and workers of one preset must
write the same bytes of kept rows. CPU time is that of this process and of its workers.

A row has key, url, text, width, height and an NSFW score, as COYO's have. Words follow Zipf's law
(a vocabulary of one million, 11 a text), sizes are log-normal; 3 % of texts are one of 1,000 that
many images share, 2 % of rows are further texts of an image that has been seen. With --words, words
are those of a real text, so that rules about languages have something to find. Clusters of images
have a thousand images each, about as many as DataComp's have. Each engine runs in
a process of its own, whose peak resident memory includes Python and reading and writing the tables.
Spark's memory is that of another process and is not counted.
"""

import argparse
import collections
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VOCABULARY, PART_ROWS = 1_000_000, 250_000
LANGUAGES = ("de", "en", "es", "fr", "it")  # of --preset metaclip2
ROOT = Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--engine", action="append", default=[])
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--workers", action="append", type=int, default=[])
    parser.add_argument("--partitioned", action="store_true")
    parser.add_argument("--scan", metavar="SOURCE", help="times `align scan` of pairs instead")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of the engine (default: 2)")
    parser.add_argument("--words", metavar="FILE", help="text whose words the rows are made of")
    parser.add_argument("--entries", type=int, default=20_000, help="of MetaCLIP (default: 20,000)")
    parser.add_argument("--top", type=int, help="most frequent tokens, instead of 100 million")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run(json.loads(args.run))
    with tempfile.TemporaryDirectory() as folder:
        jobs = scan_jobs(args, folder) if args.scan else curate_jobs(args, folder)
        digests = {}
        for name, group, job in jobs:
            made = subprocess.run(
                [sys.executable, __file__, "--run", json.dumps(job)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            found = json.loads(made.splitlines()[-1])
            print(
                f"{name}: {found['seconds']:.1f} s, CPU {found['cpu_s']:.1f} s, "
                f"{found['rows'] / found['seconds']:,.0f} rows/s, peak {found['gib']:.2f} GiB, "
                f"{found['what']}",
                flush=True,
            )
            assert digests.setdefault(group, found["digest"]) == found["digest"], "bytes differ"


def curate_jobs(args, folder):
    """Yields (name, what must have equal bytes, job) of each run of `align curate`."""
    start = time.monotonic()
    write_rows(args.rows, Path(folder) / "table", args.words)
    print(f"{args.rows:,} rows written in {time.monotonic() - start:.0f} s", flush=True)
    presets = {name: name for name in args.preset or ["align"]}
    if args.top:
        presets = {"align": changed_preset(folder, "align", "top=100_000_000", f"top={args.top}")}
    (Path(folder) / "metaclip2").mkdir()
    entries = {"metaclip": Path(folder) / "entries.txt", "metaclip2": Path(folder) / "metaclip2"}
    words = "\n".join(frequent_words(Path(folder) / "table", args.entries))
    for path in (entries["metaclip"], *(entries["metaclip2"] / f"{n}.txt" for n in LANGUAGES)):
        path.write_text(words)
    files = {}
    if any("text" in name for name in presets):
        files["datacomp-text"] = write_wordnet(folder)
    if any("image" in name for name in presets):
        files["datacomp-image"] = write_embeddings(args.rows, folder)
        clusters = f"clusters={max(1, args.rows // 1000)}"
        made = changed_preset(folder, "datacomp_image", "clusters=100_000", clusters)
        presets = {name: file.replace("datacomp-image", made) for name, file in presets.items()}
    for name, preset in presets.items():
        for engine in args.engine or ["duckdb"]:
            for number, workers in enumerate(args.workers or [1]):
                yield (
                    f"{name}, {engine}, {workers} workers",
                    name,
                    {
                        "source": str(Path(folder) / "table"),
                        "out_dir": str(
                            Path(folder) / f"{name}-{engine.partition(':')[0]}-{number}"
                        ),
                        "preset": preset,
                        "engine": engine,
                        "memory_gib": args.memory,
                        "num_workers": workers,
                        "partitioned": args.partitioned,
                        "metadata": str(entries[name]) if name in entries else None,
                        "files": {
                            k: v for part in name.split("+") for k, v in files.get(part, {}).items()
                        },
                    },
                )


def changed_preset(folder, name, before, after):
    """Returns the path of a preset that has something else in place of `before`."""
    text = (ROOT / "align_jax/curate/filter/presets" / f"{name}.py").read_text()
    assert before in text, before
    made = Path(folder) / f"{name}.py"
    made.write_text(text.replace(before, after))
    return str(made)


def scan_jobs(args, folder):
    """Yields the same of each run of `align scan`."""
    for number, workers in enumerate(args.workers or [1]):
        out = str(Path(folder) / f"{number}.parquet")
        yield f"{workers} workers", "", {"scan": args.scan, "out": out, "num_workers": workers}


def frequent_words(folder, count):
    """Returns the most frequent words of the first rows."""
    texts = pq.read_table(folder / "part-0000.parquet", columns=["text"])["text"].slice(0, 100_000)
    counts = collections.Counter(word for text in texts.to_pylist() for word in text.split())
    return [word for word, _ in counts.most_common(count)]


def write_wordnet(folder):
    """Returns a WordNet of the frequent words and a list of a tenth of the rarer ones."""
    words = dict.fromkeys(map(str.lower, frequent_words(Path(folder) / "table", 20_000)))
    made = Path(folder) / "wordnet"
    made.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        (made / f"{part}.exc").touch()
        (made / f"index.{part}").touch()
    lines = (f"{word} n 1 0 1 0 {number:08d}  \n" for number, word in enumerate(words))
    (made / "index.noun").write_text("".join(lines))
    listed = Path(folder) / "wnids.txt"
    listed.write_text("".join(f"n{number:08d}\n" for number in range(500, len(words), 10)))
    return {"wordnet": str(made), "wnids": str(listed)}


def write_embeddings(num_rows, folder):
    """Returns folders of made embeddings of all images and of 1,000 targets: 4,000 topics."""
    rng = np.random.default_rng(1)
    topics = rng.normal(size=(4_000, 16))
    made = {}
    for name, count, known in (("embeddings", num_rows, 4_000), ("targets", 1_000, 400)):
        made[name] = str(Path(folder) / name)
        Path(made[name]).mkdir()
        manifest = {"kind": "image", "model": "made", "file_format": "npy"}
        (Path(made[name]) / "manifest.json").write_text(json.dumps(manifest))
        for number, start in enumerate(range(0, count, PART_ROWS)):
            rows = np.arange(start, min(start + PART_ROWS, count))
            z = topics[rng.integers(0, known, len(rows))]
            z = z + 0.3 * rng.normal(size=z.shape)
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            np.save(Path(made[name]) / f"{number:05d}.npy", z.astype(np.float32))
            keys = {"keys": np.char.zfill(rows.astype(str), 9).tolist()}
            (Path(made[name]) / f"{number:05d}.json").write_text(json.dumps(keys))
    return made


def run(job):
    """Prints time, memory, counts and a digest of the kept rows of one run as a line of JSON."""
    start = time.monotonic()
    if "scan" in job:
        from align_jax.curate.scan import scan

        made = scan(job["scan"], job["out"], num_workers=job["num_workers"])
        rows, what, files = made["rows"], f"{made['images']:,} images", [Path(job["out"])]
    else:
        from align_jax.curate.filter import curate

        made = curate.curate(**job)
        out = Path(job["out_dir"])
        files = sorted([*out.glob("kept.parquet"), *out.glob("kept/*.parquet")])
        dropped = {rule["name"]: rule["in"] - rule["out"] for rule in made["rules"] if "in" in rule}
        rows, what = made["rows_read"], f"{made['rows_kept']:,} rows kept, dropped {dropped}"
    seconds = time.monotonic() - start
    own, workers = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    found = {
        "seconds": seconds,
        "cpu_s": sum(used.ru_utime + used.ru_stime for used in (own, workers)),
        "gib": own.ru_maxrss / 2**20,
        "rows": rows,
        "what": what,
        "digest": digest.hexdigest(),
    }
    print(json.dumps(found))


def write_rows(num_rows, folder, words=None):
    """Writes the synthetic table as Parquet parts of 250,000 rows."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vocabulary = words_of(words) if words else made_words(rng)
    shared = make_texts(rng, vocabulary, 1_000)
    for start in range(0, num_rows, PART_ROWS):
        rows = np.arange(start, min(start + PART_ROWS, num_rows))
        count = len(rows)
        texts = make_texts(rng, vocabulary, count)
        same = pa.array(rng.random(count) < 0.03)
        texts = pc.if_else(same, shared.take(pa.array(rng.integers(0, 1_000, count))), texts)
        image = np.where(rng.random(count) < 0.02, rng.integers(0, 1 + start // 1000, count), rows)
        url = pc.binary_join_element_wise(
            "https://images.example.org/uploads/2020/photo-",
            pa.array(image.astype(str)),
            ".jpg",
            "",
        )
        width, height = (np.exp(rng.normal(6.3, 0.6, count)).astype(np.int32) for _ in range(2))
        table = {
            "key": pa.array(np.char.zfill(rows.astype(str), 9)),
            "url": url,
            "text": texts,
            "width": width,
            "height": height,
            "punsafe": rng.beta(0.3, 4, count).astype(np.float32),
            "clip_l14_similarity_score": rng.random(count).astype(np.float32),
        }
        pq.write_table(pa.table(table), folder / f"part-{start // PART_ROWS:04d}.parquet")


def words_of(path):
    """Returns the different words of a text, the most frequent first."""
    counts = collections.Counter(Path(path).read_text("utf-8").split())
    return pa.array([word for word, _ in counts.most_common()])


def made_words(rng):
    """Returns a million words of two to eight letters."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype="S1")
    lengths = rng.integers(2, 9, VOCABULARY)
    words = np.split(letters[rng.integers(0, 26, lengths.sum())], np.cumsum(lengths)[:-1])
    return pa.array([word.tobytes().decode() for word in words])


def make_texts(rng, vocabulary, count):
    """Returns texts of words whose frequency is the inverse of their rank."""
    lengths = rng.poisson(9, count) + 2
    ranks = np.minimum(len(vocabulary) ** rng.random(lengths.sum()), len(vocabulary) - 1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    words = pa.ListArray.from_arrays(offsets, vocabulary.take(pa.array(ranks.astype(np.int64))))
    return pc.binary_join(words, " ")


if __name__ == "__main__":
    sys.exit(main())
