"""Python client of a vidgen-ray server. It needs neither torch nor Ray."""

from vidgen_client.async_client import AsyncClient
from vidgen_client.blocking_client import Client
from vidgen_client.errors import ApiError, ClientError, ConnectionFailed, JobCancelled, JobFailed, WaitTimeout
from vidgen_client.image_inputs import ImageInput
from vidgen_client.models import (
    Batch,
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
    "Batch",
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
