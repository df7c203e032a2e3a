"""Retrieval by language: the layouts of XM3600, Multi30k and a field a language."""

import gzip
import json

import numpy as np
import pytest
from helpers import decoded, real_data
from PIL import Image

from align_jax.data.sources.open_source import open_source
from align_jax.evals import make_evaluator, peers
from align_jax.evals.retrieval import Retrieval
from align_jax.evals.tables import format_table


class _Model:
    def __init__(self):
        self.num_images = 0

    def encode_image(self, images, on_error):
        levels = [int(image[0, 0, 0]) for image in decoded(images, on_error)]
        self.num_images += len(levels)
        return self._vectors(levels)

    def encode_text(self, texts):
        return self._vectors([int(text.split()[-1]) for text in texts])

    def _vectors(self, levels):
        angle = np.asarray(levels) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("L", (8, 8), 40 * number).save(tmp_path / "images" / f"{number}.jpg", "PNG")
    return tmp_path


def test_fields_of_languages_and_xm3600_give_the_same_pairs(folder):
    plain, nested = [], []
    for number in range(4):
        de, fr = [f"eins {40 * number}", f"zwei {40 * number}"], f"un {40 * number}"
        plain.append({"image": f"{number}.jpg", "de": de, "more": {"fr": fr}})
        row = {"image/key": str(number), "image/locale": "en"}
        nested.append(row | {"de": {"caption": de, "caption/tokenized": []}})
    plain[3]["more"] = {}
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    first = open_source("a.jsonl?lang=de&images=images")
    second = open_source("captions.jsonl?lang=de&images=images")
    for source in (first, second):
        assert len(source) == 4 and source.captions(1) == ("eins 40", "zwei 40")
        assert source.key(1) == "1.jpg" and not source.problems
    french = open_source("a.jsonl?lang=fr&images=images")
    assert len(french) == 3 and french.problems == {"caption_missing": 1}
    with pytest.raises(ValueError, match="holds no caption of lang=it"):
        open_source("a.jsonl?lang=it&images=images")
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        open_source("none.jsonl?lang=it&images=images")
    with pytest.raises(ValueError, match="does not say where its images are"):
        open_source("a.jsonl?lang=de")
    (folder / "a.csv").write_text("image,de\n")
    with pytest.raises(ValueError, match="lang= is of use for .jsonl files and Multi30k"):
        open_source("a.csv?lang=de&images=images")


@pytest.fixture
def multi30k(folder):
    raw = [folder / "data" / f"task{task}" / "raw" for task in (1, 2)]
    for path in (*raw, folder / "data/task1/image_splits"):
        path.mkdir(parents=True)
    names = "".join(f"{number}.jpg\n" for number in range(4))
    (folder / "data/task1/image_splits/test_2016_flickr.txt").write_text(names)
    lines = [f"un {40 * number}\n" for number in range(4)]
    (raw[0] / "test_2016_flickr.fr").write_text("".join(lines))
    (raw[0] / "test_2016_flickr.de").write_text("another sentence 7\n" * 4)
    for k in range(1, 6):
        text = "".join(f"{k} {40 * number}\n" for number in range(4))
        (raw[1] / f"test_2016.{k}.de.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_multi30k_has_five_german_and_one_french_caption(multi30k):
    german = open_source("data?lang=de&images=images")
    assert german.captions(2) == tuple(f"{k} 80" for k in range(1, 6))
    assert open_source("data?lang=fr&images=images").captions(2) == ("un 80",)
    with pytest.raises(
        ValueError, match="test_2016_flickr.cs does not exist, nor does it with .gz"
    ):
        open_source("data?lang=cs&images=images")
    (multi30k / "data/task1/raw/test_2016_flickr.fr").write_text("un 0\n")
    with pytest.raises(ValueError, match="test_2016_flickr.fr has 1 lines, and .* names 4 images"):
        open_source("data?lang=fr&images=images")


def test_recalls_by_language_are_those_of_retrieval_and_images_are_embedded_once(multi30k):
    text = "".join(f"un {level}\n" for level in (0, 80, 80, 41))
    (multi30k / "data/task1/raw/test_2016_flickr.fr").write_text(text)
    source = "data?lang={lang}&images=images"
    entry = {"type": "multilingual", "source": source, "languages": ("de", "fr")}
    evaluator, model = make_evaluator("m", entry), _Model()
    metrics = evaluator(model)
    assert model.num_images == 4
    about = {"model": "m", "pretrained": "p"}
    results = {f"m/{key}": value for key, value in metrics.items()}
    paths = peers.write("mteb", "out", results, [evaluator], **about)
    assert [path.name for path in paths] == ["mI2T.json", "mT2I.json"]
    tasks = [json.loads(path.read_text())["scores"]["test"] for path in paths]
    for row, lang in enumerate(("de", "fr")):
        alone = Retrieval("r", source.replace("{lang}", lang))
        found = alone(_Model())
        for key in ("image_to_text_r1", "text_to_image_r1", "mean_recall", "num_captions"):
            assert metrics[f"{lang}/{key}"] == found[key]
        for key in ("image_to_text_r1_low", "text_to_image_r1_low", "text_to_image_r1_high"):
            assert metrics[f"{lang}/{key}"] == found[key]
        place = {"hf_subset": lang, "languages": [{"de": "deu-Latn", "fr": "fra-Latn"}[lang]]}
        for scores, expected in zip(tasks, alone.mteb(found).values(), strict=True):
            assert scores[row].items() >= place.items()
            assert {key: scores[row][key] for key in expected} == pytest.approx(expected)
    blank = "un 0\n \nun 80\nun 80\n"
    (multi30k / "data/task1/raw/test_2016_flickr.fr").write_text(blank)
    found = make_evaluator("m", entry)(_Model())
    assert (found["fr/num_captions"], found["de/num_captions"]) == (3, metrics["de/num_captions"])
    assert 0 < metrics["fr/text_to_image_r1"] < metrics["de/text_to_image_r1"] == 100.0
    means = [metrics[f"{lang}/mean_recall"] for lang in ("de", "fr")]
    assert metrics["mean_recall"] == pytest.approx(np.mean(means))
    table = format_table({f"m/{key}": value for key, value in metrics.items()}, [evaluator])
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [
        ["m", "de"], ["m", "fr"], ["m", "mean"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "data?lang=de&images=images"}, "must hold {lang}"),
        ({"languages": ()}, "languages name some"),
        ({"ties": "for"}, "ties='for' is unknown"),
        ({"languages": ("de", "it")}, "test_2016_flickr.it does not exist"),
    ],
)
def test_bad_arguments_are_one_line(multi30k, arguments, message):
    entry = {"type": "multilingual", "source": "data?lang={lang}&images=images"}
    with pytest.raises(ValueError, match=message):
        make_evaluator("m", entry | {"languages": ("de",)} | arguments)


@pytest.mark.parametrize(("lang", "count", "captions"), [("zh", 1000, 5), ("de", 934, 1)])
def test_real_captions_of_other_languages(lang, count, captions):
    path = real_data("flickr8k", "dev.jsonl")
    source = open_source(f"{path}?lang={lang}&images={path.parent}/dev.zip")
    assert len(source) == count and len(source.captions(0)) == captions
    assert source.problems == ({"caption_missing": 1000 - count} if count < 1000 else {})
