"""MCP server over the client: tools with which an assistant creates videos and images on a vidgen-ray server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import wraps
from importlib.metadata import version
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack, get_args, get_type_hints

import anyio
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, InputRequiredResult, ToolAnnotations
from pydantic import Field

from vidgen_client import AsyncClient, Batch, Character, ClientError, Estimate, JobFailed, Model, Variant, Video
from vidgen_client.async_client import completed_video
from vidgen_client.models import Consent, Priority

INSTRUCTIONS = """Creates videos and images on a vidgen-ray server. create_video and create_image return at once with an id.
Call wait with this id, and again while it reports that the job is not done; then call download to save the file."""
WAIT_S = 45.0
"""Default of `wait`. Many MCP clients give up on a call after 60 s."""
P = ParamSpec("P")
R = TypeVar("R")

VideoId = Annotated[str, Field(description="Id that create_video, create_image or list_videos returned.")]
BatchId = Annotated[str, Field(description="Id that create_batch returned.")]
ConsentOfPerson = Annotated[
    Consent | None,
    Field(description="Why the face in the photos may be used. Ask the user: never make it up."),
]


class Prompt(TypedDict):
    """The required argument of the tools that render."""

    prompt: Annotated[str, Field(description="Text to render.")]


class ImageArguments(Prompt, total=False):
    """Arguments of create_image."""

    size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels, for example 1280x720. Default: that of the server.")]
    input_reference: Annotated[str | None, Field(description="Path of an image to start from.")]
    face_image: Annotated[
        list[str] | None, Field(description="Paths of photos of one face. This person appears. Needs `consent`.")
    ]
    consent: ConsentOfPerson
    character: Annotated[str | None, Field(description="Name of a character, instead of photos. See list_characters.")]
    lora: Annotated[list[str] | None, Field(description="Names of LoRAs of the server.")]
    seed: Annotated[int | None, Field(description="The same seed and fields give the same file. Default: random.")]
    priority: Annotated[Priority | None, Field(description="Priority among the jobs of this user. Default: normal.")]
    fields: Annotated[
        dict[str, Any] | None,
        Field(description="Further fields of POST /v1/videos, for example negative_prompt, num_inference_steps, fps."),
    ]


class VideoArguments(ImageArguments, total=False):
    """Arguments of create_video and plan."""

    seconds: Annotated[float | None, Field(description="Length of the clip in seconds.")]


READ_ONLY = ("batch_status", "wait", "status", "list_videos", "list_characters", "list_models")
DESTRUCTIVE = ("cancel", "cancel_batch", "delete_character")


def make_server(client: AsyncClient, folder: Path) -> MCPServer[None]:
    """Return the MCP server. `download` writes to `folder`. The client is closed when the server ends."""

    @asynccontextmanager
    async def close_client(_: MCPServer[None]) -> AsyncIterator[None]:
        async with client:
            yield

    server = _Server(
        "vidgen-ray", instructions=INSTRUCTIONS, version=version("vidgen-client"), lifespan=close_client, log_level="WARNING"
    )
    tools = _Tools(client, folder)
    for name in vars(_Tools):
        if not name.startswith("_"):
            hints = ToolAnnotations(read_only_hint=name in READ_ONLY, destructive_hint=name in DESTRUCTIVE)
            server.add_tool(_tool(getattr(tools, name)), annotations=hints)
    return server


class _Server(MCPServer[None]):
    """MCP server that refuses unknown arguments. The SDK would ignore them, and so a face or a length."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        for tool in await self.list_tools():
            allowed = tool.input_schema["properties"]
            if tool.name == name and (unknown := arguments.keys() - allowed.keys()):
                hint = ". Further fields of POST /v1/videos belong into `fields`" if "fields" in allowed else ""
                raise ToolError(f"unknown argument {', '.join(sorted(unknown))}, must be among {', '.join(allowed)}{hint}")
        return await super().call_tool(name, arguments, context)


