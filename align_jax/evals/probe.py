"""Linear probe: logistic regression on image embeddings, its penalty chosen by a search.

Source: CLIP (Radford et al. 2021), appendix A.3: L-BFGS, at most 1,000 iterations; penalties from
1e-6 to 1e6 in eight steps a decade, first every second decade, then around the peak in halved
steps; chosen on validation images, fitted again on all. Features here are embeddings of unit norm.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from align_jax.evals.accuracy import reported_accuracy, row_of, score_accuracy, score_ranks
from align_jax.evals.peers import renamed
from align_jax.evals.records import Learned

_PENALTIES = np.logspace(-6, 6, 97)
_FIRST_STEP = 16
# Of the gradient of the mean loss. That of the search is scikit-learn's own, as in CLIP.
_TOLERANCE, SEARCH_TOLERANCE = 1e-7, 1e-4


class Probe(Learned):
    """Evaluator: accuracy of a linear classifier learned on image embeddings.

    Args:
      name: prefix of its metrics.
      source: images that are tested.
      train: images to learn from, of the same classes.
      val: share of the training images of each class that chooses the penalty, 0 to 1.
      l2: the penalty, if it shall not be searched: half of it times the squared weights is added to
        the summed loss.
      iterations: of L-BFGS at most.
      seed: of the split.

    Raises:
      ValueError: a source cannot be opened, classes differ, an argument is out of range.
      RuntimeError: scikit-learn is not installed.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        train: Any,
        val: float = 0.1,
        l2: float | None = None,
        iterations: int = 1000,
        seed: int = 0,
    ):
        if not 0 < val < 1:
            raise ValueError(f"val={val} must lie between 0 and 1.")
        if l2 is not None and l2 <= 0:
            raise ValueError(f"l2={l2} must be positive.")
        require_sklearn()
        super().__init__(name, source, train)
        self._val, self._l2, self._iterations, self._seed = val, l2, iterations, seed

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `top1` with its interval, `top5`, `mean_per_class`, `l2` and numbers of images
        and classes."""
        train, test, counts = self.embed(model)
        num_classes = counts["num_classes"]

        def fit(
            rows: np.ndarray, l2: float, tolerance: float = _TOLERANCE
        ) -> Callable[[np.ndarray], np.ndarray]:
            z, labels = train.z[rows], train.labels[rows]
            return fit_logistic(z, labels, num_classes, l2, self._iterations, tolerance)

        l2 = self._l2
        if l2 is None:
            learned, held = split_by_class(train.labels, self._val, self._seed)

            def accuracy(l2: float) -> float:
                scores = fit(learned, l2, SEARCH_TOLERANCE)(train.z[held])
                return score_accuracy(scores, train.labels[held])["top1"]

            l2 = search_penalty(accuracy)
        scores = fit(np.arange(len(train.labels)), l2)(test.z)
        ranks = score_ranks(scores, test.labels)
        return reported_accuracy(ranks, test.labels, num_classes) | {"l2": l2} | counts

    def clip_benchmark(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Returns task and metrics of CLIP_benchmark, whose probe is trained by AdamW."""
        kinds = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
        found = renamed(metrics, {f"lp_{new}": ours for new, ours in kinds.items()})
        about = {"weight_decay": metrics["l2"], "fewshot_k": -1, "seed": self._seed}
        return "linear_probe", found | about | {"normalized": True}

    def mteb(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Returns the scores of MTEB's classification task, which has 16 images a class."""
        return {"": renamed(metrics, {"accuracy": "top1", "main_score": "top1"})}

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["linear probe [%]", "top-1", "top-5", "mean per class", "chance top-1"]
        row = row_of(self.name, metrics, ("top1", "top5", "mean_per_class"))
        header += ["images", "training images", "skipped", "penalty"]
        return [header, [*row, f"{metrics['l2']:.2g}"]]


def search_penalty(accuracy: Callable[[float], float]) -> float:
    """Returns the penalty of the highest accuracy found; of equal ones the largest penalty.

    Args:
      accuracy: of a penalty, on validation images; called about 15 times.
    """
    found: dict[int, float] = {}

    def measure(places: range | list[int]) -> int:
        for place in places:
            if 0 <= place < len(_PENALTIES) and place not in found:
                found[place] = accuracy(float(_PENALTIES[place]))
        return max(found, key=lambda place: (found[place], place))

    best, step = measure(range(0, len(_PENALTIES), _FIRST_STEP)), _FIRST_STEP
    while step > 1:
        step //= 2
        best = measure([best - step, best + step])
    return float(_PENALTIES[best])


def split_by_class(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows to learn from and rows held out: of each class the same share of the latter.

    Raises:
      ValueError: nothing would be held out or learned from.
    """
    rng = np.random.default_rng(seed)
    learned, held = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = round(share * len(rows))
        held.append(rows[:count])
        learned.append(rows[count:])
    learned, held = np.sort(np.concatenate(learned)), np.sort(np.concatenate(held))
    if not len(held) or not len(learned):
        raise ValueError(f"val={share} of {len(labels)} images leaves one side empty.")
    return learned, held


def fit_logistic(
    z: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    iterations: int = 1000,
    tolerance: float = _TOLERANCE,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from embeddings [N, D] to class scores [N, C].

    Minimises the summed cross-entropy plus l2 / 2 times the squared weights; the bias is free. It
    ends where no part of the gradient of the mean loss is above `tolerance`.
    Classes without an image to learn from score -inf.

    Raises:
      ValueError: there is only one class to learn.
    """
    linear_model = require_sklearn()
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError("A linear probe needs training images of at least two classes.")
    fitted = linear_model.LogisticRegression(C=1 / l2, max_iter=iterations, tol=tolerance)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # `iterations` is one
        fitted.fit(z.astype(np.float64), labels)

    def scores(z: np.ndarray) -> np.ndarray:
        found = fitted.decision_function(z.astype(np.float64))
        if len(present) == 2:  # one column there
            found = np.stack([-found, found], axis=1)
        full = np.full((len(z), num_classes), -np.inf)
        full[:, present] = found
        return full

    return scores


def require_sklearn() -> Any:
    """Returns sklearn.linear_model.

    Raises:
      RuntimeError: it is not installed.
    """
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise RuntimeError("A linear probe needs pip install 'align_jax[eval]'.") from error
    return linear_model
