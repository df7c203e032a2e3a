"""A server in this process, its pictures, and requests to it, for the tests of serving."""

import asyncio
import base64
import contextlib
import io
import re
import subprocess
import time

import httpx
import numpy as np
from helpers import align_command, environment
from PIL import Image

from align_jax.serve.app import Endpoints
from align_jax.serve.service import Service

URL = "http://localhost"


def picture(seed=0, size=(48, 40)):
    """Returns uint8 [H, W, 3] of coarse noise, which differs well between seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def uri(seed=0):
    return data_uri(encoded(picture(seed)))


class Server:
    """The application without a socket; `request` is an HTTP request to it."""

    def __init__(self, model, index=None, *, service=None, is_ready=True, **options):
        self.service = Service(model, index, **(service or {}))
        self.service.is_ready = is_ready
        self.endpoints = Endpoints(self.service, **options)

    def client(self, url=URL):
        transport = httpx.ASGITransport(app=self.endpoints.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=url, timeout=60)

    def request(self, method, path, *, url=URL, **options):
        return self.gather([(method, path, options)], url)[0]

    def post(self, path, **body):
        return self.request("POST", path, json=body)

    def gather(self, requests, url=URL):
        """Returns the answers to requests that are sent at once."""

        async def run():
            async with self.client(url) as client:
                return await asyncio.gather(*(client.request(m, p, **o) for m, p, o in requests))

        return asyncio.run(run())


@contextlib.contextmanager
def serving(model, index=None, **options):
    server = Server(model, index, **options)
    try:
        yield server
    finally:
        server.service.close()


def error_of(answer, status):
    """Returns the error in OpenAI's shape, asserting its status."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


@contextlib.contextmanager
def process(*arguments, cwd, cache):
    """A server in a process of its own, on one CPU device, once it is ready: (Popen, URL)."""
    log = (cwd / "serve.log").open("w+")
    env = environment(cache, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
    command = align_command("serve", "--port", "0", *arguments)
    running = subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300
        while "ready:" not in (text := (cwd / "serve.log").read_text()):
            assert running.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        yield running, re.search(r"http://\S+", text)[0]
    finally:
        running.kill()
        running.wait()
        log.close()
