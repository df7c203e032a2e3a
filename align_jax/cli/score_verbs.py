"""The verbs that prepare what curation filters by, score and entries: arguments, what they print.

The work is done in curate/, which is imported when it begins.
"""

import argparse
import json
import os
from collections.abc import Callable

from align_jax.cli.data_verbs import read_pairs
from align_jax.cli.model_verbs import add_model
from align_jax.storage import writing
from align_jax.storage.text import read_lines


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs by `add_verb(name, function of (args, rest), help) -> parser`."""
    score = add_verb("score", _score, "write the cosine of each pair by a model; resumable")
    score.epilog = (
        "example: align score shards --model runs/mine --text nsfw=prompts.txt --out scores.parquet"
    )
    score.add_argument("source", help="pairs, see `align pack`")
    add_model(score, "--model")
    score.add_argument("--out", required=True, metavar="FILE", help="Parquet file")
    score.add_argument(
        "--table",
        metavar="FILE",
        help="Parquet with key and text (of scan or curate; file, glob or folder of parts): its "
        "rows are scored and keep their columns (default: every caption of SOURCE)",
    )
    score.add_argument(
        "--column", default="similarity", metavar="NAME", help="of the cosine; default: similarity"
    )
    score.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a further column: the cosine of the image with TEXT, or the largest with the lines "
        "of a .txt file; repeatable",
    )
    score.add_argument("--part-size", type=int, default=4096, help="rows kept at a time")
    score.add_argument("--batch-size", type=int, help="most a call (default: that of the run)")
    score.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: that of the run")

    entries = add_verb("entries", _entries, "build the metadata entries of MetaCLIP")
    entries.epilog = (
        "example: align entries --wordnet /usr/share/wordnet --unigrams words.tsv --out entries.txt"
    )
    entries.add_argument("--out", required=True, metavar="FILE", help="one entry a line")
    entries.add_argument("--wordnet", metavar="DIR", help="folder of WordNet's data.* files")
    entries.add_argument("--unigrams", metavar="TSV", help="word and count in a corpus, all words")
    entries.add_argument("--bigrams", metavar="TSV", help="two words and count in the same corpus")
    entries.add_argument("--page-views", metavar="TSV", help="title of a page and its views")
    entries.add_argument(
        "--budget", type=int, default=500_000, help="most entries (default: 500000, as MetaCLIP)"
    )


def _score(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import align
    from align_jax.curate import score
    from align_jax.curate.filter import ingest
    from align_jax.data.sources import open_source as sources

    if args.part_size < 1:
        raise ValueError(f"--part-size {args.part_size} must be at least 1.")
    texts = {}
    for name, value in read_pairs("--text", args.text).items():
        is_file = value.endswith(".txt")
        texts[name] = [t for t in read_lines(value) if t.strip()] if is_file else [value]
    table = ingest.find_files(args.table) if args.table else []
    source = sources.open_source(args.source)
    model = align.load(args.model, step=args.step, dtype=args.dtype, batch_size=args.batch_size)
    made = score.score(
        source,
        args.out,
        model,
        table=table,
        column=args.column,
        texts=texts,
        part_size=args.part_size,
    )
    print(json.dumps(made, indent=2, ensure_ascii=False))


def _entries(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.curate.filter import metadata_entries

    if os.path.exists(args.out):
        raise ValueError(f"{args.out} exists; name a new file.")
    if args.budget < 1:
        raise ValueError(f"--budget {args.budget} must be at least 1.")
    made = metadata_entries.build_entries(
        wordnet_dir=args.wordnet,
        unigrams=args.unigrams,
        bigrams=args.bigrams,
        page_views=args.page_views,
        budget=args.budget,
    )
    writing.write_text(args.out, "".join(f"{entry}\n" for entry in made))
    print(f"wrote {len(made)} entries to {args.out}")
