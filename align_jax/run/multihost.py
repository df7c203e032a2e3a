"""The processes of one run: start-up, agreement, who writes, and how a failure ends all of them.

Every process runs the same program on its own devices and its own rows of each batch; process 0
also writes metrics, plots and the workdir's files. The workdir must be storage that all of them
see. Nothing here knows about models or data.
"""

import contextlib
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# JAX aborts all others when no heartbeat has come from a process for so long, without a word of
# where they are. A process sends one every HEARTBEAT_S / 2, so that this may be as little as that
# after its end: watchdog.py, which tells more, must be done by then.
HEARTBEAT_S = 100

T = TypeVar("T")


@contextlib.contextmanager
def processes(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1
) -> Iterator[None]:
    """Context of a run of one or several processes; enter it before anything touches a device.

    On Cloud TPU VMs, in indexed Jobs of Kubernetes, under Slurm's srun and under mpirun of Open MPI
    2 to 4 all is found by itself.
    Elsewhere, without arguments, the run has this process only. An error inside is printed with the
    number of the process and ends it at once: leaving in good order would wait for processes that
    wait for this one. The others stop when they hear no more from it, see watchdog.py.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      num_processes: of the run.
      process_id: of this process, in [0, num_processes).

    Raises:
      ValueError: some of the arguments are given and others are missing or out of range; or MPI has
        started several processes that cannot find each other.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--coordinator {coordinator} needs --processes N and --process I with 0 <= I < N, "
                f"not {num_processes} and {process_id}."
            )
        _start(coordinator, num_processes, process_id)
    elif num_processes > 0 or process_id >= 0:
        raise ValueError("--processes and --process need --coordinator HOST:PORT of process 0.")
    elif launcher := _find_launcher():
        _start(cluster_detection_method=launcher)
    elif _on_cloud_tpu_vm():
        _start()
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield
        return
    print(f"{_name()} on {socket.gethostname()}, pid {os.getpid()}", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"align: {_name()} failed: {text}", file=sys.stderr, flush=True)
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely another process is gone; the watchdog, or JAX, ends this one as soon as it
            # knows which.
            time.sleep(HEARTBEAT_S + 20)
        os._exit(2 if isinstance(error, ValueError) else 1)


def is_lead() -> bool:
    """Returns whether this process writes what the run writes once."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints a line to standard error, in process 0 alone."""
    if is_lead():
        print(text, file=sys.stderr, flush=True)


def lead_first(prepare: Callable[[], T]) -> T | None:
    """Returns what `prepare` does, on process 0; None in the others, once that is done."""
    prepared = prepare() if is_lead() else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"align_jax.{prepare.__qualname__}")
    return prepared


def agree(value: int) -> int:
    """Returns process 0's value in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def total(counts: np.ndarray) -> np.ndarray:
    """Returns the sum over the processes of their int64 [N] counts."""
    if jax.process_count() == 1:
        return counts
    halves = np.stack([counts >> 31, counts & (2**31 - 1)])  # int64 is not for devices
    high, low = multihost_utils.process_allgather(halves.astype(np.int32)).sum(0, np.int64)
    return (high << 31) + low


def preempted(step: int) -> bool:
    """Returns whether a process of several got SIGTERM and this is the step to stop at, in all.

    Args:
      step: number of updates done; call it at every one.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def _start(*arguments: object, **options: object) -> None:
    jax.distributed.initialize(*arguments, heartbeat_timeout_seconds=HEARTBEAT_S, **options)


def _find_launcher() -> str | None:
    """Returns JAX's name of what has started several processes of this run, None if nothing has.

    Raises:
      ValueError: it does not tell where process 0 is.
    """
    env = os.environ
    # A step of srun has several tasks, or this is one process of a job that could have had more.
    if "SLURM_JOB_ID" in env and "SLURM_STEP_NODELIST" in env:
        if _number(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))) > 1:
            return "slurm"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise ValueError(
                "this pod of an indexed Job (JOB_COMPLETION_INDEX) needs the package kubernetes to "
                "find the others; install it, give --coordinator HOST:PORT --processes N --process "
                "I, or unset JOB_COMPLETION_INDEX for a run of one process."
            )
        return "k8s"
    for size, rank in _MPI:
        if _number(env.get(size)) > 1:
            if size.startswith("OMPI") and "OMPI_MCA_orte_hnp_uri" in env:
                return "ompi"
            raise ValueError(
                f"MPI has started {env[size]} processes ({size}), which cannot find each other; "
                f"give each --coordinator HOST:PORT --processes {env[size]} --process ${rank}."
            )
    return None


# Environment of MPI's processes: how many there are, and which one this is.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH2
)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _on_cloud_tpu_vm() -> bool:
    # Device files alone may be another card's; libtpu alone may be there to compile for TPUs.
    files = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(files) and importlib.util.find_spec("libtpu") is not None
