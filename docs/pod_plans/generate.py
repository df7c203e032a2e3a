"""Writes docs/pod_plans.md from the reports beside this file: python docs/pod_plans/generate.py"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
GIB, MIB = 2**30, 2**20

INTRO = """# Pod plans

What a run needs on a TPU slice, before anyone rents one. Each plan is the actual train step (and
both embed steps), compiled for the topology on a CPU machine without a TPU; nothing ran. This page
is made by `python docs/pod_plans/generate.py` from the JSON reports in `docs/pod_plans/`, which
`align compile --out` wrote.

How to read it:

- **arguments** are what a chip holds between steps (its share of parameters, optimizer state and
  batch), **temporaries** what XLA allocates during one, gaps between buffers counted in, **peak**
  the largest amount alive at a time. The compiler refuses a program that does not fit.
- **model FLOPs** are analytic (`align_jax/models/flops.py`): three forward passes, nothing counted
  twice. **computing** is the least time of a step, recomputation included, at the chip's bfloat16
  peak; **memory** the time of its memory traffic at full bandwidth, estimated from the program. A
  real step takes longer than both.
- **MB an image** is that traffic over the images of a chip; the tables below say which operations
  cause it. A kind is what a fusion does that weighs most: a convolution is one with all that is
  fused to it.
- Collectives are per chip and step, loops counted as often as they run. XLA merges operations;
  the place names the first of those merged.
"""

SUMMARY = (
    "| config | slice | chips | mesh (data x fsdp) | batch a chip | microbatches | arguments | "
    "temporaries | peak | HBM | GFLOPs a pair | computing | memory | MB an image | compiling, one "
    "core |"
)
OLD = (
    "\n\\* Compiled before the blocks of the image tower trained one BatchNorm group at a time. "
    "Counted\ntoo high: slices that are prefetched, and on v4 all of its common memory."
)
TRAFFIC_ROWS = 12


def main() -> str:
    """Returns the page."""
    reports = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    lines = [INTRO, SUMMARY, "|---|---|" + "---:|" * 13]
    lines += [_summary(report) for report in reports]
    lines += [OLD] if not all(map(_is_new, reports)) else []
    for config in dict.fromkeys(report["config"] for report in reports):
        lines += ["", f"## {config}"]
        for report in reports:
            if report["config"] == config:
                lines += ["", *_section(report)]
    return "\n".join(lines) + "\n"


def _summary(report) -> str:
    step, flops = report["steps"]["train_step"], report["flops"]
    memory, star = step["memory"], "" if _is_new(report) else "\\*"
    sizes = [f"{memory[name] / GIB:.2f} GiB" for name in ("arguments", "temporaries", "peak")]
    cells = [
        report["config"],
        _slice(report),
        f"{report['num_chips']}",
        " x ".join(str(size) for size in report["mesh"].values()),
        f"{report['batch_size'] // report['num_chips']}",
        f"{report['microbatches']}",
        *sizes,
        f"{report['chip']['hbm_gib']:g} GiB",
        f"{flops['model_per_pair'] / 1e9:.1f}",
        f"{flops['step_s_at_peak']:.2f} s",
        f"{step['traffic_bytes'] / report['chip']['hbm_bytes_per_s']:.2f} s{star}",
        f"{step['traffic_bytes'] / _images(report) / 1e6:,.0f}{star}",
        f"{step['compile_cpu_s'] / 60:.0f} min" if "compile_cpu_s" in step else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _section(report) -> list[str]:
    step = report["steps"]["train_step"]
    command = " ".join(
        [
            f"align compile --config configs/{report['config']}.py",
            f"--topology {report['topology']}",
            *([f"--slices {report['slices']}"] if report["slices"] > 1 else []),
            *report["overrides"],
        ]
    )
    squares = "; no tensor is global batch x global batch" if not step["batch_squares"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["version"].items())
    lines = [
        f"### {report['config']} on {_slice(report)}",
        "",
        f"    {command}",
        "",
        f"{report['model']}, {report['parameters'] / 1e6:.0f} M parameters, vocabulary "
        f"{report['vocab_size']:,}; global batch {report['batch_size']:,}, "
        f"{report['image_size']} px, {report['max_tokens']} tokens; remat `{report['remat']}`, "
        f"loss `{report['loss_form']}`{squares}. {report['num_hosts']} hosts. {versions}.",
        "",
        "| collective | chips | place | type | runs | MiB a step | largest, MiB |",
        "|---|---:|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {entry['kind']} | {entry['devices']} | {entry['place']} | {entry['dtype']} | "
        f"{entry['runs']} | {entry['bytes'] / MIB:,.1f} | {entry['largest_bytes'] / MIB:,.1f} |"
        for entry in step["collectives"]
    ]
    if _is_new(report):
        lines += ["", "| MB an image | operation | place | layer |", "|---:|---|---|---|"]
    lines += [
        f"| {entry['bytes'] / _images(report) / 1e6:,.1f} | {entry['kind']} | {entry['place']} | "
        f"{entry['part']} |"
        for entry in step.get("traffic", [])[:TRAFFIC_ROWS]
    ]
    embed = [
        f"{name} {report['steps'][name]['memory']['peak'] / GIB:.2f} GiB"
        for name in ("embed_image", "embed_text")
    ]
    lines += ["", f"Embedding {report['embed_batch_size']} at a time: peak {', '.join(embed)}."]
    return lines


def _is_new(report) -> bool:
    return "traffic" in report["steps"]["train_step"]


def _images(report) -> float:
    """Images of a chip in a step."""
    return report["batch_size"] / report["num_chips"]


def _slice(report) -> str:
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    return f"{slices}{report['topology']}"


if __name__ == "__main__":
    FOLDER.with_suffix(".md").write_text(main())
