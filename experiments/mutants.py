"""Mutation testing: one-line faults put into a copy of the tree, one by one; which do tests notice?

    python experiments/mutants.py --work /tmp/mutants [--only REGEX] [--jobs 2]

Reads experiments/mutants/list.toml, writes experiments/mutants/results.json after each mutant and a
table to standard output at the end. The same command goes on where it was stopped; a mutant is run
again when its line of the list or the file that it changes is another. What the statuses mean is in
experiments/mutants/README.md.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "mutants"
TIMEOUT_S = 1200
STATUSES = {0: "survived", 1: "killed", 5: "no tests"}  # exit codes of pytest


def read_list(path: Path) -> list[dict]:
    """Returns the mutants of a list: name, file, before, after, tests.

    Raises:
      ValueError: two mutants of one name, or one that changes nothing.
    """
    mutants = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    (name, count), *_ = Counter(mutant["name"] for mutant in mutants).most_common(1)
    if count > 1:
        raise ValueError(f"{path}: {name} is there {count} times.")
    for mutant in mutants:
        if mutant["before"] == mutant["after"]:
            raise ValueError(f"{path}: {mutant['name']} changes nothing.")
    return mutants


def mutate(root: Path, mutant: dict) -> str | None:
    """Returns the content of the mutant's file with the fault; None if the place is not there once.

    Args:
      root: of the tree.
      mutant: from `read_list`.
    """
    path = root / mutant["file"]
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    if content.count(mutant["before"]) != 1:
        return None
    return content.replace(mutant["before"], mutant["after"])


class Pytest:
    """Runs pytest in a copy of the tree, each time in a fork of a process that has read libraries.

    Reading JAX and the others takes longer than most tests; nothing of the package is read before.

    Args:
      copy: root of the copy.
    """

    def __init__(self, copy: Path):
        self.copy = copy
        self._log = copy.with_name(f"{copy.name}.log")
        self._server: subprocess.Popen | None = None

    def run(self, arguments: str) -> tuple[int | None, str]:
        """Returns (exit code, or None after `TIMEOUT_S`; what pytest printed)."""
        if self._server is None:
            env = os.environ | {"PYTHONPATH": str(self.copy), "PYTHONDONTWRITEBYTECODE": "1"}
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                cwd=self.copy,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        job = json.dumps([[*options, *shlex.split(arguments)], str(self._log)])
        timer = threading.Timer(TIMEOUT_S, self.close)
        timer.start()
        server = self._server
        server.stdin.write(job + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        timer.cancel()
        printed = self._log.read_text(errors="replace") if self._log.exists() else ""
        return (int(answer) if answer else None), printed

    def close(self) -> None:
        """Ends the process and what it runs."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None


_SERVER = """
import importlib, json, os, sys
import pytest
for name in ("jax", "flax.linen", "optax", "orbax.checkpoint.v1", "grain", "pyarrow.parquet",
             "scipy.stats", "PIL.Image", "tokenizers", "ml_collections", "matplotlib.figure"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(int(pytest.main(arguments)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_tests(pytest: Pytest, tests: list[str]) -> tuple[str, str, float]:
    """Returns (status, first test that failed, seconds) of a mutant's tests, in order."""
    start_s = time.monotonic()
    status, by = "survived", ""
    for arguments in tests:
        code, printed = pytest.run(arguments)
        status = "timed out" if code is None else STATUSES.get(code, "broken")
        if status != "survived":
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
            by = found[1] if found else printed.strip()[-200:]
            break
    return status, by, time.monotonic() - start_s


def make_copy(path: Path) -> Path:
    """Makes a copy of all tracked files; returns its path."""
    shutil.rmtree(path, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    return path


def table(mutants: Iterable[dict], results: dict[str, dict]) -> str:
    """Returns the results as a Markdown table, and a line of totals."""
    rows = ["| mutant | in | status | by |", "|---|---|---|---|"]
    counts: Counter[str] = Counter()
    for mutant in mutants:
        result = results.get(mutant["name"])
        status = result["status"] if result else "not run"
        counts[status] += 1
        by = result["by"].split("::")[-1] if status == "killed" else ""
        file = mutant["file"].removeprefix("align_jax/")
        rows.append(f"| {mutant['name']} | {file} | {status} | {by and f'`{by}`'} |")
    total = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return "\n".join(rows) + f"\n\n{sum(counts.values())} mutants: {total}."


def _identity(mutant):
    path = ROOT / mutant["file"]
    content = path.read_bytes() if path.is_file() else b""
    text = json.dumps(mutant, sort_keys=True).encode()
    return hashlib.blake2b(text + content, digest_size=8).hexdigest()


def _run_one(mutant, runners):
    runner = runners.get()
    try:
        content = mutate(runner.copy, mutant)
        if content is None:
            return {"status": "stale", "by": "", "seconds": 0.0}
        path = runner.copy / mutant["file"]
        before = path.read_bytes()
        try:
            path.write_text(content, encoding="utf-8")
            status, by, seconds = run_tests(runner, mutant["tests"])
        finally:
            path.write_bytes(before)
        return {"status": status, "by": by, "seconds": round(seconds, 1)}
    finally:
        runners.put(runner)


def main() -> int:
    """Runs what the command line asks for; returns 1 if a mutant was not killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the copies")
    parser.add_argument("--only", default="", help="regular expression on names or files")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--check", action="store_true", help="only look for stale ones")
    parser.add_argument("--clean", action="store_true", help="run the tests without any fault")
    arguments = parser.parse_args()
    mutants = read_list(FOLDER / "list.toml")
    if arguments.check:
        stale = [mutant["name"] for mutant in mutants if mutate(ROOT, mutant) is None]
        print(f"{len(mutants)} mutants, {len(stale)} stale: {', '.join(stale)}")
        return bool(stale)
    if arguments.work is None:
        parser.error("name a folder for the copies: --work /tmp/mutants")
    chosen = [m for m in mutants if re.search(arguments.only, f"{m['name']} {m['file']}")]
    if arguments.clean:
        runner = Pytest(make_copy(arguments.work / "clean"))
        for tests in sorted({test for mutant in chosen for test in mutant["tests"]}):
            status, by, seconds = run_tests(runner, [tests])
            word = {"survived": "passed"}.get(status, status)
            print(f"{word:10} {tests}  {by}  {seconds:.0f} s", flush=True)
        runner.close()
        return 0

    results_path = FOLDER / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    results = {m["name"]: results[m["name"]] for m in mutants if m["name"] in results}
    waiting = [m for m in chosen if results.get(m["name"], {}).get("id") != _identity(m)]
    runners: queue.Queue[Pytest] = queue.Queue()
    for number in range(arguments.jobs if waiting else 0):
        runners.put(Pytest(make_copy(arguments.work / f"copy{number}")))
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {pool.submit(_run_one, mutant, runners): mutant for mutant in waiting}
        for future in concurrent.futures.as_completed(futures):
            mutant = futures[future]
            results[mutant["name"]] = {"id": _identity(mutant), **future.result()}
            text = json.dumps(results, indent=1, sort_keys=True) + "\n"
            results_path.write_text(text, encoding="utf-8")
            result = results[mutant["name"]]
            print(
                f"{result['status']:9} {mutant['name']}  {result['by']}  {result['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    while not runners.empty():
        runners.get().close()
    print(table(mutants, results))
    return any(results.get(m["name"], {}).get("status") != "killed" for m in mutants)


if __name__ == "__main__":
    sys.exit(main())
