"""Check the files that a shot names, before any GPU starts: photos, start images and LoRAs."""

from functools import lru_cache
from pathlib import Path

from vidgen_ray.errors import MediaError, StageError, VidgenError
from vidgen_ray.media import check_image_header, read_image
from vidgen_ray.nets.lora_header import FLUX, check_lora_file
from vidgen_ray.shot import IMAGE_FIELDS, Shot
from vidgen_ray.weights import resolve

CACHED_FILES = 4096


def check_files(shot: Shot, *, decode: bool = False) -> list[tuple[str, VidgenError]]:
    """Return field and error of each file of the shot that cannot be used. Each file is read once.

    By default only headers are read. `decode`: decode the images, which also finds damaged ones.
    """
    images = [(field, path) for field in IMAGE_FIELDS if (path := getattr(shot, field))]
    images += [("face_image", photo) for photo in shot.face_image]
    checked = [(field, _image_error(path, decode)) for field, path in images]
    checked += [("lora", _lora_error(lora.path, FLUX)) for lora in shot.lora]
    checked += [("video_lora", _lora_error(lora.path, shot.video_model)) for lora in shot.video_lora]
    return [(field, error) for field, error in checked if error is not None]


@lru_cache(CACHED_FILES)
def _image_error(path: str, decode: bool) -> VidgenError | None:
    try:
        if decode:
            read_image(Path(path))
        else:
            check_image_header(Path(path))
    except MediaError as error:
        return error
    return None


@lru_cache(CACHED_FILES)
def _lora_error(path: str, base_model: str) -> VidgenError | None:
    try:
        check_lora_file(resolve(path), base_model)
    except StageError as error:
        return error
    return None
