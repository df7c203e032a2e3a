"""history.jsonl: what happened to a run: its starts, rollbacks, and returns to earlier steps.

{"event": "start", "step": 40, "time": ..., "version": ..., "processes": 1, "devices": 8}
{"event": "rollback", "step": 57, "to": 40, "skipped": [40, 57], "reason": ..., "examples": [...],
 "shards": [...]}
{"event": "resume_from", "step": 100, "config": {...}, "changed": {"optim.learning_rate": [...]}}

A line is on disk before what it tells goes on. `skipped` counts batches of the stream from 0, the
end excluded. A rollback is part of the checkpoints that come after it; until there is one, only the
line here tells that a resumed run must leave out the same batches.
"""

import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.storage import text, writing

_NAME = "history.jsonl"


def append(workdir: str | os.PathLike, event: str, **values: Any) -> None:
    """Adds a line; returns when it is on disk.

    Args:
      workdir: folder of the run.
      event: its kind.
      values: must suit JSON.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": event, "time": now} | values)
    writing.append_line(Path(workdir) / _NAME, line)


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines, oldest first; a last one that a kill has torn is left out."""
    path, events = Path(workdir) / _NAME, []
    for line in text.read_text(path).splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def no_skips() -> np.ndarray:
    """Returns the skipped batches of a run that has not been rolled back, int64 [0, 3]."""
    return np.zeros((0, 3), np.int64)


def with_unsaved(workdir: str | os.PathLike, step: int, saved: np.ndarray) -> np.ndarray:
    """Returns the skipped batches of a run that goes on from a step, int64 [rollbacks, 3].

    Args:
      workdir: folder of the run.
      step: of the restored checkpoint; 0 where the run starts.
      saved: those in the checkpoint, rows of (step gone back to, first batch, end).
    """
    valid: list[tuple[int, ...]] = []
    for event in read(workdir):
        if event["event"] == "resume_from":
            valid = [row for row in valid if row[0] <= event["step"]]
        elif event["event"] == "rollback":
            row = (event["to"], *event["skipped"])
            valid = [before for before in valid if before[0] <= event["to"]] + [row]
    known = {tuple(row) for row in saved.tolist()}
    unsaved = [row for row in valid if row[0] == step and row not in known]
    return np.array([*saved.tolist(), *unsaved], np.int64).reshape(-1, 3)


def go_back(
    workdir: str | os.PathLike, step: int, config: dict[str, Any], changed: dict[str, Any]
) -> bool:
    """Makes an earlier checkpoint the newest, and returns whether that had to be done.

    Later ones, and metrics.jsonl as it is, are moved to `set_aside/`. The same command again finds
    that it was done, and goes on from the newest checkpoint.

    Args:
      workdir: folder of the run.
      step: of the checkpoint.
      config: of the part of the run that starts now.
      changed: key -> [before, now].

    Raises:
      ValueError: the run has no such checkpoint.
    """
    workdir = Path(workdir)
    config = json.loads(json.dumps(config))
    before = [event for event in read(workdir) if event["event"] == "resume_from"]
    if before and (before[-1]["step"], before[-1]["config"]) == (step, config):
        return False
    folders = (workdir / "checkpoints").glob("[0-9]*")
    steps = sorted(int(path.name) for path in folders if path.name.isdecimal())
    if step not in steps:
        raise ValueError(f"--resume-from {step}: {workdir} has no such checkpoint; it has {steps}.")
    aside = workdir / "set_aside" / str(len(before) + 1)
    aside.mkdir(parents=True, exist_ok=True)
    if (workdir / "metrics.jsonl").exists():
        with writing.replacing(aside / "metrics.jsonl") as temporary:
            shutil.copy(workdir / "metrics.jsonl", temporary)
    for later in (number for number in steps if number > step):
        writing.move(workdir / "checkpoints" / str(later), aside / str(later))
    append(workdir, "resume_from", step=step, config=config, changed=changed)
    return True
