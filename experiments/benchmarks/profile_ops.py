"""Which operations take most of a step on a CPU, read from a trace by XProf's own converter.

    align train --config configs/quickstart.py --workdir runs/x --profile 100:105
    python experiments/benchmarks/profile_ops.py runs/x --module jit_train_step

Needs the package `xprof`, which comes with `tensorboard-plugin-profile`. XProf's own tables count
operations of accelerators only; those of a CPU are in its trace viewer, and where they come from in
the programs that it unpacks. An operation counts with the least time of all its runs, which other
programs on the machine disturb least.
"""

import argparse
import collections
import json
import re
from pathlib import Path

from xprof.convert import raw_to_tool_data


def times(trace: str, module: str) -> dict[str, list[float]]:
    """Returns the durations in us of the runs of each operation of a program."""
    found = collections.defaultdict(list)
    data, _ = raw_to_tool_data.xspace_to_tool_data([trace], "trace_viewer", {})
    for event in json.loads(data)["traceEvents"]:
        about = event.get("args", {})
        if event.get("ph") == "X" and about.get("hlo_module") == module and "hlo_op" in about:
            found[about["hlo_op"]].append(event["dur"])
    return found


def origins(trace: str, module: str) -> dict[str, str]:
    """Returns the place in the model of each operation of a program."""
    raw_to_tool_data.xspace_to_tool_names([trace])  # unpacks the programs
    (path,) = [
        path
        for path in Path(trace).parent.glob("*.hlo_proto.pb")
        if re.fullmatch(rf"{module}(\(\d+\))?\.hlo_proto\.pb", path.name)
    ]
    found = {}
    # HloProto 1: module, 3: computations, 2: instructions, 1: name, 7: metadata, 2: op_name.
    for hlo in fields(path.read_bytes(), 1):
        for computation in fields(hlo, 3):
            for instruction in fields(computation, 2):
                (name,) = fields(instruction, 1)
                for metadata in fields(instruction, 7):
                    for place in fields(metadata, 2):
                        found[name.decode()] = place.decode()
    return found


def fields(message: bytes, number: int) -> list[bytes]:
    """Returns the values of a field of a serialised protocol buffer that have a length."""
    found, at = [], 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 2:
            size = integer()
            if key >> 3 == number:
                found.append(message[at : at + size])
            at += size
        elif key & 7:
            at += {1: 8, 5: 4}[key & 7]
        else:
            integer()
    return found


def main() -> None:
    """Prints the operations that take most, and what they add up to by place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+", help="of the same program")
    parser.add_argument("--module", default="jit_train_step")
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args()
    traces = [
        str(path)
        for workdir in args.workdirs
        for path in workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    ]
    runs = collections.defaultdict(list)
    for trace in traces:
        for name, durations in times(trace, args.module).items():
            runs[name] += durations
    least = {name: min(durations) for name, durations in runs.items()}
    places, total = origins(traces[-1], args.module), sum(least.values())
    sums = collections.Counter()
    for name, spent in least.items():
        place = re.sub(r"\d+", "N", places.get(name, "?"))
        sums["/".join(place.split("/")[-3:])] += spent
    count = max(map(len, runs.values()))
    print(f"{len(least)} operations, together {total / 1e3:.1f} ms a step, least of {count}")
    for name, spent in collections.Counter(least).most_common(args.top):
        print(
            f"{100 * spent / total:5.1f} %  {spent / 1e3:7.2f} ms  {name}: {places.get(name, '?')}"
        )
    print("by the end of their names:")
    for place, spent in sums.most_common(args.top):
        print(f"{100 * spent / total:5.1f} %  {spent / 1e3:7.2f} ms  {place}")


if __name__ == "__main__":
    main()
