"""Which operation of a step gave the first NaN, for `config.debug.nans`.

The program of the step is compiled once more, with a flag for each of its operations, and run on
the same input. Operations inside of scans, of rematerialised parts and of `shard_map` have flags of
their own; a `while` loop and a `cond` count as one operation.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec

from align_jax.run import divergence
from align_jax.run.timeline import Timeline

_LIBRARIES = {"jax", "flax", "optax"}  # whose lines tell less than those of who calls them

_Flags = list[jax.Array]  # bool [], of an operation each, in the order of the program


def naming_first(compiled: Callable, step_fn: Callable, timeline: Timeline) -> Callable:
    """Returns the compiled step, which ends the run where something that it gives is NaN.

    It raises `divergence.TrainingDiverged` then.

    Args:
      compiled: (state, batch) -> (state, metrics); donates nothing.
      step_fn: what it was compiled from.
      timeline: of the run; the search is a compilation, which may take any time.
    """

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        after = compiled(state, batch)
        if any_nan(after):
            number = int(state.step) + 1
            with timeline.inside("compilation", number):
                first = first_nan(_shortest(step_fn, after[1]), state, batch)
            raise divergence.TrainingDiverged(
                number,
                1,
                f"the first NaN comes out of {first}. This is what config.debug.nans looks for. In "
                "a backward operation (transpose) try a config.optim.clip_norm, else a lower "
                "config.optim.learning_rate, or config.model.dtype=float32.",
            )
        return after

    return step


@jax.jit
def any_nan(tree: Any) -> jax.Array:
    """Returns whether a tree of arrays holds a NaN, bool []."""
    return jnp.stack([_is_nan(leaf) for leaf in jax.tree.leaves(tree)]).any()


def first_nan(fn: Callable, *args: Any) -> str:
    """Returns the operation that gives the first NaN, where it is in the model and in the code.

    Args:
      fn: function of trees of arrays, jitted or not, on any number of devices of one process.
      args: of it; an argument that it would donate is left alone.
    """
    if any_nan(args):
        return "none: there are NaNs in what the step starts from"
    program, run = jax.make_jaxpr(fn)(*args), _FlaggedRun()
    needed, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)

    def flagged(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(run.program(needed, program.consts, leaves, "")[1])

    flags = np.asarray(jax.jit(flagged)(*jax.tree.leaves(args)))
    if not flags.any():
        return "none that a second run shows: rounding decides whether it is there"
    return run.operations[int(flags.argmax())]


def _shortest(step_fn: Callable, metrics: dict[str, jax.Array]) -> Callable:
    """Returns the step for as much of its results as shows the NaN: flags make compiling slow."""
    for name in ("loss", "grad_norm"):
        if any_nan(metrics[name]):
            return lambda *args: step_fn(*args)[1][name]
    return step_fn


class _FlaggedRun:
    """Traces a program with a flag for each operation, in their order.

    Attributes:
      operations: what each flag is of, in words.
    """

    def __init__(self) -> None:
        self.operations: list[str] = []

    def program(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], scope: str
    ) -> tuple[list[Any], _Flags]:
        """Returns (results, flags); the scope is that of the operation which has it inside."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else values[variable]

        flags: _Flags = []
        for op in jaxpr.eqns:
            with op.ctx.manager:
                results, new = self._operation(op, [read(v) for v in op.invars], scope)
            flags += new
            values.update(zip(op.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars], flags

    def _operation(
        self, op: core.JaxprEqn, inputs: list[Any], scope: str
    ) -> tuple[Sequence[Any], _Flags]:
        kind, inner = op.primitive.name, op.params.get("jaxpr", op.params.get("call_jaxpr"))
        scope = "/".join(filter(None, (scope, str(op.source_info.name_stack))))
        scope = re.sub(r"/\w+\._\w+", "", scope)  # a method of the module before it
        if kind == "scan":
            return self._scan(op.params, inputs, scope)
        if kind == "shard_map":
            return self._shard_map(op.params, inputs, scope)
        if inner is not None and kind not in ("while", "cond"):
            consts = getattr(inner, "consts", ())
            return self.program(getattr(inner, "jaxpr", inner), consts, inputs, scope)
        results = op.primitive.bind(*inputs, **op.primitive.get_bind_params(op.params))
        results = results if op.primitive.multiple_results else [results]
        self.operations.append(_describe(op, scope))
        return results, [jnp.stack([_is_nan(result) for result in results]).any()]

    def _scan(
        self, params: dict[str, Any], inputs: list[Any], scope: str
    ) -> tuple[list[Any], _Flags]:
        inner, num_consts, num_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
        fixed, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
        parts, start = inputs[num_consts + num_carry :], len(self.operations)

        def body(carry: list[Any], part: list[Any]) -> tuple[list[Any], tuple]:
            del self.operations[start:]  # where JAX traces it more than once
            args = [*fixed, *carry, *part]
            results, flags = self.program(inner.jaxpr, inner.consts, args, scope)
            return results[:num_carry], (results[num_carry:], jnp.stack(flags))

        options = {name: params[name] for name in ("length", "reverse")}
        carry, (results, flags) = jax.lax.scan(body, carry, parts, **options)
        # Those of the first round that has any.
        flags = flags[::-1] if params["reverse"] else flags
        return [*carry, *results], list(flags[jnp.argmax(flags.any(1))])

    def _shard_map(
        self, params: dict[str, Any], inputs: list[Any], scope: str
    ) -> tuple[list[Any], _Flags]:
        start = len(self.operations)

        def body(*local: Any) -> tuple[list[Any], jax.Array]:
            del self.operations[start:]
            results, flags = self.program(params["jaxpr"], (), local, scope)
            return results, jnp.stack(flags)[None]

        results, flags = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), PartitionSpec(params["mesh"].axis_names)),
        )(*inputs)
        return results, list(flags.any(0))  # [devices, operations]


def _is_nan(array: Any) -> jax.Array:
    """Returns whether there is one, bool []; integers and keys have none."""
    is_float = jnp.issubdtype(getattr(array, "dtype", None), jnp.inexact)
    return jnp.isnan(array).any() if is_float else jnp.zeros((), bool)


def _describe(op: core.JaxprEqn, scope: str) -> str:
    text = f"`{op.primitive.name}`" + f" of {scope}" * bool(scope)
    for frame in op.source_info.traceback.frames if op.source_info.traceback else ():
        path = PurePath(frame.file_name)
        if not _LIBRARIES & set(path.parts):
            return f"{text} ({'/'.join(path.parts[-3:])}:{frame.line_num})"
    return text
