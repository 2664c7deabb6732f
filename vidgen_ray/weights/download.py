"""Download weights: the files of a Hugging Face repository that are loaded, and published single files.

Complete files are not downloaded again, a broken connection continues in its file, and the digest of every downloaded file is
compared with the one that its source states, or, for single files, that several projects state. After the end of a command,
single files continue; an unfinished file of a repository starts again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from filelock import FileLock

from vidgen_ray.errors import SetupError
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.system.model_files import PIPELINE_INDEX, pipeline_components, select_loaded
from vidgen_ray.system.terminal_text import cursor_movable
from vidgen_ray.weights import parse_hub, resolve

_INSIGHTFACE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_REALESRGAN = "https://github.com/xinntao/Real-ESRGAN/releases/download"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL."""

    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of published weights."""

    name: str
    """File name in the folder of the weights, or of the weights themselves if they are one file."""
    sha256: str
    size_bytes: int
    source: RemoteFile
    """The file itself, or a zip archive."""
    member: str | None = None
    """Path in the archive."""


def _single(name: str, url: str, sha256: str, size_bytes: int) -> PublishedFile:
    return PublishedFile(name, sha256, size_bytes, RemoteFile(url, sha256, size_bytes))


_ANTELOPEV2 = RemoteFile(
    f"{_INSIGHTFACE}/antelopev2.zip", "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5", 360_662_982
)

PUBLISHED: Mapping[str, tuple[PublishedFile, ...]] = {
    "antelopev2": (
        PublishedFile(
            "scrfd_10g_bnkps.onnx",
            "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
            16_923_827,
            _ANTELOPEV2,
            "antelopev2/scrfd_10g_bnkps.onnx",
        ),
        PublishedFile(
            "glintr100.onnx",
            "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
            260_665_334,
            _ANTELOPEV2,
            "antelopev2/glintr100.onnx",
        ),
    ),
    "recognition_arcface_ir_se50.pth": (
        _single(
            "recognition_arcface_ir_se50.pth",
            f"{_FACEXLIB}/v0.1.0/recognition_arcface_ir_se50.pth",
            "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
            175_367_323,
        ),
    ),
    "realesrgan": (
        _single(
            "animevideov3.pth",
            f"{_REALESRGAN}/v0.2.5.0/realesr-animevideov3.pth",
            "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
            2_504_012,
        ),
        _single(
            "general-x4v3.pth",
            f"{_REALESRGAN}/v0.2.5.0/realesr-general-x4v3.pth",
            "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
            4_885_111,
        ),
        _single(
            "x4plus.pth",
            f"{_REALESRGAN}/v0.1.0/RealESRGAN_x4plus.pth",
            "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
            67_040_989,
        ),
    ),
}
"""Name of a file or folder -> its files. A path whose last part is one of these names can be downloaded to that path.

Files of `realesrgan` are named as a shot's `upscaler` names them.
"""


DOWNLOAD_ATTEMPTS = 5
"""Attempts to continue an interrupted download."""
_TIMEOUT_S = 60
SPARE_BYTES = 2**30
"""Space that a download leaves free on the disk."""


@dataclass(frozen=True, slots=True)
class Hub:
    """Hugging Face hub and the cache for its files."""

    cache: Path | None = None
    """Folder of snapshots. `None`: `hub` in `$HF_HOME`."""
    endpoint: str | None = None
    """URL of the hub. `None`: `$HF_ENDPOINT`, otherwise https://huggingface.co."""

    @property
    def folder(self) -> Path:
        """Folder of snapshots."""
        from huggingface_hub import constants

        return Path(self.cache or constants.HF_HUB_CACHE).expanduser()

    @property
    def url(self) -> str:
        """URL of the hub."""
        from huggingface_hub import constants

        return self.endpoint or str(constants.ENDPOINT)


