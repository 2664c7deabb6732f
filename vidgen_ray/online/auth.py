"""Authentication: API keys, browser sessions, checks of origin and host, and the authentication of requests.

Only the SHA-256 of a key or a session token is stored. Both have 256 random bits, so a slow hash is not needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from urllib.parse import urlencode, urlsplit

import yaml
from pydantic import Field, ValidationError
from sqlalchemy import Engine, delete, insert, select
from starlette.requests import Request

from vidgen_ray.errors import FrozenModel, SetupError, StrictModel
from vidgen_ray.online.api_error import ApiError, too_many_requests
from vidgen_ray.online.server_settings import Budget, Limits
from vidgen_ray.online.store.database import READS, SESSIONS, read_secret, webhook_secret
from vidgen_ray.system.files import load_yaml, new_file

_ENVIRONMENT = "VIDGEN_API_KEYS"
"""Environment variable with further keys: TENANT=SHA256, separated by commas."""
_PREFIX = "vg-"
LOCAL_TENANT = "local"
"""Tenant, and key id, of every request to a server without keys."""
KEY_ID_LENGTH = 12
MINUTE_S = 60.0
SESSION_COOKIE = "vidgen_session"
SESSION_S = 7 * 24 * 3600
"""Seconds until a browser session expires."""
SIGNED_S = 3600
"""Seconds for which a signed URL is valid."""
SIGNED = ("key", "expires", "signature")
"""Parameters of the query of a signed URL, besides its variant."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class KeyRecord(StrictModel):
    """One entry of the keys file."""

    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal")
    limits: Limits | None = Field(None, description="those that differ from the limits of the server")
    expires_at: datetime | None = Field(None, description="with a time zone; None: never")


class KeyFile(StrictModel):
    """Content of the keys file."""

    keys: tuple[KeyRecord, ...] = Field(min_length=1)


class Tenant(FrozenModel):
    """Tenant of a request. A tenant may have several keys, all of which see the same jobs."""

    name: str
    key_id: str
    """Public part of the key: the first digits of its SHA-256."""
    limits: Limits


class ApiKeys:
    """API keys of a server. Without any key, every request belongs to `LOCAL_TENANT`."""

    def __init__(self, records: Sequence[KeyRecord], limits: Limits) -> None:
        self._records = tuple(records)
        self._limits = limits

    @property
    def are_required(self) -> bool:
        return bool(self._records)

    def verify(self, key: str | None) -> Tenant | None:
        """Return the tenant of a key, or `None` if the key is unknown or expired.

        Compares with every record, so the time taken reveals nothing.
        """
        if not self._records:
            return Tenant(name=LOCAL_TENANT, key_id=LOCAL_TENANT, limits=self._limits)
        digest = hash_key(key or "").encode()
        match = None
        for record in self._records:
            if hmac.compare_digest(record.sha256.encode(), digest):
                match = record
        return None if match is None or key is None else self._tenant(match)

    def by_id(self, key_id: str) -> Tenant | None:
        """Return the tenant of a key that was verified before, or `None` if the key has expired or was removed since."""
        if not self._records:
            return self.verify(None) if key_id == LOCAL_TENANT else None
        record = next((record for record in self._records if _key_id(record) == key_id), None)
        return None if record is None else self._tenant(record)

    @property
    def budgets(self) -> list[Budget]:
        """All budgets of all keys."""
        own = (record.limits for record in self._records if record.limits is not None)
        return [budget for limits in (self._limits, *own) for budget in limits.budgets]

    def check_budgets(self, gpu_hour_price: float | None) -> None:
        """Raise SetupError for a budget in money without a price."""
        if gpu_hour_price is None and any(budget.cost is not None for budget in self.budgets):
            raise SetupError("budgets: one in money (`cost`) needs the setting gpu_hour_price. Set it, or use gpu_seconds.")

    def public_name(self, tenant: str) -> str:
        """Return the name of a tenant in metrics, which everybody can read: the id of its first key. `local` without a key."""
        return next((_key_id(record) for record in self._records if record.tenant == tenant), LOCAL_TENANT)

    def _tenant(self, record: KeyRecord) -> Tenant | None:
        if record.expires_at is not None and record.expires_at <= datetime.now(UTC):
            return None
        limits = record.limits
        own = {} if limits is None else {name: getattr(limits, name) for name in limits.model_fields_set}
        return Tenant(name=record.tenant, key_id=_key_id(record), limits=self._limits.model_copy(update=own))


