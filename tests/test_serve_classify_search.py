"""/v1/classify, /v1/search, /v1/items and pictures of rows, against the model and the index."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_helpers import encoded, error_of, picture, serving, uri

import align_jax
from align_jax.search import ingest

LABELS = ["red", "a dog", "circles"]
TEMPLATES = ["a photo of a {}.", "{}"]
NASTY = [
    "<img src=x onerror=alert(1)>",
    'a "quoted" \\ key/../..',
    "line\nbreak \u202e ltr",
    "é/%2e",
]


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=8)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    for number in range(12):
        (folder / f"{number}.png").write_bytes(encoded(picture(number, (700, 600))))
    with align_jax.open_index(folder / "index", model) as index:
        ingest.add(index, model, str(folder / "*.png"))
        texts = ["a red square", "two dogs", "circles on a mat"]
        index.add(["t0", "t1", "t2"], model.encode_text(texts), kind="text", captions=texts)
        with serving(model, index, writable=True) as server:
            yield server


@pytest.fixture(scope="module")
def index(server):
    return server.service.index


def hits_of(answer):
    assert answer.status_code == 200, answer.text
    return [(hit["key"], hit["score"]) for hit in answer.json()["data"]]


def test_classify_is_that_of_the_model(server, model):
    images = [picture(number) for number in range(3)]
    asked = {"images": [uri(number) for number in range(3)], "labels": LABELS}
    for templates in (None, TEMPLATES):
        answer = server.post("/v1/classify", templates=templates, **asked).json()
        expected = model.classify(images, LABELS, templates or ("a photo of a {}.",))
        for row, one in zip(expected, answer["data"], strict=True):
            found = {label["label"]: label["probability"] for label in one["labels"]}
            np.testing.assert_allclose([found[label] for label in LABELS], row, atol=1e-6)
            ordered = [label["probability"] for label in one["labels"]]
            assert ordered == sorted(ordered, reverse=True)
    assert answer["temperature"] == pytest.approx(model.temperature)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"labels": []}, "labels"),
        ({"labels": ["a", ""]}, "labels[1]"),
        ({"labels": "red"}, "labels"),
        ({"templates": ["no place"]}, None),
        ({"images": []}, "images"),
        ({"images": ["data:image/png;base64,AAAA"]}, "images[0]"),
        ({"labels": ["a"] * 1001}, "labels"),
        ({"labels": ["a"] * 1000, "templates": ["{}"] * 11}, "templates"),
        ({"unknown": 1}, None),
    ],
)
def test_a_bad_classification_names_what_is_wrong(server, change, param):
    body = {"images": [uri()], "labels": LABELS} | change
    assert error_of(server.post("/v1/classify", **body), 400)["param"] == param


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"text": "a red square"}, {"text": "a red square"}),
        ({"image": 3}, {"image": 3}),
        ({"image": 3, "text": "two dogs"}, {"image": 3, "text": "two dogs"}),
        ({"image": 3, "add": ["red"], "remove": ["two dogs", "mat"]},
         {"image": 3, "add": ["red"], "remove": ["two dogs", "mat"]}),
        ({"image": 3, "add": ["red"], "weight": 0.5}, {"image": 3, "add": ["red"], "weight": 0.5}),
        ({"text": "red", "kind": "text", "k": 2}, {"text": "red", "k": 2,
                                                  "filter": {"kind": "text"}}),
        ({"text": "red", "kind": "any", "k": 30}, {"text": "red", "k": 30, "filter": None}),
        ({"text": "red", "filter": {"key": {"in": ["1.png", "2.png"]}}},
         {"text": "red", "filter": {"key": {"in": ["1.png", "2.png"]}, "kind": "image"}}),
    ],
)  # fmt: skip
def test_search_is_that_of_the_index(server, model, index, body, query):
    if "image" in body:
        body, query = body | {"image": uri(3)}, query | {"image": picture(3)}
    index.use_model(model)
    expected = index.search(**{"filter": {"kind": "image"}, **query})
    found = hits_of(server.post("/v1/search", **body))
    assert [key for key, _ in found] == [hit.key for hit in expected]
    np.testing.assert_allclose([s for _, s in found], [h.score for h in expected], atol=1e-5)


def test_search_by_vector_and_pages_of_hits(server, model):
    vector = model.encode_text(["a red square"])[0].tolist()
    by_text = hits_of(server.post("/v1/search", text="a red square", k=9))
    by_vector = hits_of(server.post("/v1/search", vector=vector, k=9))
    assert [key for key, _ in by_text] == [key for key, _ in by_vector]
    page = hits_of(server.post("/v1/search", text="a red square", k=3, offset=6))
    assert [key for key, _ in page] == [key for key, _ in by_text[6:]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": "a", "k": 0}, "k"),
        ({"text": "a", "k": 1001}, "k"),
        ({"text": "a", "offset": -1}, "offset"),
        ({"text": "a", "kind": "video"}, "kind"),
        ({"vector": [1.0]}, "vector"),
        ({"vector": [1.0], "text": "a"}, "vector"),
        ({"text": "a", "filter": 'caption == "a" or 1 == 1'}, "filter"),
        ({"text": "a", "filter": {"kind": "image"}}, "filter.kind"),
        ({"text": "a", "filter": {"key": {"like": "%"}}}, "filter"),
        ({"text": "a", "filter": {"key": {"in": "ab"}}}, "filter"),
        ({"text": "a", "filter": {"x": [[[]]]}}, "filter"),
        ({"text": "a", "filter": {"x": {"in": ["y" * 1000] * 2000}}}, "filter"),
        ({"text": "a", "add": ["b"] * 17}, "add"),
        ({"text": "a", "unknown": 1}, None),
    ],
)
def test_a_bad_search_names_what_is_wrong(server, body, param):
    assert error_of(server.post("/v1/search", **body), 400)["param"] == param


def test_half_a_surrogate_pair_in_a_label_or_filter_fails_nothing(server):
    headers, half = {"Content-Type": "application/json"}, b'"half \\ud83d"'
    body = b'{"images": ["%s"], "labels": [%s]}' % (uri().encode(), half)
    answer = server.request("POST", "/v1/classify", content=body, headers=headers)
    assert answer.json()["data"][0]["labels"][0]["label"] == "half \ufffd"
    body = b'{"text": "a", "filter": {"key": %s}}' % half
    assert hits_of(server.request("POST", "/v1/search", content=body, headers=headers)) == []


def test_filters_are_quoted(server):
    tricks = ['1.png" or 1 == 1 or key == "', '") or ("" == "', "(" * 500]
    for trick in tricks:
        assert hits_of(server.post("/v1/search", text="a", filter={"key": trick})) == []
    assert hits_of(server.post("/v1/search", text="a", filter={'a"] or 1 == 1': 1})) == []


def test_rows_with_nasty_keys_are_added_found_and_deleted(server, index):
    before = index.count()
    items = [{"key": key, "text": key, "meta": {"n": n}} for n, key in enumerate(NASTY)]
    items.append({"key": "new", "image": uri(50), "caption": NASTY[0]})
    added = server.post("/v1/items", items=items).json()
    assert added == {"added": 5, "updated": 0, "unchanged": 0}
    items[0]["meta"] = {"n": 9}
    again = server.post("/v1/items", items=items).json()
    assert again == {"added": 0, "updated": 1, "unchanged": 4}
    for key in NASTY[1:]:
        (hit,) = server.post("/v1/search", text=key, kind="text", k=1).json()["data"]
        assert (hit["key"], hit["caption"], hit["image"]) == (key, key, None)
    (hit,) = server.post("/v1/search", image=uri(50), k=1).json()["data"]
    assert (hit["key"], hit["caption"], hit["image"]) == ("new", NASTY[0], None)
    gone = server.request("DELETE", "/v1/items", json={"keys": [*NASTY, "new", "never"]})
    assert gone.json() == {"deleted": 5} and index.count() == before


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "items"),
        ([{"key": "a"}], "items[0]"),
        ([{"key": "a", "text": "b", "image": "c"}], "items[0]"),
        ([{"key": "a", "text": "b"}, {"key": "a", "text": "c"}], "items"),
        ([{"key": "a", "text": "b"}, {"key": "c", "image": "x"}], "items[1].image"),
        ([{"key": "a", "text": "b", "caption": "x" * 70_000}], "items"),
        ([{"key": "a" * 70_000, "text": "b"}], "items"),
        ([{"key": "a", "text": "b", "source": "/etc/passwd"}], "items[0]"),
    ],
)
def test_bad_items_are_refused_and_none_is_stored(server, index, items, param):
    before = index.count()
    assert error_of(server.post("/v1/items", items=items), 400)["param"] == param
    assert index.count() == before


def test_pictures_are_those_of_the_rows_as_small_jpegs(server):
    (hit,) = server.post("/v1/search", image=uri(4), k=1).json()["data"]
    answer = server.request("GET", hit["image"])
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.format == "JPEG" and max(shown.size) == 512
    number = int(Path(hit["key"]).stem)
    original = Image.fromarray(picture(number, (700, 600))).resize(shown.size)
    assert np.abs(np.asarray(shown, float) - np.asarray(original, float)).mean() < 4


@pytest.mark.parametrize(
    "key",
    ["t0", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "..%5c..%5cetc", "%2fetc%2fpasswd",
     "a%00b", "..%2f1.png", "nothing"],
)  # fmt: skip
def test_other_names_have_no_picture(server, key):
    error_of(server.request("GET", f"/v1/items/{key}/image"), 404)


def test_without_index_or_permission_there_is_no_such_address(model, index):
    with serving(model) as server:
        error_of(server.post("/v1/search", text="a"), 404)
    with serving(model, index) as server:
        assert hits_of(server.post("/v1/search", text="a"))
        error_of(server.post("/v1/items", items=[{"key": "a", "text": "b"}]), 404)
        error_of(server.request("DELETE", "/v1/items", json={"keys": ["1.png"]}), 404)
