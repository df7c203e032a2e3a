"""The verb `align bench`: arguments and what it prints. The work is done in bench.py."""

import argparse
from collections.abc import Callable


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb by `add_verb(name, function of (args, rest), help) -> parser`."""
    bench = add_verb("bench", _bench, "measure this machine: input, pairs a second by stage")
    bench.epilog = (
        "example: align bench input --config configs/coyo_b7_base.py --step-time 0.9 "
        "--config.data.source=data/mine --config.data.num_threads=16"
    )
    bench.set_defaults(takes_config=True)
    bench.add_argument("what", choices=("input",), help="input: reading, decoding, tokenising")
    bench.add_argument("--config", required=True, metavar="FILE", help="experiment file")
    bench.add_argument(
        "--step-time",
        type=float,
        metavar="S",
        help="seconds of a training step without waiting: would it be input-bound?",
    )
    bench.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of that run (default: 1)"
    )
    bench.add_argument("--out", metavar="FILE", help="the report as JSON")


def _bench(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import config as config_lib
    from align_jax.plan import aot, bench

    config = config_lib.load_config(args.config, rest)
    report = bench.measure_input(config, step_time_s=args.step_time, num_processes=args.processes)
    if args.out:
        aot.write_report(args.out, report)
    print(bench.format_input(report))
    if args.out:
        print(f"wrote {args.out}")
