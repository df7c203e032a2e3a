"""The verbs that make training data, pack and vocab: arguments and what they print.

The work is done in curate/ and data/, which are imported when it begins.
"""

import argparse
import json
import re
from collections.abc import Callable

from align_jax.run.progress import num_cores


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs by `add_verb(name, function of (args, rest), help) -> parser`."""
    _add_scan(add_verb)
    _add_curate(add_verb)
    _add_decontaminate(add_verb)
    _add_pack(add_verb)
    _add_vocab(add_verb)


class _Once(argparse.Action):
    """An option that is refused a second time, where one may think that both count."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: str, option: str
    ) -> None:
        before = getattr(args, self.dest)
        if before is not None:
            together = f"; --preset {before}+{value} keeps what both keep" * (option == "--preset")
            parser.error(f"{option} is given twice, {before} and {value}{together}")
        setattr(args, self.dest, value)


def _add_scan(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    scan = add_verb("scan", _scan, "write the metadata of pairs: captions, sizes, hashes")
    scan.epilog = "example: align scan 'captions.jsonl?images=train.zip' --out metadata.parquet"
    scan.add_argument("source", help="pairs, see `align pack`")
    scan.add_argument("--out", required=True, metavar="FILE", help="Parquet file")
    scan.add_argument(
        "--labelled", action="store_true", help="SOURCE has class folders, as --zeroshot of eval"
    )
    _add_workers(scan, "scan")
    scan.add_argument(
        "--reuse",
        action="store_true",
        help="take captions, sizes and hashes from img2dataset's tables; no image is read",
    )


def _scan(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.curate import scan

    report = scan.scan(
        args.source,
        args.out,
        labelled=args.labelled,
        num_workers=args.workers,
        beam=args.beam,
        reuse=args.reuse,
    )
    print(json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False))


def read_pairs(option: str, given: list[str]) -> dict[str, str]:
    """Returns {name: value} of options of the form NAME=VALUE."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} {pair!r} is not of the form NAME=VALUE.")
        if name in found:
            raise ValueError(f"{option} {name} is given twice.")
        found[name] = value
    return found


def _add_workers(verb: argparse.ArgumentParser, name: str) -> None:
    verb.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        metavar="N",
        help="processes (default: one a core); the files written are the same for any number",
    )
    verb.add_argument(
        "--beam",
        metavar="OPTIONS",
        help=f"{name} on an Apache Beam runner, e.g. --beam='--runner=FlinkRunner "
        "--parallelism=64'; its workers must see the same paths",
    )


def _add_curate(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    verb = add_verb("curate", _curate, "filter a metadata table by the rules of a preset")
    verb.epilog = "example: align curate metadata.parquet --preset align --out curated"
    verb.add_argument("source", help="Parquet, CSV, TSV or JSONL: file, glob or folder of parts")
    verb.add_argument("--out", required=True, metavar="DIR", help="kept and dropped rows, report")
    verb.add_argument(
        "--preset",
        required=True,
        action=_Once,
        metavar="NAME",
        help="align, coyo, laion, datacomp-basic, datacomp-clip, datacomp-text, datacomp-image, "
        "metaclip, metaclip2, or a Python file of rules; a+b keeps what both keep",
    )
    verb.add_argument(
        "--columns",
        default="",
        metavar="OURS=THEIRS,...",
        help="columns of tables whose names are not known, e.g. text=alt,width=w",
    )
    verb.add_argument(
        "--engine",
        default="duckdb",
        help="duckdb (default), spark://local, spark://HOST:PORT or bigquery://PROJECT/DATASET",
    )
    verb.add_argument(
        "--memory", type=float, default=2.0, metavar="GIB", help="of the engine (default: 2)"
    )
    verb.add_argument(
        "--metadata",
        metavar="FILE",
        help="entries of MetaCLIP, one a line; or a folder with one file a language, en.txt, ...",
    )
    verb.add_argument("--cap", type=int, help="of MetaCLIP (default: that of the preset)")
    verb.add_argument(
        "--tail",
        type=float,
        metavar="SHARE",
        help="in place of --cap: share of matches of entries that are not sampled, e.g. 0.055",
    )
    verb.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="what a rule needs: wordnet and wnids (datacomp-text), embeddings and targets "
        "(datacomp-image); repeatable",
    )
    _add_workers(verb, "read, match and write")
    verb.add_argument(
        "--partitioned",
        action="store_true",
        help="write kept/ and dropped/ with a table for each file of SOURCE, by the workers",
    )
    verb.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    verb.add_argument(
        "--url-list", metavar="FILE", help="write also the kept urls, a .parquet for img2dataset"
    )
    verb.add_argument(
        "--subset",
        metavar="FILE.npy",
        help="write also the kept uids, as DataComp's resharder takes",
    )


def _curate(args: argparse.Namespace, rest: list[str]) -> None:
    try:
        from align_jax.curate.filter import columns, curate
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ibis", "duckdb", "pyarrow"):
            raise
        raise RuntimeError("align curate needs pip install 'align_jax[curate]'.") from error

    report = curate.curate(
        args.source,
        args.out,
        preset=args.preset,
        engine=args.engine,
        columns=columns.parse_columns(args.columns),
        metadata=args.metadata,
        seed=args.seed,
        memory_gib=args.memory,
        url_list=args.url_list,
        subset=args.subset,
        cap=args.cap,
        tail=args.tail,
        files=read_pairs("--file", args.file),
        num_workers=args.workers,
        beam=args.beam,
        partitioned=args.partitioned,
    )
    print(curate.format_counts(report))
    tables = "kept/, dropped/" if args.partitioned else "kept.parquet, dropped.parquet"
    print(f"wrote {args.out}: {tables}, report.json, report.md")


def _add_decontaminate(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    verb = add_verb(
        "decontaminate",
        _decontaminate,
        "find near-duplicates of evaluation images in training data, or inside it",
    )
    verb.epilog = (
        "example: align decontaminate train.parquet --against dev.parquet --out matched --sheet; "
        "then align pack ... --drop matched/drop.parquet"
    )
    verb.add_argument(
        "train", help="table of `align scan` (or with COYO's image_phash), pairs, or embeddings"
    )
    verb.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="EVAL",
        help="evaluation set, as TRAIN; repeatable. Without it, duplicates inside TRAIN",
    )
    verb.add_argument("--out", required=True, metavar="DIR", help="new folder")
    verb.add_argument(
        "--max-distance",
        type=int,
        metavar="BITS",
        help="of 64-bit perceptual hashes (default: 8 against other sets, 4 inside TRAIN)",
    )
    verb.add_argument(
        "--min-cosine",
        type=float,
        help="of embeddings, folders of `align embed` (default: 0.975, as in the paper)",
    )
    verb.add_argument(
        "--as-is",
        action="store_true",
        help="compare evaluation images as they are, not also cropped, mirrored and framed",
    )
    verb.add_argument("--sheet", action="store_true", help="draw matched pairs: sheet.png")
    verb.add_argument(
        "--engine",
        default="duckdb",
        help="that searches inside TRAIN: duckdb, spark://..., bigquery://..., see `align curate`",
    )
    verb.add_argument(
        "--memory", type=float, default=2.0, metavar="GIB", help="of the engine (default: 2)"
    )


def _decontaminate(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.curate.near_duplicates import decontaminate

    report = decontaminate.decontaminate(
        args.train,
        args.against,
        args.out,
        max_distance=args.max_distance,
        min_cosine=args.min_cosine,
        copies=not args.as_is,
        sheet=args.sheet,
        engine=args.engine,
        memory_gib=args.memory,
    )
    print(json.dumps(report, indent=2, ensure_ascii=False))


def _add_pack(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    pack = add_verb("pack", _pack, "write a TFDS ArrayRecord dataset from any pairs")
    pack.epilog = (
        "example: align pack 'captions.jsonl?images=train.zip' --out data/flickr8k --split train"
    )
    pack.add_argument(
        "source", help="pairs: table + images, tars, zips, folder, img2dataset output; see README"
    )
    pack.add_argument("--out", required=True, metavar="DIR", help="dataset folder")
    pack.add_argument("--split", default="train", help="name of the split (default: train)")
    _add_workers(pack, "pack")
    pack.add_argument(
        "--resize",
        metavar="PX[xPX]",
        help="shrink longer short sides to PX, or width and height as training does (346x346), as "
        "JPEG of quality 95 (default: images untouched)",
    )
    pack.add_argument(
        "--shard-size",
        type=int,
        default=256,
        metavar="MIB",
        help="a file of the dataset is closed at this size (default: 256)",
    )
    pack.add_argument(
        "--keep",
        action=_Once,
        metavar="FILE",
        help="Parquet with a column key (or a folder of parts), or DataComp's .npy of uids: other "
        "records are skipped; with a column text, these texts are the captions",
    )
    pack.add_argument(
        "--keep-by",
        metavar="NAME",
        help="what joins records to --keep in place of their key: uid, id, SAMPLE_ID, url, ... of "
        "img2dataset's tables, Parquet tables and packed datasets",
    )
    pack.add_argument(
        "--columns",
        default="",
        metavar="NAME,...",
        help="metadata to carry along as features, e.g. url,license,similarity: columns of the "
        "table of --keep, or what the source has",
    )
    pack.add_argument(
        "--drop",
        action="append",
        metavar="FILE",
        help="as --keep, of records that are skipped; repeatable",
    )
    pack.add_argument("--drop-by", metavar="NAME", help="as --keep-by, for --drop")


def _pack(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.curate.pack import pack
    from align_jax.data.sources import open_source as sources

    if args.resize is not None and not re.fullmatch(r"-?\d+(x\d+)?", args.resize, re.ASCII):
        raise ValueError(f"--resize {args.resize} must be PX or PXxPX, e.g. 346 or 346x346.")
    report = pack.pack(
        sources.open_source(args.source),
        args.out,
        split=args.split,
        num_workers=args.workers,
        beam=args.beam,
        resize_px=[int(side) for side in args.resize.split("x")] if args.resize else None,
        shard_bytes=args.shard_size * 2**20,
        keep=args.keep,
        drop=args.drop,
        keep_by=args.keep_by,
        drop_by=args.drop_by,
        columns=[name.strip() for name in args.columns.split(",") if name.strip()],
    )
    print(json.dumps(report, indent=2, sort_keys=True))


def _add_vocab(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    vocab = add_verb("vocab", _vocab, "train a WordPiece vocabulary on captions")
    vocab.epilog = "example: align vocab 'kept/*.parquet' --out tokenizers/mine --size 100000"
    vocab.add_argument(
        "source",
        help="table of captions (.parquet, .csv, .tsv, .jsonl, .txt of a caption a line; may be a "
        "glob), or pairs, see `align pack`",
    )
    vocab.add_argument("--out", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    vocab.add_argument(
        "--size", type=int, default=100_000, help="wordpieces (default: 100000, as in the paper)"
    )
    vocab.add_argument("--column", help="of the table (default: the one that is recognised)")
    vocab.add_argument(
        "--keep-accents",
        action="store_true",
        help="for several languages (paper: --size 250000): accents and vowel signs count",
    )
    _add_workers(vocab, "count words")


def _vocab(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax.curate import vocab

    trained = vocab.train_vocabulary(
        args.source,
        args.out,
        args.size,
        column=args.column,
        strip_accents=False if args.keep_accents else None,
        num_workers=args.workers,
        beam=args.beam,
    )
    print(f"wrote {trained.vocab_size} wordpieces to {args.out} ({trained.fingerprint()})")
