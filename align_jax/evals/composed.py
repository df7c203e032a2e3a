"""Composed retrieval: a picture and words that change it; is the changed picture found?

Two forms of the query are measured, with image and words alone beside them and chance below:
sum, unit(z_image + 2 z_new), and change, unit(z_image + z_new - z_old). Source of the sum:
Jia et al. 2021, section 6; the sets are ours.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.images import BadImage, decode_image
from align_jax.data.sources.archives import index_files, read_member
from align_jax.data.sources.scenes import COLOURS, SHAPES, paint_object
from align_jax.evals.records import count_problems
from align_jax.evals.top_k import top_k
from align_jax.storage import identity
from align_jax.storage.problems import Problems
from align_jax.storage.text import read_lines

SUM_WEIGHT, CHANGE_WEIGHT = 2.0, 1.0

_TONES = tuple(f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark"))
_TONES += ("dark skin tone",)
_KS = (1, 10)
_ROWS = {
    "sum": "{}, sum",
    "change": "{}, change",
    "image": "  image alone",
    "text": "  text alone",
    "chance": "  chance",
}
_GALLERY_COPIES = 10  # of each shape and colour


@dataclasses.dataclass(frozen=True)
class ComposedSet:
    """Queries and what is right for each.

    Attributes:
      pictures: of N queries, each what decode_image takes.
      new: N texts, what the picture shall show.
      old: N texts, what it shows in that place.
      gallery: M pictures.
      groups: [M] int, what each shows.
      wanted: [N] int, the group that is right for each query.
    """

    pictures: list[Any]
    new: list[str]
    old: list[str]
    gallery: list[Any]
    groups: np.ndarray
    wanted: np.ndarray

    def stamp(self) -> str:
        """Returns what identity.stamp does: of all pictures, texts and answers."""
        every = (*self.pictures, *self.gallery)
        pictures = [p if isinstance(p, bytes) else p.tobytes() for p in every]
        answers = self.groups.tolist(), self.wanted.tolist()
        return identity.digest([*pictures, self.new, self.old, *answers])


class Composed:
    """Evaluator: recall of changed pictures.

    Args:
      name: prefix of its metrics.
      source: "scenes", or "scenes?seed=3": 700 scenes of one object, 400 queries that ask for
        another colour, 10 pictures right for each; or
        "emoji.jsonl?query=twemoji.zip&gallery=openmoji.zip": a table with `hex` and `label`, and
        archives of hex.png of two vendors: queries ask for a skin tone, one picture is right.
      num_queries: at most so many.

    Raises:
      ValueError: the source is neither, or has no query.
    """

    def __init__(self, name: str, source: str, num_queries: int = 400):
        self.name = name
        self.problems = Problems()
        path, _, query = source.partition("?")
        options = dict(option.partition("=")[::2] for option in query.split("&") if option)
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries} must be at least 1.")
        if path == "scenes" and not options.keys() - {"seed"}:
            seed = options.get("seed", "0")
            if not seed.isdecimal():
                raise ValueError(f"{source}: seed={seed} must be an integer of at least 0.")
            self.set = composed_scenes(int(seed), num_queries)
        elif os.path.isfile(path) and options.keys() == {"query", "gallery"}:
            self.set = composed_emoji(path, options["query"], options["gallery"], num_queries)
        else:
            raise ValueError(
                f"{source} is unknown; use scenes, scenes?seed=N, or "
                "emoji.jsonl?query=vendor.zip&gallery=other.zip."
            )

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        return {"source": identity.stamp(self.set)}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns recalls in percent: `<form>_r1` and `_r10` for sum, change, image, text, chance.

        Also `num_queries`, `num_gallery`, and `num_skipped`: pictures that cannot be decoded.

        Raises:
          ValueError: no picture of the queries or of the gallery can be decoded.
        """
        self.problems = Problems()
        all_pictures = [self._decoded("query", *item) for item in enumerate(self.set.pictures)]
        all_pictures += [self._decoded("gallery", *item) for item in enumerate(self.set.gallery)]
        is_read = np.array([picture is not None for picture in all_pictures])
        blank = np.zeros((8, 8, 3), np.uint8)
        z = model.encode_image([blank if p is None else p for p in all_pictures])
        count = len(self.set.pictures)
        kept, there = is_read[:count], is_read[count:]
        if not kept.any() or not there.any():
            which = "gallery" if kept.any() else "queries"
            raise ValueError(f"No picture of the {which} can be decoded.")
        z_image, z_gallery = z[:count][kept], z[count:][there]
        z_text = model.encode_text([*self.set.new, *self.set.old])
        z_new, z_old = z_text[:count][kept], z_text[count:][kept]
        right = self.set.groups[there][None] == self.set.wanted[kept][:, None]
        queries = {
            "sum": compose(z_image, z_new, 0.0, SUM_WEIGHT),
            "change": compose(z_image, z_new, z_old, CHANGE_WEIGHT),
            "image": z_image,
            "text": z_new,
        }
        k = min(max(_KS), len(z_gallery))
        metrics = {}
        for form, query in queries.items():
            found = np.take_along_axis(right, top_k(query, z_gallery, k)[0], axis=1)
            for cut in _KS:
                metrics[f"{form}_r{cut}"] = 100 * float(found[:, :cut].any(axis=1).mean())
        for cut in _KS:
            metrics[f"chance_r{cut}"] = _chance(right.sum(axis=1), len(z_gallery), cut)
        counts = {"num_queries": len(z_image), "num_gallery": len(z_gallery)}
        return metrics | counts | count_problems(self.problems)

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["composed retrieval [%]", *(f"R@{k}" for k in _KS)]
        counts = [f"{metrics[key]:,}" for key in ("num_queries", "num_gallery", "num_skipped")]
        rows = [
            [title.format(self.name), *(f"{metrics[f'{form}_r{k}']:.1f}" for k in _KS), *[""] * 3]
            for form, title in _ROWS.items()
        ]
        rows[0][-3:] = counts
        return [[*header, "queries", "gallery", "skipped"], *rows]

    def _decoded(self, part: str, number: int, picture: Any) -> np.ndarray | None:
        try:
            return decode_image(picture)
        except BadImage as error:
            self.problems.add(error.reason, f"{part} picture {number}")
            return None


