"""Decode and encode images and videos. Handles codecs and colour. Does not know shots, stages or the output folder.

Encoding is deterministic: with the same FFmpeg, the same pixels give the same bytes. All decoders return the same pixels.
PyAV is imported with the first video: most processes open none.
"""

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
