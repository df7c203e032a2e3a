"""bfloat16, the default: what stays float32 all the same, and how far rounding parts equal runs."""

import jax
import numpy as np
import pytest
import test_train_step as steps
from jax.extend import core

from align_jax.models import efficientnet


@pytest.fixture(scope="module")
def short():
    """Changes of the config: bfloat16, and an image tower of two stages, which compiles sooner."""
    with pytest.MonkeyPatch.context() as patch:
        stages = (0.25, 0.3, efficientnet.STAGES[:2])
        patch.setitem(efficientnet.VARIANTS, "short", stages)
        yield (("model.image.variant", "short"), ("model.dtype", "bfloat16"))


@pytest.fixture(scope="module")
def program(short):
    """All equations of the step on eight devices in four parts; nothing is compiled."""
    changes = (*short, ("train.microbatches", 4))
    _, _, abstract, step_fn = steps.make_program(steps.mesh_of(8, 1), changes)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract)} == {"float32", "int32"}
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in steps.make_batches()[0].items()
    }
    return list(equations(jax.make_jaxpr(step_fn)(abstract, batch).jaxpr))


def equations(jaxpr, inside=()):
    """Yields (equation, names of those around it) of a program and of the programs within it."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                part = getattr(value, "jaxpr", value)
                yield from equations(part, (*inside, equation.primitive.name))


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def dtypes(variables):
    return {str(v.aval.dtype) for v in variables if hasattr(v.aval, "dtype")}


def test_loss_and_what_devices_exchange_for_it_is_float32(program):
    loss = [equation for equation, inside in program if "shard_map" in inside]
    products = [equation for equation in loss if equation.primitive.name == "dot_general"]
    names = {equation.primitive.name for equation in loss}
    assert {"all_gather", "reduce_scatter", "exp", "log"} <= names and len(products) == 9
    for equation in loss:
        assert "bfloat16" not in dtypes([*equation.invars, *equation.outvars]), equation
    for equation in products:
        assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_statistics_and_softmax_are_float32(program):
    found = {
        dtype: [e for e, _ in program if dtype in dtypes([*e.invars, *e.outvars])]
        for dtype in ("bfloat16", "float32")
    }
    names = {dtype: {e.primitive.name for e in list_} for dtype, list_ in found.items()}
    assert {"conv_general_dilated", "dot_general", "logistic"} <= names["bfloat16"]
    careful = {"reduce_max", "rsqrt", "log", "sqrt"}  # of softmax, norms, optimizer
    assert careful <= names["float32"] and not careful & names["bfloat16"]
    # Moments and softmax are no such sums, only gradients of biases and of squeeze-and-excitation.
    sums = [e for e in found["bfloat16"] if e.primitive.name == "reduce_sum"]
    assert all(e.outvars[0].aval.ndim == 1 or e.params["axes"] == (1, 2) for e in sums)


def test_gradients_of_microbatches_are_added_in_float32(program):
    carried = [
        variable
        for equation, _ in program
        if equation.primitive.name == "scan" and equation.params["length"] == 4
        for variable in equation.outvars[: equation.params["num_carry"]]
    ]
    assert len(carried) > 30 and dtypes(carried) == {"float32"}


def way(state, start):
    """Returns the way of all parameters from those of another state, as one vector."""
    ends = (jax.tree.leaves(jax.device_get(s.params)) for s in (state, start))
    return np.concatenate([np.ravel(a - b) for a, b in zip(*ends, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("shape, microbatches", [((2, 4), 1), ((4, 2), 2)])
def test_five_steps_in_bfloat16_part_by_its_rounding_alone(short, shape, microbatches):
    changes = (*short, ("train.microbatches", microbatches))
    watched, state, _ = steps.run(*shape, changes=changes)
    expected, state_expected, _ = steps.run(1, 1, changes=short)
    losses, expected = (np.array(each)[:, 0] for each in (watched, expected))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    start = steps.run(1, 1, changes=short, steps=0)[1]
    moved = way(state_expected, start)
    assert np.linalg.norm(way(state, start) - moved) <= 0.1 * np.linalg.norm(moved)
