"""Limits that nothing else shows: distances and clusters of near-duplicates, packed files."""

import io

import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from pyarrow import parquet

from align_jax.curate.near_duplicates import search
from align_jax.curate.near_duplicates.decontaminate import decontaminate
from align_jax.curate.pack.pack import pack
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record


def bits(count):
    return f"{2**count - 1:016x}"


@pytest.mark.parametrize(("against", "limit"), [(True, 8), (False, 4)])
def test_hashes_match_up_to_the_documented_distance(tmp_path, monkeypatch, against, limit):
    monkeypatch.chdir(tmp_path)
    far = "f" * 16  # a second group, so that the two of the first are not joined by a chain
    table = {"key": ["near", "zero"], "phash": [bits(limit), "0" * 16]}
    beyond = {"key": ["far", "zero"], "phash": [bits(limit + 1), "0" * 16]}
    for name, rows in (("near", table), ("beyond", beyond)):
        if against:
            parquet.write_table(pa.table({"key": ["x"], "phash": ["0" * 16]}), f"{name}-x.parquet")
            rows = {"key": [rows["key"][0], "other"], "phash": [rows["phash"][0], far]}
        parquet.write_table(pa.table(rows), f"{name}.parquet")
    matches = {
        name: decontaminate(f"{name}.parquet", [f"{name}-x.parquet"] if against else [], name)
        for name in ("near", "beyond")
    }
    assert matches["near"]["max_distance"] == limit
    assert [matches[name]["dropped"] for name in ("near", "beyond")] == [1, 0]


def test_cosine_and_buckets_are_those_of_the_paper():
    # Jia et al. 2021, appendix A: cosine above 0.975, 4096 clusters, 10 nearest, triples.
    assert (search.MIN_COSINE, search.NUM_NEAREST, search.NUM_SHARED) == (0.975, 10, 3)


@pytest.mark.parametrize(
    ("images", "clusters"), [(5_000, 20), (1_024_000, 4096), (2_000_000, 4096)]
)
def test_number_of_clusters_grows_with_the_images_up_to_the_papers(monkeypatch, images, clusters):
    asked = []
    monkeypatch.setattr(search, "_EXACT_COMPARISONS", 1)
    monkeypatch.setattr(search, "bucket_pairs", lambda *args: asked.append(args[3]))
    search.embedding_pairs(np.zeros((images, 1), np.float32), None)
    assert asked == [clusters]


def test_kmeans_equals_eight_passes_of_lloyd():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1200, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    found = search.kmeans(z, 20, seed=3)
    rng = np.random.default_rng(3)
    rng.choice(1200, 1200, replace=False)
    centroids = z[np.sort(rng.choice(1200, 20, replace=False))].astype(np.float64)
    for _ in range(8):
        before, labels = centroids.copy(), (z @ centroids.T).argmax(1)
        for cluster in set(labels):
            mean = z[labels == cluster].astype(np.float64).mean(0)
            centroids[cluster] = mean / np.linalg.norm(mean)
    assert np.abs(centroids - before).max() > 1e-3  # it had not come to rest before
    np.testing.assert_allclose(found, centroids, atol=1e-5)


def noise(seed, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return pixels, file.getvalue()


def test_packed_records_are_read_one_by_one(tmp_path):
    records = [Record(f"{i}", noise(i)[1], ("a",)) for i in range(3)]
    pack(InMemory(records), tmp_path / "out")
    (shard,) = tmp_path.rglob("*.array_record*")
    reader = ArrayRecordReader(str(shard))
    assert "group_size:1," in f"{reader.writer_options_string()},"
    reader.close()


def test_shrunk_images_are_bicubic_jpegs_of_quality_95(tmp_path):
    pixels, data = noise(0)
    pack(InMemory([Record("0", data, ("a",))]), tmp_path / "out", resize_px=30)
    expected = io.BytesIO()
    small = Image.fromarray(pixels).resize((45, 30), Image.Resampling.BICUBIC)
    small.save(expected, "JPEG", quality=95)
    assert open_source(str(tmp_path / "out"))[0].image == expected.getvalue()
