"""Kills the stages around training again and again, and compares what they leave in the end.

    python experiments/benchmarks/kill_stages.py --folder /tmp/kills --only 'embed|index'

Each command runs alone; then once more into another folder, with `kill -9` at random moments of
its work and at random renames, by which files begin to count, half of them just before and half
just after; each time the same command is given again. Moments are drawn from --seed. What lies in
the folder in the end must be the bytes of the run alone; of an index, its rows. Prints a line for
each command; exit code 1 if one differs.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kill_runs import CONFIG

from align_jax.search.index import Index
from align_jax.storage.writing import LOCK_FILE

# `align`, which kills itself at a rename: twice its number, less one where it is before it.
PROGRAM = """
import os, signal, sys
from align_jax.cli import main
at, counted, *sys.argv[1:] = sys.argv[1:]
renames, replace = [0], os.replace

def count(*args, **options):
    for step in (lambda: replace(*args, **options), lambda: None):
        renames[0] += 1
        if renames[0] == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        step()

os.replace = count
code = main.main()
with open(counted, "w") as file:
    file.write(str(renames[0]))
sys.exit(code)
"""
SCENES = "scenes?size={}&seed=1"
STAGES = {
    "scan": ["scan", SCENES.format(3000), "--out", "OUT/scan.parquet"],
    "curate": ["curate", "table.parquet", "--preset", "coyo", "--out", "OUT"],
    "curate_metaclip": ["curate", "table.parquet", "--preset", "metaclip"]
    + ["--metadata", "entries.txt", "--partitioned", "--out", "OUT"],
    "curate_images": ["curate", "table.parquet", "--preset", "datacomp-image"]
    + ["--file", "embeddings=images", "--file", "targets=others", "--out", "OUT"],
    "vocab": ["vocab", SCENES.format(3000), "--size", "200", "--out", "OUT"],
    "decontaminate_inside": ["decontaminate", SCENES.format(400), "--out", "OUT"],
    "decontaminate": ["decontaminate", SCENES.format(400), "--against", SCENES.format(150)]
    + ["--sheet", "--out", "OUT"],
    "decontaminate_embeddings": ["decontaminate", "images", "--against", "others", "--out", "OUT"],
    "embed_images": ["embed", "--images", SCENES.format(600), "--model", "model"]
    + ["--shard-size", "50", "--out", "OUT"],
    "embed_texts": ["embed", "--texts", SCENES.format(600), "--model", "model"]
    + ["--shard-size", "50", "--format", "parquet", "--out", "OUT"],
    "score": ["score", SCENES.format(6000), "--model", "model", "--out", "OUT/scores.parquet"],
    "pack": ["pack", SCENES.format(3000), "--out", "OUT"],
    "index_add": ["index", "add", SCENES.format(1500), "--model", "model", "--kind", "both"]
    + ["--index", "OUT"],
    "index_embedded": ["index", "add", "images", "--model", "model", "--index", "OUT"],
    "index_copy": ["index", "copy", "--index", "index", "--to", "OUT"],
}
MADE_BEFORE = {
    "table.parquet": ["scan", SCENES.format(3000), "--out", "table.parquet"],
    "model": ["train", "--config", "config.py", "--workdir", "model"],
    "images": ["embed", "--images", SCENES.format(1500), "--model", "model", "--out", "images"],
    "others": ["embed", "--images", SCENES.format(200), "--model", "model", "--out", "others"],
    "index": ["index", "add", "images", "--model", "model", "--index", "index"],
}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="kill_stages", help="made anew")
    parser.add_argument("--only", default="", metavar="REGEX", help="names of stages")
    parser.add_argument("--kills", type=int, default=4, help="of each of the two kinds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw = Path(args.folder), random.Random(args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG.replace("STEPS", "6"))
    (folder / "entries.txt").write_text("red\ncircle\nblue\nsquare\n")
    failed = 0
    for name in filter(re.compile(args.only).search, STAGES):
        make_inputs(folder, STAGES[name])
        alone, killed = (folder / f"{name}-{what}" for what in ("alone", "killed"))
        work_s = finish(folder, command_of(name, alone))
        renames = int((folder / "renames").read_text())
        kills, ended = [0, 0], 0
        for number in range(2 * args.kills):
            by_rename = 1 - number % 2  # the first one in a new folder
            at = draw.randint(1, renames) if by_rename else 0
            process = start(folder, command_of(name, killed), at)
            if not by_rename:
                wait(killed, process, draw.uniform(0, work_s))
                process.kill()
            printed = process.communicate()[1]
            kills[by_rename] += process.returncode < 0
            if process.returncode >= 0:  # it was done before: another one begins
                ended += not by_rename or at <= renames
                failed += report(name, alone, killed, process.returncode, printed)
                shutil.rmtree(killed)
        process = start(folder, command_of(name, killed))
        printed = process.communicate()[1]
        differs = report(name, alone, killed, process.returncode, printed)
        failed += differs
        print(
            f"{name}: {kills[0]} kills in {work_s:.1f} s of work, {kills[1]} at one of "
            f"{renames // 2} renames, {ended} ended before: "
            f"{'OTHER BYTES' if differs else 'what the run alone left'}",
            flush=True,
        )
    return int(failed > 0)


def make_inputs(folder: Path, command: list[str]) -> None:
    """Makes what a command reads, and first what that reads."""
    for part in command:
        part = part.rpartition("=")[2]  # of --file NAME=FOLDER
        if part in MADE_BEFORE and not (folder / part).exists():
            make_inputs(folder, [other for other in MADE_BEFORE[part] if other != part])
            finish(folder, MADE_BEFORE[part])


def command_of(name: str, out: Path) -> list[str]:
    """Returns the arguments of a stage."""
    return [part.replace("OUT", out.name) for part in STAGES[name]]


def start(folder: Path, command: list[str], at: int = 0) -> subprocess.Popen:
    """Starts `align`, which is killed at a rename or, for 0, at none."""
    cache = {"JAX_COMPILATION_CACHE_DIR": "cache", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(at), "renames", *command],
        cwd=folder,
        env=os.environ | cache | {"JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(out: Path, process: subprocess.Popen, seconds: float) -> None:
    """Returns so long after the folder has appeared, or at the end of the process."""
    while not out.exists() and process.poll() is None:
        time.sleep(0.002)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)


def finish(folder: Path, command: list[str]) -> float:
    """Runs to the end; returns the seconds since its folder was there."""
    process = start(folder, command)
    wait(folder / Path(command[-1]).parts[0], process, 0)
    begun = time.monotonic()
    printed = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(printed)
    return time.monotonic() - begun


def report(name: str, alone: Path, killed: Path, code: int, printed: str) -> bool:
    """Returns whether what was left differs, and says where.

    A command may be refused where it was killed after its end: `align pack` adds no split twice.
    """
    if code:
        print(f"{name}: exit code {code}: {printed.splitlines()[-1:]}")
    wanted, found = contents(alone), contents(killed)
    for file in sorted(wanted.keys() | found.keys()):
        if wanted.get(file) != found.get(file):
            print(f"{name}: {file} differs")
    return wanted != found


def contents(folder: Path) -> dict[str, object]:
    """Returns {file: bytes}, or {key: row and vector} of an index."""
    if (folder / "milvus.db").exists():
        with Index(str(folder)) as index:
            return {
                row.key: (row, z.tobytes())
                for rows, vectors in index.scan()
                for row, z in zip(rows, vectors, strict=True)
            }
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    sys.exit(main())
