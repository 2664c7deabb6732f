"""HTTP client for URLs from clients and webhook settings. It connects to public addresses only (SSRF protection).

A host name is resolved once, all its addresses are checked, and the connection goes to a checked address. There is no second
lookup that could return another address (DNS rebinding). Redirect targets are checked like the first URL.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from vidgen_ray.errors import VidgenError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
BLOCKED_NETWORKS = tuple(
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b::/96", "64:ff9b:1::/48"))
)
"""Networks that Python does not call private: cloud services under public addresses, and translators to any address."""
UNICAST = ipaddress.ip_network("2000::/3")
"""All public IPv6 addresses. Older Python versions call some other addresses global."""
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|[0-9a-f:.]+")
FETCH_TIMEOUT_S = 10.0
"""Seconds for one request for an image."""
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)


class BlockedUrl(VidgenError):
    """The URL must not be requested. The message does not reveal what is there."""


class UnreachableUrl(VidgenError):
    """The request failed: no connection, a timeout or an error status."""


class HttpResponse(NamedTuple):
    """Response of a server."""

    status: int
    headers: Mapping[str, str]
    """Names are in lower case."""
    body: bytes


def check_address(address: str) -> None:
    """Raise BlockedUrl unless the address is a public unicast address, in any notation."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    effective: Address = parsed
    if isinstance(parsed, ipaddress.IPv6Address):
        # IPv6 addresses that contain an IPv4 address: a mapped one is that address, the others lead to a translator.
        if parsed.sixtofour or parsed.teredo:
            raise BlockedUrl(f"{address} is the address of a translator (6to4 or Teredo)")
        effective = parsed.ipv4_mapped or parsed
        if isinstance(effective, ipaddress.IPv6Address) and effective not in UNICAST:
            raise BlockedUrl(f"{address} is not a public address")
    if not effective.is_global or effective.is_multicast or any(effective in network for network in BLOCKED_NETWORKS):
        raise BlockedUrl(f"{address} is not a public address")


class _LimitedStream(httpcore.NetworkStream):
    """Connection with one deadline for all its reads and writes: a server could send a byte now and then for days."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def _left_s(self) -> float:
        if (left_s := self._deadline - time.monotonic()) <= 0:
            raise httpcore.ReadTimeout
        return left_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _LimitedStream(self._stream.start_tls(ssl_context, server_hostname, self._left_s()), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CheckedBackend(httpcore.NetworkBackend):
    """Network backend that resolves a host, checks all its addresses and connects to the first."""

    def __init__(self, allow_private: bool, deadline: float) -> None:
        self._allow_private = allow_private
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError(f"{host}: host not found") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in resolved))
        if not self._allow_private:
            # All of them: one private address is a sign of an attack.
            for address in addresses:
                check_address(address)
        stream = self._backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)
        return _LimitedStream(stream, self._deadline)


class PublicHttpClient:
    """HTTP client without connection reuse, cookies or redirects."""

    def __init__(self, timeout_s: float, *, allow_private: bool = False) -> None:
        """`timeout_s` limits a whole request. `allow_private` disables the address check, for tests and webhooks in a private
        network."""
        self._timeout_s = timeout_s
        self._allow_private = allow_private

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_bytes: int,
        check: Callable[[SplitResult], None] = lambda parts: None,
    ) -> HttpResponse:
        """Send one request without following redirects.

        A body of more than `max_bytes` is an error if the status is 200, and truncated otherwise. `check` may raise BlockedUrl
        for the parsed URL. Raises BlockedUrl and UnreachableUrl.
        """
        parts = parse_url(url)
        check(parts)
        if not self._allow_private and parts.port not in (None, *PORTS.values()):
            raise BlockedUrl(f"port {parts.port} is not allowed, must be {' or '.join(map(str, PORTS.values()))}")
        backend = _CheckedBackend(self._allow_private, time.monotonic() + self._timeout_s)
        request_headers = [("Host", parts.netloc), ("Connection", "close"), *(headers or {}).items()]
        if method == "POST":
            request_headers.append(("Content-Length", str(len(body))))
        try:
            with (
                httpcore.ConnectionPool(ssl_context=ssl.create_default_context(), network_backend=backend) as pool,
                pool.stream(
                    method,
                    url,
                    headers=request_headers,
                    content=body,
                    extensions={"timeout": {"connect": self._timeout_s}},
                ) as response,
            ):
                content = bytearray()
                for chunk in response.iter_stream():
                    content += chunk
                    if len(content) > max_bytes:
                        if response.status == 200:
                            raise BlockedUrl(f"the response is larger than {max_bytes} bytes")
                        break
                response_headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                return HttpResponse(response.status, response_headers, bytes(content))
        except httpcore.TimeoutException:
            raise UnreachableUrl(f"took longer than {self._timeout_s:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            # The messages of OpenSSL and the kernel would reveal which services are listening.
            raise UnreachableUrl(f"cannot be reached ({type(error).__name__})") from None


class ImageFetcher:
    """Fetches images from the allowed hosts."""

    def __init__(self, allow_hosts: Sequence[str], max_bytes: int, *, allow_private: bool = False) -> None:
        self._allow_hosts = allow_hosts
        self._max_bytes = max_bytes
        self._client = PublicHttpClient(FETCH_TIMEOUT_S, allow_private=allow_private)

    def fetch(self, url: str) -> bytes:
        """Return the content of a URL, following redirects. Raises BlockedUrl and UnreachableUrl."""
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Accept": "image/*", "User-Agent": "vidgen-ray"}
            response = self._client.request("GET", url, headers=headers, max_bytes=self._max_bytes, check=self._check_host)
            if response.status in REDIRECTS and "location" in response.headers:
                url = urljoin(url, response.headers["location"])
                continue
            if response.status != 200:
                raise UnreachableUrl(f"status {response.status}")
            return response.body
        raise BlockedUrl(f"more than {MAX_REDIRECTS} redirects")

    def _check_host(self, parts: SplitResult) -> None:
        check_host(parts, self._allow_hosts, "url_inputs")


def check_host(parts: SplitResult, allow_hosts: Iterable[str], setting: str) -> None:
    """Raise BlockedUrl if a host is not in `allow_hosts` of a setting. `*.example.com` allows all subdomains."""
    host = (parts.hostname or "").rstrip(".")
    for allowed in map(str.lower, allow_hosts):
        if host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])):
            return
    raise BlockedUrl(f"host {host[:100]!r} is not in {setting}.allow_hosts")


def parse_url(url: str) -> SplitResult:
    """Split an http or https URL. Raises BlockedUrl for a URL that two programs might parse differently."""
    if not url.isascii() or not url.isprintable() or any(char in url for char in ' \\"<>^`{|}'):
        raise BlockedUrl("a URL must be printable ASCII; escape other characters as %XX and host names as xn--...")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BlockedUrl("not a valid URL") from None
    if parts.scheme not in PORTS:
        raise BlockedUrl(f"scheme {parts.scheme[:20]!r} is not http or https")
    if "@" in parts.netloc:
        raise BlockedUrl("a URL must not contain a user name or password")
    if not host or not _HOST.fullmatch(host.rstrip(".")) or port == 0:
        raise BlockedUrl("the host name or port is invalid")
    return parts
