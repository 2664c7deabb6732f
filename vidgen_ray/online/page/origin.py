"""Where a request comes from, and by which name it asks: a browser also carries out what another site's page wants of us, with
our cookie, or of a server on the user's own machine."""

from urllib.parse import urlsplit

from starlette.requests import Request


def same_origin(request: Request) -> bool:
    """True for a request of our own pages, and for a client that is no browser and so says nothing of where it comes from.

    `Sec-Fetch-Site` cannot be written by a page and does not depend on proxies, but browsers leave it out on plain http
    beyond loopback; then `Origin`, which they send with each POST, must name the host they sent it to.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def host_of(request: Request) -> str:
    """The name by which the server was asked, without its port."""
    host = request.headers.get("host", "")
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