class Authenticator:
    """Authenticates the requests of the API and of the web page. Methods that are not async block: they read sessions from the
    database.

    A session of a browser is a random token in a cookie, whose digest is in the database of the jobs: every replica accepts it,
    and it survives a restart. Each request looks its key up again: an expired key ends its sessions at once, a key removed from
    the keys file ends them at the next start.
    Counts the requests of each key in this process: with N API replicas a key may send N times as many.
    """

    def __init__(self, keys: ApiKeys, engine: Engine) -> None:
        self.keys = keys
        self._engine = engine
        self._lock = Lock()
        self._requests: defaultdict[str, deque[float]] = defaultdict(deque)
        """Key id -> times of its requests in the last minute."""

    async def api_tenant(self, request: Request, key: str | None) -> Tenant:
        """Return the tenant of an API request and count the request.

        Without an Authorization header the session cookie of the page is accepted. Browsers name the site that sends a request
        that changes something, and other sites are refused.
        Raises ApiError: 400 for an invalid URL, 401 without a valid key, 403 for another origin or host, 429 over the
        rate limit.
        """
        self._check_request(request)
        if request.method not in SAFE_METHODS and not is_same_origin(request):
            raise ApiError(403, "Cross-origin request refused.", code="cross_origin")
        has_key = "authorization" in request.headers
        tenant = self.keys.verify(key)
        if tenant is None and not has_key:
            tenant = await asyncio.to_thread(self.session_tenant, request)
        if tenant is None:
            message = "Invalid API key." if has_key else "No API key. Send it as `Authorization: Bearer KEY`."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", type="authentication_error", headers=headers)
        self._count_request(tenant)
        return tenant

    def page_tenant(self, request: Request) -> Tenant | None:
        """Return the tenant signed in to the page and count the request, or return `None` without a valid session.

        Raises ApiError: 400 for an invalid URL, 403 for another host, 429 over the rate limit.
        """
        self._check_request(request)
        tenant = self.session_tenant(request)
        if tenant is not None:
            self._count_request(tenant)
        return tenant

    def signed_query(self, tenant: Tenant, job_id: str, variant: str) -> str:
        """Return the query of a URL that needs no key for `SIGNED_S` seconds. Blocks at the first call."""
        expires = str(int(time.time()) + SIGNED_S)
        signature = self._signature(tenant.key_id, job_id, variant, expires)
        return urlencode({"variant": variant, "key": tenant.key_id, "expires": expires, "signature": signature})

    def signed_tenant(self, request: Request, job_id: str, variant: str) -> Tenant:
        """Return the tenant whose key has signed the URL of a request, and count the request apart from those with the key.

        Raises ApiError: 400 for an invalid URL, 403 for a signature that has expired, is that of another URL, or whose key is
        gone, 429 over the rate limit. Blocks.
        """
        self._check_request(request)
        key_id, expires, signature = (request.query_params.get(name, "") for name in SIGNED)
        expected = self._signature(key_id, job_id, variant, expires)
        is_valid = hmac.compare_digest(expected.encode(), signature.encode("utf-8", "surrogatepass"))
        tenant = self.keys.by_id(key_id) if is_valid and int(expires) > time.time() else None
        if tenant is None:
            message = "The signed URL has expired or is invalid. Send the API key, or request a new URL with it."
            raise ApiError(403, message, code="invalid_signature")
        self._count_request(tenant.model_copy(update={"key_id": f"{key_id} signed"}))
        return tenant

    def _signature(self, *signed: str) -> str:
        return hmac.new(self._secret, "\n".join(signed).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    @cached_property
    def _secret(self) -> bytes:
        return read_secret(self._engine)

    def webhook_secret(self, tenant: Tenant) -> str:
        """Return the secret that signs messages to the receivers that requests of a tenant name. Blocks at the first call."""
        return webhook_secret(self._secret, tenant.name)

    def session_tenant(self, request: Request) -> Tenant | None:
        """Return the tenant of the session cookie, or `None` without a valid session. Checks nothing else.

        A server without keys needs no session.
        """
        if not self.keys.are_required:
            return self.keys.verify(None)
        if not (token := request.cookies.get(SESSION_COOKIE)):
            return None
        valid = SESSIONS.c.digest == hash_key(token), SESSIONS.c.expires_at > time.time()
        with self._engine.connect() as connection:
            connection.execution_options(**READS)
            key_id = connection.scalar(select(SESSIONS.c.key_id).where(*valid))
        return self.keys.by_id(key_id) if key_id else None

    def sign_in(self, key: str) -> str | None:
        """Return the token of a new session, or `None` if the key is invalid. Also deletes expired sessions."""
        tenant = self.keys.verify(key) if key else None
        if tenant is None:
            return None
        token, now = secrets.token_urlsafe(32), time.time()
        with self._engine.begin() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.expires_at < now))
            row = {"digest": hash_key(token), "key_id": tenant.key_id, "expires_at": now + SESSION_S}
            connection.execute(insert(SESSIONS).values(row))
        return token

    def sign_out(self, request: Request) -> None:
        if token := request.cookies.get(SESSION_COOKIE):
            with self._engine.begin() as connection:
                connection.execute(delete(SESSIONS).where(SESSIONS.c.digest == hash_key(token)))

    def _count_request(self, tenant: Tenant) -> None:
        """Raise ApiError 429 over the limit."""
        allowed, now = tenant.limits.requests_per_minute, time.monotonic()
        with self._lock:
            times = self._requests[tenant.key_id]
            while times and times[0] <= now - MINUTE_S:
                times.popleft()
            if len(times) < allowed:
                times.append(now)
                return
            wait_s = times[-allowed] + MINUTE_S - now
        raise too_many_requests(
            f"More than {allowed} requests in a minute with this key", "rate_limit_exceeded", max(0.05, wait_s)
        )

    def _check_request(self, request: Request) -> None:
        # PostgreSQL rejects a NUL in queries.
        if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
            raise ApiError(400, "The URL contains a NUL character.", code="invalid_url")
        if not self.keys.are_required:
            check_is_local(request)


