"""Small tensors of a checkpoint as one array of bytes.

Orbax takes 1 to 2 ms of CPU time for each array that it writes, however small; most of a model's
hundreds are scales, biases and statistics. What is packed depends on shapes and on the mesh, so a
table of names goes along, and any mesh can read what any other wrote.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 65_536  # elements of a tensor that is packed

Packed = dict[str, np.ndarray]  # {"index": JSON, "bytes"}, both uint8 [n]


def pack(named: dict[str, Any]) -> tuple[dict[str, Any], Packed]:
    """Takes small tensors out of {name: array}, those that each process has whole.

    Args:
      named: arrays of JAX, of any dtype, shape and sharding.

    Returns:
      (the others, the small ones), the latter copied to the host.
    """
    small = {n: a for n, a in named.items() if a.size <= _MOST and a.is_fully_replicated}
    hosts = jax.device_get(list(small.values()))
    index = [[n, str(a.dtype), list(a.shape)] for n, a in small.items()]
    return (
        {n: a for n, a in named.items() if n not in small},
        {
            "index": np.frombuffer(json.dumps(index).encode(), np.uint8),
            "bytes": np.frombuffer(b"".join(a.tobytes() for a in hosts), np.uint8),
        },
    )


def unpack(packed: Packed) -> dict[str, np.ndarray]:
    """Returns {name: array} of what `pack` has packed."""
    arrays, start = {}, 0
    for name, dtype, shape in json.loads(packed["index"].tobytes()):
        size = int(np.prod(shape, dtype=np.int64))
        kind = jnp.dtype(dtype)
        flat = np.frombuffer(packed["bytes"], kind, size, offset=start)
        arrays[name] = flat.reshape(shape)
        start += size * kind.itemsize
    return arrays


def placed(array: np.ndarray, like: Any) -> jax.Array:
    """Returns the array on devices, in the dtype and sharding of an abstract one."""
    array = array.astype(like.dtype)  # a copy: devices of a CPU may share memory with arrays
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
