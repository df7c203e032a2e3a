"""`align vocab`: words counted part by part by any number of workers, then a WordPiece vocabulary.

A part is a table of captions, or 65,536 records of pairs; counts are exact sums, so the vocabulary
is the same for any number of workers, as it is for any order of the captions.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator

from align_jax import __version__
from align_jax.curate import parts as parts_lib
from align_jax.curate import workers
from align_jax.data import tokenizer, vocabulary
from align_jax.data.sources import captions
from align_jax.data.sources import open_source as sources
from align_jax.run import workdir
from align_jax.run.progress import show_progress
from align_jax.storage import identity, writing
from align_jax.storage.problems import Problems, from_json, report
from align_jax.storage.text import read_json

_RECORDS = 2**16  # of a part
_BYTES_A_WORKER = 2**24  # fewer are counted before another process has started
_REPORT = "report.json"
_FILES = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", _REPORT}


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table of captions, as a unit of work; `expected` is its bytes."""

    number: int
    path: str
    expected: int


@dataclasses.dataclass(frozen=True)
class _Settings:
    folder: str
    column: str | None
    strip_accents: bool | None


def train_vocabulary(
    source: str,
    out_dir: str | os.PathLike,
    size: int,
    *,
    column: str | None = None,
    strip_accents: bool | None = None,
    num_workers: int = 1,
    beam: str | None = None,
) -> tokenizer.Tokenizer:
    """Writes a tokenizer of the captions that `source` names, with report.json; returns it.

    A run that was killed goes on after its last part.

    Args:
      source: table of captions (may be a glob), or pairs.
      out_dir: Hugging Face tokenizer folder.
      size: wordpieces, see tokenizer.train_wordpiece.
      column: of tables; None takes the one that is recognised.
      strip_accents: see tokenizer.train_wordpiece.
      num_workers: processes; 1 counts in this one.
      beam: options of an Apache Beam pipeline that counts instead, see workers.py.

    Raises:
      ValueError: bad input, or no caption holds a word.
    """
    if size < tokenizer.MIN_VOCAB_SIZE:
        raise ValueError(f"--size {size} is too small; use at least {tokenizer.MIN_VOCAB_SIZE}.")
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers} must be at least 1.")
    folder = parts_lib.folder_of(out_dir)
    _check_out(out_dir, begun=os.path.isdir(folder))
    problems = Problems()
    if captions.is_table(source):
        paths = captions.find_tables(source)
        paths = [os.path.abspath(path) for path in paths] if beam is not None else paths
        units = [_Table(n, path, os.path.getsize(path)) for n, path in enumerate(paths)]
        stamp, unit_name = identity.of_files(paths), "byte"
        most = sum(unit.expected for unit in units) // _BYTES_A_WORKER
    elif column:
        raise ValueError(f"--column is for tables of captions; {source} is none.")
    else:
        opened = sources.open_source(source)
        has_parts = hasattr(opened, "parts")
        problems.merge(opened.folder_problems if has_parts else opened.problems)
        units = workers.plan(opened, _RECORDS)
        stamp, unit_name = identity.stamp(opened), "caption"
        most = sum(unit.expected for unit in units) // _RECORDS
    content = {"stamp": stamp, "column": column, "strip_accents": strip_accents}
    with (
        # First the folder of the result: no hours of work for one that cannot be made.
        writing.locked(out_dir, "align vocab"),
        writing.locked(folder, "align vocab", shown=out_dir),
        parts_lib.checked(folder, content | {"align_jax": __version__}, "count of words"),
    ):
        left = [unit for unit in units if not os.path.exists(_words_path(folder, unit.number))]
        done = workers.run(
            _count,
            left,
            _Settings(folder, column, strip_accents),
            num_workers=max(1, min(num_workers, most)),
            beam=beam,
        )
        total = sum(unit.expected for unit in left)
        for _ in show_progress(done, total, "count words", unit_name, size=int):
            pass
        for unit in units:
            problems.merge(from_json(read_json(_problems_path(folder, unit.number))))
        counts = vocabulary.merge_counts([_words_path(folder, unit.number) for unit in units])
        trained = tokenizer.learn_wordpiece(
            counts, size, strip_accents=strip_accents, progress=show_progress
        )
        trained.save(out_dir)
        content = {"source": source, "problems": report(problems, source)}
        writing.write_json(os.path.join(out_dir, _REPORT), content, ensure_ascii=False)
        shutil.rmtree(folder)
    return trained


def _check_out(out_dir: str | os.PathLike, begun: bool) -> None:
    """Refuses a folder of anything but a vocabulary that was made, or is being made, here."""
    writing.check_alone(out_dir, {*_FILES, writing.LOCK_FILE})
    made = os.path.exists(os.path.join(out_dir, _REPORT))
    if not (made or begun):
        writing.check_alone(out_dir, {writing.LOCK_FILE})


def _count(unit: _Table | workers.Unit, settings: _Settings) -> Iterator[int]:
    """Writes the counts of a part; yields how much of it has been read."""
    problems, done = Problems(), []
    split = tokenizer.word_splitter(strip_accents=settings.strip_accents)
    read = _read_table if isinstance(unit, _Table) else _read_records
    # The counting takes what it is given; how far it is, is known in between.
    texts = read(unit, settings, problems, done)
    vocabulary.write_counts(texts, split, _words_path(settings.folder, unit.number))
    yield sum(done)


def _read_table(
    table: _Table, settings: _Settings, problems: Problems, done: list[int]
) -> Iterator[str]:
    for batch, num_bytes in captions.read_captions(table.path, problems, settings.column):
        yield from batch
        done.append(num_bytes)
    _write_problems(settings.folder, table.number, problems)


def _read_records(
    unit: workers.Unit, settings: _Settings, problems: Problems, done: list[int]
) -> Iterator[str]:
    source, records = unit.open()
    if unit.stop is None:
        problems.merge(source.problems)
    yield from workdir.captions(source, problems, records)
    done.append(len(records))
    _write_problems(settings.folder, unit.number, problems)


def _write_problems(folder: str, number: int, problems: Problems) -> None:
    """Before the counts are there, by which a part is known to be complete."""
    writing.write_json(_problems_path(folder, number), problems.to_json(), ensure_ascii=False)


def _words_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:06d}.words")


def _problems_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:06d}.json")
