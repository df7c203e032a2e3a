"""Opens a set of many tars with few open files: what is dropped, time, memory a pair.

    python experiments/benchmarks/many_tars.py --folder /tmp/tars          # 1,500 tars, 1 M pairs

Each pair is a text and as many bytes of no picture: nothing is decoded. The set is opened twice, by
processes of their own that may have 256 files open: the first lists the tars and writes the index,
the second finds it. Memory is what the process has of its own more than before it opened the set;
what is mapped from the index is not counted, since the kernel takes it back as it likes.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

OPEN_FILES, READS = 256, 20_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tars", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=667, help="of a tar (default: 667)")
    parser.add_argument("--folder", default="many_tars", help="of tars and index, made if missing")
    parser.add_argument("--open", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder).absolute()
    if args.open:
        return open_once(str(folder / "tars"))
    for number in range(args.tars):
        write_tar(folder / "tars" / f"{number:05d}.tar", number * args.pairs, args.pairs)
    cache = {"XDG_CACHE_HOME": str(folder / f"cache-{time.time_ns()}")}
    for _ in range(2):
        command = [sys.executable, __file__, "--open", "--folder", str(folder)]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | cache)
        found = json.loads(made.stdout.splitlines()[-1])
        assert found["pairs"] == args.tars * args.pairs and not found["problems"], found
        print(found, flush=True)


def write_tar(path, first, count):
    """Writes a tar of pairs with the keys `first`, `first + 1`, ... of 9 digits."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = []
    for key in range(first, first + count):
        for suffix in ("jpg", "txt"):
            info = tarfile.TarInfo(f"{key:09d}.{suffix}")
            data = f"text of {key}".encode()
            info.size = len(data)
            blocks += [info.tobuf(tarfile.USTAR_FORMAT), data.ljust(512, b"\0")]
    path.write_bytes(b"".join([*blocks, bytes(1024)]))


def open_once(folder):
    """Prints what opening the set took, as a line of JSON."""
    from align_jax.data.sources.open_source import open_source

    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    before, start, cpu = private_bytes(), time.monotonic(), used_s()
    source = open_source(folder)
    count = len(source)  # lists the tars
    opened_s, cpu_s, held = time.monotonic() - start, used_s() - cpu, private_bytes() - before
    start = time.process_time()
    for index in np.random.default_rng(0).integers(0, count, READS).tolist():
        record = source[index]
        assert record.captions == (f"text of {int(record.key)}",)
    read_s = time.process_time() - start
    found = {
        "pairs": count,
        "problems": dict(source.problems),
        "seconds": round(opened_s, 1),
        "cpu_s": round(cpu_s, 1),
        "bytes_a_pair": round(held / count, 1),
        "reads_per_cpu_s": round(READS / read_s),
    }
    print(json.dumps(found))


def private_bytes():
    """Returns the memory that is this process' own."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def used_s():
    """Returns seconds of CPU of this process and of those that it has started and that ended."""
    both = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


if __name__ == "__main__":
    sys.exit(main())
