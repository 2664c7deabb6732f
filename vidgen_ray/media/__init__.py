"""Images and videos as files: reads what people bring, writes what the chain makes. Knows codecs and colour; knows
nothing of shots, of what the chain does, or of where files belong.

Two promises: the same pixels give the same file, byte for byte, with the same FFmpeg; and the same file gives the same
pixels, whichever decoder reads it.
"""

from vidgen_ray.media.checks import MAX_PIXELS
from vidgen_ray.media.decode import VideoReader, decode_lossless, open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer, encode_lossless
from vidgen_ray.media.images import IMAGE_FORMATS, cover_crop, encode_png, read_image, write_png

__all__ = [
    "IMAGE_FORMATS",
    "MAX_PIXELS",
    "Mp4Settings",
    "Mp4Writer",
    "VideoReader",
    "cover_crop",
    "decode_lossless",
    "encode_lossless",
    "encode_png",
    "open_video",
    "read_image",
    "write_png",
]
