"""`align <verb>`: argument parsing, exit codes, one-line errors. The work is done elsewhere.

Exit code 0: done; 1: the run failed; 2: bad input. `--debug` shows the traceback.
"""

import argparse
import gc
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from align_jax import __version__
from align_jax.cli import (
    bench_verbs,
    data_verbs,
    eval_verbs,
    model_verbs,
    output,
    score_verbs,
    search_verbs,
    serve_verbs,
)
from align_jax.storage import writing


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of `align <argv>`; None takes the command line of this process."""
    began_s = time.monotonic()
    if argv is None:
        _use_huge_pages()
        _keep_compilations()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (args.takes_config and args.config):
        parser.error(f"unrecognised argument {rest[0]!r} of {args.verb}")
    args.began_s = began_s
    with output.kept_safe() as printed:
        code = _run(args, rest)
    if argv is None and any(t.name == "align_jax.left" for t in threading.enumerate()):
        # XLA still works for a run that a signal has ended; clearing up beneath it would crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if printed.error is not None:
        return _fail(OSError(f"cannot print: {printed.error}"), args.debug, 1)
    return code


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    try:
        _check_paths(args)
        args.run(args, rest)
    except (ValueError, *_WRONG_PATH) as error:
        return _fail(error, args.debug, 2)
    except (RuntimeError, OSError, KeyboardInterrupt) as error:
        return _fail(error, args.debug, 1)
    return 0


_WRONG_PATH = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def _use_huge_pages() -> None:
    # XLA allocates and frees its temporaries each step. With 4-KiB pages the kernel clears them
    # again every time: 200,000 page faults and 0.4 s of system time for 128 images of the
    # quickstart's trunk, against 900 and 0.08 s with huge pages on two cores (see also
    # experiments/benchmarks/huge_pages.py). glibc reads this setting only when a process starts.
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_compilations() -> None:
    # Compiled programs are found again by later processes of the same user: a run that continues
    # does not wait for the compiler. JAX reads these when it is imported.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(caches, "align_jax", "compiled")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))


_NO_PATHS = (
    *("engine", "beam", "coordinator", "index", "to", "text", "add", "remove", "filter"),
    "format",  # NAME:DIR
)


def _check_paths(args: argparse.Namespace) -> None:
    """Refuses paths in buckets before any work, see writing.check_local."""
    for name, value in vars(args).items():
        if name not in _NO_PATHS:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str):
                    writing.check_local(path, f"--{name}")


def _fail(error: BaseException, debug: bool, code: int) -> int:
    if debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}."
    print(f"align: {text}", file=sys.stderr, flush=True)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"align: {message}; see `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="align", description="Train, evaluate and use ALIGN (EfficientNet + BERT) in JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    train = _verb(verbs, "train", _train, "train; continues where the workdir holds a checkpoint")
    train.epilog = (
        "example: align train --config configs/quickstart.py --workdir runs/quickstart "
        "--config.train.steps=200"
    )
    train.set_defaults(takes_config=True)
    train.add_argument("--config", required=True, metavar="FILE", help="experiment file")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    train.add_argument(
        "--resume-from",
        type=int,
        metavar="STEP",
        help="go back to this checkpoint, where config.optim may change; later ones are set aside",
    )
    train.add_argument(
        "--profile",
        default="",
        metavar="A:B",
        help="trace the steps after A, up to B, for TensorBoard's profile page",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, plan memory, measure the input; make no step, write nothing",
    )
    several = train.add_argument_group("several processes (found by themselves on Cloud TPU VMs)")
    several.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--processes", type=int, default=0, metavar="N", help="of the run")
    several.add_argument("--process", type=int, default=-1, metavar="I", help="this one, from 0")

    data_verbs.add_verbs(partial(_verb, verbs))
    score_verbs.add_verbs(partial(_verb, verbs))
    model_verbs.add_verbs(partial(_verb, verbs))
    search_verbs.add_verbs(partial(_verb, verbs))
    serve_verbs.add_verbs(partial(_verb, verbs))
    eval_verbs.add_verbs(partial(_verb, verbs))
    bench_verbs.add_verbs(partial(_verb, verbs))

    compile_ = _verb(
        verbs,
        "compile",
        _compile,
        "plan a run: memory, FLOPs and collectives on chips that are not here",
    )
    compile_.epilog = (
        "example: align compile --config configs/cc3m_b3_mini.py --topology v5e:8x8 "
        "--config.mesh.fsdp=4 --out plan.json"
    )
    compile_.set_defaults(takes_config=True)
    compile_.add_argument("--config", required=True, metavar="FILE", help="experiment file")
    compile_.add_argument("--platform", choices=("tpu", "cpu"), default="tpu", help="default: tpu")
    compile_.add_argument("--topology", help="chip and shape of a TPU slice, e.g. v5e:16x16")
    compile_.add_argument("--slices", type=int, default=1, help="such slices (default: 1)")
    compile_.add_argument(
        "--devices", type=int, default=8, help="of --platform cpu, a quick check (default: 8)"
    )
    compile_.add_argument("--out", metavar="FILE", help="the report as JSON")
    return parser


def _verb(
    verbs: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], None],
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, takes_config=False)
    return parser


# Each verb imports what it needs, so that `align --help` and bad arguments answer at once.


def _import(name: str) -> None:
    # What is imported stays, so nobody looks for garbage in it, now or later: 1.5 s of the 9 s of
    # processor time that the smallest run takes.
    if name not in sys.modules:
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.enable()
        gc.freeze()


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import config as config_lib

    config = config_lib.load_config(args.config, rest)

    _import("align_jax.train")
    from align_jax import train
    from align_jax.run import multihost

    with multihost.processes(args.coordinator, args.processes, args.process):
        if args.dry_run:
            from align_jax.plan import dry_run

            if args.resume_from is not None or args.profile:
                raise ValueError("--dry-run makes no step; leave --resume-from and --profile out.")
            dry_run.dry_run(config, args.workdir, multihost.log)
            return
        train.train_and_evaluate(
            config,
            args.workdir,
            resume_from=args.resume_from,
            profile=args.profile,
            began_s=args.began_s,
        )


def _compile(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import config as config_lib

    output.check_report(args.out, ".json")
    config = config_lib.load_config(args.config, rest)
    if args.platform == "tpu" and not args.topology:
        raise ValueError("--topology is missing, e.g. --topology v5e:4x4; or use --platform cpu.")

    import jax

    from align_jax.plan import aot

    jax.config.update("jax_platforms", "cpu")  # chips that are here stay free
    # Without its chip a TPU program cannot be read back, and the times in a plan are compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    if args.platform == "cpu":
        devices = aot.cpu_devices(args.devices)
    else:
        devices = aot.topology_devices(args.topology, args.slices)
    report = {
        "config": Path(args.config).stem,
        "overrides": rest,
        "topology": args.topology if args.platform == "tpu" else "cpu",
        "slices": args.slices,
        **aot.compile_report(config, devices),
    }
    if args.out:
        aot.write_report(args.out, report)
    print(aot.format_report(report))
    if args.out:
        print(f"wrote {args.out}")
    if not report["fits"]:
        raise RuntimeError(f"{report['config']} does not fit; see the report above.")


if __name__ == "__main__":
    sys.exit(main())
