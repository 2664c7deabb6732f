"""Where a request comes from, and by which name it asks: a browser also carries out what another site's page wants of us, with
our cookie, or of a server on the user's own machine."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import is_loopback


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


def check_is_local(request: Request) -> None:
    """For a server without keys. Raises ApiError 403 where another machine asks, or for a page of another site."""
    # Behind a proxy on this machine everybody looks local; only the name tells.
    if request.client is not None and not is_loopback(request.client.host):
        raise ApiError(403, "Without API keys this server answers to its own machine only", code="unknown_host")
    if not is_loopback(host_of(request.headers)):
        # A name of somebody's own that leads here would let his page read what this server answers.
        raise ApiError(403, "Without API keys this server answers to localhost only", code="unknown_host")


def check_url(request: Request) -> None:
    """Raises ApiError 400 for a URL that names what cannot be."""
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
        # PostgreSQL cannot even be asked for it.
        raise ApiError(400, "A NUL stands in the URL", code="invalid_url")


def host_of(headers: Headers) -> str:
    """The name by which the server was asked, without its port."""
    host = headers.get("host", "")
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
