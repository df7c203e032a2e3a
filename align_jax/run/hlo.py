"""Reads the text of an optimised XLA program: collectives, memory traffic, tensors by size.

Everything is per device and counts the body of a loop as often as it runs. Knows the text that
jax 0.10 prints for CPU and TPU; an instruction that it does not know counts for nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      devices: that take part in one group (of a permutation: pairs).
      dtype: of the (first) operand, e.g. "bf16".
      bytes: of the larger of operands and results, on one device, each time it runs.
      runs: times that it runs.
      op_name: where it comes from, e.g. "jit(train_step)/jvp(DualEncoder)/.../reduce_sum".
    """

    kind: str
    devices: int
    dtype: str
    bytes: int
    runs: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one operation of a program reads from and writes to memory.

    Attributes:
      kind: "convolution" (matrix products too, with what is fused to them), "reduce" (a fusion or
        operation that reduces), "copy" (of layout, type or place alone), "update" (writes into a
        larger tensor, as a scan does), "elementwise", or the opcode of any other.
      bytes: each time it runs, on one device.
      runs: times that it runs.
      op_name: where it comes from, as in `Collective`.
    """

    kind: str
    bytes: int
    runs: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Program:
    """The parsed text of a program.

    Attributes:
      collectives: all of them, in no particular order.
      traffic: of the operations that run, on-chip memory excepted. What a fusion
        slices out of a tensor or writes into it counts, not the tensor.
      shapes: of all tensors, as (dtype, dimensions).
      unknown_loops: number of loops whose trip count could not be read; they count once.
    """

    collectives: tuple[Collective, ...]
    traffic: tuple[Traffic, ...]
    shapes: frozenset[tuple[str, tuple[int, ...]]]
    unknown_loops: int

    @property
    def traffic_bytes(self) -> int:
        """All that is read and written in one run of the program."""
        return sum(op.bytes * op.runs for op in self.traffic)

    def squares(self, size: int) -> list[str]:
        """Returns the tensors that have two dimensions of at least `size`, e.g. "f32[64,64]"."""
        found = [s for s in self.shapes if sum(n >= size for n in s[1]) > 1]
        return [f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in sorted(found)]


def parse(text: str) -> Program:
    """Returns what there is to know of a program, from `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation.")
    runs, unknown_loops, fused = _runs(computations, entry)
    collectives, traffic = [], []
    for name, count in runs.items():
        for op in computations[name].values():
            kind = op.opcode.removesuffix("-start")
            if kind in KINDS and not _continues(name, computations[name]):
                collectives.append(_collective(op, kind, name, computations[name], count))
            if name not in fused and (size := _traffic(op, computations[name], computations)):
                traffic.append(Traffic(_kind(op, computations), size, count, _origin(op)))
    shapes = {
        (dtype, dimensions)
        for computation in computations.values()
        for op in computation.values()
        for dtype, dimensions, _ in op.results
    }
    return Program(tuple(collectives), tuple(traffic), frozenset(shapes), unknown_loops)


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    opcode: str
    results: tuple[tuple[str, tuple[int, ...], bool], ...]  # (dtype, dimensions, in HBM)
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self) -> list[str]:
        """Computations that run when this operation does."""
        names = re.findall(r"(?:calls|body|condition)=%([\w.\-]+)", self.attributes)
        names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        if self.opcode == "call":
            names += re.findall(r"to_apply=%([\w.\-]+)", self.attributes)
        return names


# Of one computation: name -> operation; of a program: name -> computation.
_Operations = dict[str, _Operation]
_Computations = dict[str, _Operations]

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
# Memory spaces of TPUs: 1 is the vector memory (128 MiB on v5e), 2 and 6 hold flags and scalars, 3
# is the common memory of a v4 (128 MiB). None is HBM, 5 the host's.
_ON_CHIP = re.compile(r"S\([1236]\)")
_BITS = {"pred": 8, "token": 0}


def _computations(text: str) -> tuple[_Computations, str | None]:
    computations, entry, current = {}, None, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _OPERATION.match(line):
            op = _operation(match[2], match[3], bool(match[1]))
            current[op.name] = op
    return computations, entry


def _operation(name: str, text: str, is_root: bool) -> _Operation:
    # RESULT OPCODE(OPERANDS), ATTRIBUTES, where a result may be a tuple.
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    results = tuple(
        (m[1], tuple(int(n) for n in m[2].split(",") if n), not _ON_CHIP.search(m[3] or ""))
        for m in _SHAPE.finditer(text[:end])
    )
    opening = text.index("(", end)
    closing = _closing(text, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[opening:closing]))
    attributes = text[closing + 1 :]
    if text[end:opening].strip() in ("constant", "parameter"):  # constant(4), parameter(0)
        attributes = text[opening + 1 : closing]
    return _Operation(name, text[end:opening].strip(), results, operands, attributes, is_root)


def _closing(text: str, opening: int) -> int:
    """Returns the place of the bracket that closes the one there."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _runs(computations: _Computations, entry: str) -> tuple[dict[str, int], int, set[str]]:
    """({computation: times it runs}, loops of unknown length, names of fused computations)."""
    callers = {name: [] for name in computations}
    unknown, fused = 0, set()
    for name, operations in computations.items():
        for op in operations.values():
            trips = 1
            if op.opcode == "while":
                trips = _trip_count(op, computations)
                unknown += trips is None
            for called in op.called():
                callers[called].append((name, trips or 1))
                if op.opcode == "fusion":
                    fused.add(called)

    @functools.cache
    def runs(name: str) -> int:
        if name == entry:
            return 1
        return sum(runs(caller) * trips for caller, trips in callers[name])

    # What a fused computation calls is fused too.
    pending = list(fused)
    while pending:
        for op in computations[pending.pop()].values():
            new = [name for name in op.called() if name not in fused]
            fused.update(new)
            pending.extend(new)
    return {name: runs(name) for name in computations if runs(name)}, unknown, fused


def _trip_count(loop: _Operation, computations: _Computations) -> int | None:
    known = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
    if known:
        return int(known[1])
    # TPU programs do not say; JAX's scans compare a counter from 0 with one constant.
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)[1]
    limits = [
        int(op.attributes)
        for op in computations[condition].values()
        if op.opcode == "constant" and op.attributes.isdecimal()
    ]
    return limits[0] if len(limits) == 1 else None


def _continues(computation: str, operations: _Operations) -> bool:
    """Whether this is a later part of a collective that TPUs run inside of other fusions."""
    return computation.startswith("async_collective_fusion") or any(
        "AsyncCollectiveDone" in op.attributes for op in operations.values()
    )


def _collective(
    op: _Operation, kind: str, computation: str, operations: _Operations, count: int
) -> Collective:
    operands = [shape for name in op.operands for shape in operations[name].results]
    devices = _group_size(op.attributes)
    size = _bytes(operands)
    if kind == "all-gather":
        size *= devices
    # TPU: an all-reduce of which each device keeps a part is fused with the slicing.
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, devices, operands[0][0], size, count, _origin(op))


def _origin(op: _Operation) -> str:
    found = re.search(r'op_name="([^"]*)"', op.attributes)
    return found[1] if found else ""


def _group_size(attributes: str) -> int:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return pairs[1].count("{")
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)?\s*\{([^}]*)\}"
    if mesh := re.search(named, attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return 1


def _bytes(shapes: Iterable[tuple]) -> int:
    total = 0
    for dtype, dimensions, *_ in shapes:
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        total += math.prod(dimensions) * bits // 8
    return total


_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id iota opt-barrier".split()
)


def _traffic(op: _Operation, operations: _Operations, computations: _Computations) -> int:
    """Bytes that one run of an operation reads from and writes to memory."""
    if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
        return 0
    sources = [operations[name].results for name in op.operands]
    if op.opcode in ("slice", "dynamic-slice", "gather"):
        return _moved(op.results[0], sources[0])
    if op.opcode == "dynamic-update-slice":
        return _moved(sources[1][0], op.results) + _in_hbm(sources[1])
    if op.opcode == "copy-start":  # (target, source, context)
        return _moved(op.results[0], sources[0])
    if op.opcode.endswith("slice-start"):  # ((source, indices), target, context)
        return _moved(op.results[len(op.operands)], sources[0])
    if op.opcode.endswith("-start"):  # its results repeat its operands
        return 2 * sum(map(_in_hbm, sources))
    if op.opcode != "fusion":
        return _in_hbm(op.results) + sum(map(_in_hbm, sources))
    total = 0
    for index, source in enumerate(sources):
        if whole := _in_hbm(source):
            total += min(whole, _read_inside(op, index, computations, whole))
    for index, result in enumerate(op.results):
        if whole := _in_hbm([result]):
            total += min(whole, _written_inside(op, index, computations))
    return total


def _in_hbm(shapes: Iterable[tuple]) -> int:
    return _bytes([shape for shape in shapes if shape[2]])


def _moved(part: tuple, whole: Iterable[tuple]) -> int:
    """Bytes of a part that is read from `whole` and written where the part lies (or in reverse)."""
    return _in_hbm([part]) + (_bytes([part]) if _in_hbm(whole) else 0)


def _index(parameter: _Operation) -> int:
    return int(parameter.attributes or 0)


def _read_inside(fusion: _Operation, index: int, computations: _Computations, whole: int) -> int:
    """Bytes that a fusion reads of its operand of that number."""
    inner = computations[fusion.called()[0]]
    parameters = [op for op in inner.values() if op.opcode == "parameter" and _index(op) == index]
    return _read(parameters[0].name, inner, computations, whole) if parameters else 0


def _read(name: str, operations: _Operations, computations: _Computations, whole: int) -> int:
    """Bytes that a fused computation reads of an array: slices of it, if all its uses slice."""
    total = 0
    for op in operations.values():
        if name not in op.operands:
            continue
        if op.opcode in ("slice", "dynamic-slice", "gather") and op.operands[0] == name:
            total += _bytes(op.results)
        elif op.opcode == "bitcast":
            total += _read(op.name, operations, computations, whole)
        elif op.opcode == "fusion":
            for index, operand in enumerate(op.operands):
                if operand == name:
                    total += _read_inside(op, index, computations, whole)
        elif op.opcode == "dynamic-update-slice" and op.operands[0] == name:
            continue  # overwritten in place
        else:
            return whole
    return total


def _written_inside(fusion: _Operation, index: int, computations: _Computations) -> int:
    """Bytes that a fusion writes of its result of that number."""
    inner = computations[fusion.called()[0]]
    op = next(each for each in inner.values() if each.is_root)
    if op.opcode == "tuple":
        op, index = inner[op.operands[index]], 0
    while op.opcode == "bitcast":
        op = inner[op.operands[0]]
    if op.opcode == "dynamic-update-slice":
        return _bytes(inner[op.operands[1]].results)
    if op.opcode == "fusion":
        return _written_inside(op, index, computations)
    return _bytes(op.results)


_KINDS_OF = {  # in the order of their weight: a fusion is of the first kind that it holds
    "convolution": frozenset(("convolution", "dot")),
    "reduce": frozenset(("reduce", "reduce-window")),
    "update": frozenset(("dynamic-update-slice", "scatter")),
}
_MOVES = frozenset(
    "parameter constant tuple get-tuple-element bitcast bitcast-convert broadcast convert copy "
    "iota pad concatenate reshape reverse slice transpose dynamic-slice".split()
)


def _kind(op: _Operation, computations: _Computations) -> str:
    """The kind of an operation that moves bytes, see `Traffic`."""
    opcodes, pending = {op.opcode}, op.called() if op.opcode == "fusion" else []
    while pending:
        inner = computations[pending.pop()].values()
        opcodes.update(each.opcode for each in inner)
        pending.extend(name for each in inner for name in each.called())
    opcodes = {opcode.removesuffix("-start") for opcode in opcodes}
    for kind, members in _KINDS_OF.items():
        if opcodes & members:
            return kind
    if op.opcode != "fusion":
        return "copy" if opcodes <= _MOVES else opcodes.pop()
    return "copy" if opcodes <= _MOVES | {"fusion"} else "elementwise"