class _Tools:
    """Tools of the server: the public methods, whose docstrings the assistant reads."""

    def __init__(self, client: AsyncClient, folder: Path) -> None:
        self._client = client
        self._folder = folder

    async def create_video(self, **arguments: Unpack[VideoArguments]) -> Video:
        """Start to render a video and return its id at once. Call wait next."""
        return await self._client.create_video(**_request_fields(arguments))

    async def plan(self, **arguments: Unpack[VideoArguments]) -> Estimate:
        """Estimate what create_video with these arguments would take, without creating a video: seconds of rendering and in
        the queue, seconds of GPUs, cost, and the size that the models draw. Photos are uploaded."""
        return await self._client.estimate_video(**_request_fields(arguments))

    async def create_image(self, **arguments: Unpack[ImageArguments]) -> Video:
        """Start to render an image and return its id at once. Call wait next."""
        still = {"generate_video": False, "upscale": False}
        return await self._client.create_video(**{**_request_fields(arguments), **still})

    async def wait(
        self,
        video_id: VideoId,
        context: Context[Any, Any],
        timeout_s: Annotated[float, Field(gt=0, le=600, description="Longest time to wait in seconds.")] = WAIT_S,
    ) -> list[str | Image]:
        """Wait for a video or an image. Returns its status, and a preview if it is completed. Fails if its job failed."""
        current = None
        with anyio.move_on_after(timeout_s):
            async with aclosing(self._client.follow_video(video_id)) as states:
                async for current in states:
                    await context.report_progress(current.progress, 100, _describe(current))
        current = current or await self._client.get_video(video_id)
        if current.status == "failed":
            raise JobFailed(current)
        if not current.is_final:
            return [f"{_describe(current)}. Not done after {timeout_s:g} s. Call wait again."]
        if current.status == "cancelled":
            return [_describe(current)]
        variant: Variant = "thumbnail" if current.num_frames == 1 else "spritesheet"
        preview = await self._client.read_video(current, variant=variant)
        return [_describe(current), Image(data=preview, format="webp" if variant == "thumbnail" else "jpeg")]

    async def status(self, video_id: VideoId) -> Video:
        """Return status, progress and settings of a video or an image."""
        return await self._client.get_video(video_id)

    async def cancel(self, video_id: VideoId) -> Video:
        """Cancel a queued or running job. A running one stops after its current step."""
        return await self._client.cancel_video(video_id)

    async def list_videos(
        self,
        limit: Annotated[int, Field(ge=1, le=100, description="Most videos to return.")] = 10,
        after: Annotated[str | None, Field(description="Id of the last video of the page before.")] = None,
    ) -> list[Video]:
        """List videos and images, the newest first."""
        return (await self._client.list_videos(limit=limit, after=after)).data

    async def download(
        self,
        video_id: VideoId,
        variant: Annotated[
            Literal["video", "hd", "sd", "image"],
            Field(description="video: the finished file. hd or sd: a larger or smaller clip. image: the first image."),
        ] = "video",
    ) -> str:
        """Save the file of a completed video or image in the download folder of this MCP server, and return its path."""
        # An answer must be about this id, see AsyncClient.get_video. Its name is that of the file.
        video = await self._client.get_video(video_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        if variant == "video":
            return str(await self._client.download_video(video, self._folder))
        name = f"{video.id}-{variant}{'.png' if variant == 'image' else '.mp4'}"
        return str(await self._client.download_video(video, self._folder / name, variant=variant))

    async def create_batch(
        self,
        prompts: Annotated[list[str], Field(min_length=1, max_length=1000, description="Texts to render, a video each.")],
        fields: Annotated[
            dict[str, Any] | None, Field(description="Fields of POST /v1/videos for all of them, for example size, seconds.")
        ] = None,
    ) -> Batch:
        """Start to render many videos in the background, after all other work. Call batch_status later."""
        requests = [
            {"custom_id": f"{n}", "method": "POST", "url": "/v1/videos", "body": {**(fields or {}), "prompt": prompt}}
            for n, prompt in enumerate(prompts)
        ]
        content = "\n".join(map(json.dumps, requests)).encode()
        return await self._client.create_batch(await self._client.upload_batch(content))

    async def batch_status(
        self, batch_id: BatchId
    ) -> tuple[Batch, Annotated[dict[str, str], Field(description="Number of the prompt -> id of its video, or error.")]]:
        """Return the state of a batch, and once it has ended the id of the video of each prompt. Call download for each."""
        batch = await self._client.get_batch(batch_id)
        output, errors = await self._client.batch_lines(batch)
        results = {str(line.custom_id): completed_video(line).id for line in output}
        return batch, results | {str(line.custom_id): line.problem.message for line in errors}

    async def cancel_batch(self, batch_id: BatchId) -> Batch:
        """Cancel a batch. Its completed videos are kept."""
        return await self._client.cancel_batch(batch_id)

    async def list_characters(self) -> list[Character]:
        """List all characters: named faces that create_video and create_image accept."""
        return await self._client.list_characters()

    async def create_character(
        self,
        name: Annotated[str, Field(description="Unique name.")],
        photos: Annotated[list[str], Field(min_length=1, description="Paths of photos of one face.")],
        consent: ConsentOfPerson = None,
    ) -> Character:
        """Create a character from photos of one face. Needs `consent`."""
        declared = consent.model_dump(exclude_none=True) if consent else None
        return await self._client.create_character(name, photos, consent=declared)

    async def delete_character(self, character_id: Annotated[str, Field(description="Id of the character.")]) -> str:
        """Delete a character."""
        await self._client.delete_character(character_id)
        return f"Deleted {character_id}."

    async def list_models(self) -> list[Model]:
        """List the models of the server. The first is the default."""
        return await self._client.list_models()


def _request_fields(arguments: ImageArguments) -> dict[str, Any]:
    """Return the fields of a request from the arguments of a tool."""
    given = {name: value for name, value in arguments.items() if value is not None}
    further: Any = given.pop("fields", {})
    if isinstance(consent := given.get("consent"), Consent):
        given["consent"] = consent.model_dump(exclude_none=True)
    return {**further, **given}


def _tool(method: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """Return a method as a tool: with one parameter for each argument, and errors that are reported to the assistant."""

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except (ClientError, OSError) as error:
            raise ToolError(str(error)) from error

    declared = signature(method, eval_str=True)
    parameters: list[Parameter] = []
    for parameter in declared.parameters.values():
        parameters += _arguments(parameter) if parameter.kind is Parameter.VAR_KEYWORD else [parameter]
    call.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _arguments(parameter: Parameter) -> list[Parameter]:
    """Return one parameter for each key of `**arguments: Unpack[...]`. Optional ones are `None` by default."""
    (keys,) = get_args(parameter.annotation)
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if name in keys.__required_keys__ else None,
            annotation=annotation,
        )
        for name, annotation in get_type_hints(keys, include_extras=True).items()
    ]


def _describe(video: Video) -> str:
    """Describe the status of a job in one line."""
    parts = [f"{video.id}: {video.status}"]
    if video.status == "queued" and video.queue_position is not None:
        parts.append(f"{video.queue_position} jobs before it")
    if video.status == "in_progress":
        parts.append(f"{video.progress} %")
        if video.stage:
            parts.append(f"{video.stage} {video.step} of {video.steps}" if video.steps else video.stage)
    if video.eta_s is not None and not video.is_final:
        parts.append(f"about {video.eta_s:.0f} s left")
    if video.status == "completed":
        parts.append(video.size or "unknown size")
        if video.num_frames != 1 and video.seconds is not None:
            parts.append(f"{video.seconds:g} s, seed {video.seed}")
    return ", ".join(parts)
