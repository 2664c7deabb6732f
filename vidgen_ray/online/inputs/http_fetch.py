"""Requests to places that somebody else named. They reach public addresses only, whatever a name resolves to.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address: there is no second look
that could find another one. Redirects start from the beginning.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from vidgen_ray.errors import VidgenError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
REFUSED = tuple(
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b::/96", "64:ff9b:1::/48"))
)
"""Beside what Python calls private: a cloud's own services under public addresses, and translators to any address."""
UNICAST = ipaddress.ip_network("2000::/3")
"""All that is given to anybody in IPv6. Older Pythons call some of the rest global."""
HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|[0-9a-f:.]+")
REDIRECTS = (301, 302, 303, 307, 308)


class BlockedUrl(VidgenError):
    """A place that must not be asked. Says what about it, not what is there."""


class UnreachableUrl(VidgenError):
    """A place that may be asked did not answer as it should."""


class HttpResponse(NamedTuple):
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    """Their names in lower case."""
    body: bytes


def check_address(address: str) -> None:
    """Raises Refused for every address that is not a public one of a single machine, however it is written."""
    given = ipaddress.ip_address(address.partition("%")[0])
    inner: Address = given
    if isinstance(given, ipaddress.IPv6Address):
        # Forms that carry an IPv4 address: the mapped one is that address, the others lead to a translator.
        if given.sixtofour or given.teredo:
            raise BlockedUrl(f"{address} is an address of a translator")
        inner = given.ipv4_mapped or given
        if isinstance(inner, ipaddress.IPv6Address) and inner not in UNICAST:
            raise BlockedUrl(f"{address} is not a public address")
    if not inner.is_global or inner.is_multicast or any(inner in network for network in REFUSED):
        raise BlockedUrl(f"{address} is not a public address")


class _Checked(httpcore.NetworkBackend):
    """Resolves, checks, and connects to what was checked."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError(f"{host}: no such host") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._allow_private:
            # All of them: one that is private shows that the name is not what it seems to be.
            for address in addresses:
                check_address(address)
        return self._plain.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


class PublicHttpClient:
    """Makes the requests. Nothing is kept between two of them."""

    def __init__(self, timeout_s: float, *, allow_private: bool = False) -> None:
        """`allow_private` lifts the check of addresses, for tests and for webhooks in a network of one's own."""
        self._timeout_s = timeout_s
        self._allow_private = allow_private

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        cap_bytes: int,
        may: Callable[[SplitResult], None] = lambda parts: None,
    ) -> HttpResponse:
        """One request; redirects are not followed. The answer may have `cap_bytes`, or of an error the first ones are given.

        Raises Refused, also where `may` does, and Unreachable.
        """
        parts = parse_url(url)
        may(parts)
        if not self._allow_private and parts.port not in (None, *PORTS.values()):
            raise BlockedUrl(f"port {parts.port} is not one of {', '.join(map(str, PORTS.values()))}")
        deadline = time.monotonic() + self._timeout_s
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)
        sent = [("Host", parts.netloc), ("Connection", "close"), *(headers or {}).items()]
        if method == "POST":
            sent.append(("Content-Length", str(len(body))))
        try:
            with (
                httpcore.ConnectionPool(
                    ssl_context=ssl.create_default_context(), network_backend=_Checked(self._allow_private)
                ) as pool,
                pool.stream(method, url, headers=sent, content=body, extensions={"timeout": timeout}) as response,
            ):
                content = bytearray()
                for chunk in response.iter_stream():
                    content += chunk
                    if len(content) > cap_bytes:
                        if response.status == 200:
                            raise BlockedUrl(f"the answer is larger than {cap_bytes} bytes")
                        break
                    if time.monotonic() > deadline:
                        raise UnreachableUrl(f"took longer than {self._timeout_s:g} s")
                answered = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                return HttpResponse(response.status, answered, bytes(content))
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            # OpenSSL's and the kernel's own words would tell what listens where.
            raise UnreachableUrl(f"cannot be reached ({type(error).__name__})") from None


class ImageFetcher:
    """Fetches what clients name by URL, from the hosts that are allowed."""

    def __init__(
        self, allow_hosts: Sequence[str], timeout_s: float, redirects: int, cap_bytes: int, *, allow_private: bool = False
    ) -> None:
        self._allow_hosts = [host.lower() for host in allow_hosts]
        self._redirects = redirects
        self._cap_bytes = cap_bytes
        self._outside = PublicHttpClient(timeout_s, allow_private=allow_private)

    def fetch(self, url: str) -> bytes:
        """The content at a URL. Raises Refused or Unreachable."""
        for _ in range(self._redirects + 1):
            headers = {"Accept": "image/*", "User-Agent": "vidgen-ray"}
            answer = self._outside.request("GET", url, headers=headers, cap_bytes=self._cap_bytes, may=self._may)
            if answer.status in REDIRECTS and "location" in answer.headers:
                url = urljoin(url, answer.headers["location"])
                continue
            if answer.status != 200:
                raise UnreachableUrl(f"answered {answer.status}")
            return answer.body
        raise BlockedUrl(f"more than {self._redirects} redirects")

    def _may(self, parts: SplitResult) -> None:
        host = (parts.hostname or "").rstrip(".")
        for allowed in self._allow_hosts:
            if host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])):
                return
        raise BlockedUrl(f"host {host[:100]!r} is not among those that are allowed")


def parse_url(url: str) -> SplitResult:
    """The parts of a plain http or https URL. Raises Refused for whatever two programs might read differently."""
    if not url.isascii() or not url.isprintable() or any(sign in url for sign in ' \\"<>^`{|}'):
        raise BlockedUrl("a URL must be plain ASCII; write other letters as %XX, and names as xn--...")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BlockedUrl("not a URL") from None
    if parts.scheme not in PORTS:
        raise BlockedUrl(f"scheme {parts.scheme[:20]!r} is not http or https")
    if "@" in parts.netloc:
        raise BlockedUrl("a URL with a name or a password in it")
    if not host or not HOST.fullmatch(host.rstrip(".")) or port == 0:
        raise BlockedUrl("not the name of a host")
    return parts
