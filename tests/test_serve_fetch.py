"""URLs of images: what is never fetched, and what happens with answers that misbehave."""

import contextlib
import http.server
import ipaddress
import socket
import threading
import time

import pytest
from serve_helpers import encoded, error_of, picture, serving

import align_jax
from align_jax.serve.fetch import Refused, fetch, is_public

MEBIBYTE = 1 << 20


def no_network(*args, **options):
    raise AssertionError("a socket was opened")


@pytest.fixture
def sealed(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)


def answers(*addresses):
    """A resolver that says so; counts how often it was asked."""

    def resolve(host, port, **options):
        resolve.count += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    resolve.count = 0
    return resolve


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "0", "0.0.0.0", "127.1", "2130706433", "0x7f.1"),
        *("0177.0.0.1", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fec0::1]"),
        *("169.254.169.254", "100.64.0.1", "192.0.0.8", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("224.0.0.1", "[ff02::1]", "[64:ff9b:1::1]", "[fd00::1]", "[fe80::1]", "[::]"),
        *("[::7f00:1]", "198.18.0.1", "255.255.255.255", "[2001:db8::1]", "[2001::1]", "①②⑦.⓪.⓪.①"),
    ],
)  # fmt: skip
def test_what_is_not_public_is_refused_before_any_connection(sealed, host):
    with pytest.raises(Refused):
        fetch(f"http://{host}/a.png", max_bytes=100)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://8.8.8.8/", "gopher://8.8.8.8/", "http://user:pw@8.8.8.8/"),
        *("http://@8.8.8.8/", "http://8.8.8.8:22/", "https://8.8.8.8:80/"),
        *("http://8.8.8.8\r\nX: y/", "http://8.8.8.8:99999/"),
        *("http:///x", "http://", "http://127.0.0.1\\@8.8.8.8/", "8.8.8.8"),
        *("http://[8.8.8.8/", "http://8.8.8.8/a b", "http://8.8.8.8/\u00e9"),
    ],
)  # fmt: skip
def test_other_forms_of_urls_are_refused(sealed, url):
    with pytest.raises(Refused):
        fetch(url, max_bytes=100)


def test_the_list_of_networks_holds_what_python_calls_private():
    for network in ("10.0.0.0/8", "127.0.0.0/8", "192.168.0.0/16", "fc00::/7", "fe80::/10"):
        ip = ipaddress.ip_network(network)
        assert not is_public(str(ip[1])) and not is_public(str(ip[-2]))
    for address in ("8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "2606:4700::1111"):
        assert is_public(address)


def test_one_private_answer_among_public_ones_is_enough(sealed):
    resolve = answers("8.8.8.8", "10.0.0.1")
    with pytest.raises(Refused, match="no public address"):
        fetch("http://x.test/", max_bytes=100, resolve=resolve)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/").replace("-", "_"))()
        self.close_connection = True

    def _send(self, status=200, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def good(self):
        self._send(content=encoded(picture(3)))

    def missing(self):
        self._send(404)

    def to_good(self):
        self._send(302, Location="/good", Content_Length=0)

    def to_other(self):
        port = self.server.server_port
        self._send(302, Location=f"http://127.0.0.2:{port}/good", Content_Length=0)

    def to_file(self):
        self._send(302, Location="file:///etc/passwd", Content_Length=0)

    def to_itself(self):
        self._send(302, Location="/to-itself", Content_Length=0)

    def large(self):
        self._send()
        for _ in range(1000):
            self.wfile.write(bytes(65536))

    def lying(self):
        self._send(content=bytes(3 * MEBIBYTE), Content_Length=10 * MEBIBYTE)

    def drip(self):
        self._send(content=b"x")
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def drip_header(self):
        for byte in b"HTTP/1.1 200 OK\r\nX: " + 100 * b"x":
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)


@pytest.fixture(scope="module")
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def from_web(web, path, **options):
    options = {"max_bytes": 2 * MEBIBYTE, "is_allowed": lambda ip: ip == "127.0.0.1"} | options
    ports = {"http": web.server_port}
    return fetch(f"http://127.0.0.1:{web.server_port}/{path}", ports=ports, **options)


def test_an_image_and_a_redirect_to_it(web):
    assert from_web(web, "good") == from_web(web, "to-good") == encoded(picture(3))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("to-other", "no public address"),
        ("to-file", "http and https"),
        ("to-itself", "redirects"),
        ("large", "larger than"),
        ("lying", "larger than"),
        ("drip", "too long"),
        ("drip-header", "too long"),
        ("missing", "404"),
    ],
)
def test_redirects_and_answers_that_are_not_taken(web, path, reason):
    start = time.monotonic()
    with pytest.raises(Refused, match=reason):
        from_web(web, path, timeout_s=1.0)
    assert time.monotonic() - start < 8  # not the ten seconds that the drips would go on


def test_the_checked_address_is_dialled_and_nobody_asks_twice(web, monkeypatch):
    resolve, dialled = answers("127.0.0.1"), []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, **o: (dialled.append(to), connect(to, **o))[1]
    )
    port = web.server_port
    options = {"ports": {"http": port}, "is_allowed": lambda ip: True, "resolve": resolve}
    fetch(f"http://some.test:{port}/good", max_bytes=MEBIBYTE, **options)
    assert resolve.count == 1 and dialled == [("127.0.0.1", port)]


def test_an_endpoint_fetches_only_if_it_was_told_to(tiny_hf, web):
    model = align_jax.load(tiny_hf[0], batch_size=8)

    def fetching(url):
        return from_web(web, url.rpartition("/")[2])

    with serving(model, service={"fetch": fetching}) as server:
        body = {"input": [{"image": "http://x.test/good"}]}
        vector = server.post("/v1/embeddings", **body).json()["data"][0]["embedding"]
        expected = model.encode_image([picture(3)])[0]
        assert abs(expected - vector).max() < 1e-6
        body = {"input": ["a", {"image": "http://x.test/missing"}]}
        error = error_of(server.post("/v1/embeddings", **body), 400)
        assert (error["param"], error["code"]) == ("input[1].image", "url_refused")
