"""A server in a process of its own: connections, load, signals, memory, official clients."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import align_command, environment, run_align
from serve_helpers import encoded, picture, process, uri

import align_jax
from align_jax.search import ingest
from align_jax.serve.limits import Limits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0])


@pytest.fixture(scope="module")
def cache():
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def served(tiny_hf, model, cache, tmp_path_factory):
    """(Popen, URL, folder) of a server with an index of pictures."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(20):
        (folder / f"{number}.png").write_bytes(encoded(picture(number, (300, 200))))
    with align_jax.open_index(folder / "index", model) as index:
        ingest.add(index, model, str(folder / "*.png"))
    options = ("--index", "index", "--batch-size", "4")
    with process("--model", tiny_hf[0], *options, cwd=folder, cache=cache) as running:
        yield *running, folder


@pytest.fixture(scope="module")
def url(served):
    return served[1]


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]])


def raw(url, content, timeout_s=20):
    """Sends bytes; returns what comes back until the end."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        with contextlib.suppress(OSError):  # the server may refuse before it has read all
            connection.sendall(content)
        parts = []
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        (GET + b"X: " + b"x" * 300_000 + b"\r\n\r\n", (400, 431)),
        (GET + b"X: y\r\n" * 10_000 + b"\r\n", (400, 431)),
        (GET + b"X: y\r\n" * 200 + b"\r\n", (431,)),
        (b"TRACE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
        (b"GET /health\r\n\r\n", (400,)),
        (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", (400,)),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", (400,)),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345", (400,)),
        (POST + b"Content-Length: -5\r\n\r\n12345", (400,)),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ],
)  # fmt: skip
def test_requests_that_are_no_http(url, content, statuses):
    answer = raw(url, content)
    assert int(answer.split(b" ", 2)[1]) in statuses
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_chunked_body_of_64_megabytes_is_refused(url):
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    answer = raw(url, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 64)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_half_sent_requests_hold_up_nobody_and_are_closed(url):
    host, port = url.removeprefix("http://").split(":")
    half = [
        b"GET /health HTTP/1.1\r\nHost: loc",
        POST + b'Content-Length: 100\r\n\r\n{"input',
    ] * 100
    opened = []
    try:
        for content in half:
            opened.append(socket.create_connection((host, int(port)), timeout=50))
            opened[-1].sendall(content)
        start = time.monotonic()
        assert vectors(httpx.post(f"{url}/v1/embeddings", json={"input": "a"})).shape[0] == 1
        assert time.monotonic() - start < 20  # and not the 30 s that the half ones have
        for connection in opened:
            answer = b""
            while part := connection.recv(65536):
                answer += part
            assert answer.startswith(b"HTTP/1.1 408 ")
        assert 20 < time.monotonic() - start < 50
    finally:
        for connection in opened:
            connection.close()


def test_a_connection_is_open_for_longer_than_clients_keep_theirs(url):
    """One that was closed first would lose the request that is sent meanwhile."""
    assert Limits().idle_s > 60  # what balancers keep
    limits = httpx.Limits(keepalive_expiry=60)
    with httpx.Client(limits=limits) as client:
        first = client.get(f"{url}/health").extensions["network_stream"]
        time.sleep(7)
        assert not first.get_extra_info("is_readable")
        assert client.get(f"{url}/health").extensions["network_stream"] is first


def test_a_client_that_leaves_leaves_no_traceback(url, served):
    for _ in range(20):
        with pytest.raises(httpx.TimeoutException):
            body = {"input": [f"text {random.random()}" for _ in range(2000)]}
            httpx.post(f"{url}/v1/embeddings", json=body, timeout=httpx.Timeout(5, read=0.01))
    time.sleep(1)
    assert httpx.get(f"{url}/health").status_code == 200
    assert "Traceback" not in (served[2] / "serve.log").read_text()


async def load(url, bodies, connections):
    """Sends the bodies from so many clients; returns [(status, seconds)] and seconds in all."""
    waiting, found = list(reversed(bodies)), []
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)

    async def client(session):
        while waiting:
            path, body = waiting.pop()
            start = time.monotonic()
            answer = await session.post(f"{url}{path}", json=body)
            found.append((answer.status_code, time.monotonic() - start))

    async with httpx.AsyncClient(limits=limits, timeout=60) as session:
        start = time.monotonic()
        await asyncio.gather(*(client(session) for _ in range(connections)))
    return found, time.monotonic() - start


def metrics(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"
    }


def mixed(count, seed=0):
    rng = random.Random(seed)
    images = [uri(number) for number in range(8)]
    texts = ["a photo of a cat", "two red squares", "x " * 60]

    def one():
        n = rng.choice([1, 1, 2, 5, 17])
        return rng.choice([
            ("/v1/embeddings", {"input": rng.choices(texts, k=n)}),
            ("/v1/embeddings", {"input": [{"image": rng.choice(images)} for _ in range(n)]}),
            ("/v2/embed", {"texts": rng.choices(texts, k=n), "embedding_types": ["base64"]}),
            ("/v1/classify", {"images": [rng.choice(images)], "labels": ["cat", "dog"]}),
            ("/v1/search", {"text": rng.choice(texts), "k": 5}),
            ("/v1/embeddings", {"input": [{"image": "broken"}]}),
        ])  # fmt: skip

    return [one() for _ in range(count)]


def memory(pid):
    """Returns the resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_2000_mixed_requests_compile_nothing_and_keep_the_memory(url, served):
    asyncio.run(load(url, mixed(200), 16))
    compiled, early = metrics(url)["align_compile_total"], memory(served[0].pid)
    found = []
    for connections in (1, 8, 64):
        answers, _ = asyncio.run(load(url, mixed(600, connections), connections))
        found += answers
    assert {status for status, _ in found} <= {200, 400}
    assert metrics(url)["align_compile_total"] == compiled
    assert metrics(url)["align_queue_items"] == 0
    late = memory(served[0].pid)
    print(f"resident: {early / 1e6:.0f} MB after 200, {late / 1e6:.0f} MB after 2,000 requests")
    assert late <= 1.1 * early
    seconds = sorted(s for status, s in found[:600] if status == 200)
    p50, p99 = statistics.median(seconds), seconds[int(0.99 * len(seconds))]
    print(f"1 connection: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms")


