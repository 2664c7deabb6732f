"""Python client of a vidgen-ray server. It needs neither torch nor Ray."""

from vidgen_ray.client.async_client import AsyncClient
from vidgen_ray.client.blocking_client import Client
from vidgen_ray.client.errors import ApiError, ClientError, ConnectionFailed, JobCancelled, JobFailed, WaitTimeout
from vidgen_ray.client.image_inputs import ImageInput
from vidgen_ray.client.models import (
    Character,
    ErasedCharacter,
    Estimate,
    GeneratedImage,
    Model,
    UploadedFile,
    Variant,
    Video,
    VideoPage,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "Character",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "ErasedCharacter",
    "Estimate",
    "GeneratedImage",
    "ImageInput",
    "JobCancelled",
    "JobFailed",
    "Model",
    "UploadedFile",
    "Variant",
    "Video",
    "VideoPage",
    "WaitTimeout",
]
