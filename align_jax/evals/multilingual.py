"""Retrieval in several languages over the same images: recalls and their mean by language.

Source: Jia et al. 2021, section 8 (mean recall of Multi30k: R@1, 5 and 10 both ways). A set with
five captions an image and one with a single caption are not comparable: see `num_captions`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.sources.open_source import PairSource, open_source
from align_jax.data.sources.record import Record, is_usable
from align_jax.evals.peers import LANGUAGES
from align_jax.evals.records import count_problems, encode_records
from align_jax.evals.retrieval import (
    chance_recall,
    index_ranks,
    mteb_scores,
    r1_intervals,
    retrieval_ranks,
    retrieval_recalls,
)
from align_jax.evals.zeroshot import TIES
from align_jax.storage import identity
from align_jax.storage.problems import Problems

_KS = (1, 5, 10)
_KEYS = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in _KS]


class Multilingual:
    """Evaluator: recalls by language; each image is embedded once.

    Args:
      name: prefix of its metrics.
      source: what `open_source` takes, with `{lang}` in place of the language, for instance
        `data?lang={lang}&images=flickr30k-images`.
      languages: codes to put there.
      ties: see `Retrieval`.

    Raises:
      ValueError: `{lang}` or languages are missing, or a source cannot be opened.
    """

    def __init__(self, name: str, source: str, languages: Sequence[str], ties: str = "against"):
        self.name = name
        if "{lang}" not in source or not languages:
            raise ValueError(f"source={source!r} must hold {{lang}}, and languages name some.")
        if ties not in TIES:
            raise ValueError(f"ties={ties!r} is unknown; use one of: {', '.join(TIES)}.")
        self._ties = ties
        self.sources = {lang: open_source(source.replace("{lang}", lang)) for lang in languages}
        self.problems = Problems()
        self._embedded: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @cached_property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data."""
        return {"source": {lang: identity.stamp(found) for lang, found in self.sources.items()}}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns for each language the metrics of `retrieval_recalls` as `<lang>/<metric>`, with
        95 % intervals of both R@1 (images drawn with all their captions), and `mean_recall`, the
        mean over the languages.

        Raises:
          ValueError: a language has no image that can be read.
        """
        self.problems = Problems()
        for source in self.sources.values():
            self.problems.merge(source.problems)
        images = _Images(self.sources.values())
        z_image, is_readable = encode_records(model, images, range(len(images)), self.problems)
        metrics: dict[str, float] = {}
        self._embedded = {}
        for lang, source in self.sources.items():
            captions = [
                [text for text in source.captions(index) if is_usable(text)]
                for index in range(len(source))
            ]
            rows = [images.row_of[source.key(index)] for index in range(len(source))]
            used = [i for i, row in enumerate(rows) if is_readable[row] and captions[i]]
            if not used:
                raise ValueError(f"lang={lang} has no readable image: {self.problems}.")
            texts = [text for i in used for text in captions[i]]
            owner = np.repeat(np.arange(len(used)), [len(captions[i]) for i in used])
            pair = z_image[[rows[i] for i in used]], model.encode_text(texts), owner
            ranks = index_ranks(*pair) if self._ties == "index" else retrieval_ranks(*pair)
            found = retrieval_recalls(*ranks, _KS) | r1_intervals(*ranks, owner)
            metrics |= {f"{lang}/{key}": value for key, value in found.items()}
            self._embedded[lang] = pair
        means = [metrics[f"{lang}/mean_recall"] for lang in self.sources]
        metrics["mean_recall"] = float(np.mean(means))
        return metrics | {"num_images": len(images)} | count_problems(self.problems)

    def mteb(self, metrics: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
        """Returns the scores of MTEB's tasks of the last call, a subset a language, as XM3600 has
        them there; see `Retrieval.mteb`."""
        tasks: dict[str, list[dict[str, Any]]] = {"I2T": [], "T2I": []}
        for lang, pair in self._embedded.items():
            own = {k[len(lang) + 1 :]: v for k, v in metrics.items() if k.startswith(f"{lang}/")}
            place = {"hf_subset": lang, "languages": [LANGUAGES.get(lang, lang)]}
            for suffix, scores in mteb_scores(*pair, own).items():
                tasks[suffix].append(scores | place)
        return tasks

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results: a row a language, and their mean."""
        header = ["languages [%]", *(f"{way} R@{k}" for way in ("I→T", "T→I") for k in _KS)]
        rows = []
        for lang in self.sources:
            num_images, num_captions = (metrics[f"{lang}/num_{n}"] for n in ("images", "captions"))
            chances = [chance_recall(k, num_captions / num_images, num_captions) for k in _KS]
            chances += [chance_recall(k, 1, num_images) for k in _KS]
            cells = [f"{metrics[f'{lang}/{key}']:.1f}" for key in (*_KEYS, "mean_recall")]
            counts = f"{np.mean(chances):.1f}", f"{num_images:,}", f"{num_captions:,}"
            rows.append([f"{self.name} {lang}", *cells, *counts])
        mean = [f"{self.name} mean", *[""] * len(_KEYS), f"{metrics['mean_recall']:.1f}"]
        return [[*header, "mean", "chance", "images", "captions"], *rows, [*mean, "", "", ""]]


class _Images:
    """The images of several sources, each once, by key."""

    def __init__(self, sources: Sequence[PairSource]):
        self.row_of: dict[str, int] = {}
        self._places: list[tuple[PairSource, int]] = []
        for source in sources:
            for index in range(len(source)):
                if source.key(index) not in self.row_of:
                    self.row_of[source.key(index)] = len(self._places)
                    self._places.append((source, index))
        self._sources = list(sources)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        source, place = self._places[index]
        return source[place]

    def key(self, index: int) -> str:
        source, place = self._places[index]
        return source.key(place)

    def stamp(self) -> str:
        return identity.digest([identity.stamp(source) for source in self._sources])
