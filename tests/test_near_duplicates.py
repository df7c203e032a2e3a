"""perceptual_hash.py, clusters.py, near_duplicates/search.py: exact and bucketed search, groups."""

import io
import zipfile

import imagehash
import numpy as np
import pytest
from helpers import real_data
from PIL import Image

from align_jax.curate import clusters as clusters_module
from align_jax.curate.clusters import Clusters, find_clusters
from align_jax.curate.near_duplicates import search as near_duplicates
from align_jax.data import perceptual_hash as phash_module
from align_jax.data.perceptual_hash import hamming_pairs, parse_hashes, phash


def made_images():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:90, :130]
    ramp = np.stack([x, y, x + y], axis=-1).astype(np.uint8)
    return {
        "black": np.zeros((50, 60, 3), np.uint8),
        "white": np.full((33, 31, 3), 255, np.uint8),
        "diagonal": np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2) * 255,
        "ramp": ramp,
        "stripes": ((x // 7 % 2) * 200).astype(np.uint8)[..., None].repeat(3, 2),
        "noise": rng.integers(0, 256, (40, 41, 3), np.uint8),
        "thin": rng.integers(0, 256, (2, 900, 3), np.uint8),
        "32 px": rng.integers(0, 256, (32, 32, 3), np.uint8),
    }


@pytest.mark.parametrize("name", made_images())
def test_phash_of_made_images_equals_imagehash(name):
    image = made_images()[name]
    assert phash(image) == str(imagehash.phash(Image.fromarray(image)))


@pytest.mark.parametrize("archive", ["flickr8k/dev.zip", "imagenet_sample/images.zip"])
def test_phash_of_real_files_equals_imagehash(archive):
    with zipfile.ZipFile(real_data(archive)) as opened:
        names = [name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        files = [opened.read(name) for name in names[:300]]
    for data in files:
        image = Image.open(io.BytesIO(data))
        assert phash(np.asarray(image.convert("RGB"))) == str(imagehash.phash(image))


def test_parse_hashes_keeps_the_order_of_bits():
    hashes = parse_hashes(["8000000000000001", "00000000000000ff"])
    assert hashes.tolist() == [2**63 + 1, 255]
    assert parse_hashes([]).shape == (0,)


@pytest.mark.parametrize("wrong", ["12", "zz00000000000000", "0" * 17, "0" * 15 + " "])
def test_parse_hashes_of_another_form_names_the_value(wrong):
    with pytest.raises(ValueError, match=f"^'{wrong}' is no perceptual hash; one has 16 hex"):
        parse_hashes(["0" * 16, wrong, "0" * 15])


def near_hashes(count, seed):
    """Random hashes, each followed by a copy with 0 to 18 other bits, and some equal ones."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    for row in range(0, count, 2):
        flipped = hashes[row]
        for bit in rng.choice(64, rng.integers(0, 19), replace=False):
            flipped ^= np.uint64(1) << np.uint64(bit)
        hashes[row + 1] = flipped
    hashes[:12] = 0
    return hashes[rng.permutation(count)]


@pytest.mark.parametrize("distance", range(17))
def test_hamming_pairs_equal_comparing_all(distance):
    hashes = near_hashes(700, seed=distance)
    left, right = hashes[:500], hashes[450:]
    all_distances = np.bitwise_count(left[:, None] ^ right)
    i, j = np.nonzero(all_distances <= distance)
    found = hamming_pairs(left, right, distance)
    np.testing.assert_array_equal(found, (i, j, all_distances[i, j]))
    assert len(i) > 60


def test_hamming_pairs_in_small_blocks_are_the_same(monkeypatch):
    hashes = near_hashes(300, seed=1)
    whole = hamming_pairs(hashes, hashes, 6)
    monkeypatch.setattr(phash_module, "_CANDIDATES", 5)
    np.testing.assert_array_equal(hamming_pairs(hashes, hashes, 6), whole)


def test_hamming_pairs_of_no_hashes_are_none():
    none = np.zeros(0, np.uint64)
    assert [len(part) for part in hamming_pairs(none, none, 4)] == [0, 0, 0]


def test_hamming_pairs_beyond_use_say_what_to_change(monkeypatch):
    monkeypatch.setattr(phash_module, "MAX_PAIRS", 1000)
    with pytest.raises(ValueError, match="^More than 1,000 pairs of images are within distance 2"):
        hamming_pairs(np.zeros(60, np.uint64), np.zeros(60, np.uint64), 2)
    with pytest.raises(ValueError, match="^--max-distance 17 must be 0 to 16 of the 64 bits.$"):
        hamming_pairs(np.zeros(60, np.uint64), np.zeros(60, np.uint64), 17)


def clustered_embeddings(count, dim, seed, num_topics=150):
    """Unit vectors around topics; every 20th is a near copy of the one before."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(num_topics, dim))
    z = topics[rng.integers(0, num_topics, count)] + 0.8 * rng.normal(size=(count, dim))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    copies = np.arange(1, count, 20)
    angles = rng.uniform(0.0, 0.3, len(copies))[:, None]  # cosine 1 to 0.955
    aside = rng.normal(size=(len(copies), dim))
    aside -= (aside * z[copies - 1]).sum(1, keepdims=True) * z[copies - 1]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    z[copies] = np.cos(angles) * z[copies - 1] + np.sin(angles) * aside
    return z.astype(np.float32)


@pytest.mark.parametrize("block", [2**24, 4000])
def test_all_pairs_equal_one_matrix(monkeypatch, block):
    monkeypatch.setattr(near_duplicates, "_BLOCK_COSINES", block)
    z = clustered_embeddings(600, 24, seed=0)
    cosines = z @ z.T
    i, j = np.nonzero(np.triu(cosines > 0.975, 1))
    found = near_duplicates.embedding_pairs(z, None)
    np.testing.assert_array_equal(found[:2], (i, j))
    np.testing.assert_allclose(found[2], cosines[i, j], rtol=1e-6)
    assert len(i) > 10
    i, j = np.nonzero(cosines[:200, 150:] > 0.9)
    found = near_duplicates.embedding_pairs(z[:200], z[150:], 0.9)
    np.testing.assert_array_equal(found[:2], (i, j))


def test_bucket_pairs_are_true_and_nearly_all(monkeypatch):
    z = clustered_embeddings(4000, 48, seed=1)
    for most in (4096, 30):  # the second looks up 125 clusters through 11
        monkeypatch.setattr(clusters_module, "_MOST_COMPARED", most)
        exact = near_duplicates.all_pairs(z, None, 0.975)
        bucketed = near_duplicates.bucket_pairs(z, None, 0.975, num_clusters=125)
        pairs = [set(zip(*found[:2], strict=True)) for found in (exact, bucketed)]
        assert pairs[1] <= pairs[0] and len(bucketed[0]) == len(pairs[1])
        assert len(pairs[0]) > 100
        assert len(pairs[1]) >= 0.98 * len(pairs[0])
        exact = near_duplicates.all_pairs(z[:2500], z[1500:], 0.975)
        bucketed = near_duplicates.bucket_pairs(z[:2500], z[1500:], 0.975, num_clusters=78)
        pairs = [set(zip(*found[:2], strict=True)) for found in (exact, bucketed)]
        assert pairs[1] <= pairs[0] and len(pairs[1]) >= 0.98 * len(pairs[0]) > 900


def test_candidates_have_the_nearest_cluster_of_one_among_those_of_the_other():
    z = clustered_embeddings(300, 16, seed=2)
    clusters = find_clusters(z, 20, seed=0)
    nearest = clusters.nearest(z, 3)
    found = near_duplicates._compare(z, nearest, z, nearest[:, 0], -1.0)
    pairs = [pair for i, j, _ in found for pair in zip(i.tolist(), j.tolist(), strict=True)]
    wanted = {(i, j) for i in range(300) for j in range(300) if nearest[j, 0] in nearest[i]}
    assert len(pairs) == len(wanted) and set(pairs) == wanted


def test_candidates_of_an_image_stay_as_many_however_many_images(monkeypatch):
    monkeypatch.setattr(clusters_module, "_MOST_COMPARED", 100)
    candidates = []
    for count in (1600, 6400):
        z = clustered_embeddings(count, 16, seed=count)
        clusters = find_clusters(z, count // 32, seed=0)
        nearest = clusters.nearest(z, near_duplicates.NUM_NEAREST)
        sizes = np.bincount(nearest[:, 0], minlength=count // 32)
        candidates.append(sizes[nearest].sum() / count)
    assert 0.5 < candidates[1] / candidates[0] < 2 and max(candidates) < 600


def test_clusters_of_clusters_find_nearly_the_nearest(monkeypatch):
    z = clustered_embeddings(3000, 16, seed=9)
    centroids = clustered_embeddings(400, 16, seed=10)
    exact = Clusters(centroids, 0).nearest(z, 8)
    expected = np.argsort(-(z.astype(np.float64) @ centroids.T), axis=1)[:, :8]
    np.testing.assert_array_equal(exact, expected)
    monkeypatch.setattr(clusters_module, "_MOST_COMPARED", 100)
    probed = Clusters(centroids, 0).nearest(z, 8)
    assert all(len(set(row)) == 8 for row in probed.tolist())
    assert (probed[:, 0] == exact[:, 0]).mean() > 0.95


def test_embedding_pairs_beyond_exact_search_use_buckets(monkeypatch):
    z = clustered_embeddings(2500, 16, seed=3)
    exact = near_duplicates.embedding_pairs(z, None)
    monkeypatch.setattr(near_duplicates, "_EXACT_COMPARISONS", 1e6)
    monkeypatch.setattr(near_duplicates, "all_pairs", None)
    first = near_duplicates.embedding_pairs(z, None)
    assert 0.95 * len(exact[0]) <= len(first[0]) <= len(exact[0])
    again = near_duplicates.embedding_pairs(z, None)
    np.testing.assert_array_equal(first, again)


def test_kmeans_finds_separate_clusters_and_is_seeded():
    centres = np.eye(6, 16, dtype=np.float32)
    z = np.repeat(centres, 50, axis=0) + 0.01
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    centroids = find_clusters(z, 24, seed=1).centroids
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    assert ((z @ centroids.T).max(axis=1) > 0.999).all()
    again = find_clusters(z, 24, seed=1).centroids
    np.testing.assert_array_equal(centroids, again)
    assert not np.array_equal(centroids, find_clusters(z, 24, seed=2).centroids)
    with pytest.raises(ValueError, match="^5 embeddings cannot make 6 clusters.$"):
        find_clusters(z[:5], 6, seed=0)


def test_too_many_similar_embeddings_say_what_to_change(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 1000)
    z = np.ones((80, 4), np.float32) / 2
    with pytest.raises(ValueError, match="^More than 500 pairs of images have a cosine above 0.9;"):
        near_duplicates.embedding_pairs(z, None, 0.9)


def test_first_of_groups_follows_chains():
    first = near_duplicates.first_of_groups(7, np.array([5, 1, 6]), np.array([3, 5, 2]))
    assert first.tolist() == [0, 1, 2, 1, 4, 1, 2]
    none = np.zeros(0, np.int64)
    assert near_duplicates.first_of_groups(3, none, none).tolist() == [0, 1, 2]


def test_the_papers_threshold():
    # Jia et al. 2021, appendix A: near-duplicates above a cosine of 0.975.
    assert near_duplicates.MIN_COSINE == 0.975


@pytest.mark.parametrize(
    ("num_left", "num_right", "clusters"),
    [
        (141_421, None, None),  # 2e10 comparisons at most: exact
        (141_422, None, 4_419),  # one for each 32 images
        (4_000_000, 5_000, None),
        (4_000_001, 5_000, 125_000),
        (1_000_000, None, 31_250),
        (640_000, 200_000, 20_000),  # of the larger set
        (200_000, 640_000, 20_000),
    ],
)
def test_search_is_exact_up_to_2e10_comparisons_then_in_buckets(
    monkeypatch, num_left, num_right, clusters
):
    calls = []
    monkeypatch.setattr(near_duplicates, "all_pairs", lambda *a: calls.append((a[2], None)))
    monkeypatch.setattr(near_duplicates, "bucket_pairs", lambda *a: calls.append(a[2:4]))
    left = np.broadcast_to(np.float32(1), (num_left, 1))
    right = None if num_right is None else np.broadcast_to(np.float32(1), (num_right, 1))
    near_duplicates.embedding_pairs(left, right)
    assert calls == [(0.975, clusters)]


def test_embedding_pairs_exclude_the_threshold():
    z = np.eye(2, dtype=np.float32)
    cosines = np.array([0.9751, 0.975, 0.9749], np.float32)
    other = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    i, j, found = near_duplicates.embedding_pairs(z[:1], other)
    assert (i.tolist(), j.tolist(), found.tolist()) == ([0], [0], [cosines[0]])
    i, j, _ = near_duplicates.embedding_pairs(other, z[:1], float(cosines[2]))
    assert i.tolist() == [0, 1] and j.tolist() == [0, 0]
    with pytest.raises(ValueError, match="^--min-cosine 1.0 must lie between 0 and 1, e.g. 0.975"):
        near_duplicates.embedding_pairs(z, None, 1.0)


def slow_kmeans(z, num_clusters, seed, passes):
    """Lloyd's algorithm on cosines, one embedding after another, in float64."""
    chosen = np.random.default_rng(seed).choice(len(z), num_clusters, replace=False)
    z = z.astype(np.float64)
    centroids = z[np.sort(chosen)].copy()
    for _ in range(passes):
        members = [[] for _ in range(num_clusters)]
        for row in z:
            members[int(np.argmax(centroids @ row))].append(row)
        for cluster, rows in enumerate(members):
            if rows:
                total = np.sum(rows, axis=0)
                centroids[cluster] = total / np.linalg.norm(total)
    return centroids


def test_kmeans_makes_four_passes_over_all_embeddings(monkeypatch):
    monkeypatch.setattr(clusters_module, "_BLOCK_COSINES", 4000)  # several blocks
    z = clustered_embeddings(2000, 8, seed=6, num_topics=300)
    made = find_clusters(z, 20, seed=3).centroids
    np.testing.assert_allclose(made, slow_kmeans(z, 20, 3, passes=4), atol=1e-5)
    for passes in (3, 5):  # it has not converged, so that the number is seen
        assert np.abs(made - slow_kmeans(z, 20, 3, passes)).max() > 1e-3


def test_kmeans_leaves_an_empty_cluster_where_it_was():
    z = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    made = find_clusters(z, 8, seed=0).centroids
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-6)
    assert set(map(tuple, made.tolist())) <= set(map(tuple, np.eye(3).tolist()))


def test_pairs_are_counted_once_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 100)
    found = near_duplicates._Found(0.9)
    row = np.arange(50)
    for _ in range(5):  # each pair again and again
        found.add(row, row + 1, np.ones(50, np.float32))
    i, j, cosine = found.in_order()
    assert i.tolist() == row.tolist() and j.tolist() == (row + 1).tolist() and len(cosine) == 50
    with pytest.raises(ValueError, match="^More than 50 pairs of images have a cosine above 0.9;"):
        found.add(np.arange(51), np.arange(51) + 1, np.ones(51, np.float32))  # the 51st pair


def test_limits_of_the_search():
    assert phash_module.MAX_DISTANCE == 16
    assert phash_module.MAX_PAIRS == near_duplicates.MAX_PAIRS == 20_000_000
