"""The verbs `align index` and `align search`: arguments and what they print.

The work is done in align_jax/search/, which is imported when it begins.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from align_jax.cli import model_verbs
from align_jax.storage import writing
from align_jax.storage.text import read_lines

if TYPE_CHECKING:
    from align_jax.align import Align
    from align_jax.search.index import Index
    from align_jax.search.rows import Hit

_INDEX_HELP = "folder, or http://host:port of a Milvus server; #name after that is one of several"
_FILTER_HELP = "field=value (also != < <= > >=), 'field in a,b', or JSON; repeatable: all must hold"


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs by `add_verb(name, function of (args, rest), help) -> parser`."""
    index = add_verb("index", _index, "a vector index of images and texts: fill, measure, move it")
    index.epilog = (
        "example: align index add 'scenes?size=1000&seed=7' --model runs/quickstart "
        "--index photos --kind both"
    )
    actions = index.add_subparsers(dest="action", required=True, metavar="action")

    add = _action(actions, "add", _add, "add a source, or a folder of `align embed`; resumable")
    add.add_argument("source", metavar="SOURCE", help="pairs, images, or a folder of align embed")
    model_verbs.add_model(add, "--model")
    add.add_argument(
        "--kind",
        choices=("image", "text", "both"),
        default="image",
        help="rows to make of pairs (default: image)",
    )
    add.add_argument("--index-type", help="of a new index: IVF_FLAT (exact; folders) or HNSW")
    add.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="bad items")
    add.add_argument("--force", action="store_true", help="a million rows and more in a folder")

    delete = _action(actions, "delete", _delete, "delete rows")
    delete.add_argument("--keys", metavar="FILE", help="a key a line")
    delete.add_argument("--filter", action="append", default=[], help=_FILTER_HELP)

    _action(actions, "info", _info, "model, type and numbers of rows")

    recall = _action(actions, "recall", _recall, "recall@k against exact search, by kind of query")
    recall.add_argument("--queries", type=int, default=200, metavar="N", help="default: 200")
    recall.add_argument("-k", type=int, default=10, help="hits of a query (default: 10)")

    copy = _action(actions, "copy", _copy, "copy all rows into another index, e.g. on a server")
    copy.add_argument("--to", required=True, metavar="INDEX", help=_INDEX_HELP)
    copy.add_argument("--index-type", help="of a new index: IVF_FLAT or HNSW (default: servers)")

    search = add_verb("search", _search, "find images or texts by text, image, or image and words")
    search.epilog = (
        "example: align search --index photos --image car.jpg --add 'a blue car' "
        "--remove 'a red car' --gallery found.png"
    )
    _add_index(search)
    search.add_argument("--model", metavar="MODEL", help="default: what the index was made with")
    search.add_argument("--step", type=int, help="checkpoint of a workdir; likewise")
    search.add_argument("--image", metavar="FILE", help="picture to search by")
    search.add_argument("--text", help="text to search by, alone or together with the image")
    search.add_argument("--add", action="append", default=[], metavar="TEXT", help="what to add")
    search.add_argument(
        "--remove", action="append", default=[], metavar="TEXT", help="what to take away"
    )
    search.add_argument(
        "--weight", type=float, help="of added texts; default: 1 with --add and --remove, else 2"
    )
    search.add_argument(
        "--kind",
        choices=("image", "text", "any"),
        default="image",
        help="rows to find (default: image)",
    )
    search.add_argument("--filter", action="append", default=[], help=_FILTER_HELP)
    search.add_argument("-k", type=int, default=10, help="hits (default: 10)")
    search.add_argument("--json", action="store_true", help="print the hits as JSON")
    search.add_argument("--gallery", metavar="PNG", help="draw the pictures that were found")


def _action(
    actions: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_index(parser)
    parser.set_defaults(act=run)
    return parser


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, metavar="INDEX", help=_INDEX_HELP)


def _index(args: argparse.Namespace, rest: list[str]) -> None:
    args.act(args)


def _add(args: argparse.Namespace) -> None:
    from align_jax import align
    from align_jax.search import index, ingest

    ingest.check_source(args.source, args.kind)
    model = align.load(args.model, step=args.step)
    identity = index.identity_of(model)
    options = {"index_type": args.index_type, "work": "align index add"}
    with index.Index(args.index, identity, model=model, **options) as rows:
        counts = ingest.add(
            rows,
            model,
            args.source,
            kind=args.kind,
            on_error=args.on_error,
            force=args.force,
        )
        total = rows.count()
        left_out = f"; left out: {counts['problems']}" if counts["problems"] else ""
        print(
            f"{args.index}: {counts['added']:,} rows added, {counts['updated']:,} updated, "
            f"{counts['unchanged']:,} unchanged, {total:,} in all{left_out}"
        )
        _say_what_it_costs(rows, total)


def _delete(args: argparse.Namespace) -> None:
    from align_jax.search import filters, index

    if not args.keys and not args.filter:
        raise ValueError("Name rows to delete: --keys FILE or --filter field=value.")
    keys = read_lines(args.keys) if args.keys else []
    where = filters.parse(args.filter) or None
    with index.Index(args.index, work="align index delete") as rows:
        deleted = rows.delete(keys, filter=where)
        if not deleted and where:
            _explain_nothing(rows, where)
        print(f"{args.index}: {deleted:,} rows deleted")


