"""Rank correlations against scipy and a slow bootstrap; tables of rated pairs; STS and SimLex."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import real_data
from scipy.stats import spearmanr

import align_jax
from align_jax.evals import run_evaluators
from align_jax.evals.correlation import sampled_spearman, spearman
from align_jax.evals.rated_pairs import RatedPairs, read_rated_pairs
from align_jax.evals.similarity import Similarity, Words, pairs_bootstrap, word_subsets
from align_jax.evals.tables import format_table
from align_jax.storage.problems import Problems


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 200), rng.integers(0, 5, 200)
    assert spearman(x, y) == pytest.approx(100 * spearmanr(x, y).statistic, abs=1e-9)
    assert spearman(x, np.ones(200)) == 0.0
    assert spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(100.0)


def test_bootstrap_draws_half_of_the_queries_and_one_pair_of_each():
    scores = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    # The partners of each query agree, so every draw of two queries gives 100 or -100 ...
    queries = ["a", "a", "b", "b", "c", "c", "d", "d"]
    similarities = np.array([1.0, 1, 2, 2, 3, 3, 4, 4])
    assert sampled_spearman(scores, similarities, queries, rounds=50) == (100.0, 0.0)
    # ... and were it all pairs, or all queries, the one that disagrees would always be among them.
    similarities = np.array([1.0, 1, 2, 2, 3, 3, 0, 0])
    mean, std = sampled_spearman(scores, similarities, queries, rounds=4000)
    # Two of four queries, three of the six pairs of them hold d, whose order is reversed.
    assert mean == pytest.approx(0.0, abs=8) and std == pytest.approx(100.0, abs=1)


def test_bootstrap_deviation_equals_a_slow_one():
    rng = np.random.default_rng(1)
    queries = rng.integers(0, 60, 400).tolist()
    scores = rng.normal(size=400)
    similarities = scores + rng.normal(size=400)
    mean, std = sampled_spearman(scores, similarities, queries, rounds=3000)
    found = []
    for _ in range(3000):
        drawn = rng.choice(np.unique(queries), len(set(queries)) // 2, replace=False)
        rows = [rng.choice(np.flatnonzero(np.array(queries) == q)) for q in drawn[:30]]
        found.append(100 * spearmanr(scores[rows], similarities[rows]).statistic)
    assert mean == pytest.approx(np.mean(found), abs=1.0)
    assert std == pytest.approx(np.std(found), abs=0.7)


def test_both_sides_are_queries_and_a_pair_in_both_orders_counts_once(monkeypatch):
    pairs = RatedPairs(["a", "b", "c", "d"], ["b", "a", "d", "e"], np.arange(4.0), {})
    calls = []
    monkeypatch.setattr(
        "align_jax.evals.similarity.sampled_spearman", lambda *args, **kwargs: calls.append(args)
    )
    for query in ("both", "first", "second"):
        pairs_bootstrap(pairs, 10 + np.arange(4.0), query, rounds=1, seed=0)
    both, first, second = [
        list(zip(queries, scores, similarities, strict=True))
        for scores, similarities, queries in calls
    ]
    # Directed: a-b and b-a, c-d and d-c, d-e and e-d; the row b-a adds none.
    assert both == [
        ("a", 0, 10), ("b", 0, 10), ("c", 2, 12), ("d", 2, 12), ("d", 3, 13), ("e", 3, 13)
    ]  # fmt: skip
    assert [query for query, *_ in first] == pairs.left
    assert [query for query, *_ in second] == pairs.right


def test_bootstrap_needs_four_queries():
    with pytest.raises(ValueError, match="four queries; got 3"):
        sampled_spearman(np.arange(3.0), np.arange(3.0), ["a", "b", "c"], rounds=1)


def test_rated_pairs_with_and_without_header(tmp_path):
    problems = Problems()
    (tmp_path / "a.tsv").write_text("old\tnew\t1.5\nhot\tcold\t2\n")
    pairs = read_rated_pairs(str(tmp_path / "a.tsv"), problems)
    assert (pairs.left, pairs.right) == (["old", "hot"], ["new", "cold"])
    assert pairs.scores.tolist() == [1.5, 2.0] and not problems
    (tmp_path / "b.csv").write_text(
        "caption1,caption2,agg_score,sampling_method\na,b,3.25,x\nc,,1,x\nd,e,high,x\n"
    )
    pairs = read_rated_pairs(str(tmp_path / "b.csv"), problems, ("sampling_method", "POS"))
    assert pairs.left == ["a"] and pairs.columns == {"sampling_method": ["x"]}
    assert problems == {"row_malformed": 2} and problems.first["row_malformed"].endswith("b.csv:3")
    (tmp_path / "c.csv").write_text("x,y,z,w\n1,2,3,4\n")
    with pytest.raises(ValueError, match="c.csv has no column of the first item: it has x, y, z"):
        read_rated_pairs(str(tmp_path / "c.csv"), problems)
    with pytest.raises(ValueError, match="none.tsv does not exist"):
        read_rated_pairs(str(tmp_path / "none.tsv"), problems)


class _BagOfWords:
    """Texts as counts of their words, unit norm."""

    def encode_text(self, texts):
        words = [re.findall("[a-z]+", text.lower()) for text in texts]
        place = {word: i for i, word in enumerate(sorted({w for ws in words for w in ws}))}
        z = np.zeros((len(texts), len(place)), np.float32)
        for row, found in enumerate(words):
            for word in found:
                z[row, place[word]] += 1
        return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_sts_subset_with_bag_of_words_gives_the_known_numbers():
    evaluator = Similarity("sts", str(real_data("text", "cxc_sts_val_subset.tsv")))
    metrics = evaluator(_BagOfWords())
    assert metrics["num_pairs"] == 3309 and metrics["num_skipped"] == 0
    assert metrics["spearman"] == pytest.approx(47.32, abs=0.005)
    assert metrics["sampled_spearman"] == pytest.approx(47.4, abs=0.3)
    assert metrics["sampled_spearman_std"] == pytest.approx(1.8, abs=0.25)
    row = format_table({f"sts/{k}": v for k, v in metrics.items()}, [evaluator]).splitlines()[2]
    assert row.split()[:2] == ["sts", "47.3"]


def test_simlex_with_trigrams_gives_the_known_numbers():
    pairs = read_rated_pairs(str(real_data("text", "simlex999.tsv")), Problems())

    def trigrams(word):
        return {f" {word} "[i : i + 3] for i in range(len(word))}

    sets = [(trigrams(a), trigrams(b)) for a, b in zip(pairs.left, pairs.right, strict=True)]
    similarity = np.array([len(a & b) / len(a | b) for a, b in sets])
    subsets = word_subsets(pairs)
    assert {name: len(rows) for name, rows in subsets.items()} == {
        "adjectives": 111,
        "nouns": 666,
        "verbs": 222,
    }
    found = {name: spearman(pairs.scores[r], similarity[r]) for name, r in subsets.items()}
    found["all"] = spearman(pairs.scores, similarity)
    expected = {"all": 0.65, "adjectives": 7.12, "nouns": 2.57, "verbs": -7.79}
    assert found == pytest.approx(expected, abs=0.005)


def test_simlex_in_its_own_order_has_111_adjectives_666_nouns_and_222_verbs():
    left = ["old", *[f"a{n}" for n in range(997)], "attend"]
    right = ["new", *[f"b{n}" for n in range(997)], "arrive"]
    rows = word_subsets(RatedPairs(left, right, np.arange(999.0), {}))
    assert [(part, found[0], found[-1] + 1) for part, found in rows.items()] == [
        ("adjectives", 0, 111), ("nouns", 111, 777), ("verbs", 777, 999)
    ]  # fmt: skip


def test_words_by_part_of_speech_from_the_columns(tmp_path):
    table = tmp_path / "words.tsv"
    table.write_text(
        "word1\tword2\tPOS\tSimLex999\tconcQ\tSimAssoc333\n"
        "a b\ta b\tN\t9\t1\t1\na c\ta b\tN\t5\t1\t0\nc\tb\tN\t1\t2\t0\n"
        "x\ty\tA\t1\t3\t0\nx\tx\tA\t0\t3\t0\n"
    )
    evaluator = Words("w", str(table), feature="embedding")
    results = run_evaluators([evaluator], _BagOfWords())
    assert results["w/spearman_nouns"] == pytest.approx(100.0)
    assert results["w/spearman_adjectives"] == pytest.approx(-100.0)
    assert "w/spearman_verbs" not in results and "w/spearman_concreteness_q1" in results
    assert "nouns" in format_table(results, [evaluator]).splitlines()[0]
    assert results["w/num_pairs"] == 5


def test_words_are_compared_before_the_projection(tiny_hf, tmp_path):
    words = ["cat", "dog", "a red car"]
    model = align_jax.load(str(tiny_hf[0]))
    z = model.encode_text(words, projected=False)
    ids, mask = model.tokenizer.encode(words, model.preprocessing.max_tokens)
    with torch.no_grad():
        states = tiny_hf[1].eval().text_model(torch.tensor(ids), torch.tensor(mask))
    expected = torch.nn.functional.normalize(states.last_hidden_state[:, 0])
    np.testing.assert_allclose(z, expected, atol=1e-5)
    # People who agree with the order of these cosines, which that of the embeddings is not.
    words += ["a photo", "two squares", "circles on a mat"]
    z = model.encode_text(words, projected=False).astype(np.float64)
    pairs = list(itertools.combinations(range(len(words)), 2))
    rows = [f"{words[a]}\t{words[b]}\t{z[a] @ z[b] * 4 + 5:.6f}\n" for a, b in pairs]
    table = tmp_path / "words.tsv"
    table.write_text("".join(rows))
    assert Words("w", str(table))(model)["spearman"] == pytest.approx(100.0)
    assert Words("w", str(table), feature="embedding")(model)["spearman"] < 99.0
    with pytest.raises(ValueError, match="feature='mean' is unknown; use one of: cls, embedding"):
        Words("w", str(table), feature="mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"query": "left"}, "query='left' is unknown"), ({"rounds": -1}, "rounds=-1 must not be")],
)
def test_bad_arguments_raise(tmp_path, arguments, message):
    (tmp_path / "a.tsv").write_text("old\tnew\t1.5\nhot\tcold\t2\n")
    with pytest.raises(ValueError, match=message):
        Similarity("s", str(tmp_path / "a.tsv"), **arguments)
