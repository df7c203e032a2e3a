"""The reader of optimised HLO: canned lines as TPUs print them, and real programs of 8 CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from align_jax import mesh
from align_jax.run import hlo

# Loops of 4 and, inside, of 3; groups written in all three ways; one gather that runs beside other
# work and therefore appears three times; an all-reduce fused with its slicing.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner_condition (c: (s32[], f32[4,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %c = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%inner_body (b: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b), index=0
  %v = f32[4,8]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %permuted = f32[4,8]{1,0:T(8,128)} collective-permute(%v), channel_id=9, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(step)/shard_map/ppermute"}
  ROOT %next = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i.1, %permuted)
}

%outer_condition (c.1: (s32[], f32[4,8])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %c.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %four), direction=LT
}

%outer_body (b.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %w = f32[4,8]{1,0:T(8,128)} get-tuple-element(%b.1), index=1
  %g = bf16[8]{0:T(256)(2,1)} constant({...})
  %reduced = (f32[4,8]{1,0:T(8,128)}, bf16[8]{0:T(256)(2,1)S(1)}) all-reduce(%w, %g), \
channel_id=2, replica_groups=mesh['a'=8,'b'=2] {'a'}, to_apply=%add, metadata={op_name="x/y"}
  ROOT %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%b.1), \
condition=%inner_condition, body=%inner_body
}

%gather_start (p: f32[4,8]) -> f32[64,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %gathered = f32[64,8]{1,0:T(8,128)} all-gather(%p), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
  ROOT %started = f32[64,8]{1,0:T(8,128)} custom-call(%gathered), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: f32[4,8]) -> f32[64,8] {
  %p.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %gathered.1 = f32[64,8]{1,0:T(8,128)} all-gather(%p.1), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
}

%gather_done (p.2: f32[4,8]) -> f32[64,8] {
  %p.2 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %gathered.2 = f32[64,8]{1,0:T(8,128)} all-gather(%p.2), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
  ROOT %done = f32[64,8]{1,0:T(8,128)} custom-call(%p.2, %gathered.2), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.3: f32[64,8]) -> f32[4,8] {
  %p.3 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all = f32[64,8]{1,0:T(8,128)} all-reduce(%p.3), channel_id=3, \
replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %part = f32[4,8]{1,0:T(8,128)} dynamic-slice(%all, %zero, %zero), \
dynamic_slice_sizes={4,8}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %one = f32[64,8]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%gather_start
  %two = f32[64,8]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
  %three.1 = f32[64,8]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%gather_done
  %scattered = f32[4,8]{1,0:T(8,128)} fusion(%three.1), kind=kCustom, calls=%all-reduce-scatter.1
  %ags = (f32[4,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) all-gather-start(%scattered), \
channel_id=4, replica_groups=[8,2]<=[16], dimensions={0}
  %agd = f32[8,8]{1,0:T(8,128)} all-gather-done(%ags)
  %init = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero.1, %scattered)
  %zero.1 = s32[]{:T(128)} constant(0)
  %outer = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%init), \
condition=%outer_condition, body=%outer_body
  ROOT %result = f32[4,8]{1,0:T(8,128)} get-tuple-element(%outer), index=1
}
"""


def summary(program):
    return sorted((c.kind, c.devices, c.dtype, c.bytes, c.runs) for c in program.collectives)


def test_collectives_of_a_tpu_program_are_counted_with_their_loops():
    program = hlo.parse(TPU)
    block = 4 * 8 * 4
    assert summary(program) == [
        ("all-gather", 2, "f32", 2 * block, 1),
        ("all-gather", 16, "f32", 16 * block, 1),
        ("all-reduce", 8, "f32", block + 8 * 2, 4),
        ("collective-permute", 4, "f32", block, 12),
        ("reduce-scatter", 16, "f32", 16 * block, 1),
    ]
    origins = {c.kind: c.op_name for c in program.collectives}
    assert origins["collective-permute"] == "jit(step)/shard_map/ppermute"
    assert program.unknown_loops == 0


def test_squares_are_tensors_with_two_large_dimensions():
    program = hlo.parse(TPU)
    assert program.squares(8) == ["f32[8,8]", "f32[64,8]"]
    assert program.squares(9) == []


def test_text_without_an_entry_raises():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


