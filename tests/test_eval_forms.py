"""The forms in which users have evaluation sets give the same pairs, labels and recalls."""

import io
import json
import tarfile

import numpy as np
import pytest
from helpers import decoded
from PIL import Image

from align_jax.data.sources.open_source import open_labelled, open_source
from align_jax.evals.retrieval import Retrieval


class _Model:
    def encode_image(self, images, on_error):
        return self._vectors([int(image[0, 0, 0]) for image in decoded(images, on_error)])

    def encode_text(self, texts):
        return self._vectors([int(text.split()[-1]) for text in texts])

    def _vectors(self, levels):
        angle = np.asarray(levels) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("L", (8, 8), 40 * number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def test_four_forms_of_one_retrieval_set_give_the_same_recalls(folder):
    rng = np.random.default_rng(0)
    # Some captions are of another level than their image.
    captions = {
        f"{number}.png": [
            f'a "quoted", {k} grey of {40 * number + int(rng.integers(-30, 31))}' for k in range(5)
        ]
        for number in range(6)
    }
    rows = [(name, k, text) for name, texts in captions.items() for k, text in enumerate(texts)]
    (folder / "captions.txt").write_text(
        "image,caption\n" + "".join(f"{name},{text}\n" for name, _, text in rows)
    )
    token = "".join(f"{name}#{k}\t{text}\n" for name, k, text in rows)
    (folder / "Flickr8k.token.txt").write_text(token)
    (folder / "results.token").write_text(token)
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for name, texts in captions.items()
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, texts in captions.items():
            _add(archive, name, (folder / "images" / name).read_bytes())
            _add(archive, name.replace(".png", ".txt"), "\n".join(texts).encode())
    forms = (
        "captions.txt?images=images",
        "Flickr8k.token.txt?images=images",
        "results.token?images=images",
        "dataset.json?images=images&split=test",
        "0.tar",
    )
    found = []
    for form in forms:
        source = open_source(form)
        assert [source.captions(i) for i in range(6)] == [tuple(c) for c in captions.values()], form
        found.append(Retrieval("r", source)(_Model()))
    assert all(metrics == found[0] for metrics in found)
    assert 0 < found[0]["text_to_image_r1"] < 100 and found[0]["num_captions"] == 30


def test_token_lines_that_are_none_are_counted(folder):
    (folder / "a.token").write_text("0.png#0\ta dog 0\n\nno tab\n1.png#0\ta cat 40\n")
    source = open_source("a.token?images=images")
    assert len(source) == 2 and source.problems == {"row_malformed": 1}
    assert source.problems.first["row_malformed"].endswith("a.token:3")


@pytest.fixture
def tars(folder):
    (folder / "wds" / "test").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "wds" / "test" / f"{shard}.tar", "w") as archive:
            for number in range(3):
                image = (folder / "images" / f"{3 * shard + number}.png").read_bytes()
                _add(archive, f"s{shard}{number}.png", image)
                _add(archive, f"s{shard}{number}.cls", f"{number}\n".encode())
    (folder / "wds" / "test" / "nshards.txt").write_text("2")
    return folder


def test_webdataset_classes_are_labelled_images(tars):
    with pytest.raises(ValueError, match="has classes by number, which classnames.txt must name"):
        open_labelled("wds/test")
    (tars / "wds" / "classnames.txt").write_text("dark\ngrey\n bright \n")
    source = open_labelled("wds/test")
    assert source.classes == ("dark", "grey", "bright") and not source.problems
    assert [source[i].label for i in range(len(source))] == [0, 1, 2, 0, 1, 2]
    assert len(open_labelled("wds/test?max=3")) == 3
    assert len(open_labelled("wds/test/1.tar")) == 3
    (tars / "wds" / "classnames.txt").write_text("dark\ngrey\n")
    source = open_labelled("wds/test/*.tar")
    assert len(source) == 4 and source.problems == {"class_unknown": 2}


def test_tars_of_class_folders_stay_what_they_were(folder):
    with tarfile.open(folder / "c.tar", "w") as archive:
        for number in range(6):
            image = (folder / "images" / f"{number}.png").read_bytes()
            _add(archive, f"class{number % 2}/{number}.png", image)
    source = open_labelled("c.tar")
    assert source.classes == ("class0", "class1") and len(source) == 6


def test_numeric_folders_are_sorted_as_numbers(folder):
    for number in range(12):
        (folder / "v2" / str(number)).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * number).save(folder / "v2" / str(number) / "a.png")
    source = open_labelled("v2")
    assert [source[i].label for i in range(12)] == [
        int(source[i].key.split("/")[0]) for i in range(12)
    ]
