"""Decode and encode images and videos. Handles codecs and colour. Does not know shots, stages or the output folder.

Encoding is deterministic: with the same FFmpeg, the same pixels give the same bytes. All decoders return the same pixels.
PyAV is imported with the first video: most processes open none.
"""

from typing import TYPE_CHECKING

from vidgen_ray.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from vidgen_ray.media.decode import VideoReader, decode_lossless, open_foreign_video, open_video
    from vidgen_ray.media.encode import Mp4Settings, Mp4Writer, encode_lossless
    from vidgen_ray.media.images import centre_crop, cover_crop, encode_png, image_size, read_image, verify_image, write_png
    from vidgen_ray.media.media_file import CLIP_SUFFIXES, IMAGE_FORMATS, FileMetadata

__all__ = [
    "CLIP_SUFFIXES",
    "IMAGE_FORMATS",
    "FileMetadata",
    "Mp4Settings",
    "Mp4Writer",
    "VideoReader",
    "centre_crop",
    "cover_crop",
    "decode_lossless",
    "encode_lossless",
    "encode_png",
    "image_size",
    "open_foreign_video",
    "open_video",
    "read_image",
    "verify_image",
    "write_png",
]

# Imported lazily: those who read profiles need no pixels.
__getattr__ = lazy_names(
    __name__,
    {
        "centre_crop": "images",
        "CLIP_SUFFIXES": "media_file",
        "cover_crop": "images",
        "decode_lossless": "decode",
        "encode_lossless": "encode",
        "encode_png": "images",
        "FileMetadata": "media_file",
        "IMAGE_FORMATS": "media_file",
        "image_size": "images",
        "Mp4Settings": "encode",
        "Mp4Writer": "encode",
        "open_foreign_video": "decode",
        "open_video": "decode",
        "read_image": "images",
        "verify_image": "images",
        "VideoReader": "decode",
        "write_png": "images",
    },
)
