"""What could not be used is said by every verb: on standard error, in tables and in JSON."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from helpers import make_pairs
from PIL import Image

from align_jax import evals
from align_jax.cli import main as cli
from align_jax.evals import tables
from align_jax.evals.retrieval import Retrieval
from align_jax.evals.zeroshot import ZeroShot
from align_jax.storage.problems import Problems, from_json, report


class Model:
    """Embeds the mean colour of an image and the number of letters of a text."""

    def encode_image(self, images, on_error="raise"):
        rows = []
        for read in images:
            try:
                rows.append(read().mean())
            except ValueError:
                rows.append(0.0)
        return self._unit(rows)

    def encode_text(self, texts):
        return self._unit([len(text) for text in texts])

    def _unit(self, values):
        angle = np.asarray(values, np.float32) / 300
        return np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A table of 20 images of which the folder has 8; a tar of 10 pairs cut at byte 9,000."""
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path, 20)
    for number in range(8, 20):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    with tarfile.open("whole.tar", "w") as archive:
        for number in range(10):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(file, "JPEG", quality=95)
            for name, data in (("jpg", file.getvalue()), ("txt", b"x" * number + b"a")):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:9000])
    return tmp_path


def test_counts_have_names_and_lost_ones_are_told_from_those_beside(capsys):
    problems = Problems()
    problems.add("image_missing", "a.jpg", 3)
    problems.add("file_not_an_image", "notes.md")
    problems.add("image_missing", "b.jpg")
    assert problems.num_lost() == 4
    odd = Problems()
    odd.add("image_missing", "caf\udce9.jpg")
    assert str(odd) == "image_missing: 1 (first: caf\\udce9.jpg)"
    content = report(problems, "in.tar")
    assert content == {
        "image_missing": {"count": 4, "first": "a.jpg"},
        "file_not_an_image": {"count": 1, "first": "notes.md"},
    }
    assert capsys.readouterr().err == (
        "in.tar: problems: image_missing: 4 (first: a.jpg); "
        "file_not_an_image: 1 (first: notes.md)\n"
    )
    again = from_json(content)
    assert again == problems and again.first == problems.first
    assert report(Problems(), "in.tar") == {} and not capsys.readouterr().err


def test_recall_over_a_part_says_so_in_metrics_and_table(part):
    evaluators = [
        Retrieval("table", "captions.jsonl?images=images"),
        Retrieval("tar", "cut.tar"),
    ]
    results = evals.run_evaluators(evaluators, Model())
    assert results["table/num_images"] == 8 and results["table/num_skipped"] == 12
    assert results["table/problems/image_missing"] == 12
    assert results["tar/problems/tar_truncated"] == results["tar/problems/caption_missing"] == 1
    assert results["tar/num_skipped"] == 2
    assert results["tar/num_images"] < 10
    table = tables.format_table(results, evaluators)
    row = next(line for line in table.splitlines() if line.startswith("table "))
    assert row.split()[-3:] == ["8", "24", "12"]
    assert (
        "\ntable: 12 left out, the scores are over the rest: image_missing: 12 (first: 8.jpg)\n"
        in table
    )
    assert "\ntar: 2 left out, the scores are over the rest: tar_truncated: 1 (first: cut" in table
    assert "image_missing: 12" in tables.format_table(results)  # of an earlier run, without names


def test_zeroshot_counts_what_lies_beside_and_what_cannot_be_read(part):
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg"):
        (part / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"images/{name[4:]}", part / "pets" / name)
    (part / "pets" / "cat" / "4.jpg").write_text("<html>")
    (part / "pets" / "cat" / "notes.md").write_text("x")
    evaluator = ZeroShot("pets", "pets")
    metrics = evaluator(Model())
    assert metrics["num_images"] == 4 and metrics["num_skipped"] == 1
    assert metrics["problems/image_not_an_image"] == metrics["problems/file_not_an_image"] == 1
    assert evaluator.problems.first["image_not_an_image"].endswith("cat/4.jpg")
    evaluator(Model())
    assert evaluator.problems["file_not_an_image"] == 1  # not added up over calls


def test_align_eval_names_what_is_missing_in_table_and_json(project, part, capsys):
    command = ["eval", "--workdir", str(project / "run"), "--out", "out.json"]
    assert cli.main([*command, "--retrieval", "captions.jsonl?images=images"]) == 0
    assert "image_missing: 12 (first: 8.jpg)" in capsys.readouterr().out
    written = json.loads((part / "out.json").read_text())
    assert written["results"]["retrieval/num_skipped"] == 12
    assert written["results"]["retrieval/problems/image_missing"] == 12
    assert written["problems"] == {"retrieval": {"image_missing": {"count": 12, "first": "8.jpg"}}}
