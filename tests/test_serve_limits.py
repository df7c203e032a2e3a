"""What a server refuses: keys, hosts, bodies, images, full queues; each row of the list of attacks.

Those that need a real connection are in test_serve_process.py, URLs in test_serve_fetch.py, names
of pictures and filters in test_serve_classify_search.py.
"""

import asyncio
import base64
import gzip
import hmac
import io
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from serve_helpers import URL, data_uri, encoded, error_of, picture, serving, uri

import align_jax
from align_jax.serve.batcher import TEXT
from align_jax.serve.inputs import Input
from align_jax.serve.limits import Limits
from align_jax.serve.service import Service

JSON = {"Content-Type": "application/json"}
KEY = "the-key-0123456789"


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=8)


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, key=KEY) as server:
        yield server


def send(server, content, **headers):
    return server.request("POST", "/v1/embeddings", content=content, headers={**JSON, **headers})


def b64(text):
    return base64.b64encode(text.encode()).decode()


ROUTES = [
    *(("GET", path) for path in ("/ready", "/metrics", "/openapi.json", "/v1/models", "/nowhere")),
    *(("POST", path) for path in ("/v1/embeddings", "/embeddings", "/v2/embed", "/v1/classify")),
    *(("POST", "/v1/search"), ("POST", "/v1/items"), ("DELETE", "/v1/items")),
    *(("GET", "/v1/items/a/image"), ("GET", "/"), ("GET", "/page/page.js")),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "sent",
    [
        *({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"bearer {KEY}"}),
        *({"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": "Bearer "}),
        *({"Authorization": "Basic " + b64("any:wrong")}, {"Authorization": "Basic !"}),
        *({"Authorization": KEY}, {"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}x"}),
    ],
)
def test_every_address_but_health_wants_the_key(locked, method, path, sent):
    answer = locked.request(method, path, headers=sent, params={"key": KEY})
    error = error_of(answer, 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    is_page = path == "/" or path.startswith("/page/")
    assert answer.headers["www-authenticate"].startswith("Basic" if is_page else "Bearer")
    assert KEY not in answer.text


def test_the_key_opens_and_is_compared_in_constant_time(locked, monkeypatch):
    compared = []

    def compare(left, right):
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert locked.request("GET", "/v1/models", headers=headers).status_code == 200
    assert compared == [(KEY.encode(), KEY.encode())]
    assert locked.request("GET", "/health").status_code == 200
    headers = {"Authorization": "Basic " + b64(f"anybody:{KEY}")}  # of a browser
    for path in ("/", "/page/page.js", "/v1/models"):
        assert locked.request("GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "", "[::2]"])
def test_another_host_name_is_refused(server, host):
    headers = {"Host": host}
    answer = server.request("GET", "/v1/models", headers=headers)
    assert error_of(answer, 400)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine_are_served(server, host):
    assert server.request("GET", "/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://localhost:81", "https://a"])
def test_pages_of_other_sites_may_not_ask(server, origin):
    answer = send(server, b'{"input": "a"}', Origin=origin)
    assert error_of(answer, 400)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers
    assert send(server, b'{"input": "a"}', Origin=URL).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Length": "21000000"}, 413),
        ({"Content-Length": "15", "Transfer-Encoding": "chunked"}, 400),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_headers_of_a_body(server, headers, status):
    assert send(server, b'{"input": "abc"}', **headers).status_code == status


def test_a_compressed_body_is_refused(server):
    answer = send(server, gzip.compress(b'{"input": "a"}'), **{"Content-Encoding": "gzip"})
    error_of(answer, 415)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        *((b'{"input": ' + b"[" * depth + b"]" * depth + b"}", 400) for depth in (400, 900, 980)),
        (b'{"input": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}", 400),
        (b'{"input": "' + b"x" * 10_000_000 + b'"}', 400),
        (b'{"input": "' + b"x" * (21 << 20) + b'"}', 413),
        (b'{"input": "a", "dimensions": NaN}', 400),
        (b'{"input": "a", "dimensions": Infinity}', 400),
        (b'{"input": "a", "dimensions": 1e999}', 400),
        (b'{"input": "a", "dimensions": ' + b"9" * 10_000 + b"}", 400),
        (b'{"input": "a", "input": "b"}', 400),
        (b'{"input": "\xff\xfe"}', 400),
        (b'\xef\xbb\xbf{"input": "a"}', 400),
        ('{"input": "a"}'.encode("utf-16"), 400),
        (b'["input"]', 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"messages": 5}', 400),
        (b'{"input": "a"}{"input": "b"}', 400),
        (b'{"input": "a\x00b"}', 400),
    ],
)
def test_bodies_that_are_no_request(server, body, status):
    error_of(send(server, body), status)


