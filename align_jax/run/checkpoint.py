"""Checkpoints by Orbax: asynchronous, atomic, sharded. The only file that imports Orbax.

A step holds four items: `weights` (parameters and BatchNorm statistics, or their averages where
the run keeps them; loadable alone), `training` (step counter, optimizer state, what was averaged),
`small` (those of both that are small, see `packed`) and `data` (what the input has dropped so far;
its position follows from the step). Differs from the design's two items: inference needs the
weights without reading LAMB's moments, twice their size.
"""

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from align_jax import trees
from align_jax.run import packed, readers
from align_jax.state import TrainState


class Checkpointer:
    """Saves and restores the steps of one run.

    Args:
      folder: of the checkpoints; created where missing.
      keep: number of newest steps that stay; None deletes nothing.
      keep_every: steps that it divides stay, too; 0 for none.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int | None = None, keep_every: int = 0):
        policies = ocp.training.preservation_policies
        self.folder = Path(folder).absolute()
        logging.getLogger("absl").addFilter(_is_not_orbax)  # adding it again changes nothing
        self._link = _Link(self.folder) if glob.has_magic(str(self.folder)) else None
        self._kept = _Kept(self.folder.parent, keep, keep_every)
        self._is_opened = False  # whether a checkpoint of this process is known to open
        self._checkpointer = ocp.training.Checkpointer(
            self._link.path if self._link else self.folder,
            preservation_policy=policies.PreserveAll() if keep is None else self._kept,
            cleanup_tmp_directories=keep is not None,
        )

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """Returns all complete steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, data: dict[str, np.ndarray], *, best: int = -1) -> None:
        """Starts saving the state under its own step; training may go on meanwhile.

        A step that is already there is left as it is. A kill at any moment leaves either the whole
        step or none of it. The first one is waited for and opened: a run whose checkpoints cannot
        be read must not go on for days.

        Args:
          state: to save; its arrays are copied off the device before this returns.
          data: small arrays that belong to the input.
          best: step that stays, however old; -1 for none.

        Raises:
          RuntimeError: the storage fails, or the first checkpoint cannot be read back.
        """
        step = int(state.step)
        self._kept.best = best
        saved = self.steps()
        if step in saved:
            return
        if jax.process_index() == 0 and self._kept.removes:
            readers.clear(self.folder.parent, set(saved))
        expected = {"weights": state.served(), "training": _training(state)}
        large, small = packed.pack(_plain(expected))
        items = trees.nested(large) | {"small": small, "data": data}
        # Without force, Orbax skips a step while the previous one is still being written.
        with self._storage(f"checkpoint {step} is not saved"):
            self._checkpointer.save_checkpointables_async(step, items, force=True)
        if not self._is_opened:
            self.wait()
            try:
                self._check(step, expected | {"data": data})
            except Exception as error:  # Orbax's own kinds among them: the storage is at fault
                raise RuntimeError(
                    f"{self.folder} cannot hold checkpoints, the first one does not open: {error}"
                ) from error
            self._is_opened = True

    def delete_after(self, step: int) -> None:
        """Removes all later steps; returns when they are gone."""
        self.wait()
        for later in self.steps():
            if later > step:
                self._checkpointer.delete(later)

    def wait(self) -> None:
        """Blocks until everything that was started is on disk.

        Raises:
          RuntimeError: the storage fails.
        """
        with self._storage("the last checkpoint is not saved"):
            self._checkpointer.wait()

    def restore(
        self, step: int, abstract: TrainState, data: dict[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Returns (state, data) of a step, each tensor in the sharding that `abstract` names.

        Args:
          step: one of `steps()`.
          abstract: from `state.abstract_state`; the mesh may be another than the one saved on.
          data: arrays like those that were saved. Counts that are longer now begin at 0, an empty
            array stands for one of any length, and one that was not saved is returned as it is.

        Raises:
          ValueError: the checkpoint holds other tensors than the model has.
        """
        saved = self._metadata(step).get("data") or {}
        expected = {
            "weights": abstract.served(),
            "training": _training(abstract),
            "data": {n: _like(a, saved[n].shape) for n, a in data.items() if n in saved},
        }
        items = self._load(step, expected)
        weights, training = items["weights"], items["training"]
        average = trees.shared(weights, abstract.average)
        state = TrainState(
            step=training["step"],
            **trees.updated(weights, training.get("averaged", {})),
            opt_state=training["opt_state"],
            average=average,
        )
        restored = {
            n: np.pad(a, (0, len(data[n]) - len(a))) if len(data[n]) > len(a) else a
            for n, a in items["data"].items()
        }
        return state, data | restored

    def restore_weights(self, step: int, abstract: dict) -> dict:
        """Returns {"params", "batch_stats"} of a step, without reading the optimizer state.

        Raises:
          ValueError: the checkpoint holds other tensors than the model has.
        """
        return self._load(step, {"weights": abstract})["weights"]

    def close(self) -> None:
        """Waits for pending saves and releases Orbax's threads."""
        try:
            self._checkpointer.close()
        finally:
            if self._link:
                self._link.remove()

    @contextlib.contextmanager
    def _storage(self, lost: str) -> Iterator[None]:
        """Makes one kind of all that Orbax raises where the storage fails."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"{self.folder}: {lost}: {type(error).__name__}: {error}; the same command "
                "continues from the one before."
            ) from error

    def _load(self, step: int, expected: dict[str, Any]) -> dict[str, Any]:
        """Returns the trees of a step, each tensor in the dtype and sharding that is expected."""
        small = self._check(step, expected)
        named = _plain(expected)
        large = {n: leaf for n, leaf in named.items() if n not in small}
        # Checkpoints of earlier versions hold the trees as they are.
        wanted = trees.nested(large) if small else expected
        loaded = _plain(self._checkpointer.load_checkpointables(step, wanted))
        leaves = [
            packed.placed(small[n], leaf) if n in small else loaded[n] for n, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(expected), leaves)

    def _check(self, step: int, expected: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns {name: array} of what is small, after all names and shapes were compared."""
        found = {item: _plain(tree) for item, tree in self._metadata(step).items() if tree}
        small: dict[str, np.ndarray] = {}
        if "small" in found:
            shapes = {name: np.zeros(leaf.shape, np.uint8) for name, leaf in found["small"].items()}
            small = packed.unpack(
                self._checkpointer.load_checkpointables(step, {"small": shapes})["small"]
            )
        lost = [
            item
            for item, tree in expected.items()
            if item not in found
            and not (tree and all(f"{item}/{name}" in small for name in _plain(tree)))
        ]
        if not small and "step" not in found.get("training", ()):
            lost = ["small"]
        if lost:
            raise ValueError(
                f"Checkpoint {self.folder / str(step)} is damaged: its {lost[0]!r} cannot be "
                "read. Remove that folder to use the checkpoint before it."
            )
        for item, tree in expected.items():
            start = f"{item}/"
            have = found.get(item, {}) | {
                name.removeprefix(start): leaf
                for name, leaf in small.items()
                if name.startswith(start)
            }
            difference = trees.describe_difference(_plain(tree), have, limit=2)
            if difference:
                raise ValueError(
                    f"Checkpoint {self.folder}, step {step}, does not fit the model: {difference}."
                )
        return small

    def _metadata(self, step: int) -> dict[str, Any]:
        return self._checkpointer.checkpointables_metadata(step).metadata


class _Kept:
    """Which checkpoints stay: the newest, milestones, the best, and those that are being read."""

    def __init__(self, workdir: Path, keep: int | None, keep_every: int):
        self._workdir, self._keep, self._keep_every = workdir, keep, keep_every
        self.best = -1
        self.removes = keep is not None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether each stays; Orbax asks when one more is saved."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = set(sorted(steps)[-self._keep :])
        stay = [
            step in newest
            or step == self.best
            or bool(self._keep_every and step % self._keep_every == 0)
            for step in steps
        ]
        if jax.process_index() == 0:
            stay = [
                stays or not readers.may_go(self._workdir, step)
                for step, stays in zip(steps, stay, strict=True)
            ]
        return stay


def _training(state: TrainState) -> dict[str, Any]:
    averaged = {"averaged": state.averaged()} if state.average else {}
    return {"step": state.step, "opt_state": state.opt_state, **averaged}


def _like(array: np.ndarray, saved: tuple[int, ...]) -> np.ndarray:
    """Returns an array to restore into: as the given one, but of the length that was saved."""
    if not len(array):
        return np.zeros(saved, array.dtype)
    return array[: saved[0]]


def _is_not_orbax(record: logging.LogRecord) -> bool:
    # Each of its threads logs the traceback of an error that is raised here as well: a full disk
    # was 1,200 lines.
    return "orbax" not in record.pathname


class _Link:
    """A link to a folder in whose name Orbax would see a pattern: it looks for files by globs."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._around = tempfile.mkdtemp(prefix="align_jax_")
        self.path = Path(self._around) / "checkpoints"
        self.path.symlink_to(folder)

    def remove(self) -> None:
        shutil.rmtree(self._around, ignore_errors=True)


def _plain(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf}: Orbax describes tuples and dataclasses as dicts and lists."""
    return dict(trees.named_leaves(jax.tree.map(lambda leaf: leaf, tree)))
