"""Patterns of paths: a path that exists is none; what curation dropped is not read by accident."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align_jax.cli import main as cli
from align_jax.storage.paths import find_paths


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_existing_parts_of_a_pattern_are_names(tmp_path):
    touch(tmp_path, "set [v2]/a.tar", "set [v2]/b.tar", "set v/c.tar")
    assert find_paths(f"{tmp_path}/set [v2]/*.tar") == [
        f"{tmp_path}/set [v2]/a.tar",
        f"{tmp_path}/set [v2]/b.tar",
    ]
    assert find_paths(f"{tmp_path}/set [v2]") == [f"{tmp_path}/set [v2]"]
    assert find_paths(f"{tmp_path}/none/*.tar") == []


@pytest.mark.parametrize(
    "names, pattern, advice",
    [
        (("kept.parquet", "dropped.parquet"), "*.parquet", "kept.parquet"),
        (("a/kept.parquet", "a/dropped.parquet"), "**/*.parquet", "a/kept.parquet"),
        (("kept/part-0.parquet", "dropped/part-0.parquet"), "*/*.parquet", "kept/*.parquet"),
        (("kept/part-0.parquet", "dropped/part-0.parquet"), "*", "kept/*.parquet"),
    ],
)
def test_pattern_that_finds_kept_and_dropped_rows_is_refused(tmp_path, names, pattern, advice):
    touch(tmp_path, *names)
    message = f"{tmp_path}/{pattern} holds what `align curate` kept and what it dropped; name "
    with pytest.raises(ValueError, match=re.escape(f"{message}{tmp_path}/{advice}.")):
        find_paths(f"{tmp_path}/{pattern}")


def test_dropped_rows_alone_and_other_folders_of_that_name_can_be_read(tmp_path):
    touch(tmp_path, "kept.parquet", "dropped.parquet", "one/kept/a.tar", "two/dropped/a.tar")
    assert find_paths(f"{tmp_path}/d*.parquet") == [f"{tmp_path}/dropped.parquet"]
    assert len(find_paths(f"{tmp_path}/*/*/a.tar")) == 2


def test_vocabulary_is_not_learned_from_dropped_captions(tmp_path, capsys):
    for name in ("kept", "dropped"):
        pq.write_table(pa.table({"caption": [f"{name} words"]}), tmp_path / f"{name}.parquet")
    assert cli.main(["vocab", f"{tmp_path}/*.parquet", "--out", f"{tmp_path}/tokenizer"]) == 2
    assert f"name {tmp_path}/kept.parquet." in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()
