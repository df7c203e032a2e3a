"""The shape of the code base: imports go down the layers, few jit sites, small modules."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower layers never import higher ones (design 2). A folder stands for its files.
ORDER = (
    ("storage", "trees"),
    ("data", "mesh"),
    ("models", "losses", "ring_loss"),
    ("config",),
    ("config_checks",),
    ("hf", "optim", "state"),
    ("run", "train_step"),
    ("encode",),
    ("evals",),
    ("align",),
    ("embed",),
    ("curate", "search"),
    ("train",),
    ("plan", "serve", "export"),
    ("cli",),
)
LAYERS = {part: level for level, parts in enumerate(ORDER) for part in parts}

# third-party package -> the only places that may import it
ONLY_IN = {
    "flax": ("models",),
    "orbax": ("run/checkpoint.py",),
    "optax": ("optim.py", "train_step.py", "state.py"),
    "grain": ("data", "curate"),
    "tensorflow_datasets": ("data", "curate"),
    "array_record": ("data", "curate"),
    "tokenizers": ("data/tokenizer.py",),
    "ibis": ("curate",),
    "apache_beam": ("curate",),
    "matplotlib": ("run/plots.py", "evals", "curate"),
    "tensorboard": ("run/metrics.py",),
    "huggingface_hub": ("hf",),
    "tensorflow": (),
    "torch": ("export/onnx.py",),
    "onnxruntime": ("export/onnx.py",),
    "transformers": ("hf", "data/tokenizer.py"),
    "safetensors": ("hf",),
    "pymilvus": ("search/milvus.py",),
    "milvus_lite": ("search/milvus.py",),
    "h11": ("serve",),
    "msgspec": ("serve",),
    "prometheus_client": ("serve",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
}

# Who may open files itself: all else that a user wrote goes through storage/text.py.
OPENS = {
    "curate/filter/curate.py": "reports written here",
    "storage/user_code.py": "Python code, for Python",
    "curate/filter/stages.py": "arrays written here",
    "curate/filter/presets/__init__.py": "Python code, for Python",
    "curate/near_duplicates/decontaminate.py": "writes",
    "curate/near_duplicates/image_sets.py": "manifests written here",
    "curate/pack/finish.py": "results of units, written here",
    "curate/pack/key_lists.py": "writes",
    "curate/pack/pack.py": "a lock",
    "curate/pack/unit.py": "writes",
    "curate/parts.py": "parts written here",
    "data/images.py": "bytes of images",
    "data/read_ahead.py": "shared memory",
    "data/sources/archives.py": "bytes of archives and files",
    "data/sources/entry_file.py": "indexes written here",
    "data/sources/img2dataset.py": "statistics of img2dataset",
    "data/tokenizer.py": "tokenizer folders, written by transformers or here",
    "data/vocabulary.py": "counts written here",
    "embed.py": "manifests written here",
    "export/stablehlo.py": "programs written here",
    "hf/convert.py": "Hugging Face folders",
    "hf/hub.py": "Hugging Face folders",
    "hf/processor.py": "Hugging Face folders",
    "hf/weights.py": "Hugging Face folders",
    "models/native.py": "its own source, and what the system says of the processor",
    "run/init_from.py": "Hugging Face folders",
    "run/metrics.py": "metrics written here",
    "run/workdir.py": "workdirs written here",
    "serve/app.py": "the page, part of the package",
    "storage/identity.py": "bytes to hash",
    "storage/text.py": "the door",
    "storage/writing.py": "the other door",
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_is_small_and_imports_only_what_its_layer_may(path):
    assert len(path.read_text().splitlines()) <= 500
    part = part_of(path)
    for name in imports(path):
        top = name.split(".")[0]
        if top in ONLY_IN:
            place = path.relative_to(PACKAGE).as_posix()
            allowed = ONLY_IN[top]
            assert any(place == a or place.startswith(f"{a}/") for a in allowed), (place, top)
        if top == "align_jax" and part != "__init__":
            target = name.split(".")[1]
            if target.startswith("__"):
                continue
            if target != part:
                assert LAYERS[target] <= LAYERS[part], f"{part} imports {target}, a higher layer"
    assert "configs" not in {name.split(".")[0] for name in imports(path)}


def test_only_data_light_modules_are_free_of_jax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not any(name.split(".")[0] == "jax" for name in imports(path)), path.name


def test_what_trains_is_jitted_in_one_place_and_only_rankings_and_embeddings_elsewhere():
    sites = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit", "pmap")
    }
    exports = {"export/package.py", "export/stablehlo.py"}
    sites -= exports | {"run/nans.py"}  # which runs a step of train_step.py once more
    assert sites == {"train_step.py", "encode.py", "evals/ranking.py", "evals/top_k.py"}


def test_mesh_axis_names_are_written_in_mesh_only():
    for path in MODULES:
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value == "fsdp"
        }
        assert not strings or path.name == "mesh.py", path.name


def test_layers_table_names_every_module():
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts <= set(LAYERS)


def test_public_functions_and_classes_have_docstrings():
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no module docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing


def test_text_of_users_is_opened_at_its_door_only():
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name == "open" or name.endswith((".read_text", ".read_bytes")):
                assert place in OPENS or name == "text.read_text", f"{place}:{node.lineno}"
            if place.startswith(("data/sources", "curate/filter", "evals", "cli")):
                assert not name.endswith(("csv.DictReader", "csv.field_size_limit")), place


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_function_has_types_on_its_parameters_and_result(path):
    place = path.relative_to(PACKAGE).as_posix()
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            untyped = [arg.arg for arg in given if arg and not arg.annotation]
            untyped = [name for name in untyped if name not in ("self", "cls")]
            if untyped or (node.returns is None and node.name != "__init__"):
                missing.append(f"{place}:{node.lineno} {node.name} {untyped}")
    assert not missing


# Files are written by storage/writing.py. What else opens one for writing, and why it may:
WRITERS = {
    "storage/writing.py": "the one door",
    "run/metrics.py": "appends lines, and TensorBoard's records, to files that grow",
    "data/vocabulary.py": "sorted runs in a temporary folder",
    "curate/filter/engines.py": "tables of the engine in the spill folder, gone at the end",
    "curate/pack/key_lists.py": "arrays in the staging folder of a pack, made again if unfinished",
}
LIBRARY_CALLS = {"write_table", "ParquetWriter", "savez", "save_file", "savefig"}


def writing_calls(tree: ast.Module) -> list[str]:
    """Calls that put a file at a path which is not that of writing.replacing or temporary_path."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, arguments = node.func, [*node.args, *(k.value for k in node.keywords)]
        name = getattr(function, "attr", getattr(function, "id", ""))
        owner = function.value if isinstance(function, ast.Attribute) else None
        names = {a.id for a in ast.walk(ast.Tuple(node.args)) if isinstance(a, ast.Name)}
        beside = names & {"temporary", "file"}
        modes = [a.value for a in arguments if isinstance(a, ast.Constant)]
        if name == "open" and any(isinstance(m, str) and re.fullmatch("[wax]b?", m) for m in modes):
            found += [] if beside else [f"{node.lineno}: open for writing"]
        elif name in {"replace", "rename", "renames"}:
            # str.replace takes two strings, dataclasses.replace keywords; os.replace two paths
            if isinstance(owner, ast.Name) and owner.id == "os":
                found.append(f"{node.lineno}: os.{name}")
        elif name in {"write_text", "write_bytes"}:
            if not (isinstance(owner, ast.Name) and owner.id == "writing"):
                found.append(f"{node.lineno}: {name}")
        elif name in LIBRARY_CALLS and not beside and getattr(owner, "id", "") != "writer":
            found.append(f"{node.lineno}: {name}")
    return found


def test_files_are_written_by_one_door():
    found = {
        path.relative_to(PACKAGE).as_posix(): calls
        for path in MODULES
        if (calls := writing_calls(ast.parse(path.read_text())))
    }
    assert not {path: calls for path, calls in found.items() if path not in WRITERS}
    assert set(WRITERS) <= set(found), "an entry of WRITERS that is not needed any more"


def test_calls_that_write_are_seen():
    seen = [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "os.replace(a, b)",
        "path.write_text('x')",
        "Path(p).write_bytes(b'')",
        "figure.savefig(path)",
        "pq.write_table(table, path + '.tmp')",
    ]
    for code in seen:
        assert len(writing_calls(ast.parse(code))) == 1, code
    for code in (
        "open(path)",
        "open(temporary, 'wb')",
        "writing.write_text(path, 'x')",
        "name.replace('w', 'a')",
        "pq.write_table(table, temporary)",
    ):
        assert not writing_calls(ast.parse(code)), code
