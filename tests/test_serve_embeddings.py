"""/v1/embeddings and /v2/embed: every convention against the model itself, in order."""

import base64

import numpy as np
import pytest
from serve_helpers import data_uri, encoded, error_of, picture, serving, uri

import align_jax

TEXTS = [
    "a photo of a cat",
    "x",
    "two red squares and circles on a mat " * 4,
    "Ünï — 猫 😀",
]


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=8)


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as server:
        yield server


def vectors(answer):
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data], np.float32)


def test_texts_and_images_in_every_convention_are_those_of_the_model(server, model):
    z_image = model.encode_image([picture(i) for i in range(3)])
    z_text = model.encode_text(TEXTS)
    url = {"url": uri(1)}
    asked = [
        ({"input": TEXTS[0]}, z_text[:1]),
        ({"input": TEXTS}, z_text),
        ({"input": uri(1)}, z_image[1:2]),
        ({"input": {"image": uri(1)}}, z_image[1:2]),
        ({"input": [uri(2), uri(0)], "modality": "image"}, z_image[[2, 0]]),
        ({"input": [TEXTS[1], uri(0), {"text": TEXTS[0]}, {"image": uri(1)}]},
         np.stack([z_text[1], z_image[0], z_text[0], z_image[1]])),
        ({"input": [{"type": "image_url", "image_url": url}]}, z_image[1:2]),
        ({"input": [uri(2).split(",")[1]], "modality": "image"}, z_image[2:]),
        ({"messages": [
            {"role": "user", "content": TEXTS[0]},
            {"role": "user", "content": [{"type": "image_url", "image_url": url}]},
            {"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]},
        ]}, np.stack([z_text[0], z_image[1], z_text[1]])),
    ]  # fmt: skip
    for body, expected in asked:
        answer = server.post("/v1/embeddings", model="align", **body)
        np.testing.assert_allclose(vectors(answer), expected, atol=1e-6)


def test_base64_is_little_endian_float32_and_equals_the_numbers(server):
    asked = {"input": [*TEXTS, uri()]}
    numbers = vectors(server.post("/v1/embeddings", **asked))
    answer = server.post("/v1/embeddings", encoding_format="base64", **asked)
    raw = [base64.b64decode(one["embedding"]) for one in answer.json()["data"]]
    np.testing.assert_allclose(
        np.frombuffer(b"".join(raw), "<f4").reshape(5, -1), numbers, atol=1e-9, rtol=0
    )


def test_cohere(server, model):
    content = [{"content": [{"type": "text", "text": TEXTS[1]}]},
               {"content": [{"type": "image_url", "image_url": {"url": uri(2)}}]}]  # fmt: skip
    answer = server.post(
        "/v2/embed",
        model="align",
        input_type="image",
        texts=TEXTS[:1],
        images=[uri(1)],
        inputs=content,
        embedding_types=["float", "base64"],
    ).json()
    texts = model.encode_text([TEXTS[0], TEXTS[1]])
    images = model.encode_image([picture(1), picture(2)])
    expected = np.stack([texts[0], images[0], texts[1], images[1]])
    np.testing.assert_allclose(answer["embeddings"]["float"], expected, atol=1e-6)
    raw = b"".join(base64.b64decode(one) for one in answer["embeddings"]["base64"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), expected.ravel(), atol=1e-6)
    assert answer["texts"] == TEXTS[:1] and answer["meta"]["api_version"]["version"] == "2"


def test_half_a_surrogate_pair_becomes_the_replacement_character(server, model):
    body = rb'{"input": "half \ud83d!"}'
    headers = {"Content-Type": "application/json"}
    answer = server.request("POST", "/v1/embeddings", content=body, headers=headers)
    np.testing.assert_allclose(vectors(answer), model.encode_text(["half \ufffd!"]), atol=1e-6)


def test_usage_counts_tokens_as_they_were_cut(server, model):
    _, mask = model.tokenizer.encode(TEXTS, model.preprocessing.max_tokens)
    answer = server.post("/v1/embeddings", input=[*TEXTS, uri()])
    assert answer.json()["usage"] == {"prompt_tokens": mask.sum(), "total_tokens": mask.sum()}


def test_2048_inputs_in_one_request_keep_their_order(server, model):
    texts = [f"a photo of {number} cats" for number in range(2048)]
    z = vectors(server.post("/v1/embeddings", input=texts))
    some = [0, 1, 255, 256, 257, 2047]
    np.testing.assert_allclose(z[some], model.encode_text([texts[i] for i in some]), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", None),
        ({"input": "a", "messages": [{"content": "a"}]}, "input", None),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": ["a", 7]}, "input[1]", "invalid_value"),
        ({"input": ["a", {"text": "a", "image": "b"}]}, "input[1]", "invalid_value"),
        ({"input": ["a", {"type": "text"}]}, "input[1]", "invalid_value"),
        ({"input": [1, 2, 3]}, "input", "token_input_unsupported"),
        ({"input": [[1, 2], [3]]}, "input", "token_input_unsupported"),
        ({"input": "x" * 100_001}, "input", "text_too_long"),
        ({"input": ["a", {"image": "no base64!"}]}, "input[1].image", "invalid_image"),
        ({"input": ["a", {"image": "file:///etc/passwd"}]}, "input[1].image", "invalid_image"),
        ({"input": {"image": "data:image/png,abc"}}, "input.image", "invalid_image"),
        ({"input": {"image": "http://host/a.png"}}, "input.image", "url_fetch_disabled"),
        ({"messages": 5}, "messages", "invalid_value"),
        ({"messages": [{"content": [{"text": "a"}, {"text": "b"}]}]}, "messages[0].content",
         "invalid_value"),
        ({"input": "a", "dimensions": 7}, "dimensions", None),
        ({"input": "a", "dimensions": -1}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "model": 0.0}, "model", "invalid_value"),
    ],
)  # fmt: skip
def test_a_bad_request_names_what_is_wrong(server, body, param, code):
    error = error_of(server.post("/v1/embeddings", **body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and "\n" not in error["message"]


def test_an_unknown_model_is_404_and_dimensions_may_be_named(server, model):
    assert error_of(server.post("/v1/embeddings", input="a", model="b"), 404)["param"] == "model"
    dim = model.model.embed_dim
    for given in (dim, 0, None):  # infinity's client sends 0
        assert vectors(server.post("/v1/embeddings", input="a", dimensions=given)).shape == (1, dim)


def test_one_corrupt_image_among_32_is_named_and_hurts_nobody_else(server, model):
    images = [uri(number) for number in range(32)]
    broken = [*images[:17], data_uri(encoded(picture())[:60]), *images[18:]]
    asked = [("POST", "/v1/embeddings", {"json": {"input": given}}) for given in
             (images, broken, images)]  # fmt: skip
    first, bad, last = server.gather(asked)
    assert error_of(bad, 400)["param"] == "input[17]"
    expected = model.encode_image([picture(number) for number in range(32)])
    np.testing.assert_allclose(vectors(first), expected, atol=1e-6)
    np.testing.assert_allclose(vectors(last), expected, atol=1e-6)
