"""Pages of ended jobs for the gallery: the newest, those that match a search, or those with given ids. No HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import QueryParams

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import FINAL, Job
from vidgen_ray.online.store.store import UnknownJob

PAGE_LENGTH = 12
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
        found = server.store.search(tenant.name, search.split(), after=after, limit=PAGE_LENGTH)
    except UnknownJob:
        return None
    return GalleryPage(found.jobs, search=search, after=after, older=found.older)


def jobs_with_ids(server: ServerContext, tenant: Tenant, ids: Sequence[str]) -> list[Job]:
    """Return the ended jobs of the tenant with these ids, at most `MAX_IDS`. Skips ids of other tenants and deleted jobs."""
    jobs = (server.store.get(each, tenant.name) for each in dict.fromkeys(ids[:MAX_IDS]))
    return [job for job in jobs if job is not None and job.state.is_final]