def load_keys(file: Path | None, limits: Limits, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Return the keys of the file and of VIDGEN_API_KEYS. Raises SetupError that names the invalid entry."""
    records = [*_read_key_file(file)] if file else []
    for entry in filter(None, (part.strip() for part in environment.get(_ENVIRONMENT, "").split(","))):
        tenant, _, digest = entry.partition("=")
        try:
            records.append(KeyRecord(tenant=tenant, sha256=digest))
        except ValidationError:
            raise SetupError(f"{_ENVIRONMENT}: must be TENANT=SHA256, several separated by commas") from None
    return ApiKeys(records, limits)


def add_key(file: Path, record: KeyRecord) -> None:
    """Add a key to a keys file. Creates the file if needed, readable by its owner only. Comments in the file are lost.

    Raises SetupError if the file cannot be read or written.
    """
    before = _read_key_file(file) if file.exists() else ()
    records = [each.model_dump(mode="json", exclude_unset=True, exclude_none=True) for each in (*before, record)]
    try:
        with new_file(file.absolute()) as tmp:
            tmp.chmod(0o600)
            tmp.write_text(yaml.safe_dump({"keys": records}, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"keys file {file}: cannot be written ({error.strerror})") from None


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def check_bind_host(host: str, keys: ApiKeys) -> None:
    """Raises SetupError for a server without keys that listens beyond this machine."""
    if not keys.are_required and not is_loopback(host):
        raise SetupError(
            f"host {host}: reachable from other machines, which requires API keys. Create one with `vidgen keys new`, "
            "or listen on 127.0.0.1."
        )


def check_token_required(host: str, token_is_required: bool) -> None:
    """Raises SetupError for a server that listens beyond this machine on a Ray that requires no token.

    Ray's own ports listen on all interfaces there, and run the code of anyone who reaches them.
    """
    if not token_is_required and not is_loopback(host):
        raise SetupError(
            f"host {host}: reachable from other machines, which requires Ray's token authentication. "
            "Run `ray get-auth-token --generate && chmod 600 ~/.ray/auth_token`, then `export RAY_AUTH_MODE=token`, and "
            "start Ray again, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address always means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def is_https(request: Request) -> bool:
    """Return whether the client uses TLS. A proxy that terminates it sets X-Forwarded-Proto.

    A client that forges this deceives only itself.
    """
    return "https" in (request.url.scheme, *map(str.strip, request.headers.get("x-forwarded-proto", "").split(",")))


def is_same_origin(request: Request) -> bool:
    """Return whether a request comes from a page of this server or from a client that is not a browser.

    `Sec-Fetch-Site` cannot be set by a page and does not depend on proxies, but browsers omit it on plain HTTP beyond loopback.
    Then `Origin`, which browsers send with each POST, must name the requested host.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")


def check_is_local(request: Request) -> None:
    """Raises ApiError 403 unless the request comes from this machine and asks for a loopback name. For servers without keys."""
    # Behind a proxy on this machine every client looks local.
    if forwarded := [name for name in FORWARDING_HEADERS if name in request.headers]:
        message = f"A server without API keys accepts no requests through a proxy, got the header {forwarded[0]}."
        raise ApiError(403, message, code="unknown_host")
    if request.client is not None and not is_loopback(request.client.host):
        raise ApiError(403, "A server without API keys accepts requests from its own machine only.", code="unknown_host")
    # DNS rebinding: another site's name may resolve to this machine, and its page could then read the responses.
    host = request.headers.get("host", "")
    if not is_loopback(host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]):
        raise ApiError(403, "A server without API keys accepts requests for localhost only.", code="unknown_host")


def _key_id(record: KeyRecord) -> str:
    return record.sha256[:KEY_ID_LENGTH]


def _read_key_file(file: Path) -> Sequence[KeyRecord]:
    try:
        content = load_yaml(file)
    except OSError as error:
        raise SetupError(f"keys file {file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        # The message of the YAML error quotes the line, which may contain a plain key.
        place = re.search(r"line \d+", str(error))
        why = "YAML aliases are not allowed; write the values out" if "aliases" in str(error) else "not YAML"
        raise SetupError(f"keys file {file}: {why}{f' ({place[0]})' if place else ''}") from None
    try:
        return KeyFile.model_validate(content).keys
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, detail["loc"])) or "the file"
        raise SetupError(f"keys file {file}: {where}: {detail['msg']}") from None
