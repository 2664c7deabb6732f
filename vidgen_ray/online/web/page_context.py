"""What every route of the page needs: the templates, who is asking, and the headers that keep a browser from running or
framing anything that is not ours."""

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse

from vidgen_ray.online.api.deps import Server
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.web.job_cards import ACTIVE, Card, card_of
from vidgen_ray.online.web.origin import check_is_local, check_url
from vidgen_ray.online.web.sessions import COOKIE, Sessions

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

    def __init__(self, server: Server) -> None:
        self.server = server
        self.lora_names = {path: name for name, path in server.settings.loras.items()}
        self.sessions = Sessions(server.store.engine)
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

    def written(self, job: Job, base: str, with_card: bool = True) -> dict[str, Any]:
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

    async def tenant(self, request: Request) -> Tenant | None:
        """Who is signed in; on a server without keys everybody is the one tenant. Raises ApiError 400, 403 and 429."""
        check_url(request)
        if not self.server.keys.are_required:
            check_is_local(request)
        tenant = await run_in_threadpool(self.tenant_now, request)
        if tenant is not None:
            self.server.rate.check(tenant)
        return tenant

    def tenant_now(self, request: Request) -> Tenant | None:
        """Who is signed in, for a caller that may block and has checked the rest."""
        if not self.server.keys.are_required:
            return self.server.keys.verify(None)
        token = request.cookies.get(COOKIE)
        key_id = self.sessions.key_id(token) if token else None
        return self.server.keys.by_id(key_id) if key_id else None


def base_of(request: Request) -> str:
    """Where the application is mounted, without a slash at the end."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def wants_json(request: Request) -> bool:
    """Whether the page's script asks, and not a form by itself."""
    return request.headers.get("accept") == "application/json"
