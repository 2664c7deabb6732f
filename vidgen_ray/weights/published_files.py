"""Weights that are published as single files or in an archive: where they are, and their sha256.

The digests are those that several projects state for these files. A download with another digest is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