@dataclass(frozen=True, slots=True)
class Pulled:
    """Result of a download."""

    reference: str
    path: str
    """File or folder on this machine."""
    files: int
    """Number of files that are loaded. 0 for weights that are built on this machine."""
    size_bytes: int
    """Size of these files."""
    downloaded_bytes: int
    """Size of the files that were missing. With `dry_run` they still are."""
    commit: str | None = None
    """Commit of the repository that the reference means now. `None` for weights from elsewhere."""


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Space that downloads need on one disk."""

    folder: str
    """Folder on the disk."""
    needed_bytes: int
    free_bytes: int

    def require(self, what: str) -> None:
        """Raise SetupError if the disk cannot hold the downloads. `what`: subject of the message."""
        if self.needed_bytes and self.free_bytes < self.needed_bytes + SPARE_BYTES:
            raise SetupError(
                f"{what}: needs {self.needed_bytes / 1e9:.1f} GB, {self.folder} has {self.free_bytes / 1e9:.1f} GB free; "
                "free some space, or use another folder with --to"
            )


@dataclass(frozen=True, slots=True)
class PullResult:
    """Result of several downloads on one machine."""

    pulled: tuple[Pulled, ...]
    problems: tuple[str, ...]
    """One message per reference that failed."""
    disks: tuple[DiskSpace, ...] = ()
    """Space that the downloads need, per disk. Only with `dry_run`."""
    node: str | None = None
    """Address of the node of a cluster. `None`: this machine."""


def download_weights(
    reference: str, relative_to: Path | None = None, hub: Hub | None = None, *, dry_run: bool = False, verify: bool = False
) -> Pulled:
    """Download the weights of a reference as profiles write it, if they are not on this machine.

    `relative_to`: folder of relative paths. `dry_run` only adds up sizes. `verify` compares digests of existing files, too.
    Raises SetupError with what to do.
    """
    if reference.startswith("hub:"):
        return _pull_repository(reference, hub or Hub(), dry_run=dry_run, verify=verify)
    if reference.startswith("builtin:"):
        return Pulled(reference, "" if dry_run else str(resolve(reference)), 0, 0, 0)
    target = ((relative_to or Path()) / os.path.expanduser(reference)).absolute()
    if target.name in PUBLISHED:
        return _pull_published(reference, target, dry_run=dry_run, verify=verify)
    path = resolve(reference, relative_to)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Pulled(reference, str(path), len(files), sum(file.stat().st_size for file in files), 0)


def pull_all(references: Sequence[tuple[str, Path | None]], hub: Hub, *, dry_run: bool, verify: bool) -> PullResult:
    """Download all references, each with its folder of relative paths. With `dry_run` only add up what is missing."""
    pulled, problems = [], []
    for reference, folder in references:
        try:
            pulled.append(download_weights(reference, folder, hub, dry_run=dry_run, verify=verify))
        except SetupError as error:
            problems.append(str(error))
    return PullResult(tuple(pulled), tuple(problems), _disks(pulled, hub) if dry_run else ())


def _disks(planned: Iterable[Pulled], hub: Hub) -> tuple[DiskSpace, ...]:
    """Return the space that downloads need on each disk."""
    disks: dict[int, DiskSpace] = {}
    for one in planned:
        # An archive is unpacked beside its file.
        folder, copies = (hub.folder, 1) if one.commit else (Path(one.path).parent, 2)
        disk = _disk(folder, copies * one.downloaded_bytes)
        if disk.needed_bytes:
            device = _existing(folder).stat().st_dev
            before = disks.get(device, replace(disk, needed_bytes=0))
            disks[device] = replace(before, needed_bytes=before.needed_bytes + disk.needed_bytes)
    return tuple(disks.values())


def _disk(folder: Path, needed_bytes: int) -> DiskSpace:
    return DiskSpace(str(folder), needed_bytes, shutil.disk_usage(_existing(folder)).free)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _pull_repository(reference: str, hub: Hub, *, dry_run: bool, verify: bool) -> Pulled:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile

    repo, revision, subfolder = parse_hub(reference.removeprefix("hub:"))
    with _explained(reference, repo), cursor_movable():
        api = HfApi(endpoint=hub.url)
        commit = api.model_info(repo, revision=revision).sha
        tree = api.list_repo_tree(repo, recursive=True, revision=commit)
        entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        index = f"{subfolder}/{PIPELINE_INDEX}" if subfolder else PIPELINE_INDEX
        components, index_bytes = None, 0
        if index in entries:
            if not isinstance(try_to_load_from_cache(repo, index, cache_dir=hub.folder, revision=commit), str):
                index_bytes = entries[index].size
            file = hf_hub_download(repo, index, revision=commit, cache_dir=hub.folder, endpoint=hub.url)
            components = pipeline_components(Path(file).read_text("utf-8"))
        wanted = _loaded_entries(entries, subfolder, components)
        if not wanted:
            raise SetupError(f"{reference}: the repository has no {subfolder or 'files'} at revision {revision}")
        missing = []
        for name, entry in wanted.items():
            cached = try_to_load_from_cache(repo, name, cache_dir=hub.folder, revision=commit)
            if not isinstance(cached, str):
                missing.append(name)
            elif not _is_intact(Path(cached), entry, verify=verify):
                missing.append(name)
                if not dry_run:
                    _forget(Path(cached))
        missing_bytes = sum(wanted[name].size for name in missing) + index_bytes
        snapshot = hub.folder / f"models--{repo.replace('/', '--')}" / "snapshots" / str(commit)
        size_bytes = sum(entry.size for entry in wanted.values())
        pulled = Pulled(reference, str(snapshot / subfolder), len(wanted), size_bytes, missing_bytes, str(commit))
        if dry_run:
            return pulled
        _disk(hub.folder, missing_bytes).require(reference)
        # With the revision in place of the commit, the cache also stores which commit a branch means.
        patterns = [escape(name) for name in wanted]
        folder = snapshot_download(
            repo, revision=revision, cache_dir=hub.folder, endpoint=hub.url, allow_patterns=patterns, max_workers=4
        )
    if Path(folder).name != commit:
        raise SetupError(f"{reference}: {revision} was changed during the download; run the command again")
    for name in missing:
        if not _is_intact(Path(folder) / name, wanted[name], verify=True):
            _forget(Path(folder) / name)
            raise SetupError(
                f"{reference}: {name} does not have the digest that the hub states, and was deleted; run the command again"
            )
    return pulled


def _loaded_entries(entries: Mapping[str, Any], subfolder: str, components: Sequence[str] | None) -> dict[str, Any]:
    """Return name in the repository -> entry of the files that are loaded from the subfolder, which may be a file."""
    if subfolder in entries:
        return {subfolder: entries[subfolder]}
    prefix = f"{subfolder.rstrip('/')}/" if subfolder else ""
    inside = [PurePosixPath(name.removeprefix(prefix)) for name in entries if name.startswith(prefix)]
    names = [f"{prefix}{file}" for file in select_loaded(inside, components)]
    return {name: entries[name] for name in names}


def _is_intact(file: Path, entry: Any, *, verify: bool) -> bool:
    """Return whether the file has the size that the hub states. With `verify` also the digest."""
    if file.stat().st_size != entry.size:
        return False
    if not verify:
        return True
    if entry.lfs is not None:
        return sha256_of(file) == str(entry.lfs.sha256)
    content = file.read_bytes()
    # The id of an object of Git: sha1 of the content behind this header.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == str(entry.blob_id)


def _forget(cached: Path) -> None:
    """Delete a file from the cache: the link in the snapshot and the content."""
    content = cached.resolve()
    cached.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


@contextmanager
def _explained(reference: str, repo: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into SetupErrors that say what to do."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except errors.GatedRepoError:
        advice = (
            f"request access on {page} with the account of your token, and check that the token may read gated repositories"
            if get_token()
            else f"request access on {page}, then run `hf auth login` with a token of that account, or set HF_TOKEN"
        )
        raise SetupError(f"{reference}: the repository is gated; {advice}") from None
    except errors.RevisionNotFoundError:
        raise SetupError(f"{reference}: no such revision in {page}; use a commit, a branch or a tag") from None
    except errors.RepositoryNotFoundError:
        raise SetupError(f"{reference}: no repository at {page}, or it is private and the token may not read it") from None
    except errors.HFValidationError as error:
        raise SetupError(f"{reference}: must be hub:OWNER/NAME[@REVISION][:SUBFOLDER] ({error})") from None
    except errors.OfflineModeIsEnabled:
        raise SetupError(f"{reference}: HF_HUB_OFFLINE is set, which forbids downloads; unset it for this command") from None
    except (OSError, httpx2.HTTPError) as error:
        # The message of the hub's client may have several lines of advice for its own users.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SetupError(f"{reference}: the download failed ({reason}); run the same command to continue") from None


def _pull_published(reference: str, target: Path, *, dry_run: bool, verify: bool) -> Pulled:
    files = PUBLISHED[target.name]
    is_file = len(files) == 1 and files[0].name == target.name
    paths = {file: target if is_file else target / file.name for file in files}
    missing = {file: path for file, path in paths.items() if not _has(file, path, target, verify=verify)}
    sources = {file.source for file in missing}
    size_bytes, missing_bytes = (sum(each.size_bytes for each in sized) for sized in (files, sources))
    pulled = Pulled(reference, str(target), len(files), size_bytes, missing_bytes)
    if dry_run or not missing:
        return pulled
    folder = target.parent if is_file else target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{reference}: {folder} cannot be created ({error.strerror})") from None
    _disk(folder, 2 * missing_bytes).require(reference)
    for source in sorted(sources, key=lambda source: source.url):
        _download(reference, source, {file: path for file, path in missing.items() if file.source == source}, folder)
    return pulled


def _has(file: PublishedFile, path: Path, target: Path, *, verify: bool) -> bool:
    # insightface unpacks antelopev2 into a folder of that name inside the folder.
    for candidate in (path, target / target.name / file.name):
        if candidate.is_file() and candidate.stat().st_size == file.size_bytes:
            return not verify or sha256_of(candidate) == file.sha256
    return False


def _download(reference: str, source: RemoteFile, files: Mapping[PublishedFile, Path], folder: Path) -> None:
    """Download a file or an archive, check it, and move or unpack the files to their paths."""
    part = folder / f"{PurePosixPath(source.url).name}.part"
    with FileLock(f"{part}.lock"):
        try:
            _fetch(source, part)
        except (OSError, httpx2.HTTPError) as error:
            raise SetupError(
                f"{reference}: the download of {source.url} failed ({error}); run the same command to continue"
            ) from None
        if sha256_of(part) != source.sha256:
            part.unlink()
            raise SetupError(
                f"{reference}: {source.url} does not have the expected sha256, {source.sha256}; run the command again"
            )
        for file, path in files.items():
            if file.member is None:
                part.replace(path)
            else:
                unfinished = path.with_name(f"{path.name}.unpacking")
                with zipfile.ZipFile(part) as content, content.open(file.member) as member, unfinished.open("wb") as target:
                    shutil.copyfileobj(member, target)
                unfinished.replace(path)
        part.unlink(missing_ok=True)


def _fetch(source: RemoteFile, part: Path) -> None:
    """Download to `part`, which may have the beginning of the file."""
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        start = part.stat().st_size if part.exists() else 0
        if start >= source.size_bytes:
            return
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with httpx2.stream("GET", source.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as response:
                response.raise_for_status()
                with part.open("ab" if response.status_code == httpx2.codes.PARTIAL_CONTENT else "wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            return
        except httpx2.TransportError:
            if attempt == DOWNLOAD_ATTEMPTS:
                raise
