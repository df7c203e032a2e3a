"""`align serve`: model, index, socket, warm-up, and a clean end."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h11
import jax
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from align_jax import align
from align_jax.search.index import Index, identity_of
from align_jax.serve import fetch
from align_jax.serve.app import Endpoints
from align_jax.serve.front import LOCAL_HOSTS, Front
from align_jax.serve.limits import Limits
from align_jax.serve.service import Service
from align_jax.storage.text import read_text

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def serve(
    model: str,
    *,
    index: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: str | None = None,
    no_auth: bool = False,
    allowed_hosts: Sequence[str] = (),
    writable: bool = False,
    fetch_urls: bool = False,
    name: str = "align",
    step: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what it has accepted.

    Args:
      model: what `align_jax.load` takes.
      index: of this model, for search.
      host: address to listen on.
      port: likewise; 0 takes a free one.
      key_file: holds the key that clients must send.
      no_auth: serve other machines without a key.
      allowed_hosts: names that requests may be sent to, beside those of this machine.
      writable: let clients add and delete rows of the index.
      fetch_urls: fetch images that clients name by URL, from public addresses only.
      name: of the model, for clients.
      step: checkpoint of a workdir.
      batch_size: most inputs of a device call; None takes 32 on CPUs and 128 elsewhere.
      dtype: see `align_jax.load`.
      limits: None takes the defaults.

    Raises:
      ValueError: a bad model, index, key or address, or one that needs a key.
      OSError: the address is in use.
    """
    key = None if key_file is None else _read_key(key_file)
    if not _is_loopback(host) and key is None and not no_auth:
        raise ValueError(
            f"--host {host} is reached by other machines: give --key-file, or --no-auth if "
            "everybody may use the server."
        )
    limits = limits or Limits()
    _keep_compiled()
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(_listen(host, port))
        if batch_size is None:
            batch_size = 32 if jax.default_backend() == "cpu" else 128
        loaded = align.load(model, step=step, batch_size=batch_size, dtype=dtype)
        rows = None
        if index is not None:
            identity = identity_of(loaded)
            rows = cleanup.enter_context(Index(index, work="align serve"))
            rows.check_model(identity)
        fetching = partial(fetch.fetch, max_bytes=limits.image_bytes) if fetch_urls else None
        service = Service(loaded, rows, limits=limits, fetch=fetching)
        cleanup.callback(service.close)
        hosts = (*LOCAL_HOSTS, *(one.lower() for one in allowed_hosts))
        if not _is_loopback(host) and not allowed_hosts:
            hosts = ()
        endpoints = Endpoints(service, name=name, key=key, hosts=hosts, writable=writable)
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {model} at http://{shown}:{listener.getsockname()[1]}", flush=True)
        failed: list[Exception] = []
        warming = threading.Thread(target=_warm_up, args=(service, failed), daemon=True)
        warming.start()
        config = uvicorn.Config(
            endpoints.app,
            http=partial(_Protocol, header_s=limits.header_s),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=int(limits.idle_s),
            timeout_graceful_shutdown=int(limits.drain_s),
        )
        asyncio.run(_Server(config, endpoints.app).serve(sockets=[listener]))
    if failed:
        raise RuntimeError(f"The model cannot be compiled: {failed[0]}")
    if warming.is_alive():
        # A compilation cannot be stopped, and aborts an interpreter that exits meanwhile.
        sys.stdout.flush()
        os._exit(0)


class _Protocol(H11Protocol):
    """Closes a connection whose header does not come, where uvicorn waits for ever."""

    def __init__(self, *args: Any, header_s: float, **options: Any):
        super().__init__(*args, **options)
        self._header_s = header_s
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # asyncio leaves it out for sockets that it has not made. Without it the body of an answer
        # waits 40 ms for the client to acknowledge the header.
        opened = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._header_s, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(_TOO_SLOW)
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends with exit code 0 after a signal; uvicorn would raise the signal again."""

    def __init__(self, config: uvicorn.Config, front: Front):
        super().__init__(config)
        self._front = front

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._front.is_draining = True
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _warm_up(service: Service, failed: list[Exception]) -> None:
    try:
        service.warm_up()
    except Exception as error:
        failed.append(error)
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        print(f"ready: {service.warmed[1]} shapes compiled", flush=True)


def _keep_compiled() -> None:
    """Keeps compiled programs on disk, so that the next start warms up in seconds."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "align_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}.") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_key(path: str) -> str:
    key = read_text(path).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{path}: a key is one line of printable ASCII without spaces.")
    return key
