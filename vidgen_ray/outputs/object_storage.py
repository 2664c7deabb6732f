"""Storage of an output folder in an object store (S3 and compatible stores, Google Cloud Storage, Azure), through obstore.

An object store only guarantees that single objects appear atomically, so the last object of a group of files marks the
group as complete. Credentials come from the URL, the environment or, with boto3, the files of the AWS CLI, and are never shown.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.error import HTTPError
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from urllib.request import Request, urlopen

from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.storage import Storage, StoredFile
from vidgen_ray.system import files
from vidgen_ray.system.cache_dir import cache_dir

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta, PutMode, PutResult, UpdateVersion
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ObjectStore, S3Credential

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
MARKER = ".complete"
"""Last object of a folder written by `publish_folder`. Contains the names of its files."""
_BLOCK_BYTES = 8 << 20
CONNECT_TIMEOUT, REQUEST_TIMEOUT = "3s", "1h"
READ_TIMEOUT = "60s"
"""Time without a byte after which a request fails."""
LEASE_READ_TIMEOUT = "10s"
"""Shorter, so that a lease can be refreshed again before it counts as lost."""
MAX_UPLOADS = 4
"""Files of a shot that are uploaded at once."""
CREDENTIALS_TTL = timedelta(minutes=5)
"""Time after which the credentials of the AWS CLI are read again. boto3 returns some that are valid for ten more minutes."""
MAX_RETRIES, RETRY_TIMEOUT = 4, timedelta(minutes=2)
CREDENTIAL_OPTIONS = {"access_key_id", "skip_signature"}
"""Options of an S3 store, one of which says how requests are signed. In the environment, their names start with `AWS_`."""
REGION_OPTIONS = {"region", "default_region", "endpoint", "endpoint_url", "endpoint_url_s3"}
"""Options, one of which says where an S3 store is."""
GOOGLE_OPTIONS = {"application_credentials", "service_account", "service_account_path", "service_account_key", "skip_signature"}
"""Options of a Google store, one of which says how requests are signed. In the environment, most start with `GOOGLE_`."""
GOOGLE_FILE = Path("~/.config/gcloud/application_default_credentials.json")
GOOGLE_MACHINE = "169.254.169.254", 80
"""Address of the server that knows the account of a machine of Google Cloud."""
METADATA_TIMEOUT_S = 3
NO_GOOGLE_CREDENTIALS = (
    "no credentials of Google Cloud: set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`"
)
S3_ADDRESS = "https://s3.amazonaws.com"
REGION_TIMEOUT_S = 10
NOT_IMPLEMENTED = "501 Not Implemented"
"""Part of the error of a store that does not know a request."""
BROKEN_RESPONSE, NO_RESPONSE = "response body error", "HTTP error: "
"""Parts of the errors of a response that breaks off, and of any broken or stalled connection."""
_T = TypeVar("_T")


class ObjectVersion(NamedTuple):
    """Content and version of an object."""

    content: bytes
    version: UpdateVersion


class ObjectStorage(Storage):
    """Storage at a URL, such as s3://bucket/prefix?region=eu-central-1. Options are configuration keys of obstore's stores.

    The store is opened at the first use, so that instances can be pickled.
    """

    local = None

    def __init__(self, root: str) -> None:
        self.url = without_credentials(root)
        self._root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorage, (self._root,)

    def __repr__(self) -> str:
        return f"ObjectStorage({self.url})"

    @cached_property
    def _store(self) -> ObjectStore:
        return _opened(self._root, READ_TIMEOUT)

    @cached_property
    def _lease_store(self) -> ObjectStore:
        return _opened(self._root, LEASE_READ_TIMEOUT)

    def read(self, path: str) -> bytes | None:
        try:
            return _repeated(lambda: bytes(self._store.get(path).bytes()))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: str | bytes) -> None:
        with _os_errors():
            self._store.put(path, content.encode("utf-8") if isinstance(content, str) else content)

    def read_version(self, path: str) -> ObjectVersion | None:
        """Return an object with its version, or `None` if it does not exist."""

        def get() -> ObjectVersion:
            result = self._lease_store.get(path)
            return ObjectVersion(bytes(result.bytes()), _version(result.meta))

        try:
            return _repeated(get)
        except FileNotFoundError:
            return None

    def create(self, path: str, content: bytes) -> UpdateVersion | None:
        """Create an object and return its version, or return `None` if it exists. Some stores ignore this condition."""
        return self._put_if("create", path, content)

    def replace(self, path: str, content: bytes, version: UpdateVersion) -> UpdateVersion | None:
        """Replace a version of an object and return the new one, or return `None` if the object has changed."""
        return self._put_if(version, path, content)

    def _put_if(self, mode: PutMode, path: str, content: bytes) -> UpdateVersion | None:
        try:
            # The callers recognise their own content if the response to the first attempt was lost.
            return _version(_repeated(lambda: self._lease_store.put(path, content, mode=mode), NO_RESPONSE))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None
        except OSError as error:
            if NOT_IMPLEMENTED in str(error):
                raise self.conditions_unsupported() from None
            raise

    def conditions_unsupported(self) -> SetupError:
        """Return the error of a store that ignores or rejects the conditions of `create` and `replace`."""
        return SetupError(
            f"output folder {self.url}: the store does not support conditional writes (If-None-Match), by which a run "
            "makes sure that no other run uses the folder; use another store, or a local folder"
        )

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        with self.workspace("") as workspace:
            yield workspace / "file"
            self._upload(workspace / "file", path)

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        with self.workspace("") as workspace:
            self._download(path, workspace / "file")
            yield workspace / "file"

    def _upload(self, file: Path, path: str) -> None:
        with _os_errors():
            self._store.put(path, file)

    def _download(self, path: str, file: Path) -> None:
        def get() -> None:
            blocks = self._store.get(path).stream(min_chunk_size=_BLOCK_BYTES)
            with file.open("wb") as target:
                for block in blocks:
                    target.write(block)

        _repeated(get)

    def files(self, folder: str) -> dict[str, StoredFile]:
        return {
            meta["path"].rpartition("/")[2]: StoredFile(meta["size"], meta["last_modified"].timestamp())
            for meta in self._listing(folder)["objects"]
        }

    def folders(self, folder: str) -> list[str]:
        return [path.rpartition("/")[2] for path in self._listing(folder)["common_prefixes"]]

    def _listing(self, folder: str) -> ListResult[Sequence[ObjectMeta]]:
        return _repeated(lambda: self._store.list_with_delimiter(folder or None))

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        files = self.files(folder)
        return all(name in files and files[name].bytes == size for name, size in sizes.items())

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            _repeated(lambda: self._store.delete(path))

    def delete_folder(self, folder: str) -> None:
        # Delete the file that marks the folder as complete first.
        for marker in (MARKER, "shot.json"):
            self.delete(f"{folder}/{marker}")
        with suppress(FileNotFoundError):
            _repeated(lambda: self._store.delete([meta["path"] for page in self._store.list(folder) for meta in page]))

    @contextmanager
    def workspace(self, parent: str) -> Iterator[Path]:
        # Always on the local disk, regardless of `parent`.
        _sweep_workspaces(_workspaces())
        workspace = files.temporary_folder(_workspaces())
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def publish(self, workspace: Path, paths: Mapping[str, str]) -> None:
        with ThreadPoolExecutor(MAX_UPLOADS) as uploads:
            list(uploads.map(lambda name: self._upload(workspace / name, paths[name]), paths))

    def publish_folder(self, workspace: Path, folder: str) -> None:
        if self.has_folder(folder):
            return
        names = sorted(file.name for file in workspace.iterdir())
        self.publish(workspace, {name: f"{folder}/{name}" for name in names})
        self.write(f"{folder}/{MARKER}", "\n".join(names))

    def has_folder(self, folder: str) -> bool:
        return self.read(f"{folder}/{MARKER}") is not None

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path | None]:
        names = self.read(f"{folder}/{MARKER}")
        if names is None:
            yield None
            return
        with self.workspace("") as workspace:
            for name in names.decode().split("\n"):
                # A lost file is left out, as on a disk. Callers check for the files that they need.
                try:
                    self._download(f"{folder}/{name}", workspace / name)
                except FileNotFoundError:
                    (workspace / name).unlink(missing_ok=True)
            yield workspace

    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        # Object stores have no partly written objects. Only local workspaces can be left over.
        return files.abandoned(_workspaces())

    def place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(path)}"


def _opened(root: str, read_timeout: str) -> ObjectStore:
    """Open the store at a URL. Raises SetupError without the credentials of the URL."""
    try:
        address = urlsplit(root)
        options, host = dict(parse_qsl(address.query)), address.netloc
        if address.scheme == "s3" and address.password is not None:
            options |= {"access_key_id": unquote(address.username or ""), "secret_access_key": unquote(address.password)}
            host = host.rpartition("@")[2]
        if address.scheme not in SCHEMES:
            raise SetupError(f"output folder {without_credentials(root)}: must be a local path or a URL ({', '.join(SCHEMES)})")
        provider = _aws_settings(host, options) if address.scheme == "s3" else None
        if address.scheme == "gs":
            _check_google_credentials(options)
        return from_url(
            f"{address.scheme}://{host}{address.path}",
            config=cast("Any", options),
            credential_provider=provider,
            client_options={
                "allow_http": options.get("endpoint", "").startswith("http://"),
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": read_timeout,
                "timeout": REQUEST_TIMEOUT,
            },
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIMEOUT},
        )
    # Their messages may contain the URL with its credentials.
    except (BaseError, ValueError):
        raise SetupError(
            f"output folder {without_credentials(root)}: must be a URL such as s3://bucket/prefix?region=eu-central-1, with "
            "options of obstore; pass secrets that contain / or + in the environment"
        ) from None


def _check_google_credentials(options: Mapping[str, str]) -> None:
    """Raise SetupError if there are none: the store would ask for those of a Google machine for minutes."""
    given = {name.lower().removeprefix("google_") for name in (*options, *os.environ)}
    if given & GOOGLE_OPTIONS or GOOGLE_FILE.expanduser().exists():
        return
    try:
        socket.create_connection(GOOGLE_MACHINE, METADATA_TIMEOUT_S).close()
    except OSError:
        raise SetupError(NO_GOOGLE_CREDENTIALS) from None


def _aws_settings(bucket: str, options: dict[str, str]) -> Boto3CredentialProvider | None:
    """Return the credentials of the AWS CLI, unless others are given. Add the region of the bucket to `options` likewise."""
    given = {name.lower().removeprefix("aws_") for name in (*options, *os.environ)}
    provider = None if given & CREDENTIAL_OPTIONS else _aws_files()
    if provider is not None:
        given |= provider.config.keys()
    if not given & REGION_OPTIONS and (region := _region_of(bucket)):
        options["region"] = region
    return provider


@cache
def _aws_files() -> Boto3CredentialProvider | None:
    """Return the credentials and the region that the AWS CLI would use. `None` without boto3, or if there are none."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        class CurrentCredentials(Boto3CredentialProvider):
            """Reads the files again, in case they were renewed."""

            def __call__(self) -> S3Credential:
                return Boto3CredentialProvider(ttl=CREDENTIALS_TTL)()

        return CurrentCredentials()
    # ValueError: no credentials. Obstore then looks for those of an instance role, and says what is missing.
    except (ImportError, ValueError):
        return None


