"""Stages that a server of another engine computes: the base image, and the clip from the image."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar
from urllib.parse import urlsplit

from cachetools import FIFOCache
from pydantic import Field, JsonValue, field_validator

from vidgen_ray.errors import MediaError, StageError, shortened_value
from vidgen_ray.limits import MAX_FRAMES
from vidgen_ray.remote.video_server import (
    ServerFailed,
    VideoServers,
    WrongAnswer,
    auth_headers,
    reported_model,
)
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    NOT_IN_KEY,
    PROMPT_FIELDS,
    Artefacts,
    Frames,
    Image,
    Item,
    Stage,
    StageParams,
    report_progress,
)
from vidgen_ray.stages.video import CLIP_PROMPT_FIELDS, VideoStage, prompt_of
from vidgen_ray.video_models import VideoModel
from vidgen_ray.weights import REMOTE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SPARE_BYTES = 2**20
"""Bytes of a clip or an image beside its pixels, which a server may send without compression."""
DEADLINE_SHARE = 0.9
"""A stage gives up after this share of `timeout_s`. Later the engine would kill the worker, with its other jobs."""
_SIDE_PX = 16
"""Side of the thumbnails that tell which start image a clip begins with."""
SAME_IMAGE = 0.9
"""Correlation of two thumbnails of the same image, after compression."""
_MARGIN = 0.1
"""A clip is that of another job if it begins with the image of that one, and this much less with its own."""
REMEMBERED = 1024
"""Start images and digests of clips that are kept."""
_OWN_FIELDS = {
    *("model", "prompt", "negative_prompt", "size", "seed", "num_inference_steps", "guidance_scale"),
    *("num_frames", "fps", "input_reference", "n", "response_format"),
}
"""Fields of requests that the shot decides."""


class RemoteParams(StageParams):
    servers: Annotated[tuple[str, ...], NOT_IN_KEY]
    """URLs of servers with this model, such as `http://video:8000`. Each gets a worker, which has its own first."""
    key_env: Annotated[str | None, NOT_IN_KEY] = None
    """Environment variable with the key of the servers, on every node."""
    parallel: Annotated[int, NOT_IN_KEY] = Field(default=4, ge=1, le=1024)
    """Shots that a server has at once."""
    price_per_second: Annotated[float | None, NOT_IN_KEY] = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of a second of a clip, or of an image."""
    size_multiple_px: Annotated[int, NOT_IN_KEY] = Field(default=16, ge=1)
    """Width and height must be multiples of this."""
    frame_step: Annotated[int, NOT_IN_KEY] = Field(default=1, ge=1)
    """`num_frames` must be `frame_step * k + 1`."""
    max_frames: Annotated[int, NOT_IN_KEY] = Field(default=MAX_FRAMES, ge=1)
    send_image: bool = True
    """False for a model that makes clips from the prompt alone."""
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    """Further fields of each request, such as `flow_shift`."""
    reported: str = ""
    """Digest of what the servers say of the model."""

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, value: Path) -> Path:
        if not str(value).startswith(REMOTE) or str(value) == REMOTE:
            raise ValueError(f"must be {REMOTE}NAME, with the name of a model in `/v1/models` of the servers")
        return value

    @field_validator("servers", mode="before")
    @classmethod
    def _check_servers(cls, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("must be a list of URLs such as http://video:8000")
        if wrong := [url for url in value if not _is_url(url)]:
            meant = f"http://{wrong[0]}"
            advice = f"; write {meant}" if isinstance(wrong[0], str) and "://" not in wrong[0] and _is_url(meant) else ""
            raise ValueError(
                f"{shortened_value(wrong[0])} must be a URL such as http://video:8000, without user and query{advice}"
            )
        return tuple(dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in value))

    @field_validator("fields")
    @classmethod
    def _check_fields(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if own := sorted(value.keys() & _OWN_FIELDS):
            raise ValueError(f"{own[0]} is that of the shot; leave it out, and use the fields of shots")
        return value

    @property
    def model(self) -> str:
        return str(self.weights).removeprefix(REMOTE)

    def for_key(self) -> dict[str, Any]:
        kept = super().for_key()
        return {"model": self.model} | {name: kept[name] for name in ("fields", "reported", "send_image")}

    def pins(self) -> dict[str, JsonValue]:
        return {"reported": self.reported or reported_model(self.model, self.servers, self.key_env)}


class _RemoteStage(Stage[RemoteParams]):
    """Common parts. Nothing is loaded: requests go to a server."""

    uses_shot_seed: ClassVar[bool] = True
    Params: ClassVar[type[StageParams]] = RemoteParams

    @classmethod
    def places(cls, params: RemoteParams) -> Mapping[str, int]:
        return dict.fromkeys(params.servers, params.parallel)

    @classmethod
    def price(cls, params: RemoteParams, billed: float) -> float | None:
        return None if params.price_per_second is None else round(params.price_per_second * billed, 6)

    @classmethod
    def weight_files(cls, params: RemoteParams, shot: Shot) -> tuple[Path, ...]:
        return ()

    @property
    def origin(self) -> str:
        return f"remote: {self.params.model} by a server; not verified by this project"

    def load(self) -> None:
        params = self.params
        self.servers = VideoServers(
            params.model,
            params.reported,
            params.servers,
            auth_headers(params.key_env),
            params.timeout_s * DEADLINE_SHARE,
            lambda percent: report_progress(self.name, percent, 100 if percent else 0),
        )

    def close(self) -> None:
        if "servers" in vars(self):
            self.servers.close()
        super().close()

    def request_fields(self, shot: Shot) -> dict[str, JsonValue]:
        """Return the fields that servers of clips and of images have in common."""
        optional = {
            "negative_prompt": shot.negative_prompt,
            "num_inference_steps": getattr(shot.steps, self.name),
            "guidance_scale": getattr(shot.guidance, self.name),
        }
        return {
            "model": self.params.model,
            "size": f"{shot.width}x{shot.height}",
            "seed": self.generator_seed(shot),
            **{name: value for name, value in optional.items() if value is not None},
            **self.params.fields,
        }


class RemoteImageStage(_RemoteStage):
    """Prompt -> `image` (height, width, 3) by a server's `/v1/images/generations`."""

    name: ClassVar[str] = "remote_image"
    label: ClassVar[str] = "Remote image"
    activity: ClassVar[str] = "Waiting for the image of a server"
    chosen_by: ClassVar[str] = "image_by"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"image_model": "remote"},)
    common_settings: ClassVar[tuple[str, ...]] = ("steps", "guidance")
    reads: ClassVar[tuple[str, ...]] = (*PROMPT_FIELDS, "steps.remote_image", "guidance.remote_image")
    takes: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "base.png"

    @classmethod
    def check_shot(cls, params: RemoteParams, shot: Shot) -> None:
        _check_size(params, shot)

    @classmethod
    def billed(cls, shot: Shot) -> float:
        return 1.0

    def run(self, item: Item) -> Artefacts:
        from vidgen_ray.media.images import read_image

        body = {**self.request_fields(item.shot), "prompt": item.shot.prompt, "n": 1, "response_format": "b64_json"}
        key = item.key or _digest(json.dumps(body, sort_keys=True).encode())
        # RGB with alpha, in base64.
        content = self.servers.image(key, body, item.shot.width * item.shot.height * 6 + _SPARE_BYTES)
        try:
            with tempfile.NamedTemporaryFile(prefix="vidgen-", suffix=".png") as file:
                file.write(base64.b64decode(content, validate=True))
                file.flush()
                return {"image": read_image(Path(file.name))}
        except (ValueError, MediaError):
            raise ServerFailed(f"{self.params.servers[0]}: answered with no image in `b64_json`") from None


