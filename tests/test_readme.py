"""The README's commands do what it says, on small data; the two set-up commands are .ci/run's."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align_jax.cli import main as cli
from align_jax.data.sources.scenes import Scenes

ROOT = Path(__file__).parents[1]
SMALLER = (
    "--config.train.batch_size=16 --config.model.bn_group_size=16 --config.train.steps=2 "
    "--config.optim.warmup_steps=1 --config.model.image.variant=femto --config.data.image_size=32"
)


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_first_blocks_are_the_two_set_up_commands():
    script = [sys.executable, str(ROOT / ".ci" / "readme_commands.py")]
    commands = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    first, second = commands.splitlines()
    assert "pip install" in first and first.endswith("--workdir runs/quickstart")
    assert "pip install" in second and "-m pytest" in second


def test_every_file_named_in_the_readme_exists():
    names = re.findall(
        r"`((?:align_jax|configs|docs|experiments|tests)/[\w/.]*)`",
        (ROOT / "README.md").read_text(),
    )
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", "docs/huggingface.md"])
def test_python_example_runs(page, tiny_hf, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("cats.jpg", "car.jpg"):
        Image.new("RGB", (60, 50), "red").save(name)
    namespace = {}
    exec(block.replace("kakaobrain/align-base", str(tiny_hf[0])), namespace)
    assert namespace["z_image"].shape == (2, 32)
    assert namespace["cosines"].shape[0] == 2
    np.testing.assert_allclose(namespace["probabilities"].sum(axis=1), 1, atol=1e-6)


PAGES = ("README.md", "docs", "experiments")


def test_every_align_command_of_the_pages_has_arguments_that_exist():
    pages = [page for name in PAGES for page in [ROOT / name, *(ROOT / name).rglob("*.md")]]
    commands = []
    for page in filter(Path.is_file, pages):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [line for line in lines if line.startswith("align ")]
    assert len(commands) > 30
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        args, rest = cli._parser().parse_known_args([word for word in words if word != "&"])
        assert all(args.takes_config and word.startswith("--config.") for word in rest), command


def write_pairs(folder, table, archive, source):
    with (
        zipfile.ZipFile(folder / f"{archive}.zip", "w") as images,
        open(folder / f"{table}.jsonl", "w") as rows,
    ):
        for index in range(len(source)):
            record = source[index]
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(record.image)).save(buffer, "JPEG")
            images.writestr(f"{index}.jpg", buffer.getvalue())
            row = {"image": f"{index}.jpg", "captions": record.captions}
            rows.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_commands_of_the_readme_run_on_a_small_dataset(tmp_path):
    # Larger than 200 px, as the paper's filter wants it.
    source = Scenes(64, seed=5, image_size_px=224)
    write_pairs(tmp_path, "captions", "train", source)
    write_pairs(tmp_path, "dev", "dev", Scenes(8, seed=6, image_size_px=224))
    Image.fromarray(np.asarray(source[0].image)).save(tmp_path / "cats.jpg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [
        command.replace("\\\n", " ")
        for block in readme_blocks("sh")
        for command in re.split(r"(?<!\\)\n", block.strip())
    ]
    verbs = []
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "align"
        verbs.append(words[1])
        words += SMALLER.split() if words[1] == "train" else []
        run = subprocess.run(
            [sys.executable, "-m", "align_jax.cli.main", *words[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stderr}"
    data_verbs = ["scan", "curate", "decontaminate", "pack", "bench"]
    use_verbs = ["convert", "embed", "classify", "index", "search", "search"]
    assert verbs == ["pack", "vocab", "train", "eval", *data_verbs, *use_verbs]
    assert (tmp_path / "embeddings/mine/00000.npy").exists()
    assert (tmp_path / "runs/mine/plots/gallery_dev.png").stat().st_size > 1000


def test_tree_names_every_folder_and_every_file_at_the_top_of_the_package():
    tree = (ROOT / "README.md").read_text().split("## Where is what")[1].split("```")[1]
    top = tree.split("  models/")[0].splitlines()
    names = {word for line in top for word in line[:36].split()} - {"align_jax/"}
    assert names == {path.stem for path in (ROOT / "align_jax").glob("*.py")}
    folders = {f"{path.parent.name}/" for path in (ROOT / "align_jax").rglob("__init__.py")}
    assert folders - {"presets/"} <= set(tree.replace(",", " ").split())
    for folder in re.findall(r"^ *(\w+)/", tree, re.MULTILINE):
        assert folder == "align_jax" or list(ROOT.glob(f"**/{folder}/")), folder
