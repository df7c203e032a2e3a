"""The verb `align bench`: arguments and what it prints. The work is done in
plan/bench.py and plan/bench_search.py."""

import argparse
from collections.abc import Callable
from typing import Any

from align_jax.cli import output


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb by `add_verb(name, function of (args, rest), help) -> parser`."""
    bench = add_verb("bench", _bench, "measure this machine: the input of training, or search")
    bench.epilog = (
        "example: align bench input --config configs/coyo_b7_base.py --step-time 0.9 "
        "--config.data.source=data/mine --config.data.num_threads=16; "
        "or align bench search --rows 100000 --dim 640"
    )
    bench.set_defaults(takes_config=True)
    bench.add_argument(
        "what",
        choices=("input", "search"),
        help="input: reading, decoding, tokenising; search: a folder index beside exact search",
    )
    bench.add_argument("--out", metavar="FILE", help="the report as JSON")
    input_ = bench.add_argument_group("input")
    input_.add_argument("--config", metavar="FILE", help="experiment file")
    input_.add_argument(
        "--step-time",
        type=float,
        metavar="S",
        help="seconds of a training step without waiting: would it be input-bound?",
    )
    input_.add_argument("--processes", type=int, metavar="N", help="of that run (default: 1)")
    search = bench.add_argument_group("search")
    search.add_argument("--rows", type=int, help="of the index (default: 100000)")
    search.add_argument("--dim", type=int, help="of the embeddings (default: 640)")
    search.add_argument("--queries", type=int, help="in one call (default: 1000)")


_OPTIONS = {"input": ("config", "step_time", "processes"), "search": ("rows", "dim", "queries")}


def _bench(args: argparse.Namespace, rest: list[str]) -> None:
    for what, options in _OPTIONS.items():
        for name in options if what != args.what else ():
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is of align bench {what}.")
    output.check_report(args.out, ".json")
    measure = _input if args.what == "input" else _search
    report, shown = measure(args, rest)
    from align_jax.plan import aot

    if args.out:
        aot.write_report(args.out, report)
    print(shown)
    if args.out:
        print(f"wrote {args.out}")


def _input(args: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], str]:
    if args.config is None:
        raise ValueError("align bench input needs --config FILE.")
    from align_jax import config as config_lib
    from align_jax.plan import bench

    config = config_lib.load_config(args.config, rest)
    processes = 1 if args.processes is None else args.processes
    report = bench.measure_input(config, step_time_s=args.step_time, num_processes=processes)
    return report, bench.format_input(report)


def _search(args: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], str]:
    from align_jax.plan import bench_search

    given = {"num_rows": args.rows, "dim": args.dim, "num_queries": args.queries}
    given = {name: value for name, value in given.items() if value is not None}
    report = bench_search.measure_search(**given)
    return report, bench_search.format_search(report)
