"""Stage cache: lossless stage results by content key. A change to a later stage reuses the results of earlier ones."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from vidgen_ray.errors import MediaError, WriteError
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Likeness
from vidgen_ray.system.cache_dir import sha256_of

CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
REMOTE_JOBS = "remote"
IDENTITY = "entry.json"
"""File with the key of an entry and the sha256 of its other files."""


class StageCache:
    """Stage results by content key: images as PNG, frames as FFV1, face features and likenesses as JSON."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, key: str, names: Iterable[str]) -> Artefacts | None:
        """Return the artefacts of an entry, or `None` if there is no entry with all of `names`.

        An entry that is damaged or incomplete is deleted, so that its stage runs again.
        """
        with self._storage.local_folder(entry_path(key)) as entry:
            if entry is None:
                return None
            artefacts = _read_entry(entry, key)
        if set(names) <= set(artefacts):
            return artefacts
        self.drop([key])
        return None

    def stored_keys(self) -> Iterator[str]:
        """Yield the keys of all entries."""
        for group in self._storage.folders("cache"):
            yield from sorted(filter(CONTENT_KEY.fullmatch, self._storage.folders(f"cache/{group}")))

    def has(self, key: str) -> bool:
        """Return whether there is an entry, which may be damaged."""
        return self._storage.has_folder(entry_path(key))

    def is_readable(self, key: str) -> bool:
        """Return whether an entry has an artefact, and all of its files can be decoded."""
        with self.local_entry(key) as entry:
            return entry is not None and bool(_read_entry(entry, key))

    def local_entry(self, key: str) -> AbstractContextManager[Path | None]:
        """Yield a read-only folder on this machine with the files of an entry, or `None` if there is no entry."""
        return self._storage.local_folder(entry_path(key))

    @property
    def folder(self) -> Path | None:
        """Folder on the disk that holds the entries. `None` for an object store."""
        return self._storage.local

    def put(self, key: str, artefacts: Artefacts) -> int:
        """Store an entry, unless the key already has one. Return the number of bytes stored."""
        if self.has(key):
            return 0
        with self._storage.workspace("cache") as workspace:
            _write_artefacts(workspace, artefacts)
            (workspace / IDENTITY).write_text(_identity(workspace, key))
            size = sum(file.stat().st_size for file in workspace.iterdir())
            self._storage.publish_folder(workspace, entry_path(key))
        return size

    def drop(self, keys: Iterable[str]) -> None:
        """Delete the entries of these keys."""
        for key in keys:
            self._storage.delete_folder(entry_path(key))


class RemoteJobs:
    """Records of the jobs of servers, by the content key of their step or by a digest of server and job.

    Methods raise WriteError if the storage fails: neither the server nor the worker is the cause.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, name: str) -> bytes | None:
        try:
            return self._storage.read(job_path(name))
        except OSError as error:
            raise WriteError(f"the job of a server cannot be read: {error}") from error

    def __setitem__(self, name: str, content: bytes) -> None:
        try:
            self._storage.write(job_path(name), content)
        except OSError as error:
            raise WriteError(f"the job of a server cannot be stored: {error}") from error


def job_path(name: str) -> str:
    """Return the file of a job of a server, relative to the output folder."""
    return f"{REMOTE_JOBS}/{name[:2]}/{name}.json"


def entry_path(key: str) -> str:
    """Return the folder of an entry, relative to the output folder."""
    return f"cache/{key[:2]}/{key}"


def _write_artefacts(folder: Path, artefacts: Artefacts) -> None:
    # Imported here: most commands read no pixels.
    from vidgen_ray.media.encode import encode_lossless
    from vidgen_ray.media.images import write_png

    if "image" in artefacts:
        write_png(folder / "image.png", artefacts["image"])
    if "face" in artefacts:
        (folder / "face.json").write_text(face_to_json(artefacts["face"]))
    if "image_likeness" in artefacts:
        (folder / "image_likeness.json").write_text(likeness_to_json(artefacts["image_likeness"]))
    if "clip_likeness" in artefacts:
        (folder / "clip_likeness.json").write_text(likeness_to_json(artefacts["clip_likeness"]))
    if "frames" in artefacts:
        encode_lossless(folder / "frames.mkv", artefacts["frames"], fps=1)


def _identity(folder: Path, key: str) -> str:
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name != IDENTITY}
    return json.dumps({"key": key, "sha256": files})


def _read_entry(folder: Path, key: str) -> Artefacts:
    """Return the artefacts of an entry. None if one of its files is damaged, or is that of another entry."""
    try:
        return _read_artefacts(folder) if (folder / IDENTITY).read_text() == _identity(folder, key) else Artefacts()
    except (MediaError, OSError, ValueError, KeyError):
        return Artefacts()


def _read_artefacts(folder: Path) -> Artefacts:
    from vidgen_ray.media.decode import decode_lossless
    from vidgen_ray.media.images import read_image

    out: Artefacts = {}
    if (file := folder / "image.png").exists():
        out["image"] = read_image(file)
    if (file := folder / "face.json").exists():
        out["face"] = face_from_json(file.read_text())
    if (file := folder / "image_likeness.json").exists():
        out["image_likeness"] = likeness_from_json(file.read_text())
    if (file := folder / "clip_likeness.json").exists():
        out["clip_likeness"] = likeness_from_json(file.read_text())
    if (file := folder / "frames.mkv").exists():
        out["frames"] = decode_lossless(file)
    return out


def face_to_json(face: FaceFeatures) -> str:
    return json.dumps(
        {
            "box": face.box,
            "score": face.score,
            "faces_found": face.faces_found,
            "photo_size": face.photo_size,
            "keypoints": face.keypoints.tolist(),
            "embeddings": {recogniser: values.tolist() for recogniser, values in face.embeddings.items()},
            "digest": face.digest,
        }
    )


def face_from_json(text: str) -> FaceFeatures:
    import numpy as np

    data = json.loads(text)
    return FaceFeatures(
        embeddings={recogniser: np.array(values, np.float32) for recogniser, values in data["embeddings"].items()},
        keypoints=np.array(data["keypoints"], np.float32),
        box=tuple(data["box"]),
        score=data["score"],
        faces_found=data["faces_found"],
        photo_size=tuple(data["photo_size"]),
        digest=data["digest"],
    )


def likeness_to_json(likeness: Likeness) -> str:
    return json.dumps({"similarities": likeness.similarities})


def likeness_from_json(text: str) -> Likeness:
    return Likeness(tuple(json.loads(text)["similarities"]))
