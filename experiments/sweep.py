"""Trains the points of a sweep one after the other and prints their results as a Markdown table.

    python experiments/sweep.py experiments/ablation_temperature --workdir runs/smoke --smoke

Every point is an `align train` with a folder of its own in --workdir. After a stop or a kill the
same command continues. Further arguments, e.g. --config.mesh.fsdp=4, go to each `align train`.
"""

import argparse
import contextlib
import runpy
import signal
import subprocess
import sys

from ablation_base import MEASURES

from align_jax.run import metrics, workdir

SMOKE = "smoke-"  # before the name of a point: its version for a CPU
# Of the evaluators, for the table, where the sweep's config names no others.
RESULTS = ("image_to_text_r1", "text_to_image_r1", "top1")


def main(argv=None) -> int:
    """Returns the exit code: 0, or that of a point that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Further arguments go to each align train."
    )
    parser.add_argument("sweep", help="folder with a config.py that lists POINTS")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="for a folder a point")
    parser.add_argument("--smoke", action="store_true", help="the points for a CPU: minutes")
    parser.add_argument("--points", metavar="A,B", help="only these (default: all)")
    args, rest = parser.parse_known_args(argv)
    file = f"{args.sweep.rstrip('/')}/config.py"
    sweep = runpy.run_path(file)
    known = list(sweep["SMOKE_POINTS" if args.smoke else "POINTS"])
    points = args.points.split(",") if args.points else known
    if unknown := [point for point in points if point not in known]:
        parser.error(f"--points: {unknown[0]!r} is unknown; use {', '.join(known)}.")

    results, exit_code = {}, 0
    for point in points:
        print(f"\n== {point}", file=sys.stderr, flush=True)
        folder = f"{args.workdir.rstrip('/')}/{point}"
        config = f"{file}:{SMOKE if args.smoke else ''}{point}"
        code = _run("train", "--config", config, "--workdir", folder, *rest)
        if code not in (0, 1):  # wrong arguments, or killed: no other point would do better
            return code
        if code == 1:  # a diverged point is a result, too
            exit_code = code
        elif not _is_complete(folder):
            print("stopped; run the same command to continue.", file=sys.stderr)
            return 0
        results[point] = _latest(folder)
    published = {} if args.smoke else sweep["PUBLISHED"]
    print(_table(results, published, sweep.get("RESULTS", RESULTS)))
    return exit_code


def _run(*arguments) -> int:
    """Returns the exit code of `align <arguments>`, which saves and ends when this is stopped."""
    child = subprocess.Popen([sys.executable, "-m", "align_jax.cli.main", *arguments])
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # the terminal tells both
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_complete(folder) -> bool:
    return _latest(folder)["step"] >= workdir.load_config(folder).train.steps


def _latest(folder) -> dict[str, float]:
    """Returns the last value of every metric; step 0 where there is none."""
    latest = {"step": 0}
    with contextlib.suppress(FileNotFoundError):
        for line in metrics.read_metrics(f"{folder}/metrics.jsonl"):
            latest |= line
    return latest


def _table(results, published, names) -> str:
    keys = dict.fromkeys(
        key for latest in results.values() for key in latest if key.split("/")[-1] in names
    )
    columns = {"step": "{}", "train/loss": "{:.4f}", "train/temperature": "{:.4f}"}
    columns |= {key: "{:.1f}" for key in keys}
    heads = ["point", *(key.removeprefix("train/").removeprefix("eval/") for key in columns)]
    heads += [f"published: {MEASURES}"] if published else []
    rows = [heads, ["---", *["---:"] * len(columns), *(["---"] if published else [])]]
    for point, latest in results.items():
        cells = [
            text.format(latest[key]) if key in latest else "-" for key, text in columns.items()
        ]
        rows.append([point, *cells, *([published.get(point, "-")] if published else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