def compose(
    z: np.ndarray, z_added: np.ndarray | float, z_removed: np.ndarray | float, weight: float
) -> np.ndarray:
    """Returns unit(z + weight (z_added - z_removed)), float32 [..., D].

    Raises:
      ValueError: the weight is not finite, or nothing is left of the sum.
    """
    if not np.isfinite(weight):
        raise ValueError(f"weight={weight} must be a finite number.")
    query = np.asarray(z, np.float64) + weight * (np.asarray(z_added, np.float64) - z_removed)
    norm = np.linalg.norm(query, axis=-1, keepdims=True)
    if (norm < 1e-6).any():
        raise ValueError("The parts of the query cancel each other out; nothing is left to find.")
    return (query / norm).astype(np.float32)


def composed_scenes(seed: int, num_queries: int) -> ComposedSet:
    """Returns pictures of one object, and queries for the same shape in another colour."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    shown = [kind for kind in kinds for _ in range(_GALLERY_COPIES)]
    gallery = [paint_object([seed, 9, i], *kind) for i, kind in enumerate(shown)]
    rng = np.random.default_rng([seed, 0])
    pictures, new, old, wanted = [], [], [], []
    for number in range(num_queries):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        before, after = map(str, rng.choice(list(COLOURS), 2, replace=False))
        pictures.append(paint_object([seed, 77, number], shape, before))
        new.append(f"a {after} shape in the center")
        old.append(f"a {before} shape in the center")
        wanted.append(kinds.index((shape, after)))
    groups = np.array([kinds.index(kind) for kind in shown])
    return ComposedSet(pictures, new, old, gallery, groups, np.array(wanted))


def composed_emoji(table: str, query: str, gallery: str, num_queries: int) -> ComposedSet:
    """Returns base pictures of one vendor and their skin tones in the gallery of another.

    Raises:
      ValueError: no emoji of the table has a base and a tone with both vendors.
    """
    try:
        rows = [json.loads(line) for line in read_lines(table)]
        labels = {row["hex"]: row["label"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{table} is no table of emoji with hex and label: {error!r}.") from None
    problems = Problems()
    asked, found = index_files(query, problems), index_files(gallery, problems)
    if problems:
        raise ValueError(f"{query} and {gallery} cannot be read whole: {problems}")
    by_label = {label: code for code, label in labels.items()}
    shown = [code for code in sorted(labels) if f"{code}.png" in found]
    place = {code: row for row, code in enumerate(shown)}
    cases = []
    for code in shown:
        base, _, tone = labels[code].partition(": ")
        if tone in _TONES and f"{by_label.get(base)}.png" in asked:
            cases.append((by_label[base], code, base, tone))
    if not cases:
        raise ValueError(f"{table}: no emoji has a base in {query} and a skin tone in {gallery}.")
    # Evenly, so that a part of them shows all groups of emoji.
    chosen = np.linspace(0, len(cases) - 1, min(num_queries, len(cases)), dtype=int)
    cases = [cases[i] for i in chosen]
    return ComposedSet(
        [read_member(asked[f"{case[0]}.png"]) for case in cases],
        [f"{case[2]}: {case[3]}" for case in cases],
        [case[2] for case in cases],
        [read_member(found[f"{code}.png"]) for code in shown],
        np.arange(len(shown)),
        np.array([place[case[1]] for case in cases]),
    )


def _chance(num_right: np.ndarray, num_gallery: int, k: int) -> float:
    """Percentage of random rankings with a right picture among the first k; num_right: [N]."""
    miss = np.ones(len(num_right))
    for drawn in range(min(k, num_gallery)):
        miss *= np.maximum(0.0, 1 - num_right / (num_gallery - drawn))
    return 100 * float((1 - miss).mean())
