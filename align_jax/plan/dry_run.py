"""`align train --dry-run`: what a run would be, before it is one. Makes no step, writes nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from align_jax import config as config_lib
from align_jax import config_checks
from align_jax import evals as evals_lib
from align_jax.data import mixture
from align_jax.plan import aot, bench
from align_jax.run import workdir


def dry_run(
    config: ConfigDict, path: str | os.PathLike, log: Callable[[str], None] = print
) -> None:
    """Checks config, sources and evaluators, and says what the run would need on these devices.

    Whether a run that is there has the same config and data, and whether `init_from` fits, is for
    the run itself to find out.

    Args:
      config: of the run, of pairs.
      path: its workdir, which is neither made nor changed.
      log: told a few lines at a time.

    Raises:
      ValueError: a config, source or evaluator that cannot work.
      RuntimeError: the step does not fit the devices, or no record of a sample can be used.
    """
    devices, processes = jax.devices(), jax.process_count()
    config_checks.validate(config, num_devices=len(devices), num_processes=processes)
    if config.task != "contrastive":
        raise ValueError(
            f"--dry-run: config.task={config.task!r}; only training on pairs is planned."
        )
    if os.path.isfile(path):
        raise ValueError(f"--workdir {path} is a file; name a folder.")
    source = mixture.open_sources(config.data)
    config, lengths = config_checks.in_steps(config, len(source))
    try:
        evaluators = evals_lib.make_evaluators(config.eval.evaluators.to_dict())
        evals_lib.check_classes(evaluators, None)
    except ValueError as error:
        raise ValueError(f"config.eval.evaluators: {error}") from error
    log(config_lib.to_json(config).rstrip())
    for line in lengths:
        log(line)
    log(source.describe())
    log(f"evaluators: {', '.join(e.name for e in evaluators) or 'none'}")
    goes_on = "goes on with the run in" if workdir.is_run(Path(path)) else "starts a run in"
    log(f"`align train` without --dry-run {goes_on} {path}")
    log("")
    report = aot.compile_report(config, devices)
    log(aot.format_report(report))
    log("")
    log(bench.format_input(bench.measure_input(config, num_processes=processes, log=log)))
    if not report["fits"]:
        raise RuntimeError("The step does not fit these devices; see the report above.")