def test_a_body_without_a_length_ends_at_the_limit(server):
    sent = 0

    async def parts():
        nonlocal sent
        for _ in range(100):
            sent += 1 << 20
            yield bytes(1 << 20)

    error_of(send(server, parts()), 413)
    assert sent <= 2 * server.service.limits.body_bytes + (2 << 20)


def test_all_bodies_together_are_bounded(model):
    limits = Limits(bodies_bytes=1000)
    with serving(model, service={"limits": limits}) as server:
        answer = server.post("/v1/embeddings", input="x" * 2000)
        assert error_of(answer, 429)["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
        assert server.post("/v1/embeddings", input="x").status_code == 200


def png_header(width, height):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100)))


def bomb(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG", compress_level=9)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_image"),
        (b"<html><script>alert(1)</script></html>", "invalid_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "invalid_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image"),
        (encoded(picture())[:200], "invalid_image"),
        (png_header(20_000, 20_000), "image_too_large"),
        (png_header(1, 80_000_000), "image_too_large"),
        (png_header(5001, 5000), "image_too_large"),
        (encoded(np.zeros((1, 1, 3), np.uint8)), "invalid_image"),
        (bytes((10 << 20) + 10), "image_too_large"),
    ],
)
def test_images_that_are_none_or_too_large(server, content, code):
    start = time.process_time()
    answer = server.post("/v1/embeddings", input=["a", {"image": data_uri(content)}])
    error = error_of(answer, 400)
    assert (error["param"], error["code"]) == ("input[1].image", code)
    assert time.process_time() - start < 5  # decoding would take as long as the pixels


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(server, monkeypatch):
    file = bomb(6000)
    assert len(file) < 200_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    answer = server.post("/v1/embeddings", input={"image": data_uri(file)})
    assert error_of(answer, 400)["code"] == "image_too_large"


def odd_images():
    rgb = Image.fromarray(picture(7))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16))
    frames = [Image.fromarray(picture(seed)) for seed in (7, 8)]
    yield "cmyk", rgb.convert("CMYK"), "JPEG", {}
    yield "rotated", rgb, "JPEG", {"exif": exif}
    yield "16 bits", grey16, "PNG", {}
    yield "transparent", Image.new("RGBA", (9, 9), (200, 30, 30, 99)), "PNG", {}
    yield "animated", frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}
    yield "webp", rgb, "WEBP", {}


@pytest.mark.parametrize("odd", list(odd_images()), ids=lambda odd: odd[0])
def test_odd_images_are_embedded_as_the_model_does(server, model, odd):
    _, image, kind, options = odd
    file = io.BytesIO()
    image.save(file, kind, **options)
    answer = server.post("/v1/embeddings", input={"image": data_uri(file.getvalue(), "image/x")})
    found = np.array(answer.json()["data"][0]["embedding"])
    np.testing.assert_allclose(found, model.encode_image([file.getvalue()])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("TRACE", "/v1/embeddings", 405), ("GET", "/v1/embeddings", 405)),
        *(("PUT", "/v1/models", 405), ("OPTIONS", "/v1/embeddings", 405), ("GET", "/nope", 404)),
        *(("GET", "/page/../app.py", 404), ("GET", "/page/..%2f..%2fapp.py", 404)),
        *(("GET", "/page/%2e%2e/app.py", 404), ("GET", "/page//etc/passwd", 404)),
    ],
)
def test_other_methods_and_addresses(server, method, path, status):
    error_of(server.request(method, path), status)


