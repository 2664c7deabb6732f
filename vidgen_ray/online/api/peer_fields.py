"""Fields of vLLM-Omni's and SGLang's APIs that have no meaning here: which values are accepted, and why others are refused.

The request models and their OpenAPI document are made from `PEER_FIELDS`. Fields of peers that this
server honours under their own names are fields of the request models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, PlainValidator, create_model

M = TypeVar("M")
OMNI, SGLANG, BOTH = "vLLM-Omni", "SGLang", "vLLM-Omni, SGLang"
OPENAI = "OpenAI"
ANY = None
"""Value of `PeerField.neutral` that accepts everything."""
START_IMAGE = "a clip starts from an image: send input_reference"
NO_SOUND = "clips have no sound"


@dataclass(frozen=True)
class PeerField:
    """Field that is accepted if its value asks for nothing that this server does not do."""

    name: str
    type: Any
    sent_by: str
    neutral: tuple[object, ...] | None
    """Accepted values. `ANY` accepts all values of the type; an empty tuple accepts none but `null` and empty text."""
    why: str
    """Why the field has no effect, and what to send instead."""
    for_images: bool = True
    """The field is also accepted by the routes of images."""

    @property
    def description(self) -> str:
        """Description of the field in the API's documents."""
        if self.neutral is ANY:
            return f"Of {self.sent_by}. Accepted, without effect: {self.why}."
        if not self.neutral:
            return f"Of {self.sent_by}. Not supported: {self.why}."
        return f"Of {self.sent_by}. Must be {_one_of(self.neutral)}: {self.why}."

    def check(self, value: Any) -> Any:
        """Return an accepted value. Raises ValueError for a value that cannot be honoured."""
        if self.neutral is ANY or value in self.neutral:
            return value
        must = f"must be {_one_of(self.neutral)}" if self.neutral else "is not supported"
        raise ValueError(f"{must}: {self.why}")


PEER_FIELDS: tuple[PeerField, ...] = (
    PeerField("vae_use_slicing", bool, OMNI, ANY, "the profile says how memory is saved"),
    PeerField("vae_use_tiling", bool, OMNI, ANY, "the profile says how memory is saved"),
    PeerField("generator_device", str, BOTH, ANY, "noise is drawn on the CPU, so that it is the same on all devices"),
    PeerField("return_stage_metrics", bool, OMNI, ANY, "responses always have stage_durations"),
    PeerField("quality", str, f"{OPENAI}, {OMNI}", ANY, "set steps instead", for_images=False),
    PeerField("frame_interpolation_scale", float, BOTH, ANY, "the profile's flow_scale does this", for_images=False),
    PeerField("frame_interpolation_model_path", str, BOTH, (), "the profile names the weights", for_images=False),
    PeerField("true_cfg_scale", float, BOTH, (0, 1), "set guidance_scale; a negative_prompt is always used with true CFG"),
    PeerField("boundary_ratio", float, OMNI, (0, 1), "the split between Wan's two transformers is fixed", for_images=False),
    PeerField("flow_shift", float, BOTH, (), "the schedule of each model is fixed"),
    PeerField("max_sequence_length", int, SGLANG, (), "the profile sets the length of prompts"),
    PeerField("enable_teacache", bool, SGLANG, (False,), "the profile of the server chooses step caches"),
    PeerField("diffusers_kwargs", dict[str, Any], SGLANG, ({},), "stages have no other settings than the fields of a shot"),
    PeerField("rollout", bool, SGLANG, (False,), "this server does not train models"),
    PeerField("generate_sound", bool, OMNI, (False,), NO_SOUND, for_images=False),
    PeerField("sound_duration", float, OMNI, (), NO_SOUND, for_images=False),
    PeerField("audio_reference", object, OMNI, (), NO_SOUND, for_images=False),
    PeerField("video_reference", object, BOTH, (), START_IMAGE, for_images=False),
    PeerField("video_url", str, SGLANG, (), START_IMAGE, for_images=False),
    PeerField("video_path", str, SGLANG, (), START_IMAGE, for_images=False),
    PeerField("control_reference", object, OMNI, (), START_IMAGE, for_images=False),
    PeerField("control_type", str, OMNI, (), START_IMAGE, for_images=False),
    PeerField("start_time_seconds", float, OMNI, (0,), START_IMAGE, for_images=False),
    PeerField("aspect_ratio", str, OMNI, (), "send size"),
    PeerField("short_edge", int, OMNI, (), "send size"),
    PeerField("upscaling_model_path", str, SGLANG, (), "send upscaler, the name of one of the server's upscalers"),
    PeerField("output_quality", str, SGLANG, ("default",), "the profile sets the compression of clips"),
    PeerField("output_compression", int, SGLANG, (), "the profile sets the compression of clips", for_images=False),
    PeerField("output_path", str, SGLANG, (), "download the file instead"),
    PeerField("perf_dump_path", str, SGLANG, (), "responses have stage_durations"),
)
"""All such fields. A peer's field that is neither here nor in a request model is rejected as unknown."""
PEER_FIELD_NAMES = frozenset(field.name for field in PEER_FIELDS)


def with_peer_fields(*, images: bool) -> Callable[[type[M]], type[M]]:
    """Return a class decorator that adds the peers' fields to a request model, which may define its own instead."""

    def add_fields(model: type[Any]) -> type[Any]:
        fields: dict[str, Any] = {
            peer.name: (_annotation(peer), Field(None, description=peer.description))
            for peer in PEER_FIELDS
            if peer.name not in model.model_fields and (peer.for_images or not images)
        }
        return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields)

    return add_fields


def _annotation(peer: PeerField) -> Any:
    if peer.neutral == ():
        # Values of all types are refused with the same sentence.
        documented = Any if peer.type is object else peer.type
        return Annotated[Any, PlainValidator(peer.check, json_schema_input_type=documented)]
    return Annotated[peer.type, AfterValidator(peer.check)] | None


def _one_of(values: tuple[object, ...]) -> str:
    return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
