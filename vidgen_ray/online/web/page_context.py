"""Templates and security headers, shared by the routes of the page."""

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.web.job_cards import ACTIVE, Card, card_of

STATIC = Path(__file__).parent / "static"
HEADERS = {
    # No inline scripts or styles, no other origins, no framing. blob: allows previews of chosen photos.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then send `Origin: null` with forms, and is_same_origin would reject them.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class PageContext:
    """Renders the templates. Holds no state of a request."""

    def __init__(self, server: ServerContext) -> None:
        self.server = server
        self.lora_names = {path: name for name, path in server.settings.loras.items()}
        self._templates = Environment(
            loader=PackageLoader("vidgen_ray.online.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._assets = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(STATIC.iterdir()))).hexdigest()[:12]

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        html = self._templates.get_template(template).render(base=base_path(request), assets=self._assets, **values)
        return HTMLResponse(html, status, HEADERS)

    def card(self, job: Job, base: str) -> Card:
        return card_of(job, base, self.lora_names)

    def job_update(self, job: Job, base: str, with_card: bool = True) -> dict[str, Any]:
        """Return a job as page.js expects it: its progress and, with `with_card`, the HTML of its card."""
        card = self.card(job, base)
        macros: Any = self._templates.get_template("card.html").make_module({"base": base})
        return {
            "id": job.id,
            "version": job.version,
            "state": job.state.value,
            "percent": job.progress,
            "live": str(macros.live(card)) if job.state in ACTIVE else None,
            "card": str(macros.card_item(card)) if with_card else None,
        }


def base_path(request: Request) -> str:
    """Return the path at which the app is mounted, without a trailing slash."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def wants_json(request: Request) -> bool:
    """Return whether page.js sent the request, rather than a plain form."""
    return request.headers.get("accept") == "application/json"