@cache
def _region_of(bucket: str) -> str | None:
    """Return the region of an S3 bucket, which S3 tells everyone. `None` if it does not answer."""
    try:
        response: Any = urlopen(Request(f"{S3_ADDRESS}/{bucket}", method="HEAD"), timeout=REGION_TIMEOUT_S)
    # A bucket that is not public, or in another region, is an error with the same header.
    except HTTPError as error:
        response = error
    except OSError:
        return None
    with response:
        region: str | None = response.headers.get("x-amz-bucket-region")
    return region


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise errors of the store as OSError with a short message. Failed conditions and missing objects keep their type."""
    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise
        raise OSError(_message(str(error))) from None


def _repeated(request: Callable[[], _T], if_text: str = BROKEN_RESPONSE) -> _T:
    """Send a request, and once more if it fails with this text: obstore repeats other failed requests itself."""
    try:
        with _os_errors():
            return request()
    except OSError as error:
        if if_text not in str(error):
            raise
    with _os_errors():
        return request()


def _message(text: str) -> str:
    """Return the reason in an error of obstore: the message of the store, else the error without its debug output."""
    reason = re.search(r"<Message>(.*?)</Message>", text)
    if reason:
        return reason[1]
    message = text.partition("\n\nDebug source:")[0].strip()
    # Without credentials, the address of an instance role is tried.
    if "/computeMetadata/" in text:
        return NO_GOOGLE_CREDENTIALS
    if "169.254.169.254" in text or "/latest/api/token" in text:
        return f"no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or install boto3 to use ~/.aws ({message})"
    return message


def _version(result: PutResult | ObjectMeta) -> UpdateVersion:
    """Return the version of an object, without the parts that the store does not have."""
    version: UpdateVersion = {}
    if e_tag := result["e_tag"]:
        version["e_tag"] = e_tag
    if number := result["version"]:
        version["version"] = number
    return version


def _workspaces() -> Path:
    return cache_dir() / "unfinished"


@cache
def _sweep_workspaces(folder: Path) -> None:
    """Remove abandoned workspaces, once per process: on worker nodes nothing else does. They belong to no output folder."""
    for path in files.abandoned(folder):
        files.remove(path)


def without_credentials(url: str) -> str:
    """Return the scheme, bucket and prefix of a URL."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    bucket, slash, prefix = rest.partition("/")
    user, at, host = bucket.rpartition("@")
    if scheme.startswith("abfs") and ":" not in user:
        # abfs://CONTAINER@ACCOUNT: the part before the @ is no credential.
        host = f"{user}{at}{host}"
    if ":" in host:
        # The secret contains a slash. Everything up to the last @ may be part of it.
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{host}{slash}{prefix}"