def test_traffic_skips_on_chip_memory_and_what_a_fusion_does_not_touch():
    text = """
%sliced (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}

%updated (p.1: f32[100,8], row.1: f32[1,8], i.1: s32[]) -> f32[100,8] {
  %p.1 = f32[100,8]{1,0} parameter(0)
  %row.1 = f32[1,8]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p.1, %row.1, %i.1, %zero.1)
}

ENTRY %main (table: f32[100,8], at: s32[]) -> f32[100,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %taken = f32[1,8]{1,0:T(8,128)S(1)} fusion(%table, %at), kind=kLoop, calls=%sliced
  %copied = f32[1,8]{1,0} copy(%taken)
  ROOT %put = f32[100,8]{1,0} fusion(%table, %copied, %at), kind=kLoop, calls=%updated
}
"""
    row, index = 8 * 4, 4
    read_row, write_row_out, update = row + index, row, row + index + row
    assert hlo.parse(text).traffic_bytes == read_row + write_row_out + update


def test_traffic_of_slices_that_start_early_and_of_slices_in_a_fusion_of_a_fusion():
    text = """
%slice_of (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
}

%product (p.1: f32[100,8], i.1: s32[], w.1: f32[8,8]) -> f32[1,8] {
  %p.1 = f32[100,8]{1,0} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  %w.1 = f32[8,8]{1,0} parameter(2)
  %inner = f32[1,8]{1,0} fusion(%p.1, %i.1), kind=kLoop, calls=%slice_of
  ROOT %out.1 = f32[1,8]{1,0} convolution(%inner, %w.1), dim_labels=bf_io->bf
}

ENTRY %main (table: f32[100,8], at: s32[], w: f32[8,8]) -> f32[1,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %w = f32[8,8]{1,0} parameter(2)
  %started = ((f32[100,8]{1,0}), f32[5,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%table), \
slice={[0:5], [0:8]}
  %five = f32[5,8]{1,0:T(8,128)S(1)} slice-done(%started)
  %weights = (f32[8,8]{1,0:T(8,128)S(3)}, f32[8,8]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %near = f32[8,8]{1,0:T(8,128)S(3)} copy-done(%weights)
  ROOT %out = f32[1,8]{1,0} fusion(%table, %at, %near), kind=kOutput, calls=%product
}
"""
    row = 8 * 4
    found = [(op.kind, op.bytes, op.runs) for op in hlo.parse(text).traffic]
    # Five rows and the weights are read into on-chip memory; the product reads and writes a row.
    assert found == [("copy", 5 * row, 1), ("copy", 8 * row, 1), ("convolution", 2 * row, 1)]


def test_bytes_of_a_compiled_program_are_those_of_the_compiler():
    def step(x, w):
        y = x @ w
        mean = y.mean(0)
        return jnp.tanh(y - mean), jax.lax.dynamic_update_slice(x, w[:2], (3, 0))

    x, w = (jax.ShapeDtypeStruct((n, 512), jnp.float32) for n in (2048, 512))
    compiled = jax.jit(step).lower(x, w).compile()
    program = hlo.parse(compiled.as_text())
    assert program.traffic_bytes == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.15
    )


def compiled_text(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile().as_text()


def test_collectives_of_a_compiled_cpu_program_are_found():
    m = mesh.make_mesh(4, 2)
    rows = PartitionSpec(m.axis_names)

    @partial(jax.shard_map, mesh=m, in_specs=rows, out_specs=rows)
    def local(x):  # [2, 6] float32 on each of 8 devices
        everything = jax.lax.all_gather(x, m.axis_names, tiled=True)  # [16, 6]
        x = x + jax.lax.psum_scatter(everything * everything, mesh.FSDP, tiled=True)[:2]
        ring = [(i, (i + 1) % 4) for i in range(4)]

        def body(carry, _):
            return jax.lax.ppermute(carry, mesh.DATA, ring) * 2.0, None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return x

    x = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=NamedSharding(m, rows))
    program = hlo.parse(compiled_text(local, x))
    found = {
        kind: (devices, dtype, size, runs) for kind, devices, dtype, size, runs in summary(program)
    }
    assert found["all-gather"] == (8, "f32", 16 * 6 * 4, 1)
    assert found["reduce-scatter"] == (2, "f32", 16 * 6 * 4, 1)
    assert found["collective-permute"][1:] == ("f32", 2 * 6 * 4, 5)
    assert len(program.collectives) == 3 and program.unknown_loops == 0
    assert program.squares(6) == ["f32[8,6]", "f32[16,6]"]


def test_traffic_of_a_compiled_sum_is_its_operands_and_result():
    x = jax.ShapeDtypeStruct((1000, 30), jnp.float32)
    program = hlo.parse(compiled_text(lambda x, y: x + y, x, x))
    assert program.traffic_bytes == 3 * 1000 * 30 * 4
