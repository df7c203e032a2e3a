"""Compiles the real train and embed steps for chips that are not here, and reports what they need.

`align compile` plans a pod run on a laptop: libtpu (extra `tpu`) compiles for a topology without a
TPU. Nothing runs. What a program's text says is read in run/hlo.py, chips are listed in
run/chips.py.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from align_jax import __version__, config_checks, encode, losses, state, train, trees
from align_jax import mesh as mesh_lib
from align_jax.data import tokenizer as tokenizer_lib
from align_jax.models import flops
from align_jax.models.dual_encoder import DualEncoder
from align_jax.run import chips, hlo
from align_jax.storage import writing

GIB = 2**30

# Of the table of traffic, which the JSON has in full, people see the largest.
_TRAFFIC_LINES = 8


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a TPU topology that need not exist.

    Args:
      name: chip (key of `chips.CHIPS`) and shape of a slice, e.g. "v5e:16x16" or "v4:4x4x4".
      slices: number of such slices, joined by the data centre's network.

    Raises:
      ValueError: an unknown chip or a shape that it does not come in.
      RuntimeError: libtpu is not installed.
    """
    chip = name.partition(":")[0]
    if chip not in chips.CHIPS:
        raise ValueError(
            f"--topology {name}: unknown chip {chip!r}; use {', '.join(chips.CHIPS)} and a shape, "
            "e.g. v5e:16x16."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for a TPU needs libtpu: pip install 'align_jax[tpu]'.")
    # libtpu would look for the TPU VM it is on, lock its chips and write logs to /tmp.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    # The two cores of a v4 or v5p chip are one device ("megacore"); v5p is so by default.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"--topology {name}: {error}") from error
    return list(topology.devices)


def cpu_devices(count: int) -> list[jax.Device]:
    """Returns `count` fake CPU devices; must come before any other use of JAX in the process.

    Raises:
      ValueError: JAX is in use already, with fewer devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX runs already: the devices that it has may be enough
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--devices {count}: JAX runs already, with {len(devices)} device(s).")
    return devices[:count]


def compile_report(config: ConfigDict, devices: list[jax.Device]) -> dict[str, Any]:
    """Returns what the train step and the embed steps of a config need per chip; runs nothing.

    The result can be written as JSON. `steps` holds, per program, `memory` in bytes, whether it
    `fits`, `collectives`, `traffic_bytes`, the same by kind of operation and layer as `traffic`,
    `batch_squares` (tensors of global batch x global batch) and the seconds of compiling, by the
    clock and of processor time; `flops` those of the train step; `fits` is false if one does not,
    or has such a tensor. `docs/pod_plans.md` explains the numbers.

    Args:
      config: of the run; the data source need not be there.
      devices: from `topology_devices` or `cpu_devices`.

    Raises:
      ValueError: a config that cannot work on so many devices.
    """
    config = config.copy_and_resolve_references()
    if not config.data.mixture:
        config.data.source = config.data.source or "none"  # not needed here
    hosts = len({device.process_index for device in devices})
    config_checks.validate(config, num_devices=len(devices), num_processes=hosts)
    config, _ = config_checks.in_steps(config, num_pairs=None)
    if config.task != "contrastive":
        raise ValueError(
            f"config.task={config.task!r} cannot be planned: only contrastive training can."
        )
    mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
    vocab_size = _vocab_size(config)
    model, _, abstract, step_fn = train.make_program(config, mesh, vocab_size=vocab_size)
    chip = chips.find_chip(devices[0].device_kind)

    variables = abstract.variables()
    embed_image, embed_text = encode.compile_embed(model, state.shardings_of(variables), mesh)
    batch = _abstract_batch(config, mesh, config.train.batch_size)
    if config.data.image_embeddings:
        shape = (config.train.batch_size, config.model.embed_dim)
        batch["z_image"] = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=batch.pop("image").sharding
        )
    rows = -(-config.eval.batch_size // mesh.size) * mesh.size
    embedded = _abstract_batch(config, mesh, rows)
    programs = {
        "train_step": (step_fn, (abstract, batch)),
        "embed_image": (embed_image, (variables, embedded["image"])),
        "embed_text": (embed_text, (variables, embedded["ids"], embedded["mask"])),
    }
    steps = {
        name: _step_report(fn, arguments, square=_square_size(config, abstract))
        for name, (fn, arguments) in programs.items()
    }
    return {
        "version": {name: _version(name) for name in ("align_jax", "jax", "libtpu")},
        "chip": dataclasses.asdict(chip) if chip else {"device_kind": devices[0].device_kind},
        "num_chips": mesh.size,
        "num_hosts": hosts,
        "mesh": dict(mesh.shape),
        "model": f"{config.model.image.variant} + {config.model.text.variant}",
        "parameters": trees.count(abstract.params),
        "vocab_size": vocab_size,
        "batch_size": config.train.batch_size,
        "microbatches": config.train.microbatches,
        "image_size": config.data.image_size,
        "max_tokens": config.data.max_tokens,
        "remat": config.model.remat,
        "loss_form": config.loss.form,
        "embed_batch_size": rows,
        "flops": _flops_report(config, model, mesh.size, chip),
        "steps": steps,
        "fits": all(step["fits"] and not step["batch_squares"] for step in steps.values()),
    }


def format_report(report: dict[str, Any]) -> str:
    """Returns the report as text for people, a few lines per program."""
    chip, flop = report["chip"], report["flops"]
    axes = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    lines = [
        f"{report['model']}, {report['parameters']:,} parameters, on {report['num_chips']} "
        f"{chip['device_kind']} ({report['num_hosts']} hosts), mesh {axes}",
        f"global batch {report['batch_size']:,} in {report['microbatches']} microbatch(es), "
        f"{report['image_size']} px, {report['max_tokens']} tokens, vocabulary "
        f"{report['vocab_size']:,}, remat {report['remat']}, loss {report['loss_form']}",
        f"model FLOPs: {_metric(flop['model_per_pair'])} per pair, "
        f"{_metric(flop['model_per_chip'])} per chip and step "
        f"({_metric(flop['hardware_per_chip'])} with recomputation)",
    ]
    if "step_s_at_peak" in flop:
        lines.append(
            f"a step takes at least {flop['step_s_at_peak']:.2f} s of computing at the chip's peak"
        )
    for name, step in report["steps"].items():
        lines += ["", f"{name}: compiled in {step['compile_s']:.0f} s"]
        lines += [f"  {line}" for line in _step_lines(step, chip)]
    lines += ["", "fits" if report["fits"] else "DOES NOT FIT"]
    return "\n".join(lines)


def write_report(path: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes the report as indented JSON; makes the folder."""
    writing.write_json(path, report, indent=1)


def _step_report(fn: Callable, arguments: tuple, *, square: int) -> dict[str, Any]:
    lowered = fn.lower(*arguments)
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    compiled, error = None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as raised:
        if "Ran out of memory" not in str(raised):
            raise
        error = " ".join(str(raised).split())[:600]
    times = {
        "compile_s": time.monotonic() - start_s,
        "compile_cpu_s": time.process_time() - start_cpu_s,
    }
    if error:
        return {
            "fits": False,
            "memory": {"needed": _needed_bytes(error)},
            "error": error,
            "collectives": [],
            "batch_squares": [],
            **times,
        }
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    program = hlo.parse(compiled.as_text())
    return {
        "fits": True,  # else a TPU's compiler refuses; a CPU's takes what it needs
        "memory": {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
            "peak": stats.peak_memory_in_bytes,
        },
        "traffic_bytes": program.traffic_bytes,
        "traffic": _traffic_table(program.traffic),
        "xla_flops": cost.get("flops"),  # counts the body of a loop once
        "xla_bytes": cost.get("bytes accessed"),
        "collectives": _grouped(program.collectives),
        "unknown_loops": program.unknown_loops,
        "batch_squares": program.squares(square) if square else [],
        "squares_checked": bool(square),
        **times,
    }


def _needed_bytes(message: str) -> int | None:
    sizes = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])", message)
    return int(float(sizes[1]) * 1024 ** (1 + "KMGT".index(sizes[2]))) if sizes else None


