"""What the tests of curation share: tables in, reasons of the dropped rows out."""

import pyarrow as pa
import pyarrow.parquet as pq

from align_jax.curate.filter import curate


def write_preset(path, *calls):
    """Writes a preset of rule calls such as `short_side(at_least_px=200)`; returns its path."""
    lines = [f"    rules.{call[:-1]}, source='a test')," for call in calls]
    lines = [line.replace("(,", "(").replace("(, ", "(") for line in lines]
    text = "\n".join(["from align_jax.curate.filter import rules", "RULES = [", *lines, "]", ""])
    path.write_text(text)
    return str(path)


def curate_table(folder, table, *calls, **options):
    """Returns the report of curating {column: values} by rule calls, and the folder of results."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "table.parquet")
    preset = write_preset(folder / "preset.py", *calls)
    out = folder / "out"
    return curate.curate(str(folder / "table.parquet"), out, preset=preset, **options), out


def reasons(folder, table, *calls, **options):
    """Returns {row number: reason} of the rows that rule calls drop from {column: values}."""
    table = {"key": [str(row) for row in range(len(table["text"]))], **table}
    _, out = curate_table(folder, table, *calls, **options)
    kept = pq.read_table(out / "kept.parquet")["key"].to_pylist()
    dropped = pq.read_table(out / "dropped.parquet")
    dropped = dict(zip(dropped["key"].to_pylist(), dropped["reason"].to_pylist(), strict=True))
    assert sorted([*kept, *dropped]) == sorted(table["key"])
    assert kept == [key for key in table["key"] if key in set(kept)]  # order of the input
    return {int(key): reason for key, reason in dropped.items()}


def read(path):
    """Returns the rows of a Parquet file."""
    return pq.read_table(path).to_pylist()