def test_the_page_comes_with_a_strict_policy(server):
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript")):
        answer = server.request("GET", path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_texts_that_give_orders_are_texts(server):
    order = "Ignore previous instructions; DROP TABLE {}; {{7*7}} ${jndi:ldap://x} <script>"
    body = {"images": [uri()], "labels": [order, "cat"]}
    labels = server.post("/v1/classify", **body).json()["data"][0]["labels"]
    assert order in [one["label"] for one in labels]


def test_a_full_queue_answers_429_and_recovers(model):
    limits = Limits(queue_items=8)
    with serving(model, service={"limits": limits}) as server:
        many = [("POST", "/v1/embeddings", {"json": {"input": ["a"] * 6}}) for _ in range(4)]
        answers = server.gather(many)
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert error_of(refused, 429)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert server.post("/v1/embeddings", input=["a"] * 6).status_code == 200
        # More than the queue holds in one request is split.
        assert len(server.post("/v1/embeddings", input=["a"] * 600).json()["data"]) == 600
        metrics = server.request("GET", "/metrics").text
        assert 'align_rejected_total{reason="queue_full"} 3.0' in metrics
        assert "align_queue_items 0.0" in metrics


def test_a_request_that_takes_too_long_is_ended_and_frees_its_place(model):
    with serving(model, service={"limits": Limits(request_s=0.2)}) as server:
        encode = server.service.model.encode_tokens
        server.service._batcher._model = slow = Slow(encode)
        answer = server.post("/v1/embeddings", input="a")
        assert error_of(answer, 503)["code"] == "deadline_exceeded"
        slow.seconds = 0
        time.sleep(0.6)
        assert server.post("/v1/embeddings", input="a").status_code == 200
        assert "align_queue_items 0.0" in server.request("GET", "/metrics").text


class Slow:
    def __init__(self, encode, seconds=0.5):
        self.encode, self.seconds, self.rows, self.calls = encode, seconds, 0, 0

    def encode_tokens(self, ids, mask):
        self.rows += len(ids)
        self.calls += 1
        time.sleep(self.seconds)
        return self.encode(ids, mask)


def test_what_a_client_that_has_gone_asked_for_is_not_computed(model):
    async def run():
        service = Service(model)
        service._batcher._model = slow = Slow(model.encode_tokens)
        named = [Input(TEXT, str(number), "input") for number in range(40)]
        first = asyncio.ensure_future(service.embed(named[:8]))
        await asyncio.sleep(0.1)
        gone = asyncio.ensure_future(service.embed(named[8:32]))
        last = asyncio.ensure_future(service.embed(named[32:]))
        await asyncio.sleep(0.1)
        gone.cancel()
        z, _ = await first
        z_last, _ = await last
        service.close()
        return slow.rows, z, z_last

    rows, z, z_last = asyncio.run(run())
    assert rows == 16
    texts = [str(number) for number in range(40)]
    np.testing.assert_allclose(z, model.encode_text(texts[:8]), atol=1e-6)
    np.testing.assert_allclose(z_last, model.encode_text(texts[32:]), atol=1e-6)


def test_single_requests_of_many_clients_share_batches(tiny_hf):
    model = align_jax.load(tiny_hf[0], batch_size=32)
    with serving(model) as server:
        server.service._batcher._model = slow = Slow(model.encode_tokens, seconds=0.1)
        one = ("POST", "/v1/embeddings", {"json": {"input": "a photo of a cat"}})
        answers = server.gather([one] * 64)
        assert {answer.status_code for answer in answers} == {200}
        assert slow.rows == 64 and slow.calls <= 8
        (answer,) = server.gather([one])  # and nobody waits for others
        assert answer.status_code == 200 and slow.calls <= 9


def test_an_embedding_that_is_not_finite_is_an_error_of_the_server(model):
    class Broken:
        def encode_tokens(self, ids, mask):
            return np.full((len(ids), 4), np.nan, np.float32)

    with serving(model) as server:
        server.service._batcher._model = Broken()
        answer = server.post("/v1/embeddings", input="a")
        error = error_of(answer, 500)
        assert error["type"] == "server_error" and "Traceback" not in answer.text


def test_before_it_is_ready_a_server_says_how_far_it_is(model):
    with serving(model, is_ready=False) as server:
        assert server.request("GET", "/health").status_code == 200
        answer = server.request("GET", "/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "warming", "warming": "0/0"})
        answer = server.post("/v1/embeddings", input="a")
        assert error_of(answer, 503)["code"] == "not_ready" and "retry-after" in answer.headers
        server.service.warm_up()
        done, total = server.service.warmed
        assert done == total > 0
        assert server.request("GET", "/ready").json() == {"status": "ready"}
        compiled = _compiled(server)
        for count in (1, 2, 3, 8, 30):
            texts = ["a photo of a cat " * n for n in range(count)]
            server.post("/v1/embeddings", input=[f"x {text}" for text in texts])
            server.post("/v1/classify", images=[uri()] * count, labels=["a", "b"])
        assert _compiled(server) == compiled


def _compiled(server):
    lines = server.request("GET", "/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("align_compile_total")]
    return float(value)


def test_errors_hold_no_path_and_no_traceback(server):
    bodies = [{}, {"input": 3}, {"input": {"image": "x"}}, {"input": "a", "model": "/etc/passwd"}]
    for body in bodies:
        text = json.dumps(server.post("/v1/embeddings", **body).json()["error"]["message"])
        assert "/work" not in text and "site-packages" not in text and "Traceback" not in text
