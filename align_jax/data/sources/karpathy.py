"""Karpathy's JSON of Flickr8k, Flickr30k and COCO: splits, captions and their ids."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from align_jax.data.sources import files
from align_jax.data.sources.image_finder import printable
from align_jax.data.sources.tables import Row
from align_jax.storage.problems import Problems
from align_jax.storage.text import BadText, check_caption, read_json


class KarpathyImage(NamedTuple):
    """An image: its name with its folder, captions, the ids of these, and its own (-1: none)."""

    name: str
    captions: tuple[str, ...]
    sentids: tuple[int, ...]
    cocoid: int = -1


def open_karpathy(
    spec: str, path: str, images: str, split: str, limit: int | None = None
) -> tuple[files.FilePairs, list[KarpathyImage]]:
    """Returns the pairs of some splits, and the images that they are, in the same order.

    Problems counted: those of files.open_table, `row_malformed` (an entry without filename or
    captions) and `key_duplicate` (an image that is there twice).

    Args:
      spec: names the source in messages.
      path: of the JSON.
      images: folders, zips and tars, see files.open_table.
      split: one or several with commas: train, restval, val, test.
      limit: images to use, or None for all.

    Raises:
      ValueError: not such a file, a split that it does not have, or a path that does not exist.
    """
    try:
        content = read_json(path)
        entries = content["images"]
        found = {entry["split"] for entry in entries}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it is Karpathy's JSON.") from None
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} is not Karpathy's JSON: it needs 'images', each with 'filename', 'split' and "
            "'sentences'."
        ) from None
    wanted = split.split(",")
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"{spec}: {path} has no split {name!r}; it has {', '.join(sorted(found))}."
            )
    problems = Problems()
    chosen = list(_images(path, entries, set(wanted), problems))
    source = files.open_rows(
        spec, [Row(image.name, "", image.captions) for image in chosen], images, limit, problems
    )
    by_key = {printable(image.name): image for image in chosen}
    return source, [by_key[source.key(index)] for index in range(len(source))]


def _images(
    path: str, entries: list[Any], splits: set[str], problems: Problems
) -> Iterable[KarpathyImage]:
    seen = set()
    for number, entry in enumerate(entries):
        if entry["split"] not in splits:
            continue
        try:
            name = "/".join(filter(None, (entry.get("filepath"), entry["filename"])))
            sentences = [
                (check_caption(sentence["raw"], name), int(sentence.get("sentid", -1)))
                for sentence in entry["sentences"]
            ]
            cocoid = int(entry.get("cocoid", -1))
        except (KeyError, TypeError, ValueError, AttributeError, BadText):
            problems.add("row_malformed", f"{path}: images[{number}]")
            continue
        captions, sentids = zip(*sentences, strict=True) if sentences else ((), ())
        if name in seen:
            problems.add("key_duplicate", f"{path}: images[{number}]")
            continue
        seen.add(name)
        yield KarpathyImage(name, captions, sentids, cocoid)
