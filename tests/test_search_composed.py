"""Composed retrieval measured on models whose answers are known, and its sets."""

import json
import re
import zipfile

import numpy as np
import pytest
from helpers import real_data
from search_helpers import unit

from align_jax import evals
from align_jax.data.images import decode_image
from align_jax.data.sources.scenes import COLOURS, SHAPES, paint_object
from align_jax.evals import composed
from align_jax.evals.tables import format_table


class KnowsAll:
    """Embeds a picture as its shape and its colour, and a text as the words that it holds."""

    def __init__(self, known):
        self._known = known  # bytes of a picture -> words
        rng = np.random.default_rng(0)
        names = [*SHAPES, *COLOURS]
        self._axes = dict(zip(names, np.linalg.qr(rng.normal(size=(32, 32)))[0], strict=False))

    def _sum(self, words):
        return sum((self._axes[word] for word in words if word in self._axes), np.zeros(32))

    def encode_image(self, images, *, on_error="raise"):
        return unit(np.array([self._sum(self._known[image.tobytes()]) for image in images]))

    def encode_text(self, texts):
        return unit(np.array([self._sum(re.findall(r"\w+", text)) for text in texts]))


def test_change_finds_what_it_should_and_sum_and_parts_find_less():
    evaluator = composed.Composed("c", "scenes?seed=3", num_queries=60)
    items = evaluator.set
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    assert len(items.gallery) == 700 and len(items.pictures) == 60
    known = {p.tobytes(): kinds[g] for p, g in zip(items.gallery, items.groups, strict=True)}
    for picture, new, old, wanted in zip(
        items.pictures, items.new, items.old, items.wanted, strict=True
    ):
        shape, after = kinds[wanted]
        before = old.split()[1]
        assert new == f"a {after} shape in the center" and before != after
        known[picture.tobytes()] = (shape, before)
    found = evaluator(KnowsAll(known))
    assert found["change_r1"] == 100 and found["sum_r1"] == 100
    assert found["image_r1"] == 0
    assert found["text_r1"] < 100
    # 10 of 700 are right for each query.
    assert found["chance_r1"] == pytest.approx(100 * 10 / 700)
    assert found["chance_r10"] == pytest.approx(
        100 * (1 - np.prod(1 - 10 / np.arange(700, 690, -1)))
    )
    assert (found["num_queries"], found["num_gallery"], found["num_skipped"]) == (60, 700, 0)


def test_pictures_of_a_set_are_different_and_the_same_each_time():
    first, again = (composed.composed_scenes(0, 30) for _ in range(2))
    other = composed.composed_scenes(1, 30)
    assert len({p.tobytes() for p in [*first.gallery, *first.pictures]}) == 730
    assert all((a == b).all() for a, b in zip(first.gallery, again.gallery, strict=True))
    assert not {p.tobytes() for p in first.gallery} & {p.tobytes() for p in other.gallery}
    red = paint_object([1], "circle", "red")
    centre = red[24:40, 24:40].reshape(-1, 3).mean(0)
    assert centre[0] > 150 and centre[1:].max() < 80


class Blind:
    """Knows nothing: unit vectors at random."""

    def __init__(self):
        self._rng = np.random.default_rng(0)

    def encode_image(self, images, *, on_error="raise"):
        return unit(self._rng.normal(size=(len(images), 64)))

    encode_text = encode_image


