"""Removing near-duplicates: of evaluation images from training data, or inside one set.

Writes what matched, what to drop, a report and a sheet of pictures. Images are read by
image_sets.py and compared by hashes.py (perceptual hashes) or search.py (embeddings); matches.py
writes what they find.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from align_jax import __version__
from align_jax.curate import near_duplicates as package
from align_jax.curate.filter import engines
from align_jax.curate.near_duplicates import hashes, image_sets, match_sheet, search
from align_jax.curate.near_duplicates.matches import SHEET_PAIRS, Output
from align_jax.curate.scan import import_parquet
from align_jax.data.perceptual_hash import check_distance
from align_jax.storage import identity, writing
from align_jax.storage.text import read_json

MAX_DISTANCE, MAX_DISTANCE_INSIDE = 8, 4
REPORT_FILE = "report.json"
_SUSPICIOUS = 0.1  # of the images, matched by embeddings


def decontaminate(
    train: str,
    against: Sequence[str],
    out_dir: str | os.PathLike,
    *,
    max_distance: int | None = None,
    min_cosine: float | None = None,
    copies: bool = True,
    sheet: bool = False,
    engine: str = "duckdb",
    memory_gib: float = 2.0,
) -> dict:
    """Returns the report of finding the images of `train` that are also in other sets.

    Without other sets, finds groups of near-duplicates inside `train` (images joined by a chain of
    pairs) and keeps the first of each.

    `out_dir` gets `matches.parquet` (`key`, `match_set`, `match_key`, `method`, `copy`, `distance`
    in bits or `cosine`; inside one set the match is the image that is kept), `drop.parquet` (`key`
    of the images to leave out, for `align pack --drop`, and `reason`), `sheet.png` on demand, and
    at last `report.json`. Scans made here stay there too. A killed call goes on when it is given
    again, and ends with the bytes of an undisturbed one; a finished one returns its report again.
    Memory: of evaluation sets 200 bytes an image, of training hashes a million at a time beside the
    engine's; embeddings are mapped.

    Args:
      train: Parquet tables (a path or a glob) with `key` (or `id`, `uid`) and `phash` (or
        `image_phash`, `image_hash`), as `align scan` writes and COYO has; a source of pairs
        (sources.open_source), which is scanned first; or a folder of `align embed`.
      against: the same, of evaluation sets.
      out_dir: new, empty, or left by the same call.
      max_distance: of hashes, bits of 64. Default 8 against other sets, where re-encoded, resized
        and brightened copies are mostly found (docs/curation.md), and 4 inside one, where the
        chance matches grow with the square of the images.
      min_cosine: of embeddings; pairs above it match. Default 0.975, as in the paper.
      copies: whether evaluation images that were scanned are also compared as people crop, mirror
        and frame them (perceptual_hash.COPIES).
      sheet: whether to draw up to 24 matched pairs, of all distances.
      engine: that searches inside one set of hashes, see filter/engines.py.
      memory_gib: limit of the engine.

    Raises:
      ValueError: an unusable input, an `out_dir` of another call, hashes beside embeddings,
        embeddings of different models, an option that the sets have no use for, or a sheet of
        images that no scan has located.
    """
    import_parquet()  # a missing package is named before hours of work
    writing.check_local(out_dir, "--out")
    check_distance(max_distance or 0)
    search.check_cosine(search.MIN_COSINE if min_cosine is None else min_cosine)
    engines.check_engine(engine)
    engines.check_memory(memory_gib)
    names = [train, *against]
    if len(set(names)) < len(names):
        raise ValueError("A set is named twice; each --against must be another one.")
    embedded = [name for name in names if image_sets.is_embedded(name)]
    if 0 < len(embedded) < len(names):
        raise ValueError(
            f"{embedded[0]} holds embeddings and another set does not; name folders of `align "
            "embed` for all sets, or for none."
        )
    if embedded and sheet:
        raise ValueError("--sheet needs scans: embeddings do not say where the images are.")
    by = "embeddings" if embedded else "hashes"
    where = "against other sets" if against else "inside one set"
    useless = {
        f"--max-distance {max_distance}": embedded and max_distance is not None,
        f"--min-cosine {min_cosine}": not embedded and min_cosine is not None,
        "--as-is": not copies and (embedded or not against),
        f"--engine {engine}": engine != "duckdb" and (embedded or against),
    }
    for option in (option for option, is_useless in useless.items() if is_useless):
        raise ValueError(f"{option} is of no use to a search by {by} {where}.")
    out = Path(out_dir)
    _find_report(out, names)  # that of other names is refused before anything is scanned
    with (
        writing.locked(out, "align decontaminate", shown=out_dir),
        writing.explaining_full_disk(out_dir),
    ):
        if embedded:
            cosine = search.MIN_COSINE if min_cosine is None else min_cosine
            report = _by_embeddings(names, out, cosine)
        else:
            if max_distance is None:
                max_distance = MAX_DISTANCE if against else MAX_DISTANCE_INSIDE
            options = {"max_distance": max_distance, "copies": copies, "sheet": sheet}
            report = _by_hashes(names, out, options, engine, memory_gib)
    return report


def _by_hashes(
    names: list[str], out: Path, options: dict, engine_name: str, memory_gib: float
) -> dict:
    tables = [image_sets.find_hashes(name, n, out) for n, name in enumerate(names)]
    sheet = options["sheet"]
    pictures = [image_sets.Pictures(one, "--sheet") for one in tables] if sheet else []
    paths = [path for one in tables for path in one.paths]
    call = _call(options | {"names": names, "files": identity.of_files(paths)})
    if (finished := _find_report(out, names, call)) is not None:
        shutil.rmtree(out / "stages", ignore_errors=True)
        return finished
    with _stages(out, call) as stages:
        facts = [_facts(one.name, one.scan) for one in tables]
        output = Output(out, names, "phash", SHEET_PAIRS if sheet else 0)
        limit = options["max_distance"]
        if len(tables) > 1:
            others, groups = [], {}
            for number, one in enumerate(tables[1:], 1):
                images = one.read()
                _count(facts[number], images)
                others.append((images, _hash(one, images, number, options["copies"], stages)))
                facts[number]["hashes_per_image"] = others[-1][1].shape[1]
            output.write(
                hashes.match_others(tables[0], others, limit, lambda block: _count(facts[0], block))
            )
        else:
            hashes.write_rows(tables[0], str(stages), lambda block: _count(facts[0], block))
            with _open_engine(engine_name, str(stages / "spill"), memory_gib) as engine:
                groups, blocks = hashes.match_inside(engine, str(stages), limit)
                output.write(blocks)
        if sheet and (shown := output.spread()) is not None:
            with writing.replacing(out / "sheet.png") as temporary:
                match_sheet.draw(shown, pictures).save(temporary, "PNG")
        report = {"method": "phash", "max_distance": limit, **_report(facts, output, groups)}
        report["call"] = identity.digest([json.dumps(call)])
        writing.write_json(out / REPORT_FILE, report, ensure_ascii=False)
    return report


@contextlib.contextmanager
def _open_engine(name: str, spill: str, memory_gib: float) -> Iterator[engines.Engine]:
    shutil.rmtree(spill, ignore_errors=True)
    engine = engines.open_engine(name, spill, memory_gib)
    try:
        yield engine
    except (ValueError, RuntimeError, OSError):
        raise
    except Exception as error:  # each engine has classes of its own
        text = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"{name} failed: {text}") from error
    finally:
        engine.close()


def _hash(
    tables: image_sets.HashTables,
    images: image_sets.ImageSet,
    number: int,
    copies: bool,
    stages: Path,
) -> np.ndarray:
    """Returns the hashes of evaluation images, uint64 [M, copies]."""
    if copies and tables.scan:
        return hashes.hash_copies(tables, images, str(stages / f"copies-{number}.u64"))
    if copies:
        line = (
            f"{tables.name} does not say where its images are, so that only copies of them as they "
            "are will be found; name the pairs, or a table of `align scan`, for all."
        )
        print(line, file=sys.stderr, flush=True)
    return images.values[:, None]


def _by_embeddings(names: list[str], out: Path, min_cosine: float) -> dict:
    manifests = [image_sets.identify_embeddings(name) for name in names]
    call = _call({"min_cosine": min_cosine, "names": names, "embeddings": manifests})
    if (finished := _find_report(out, names, call)) is not None:
        shutil.rmtree(out / "stages", ignore_errors=True)
        return finished
    with _stages(out, call) as stages:
        sets = image_sets.open_embeddings(names, str(stages))
        facts = [_facts(one.name, None) for one in sets]
        for fact, one in zip(facts, sets, strict=True):
            _count(fact, one)
        output = Output(out, names, "embedding", 0)
        matches, groups = search.match(sets, min_cosine)
        output.write(iter([matches]))
        report = {"method": "embedding", "min_cosine": min_cosine}
        report |= _report(facts, output, groups)
        if report["dropped"] > _SUSPICIOUS * report["train"]["images"]:
            line = (
                f"{report['dropped']} of {report['train']['images']} images of {names[0]} match: "
                f"that many copies are unlikely. Look at {out}/matches.parquet, and choose a "
                "larger --min-cosine, or a model that has learned more."
            )
            print(line, file=sys.stderr, flush=True)
        report["call"] = identity.digest([json.dumps(call)])
        writing.write_json(out / REPORT_FILE, report, ensure_ascii=False)
    return report


def _call(content: dict) -> dict:
    """Returns what a result depends on: input, options and the code."""
    return content | {"align_jax": __version__, "code": identity.of_code(package)}


def _find_report(out: Path, names: list[str], call: dict | None = None) -> dict | None:
    """Returns the report of the same call where it was finished before.

    Raises:
      ValueError: it is that of another call; of other names, where nothing else is known yet.
    """
    path = out / REPORT_FILE
    if not path.exists():
        return None
    report = read_json(path)
    known = isinstance(report, dict) and "call" in report
    sets = (report["train"], *report.get("against", ())) if known else ()
    other = not known or (call and report["call"] != identity.digest([json.dumps(call)]))
    if other or [one["name"] for one in sets] != names:
        raise ValueError(f"{out} holds the report of another call; name a new folder.")
    return report


@contextlib.contextmanager
def _stages(out: Path, content: dict) -> Iterator[Path]:
    """Yields the folder of what is found on the way, of the same input and options only.

    It goes at the end, and where the input turns out to be unusable.
    """
    folder = (out / "stages").absolute()  # for engines elsewhere
    path = folder / "config.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        writing.write_json(path, content)
    elif json.loads(path.read_text("utf-8")) != content:
        raise ValueError(
            f"{out} holds an unfinished run of other input or options; name another --out or "
            "remove it."
        )
    try:
        yield folder
    except ValueError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _facts(name: str, scan: dict | None) -> dict:
    scanned = {"problems": scan.get("problems", {})} if scan else {}
    return {"name": name, "images": 0, "without_hash": 0} | scanned


def _count(facts: dict, images: image_sets.ImageSet) -> None:
    facts["images"] += len(images.values)
    facts["without_hash"] += images.num_without_hash


def _report(facts: list[dict], output: Output, groups: dict) -> dict:
    def of_set(number: int) -> dict:
        scores = {f"{score:g}": pairs for score, pairs in sorted(output.scores[number].items())}
        return {"scores": scores}

    kept = facts[0]["images"] - output.dropped
    report = {"train": facts[0], "dropped": output.dropped, "kept": kept}
    if len(facts) == 1:
        return report | groups | of_set(0)
    report["against"] = [
        facts[number] | output.counts(number) | of_set(number) for number in range(1, len(facts))
    ]
    return report
