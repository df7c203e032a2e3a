"""The last pass of curation: kept and dropped tables, counts, histograms and samples.

Reads the canonical parts once, in order, knowing the reason of every row. What rules mean and how
reasons are found is in curate.py and rules.py.
"""

import collections
import heapq
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_jax.curate.filter import unigrams
from align_jax.storage import writing
from align_jax.storage.paths import DROPPED_FILE, DROPPED_FOLDER, KEPT_FILE, KEPT_FOLDER

if TYPE_CHECKING:
    from align_jax.curate.filter.plan import Part, Plan

JSON_FILE, PAGE_FILE = "report.json", "report.md"
_KEPT = 255
_GROUP_ROWS = 1 << 17
_SAMPLES = 3
_SAMPLE_CHARS = 160
_TOKEN_ROWS = 100_000  # top tokens are counted on every k-th row, so many in all
_TOP_TOKENS = 20
_EDGES = {
    "unigrams": [0, 1, 2, 3, 5, 8, 12, 16, 21, 32, 64, 128, 256],
    "characters": [0, 1, 6, 20, 40, 60, 80, 120, 160, 240, 500, 1000],
    "short_side_px": [0, 1, 64, 128, 200, 256, 384, 512, 768, 1024, 2048],
    "aspect_ratio": [1, 1.1, 1.25, 1.34, 1.5, 1.78, 2, 2.5, 3, 4, 8],
}