def test_blind_model_scores_at_chance():
    found = composed.Composed("c", "scenes", num_queries=2000)(Blind())
    for form in ("sum", "change", "image", "text"):
        assert found[f"{form}_r1"] == pytest.approx(found["chance_r1"], abs=1)
        assert found[f"{form}_r10"] == pytest.approx(found["chance_r10"], abs=3)


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"hex": "a", "label": "hand"},
        {"hex": "a-1", "label": "hand: light skin tone"},
        {"hex": "a-2", "label": "hand: dark skin tone"},
        {"hex": "b", "label": "cat: with a hat"},
        {"hex": "c-1", "label": "nobody: dark skin tone"},
    ]
    (tmp_path / "emoji.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for vendor in ("one", "two"):
        with zipfile.ZipFile(f"{vendor}.zip", "w") as file:
            for row in rows:
                if (vendor, row["hex"]) != ("two", "a-2"):
                    file.writestr(f"{row['hex']}.png", f"{vendor} {row['hex']}")
    return "emoji.jsonl?query=one.zip&gallery=two.zip"


def test_queries_of_emoji_are_bases_with_the_tones_that_the_gallery_has(emoji):
    items = composed.Composed("e", emoji).set
    assert items.pictures == [b"one a"] and items.wanted.tolist() == [1]
    assert (items.new, items.old) == (["hand: light skin tone"], ["hand"])
    assert items.gallery == [b"two a", b"two a-1", b"two b", b"two c-1"]


def test_pictures_that_cannot_be_decoded_are_counted(emoji):
    with pytest.raises(ValueError, match="No picture of the queries can be decoded"):
        composed.Composed("e", emoji)(Blind())
    evaluator = composed.Composed("c", "scenes", num_queries=5)
    evaluator.set.pictures[1] = b"<html>"
    evaluator.set.gallery[7] = b"<html>"
    for _ in range(2):
        found = evaluator(Blind())
        assert (found["num_queries"], found["num_gallery"], found["num_skipped"]) == (4, 699, 2)
        (reason,) = evaluator.problems
        assert found[f"problems/{reason}"] == evaluator.problems[reason] == 2
    assert evaluator.problems.first[reason] == "query picture 1"


def test_table_has_a_row_for_each_form_of_the_query():
    evaluator = composed.Composed("c", "scenes", num_queries=5)
    forms = ("sum", "change", "image", "text", "chance")
    metrics = {f"{form}_r{k}": 10 * n + k / 10 for n, form in enumerate(forms) for k in (1, 10)}
    metrics |= {"num_queries": 5, "num_gallery": 700, "num_skipped": 0}
    table = format_table({f"c/{key}": value for key, value in metrics.items()}, [evaluator])
    rows = [line.split() for line in table.splitlines()]
    assert rows[0][-5:] == ["R@1", "R@10", "queries", "gallery", "skipped"]
    assert rows[2] == ["c,", "sum", "0.1", "1.0", "5", "700", "0"]
    assert rows[3:5] == [["c,", "change", "10.1", "11.0"], ["image", "alone", "20.1", "21.0"]]
    assert rows[5:] == [["text", "alone", "30.1", "31.0"], ["chance", "40.1", "41.0"]]


def test_stamp_is_of_the_pictures_and_what_is_asked_of_them(emoji, tmp_path):
    def stamp(source, num_queries=9):
        return composed.Composed("c", source, num_queries).stamps["source"]

    assert len({stamp("scenes"), stamp("scenes?seed=1"), stamp("scenes", 8), stamp(emoji)}) == 4
    before = stamp(emoji)
    for name in ("emoji.jsonl", "one.zip", "two.zip"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    moved = "moved_emoji.jsonl?query=moved_one.zip&gallery=moved_two.zip"
    assert stamp(moved) == before == stamp(moved)
    for part in ("pictures", "new", "old", "gallery", "groups", "wanted"):
        items = composed.Composed("c", moved, 9).set
        getattr(items, part)[0] = 7 if part in ("groups", "wanted") else b"other"
        assert items.stamp() != before


@pytest.mark.parametrize(
    "source, message",
    [
        ("nothing", "nothing is unknown; use scenes"),
        ("scenes?size=3", "is unknown; use scenes"),
        ("scenes?seed=x", "seed=x must be an integer"),
        ("emoji.jsonl", "is unknown"),
        ("emoji.jsonl?query=two.zip&gallery=none.zip", "none.zip"),
        ("one.zip?query=one.zip&gallery=two.zip", "one.zip"),
    ],
)
def test_source_that_is_no_set_is_named(emoji, source, message):
    with pytest.raises(ValueError, match=message):
        evals.make_evaluators({"c": {"type": "composed", "source": source}})


def test_real_emoji_have_the_tones_of_two_vendors():
    folder = real_data("emoji")
    source = f"{folder}/emoji.jsonl?query={folder}/twemoji.zip&gallery={folder}/openmoji.zip"
    items = composed.Composed("e", source, num_queries=50).set
    assert len(items.pictures) == 50 and len(items.gallery) > 3000
    for wanted, new in zip(items.wanted, items.new, strict=True):
        assert "skin tone" in new and decode_image(items.gallery[wanted]).shape[2] == 3
