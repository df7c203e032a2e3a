"""Which column of a metadata table is what; the names are in data/sources/column_names.py.

Reading the files is in ingest.py.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from align_jax.data.sources.column_names import COLUMN_NAMES, find_column
from align_jax.data.sources.table_files import Table

# Canonical name -> type.
COLUMNS = {
    "key": "string",
    "url": "string",
    "text": "string",
    "width": "integer",
    "height": "integer",
    "file_bytes": "integer",
    "image_hash": "string",
    "nsfw": "number",
    "nsfw_tag": "string",
    "watermark": "number",
    "aesthetic": "number",
    "similarity": "number",
    "similarity_l14": "number",
    "language": "string",
}
# Made from the text and the place of a row.
RESERVED = ("row", "words", "num_words", "num_parts", "num_chars", "problem", "image", "reason")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
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


def find_columns(table: Table, chosen: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns {canonical name: names in the file}.

    Several names where the largest counts, and of the text, where those after the first stand in
    for it in rows that have none there (table_files.caption_cells).

    Args:
      table: of which only names, types and a sample are used.
      chosen: {ours: theirs} of `--columns`, used before the known names.

    Raises:
      ValueError: the file has no text column, or lacks a chosen one.
    """
    found = {}
    for ours, kind in COLUMNS.items():
        names = table.text_names if ours == "text" else table.plain_names
        if ours in chosen:
            if chosen[ours] not in names:
                raise ValueError(
                    f"{table.path} has no column {chosen[ours]!r} (--columns "
                    f"{ours}={chosen[ours]}): it has {table.describe()}."
                )
            found[ours] = [chosen[ours]]
            continue
        if ours == "text":
            found |= {ours: table.caption_names()} if table.caption_names() else {}
            continue
        if ours in ("nsfw", "nsfw_tag"):  # LAION writes UNLIKELY, UNSURE, NSFW where others score
            names = [
                name
                for name in names
                if name.lower() != "nsfw" or _is_text(table.sample[name]) == (kind == "string")
            ]
        name = find_column(names, COLUMN_NAMES[ours])
        both = [find_column(names, (known,)) for known in LARGEST_OF.get(ours, ())]
        if name is not None:
            found[ours] = [name for name in both if name is not None] or [name]
    if "text" not in found:
        raise ValueError(
            f"{table.path} has no text column: it has {table.describe()}; name it by "
            "--columns text=NAME."
        )
    return found


def other_columns(table: Table, found: Mapping[str, list[str]]) -> dict[str, str]:
    """Returns {name: type} of the columns of plain values that no canonical name has taken.

    Left out are names that a canonical table has itself, and those that not every engine takes.
    """
    texts = [name for name in found["text"] if name in table.names]
    used = {name for names in found.values() for name in names} - set(texts[1:])
    seen = {name.lower() for name in (*COLUMNS, *RESERVED)}
    others = {}
    for name in table.plain_names:
        if name not in used and name.lower() not in seen and _NAME.fullmatch(name):
            seen.add(name.lower())
            others[name] = table.kind(name)
    return others


def _is_text(value: object) -> bool:
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
