"""Sentence and word similarity: cosines of texts against the scores that people gave.

Sources: Crisscrossed Captions (Parekh et al. 2021) for the sampled form; SimLex-999 (Hill et al.
2015), as in Jia et al. 2021, section 10, for words and their subsets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.evals import bootstrap
from align_jax.evals.correlation import sampled_spearman, spearman
from align_jax.evals.rated_pairs import RatedPairs, read_rated_pairs
from align_jax.evals.records import count_problems
from align_jax.storage import identity
from align_jax.storage.problems import Problems

FEATURES = ("cls", "embedding")
QUERIES = ("first", "second", "both")
_POS = {"A": "adjectives", "N": "nouns", "V": "verbs"}
# SimLex-999 in its own order, for copies that have only words and scores.
_SIMLEX_ROWS = {"adjectives": (0, 111), "nouns": (111, 777), "verbs": (777, 999)}
_SIMLEX_ENDS = ("old", "new"), ("attend", "arrive")


class Similarity:
    """Evaluator: rank correlation of a model's cosines with the scores of pairs of texts.

    Args:
      name: prefix of its metrics.
      pairs: table, see `rated_pairs.read_rated_pairs`.
      rounds: of the sampled bootstrap, which is left out for 0.
      query: whose partners are drawn there: the "first" or "second" text of a pair, or "both" (each
        text is a query and each pair counts in both directions, as the published deviations imply).
      seed: of the draws.

    Raises:
      ValueError: a table that cannot be read, or an argument out of range.
    """

    def __init__(
        self, name: str, pairs: str, rounds: int = 1000, query: str = "both", seed: int = 0
    ):
        self.name = name
        if query not in QUERIES:
            raise ValueError(f"query={query!r} is unknown; use one of: {', '.join(QUERIES)}.")
        if rounds < 0:
            raise ValueError(f"rounds={rounds} must not be negative.")
        self.problems = Problems()
        self.pairs = read_rated_pairs(pairs, self.problems)
        self.stamps = {"pairs": stamp_of(self.pairs)}
        self._rounds, self._query, self._seed = rounds, query, seed

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `spearman`, `sampled_spearman` and its `_std` (x 100), and `num_pairs`."""
        cosines = text_cosines(model, self.pairs.left, self.pairs.right)
        metrics = {"spearman": spearman(self.pairs.scores, cosines)}
        if self._rounds:
            mean, std = pairs_bootstrap(
                self.pairs, cosines, self._query, rounds=self._rounds, seed=self._seed
            )
            metrics |= {"sampled_spearman": mean, "sampled_spearman_std": std}
        return metrics | {"num_pairs": len(cosines)} | count_problems(self.problems)

    def table(self, metrics: dict[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        sampled = "-"
        if "sampled_spearman" in metrics:
            sampled = f"{metrics['sampled_spearman']:.1f} ± {metrics['sampled_spearman_std']:.1f}"
        return [
            ["similarity [Spearman x 100]", "all pairs", "sampled", "chance", "pairs", "skipped"],
            [
                self.name,
                f"{metrics['spearman']:.1f}",
                sampled,
                "0.0",
                f"{metrics['num_pairs']:,}",
                f"{metrics['num_skipped']:,}",
            ],
        ]


class Words:
    """Evaluator: rank correlation with the scores of pairs of words, of all and by subset.

    Subsets: part of speech (column POS: A, N, V), quarters of concreteness (concQ), associated
    words (SimAssoc333), each where the table has the column. A table without POS that is SimLex-999
    in its order gets it from the row.

    Args:
      name: prefix of its metrics.
      pairs: table, see `rated_pairs.read_rated_pairs`.
      feature: what the vector of a word is: "cls", the state of [CLS] before the projection, as in
        the paper; or "embedding", the text embedding.

    Raises:
      ValueError: a table that cannot be read, or an unknown feature.
    """

    def __init__(self, name: str, pairs: str, feature: str = "cls"):
        self.name = name
        if feature not in FEATURES:
            raise ValueError(f"feature={feature!r} is unknown; use one of: {', '.join(FEATURES)}.")
        self._feature = feature
        self.problems = Problems()
        self.pairs = read_rated_pairs(pairs, self.problems, ("POS", "concQ", "SimAssoc333"))
        self.stamps = {"pairs": stamp_of(self.pairs)}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `spearman` (x 100) with its interval over pairs, `spearman_<subset>` and
        `num_pairs`."""
        projected = self._feature == "embedding"
        cosines = text_cosines(model, self.pairs.left, self.pairs.right, projected=projected)
        scores = self.pairs.scores
        metrics = {"spearman": spearman(scores, cosines)}
        metrics |= bootstrap.statistic_interval(
            "spearman", lambda rows: spearman(scores[rows], cosines[rows]), len(scores)
        )
        for subset, rows in word_subsets(self.pairs).items():
            if len(rows) > 1:
                metrics[f"spearman_{subset}"] = spearman(self.pairs.scores[rows], cosines[rows])
        return metrics | {"num_pairs": len(cosines)} | count_problems(self.problems)

    def table(self, metrics: dict[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        bounds = ("spearman_low", "spearman_high")
        parts = [key for key in metrics if key.startswith("spearman_") and key not in bounds]
        header = ["words [Spearman x 100]", "all", *(key[9:] for key in parts), "chance", "pairs"]
        row = [self.name, *(f"{metrics[key]:.1f}" for key in ("spearman", *parts)), "0.0"]
        return [
            [*header, "skipped"],
            [*row, f"{metrics['num_pairs']:,}", str(metrics["num_skipped"])],
        ]


def text_cosines(
    model: Any, left: Sequence[str], right: Sequence[str], *, projected: bool = True
) -> np.ndarray:
    """Returns cosines [N] float64 of texts with texts; each different text is encoded once."""
    rows: dict[str, int] = {}
    left_rows, right_rows = (
        [rows.setdefault(text, len(rows)) for text in side] for side in (left, right)
    )
    which = {} if projected else {"projected": False}
    z = np.asarray(model.encode_text(list(rows), **which), np.float64)
    return np.einsum("nD,nD->n", z[left_rows], z[right_rows])


def pairs_bootstrap(
    pairs: RatedPairs, similarities: np.ndarray, query: str, *, rounds: int, seed: int
) -> tuple[float, float]:
    """Returns `sampled_spearman` of pairs, the query being one side of them or both.

    With "both", a pair that the table has in both orders counts once a direction.
    """
    rows = np.arange(len(similarities))
    if query != "both":
        queries = pairs.left if query == "first" else pairs.right
    else:
        directed: dict[tuple[str, str], int] = {}
        for row, (left, right) in enumerate(zip(pairs.left, pairs.right, strict=True)):
            directed.setdefault((left, right), row)
            directed.setdefault((right, left), row)
        queries = [left for left, _ in directed]
        rows = np.array(list(directed.values()))
    return sampled_spearman(
        pairs.scores[rows], similarities[rows], queries, rounds=rounds, seed=seed
    )


def word_subsets(pairs: RatedPairs) -> dict[str, np.ndarray]:
    """Returns the rows of each subset that the columns of a table of words define."""
    subsets = {}
    if "POS" in pairs.columns:
        for letter, subset in _POS.items():
            subsets[subset] = _equal(pairs.columns["POS"], letter)
    elif _is_simlex(pairs):
        subsets = {subset: np.arange(*rows) for subset, rows in _SIMLEX_ROWS.items()}
    if "concQ" in pairs.columns:
        for quarter in "1234":
            subsets[f"concreteness_q{quarter}"] = _equal(pairs.columns["concQ"], quarter)
    if "SimAssoc333" in pairs.columns:
        subsets["associated"] = _equal(pairs.columns["SimAssoc333"], "1")
    return subsets


def stamp_of(pairs: RatedPairs) -> str:
    """Returns what identifies the pairs."""
    return identity.digest([pairs.left, pairs.right, pairs.scores.tolist()])


def _equal(cells: Sequence[str], value: str) -> np.ndarray:
    return np.flatnonzero([cell.strip().upper() == value for cell in cells])


def _is_simlex(pairs: RatedPairs) -> bool:
    ends = (pairs.left[0], pairs.right[0]), (pairs.left[-1], pairs.right[-1])
    return len(pairs.left) == 999 and ends == _SIMLEX_ENDS
