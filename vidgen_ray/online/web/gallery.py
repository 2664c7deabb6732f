"""Pages of ended jobs for the gallery: the newest, those that match a search, or those with given ids. No HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.datastructures import QueryParams

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import FINAL, Job
from vidgen_ray.online.store.store import UnknownJob

PAGE_LENGTH = 12
SEARCHED_JOBS = 2_000
"""Newest ended jobs that a search looks at."""
SCANNED_AT_ONCE = 200
MAX_IDS = 100
"""Jobs of one page, or of one bulk action, that are named by their ids."""
MAX_SEARCH_LENGTH = 200


@dataclass(frozen=True, slots=True)
class GalleryPage:
    """One page of the gallery, newest first."""

    jobs: list[Job]
    search: str = ""
    favourites: bool = False
    """The jobs were named by their ids: they are the favourites that the browser keeps."""
    after: str | None = None
    older: str | None = None
    """Id after which the next page starts. `None` on the last page."""

    @property
    def is_live(self) -> bool:
        """Return whether new clips belong at the start of this page."""
        return not (self.search or self.favourites or self.after)


def gallery_page(server: ServerContext, tenant: Tenant, query: QueryParams) -> GalleryPage | None:
    """Return the page that the query asks for with `q`, `id` and `after`, or `None` if `after` is not a job of the tenant."""
    if "favourites" in query:
        return GalleryPage(jobs_with_ids(server, tenant, query.getlist("id")), favourites=True)
    search, after = query.get("q", "").strip()[:MAX_SEARCH_LENGTH], query.get("after")
    try:
        if not search:
            page = server.store.list(tenant.name, states=FINAL, after=after, limit=PAGE_LENGTH)
            return GalleryPage(page.jobs, after=after, older=page.jobs[-1].id if page.has_more else None)
        found, older = _search(server, tenant, search, after)
    except UnknownJob:
        return None
    return GalleryPage(found, search=search, after=after, older=older)


def jobs_with_ids(server: ServerContext, tenant: Tenant, ids: Sequence[str]) -> list[Job]:
    """Return the ended jobs of the tenant with these ids, at most `MAX_IDS`. Skips ids of other tenants and deleted jobs."""
    jobs = (server.store.get(each, tenant.name) for each in dict.fromkeys(ids[:MAX_IDS]))
    return [job for job in jobs if job is not None and job.state.is_final]


def _search(server: ServerContext, tenant: Tenant, search: str, after: str | None) -> tuple[list[Job], str | None]:
    """Return a page of jobs that contain all words of the search, and the id after which the next page starts."""
    words = search.casefold().split()
    found: list[Job] = []
    for job in _newest(server, tenant, after):
        if len(found) == PAGE_LENGTH:
            return found, found[-1].id
        if all(word in _searched_text(job) for word in words):
            found.append(job)
    return found, None


def _newest(server: ServerContext, tenant: Tenant, after: str | None) -> Iterator[Job]:
    """Yield at most `SEARCHED_JOBS` ended jobs, newest first."""
    for _ in range(SEARCHED_JOBS // SCANNED_AT_ONCE):
        page = server.store.list(tenant.name, states=FINAL, after=after, limit=SCANNED_AT_ONCE)
        yield from page.jobs
        if not page.has_more:
            return
        after = page.jobs[-1].id


def _searched_text(job: Job) -> str:
    shot = job.shot
    character = job.request.get("character")
    return " ".join(map(str, (shot.prompt, shot.style_prompt or "", character or "", f"seed:{shot.seed}", job.id))).casefold()
