"""Exports: what was written runs without align_jax and computes what the model does."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import onnx
import pytest
from helpers import environment, error_of
from PIL import Image

from align_jax import align, mesh
from align_jax.cli import main as cli
from align_jax.export import package, stablehlo
from align_jax.models import dual_encoder, lora

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
STABLEHLO, ONNX = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)

# After the example of docs/export.md: embeddings of given pixels and tokens, as files.
APPENDIX = """
given = np.load("given.npz")
for count in (1, 7):
    np.save(f"image{count}.npy", encode_pixels(given["images"][:count]))
    for length in (16, 64):
        arrays = (given[name][:count, :length] for name in ("ids", "mask"))
        np.save(f"text{count}x{length}.npy", encode_tokens(*arrays))
many = np.ones((1, 600), np.int32)
try:
    encode_tokens(many, many)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align.load(tiny_hf[0])


@pytest.fixture(scope="module")
def given(model):
    rng = np.random.default_rng(0)
    size, count = model.preprocessing.image_size, model.tokenizer.vocab_size
    return {
        "images": rng.integers(0, 256, (7, size, size, 3), np.uint8),
        "ids": rng.integers(0, count, (7, 64)).astype(np.int32),
        "mask": (np.arange(64) < rng.integers(1, 65, (7, 1))).astype(np.int32),
    }