class RemoteVideoStage(_RemoteStage, VideoStage[RemoteParams]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3) by a job of a server's `/v1/videos`.

    The clip is checked: size, number of frames, frame rate, and that it is not that of another job.
    """

    name: ClassVar[str] = "remote"
    label: ClassVar[str] = "Remote video"
    activity: ClassVar[str] = "Waiting for the clip of a server"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"video_model": "remote", "num_frames": 25},)
    clip_only_fields: ClassVar[tuple[str, ...]] = (*VideoStage.clip_only_fields, "motion_prompt")
    reads: ClassVar[tuple[str, ...]] = (*CLIP_PROMPT_FIELDS, "steps.remote", "guidance.remote")

    def __init__(self, params: RemoteParams) -> None:
        super().__init__(params)
        self._lock = threading.Lock()
        self._starts: FIFOCache[str, NDArray[np.float32]] = FIFOCache(REMEMBERED)
        """Key of a job -> thumbnail of its start image."""
        self._clips: FIFOCache[str, str] = FIFOCache(REMEMBERED)
        """Digest of a clip -> key of its job."""
        self._doubtful: dict[str, str] = {}
        """Key of a job -> digest of its clip, which does not begin with the start image. It counts if it comes again."""

    @classmethod
    def check_shot(cls, params: RemoteParams, shot: Shot) -> None:
        _check_size(params, shot)
        if params.send_image and shot.image_model == "none" and not shot.has_start_image:
            raise StageError("image_model: got none, which needs `send_image: false` in the options of actors.remote")
        model = VideoModel(shot.fps, params.frame_step, shot.num_frames, params.size_multiple_px)
        if not model.allows(shot.num_frames):
            raise StageError(f"num_frames: got {shot.num_frames}, {model.allowed_instead_of(shot.num_frames)}")
        if shot.num_frames > params.max_frames:
            raise StageError(f"num_frames: got {shot.num_frames}, must be at most {params.max_frames} for this server")

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return cls.relative_fixed_cost(shot)

    @classmethod
    def billed(cls, shot: Shot) -> float:
        return shot.clip_frames / shot.fps

    def generate(self, item: Item) -> Frames:
        from vidgen_ray.media.images import encode_png

        shot = item.shot
        fields = {
            **self.request_fields(shot),
            "prompt": prompt_of(shot),
            "num_frames": shot.num_frames,
            "fps": shot.fps,
        }
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        image = item.image if self.params.send_image else None
        png = None if image is None else encode_png(image)
        key = item.key or _digest(json.dumps(form, sort_keys=True).encode() + (png or b""))
        if image is not None:
            with self._lock:
                self._starts[key] = _thumbnail(image)
        max_bytes = shot.num_frames * shot.width * shot.height * 3 + _SPARE_BYTES
        frames, submits = self.servers.clip(key, form, png, self.jobs, partial(self._checked, key, shot), max_bytes)
        if submits > 1:
            self.note(f"remote: the job was submitted {submits} times")
        return frames

    def _checked(self, key: str, shot: Shot, content: bytes, found: bool) -> Frames:
        """Return the frames of a clip. Raises WrongAnswer if it cannot be that of the job.

        A model may not keep the start image: then the clip is downloaded twice, and must be the same.
        """
        frames = _decoded(content, shot)
        if (frames == frames[0, 0, 0]).all():
            raise WrongAnswer("the clip has a single colour")
        digest, start = _digest(content), _thumbnail(frames[0])
        with self._lock:
            own = self._starts.get(key)
            if self._clips.get(digest, key) != key:
                raise WrongAnswer("answered with the clip of another job")
            if own is not None:
                like_own = _correlation(start, own)
                others = max((_correlation(start, other) for name, other in self._starts.items() if name != key), default=-1)
                if others > SAME_IMAGE and like_own < others - _MARGIN:
                    raise WrongAnswer("answered with a clip that begins with the image of another job")
                doubtful = like_own < SAME_IMAGE and (found or self._doubtful.pop(key, None) != digest)
                if doubtful:
                    self._doubtful[key] = digest
                    raise WrongAnswer("the clip does not begin with its start image")
            self._clips[digest] = key
        return frames


def _is_url(value: object) -> bool:
    import httpx2

    try:
        url = urlsplit(text := value if isinstance(value, str) else "")
        # The resolver refuses names with empty or too long parts, such as a..b.
        host = httpx2.URL(text).raw_host.decode().encode("idna")
        return (
            url.scheme in ("http", "https") and bool(host) and url.port != 0 and not (url.username or url.query or url.fragment)
        )
    except (ValueError, httpx2.InvalidURL):
        return False


def _check_size(params: RemoteParams, shot: Shot) -> None:
    for side in ("width", "height"):
        if getattr(shot, side) % params.size_multiple_px:
            got = f"{side}: got {getattr(shot, side)}"
            raise StageError(f"{got}, must be a multiple of {params.size_multiple_px} for this server")


def _decoded(content: bytes, shot: Shot) -> Frames:
    """Return the frames (num_frames, height, width, 3) of a clip. Raises WrongAnswer for one that is not as requested."""
    from vidgen_ray.media.decode import open_foreign_video

    with tempfile.NamedTemporaryFile(prefix="vidgen-", suffix=".mp4") as file:
        file.write(content)
        file.flush()
        try:
            with open_foreign_video(Path(file.name), own_process=True) as video:
                got = (video.frame_count, video.width, video.height, round(float(video.fps), 2))
                if got == (shot.num_frames, shot.width, shot.height, shot.fps):
                    return video.frames(0, video.frame_count)
        except MediaError as error:
            raise WrongAnswer(f"the clip is damaged: {str(error).rpartition(': ')[2]}") from None
    frames, width, height, fps = got
    wanted = f"{shot.num_frames} frames of {shot.width}x{shot.height} at {shot.fps} fps"
    raise WrongAnswer(f"the clip has {frames} frames of {width}x{height} at {fps:g} fps, must be {wanted}")


def _thumbnail(image: Image) -> NDArray[np.float32]:
    """Return the grey levels (SIDE_PX * SIDE_PX) of a small image, with mean 0 and length 1."""

    import numpy as np
    from PIL import Image as PILImage

    small = PILImage.fromarray(image).resize((_SIDE_PX, _SIDE_PX), PILImage.Resampling.BOX)
    levels = np.asarray(small, np.float32).mean(axis=2).ravel()
    levels -= levels.mean()
    return np.asarray(levels / (np.linalg.norm(levels) or 1.0), np.float32)


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(first @ second)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
