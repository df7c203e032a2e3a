"""Rows per second and peak memory of `align curate` on a synthetic table.

    python experiments/benchmarks/curate.py                           # 5 M rows, preset align
    python experiments/benchmarks/curate.py --top 1000000             # rare tokens really looked up
    python experiments/benchmarks/curate.py --rows 200000 --engine duckdb --engine spark://local

A row has key, url, text, width, height and an NSFW score, as COYO's have. Words follow Zipf's law
(a vocabulary of one million, 11 a text), sizes are log-normal; 3 % of texts are one of 1,000 that
many images share, 2 % of rows are further texts of an image that has been seen. Each engine runs in
a process of its own, whose peak resident memory includes Python and reading and writing the tables.
Spark's memory is that of another process and is not counted.
"""

import argparse
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
ROOT = Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--engine", action="append", default=[])
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of the engine (default: 2)")
    parser.add_argument("--top", type=int, help="most frequent tokens, instead of 100 million")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run(*args.run, args.engine[0], args.memory)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        write_rows(args.rows, Path(folder) / "table")
        print(f"{args.rows:,} rows written in {time.monotonic() - start:.0f} s", flush=True)
        preset = "align"
        if args.top:
            preset = str(Path(folder) / "align_top.py")
            text = (ROOT / "align_jax/curate/filter/presets/align.py").read_text()
            Path(preset).write_text(text.replace("top=100_000_000", f"top={args.top}"))
        kept = set()
        for engine in args.engine or ["duckdb"]:
            command = [sys.executable, __file__, "--run", folder, preset, "--engine", engine]
            command += ["--memory", str(args.memory)]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(made.splitlines()[-1])
            kept.add(found["kept"])
            rate = args.rows / found["seconds"]
            print(
                f"{engine}: {found['seconds']:.1f} s, {rate:,.0f} rows/s, peak {found['gib']:.2f} "
                f"GiB, {found['kept']:,} rows kept, dropped {found['dropped']}",
                flush=True,
            )
        assert len(kept) == 1, "engines differ"


def run(folder, preset, engine, memory_gib):
    """Prints time, memory and counts of one run as a line of JSON."""
    from align_jax.curate.filter import curate

    start = time.monotonic()
    out = Path(folder) / f"out-{engine.partition(':')[0]}"
    made = curate.curate(
        str(Path(folder) / "table"), out, preset=preset, engine=engine, memory_gib=memory_gib
    )
    found = {
        "seconds": time.monotonic() - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "kept": made["rows_kept"],
        "dropped": {
            rule["name"]: rule["in"] - rule["out"] for rule in made["rules"] if "in" in rule
        },
    }
    print(json.dumps(found))


def write_rows(num_rows, folder):
    """Writes the synthetic table as Parquet parts of 250,000 rows."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype="S1")
    lengths = rng.integers(2, 9, VOCABULARY)
    words = np.split(letters[rng.integers(0, 26, lengths.sum())], np.cumsum(lengths)[:-1])
    vocabulary = pa.array([word.tobytes().decode() for word in words])
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
        }
        pq.write_table(pa.table(table), folder / f"part-{start // PART_ROWS:04d}.parquet")


def make_texts(rng, vocabulary, count):
    """Returns texts of words whose frequency is the inverse of their rank."""
    lengths = rng.poisson(9, count) + 2
    ranks = np.minimum(len(vocabulary) ** rng.random(lengths.sum()), len(vocabulary) - 1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    words = pa.ListArray.from_arrays(offsets, vocabulary.take(pa.array(ranks.astype(np.int64))))
    return pc.binary_join(words, " ")


if __name__ == "__main__":
    sys.exit(main())
