"""Fetches images from the web for clients, and from nowhere else.

A name is resolved once, every address that it has must be public, and the address that was checked
is dialled; each redirect is checked in the same way. The lists are our own: which networks Python
calls global depends on its version.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = 3
_TIMEOUT_S = 10.0
_BLOCK = 1 << 16

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)
# Everything else of IPv6 is local, multicast, translated from IPv4, or not given to anybody.
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")


class Refused(ValueError):
    """A URL that is not fetched, or an answer that is not taken; the text says why."""


def is_public(address: str) -> bool:
    """Returns whether an IP address is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip not in _PUBLIC_V6:
        return False
    return not any(ip in network for network in _NOT_PUBLIC if network.version == ip.version)


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float = _TIMEOUT_S,
    ports: dict[str, int] | None = None,
    is_allowed: Callable[[str], bool] = is_public,
    resolve: Callable[..., list[Any]] = socket.getaddrinfo,
) -> bytes:
    """Returns the content behind a URL.

    Args:
      url: http or https, at the port of its scheme, without user and password.
      max_bytes: of the content.
      timeout_s: for everything, redirects included.
      ports: of each scheme; None takes 80 and 443. Another port is refused.
      is_allowed: of an IP address.
      resolve: as socket.getaddrinfo.

    Raises:
      Refused: the URL, one of its addresses or redirects, or the answer is not allowed.
      OSError: the network fails.
    """
    end = time.monotonic() + timeout_s
    for _ in range(_REDIRECTS + 1):
        scheme, host, port, target = _parts(url, ports or _PORTS)
        address = _address(host, port, is_allowed, resolve)
        status, location, content = _get(scheme, host, port, target, address, end, max_bytes)
        if location is None:
            if status != 200:
                raise Refused(f"it answers {status}")
            return content
        url = urljoin(url, location)
    raise Refused(f"more than {_REDIRECTS} redirects")


def _parts(url: str, ports: dict[str, int]) -> tuple[str, str, int, str]:
    """Returns scheme, host, port and what is asked for."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise Refused("a URL is printable ASCII without spaces and backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Refused("it is no URL") from None
    if parts.scheme not in ports:
        raise Refused("only http and https are fetched")
    if "@" in parts.netloc or not parts.hostname:
        raise Refused("a URL has a host and no user")
    if port not in (None, ports[parts.scheme]):
        raise Refused(f"port {port} is not allowed")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, parts.hostname, ports[parts.scheme], target


def _address(
    host: str, port: int, is_allowed: Callable[[str], bool], resolve: Callable[..., list[Any]]
) -> str:
    """Returns the address to dial; all that the name has must be allowed."""
    try:
        addresses = [info[4][0] for info in resolve(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise Refused("its host is not known") from None
    if not addresses or not all(is_allowed(address) for address in addresses):
        raise Refused("its host is no public address")
    return addresses[0]


def _get(
    scheme: str, host: str, port: int, target: str, address: str, end: float, max_bytes: int
) -> tuple[int, str | None, bytes]:
    """Returns status, where it redirects to if it does, and the content."""
    too_late = Refused("it takes too long")
    left = end - time.monotonic()
    if left <= 0:
        raise too_late
    connection = http.client.HTTPConnection(host, port)
    raw = socket.create_connection((address, port), timeout=left)
    # The time-out of a socket is of each read; whoever sends a byte now and then outlives it.
    timer = threading.Timer(end - time.monotonic(), _shut, (raw,))
    timer.daemon = True
    timer.start()
    try:
        connection.sock = raw
        if scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(raw, server_hostname=host)
        headers = {"User-Agent": "align_jax", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        location = response.headers.get("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return response.status, location, b""
        content = bytearray()
        while block := response.read1(_BLOCK):
            content += block
            if len(content) > max_bytes:
                raise Refused(f"it is larger than {max_bytes:,} bytes")
        if time.monotonic() >= end:
            raise too_late
        return response.status, None, bytes(content)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= end:
            raise too_late from None
        raise Refused(f"its server fails ({type(error).__name__})") from None
    finally:
        timer.cancel()
        connection.close()
        raw.close()


def _shut(raw: socket.socket) -> None:
    try:
        raw.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass
