"""The whole chain on real pairs, from a table of urls to a trained model, with played downloads.

    python experiments/curation/chain.py DATA --model RUN --work /tmp/chain

DATA holds cc3m/ and flickr8k/. There is no network here: five shards as img2dataset writes them are
made of the images at hand, and every 50th download fails. Each step is a call of `align`; commands,
what they printed last and their CPU time are printed. The model that scores is any workdir.
"""

import argparse
import io
import json
import resource
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
NUM_HELD_OUT, NUM_SHARDS, FAILS_EVERY = 500, 5, 50
PRESET = "from align_jax.curate.filter import rules\nRULES = [{}]\n"
POOL = "rules.has_text(), rules.images_per_text(at_most=10, source='ALIGN'), "
POOL += "rules.num_words(3, 20, source='ALIGN')"
BEST = "rules.top_share('similarity', 0.7, source='a guess')"


def main() -> None:
    """Runs the chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True, help="whose cosines score the pairs")
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    work, cc3m, flickr = args.work, args.data / "cc3m", args.data / "flickr8k"
    work.mkdir(parents=True)
    rows = [json.loads(line) for line in (cc3m / "train.jsonl").read_text("utf-8").splitlines()]
    train, held_out = rows[:-NUM_HELD_OUT], rows[-NUM_HELD_OUT:]
    lines = "".join(json.dumps(row) + "\n" for row in held_out)
    (work / "heldout.jsonl").write_text(lines, "utf-8")
    pool = {"id": list(range(len(train))), "url": [f"http://{row['image']}" for row in train]}
    pq.write_table(
        pa.table(pool | {"text": [r["captions"][0] for r in train]}), work / "pool.parquet"
    )
    for name, rule in (("pool", POOL), ("best", BEST)):
        (work / f"{name}.py").write_text(PRESET.format(rule))
    zips = ",".join(map(str, sorted(cc3m.absolute().glob("*.zip"))))
    held_out = f"heldout.jsonl?images={zips}"
    dev = f"{flickr.absolute()}/dev.jsonl?images={flickr.absolute()}/dev.zip"
    small = ROOT / "experiments/curation/small_images.py"

    def align(*arguments: object) -> None:
        command = ["align", *map(str, arguments)]
        print(f"\n$ {shlex.join(command)}", flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [sys.executable, "-m", "align_jax.cli.main", *command[1:]]
        printed = subprocess.run(
            run, cwd=work, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(printed.rstrip())
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"({cpu_s:.1f} s of CPU)", flush=True)

    align(
        "curate",
        "pool.parquet",
        "--preset",
        "pool.py",
        "--out",
        "pool",
        "--url-list",
        "urls.parquet",
    )
    play_downloads(pq.read_table(work / "urls.parquet"), zips.split(","), work / "shards")
    align("scan", "shards", "--out", "scan.parquet")
    align("curate", "scan.parquet", "--preset", small, "--out", "curated")
    against = ("--against", dev, "--against", held_out)
    align("decontaminate", "scan.parquet", *against, "--out", "matched")
    scored = ("--table", "curated/kept.parquet", "--out", "scored.parquet")
    align("score", "shards", "--model", Path(args.model).absolute(), *scored)
    align("curate", "scored.parquet", "--preset", "best.py", "--out", "best")
    joined = ("--keep", "pool/kept.parquet", "--keep-by", "id", "--drop", "matched/drop.parquet")
    align("pack", "shards", "--out", "joined", *joined)
    align("pack", "joined?split=train", "--keep", "best/kept.parquet", "--out", "packed")
    align("pack", held_out, "--out", "packed", "--split", "heldout")
    keys = {
        "data.source": "packed?split=train",
        "eval.evaluators.dev.source": "packed?split=heldout",
        "data.image_size": 32,
        "data.resize_size": 36,
        "train.batch_size": 64,
        "train.steps": args.steps,
        "eval.every_steps": args.steps,
        "checkpoint.every_steps": args.steps,
        "log.every_steps": args.steps // 10,
    }
    changed = [f"--config.{key}={value}" for key, value in keys.items()]
    align("train", "--config", ROOT / "configs/flickr8k.py", "--workdir", "run", *changed)
    for line in (work / "run/metrics.jsonl").read_text().splitlines():
        print(line)
    align("eval", "--workdir", "run", "--retrieval", "packed?split=heldout")


def play_downloads(urls: pa.Table, zips: list[str], folder: Path) -> None:
    """Writes shards of a list of urls as img2dataset does."""
    folder.mkdir()
    archives = {}
    for path in zips:
        archive = zipfile.ZipFile(path)
        archives |= {name.rpartition("/")[2]: (archive, name) for name in archive.namelist()}
    rows = urls.to_pylist()
    size = -(-len(rows) // NUM_SHARDS)
    for shard in range(NUM_SHARDS):
        side = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(rows[shard * size : (shard + 1) * size]):
                key = f"{shard:05d}{number:04d}"
                failed = (shard * size + number) % FAILS_EVERY == FAILS_EVERY - 1
                status = "failed_to_download" if failed else "success"
                side.append({"key": key, "status": status, **row})
                if failed:
                    continue
                archive, name = archives[row["url"].removeprefix("http://")]
                files = {"jpg": archive.read(name), "txt": row["caption"].encode()}
                for suffix, data in (files | {"json": json.dumps(side[-1]).encode()}).items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        pq.write_table(pa.Table.from_pylist(side), folder / f"{shard:05d}.parquet")
        counts = {"count": len(side), "successes": sum(r["status"] == "success" for r in side)}
        counts["failed_to_download"] = counts["count"] - counts["successes"]
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
