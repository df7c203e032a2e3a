"""The verb `align serve`: arguments. The work is done in align_jax/serve/."""

import argparse
from collections.abc import Callable

from align_jax.cli import model_verbs


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb by `add_verb(name, function of (args, rest), help) -> parser`."""
    serve = add_verb("serve", _serve, "embeddings, classification, search over HTTP, and a page")
    serve.epilog = "example: align serve --model runs/quickstart --index photos"
    model_verbs.add_model(serve, "--model")
    serve.add_argument("--index", metavar="INDEX", help="of this model, for search")
    serve.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    serve.add_argument("--key-file", metavar="FILE", help="holds the key that clients must send")
    serve.add_argument("--no-auth", action="store_true", help="serve other machines without a key")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that requests may be sent to, e.g. of the proxy in front; repeatable",
    )
    serve.add_argument(
        "--writable", action="store_true", help="clients may add and delete rows of the index"
    )
    serve.add_argument(
        "--fetch-urls",
        action="store_true",
        help="fetch images that clients name by URL, from public addresses only",
    )
    serve.add_argument("--name", default="align", help="of the model, for clients (default: align)")
    serve.add_argument(
        "--batch-size", type=int, help="most inputs a device call (default: 32 on CPUs, else 128)"
    )
    serve.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: that of the run, or float32"
    )


def _serve(args: argparse.Namespace, rest: list[str]) -> None:
    try:
        from align_jax.serve import run
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Serving needs {error.name}, which is not installed: pip install 'align_jax[serve]'."
        ) from None
    if not 0 <= args.port <= 65_535:
        raise ValueError(f"--port {args.port} must be between 0 and 65,535.")
    if not args.name.strip():
        raise ValueError("--name is empty; clients name the model by it.")
    if args.writable and args.index is None:
        raise ValueError("--writable needs --index, whose rows are written.")
    run.serve(
        args.model,
        index=args.index,
        host=args.host,
        port=args.port,
        key_file=args.key_file,
        no_auth=args.no_auth,
        allowed_hosts=args.allow_host,
        writable=args.writable,
        fetch_urls=args.fetch_urls,
        name=args.name,
        step=args.step,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )
