"""The verbs that use a trained model, embed, classify, convert, export: arguments, what they print.

The work is done in embed.py, align.py and export/, which are imported when it begins.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from align_jax.storage.text import read_lines

_MODEL_HELP = "workdir, Hugging Face folder, or hub id such as kakaobrain/align-base"


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs by `add_verb(name, function of (args, rest), help) -> parser`."""
    embed = add_verb("embed", _embed, "embeddings of images or texts, as files; resumable")
    embed.epilog = "example: align embed --model runs/mine --images photos --out embeddings/photos"
    add_model(embed, "--model")
    inputs = embed.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--images", metavar="SOURCE", help="folder, archive, glob, or pairs")
    inputs.add_argument("--texts", metavar="SOURCE", help=".txt with a text a line, or pairs")
    embed.add_argument("--out", required=True, metavar="DIR", help="folder; a rerun continues")
    embed.add_argument("--format", choices=("npy", "parquet"), default="npy", help="default: npy")
    embed.add_argument("--shard-size", type=int, default=4096, help="items a file (default: 4096)")
    _add_batches(embed)

    classify = add_verb("classify", _classify, "probabilities of labels for images")
    classify.epilog = (
        "example: align classify cat.jpg dog.jpg --model kakaobrain/align-base --labels cat,dog"
    )
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    add_model(classify, "--model")
    classify.add_argument(
        "--labels", required=True, help="separated by commas, or a .txt file with one a line"
    )
    classify.add_argument(
        "--templates",
        nargs="+",
        default=["a photo of a {}."],
        metavar="TEMPLATE",
        help="prompts with {} for the label, or one .json/.txt file (default: 'a photo of a {}.')",
    )
    _add_batches(classify)

    convert = add_verb(
        "convert", _convert, "write a model as a Hugging Face folder, or its adapter"
    )
    convert.epilog = "example: align convert runs/mine exported/mine --to hf"
    convert.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    convert.add_argument("out", metavar="DIR", help="folder that transformers then reads")
    convert.add_argument(
        "--to",
        choices=("hf", "peft"),
        default="hf",
        help="the whole model, or what config.lora trained as an adapter (default: hf)",
    )
    convert.add_argument("--adapter", metavar="DIR", help="LoRA adapter of MODEL to merge into it")
    convert.add_argument("--step", type=int, help="checkpoint of a workdir; default: the newest")

    export = add_verb("export", _export, "write both towers as programs that need no align_jax")
    export.epilog = "example: align export --model runs/mine --to onnx --out exported/mine"
    add_model(export, "--model")
    export.add_argument("--to", choices=("stablehlo", "onnx"), required=True, help="format")
    export.add_argument("--out", required=True, metavar="DIR", help="folder")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: that of the run, or float32; ONNX is float32",
    )


def add_model(parser: argparse.ArgumentParser, *names: str, required: bool = True) -> None:
    """Adds the options that choose a model: `names`, and --step."""
    parser.add_argument(*names, dest="model", required=required, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--step", type=int, help="checkpoint of a workdir; default: the newest")


def read_templates(given: Sequence[str]) -> str | tuple[str, ...]:
    """Returns prompts, or the one file of prompts, as `templates.load_templates` takes them."""
    first = given[0]
    is_file = len(given) == 1 and "{}" not in first and (os.path.exists(first) or " " not in first)
    return first if is_file else tuple(given)


def _add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=int, help="most a call; default: the run's eval.batch_size, or 64"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: that of the run, or float32"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what an unreadable input does: end the command, or be named and left out",
    )


def _embed(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import align, embed
    from align_jax.search.ingest import absolute
    from align_jax.storage import writing

    embed.check_format(args.format)
    items = embed.open_images(args.images) if args.images else embed.open_texts(args.texts)
    model = align.load(args.model, step=args.step, dtype=args.dtype, batch_size=args.batch_size)
    counts = embed.embed(
        model,
        items,
        args.out,
        file_format=args.format,
        shard_size=args.shard_size,
        on_error=args.on_error,
    )
    # An index finds captions and pictures by it.
    writing.write_text(Path(args.out) / embed.SOURCE_FILE, absolute(args.images or args.texts))
    print(
        f"{args.out}: {counts['rows']:,} rows in {counts['shards']:,} shards "
        f"({counts['shards_found']:,} were there), {counts['skipped']:,} items left out"
    )


def _classify(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import align
    from align_jax.evals import tables

    labels = _labels(args.labels)
    model = align.load(args.model, step=args.step, dtype=args.dtype, batch_size=args.batch_size)
    probabilities = model.classify(
        args.images, labels, read_templates(args.templates), on_error=args.on_error
    )
    print(tables.format_probabilities(args.images, labels, probabilities))


def _labels(given: str) -> list[str]:
    labels = given.split(",")
    if given.endswith(".txt"):
        labels = read_lines(given)
    labels = [label.strip() for label in labels if label.strip()]
    if not labels:
        raise ValueError(f"--labels {given!r} names no label.")
    return labels


def _convert(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import align
    from align_jax.hf import adapter, hub, processor
    from align_jax.storage import writing

    out = Path(args.out)
    if hub.is_hugging_face(out) or (out / "adapter_config.json").exists():
        raise ValueError(f"{out} holds a model already; name a new folder.")
    if not (out / "config.json").exists():  # of a workdir, which `save` refuses by name
        ours = (*processor.FILES, "model.safetensors", adapter.WEIGHTS, adapter.BASE)
        writing.check_alone(out, ours)
    model = align.load(args.model, step=args.step, adapter=args.adapter)
    if args.to == "peft":
        model.save_adapter(args.out)
    else:
        model.save(args.out)
    print(f"wrote {args.out}")


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.export import package

    package.check_folder(args.out)
    if args.to == "onnx":
        from align_jax.export import onnx as writer

        writer.check_packages()
        args.dtype = args.dtype or "float32"
    else:
        from align_jax.export import stablehlo as writer

    from align_jax import align

    model = align.load(args.model, step=args.step, dtype=args.dtype)
    differences = writer.write(model, args.out)
    found = ", ".join(f"{tower} {value:.1e}" for tower, value in differences.items())
    print(f"wrote {args.out}; largest difference from the model's own embeddings: {found}")
    package.check(differences)