def _info(args: argparse.Namespace) -> None:
    from align_jax.search import index

    with index.Index(args.index, work="align index info") as rows:
        about = rows.info()
        by_kind = about.pop("rows_by_kind")
        about["rows"] = f"{about['rows']:,}"
        for kind, count in by_kind.items():
            about[f"  {kind}"] = f"{count:,}"
        for name, value in about.items():
            print(f"{name:14} {value}")
        _say_what_it_costs(rows, sum(by_kind.values()))


def _recall(args: argparse.Namespace) -> None:
    from align_jax import align
    from align_jax.search import index, recall

    with index.Index(args.index, work="align index recall") as rows:
        made_with = rows.identity

        def load_model() -> "Align":
            model = align.load(made_with.model, step=made_with.step)
            rows.use_model(model)
            return model

        known = load_model if made_with.model and os.path.exists(made_with.model) else None
        for name, found in recall.measure_recall(rows, args.queries, args.k, known).items():
            print(
                f"{name:14} recall@{found['k']} {found['recall']:.4f}  queries {found['queries']}"
            )


def _copy(args: argparse.Namespace) -> None:
    from align_jax.run.progress import show_progress
    from align_jax.search import index

    if os.path.realpath(args.to) == os.path.realpath(args.index):
        raise ValueError(f"--to {args.to} is the index itself; name another one.")
    with (
        index.Index(args.index, work="align index copy") as old,
        index.Index(
            args.to, old.identity, index_type=args.index_type, work="align index copy"
        ) as new,
    ):
        batches = show_progress(old.scan(), old.count(), "copy", "row", size=lambda b: len(b[0]))
        for rows, vectors in batches:
            changed, _ = new.changed(rows)
            new.put([rows[i] for i in changed], vectors[changed])
        new.flush()
        print(f"{args.to}: {new.count():,} rows, {args.index} has {old.count():,}")


def _search(args: argparse.Namespace, rest: list[str]) -> None:
    from align_jax import align
    from align_jax.search import filters, index, rows

    if args.image is None and args.text is None:
        raise ValueError("Say what to search by: --image FILE, --text TEXT, or both.")
    if args.image is not None and not os.path.isfile(args.image):
        raise ValueError(f"--image {args.image} does not exist.")
    if args.gallery and args.image and os.path.exists(args.gallery):
        if os.path.samefile(args.gallery, args.image):
            raise ValueError(f"--gallery {args.gallery} is the picture of --image; name another.")
    rows.check_k(args.k)
    where = filters.parse(args.filter)
    if args.kind != "any":
        where.setdefault("kind", args.kind)
    filters.expression(where)
    with index.Index(args.index, work="align search") as found_in:
        made_with = found_in.identity
        if not args.model and not made_with.model:
            raise ValueError(f"{args.index} does not say where its model is; give --model.")
        step = args.step if args.model or args.step is not None else made_with.step
        model = align.load(args.model or made_with.model, step=step)
        found_in.use_model(model)
        hits = found_in.search(
            image=args.image,
            text=args.text,
            add=args.add,
            remove=args.remove,
            weight=args.weight,
            k=args.k,
            filter=where,
        )
        if not hits and set(where) - {"kind"}:
            _explain_nothing(found_in, where)
        if args.json:
            print(json.dumps([hit._asdict() for hit in hits], indent=2, ensure_ascii=False))
        else:
            print(_table(hits))
        if args.gallery:  # last: a picture that cannot be written costs no result
            with writing.explaining_full_disk(os.path.dirname(args.gallery) or "."):
                _draw(args, hits)
            print(f"wrote {args.gallery}", file=sys.stderr if args.json else sys.stdout)


def _explain_nothing(found_in: "Index", where: Mapping[str, Any]) -> None:
    """Says which fields there are, where a filter leaves no row: a name may be misspelt."""
    from align_jax.search import filters

    rows, _ = next(iter(found_in.scan()), ((), None))
    names = sorted({name for row in rows for name in row.metadata})
    print(
        f"no row passes the filter on {', '.join(where)}; fields of the first rows: "
        f"{', '.join([*filters.FIELDS, *names])}.",
        file=sys.stderr,
    )


def _table(hits: list["Hit"]) -> str:
    from align_jax.search.rows import shorten

    lines = ["score   key" + " " * 29 + "caption"]
    for hit in hits:
        lines.append(f"{hit.score:6.3f}  {shorten(hit.key, 30):30}  {shorten(hit.caption, 58)}")
    return "\n".join(line.rstrip() for line in lines)


def _draw(args: argparse.Namespace, hits: list["Hit"]) -> None:
    from align_jax.data.images import decode_image
    from align_jax.search import ingest, sheet

    parts = [args.text or "", *(f"+ {text}" for text in args.add)]
    words = " ".join([*parts, *(f"− {text}" for text in args.remove)]).strip()
    picture = decode_image(args.image) if args.image else None
    title = f"Found in {args.index}"
    sheet.draw_sheet(
        args.gallery, title, [sheet.Asked(words, picture, hits)], ingest.Pictures().read
    )


def _say_what_it_costs(rows: "Index", total: int) -> None:
    from align_jax.search.ingest import LITE_COSTLY_ROWS

    if rows.is_local and total >= LITE_COSTLY_ROWS:
        print(
            f"align: a query of {total:,} rows in a folder takes about {total / 1e6:.2f} s of CPU; "
            f"a Milvus server takes less: align index copy --index {rows.uri} "
            "--to http://host:19530",
            file=sys.stderr,
        )
