"""DataComp's text_based and image_based, intersections of presets."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import read, write_preset

from align_jax.curate.clusters import find_clusters
from align_jax.curate.filter import curate, image_clusters, wordnet
from align_jax.curate.filter.presets import load_preset
from align_jax.data.sources.record import hash_key
from align_jax.storage import writing

INDEX = {
    "noun": [
        "dog n 2 1 @ 2 1 02084071 10114209",
        "box n 1 0 1 0 02883344",
        "man n 1 0 1 0 10287213",
    ]
    + ["fish n 1 0 1 0 02512053", "axis n 1 0 1 0 13867492", "run n 1 0 1 0 00558883"],
    "verb": ["run v 2 1 @ 2 1 01926311 02075049", "like v 1 0 1 0 01777210"],
    "adj": ["red a 1 0 1 0 00381097", "nice a 1 0 1 0 01586752"],
    "adv": ["nicely r 1 0 1 0 00157541"],
}
EXCEPTIONS = {"noun": ["axes axis ax"], "verb": ["ran run"], "adj": [], "adv": []}


def write_wordnet(folder):
    folder.mkdir()
    for part, lines in INDEX.items():
        licence = "  1 This software and database is being provided to you\n"
        (folder / f"index.{part}").write_text(licence + "".join(f"{line}  \n" for line in lines))
        (folder / f"{part}.exc").write_text("".join(f"{line}\n" for line in EXCEPTIONS[part]))
    return folder


def test_words_are_looked_up_as_nltk_does(tmp_path):
    first = wordnet.WordNet(write_wordnet(tmp_path / "wn")).first_synset
    wanted = {
        "Dogs": 2084071,  # lower case, one ending
        "boxes": 2883344,
        "men": 10287213,
        "axes": 13867492,  # an exception; the second form is not there
        "run": 558883,  # a noun comes before a verb
        "ran": 1926311,
        "liking": 1777210,
        "nicest": 1586752,
        "nicely": 157541,
        "dog,": None,
        "xyz": None,
    }
    assert {word: first(word) for word in wanted} == wanted


def test_nltk_finds_the_same_synsets(tmp_path):
    corpus = pytest.importorskip("nltk.corpus.reader.wordnet")
    reader = object.__new__(corpus.WordNetCorpusReader)
    first = wordnet.WordNet(write_wordnet(tmp_path / "wn"))
    pos = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
    reader._lemma_pos_offset_map = {}
    for part, lines in first._first.items():
        for lemma, offset in lines.items():
            reader._lemma_pos_offset_map.setdefault(lemma, {})[pos[part]] = [offset]
    reader._exception_map = {pos[part]: forms for part, forms in first._exceptions.items()}
    for word in ("dogs", "boxes", "men", "axes", "ran", "liking", "nicest", "fishes", "redder"):
        found = [
            reader._lemma_pos_offset_map[form][p][0]
            for p in "nvar"
            for form in reader._morphy(word, p)
        ]
        assert first.first_synset(word) == next(iter(found), None), word


def test_texts_with_a_listed_synset_stay(tmp_path):
    folder = write_wordnet(tmp_path / "wn")
    (tmp_path / "wnids.txt").write_text("n02084071\nn02883344\n")
    texts = ["two Dogs", "a man", "boxes of it", "hound dog,"]
    pq.write_table(pa.table({"key": list("abcd"), "text": texts}), tmp_path / "t.parquet")
    preset = write_preset(tmp_path / "p.py", "text_based()")
    files = {"wordnet": str(folder), "wnids": str(tmp_path / "wnids.txt")}
    curate.curate(str(tmp_path / "t.parquet"), tmp_path / "out", preset=preset, files=files)
    assert [row["key"] for row in read(tmp_path / "out" / "kept.parquet")] == ["a", "c"]
    with pytest.raises(ValueError, match="needs --file wnids=PATH"):
        curate.curate(str(tmp_path / "t.parquet"), tmp_path / "o", preset=preset)
    (tmp_path / "wnids.txt").write_text("n02084071\ndog\n")
    with pytest.raises(ValueError, match=r"wnids.txt:2: 'dog' is no wnid"):
        curate.curate(str(tmp_path / "t.parquet"), tmp_path / "o", preset=preset, files=files)


def write_embeddings(folder, keys, z, model="m"):
    folder.mkdir()
    manifest = {"kind": "image", "model": model, "file_format": "npy"}
    writing.write_json(folder / "manifest.json", manifest)
    half = len(keys) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        np.save(folder / f"{number:05d}.npy", z[part])
        content = {"rows": len(keys[part]), "skipped": [], "keys": keys[part]}
        writing.write_json(folder / f"{number:05d}.json", content)
    return str(folder)


def test_images_in_clusters_of_targets_stay(tmp_path):
    # Five bundles of directions; targets lie in two of them.
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:5]
    bundle = np.arange(60) % 5
    z = centres[bundle] + 0.05 * rng.normal(size=(60, 16))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    targets = (centres[[1, 3, 3]] + 0.05 * rng.normal(size=(3, 16))).astype(np.float32)
    keys = [f"k{n}" for n in range(60)]
    files = {
        "embeddings": write_embeddings(tmp_path / "pool", keys, z),
        "targets": write_embeddings(tmp_path / "targets", ["x", "y", "z"], targets),
    }
    table = {"key": [*keys, "none"], "text": ["a text of it"] * 61}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    preset = write_preset(tmp_path / "p.py", "image_based(clusters=12)")
    curate.curate(str(tmp_path / "t.parquet"), tmp_path / "out", preset=preset, files=files)
    kept = [row["key"] for row in read(tmp_path / "out" / "kept.parquet")]
    # Independently: clusters as they are found, then both steps image by image.
    centroids = find_clusters(z, 12, 0, num_passes=20).centroids
    near = {int(np.argmax([t @ c for c in centroids])) for t in targets}
    wanted = [k for k, one in zip(keys, z, strict=True) if int(np.argmax(centroids @ one)) in near]
    assert kept == wanted and 0 < len(kept) <= 24
    assert {int(key[1:]) % 5 for key in kept} <= {1, 3}
    write_embeddings(tmp_path / "other", ["x", "y"], targets[:2], model="n")
    with pytest.raises(ValueError, match="different models"):
        files["targets"] = str(tmp_path / "other")
        curate.curate(str(tmp_path / "t.parquet"), tmp_path / "o", preset=preset, files=files)


def test_clusters_of_images_take_twenty_passes(tmp_path):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 3_000)  # centroids move for long
    z = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    pool = write_embeddings(tmp_path / "pool", [str(n) for n in range(3_000)], z)
    targets = write_embeddings(tmp_path / "targets", list("vwxyz"), z[:5])
    found = image_clusters.near_targets(pool, targets, 12, 0, str(tmp_path))

    def near(num_passes):
        centroids = find_clusters(z, 12, 0, num_passes).centroids.astype(np.float64)
        label = np.argmax(z.astype(np.float64) @ centroids.T, axis=1)
        keys = np.flatnonzero(np.isin(label, label[:5]))
        return np.unique(np.array([hash_key(str(n)) for n in keys], np.uint64))

    np.testing.assert_array_equal(found, near(20))
    assert all(not np.array_equal(found, near(passes)) for passes in (19, 21))


def test_clusters_are_those_that_scikit_learn_comes_to(tmp_path):
    sklearn = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(1)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    z = centres[np.arange(200) % 4] + 0.05 * rng.normal(size=(200, 8))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    ours = find_clusters(z, 4, seed=3, num_passes=20).centroids
    start = z[np.sort(np.random.default_rng(3).choice(200, 4, replace=False))]
    theirs = sklearn.KMeans(4, init=start, n_init=1).fit(z).cluster_centers_
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-2)


def test_intersection_keeps_what_both_presets_keep(tmp_path):
    rng = np.random.default_rng(0)
    table = {
        "key": [str(n) for n in range(200)],
        "text": [" ".join(["word"] * n) for n in rng.integers(1, 9, 200)],
        "similarity_l14": rng.random(200).round(2),
        "width": rng.integers(50, 400, 200),
        "height": rng.integers(50, 400, 200),
        "language": ["en"] * 200,
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    one = write_preset(tmp_path / "one.py", "num_words(2, 6)", "top_share('similarity_l14', 0.5)")
    kept, reports = {}, {}
    for name in (one, "datacomp-basic", f"datacomp-basic+{one}"):
        out = tmp_path / f"out{len(kept)}"
        reports[name] = curate.curate(str(tmp_path / "t.parquet"), out, preset=name)
        kept[name] = {row["key"] for row in read(out / "kept.parquet")}
    both = f"datacomp-basic+{one}"
    assert kept[both] == kept[one] & kept["datacomp-basic"] != set()
    names = [rule["name"] for rule in reports[both]["rules"]]
    assert "num_words" in names and "one:num_words" in names
    assert reports[both]["preset"] == "datacomp_basic+one"
    assert len(load_preset("datacomp-basic+datacomp-basic").rules) == 6
    with pytest.raises(ValueError, match="--preset 'nothing' is unknown"):
        load_preset("datacomp-basic+nothing")