def _grouped(collectives: Iterable[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, size of group, type and place, as one entry, largest first."""
    groups = defaultdict(list)
    for found in collectives:
        groups[found.kind, found.devices, found.dtype, _place(found.op_name)].append(found)
    entries = [
        {
            "kind": kind,
            "devices": devices,
            "dtype": dtype,
            "place": place,
            "operations": len(group),
            "runs": sum(found.runs for found in group),
            "bytes": sum(found.runs * found.bytes for found in group),
            "largest_bytes": max(found.bytes for found in group),
        }
        for (kind, devices, dtype, place), group in groups.items()
    ]
    return sorted(entries, key=lambda entry: -entry["bytes"])


def _traffic_table(traffic: Iterable[hlo.Traffic]) -> list[dict[str, Any]]:
    """Bytes a run by kind of operation and part of the model, largest first."""
    groups = defaultdict(int)
    for op in traffic:
        groups[op.kind, _place(op.op_name), _part(op.op_name)] += op.bytes * op.runs
    return [
        {"kind": kind, "place": place, "part": part, "bytes": size}
        for (kind, place, part), size in sorted(groups.items(), key=lambda item: -item[1])
    ]


# Layers of the towers, in the order in which they are looked for: a scope holds several.
_PARTS = (
    *("squeeze", "depthwise_bn", "expand_bn", "project_bn", "stem_bn", "depthwise", "expand"),
    *("project", "stem_conv", "attention_out", "attention_norm", "feed_forward_out"),
    *("feed_forward_norm", "feed_forward", "query", "key", "value", "softmax", "embeddings"),
)


def _part(op_name: str) -> str:
    """The layer that an operation belongs to, or what JAX calls the operation."""
    scopes = op_name.split("/")
    found = next((part for part in _PARTS if part in scopes), None)
    return found or re.sub(r"[\W\d]+$", "", scopes[-1])


def _place(op_name: str) -> str:
    """What the operation belongs to: a tower, forward or backward, the loss, or the rest."""
    if "encode_image" in op_name:  # its blocks may run in a shard_map, too
        place = "image"
    elif "encode_text" in op_name:
        place = "text"
    elif "shard_map" in op_name:
        place = "loss"
    else:
        return "update"
    return f"{place} backward" if "transpose(" in op_name else f"{place} forward"


def _step_lines(step: dict[str, Any], chip: dict[str, Any]) -> list[str]:
    memory = step["memory"]
    limit = f" of {chip['hbm_gib']:g} GiB" if "hbm_gib" in chip else ""
    if "error" in step:
        return [f"does not fit{limit} of memory: {step['error']}"]
    sizes = [f"{name} {memory[name] / GIB:.2f}" for name in ("arguments", "outputs", "temporaries")]
    lines = [f"memory per chip, GiB: {', '.join(sizes)}; peak {memory['peak'] / GIB:.2f}{limit}"]
    seconds = ""
    if "hbm_bytes_per_s" in chip:
        seconds = f", {step['traffic_bytes'] / chip['hbm_bytes_per_s']:.2f} s at full bandwidth"
    lines.append(f"memory traffic per chip: {step['traffic_bytes'] / GIB:.1f} GiB{seconds}")
    for entry in step["traffic"][:_TRAFFIC_LINES]:
        where = " ".join(filter(None, (entry["place"], entry["part"])))
        lines.append(f"  {entry['bytes'] / GIB:.1f} GiB {entry['kind']}, {where}")
    for entry in step["collectives"]:
        lines.append(
            f"{entry['kind']} over {entry['devices']}, {entry['place']}, {entry['dtype']}: "
            f"{entry['bytes'] / 2**20:,.1f} MiB in {entry['runs']} runs"
        )
    if step["batch_squares"]:
        lines.append(f"tensors of global batch squared: {', '.join(step['batch_squares'])}")
    elif step["squares_checked"]:
        lines.append("no tensor with two dimensions as large as the global batch")
    return lines


def _metric(value: float) -> str:
    power = min(int(math.log10(value)) // 3, 5) if value >= 1 else 0
    return f"{value / 1000**power:.1f} {' kMGTP'[power]}".rstrip()


def _flops_report(
    config: ConfigDict, model: DualEncoder, num_chips: int, chip: chips.Chip | None
) -> dict[str, float]:
    pair = flops.pair_flops(
        model,
        image_size_px=config.data.image_size,
        max_tokens=config.data.max_tokens,
        batch_size=config.train.batch_size,
        microbatches=config.train.microbatches,
    )
    pairs_per_chip = config.train.batch_size / num_chips
    report = {
        "forward_image": pair.image,
        "forward_text": pair.text,
        "forward_loss": pair.loss,
        "model_per_pair": pair.model,
        "hardware_per_pair": pair.hardware,
        "model_per_chip": pair.model * pairs_per_chip,
        "hardware_per_chip": pair.hardware * pairs_per_chip,
    }
    if chip:
        report["step_s_at_peak"] = report["hardware_per_chip"] / chip.peak_flops
    return report


def _square_size(config: ConfigDict, abstract: state.TrainState) -> int:
    """The global batch; 0 where the model itself is as wide, so that nothing would follow."""
    widths = [
        max(leaf.shape, default=0)
        for name, leaf in trees.named_leaves(abstract.params)
        if not name.endswith("word_embeddings/embedding")
    ]
    widest = max(*widths, config.data.image_size, config.data.max_tokens)
    return config.train.batch_size if config.train.batch_size > widest else 0


def _vocab_size(config: ConfigDict) -> int:
    if config.data.tokenizer and os.path.exists(config.data.tokenizer):
        return tokenizer_lib.load_tokenizer(config.data.tokenizer).vocab_size
    return config.data.vocab_size


def _abstract_batch(
    config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    size, length = config.data.image_size, config.data.max_tokens
    shapes = {
        "image": ((size, size, 3), jnp.uint8),
        "ids": ((length,), jnp.int32),
        "mask": ((length,), jnp.int32),
        "index": ((), jnp.int32),
    }
    shapes |= {name: ((2,), jnp.uint32) for name in losses.DUPLICATES[config.loss.mask_duplicates]}
    rows = mesh_lib.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }


def _version(package: str) -> str:
    if package == "align_jax":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
