"""The verbs that make training data, pack and vocab: arguments and what they print.

The work is done in curate/ and data/, which are imported when it begins.
"""

import argparse
import json
from collections.abc import Callable


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs by `add_verb(name, function of (args, rest), help) -> parser`."""
    _add_pack(add_verb)
    _add_vocab(add_verb)


def _add_pack(add_verb):
    pack = add_verb("pack", _pack, "write a TFDS ArrayRecord dataset from any pairs")
    pack.epilog = (
        "example: align pack 'captions.jsonl?images=train.zip' --out data/flickr8k --split train"
    )
    pack.add_argument("source", help="pairs: table + images, tars, zips, folder; see README")
    pack.add_argument("--out", required=True, metavar="DIR", help="dataset folder")
    pack.add_argument("--split", default="train", help="name of the split (default: train)")


def _pack(args, rest) -> None:
    from align_jax.curate import pack
    from align_jax.data import sources

    report = pack.pack(sources.open_source(args.source), args.out, split=args.split)
    print(json.dumps(report, indent=2, sort_keys=True))


def _add_vocab(add_verb):
    vocab = add_verb("vocab", _vocab, "train a WordPiece vocabulary on captions")
    vocab.epilog = "example: align vocab data/flickr8k --out tokenizers/flickr8k --size 8000"
    vocab.add_argument("source", help="pairs, see `align pack`")
    vocab.add_argument("--out", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    vocab.add_argument(
        "--size", type=int, default=100_000, help="wordpieces (default: 100000, as in the paper)"
    )


def _vocab(args, rest) -> None:
    from align_jax import workdir
    from align_jax.data import sources, tokenizer

    source = sources.open_source(args.source)
    trained = tokenizer.train_wordpiece(workdir.captions(source), vocab_size=args.size)
    trained.save(args.out)
    print(f"wrote {trained.vocab_size} wordpieces to {args.out} ({trained.fingerprint()})")
