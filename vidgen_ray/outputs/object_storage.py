"""Storage of an output folder in an object store (S3 and compatible stores, GCS, Azure), through pyarrow's file systems.

An object store only guarantees that single objects appear atomically, so the last object of a group of files marks the group
as complete. Credentials come from the environment or the URL and are never shown.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pyarrow
import pyarrow.fs

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.storage import Storage, StoredFile
from vidgen_ray.system import files
from vidgen_ray.system.cache_dir import cache_dir

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10


class ConditionsUnsupported(OSError):
    """The store does not support conditional requests, or botocore has no credentials for it."""


class StoredObject(NamedTuple):
    """Content and version of an object."""

    content: bytes
    etag: str
    age_s: float
    """Seconds since the last change, by the clock of the store."""


class ConditionalObject:
    """One object in S3 or a compatible store.

    Methods raise OSError if the store fails, and its subclass ConditionsUnsupported if it rejects conditional requests. A
    store may also ignore conditions: then `create` replaces an existing object.
    """

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client = client
        self._at = {"Bucket": bucket, "Key": key}

    def read(self) -> StoredObject | None:
        """Return the object, or `None` if it does not exist."""
        response = self._request(self._client.get_object, missing=(404,))
        if response is None:
            return None
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"]).replace(tzinfo=UTC)
        modified: datetime = response["LastModified"]
        return StoredObject(response["Body"], response["ETag"], (now - modified).total_seconds())

    def create(self, content: bytes) -> str | None:
        """Create the object and return its ETag, or return `None` if it exists."""
        return self._put(content, IfNoneMatch="*")

    def replace(self, content: bytes, etag: str) -> str | None:
        """Replace the version `etag` and return the new ETag, or return `None` if the object has changed."""
        return self._put(content, IfMatch=etag)

    def _put(self, content: bytes, **condition: str) -> str | None:
        # 409: another conditional request is in progress. 404: a replaced object does not exist.
        response = self._request(self._client.put_object, missing=(404, 409, 412), Body=content, **condition)
        return str(response["ETag"]) if response else None

    def _request(self, call: Any, missing: tuple[int, ...], **arguments: object) -> dict[str, Any] | None:
        """Return the response, or `None` for one of the status codes `missing`."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            response: dict[str, Any] = call(**self._at, **arguments)
            if "Body" in response:
                response["Body"] = response["Body"].read()
        except NoCredentialsError as error:
            raise ConditionsUnsupported(str(error)) from None
        except BotoCoreError as error:
            raise OSError(str(error)) from None
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in missing and error.response["Error"]["Code"] != "NoSuchBucket":
                return None
            raise (ConditionsUnsupported if status == 501 else OSError)(str(error)) from None
        return response


