"""API keys: who may ask. Only their sha256 is kept: a key has 256 random bits, so that nothing slower is needed."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidgen_ray.atomic_files import new_file
from vidgen_ray.errors import SetupError
from vidgen_ray.online.settings import Limits
from vidgen_ray.strict_yaml import StrictLoader

ENVIRONMENT = "VIDGEN_API_KEYS"
"""Keys without a file: TENANT=SHA256, with commas between them."""
PREFIX = "vg-"
LOCAL = "local"
"""The tenant of a server without keys."""


class KeyRecord(BaseModel):
    """One entry of the file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key, in hexadecimal")
    limits: Limits | None = Field(None, description="none: those of the server")
    expires_at: datetime | None = Field(None, description="with a time zone; none: never")


class KeyFile(BaseModel):
    """The content of the file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyRecord, ...] = Field(min_length=1)


class Tenant(BaseModel):
    """Who asks. Several keys may be of one tenant: they see the same jobs."""

    model_config = ConfigDict(frozen=True)

    name: str
    key_id: str
    """What of the key may be seen."""
    limits: Limits


class Keys:
    """The keys of a server. Without any it knows one tenant, and must not be reached from elsewhere."""

    def __init__(self, records: Sequence[KeyRecord], limits: Limits) -> None:
        self._records = tuple(records)
        self._limits = limits

    @property
    def are_required(self) -> bool:
        return bool(self._records)

    def verify(self, key: str | None) -> Tenant | None:
        """Whose key it is; none where it is nobody's, or has expired. All are compared, so the time tells nothing."""
        if not self._records:
            return Tenant(name=LOCAL, key_id=LOCAL, limits=self._limits)
        given = hash_of(key or "").encode()
        found = None
        for record in self._records:
            if hmac.compare_digest(record.sha256.encode(), given):
                found = record
        return None if found is None or key is None else self._tenant(found)

    def by_id(self, key_id: str) -> Tenant | None:
        """The tenant of a key that was verified before; none where it has expired since, or is not among the keys any more."""
        if not self._records:
            return self.verify(None) if key_id == LOCAL else None
        record = next((record for record in self._records if _id(record) == key_id), None)
        return None if record is None else self._tenant(record)

    def _tenant(self, record: KeyRecord) -> Tenant | None:
        if record.expires_at is not None and record.expires_at <= datetime.now(UTC):
            return None
        return Tenant(name=record.tenant, key_id=_id(record), limits=record.limits or self._limits)


def load_keys(file: Path | None, limits: Limits, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the file and those of VIDGEN_API_KEYS. Raises SetupError with what is wrong where."""
    records = [*_from_file(file)] if file else []
    for entry in filter(None, (part.strip() for part in environment.get(ENVIRONMENT, "").split(","))):
        tenant, _, digest = entry.partition("=")
        try:
            records.append(KeyRecord(tenant=tenant, sha256=digest))
        except ValidationError:
            raise SetupError(f"{ENVIRONMENT}: must be TENANT=SHA256, with commas between several") from None
    return Keys(records, limits)


def add_key(file: Path, record: KeyRecord) -> None:
    """Add a key to a file of keys, which is made where it is missing, for its owner's eyes only. Comments in it are lost.

    Raises SetupError for a file that cannot be read or written.
    """
    before = _from_file(file) if file.exists() else ()
    records = [each.model_dump(mode="json", exclude_none=True) for each in (*before, record)]
    try:
        with new_file(file.absolute()) as tmp:
            tmp.chmod(0o600)
            tmp.write_text(yaml.safe_dump({"keys": records}, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"keys file {file}: cannot be written ({error.strerror})") from None


def check_reach(host: str, keys: Keys) -> None:
    """Raises SetupError for a server that others could reach, and that would ask nobody who they are."""
    if not keys.are_required and not is_loopback(host):
        raise SetupError(
            f"host {host}: can be reached from other machines, which needs API keys; make one with `vidgen keys new`, "
            "or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, can only be this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _id(record: KeyRecord) -> str:
    return record.sha256[:12]


def _from_file(file: Path) -> Sequence[KeyRecord]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise SetupError(f"keys file {file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Without the error's own words, which quote the line: somebody may have written a key itself there.
        place = re.search(r"line \d+", str(error))
        raise SetupError(f"keys file {file}: not YAML{f' ({place[0]})' if place else ''}") from None
    try:
        return KeyFile.model_validate(content).keys
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, detail["loc"])) or "the file"
        raise SetupError(f"keys file {file}: {where}: {detail['msg']}") from None