@pytest.fixture(scope="module")
def folder(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    np.savez(folder / "given.npz", **given)
    Image.fromarray(given["images"][0]).resize((90, 60)).save(folder / "photo.jpg")
    return folder


def export(model_folder, out, form, capsys):
    assert cli.main(["export", "--model", str(model_folder), "--to", form, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"largest difference .*: image (\S+), text (\S+)", printed)
    return [float(number) for number in found.groups()]


def run_alone(code, folder):
    """Runs a program where align_jax cannot be imported; returns what it prints."""
    (folder / "alone.py").write_text("import sys\nsys.modules['align_jax'] = None\n" + code)
    command = [sys.executable, "alone.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_computed(folder, model, given, limit):
    variables = jax.device_get(model.variables)
    embed_image, embed_text = (
        jax.jit(lambda *inputs, embed=embed: embed(model.model, variables, *inputs))
        for embed in (dual_encoder.embed_image, dual_encoder.embed_text)
    )
    z_image = embed_image(given["images"])
    for count in (1, 7):
        found = np.load(folder / f"image{count}.npy")
        assert found.shape == (count, 32) and found.dtype == np.float32
        assert np.abs(found - z_image[:count]).max() <= limit
        for length in (16, 64):
            ids, mask = given["ids"][:, :length], given["mask"][:, :length]
            found = np.load(folder / f"text{count}x{length}.npy")
            assert found.shape == (count, 32) and found.dtype == np.float32
            assert np.abs(found - embed_text(ids, mask)[:count]).max() <= limit


def test_stablehlo_runs_alone_for_any_batch_and_length(model, given, folder, tiny_hf, capsys):
    differences = export(tiny_hf[0], folder / "exported" / "mine", "stablehlo", capsys)
    assert max(differences) <= 1e-6
    more = 'np.save("z.npy", encode_images(["photo.jpg"]))\n'
    more += 'np.save("t.npy", encode_texts(["a photo of a cat", "a mat"]))\n'
    printed = run_alone(STABLEHLO + more + APPENDIX, folder)
    assert printed == "600 tokens; the model has positions for 64.\n"
    assert_computed(folder, model, given, 1e-6)
    # From pictures and texts, by Pillow and tokenizers alone.
    photo = str(folder / "photo.jpg")
    np.testing.assert_allclose(np.load(folder / "z.npy"), model.encode_image([photo]), atol=1e-6)
    texts = model.encode_text(["a photo of a cat", "a mat"])
    np.testing.assert_allclose(np.load(folder / "t.npy"), texts, atol=1e-6)


def test_description_names_what_the_programs_take_and_give(model, folder, tiny_hf, capsys):
    out = folder / "described"
    export(tiny_hf[0], out, "stablehlo", capsys)
    about = json.loads((out / package.DESCRIPTION).read_text())
    assert about["fingerprint"] == model.fingerprint()
    assert about["temperature"] == model.temperature
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["dtype"] == "float32"
    for program in about["programs"].values():
        exported = jax.export.deserialize(bytearray((out / program["file"]).read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        for described, shapes in (
            (program["inputs"], exported.in_avals),
            (program["outputs"], exported.out_avals),
        ):
            for entry, shape in zip(described.values(), shapes, strict=True):
                assert [str(n) for n in shape.shape] == [str(n) for n in entry["shape"]]
                assert shape.dtype == entry["dtype"]


def test_onnx_runs_alone_for_any_batch_and_length(model, given, folder, tiny_hf, capsys):
    out = folder / "exported" / "onnx"
    assert max(export(tiny_hf[0], out, "onnx", capsys)) <= 1e-5
    printed = run_alone(ONNX + APPENDIX, folder)
    assert printed == "600 tokens; the model has positions for 64.\n"
    assert_computed(folder, model, given, 1e-5)
    about = json.loads((out / package.DESCRIPTION).read_text())
    for program in about["programs"].values():
        graph = onnx.load(out / program["file"]).graph
        for described, nodes in (
            (program["inputs"], graph.input),
            (program["outputs"], graph.output),
        ):
            for (name, entry), node in zip(described.items(), nodes, strict=True):
                kind = onnx.helper.tensor_dtype_to_np_dtype(node.type.tensor_type.elem_type)
                dims = node.type.tensor_type.shape.dim
                shape = [dim.dim_param or dim.dim_value for dim in dims]
                assert (node.name, kind, shape) == (name, entry["dtype"], entry["shape"])


def test_adapter_is_exported_as_part_of_the_kernels(model, folder):
    adapter = lora.Lora(2, 4.0, ("/query/kernel$", "/project/kernel$"))
    shapes = lora.with_shapes(adapter, model.variables["params"])["lora"]
    rng = np.random.default_rng(0)
    factors = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    variables = model.variables | {"params": model.variables["params"] | {"lora": factors}}
    adapted = align.Align(
        dataclasses.replace(model.model, lora=adapter),
        jax.device_put(variables, mesh.replicated(mesh.make_mesh())),
        model.tokenizer,
        model.preprocessing,
        mesh.make_mesh(),
        batch_size=8,
    )
    products = []
    for name, source in (("base", model), ("adapted", adapted)):
        assert max(stablehlo.write(source, folder / name).values()) <= 1e-6
        content = (folder / name / "text.stablehlo").read_bytes()
        text = jax.export.deserialize(bytearray(content)).mlir_module()
        products.append(text.count("stablehlo.dot_general"))
    assert products[0] == products[1] > 10


@pytest.mark.parametrize(("error", "code"), [(9e-5, 0), (2e-4, 1), (float("nan"), 1)])
def test_program_that_computes_something_else_fails_the_verb(
    tiny_hf, tmp_path, monkeypatch, capsys, error, code
):
    opened = stablehlo._open
    monkeypatch.setattr(stablehlo, "_open", lambda file: lambda *a: opened(file)(*a) + error)
    out = tmp_path / "out"
    arguments = ["export", "--model", str(tiny_hf[0]), "--to", "stablehlo", "--out", str(out)]
    assert cli.main(arguments) == code
    printed = capsys.readouterr()
    assert "largest difference" in printed.out
    if code:
        (line,) = printed.err.splitlines()
        assert re.fullmatch(r"align: .* image program differs .* more than 0\.0001.*", line)


def test_wrong_folder_and_missing_packages_are_one_line(tiny_hf, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    start = ("export", "--model", tiny_hf[0], "--to")
    error = error_of(capfd, *start, "onnx", "--out", "file")
    assert error == "file is a file; name a folder."
    error = error_of(capfd, *start, "stablehlo", "--out", tiny_hf[0])
    assert error.endswith("holds a model; name another folder.")
    (tmp_path / "vocabulary").mkdir()
    for name in ("tokenizer.json", "report.json"):
        (tmp_path / "vocabulary" / name).write_text("mine")
    error = error_of(capfd, *start, "stablehlo", "--out", "vocabulary")
    assert error == "vocabulary holds other files, report.json first; name a new folder."
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = error_of(capfd, *start, "onnx", "--out", "out")
    assert error == "--to onnx needs onnxscript; install it with `pip install 'align_jax[onnx]'`."