def conditional_object(url: str, path: str, region: str) -> ConditionalObject | None:
    """Return the object at `path` ("bucket/key"), with the options of an s3:// URL as pyarrow reads them.

    Returns `None` if botocore is not installed.
    """
    try:
        from botocore.config import Config
        from botocore.session import Session
    except ImportError:
        return None
    address = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(address.query).items()}
    endpoint = options.get("endpoint_override")
    client = Session().create_client(
        "s3",
        region_name=region,
        endpoint_url=endpoint and f"{options.get('scheme', 'https')}://{endpoint}",
        aws_access_key_id=address.username and unquote(address.username),
        aws_secret_access_key=address.password and unquote(address.password),
        verify=options.get("tls_ca_file_path"),
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard"},
            s3={"addressing_style": "path" if endpoint else "auto"},
            # Other stores than AWS may reject the checksums that botocore adds by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    bucket, _, key = path.partition("/")
    return ConditionalObject(client, bucket, key)


SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
MARKER = ".complete"
"""Last object of a folder written by `publish_folder`. Contains the names of its files."""
BLOCK_BYTES = 8 << 20


class ObjectStorage(Storage):
    """Storage at a URL of `pyarrow.fs.FileSystem.from_uri`: s3://bucket/prefix?endpoint_override=host:port&scheme=http

    The file system is opened at the first use, so that instances can be pickled.
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
    def _file_system_and_prefix(self) -> tuple[pyarrow.fs.FileSystem, str]:
        scheme = self._root.partition("://")[0].lower()
        if scheme not in SCHEMES:
            raise SetupError(f"output folder {self.url}: must be a local path or a URL ({', '.join(SCHEMES)})")
        try:
            fs, base = pyarrow.fs.FileSystem.from_uri(_with_single_puts(self._root))
        # Their messages contain the URL with its credentials.
        except (pyarrow.ArrowInvalid, OSError):
            raise SetupError(
                f"output folder {self.url}: not a valid URL for pyarrow.fs.FileSystem.from_uri, "
                "such as s3://bucket/prefix?region=eu-central-1; pass secrets that contain / or + in the environment"
            ) from None
        return fs, base.rstrip("/")

    @property
    def _fs(self) -> pyarrow.fs.FileSystem:
        return self._file_system_and_prefix[0]

    def _at(self, path: str) -> str:
        return f"{self._file_system_and_prefix[1]}/{path}".rstrip("/")

    def read(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_file(self._at(path)) as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return None

    def write(self, path: str, content: str | bytes) -> None:
        self._put(io.BytesIO(content.encode("utf-8") if isinstance(content, str) else content), path)

    def touch(self, path: str) -> None:
        content = self.read(path)
        if content is None:
            raise FileNotFoundError(path)
        self.write(path, content)

    def conditional_object(self, path: str) -> ConditionalObject | None:
        if not isinstance(self._fs, pyarrow.fs.S3FileSystem):
            return None
        return conditional_object(self._root, self._at(path), self._fs.region)

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
        with file.open("rb") as source:
            self._put(source, path)

    def _put(self, source: IO[bytes], path: str) -> None:
        # Upload in another thread: Ctrl-C in the main thread would close the stream and leave a truncated object as complete.
        # Not pyarrow.fs.copy_files: it does not report failed uploads.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._write_stream, source, path).result()

    def _write_stream(self, source: IO[bytes], path: str) -> None:
        with self._fs.open_output_stream(self._at(path)) as stream:
            shutil.copyfileobj(source, stream, BLOCK_BYTES)

    def _download(self, path: str, file: Path) -> None:
        with self._fs.open_input_stream(self._at(path)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def files(self, folder: str) -> dict[str, StoredFile]:
        # Some stores report no time. Such files count as old.
        return {
            info.base_name: StoredFile(info.size, (info.mtime_ns or 0) / 1e9)
            for info in self._listing(folder)
            if info.type == pyarrow.fs.FileType.File
        }

    def folders(self, folder: str) -> list[str]:
        return [info.base_name for info in self._listing(folder) if info.type == pyarrow.fs.FileType.Directory]

    def _listing(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        infos: list[pyarrow.fs.FileInfo] = self._fs.get_file_info(
            pyarrow.fs.FileSelector(self._at(folder), allow_not_found=True)
        )
        return infos

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        files = self.files(folder)
        return all(name in files and files[name].bytes == size for name, size in sizes.items())

    def delete(self, path: str) -> None:
        try:
            self._fs.delete_file(self._at(path))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        # Delete the file that marks the folder as complete first.
        for marker in (MARKER, "shot.json"):
            self.delete(f"{folder}/{marker}")
        try:
            self._fs.delete_dir(self._at(folder))
        except FileNotFoundError:
            return

    @contextmanager
    def workspace(self, parent: str) -> Iterator[Path]:
        # Always on the local disk, regardless of `parent`.
        _sweep_workspaces(_workspaces())
        workspace = files.temporary_folder(_workspaces())
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def publish(self, workspace: Path, folder: str, names: Sequence[str]) -> None:
        for name in names:
            self._upload(workspace / name, f"{folder}/{name}")

    def publish_folder(self, workspace: Path, folder: str) -> None:
        if self.has_folder(folder):
            return
        names = sorted(file.name for file in workspace.iterdir())
        self.publish(workspace, folder, names)
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


def _workspaces() -> Path:
    return cache_dir() / "unfinished"


@cache
def _sweep_workspaces(folder: Path) -> None:
    """Remove abandoned workspaces, once per process: on worker nodes nothing else does. They belong to no output folder."""
    for path in files.abandoned(folder):
        files.remove(path)


def _with_single_puts(url: str) -> str:
    """Return the URL with the option that uploads small objects in one request instead of three (multipart upload)."""
    if not url.startswith("s3://") or "allow_delayed_open" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"


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
