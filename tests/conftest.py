"""Eight fake CPU devices for every test; helpers that several test files need."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real pairs; tests that ask for it are skipped where there is none."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("ALIGN_JAX_REAL_DATA", beside))
    if not folder.is_dir():
        pytest.skip("real data not found; set ALIGN_JAX_REAL_DATA to its folder")
    return folder