def read_parts(parts: Sequence[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of canonical parts in order."""
    for path in parts:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_GROUP_ROWS, columns=list(columns))


def part_names(number: int) -> tuple[str, str]:
    """Returns the names of the kept and the dropped table of a part, in folders of their own."""
    name = f"part-{number:05d}.parquet"
    return os.path.join(KEPT_FOLDER, name), os.path.join(DROPPED_FOLDER, name)


def write_tables(
    parts: Sequence["Part"],
    reasons: np.ndarray,
    first: int,
    plan: "Plan",
    seen: "Seen",
    out_dir: str,
    names: tuple[str, str] = (KEPT_FILE, DROPPED_FILE),
) -> Iterator[int]:
    """Writes the rows of parts into the kept and the dropped table; yields the rows of each batch.

    Args:
      parts: in order.
      reasons: uint8 [rows of these parts], index into `plan.reasons` or 255 for rows that stay.
      first: number of rows in the parts before.
      plan: of the curation.
      seen: receives what is seen.
      out_dir: folder; files appear complete.
      names: of the two tables in it.
    """
    paths = [part.path for part in parts]
    tables = _Tables([os.path.join(out_dir, name) for name in names], paths[0], plan)
    shown = [*plan.columns, "words", "num_words", "num_chars"]
    start = 0
    for batch in read_parts(paths, [*shown, *plan.others]):
        codes = reasons[start : start + len(batch)]
        tables.write(batch, codes)
        seen.add(batch, first + start + np.arange(len(batch)), codes)
        start += len(batch)
        yield len(batch)
    tables.close()


def write_report(reasons: np.ndarray, plan: "Plan", seen: "Seen", head: dict, out_dir: str) -> dict:
    """Writes the report, the JSON last; returns what that holds.

    Args:
      reasons: uint8 [rows], index into `plan.reasons` or 255 for rows that stay.
      plan: of the curation.
      seen: of all rows.
      head: first entries of the report.
      out_dir: existing folder; files appear complete.
    """
    made = {**head, **_counts(reasons, plan, seen), **seen.summary()}
    writing.write_text(os.path.join(out_dir, PAGE_FILE), _page(made))
    writing.write_json(os.path.join(out_dir, JSON_FILE), made, indent=1, ensure_ascii=False)
    return made


class _Tables:
    """Writes rows into the kept and the dropped table, in row groups of one size."""

    def __init__(self, paths: Sequence[str], first_part: str, plan: "Plan"):
        schema = pq.read_schema(first_part)
        self._columns = [*plan.columns, *plan.others]
        schema = pa.schema([schema.field(name) for name in self._columns])
        self._names = pa.array(plan.reasons)
        self._files = {}
        schemas = schema, schema.append(pa.field("reason", pa.string()))
        for name, path, kind in zip((KEPT_FILE, DROPPED_FILE), paths, schemas, strict=True):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = writing.temporary_path(path)
            writer = pq.ParquetWriter(temporary, kind, compression="zstd")
            self._files[name] = (path, temporary, writer, [])

    def write(self, batch: pa.RecordBatch, codes: np.ndarray) -> None:
        """Adds rows with their codes, uint8 [rows]."""
        rows = pa.table(batch).select(self._columns)
        stays = codes == _KEPT
        self._add(KEPT_FILE, rows.filter(pa.array(stays)))
        goes = rows.filter(pa.array(~stays))
        self._add(DROPPED_FILE, goes.append_column("reason", self._names.take(codes[~stays])))

    def _add(self, name: str, rows: pa.Table) -> None:
        *_, writer, waiting = self._files[name]
        waiting.append(rows)
        if sum(len(rows) for rows in waiting) >= _GROUP_ROWS:
            table = pa.concat_tables(waiting)
            writer.write_table(table.slice(0, _GROUP_ROWS), row_group_size=_GROUP_ROWS)
            waiting[:] = [table.slice(_GROUP_ROWS)]

    def close(self) -> None:
        for path, temporary, writer, waiting in self._files.values():
            if waiting and len(pa.concat_tables(waiting)):
                writer.write_table(pa.concat_tables(waiting), row_group_size=_GROUP_ROWS)
            writer.close()
            writing.move(temporary, path)


class Seen:
    """Histograms, samples and frequent tokens of the rows read and of those that stay."""

    def __init__(self, plan: "Plan", num_rows: int):
        self._plan = plan
        self._every = max(1, num_rows // _TOKEN_ROWS)
        self._histograms = {
            name: {which: np.zeros(len(edges), np.int64) for which in ("read", "kept")}
            for name, edges in _EDGES.items()
            if name in ("unigrams", "characters") or {"width", "height"} <= set(plan.columns)
        }
        self._tokens = {"read": collections.Counter(), "kept": collections.Counter()}
        self._unspaced = 0
        self._dropped = {reason: [] for reason in plan.reasons}
        self._kept = {rule.name: [] for rule in plan.applied()}

    def add(self, batch: pa.RecordBatch, places: np.ndarray, codes: np.ndarray) -> None:
        """Counts rows with their places among all, int64 [rows], and codes, uint8 [rows]."""
        values = {
            "unigrams": batch["num_words"].to_numpy(),
            "characters": batch["num_chars"].to_numpy(),
        }
        if "short_side_px" in self._histograms:
            width, height = (
                pc.fill_null(batch[name], 0).to_numpy(zero_copy_only=False)
                for name in ("width", "height")
            )
            short, long = np.minimum(width, height), np.maximum(width, height)
            values["short_side_px"] = short
            values["aspect_ratio"] = np.where(short > 0, long / np.maximum(short, 1), 0)
        for name, histogram in self._histograms.items():
            place = np.searchsorted(_EDGES[name], values[name], side="right") - 1
            for which, mask in (("read", place >= 0), ("kept", (place >= 0) & (codes == _KEPT))):
                histogram[which] += np.bincount(place[mask], minlength=len(histogram[which]))
        self._unspaced += pc.sum(unigrams.are_unspaced(batch["text"])).as_py() or 0
        self._count_tokens(batch, places, codes)
        self._sample(batch, places, codes)

    def _count_tokens(self, batch: pa.RecordBatch, places: np.ndarray, codes: np.ndarray) -> None:
        rows = np.flatnonzero(places % self._every == 0)
        for words, code in zip(batch["words"].take(rows).to_pylist(), codes[rows], strict=True):
            words = words.split(" ") if words else []
            self._tokens["read"].update(words)
            if code == _KEPT:
                self._tokens["kept"].update(words)

    def _sample(self, batch: pa.RecordBatch, places: np.ndarray, codes: np.ndarray) -> None:
        order = _scramble(places)
        for code, reason in enumerate(self._plan.reasons):
            self._take(self._dropped[reason], batch, order, codes == code)
        for rule in self._plan.applied():
            last = self._plan.first_code[rule.name] + len(rule.reasons) - 1
            self._take(self._kept[rule.name], batch, order, codes > last)

    def _take(
        self,
        best: list[tuple[int, dict]],
        batch: pa.RecordBatch,
        order: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """Puts rows of `mask`, bool [rows], among the `best`, by `order`, uint64 [rows]."""
        rows = np.flatnonzero(mask)
        if len(best) == _SAMPLES:
            rows = rows[order[rows] < best[-1][0]]
        if len(rows) > _SAMPLES:
            rows = rows[np.argpartition(order[rows], _SAMPLES)[:_SAMPLES]]
        for row in rows:
            best.append((int(order[row]), self._row(batch.slice(row, 1))))
        best[:] = sorted(best, key=lambda item: item[0])[:_SAMPLES]

    def _row(self, batch: pa.RecordBatch) -> dict[str, object]:
        row = batch.select(self._plan.columns).to_pylist()[0]
        row = {name: value for name, value in row.items() if value is not None}
        for name, value in row.items():
            if isinstance(value, str) and len(value) > _SAMPLE_CHARS:
                row[name] = value[:_SAMPLE_CHARS] + "…"
        return row

    def samples(
        self, name: str, reasons: Sequence[str]
    ) -> tuple[list[dict], dict[str, list[dict]]]:
        """Returns rows that passed a rule, rows that it dropped."""
        dropped = {reason: [row for _, row in self._dropped[reason]] for reason in reasons}
        return [row for _, row in self._kept.get(name, [])], dropped

    def to_json(self) -> dict:
        """Returns what `merge` takes."""
        return {
            "histograms": {
                name: {which: counts.tolist() for which, counts in of.items()}
                for name, of in self._histograms.items()
            },
            "tokens": self._tokens,
            "unspaced": self._unspaced,
            "dropped": self._dropped,
            "kept": self._kept,
        }

    def merge(self, other: dict) -> None:
        """Adds what `to_json` of a later part of the rows gave."""
        for name, of in other["histograms"].items():
            for which, counts in of.items():
                self._histograms[name][which] += np.array(counts)
        for which, counts in other["tokens"].items():
            self._tokens[which].update(counts)
        self._unspaced += other["unspaced"]
        for mine, theirs in ((self._dropped, other["dropped"]), (self._kept, other["kept"])):
            for name, rows in theirs.items():
                found = [*mine[name], *((order, row) for order, row in rows)]
                mine[name][:] = sorted(found, key=lambda item: item[0])[:_SAMPLES]

    def summary(self) -> dict:
        tokens = {
            which: [
                list(item)
                for item in heapq.nsmallest(_TOP_TOKENS, c.items(), lambda i: (-i[1], i[0]))
            ]
            for which, c in self._tokens.items()
        }
        return {
            "texts_unspaced": self._unspaced,
            "histograms": {
                name: {"from": _EDGES[name], **{w: c.tolist() for w, c in counts.items()}}
                for name, counts in self._histograms.items()
            },
            "top_tokens": {
                "of_every_nth_row": self._every,
                **tokens,
            },
        }


def _scramble(rows: np.ndarray) -> np.ndarray:
    """Returns a fixed pseudo-random order of rows, uint64 [rows] (the finaliser of splitmix64)."""
    x = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _counts(reasons: np.ndarray, plan: "Plan", seen: Seen) -> dict:
    """What went by which rule; `reasons` as in `write_results`."""
    counts = np.bincount(reasons, minlength=256)
    by_reason = {name: int(counts[code]) for code, name in enumerate(plan.reasons)}
    problems = list(plan.reasons[: min(plan.first_code.values(), default=len(plan.reasons))])
    left = len(reasons) - sum(by_reason[name] for name in problems)
    entries = []
    for rule in plan.rules:
        entry = {"name": rule.name, "keeps": rule.keeps, "source": rule.source}
        if rule.name in plan.missing:
            entries.append({**entry, "not_applied": plan.missing[rule.name]})
            continue
        kept, dropped = seen.samples(rule.name, rule.reasons)
        out = left - sum(by_reason[reason] for reason in rule.reasons)
        entry |= {"in": left, "out": out}
        entry["dropped"] = {reason: by_reason[reason] for reason in rule.reasons}
        entries.append({**entry, "samples_kept": kept, "samples_dropped": dropped})
        left = out
    _, broken = seen.samples("", problems)
    return {
        "rows_read": len(reasons),
        "rows_kept": int(counts[_KEPT]),
        "unusable": {name: by_reason[name] for name in problems},
        "samples_unusable": {name: rows for name, rows in broken.items() if rows},
        "rules": entries,
    }


def unspaced(made: dict) -> str:
    """Returns how the words of texts in scripts without spaces were counted, in one line."""
    if made["segmenter"]:
        return f"texts in scripts without spaces, words by {made['segmenter']}"
    return (
        "texts in scripts without spaces (Chinese, Japanese, Thai, ...) count as few words, since "
        "none are found but between white space: pip install icu4py, then take a new --out"
    )


def _page(made: dict) -> str:
    lines = [
        f"# Curation by `{made['preset']}`",
        "",
        f"{made['rows_read']} pairs read from {', '.join(made['input'][:3])}"
        f"{' …' if len(made['input']) > 3 else ''}, {made['rows_kept']} kept "
        f"({_percent(made['rows_kept'], made['rows_read'])}).",
        "",
        *([f"{made['texts_unspaced']} {unspaced(made)}.", ""] if made["texts_unspaced"] else []),
        "| rule | keeps | in | out | dropped | source |",
        "|---|---|---:|---:|---:|---|",
    ]
    for reason, count in made["unusable"].items():
        lines.append(f"| {reason} | | | | {count} | unusable rows |")
    if made["text_repaired"]:
        kept = "what was no text is U+FFFD"
        lines.append(f"| text_repaired | {kept} | | | {made['text_repaired']} rows kept | |")
    for rule in made["rules"]:
        cells = [rule["name"], rule["keeps"]]
        if "not_applied" in rule:
            cells += ["", "", f"not applied: {rule['not_applied']}"]
        else:
            dropped = rule["in"] - rule["out"]
            parts = rule["dropped"]
            split = ", ".join(f"{name} {n}" for name, n in parts.items()) if len(parts) > 1 else ""
            percent = _percent(dropped, rule["in"])
            cells += [rule["in"], rule["out"], f"{dropped} ({percent}) {split}".strip()]
        lines.append("| " + " | ".join(_cell(value) for value in (*cells, rule["source"])) + " |")
    if made["not_covered"]:
        lines += ["", "Not done here, though the source does it: "]
        lines += [f"- {text}" for text in made["not_covered"]]
    for name, histogram in made["histograms"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| from | read | kept | share of read |",
            "|---:|---:|---:|---|",
        ]
        total = max(1, sum(histogram["read"]))
        for start, read, kept in zip(
            histogram["from"], histogram["read"], histogram["kept"], strict=True
        ):
            lines.append(f"| {start:g} | {read} | {kept} | {'█' * round(40 * read / total)} |")
    lines += ["", "## Most frequent unigrams", ""]
    lines.append(
        f"Counted on every row number divisible by {made['top_tokens']['of_every_nth_row']}."
    )
    for which in ("read", "kept"):
        words = ", ".join(f"{_cell(w)} {n}" for w, n in made["top_tokens"][which])
        lines += ["", f"{which}: {words}"]
    lines += ["", "## Samples"]
    for name, rows in made["samples_unusable"].items():
        lines += ["", f"### {name}", "", *_samples("dropped", rows)]
    for rule in made["rules"]:
        if "not_applied" not in rule:
            lines += ["", f"### {rule['name']}: {_cell(rule['keeps'])}", ""]
            lines += _samples("passed", rule["samples_kept"])
            for reason, rows in rule["samples_dropped"].items():
                lines += _samples(f"dropped ({reason})", rows)
    return "\n".join(lines) + "\n"


def _samples(verdict: str, rows: list[dict]) -> list[str]:
    return [
        f"- {verdict}: {_cell(row.get('text', ''))} — "
        + _cell(", ".join(f"{n} {v}" for n, v in row.items() if n not in ("text", "url")))
        for row in rows
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def _cell(value: object) -> str:
    """Returns text that cannot be taken for Markdown or HTML, in one line."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return text
