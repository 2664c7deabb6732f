"""Templates, security headers and the checks of every request, shared by the routes of the page."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.web.form_controls import clip_defaults, control_groups
from vidgen_ray.online.web.job_cards import Card, card_of

STATIC = Path(__file__).parent / "static"
LOOK = "vidgen_ray.report", "look"
"""Package and folder of the stylesheet and the script that the page shares with the gallery of a run."""
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
TenantHandler = Callable[[Request, Tenant], Awaitable[Response]]


class PageContext:
    """Renders the templates. Holds no state of a request."""

    def __init__(self, server: ServerContext) -> None:
        self.server = server
        self.lora_names = {path: name for name, path in server.settings.loras.items()}
        self.control_groups = control_groups(server.serving_profile)
        self.clip_defaults = clip_defaults(server.serving_profile)
        self._templates = Environment(
            loader=PackageLoader("vidgen_ray.online.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        look = Path(str(resources.files(LOOK[0]))) / LOOK[1]
        self._assets = hashlib.sha256(
            b"".join(file.read_bytes() for folder in (STATIC, look) for file in sorted(folder.iterdir()))
        ).hexdigest()[:12]

    def for_tenant(self, handler: TenantHandler) -> Callable[[Request], Awaitable[Response]]:
        """Return a route that calls the handler for signed-in browsers only."""

        async def route(request: Request) -> Response:
            tenant = await asyncio.to_thread(self.server.auth.page_tenant, request)
            if tenant is None:
                return _signed_out_response(request)
            return await handler(request, tenant)

        return route

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.html(request, template, **values), status, HEADERS)

    def html(self, request: Request, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(
            base=base_path(request),
            assets=self._assets,
            signed_in=self.server.auth.keys.are_required,
            **values,
        )

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
            "preview": card.preview,
            "live": str(macros.live(card)) if card.active else None,
            "card": str(macros.card_item(card)) if with_card else None,
        }

    def message(self, request: Request, status: int, heading: str, message: str) -> Response:
        """Respond with a page that shows a message."""
        return self.render(request, "message.html", status, heading=heading, message=message)

    def cross_origin_response(self, request: Request) -> Response:
        """Refuse a request sent by a page of another site."""
        return self.message(request, 403, "Request refused", "The request came from another website and was ignored.")


def base_path(request: Request) -> str:
    """Return the path at which the app is mounted, without a trailing slash."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def _signed_out_response(request: Request) -> Response:
    # The script of the page, and its event stream, cannot follow a redirection to a page.
    if request.headers.get("accept") == "application/json" or request.url.path.endswith("/events"):
        return JSONResponse({"message": "Signed out."}, 401, HEADERS)
    return RedirectResponse(f"{base_path(request)}/sign-in", 303)
