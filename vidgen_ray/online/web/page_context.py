"""What every route of the page needs: the templates, who is asking, and the headers that keep a browser from running or
framing anything that is not ours."""

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
    # No inline script or style, nothing from elsewhere, no frame round it. blob: are the previews of chosen photos.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: that takes the origin from forms, by which their requests are known as ours.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class PageContext:
    """Shared by the routes; holds no state of a request."""

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

    def answer(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        page = self._templates.get_template(template).render(base=base_of(request), assets=self._assets, **values)
        return HTMLResponse(page, status, HEADERS)

    def card(self, job: Job, base: str) -> Card:
        return card_of(job, base, self.lora_names)

    def job_update(self, job: Job, base: str, with_card: bool = True) -> dict[str, Any]:
        """A job as the script takes it: how far it is, and its card as markup where that is asked for."""
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


def base_of(request: Request) -> str:
    """Where the application is mounted, without a slash at the end."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def wants_json(request: Request) -> bool:
    """Whether the page's script asks, and not a form by itself."""
    return request.headers.get("accept") == "application/json"