def test_a_second_server_of_one_index_says_who_has_it(served, tiny_hf, cache):
    arguments = ("serve", "--model", tiny_hf[0], "--index", "index", "--port", "0")
    second = run_align(*arguments, cwd=served[2], env=environment(cache, JAX_PLATFORMS="cpu"))
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert str(served[0].pid) in line and "align serve" in line


def test_a_port_in_use_and_another_model_are_one_line(url, served, project, cache, tmp_path):
    env = environment(cache, JAX_PLATFORMS="cpu")
    port = url.rpartition(":")[2]
    run = run_align("serve", "--model", "nowhere", "--port", port, cwd=tmp_path, env=env)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert "in use" in run.stderr
    shutil.copytree(served[2] / "index", tmp_path / "index")
    model = project / "run"
    run = run_align(
        "serve", "--model", model, "--index", "index", "--port", "0", cwd=tmp_path, env=env
    )
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "holds embeddings of the model" in run.stderr


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_request(tiny_hf, cache, tmp_path, sig):
    body = {"input": [f"text {number}" for number in range(500)]}

    async def run(running, url):
        async with httpx.AsyncClient(timeout=60) as client:
            asked = [
                asyncio.ensure_future(client.post(f"{url}/v1/embeddings", json=body))
                for _ in range(4)
            ]
            while not (await client.get(f"{url}/metrics")).text.count("align_queue_items 1024.0"):
                assert not all(one.done() for one in asked), "too quick to be stopped in the midst"
            running.send_signal(sig)
            return await asyncio.gather(*asked)

    options = ("--model", tiny_hf[0], "--batch-size", "4")
    with process(*options, cwd=tmp_path, cache=cache) as (running, url):
        answers = asyncio.run(run(running, url))
        assert running.wait(timeout=15) == 0
    assert [vectors(answer).shape[0] for answer in answers] == [500] * 4
    assert "Traceback" not in (tmp_path / "serve.log").read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_answers_leave_at_once(url):
    """Header and body are two packets; the second must not wait for the first to be confirmed."""
    with httpx.Client() as client:
        took = []
        for _ in range(50):
            start = time.monotonic()
            client.get(f"{url}/health")
            took.append(time.monotonic() - start)
    assert min(took) < 0.03  # and not 0.04, however busy the machine is


def test_a_signal_while_the_model_is_compiled_ends_it_at_once(tiny_hf, tmp_path):
    env = environment(tmp_path / "empty", JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
    arguments = ("serve", "--model", tiny_hf[0], "--port", "0")
    with (tmp_path / "log").open("w+") as log:
        running = subprocess.Popen(align_command(*arguments), env=env, stdout=log, stderr=log)
        while "serving" not in (tmp_path / "log").read_text():
            assert running.poll() is None
            time.sleep(0.1)
        time.sleep(2)
        running.terminate()
        assert running.wait(timeout=10) == 0
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("serving")
