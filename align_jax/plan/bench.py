"""Measurements of one's own machine: `align bench input`, how fast training pairs can be read.

Each is a dict for JSON and a table. Comparisons with other libraries are in experiments/benchmarks.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from align_jax import config_checks
from align_jax.data import images, mixture, pipeline, tokenizer
from align_jax.data.sources.open_source import PairSource
from align_jax.run.progress import num_cores
from align_jax.storage.problems import reason_of

STAGES = ("read", "decode", "resize and crop", "tokenise", "assemble")
_SAMPLE = 256  # records whose stages are timed
_MAX_ROWS = 64  # of a batch built here; the rate a pair hardly depends on it
_TIMED_S = 5.0  # of the pipeline, at least
_STAND_IN = (2000, 1000)  # pairs and wordpieces of a tokenizer where the config names none


def measure_input(
    config: ConfigDict,
    *,
    step_time_s: float | None = None,
    num_processes: int = 1,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Returns how many pairs a second the config's training input delivers on this machine.

    First each stage alone, in one thread, on records in training order; then the pipeline with the
    config's threads and workers, whose batches are discarded. Records that were read before come
    from the page cache.

    Args:
      config: an experiment's; its model is not built.
      step_time_s: of a training step on the chips; None leaves `step` out.
      num_processes: of that training run, each of which reads its share of the batch.
      log: told what takes long.

    Returns:
      `source`, `num_threads`, `num_workers`, `cores`; `stages`: name of STAGES and "all" ->
      `cpu_ms` a pair, `wait_ms` a pair (storage, or a busy machine) and `pairs_per_s_per_core`, by
      CPU time; `dropped`: reason -> records of the sample; `pipeline`: `pairs_per_s` and `pairs`
      timed. With `step_time_s` also `step`: `time_s`, `batch_size` and `pairs_per_s`, both of one
      process, `input_bound`, and `cores_needed` at the pipeline's rate a core.

    Raises:
      ValueError: an unusable config or source, a step time or number of processes not positive.
      RuntimeError: no record of the sample can be used.
    """
    if step_time_s is not None and not 0 < step_time_s < math.inf:
        raise ValueError(f"--step-time {step_time_s} must be a positive number of seconds.")
    if num_processes < 1 or config.train.batch_size % num_processes:
        raise ValueError(
            f"--processes {num_processes} must divide config.train.batch_size="
            f"{config.train.batch_size}."
        )
    config_checks.validate(config, num_devices=1)
    source = mixture.open_sources(config.data)
    log(f"reading {source.describe()}")
    wordpieces = _open_tokenizer(config.data, source, log)
    stages, dropped = _time_stages(config, source, wordpieces)
    log(f"running the pipeline for {_TIMED_S:.0f} s or longer")
    report = {
        "source": source.describe(),
        "num_threads": config.data.num_threads,
        "num_workers": config.data.num_workers,
        "cores": num_cores(),
        "stages": stages,
        "dropped": dropped,
        "pipeline": _time_pipeline(config, source, wordpieces),
    }
    if step_time_s is not None:
        report["step"] = _judge_step(report, step_time_s, config.train.batch_size // num_processes)
    return report


def format_input(report: dict[str, Any]) -> str:
    """Returns the report of `measure_input` as a table and one or two sentences."""
    lines = [f"{'stage':<16}{'CPU ms':>9}{'waiting ms':>12}{'pairs/s per core':>18}"]
    for name, stage in report["stages"].items():
        lines.append(
            f"{name:<16}{stage['cpu_ms']:>9.3f}{stage['wait_ms']:>12.3f}"
            f"{stage['pairs_per_s_per_core']:>18,.0f}"
        )
    if report["dropped"]:
        drops = ", ".join(f"{reason} {count}" for reason, count in report["dropped"].items())
        lines.append(f"unusable records in the sample: {drops}")
    lines.append(
        f"pipeline: {report['pipeline']['pairs_per_s']:,.0f} pairs/s on {report['cores']} cores "
        f"({report['num_threads']} threads, {report['num_workers']} workers)"
    )
    if step := report.get("step"):
        lines.append(
            f"a step of {step['time_s']:g} s with {step['batch_size']:,} pairs a process needs "
            f"{step['pairs_per_s']:,.0f} pairs/s: {'' if step['input_bound'] else 'not '}"
            f"input-bound, {step['cores_needed']} such core(s) would do"
        )
    return "\n".join(lines)


def _open_tokenizer(
    data: ConfigDict, source: PairSource, log: Callable[[str], None]
) -> tokenizer.Tokenizer:
    if data.tokenizer:
        return tokenizer.load_tokenizer(data.tokenizer)
    pairs, vocab_size = _STAND_IN
    log(f"config.data.tokenizer is empty: {vocab_size} wordpieces of {pairs} pairs stand in")
    some = mixture.Order(source, 0)
    found = (source.captions(some[i]) for i in range(min(pairs, len(source))))
    return tokenizer.train_wordpiece((text for texts in found for text in texts), vocab_size)


def _time_stages(
    config: ConfigDict, source: PairSource, wordpieces: tokenizer.Tokenizer
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Returns `stages` and `dropped` of the report."""
    order = mixture.Order(source, config.train.seed)
    timers = {name: _Timer() for name in STAGES}
    rng = np.random.default_rng(config.train.seed)
    size_px, dropped = config.data.image_size, {}
    reduced = config.data.decode == "reduced"
    shrink_to_px = images.REDUCED_MARGIN * config.data.resize_size if reduced else None
    batch = np.empty((_SAMPLE, size_px, size_px, 3), np.uint8)
    batch.fill(0)  # maps its pages now: those of a running pipeline have been written before
    captions = []
    for position in range(_SAMPLE):
        try:
            with timers["read"]:
                record = source[order[position]]
            with timers["decode"]:
                image = images.load_rgb(record.image, shrink_to_px=shrink_to_px)
            with timers["resize and crop"]:
                view = images.train_view(
                    image,
                    resize_px=config.data.resize_size,
                    crop_px=size_px,
                    method=config.data.resize,
                    rng=rng,
                    flip=config.data.flip,
                )
        except (images.BadImage, OSError) as error:
            reason = reason_of(error)
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        with timers["assemble"]:
            batch[len(captions)] = view
        captions.append(record.captions[0] if record.captions else "")
    if not captions:
        raise RuntimeError(
            f"{source.describe()}: none of {_SAMPLE} records can be used: {dropped}."
        )
    with timers["tokenise"]:
        wordpieces.encode(captions, config.data.max_tokens)
    stages = {name: timer.each(len(captions)) for name, timer in timers.items()}
    total = _Timer()
    for timer in timers.values():
        total.cpu_s, total.wall_s = total.cpu_s + timer.cpu_s, total.wall_s + timer.wall_s
    return stages | {"all": total.each(len(captions))}, dropped


class _Timer:
    """Sums the CPU and wall time of the blocks it is entered for, of this thread."""

    def __init__(self):
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self._start = time.thread_time(), time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.cpu_s += time.thread_time() - self._start[0]
        self.wall_s += time.perf_counter() - self._start[1]

    def each(self, count: int) -> dict[str, float]:
        return {
            "cpu_ms": 1000 * self.cpu_s / count,
            "wait_ms": 1000 * max(0.0, self.wall_s - self.cpu_s) / count,
            "pairs_per_s_per_core": count / max(self.cpu_s, 1e-9),
        }


def _time_pipeline(
    config: ConfigDict, source: PairSource, wordpieces: tokenizer.Tokenizer
) -> dict[str, float]:
    data, rows = config.data, min(config.train.batch_size, _MAX_ROWS)
    batches = pipeline.train_batches(
        source,
        wordpieces,
        data,
        batch_size=rows,
        seed=config.train.seed,
        hash_pairs=config.loss.mask_duplicates != "none",
    )
    try:
        # What is read ahead, and the start of threads and workers, must not count.
        for _ in range(max(1, data.num_workers) * (data.num_threads + 4)):
            next(batches)
        count, start_s = 0, time.perf_counter()
        while (took_s := time.perf_counter() - start_s) < _TIMED_S or count < 3:
            next(batches)
            count += 1
    finally:
        batches.close()
    return {"pairs_per_s": count * rows / took_s, "pairs": count * rows}


def _judge_step(
    report: dict[str, Any], step_time_s: float, batch_size: int
) -> dict[str, float | int | bool]:
    needed, found = batch_size / step_time_s, report["pipeline"]["pairs_per_s"]
    busy = min(report["cores"], report["num_threads"] * max(1, report["num_workers"]))
    return {
        "time_s": step_time_s,
        "batch_size": batch_size,
        "pairs_per_s": needed,
        "input_bound": needed > found,
        "cores_needed": math.ceil(busy * needed / found),
    }
