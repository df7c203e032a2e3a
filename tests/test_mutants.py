"""experiments/mutants.py on a tree of two files: what is killed, what survives, what is stale."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "mutants.py"

CODE = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
TESTS = """
import code_of_mine

def test_double():
    assert code_of_mine.double(2) == 4

def test_triple():
    assert code_of_mine.triple(0) == 0
"""
LIST = """
[[mutant]]
name = "double_adds"
file = "code_of_mine.py"
before = "2 * x"
after = "2 + 3 * x"
tests = ["test_it.py"]

[[mutant]]
name = "triple_is_quadruple"
file = "code_of_mine.py"
before = "3 * x"
after = "4 * x"
tests = ["test_it.py -k double", "test_it.py -k triple"]

[[mutant]]
name = "gone"
file = "code_of_mine.py"
before = "5 * x"
after = "4 * x"
tests = ["test_it.py"]

[[mutant]]
name = "twice"
file = "code_of_mine.py"
before = "* x"
after = "+ x"
tests = ["test_it.py"]

[[mutant]]
name = "no_such_test"
file = "code_of_mine.py"
before = "2 * x"
after = "4 * x"
tests = ["test_it.py -k quadruple"]

[[mutant]]
name = "no_python"
file = "code_of_mine.py"
before = "2 * x"
after = "2 * x)"
tests = ["test_it.py"]
"""
EXPECTED = {
    "double_adds": "killed",
    "triple_is_quadruple": "survived",
    "gone": "stale",
    "twice": "stale",
    "no_such_test": "no tests",
    "no_python": "broken",
}


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "tree"
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "FOLDER", root / "mutants")
    (root / "mutants").mkdir(parents=True)
    (root / "mutants" / "list.toml").write_text(LIST)
    (root / "code_of_mine.py").write_text(CODE)
    (root / "test_it.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    return module


def run(module, monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr("sys.argv", ["mutants.py", "--work", str(tmp_path / "work"), *arguments])
    return module.main()


def test_mutants_are_killed_survive_or_are_named_for_what_they_are(
    mutants, monkeypatch, tmp_path, capsys
):
    assert run(mutants, monkeypatch, tmp_path) == 1
    results = json.loads((mutants.FOLDER / "results.json").read_text())
    assert {name: result["status"] for name, result in results.items()} == EXPECTED
    assert results["double_adds"]["by"] == "test_it.py::test_double"
    printed = capsys.readouterr().out
    assert "| double_adds | code_of_mine.py | killed | `test_double` |" in printed
    assert "6 mutants: 2 stale, 1 killed, 1 survived, 1 no tests, 1 broken." in printed
    assert (mutants.ROOT / "code_of_mine.py").read_text() == CODE
    assert (tmp_path / "work" / "copy0" / "code_of_mine.py").read_text() == CODE

    # Again: nothing is run but what changed.
    monkeypatch.setattr(mutants, "run_tests", lambda *args: pytest.fail("ran again"))
    assert run(mutants, monkeypatch, tmp_path) == 1
    text = (mutants.FOLDER / "list.toml").read_text()
    (mutants.FOLDER / "list.toml").write_text(text.replace("2 + 3 * x", "5 * x"))
    monkeypatch.setattr(mutants, "run_tests", lambda *args: ("killed", "again", 0.0))
    assert run(mutants, monkeypatch, tmp_path, "--only", "double") == 1
    results = json.loads((mutants.FOLDER / "results.json").read_text())
    assert results["double_adds"]["by"] == "again"


def test_list_of_this_project_is_well_formed_and_applies():
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed = module.read_list(module.FOLDER / "list.toml")
    assert len(listed) >= 100
    for mutant in listed:
        assert mutant.keys() == {"name", "file", "before", "after", "tests"}
        assert mutant["tests"] and mutant["file"].startswith("align_jax/")
    # Code that has moved on takes its faults along.
    assert [m["name"] for m in listed if module.mutate(module.ROOT, m) is None] == []
