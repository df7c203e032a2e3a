"""Which column of a metadata table is what: names of known datasets -> one set of names.

Known are COYO-700M, LAION (400M, 2B, -joined, aesthetic), DataComp, img2dataset, CC3M, CC12M, the
tables of `align pack`, and our own scans. Reading the files is in ingest.py.
"""

import difflib
from collections.abc import Iterable, Mapping

from align_jax.data.sources import tables

# Canonical name -> (type, names it has in known datasets; the first one present is used).
COLUMNS = {
    "key": ("string", ("key", "uid", "sample_id", "id", *tables.IMAGE_COLUMNS)),
    "url": ("string", ("url", "image_url")),
    "text": ("string", tables.CAPTION_COLUMNS),
    "width": ("integer", ("original_width", "width")),
    "height": ("integer", ("original_height", "height")),
    "file_bytes": ("integer", ("file_bytes", "file_size")),
    "image_hash": ("string", ("image_hash", "image_phash", "phash", "imagehash", "sha256", "md5")),
    "nsfw": ("number", ("nsfw_score_opennsfw2", "nsfw_score_gantman", "punsafe", "nsfw")),
    "nsfw_tag": ("string", ("nsfw_tag", "nsfw")),
    "watermark": ("number", ("watermark_score", "pwatermark", "watermark")),
    "aesthetic": ("number", ("aesthetic_score_laion_v2", "aesthetic_score", "aesthetic")),
    "similarity": (
        "number",
        ("clip_similarity_vitb32", "clip_b32_similarity_score", "similarity"),
    ),
    "similarity_l14": (
        "number",
        ("clip_similarity_vitl14", "clip_l14_similarity_score", "similarity_l14"),
    ),
    "language": ("string", ("language", "lang")),
}
# COYO drops an image when either of its scores is too high, so the larger one stands for both.
LARGEST_OF = {"nsfw": ("nsfw_score_opennsfw2", "nsfw_score_gantman")}


def parse_columns(text: str) -> dict[str, str]:
    """Returns {ours: theirs} of `ours=theirs,...`.

    Raises:
      ValueError: not of that form, or a name of ours that does not exist.
    """
    chosen = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise ValueError(f"--columns: {pair!r} is not of the form ours=theirs.")
        if ours not in COLUMNS:
            close = difflib.get_close_matches(ours, COLUMNS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"--columns: unknown column {ours!r}.{hint} Known: {_names(COLUMNS)}.")
        chosen[ours] = theirs
    return chosen


def find_columns(
    file: str, sample: Mapping[str, object], chosen: Mapping[str, str]
) -> dict[str, list[str]]:
    """Returns {canonical name: names in the file}; several names only where the largest counts.

    Args:
      file: for the message.
      sample: name in the file -> a value, or whether it holds text (bool) if the file has types.
      chosen: {ours: theirs} of `--columns`, used before the known names.

    Raises:
      ValueError: the file has no text column, or lacks a chosen one.
    """
    by_lower = {name.strip().lower(): name for name in reversed(list(sample))}
    found = {}
    for ours, (kind, known) in COLUMNS.items():
        if ours in chosen:
            if chosen[ours] not in sample:
                raise ValueError(
                    f"{file} has no column {chosen[ours]!r} (--columns {ours}={chosen[ours]}): "
                    f"it has {_names(sample)}."
                )
            found[ours] = [chosen[ours]]
            continue
        names = [by_lower[name] for name in known if name in by_lower]
        if ours in ("nsfw", "nsfw_tag"):  # LAION writes UNLIKELY, UNSURE, NSFW where others score
            names = [
                name
                for name in names
                if name.lower() != "nsfw" or _is_text(sample[name]) == (kind == "string")
            ]
        both = [by_lower[name] for name in LARGEST_OF.get(ours, ()) if name in by_lower]
        if names:
            found[ours] = both or names[:1]
    if "text" not in found:
        raise ValueError(
            f"{file} has no text column: it has {_names(sample)}; name it by --columns text=NAME."
        )
    return found


def _is_text(value):
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return True
    return False


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
