"""Kills of `align index add`: the rerun of the command ends with the same rows."""

import random
import signal
import time

import pytest
from helpers import environment, start_align
from search_helpers import rows_of

import align_jax
from align_jax import align
from align_jax.search import ingest
from align_jax.search.index import Index


@pytest.mark.slow
def test_killed_runs_end_with_the_rows_of_an_undisturbed_one(project, tmp_path):
    model = align.load(project / "run")
    spec = "scenes?size=1500&seed=4"
    with align_jax.open_index(tmp_path / "whole", model) as index:
        ingest.add(index, model, spec, kind="both")
    add = ("index", "add", spec, "--model", project / "run", "--index", "killed", "--kind", "both")
    env = environment(cache=tmp_path / "cache")
    random.seed(0)
    kills = 0
    for _ in range(30):
        process = start_align(*add, cwd=tmp_path, env=env)
        data = tmp_path / "killed" / "milvus.db" / "collections"
        deadline = time.monotonic() + 120
        while not data.is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 4))
        if process.poll() is not None or kills == 5:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert kills
    whole, killed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    with Index(str(tmp_path / "killed")) as index:
        assert index.count() == len(whole)
    assert {key: row for key, (row, _) in killed.items()} == {
        key: row for key, (row, _) in whole.items()
    }
