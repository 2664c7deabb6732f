"""With which models, on what: a YAML file with the weights, precision and share of the machine of every actor."""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.json_schema import SkipJsonSchema

from vidgen_ray.errors import ProfileError
from vidgen_ray.media import Mp4Settings
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.weights import resolve

P = TypeVar("P", bound=StageParams)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActorProfile(_Section):
    """One actor: its weights and what of the machine it gets. An actor holds one stage, or several that share weights."""

    weights: str = Field(description="a path (relative to the profile), hub:OWNER/NAME@REVISION[:SUBFOLDER] or builtin:NAME")
    dtype: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: float = Field(0, ge=0, allow_inf_nan=False, description="share of a GPU")
    cpus: float = Field(1, gt=0, allow_inf_nan=False, description="CPUs; torch gets this many threads, at least one")
    actors: int = Field(1, ge=1, description="how many of this actor a batch run starts")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="the stage's own parameters")


class Profile(_Section):
    """What `--profile` names: a built-in profile, or a file of the user's own."""

    name: str
    about: str
    defaults: dict[str, JsonValue] = Field(default_factory=dict, description="fields of the shot that a script leaves out")
    encode: Mp4Settings = Mp4Settings()
    layout: Literal["staged", "fused"] = Field(
        "staged",
        description="staged: an actor for each entry of `actors`; fused: one actor for the chain up to the clip",
    )
    actors: dict[str, ActorProfile]
    source: SkipJsonSchema[Path | None] = Field(None, exclude=True)

    def params(self, stage: type[Stage[P]]) -> P:
        """The stage's parameters with its weights as a local path.

        Raises ProfileError for an option the stage does not know, SetupError where the weights are not on this machine.
        """
        actor = self.actor_of(stage)
        told: dict[str, Any] = {
            "weights": resolve(actor.weights, self.source.parent if self.source else None),
            "device": actor.device,
            "threads": max(1, int(actor.cpus)),
            **actor.options,
        }
        if actor.dtype is not None:
            told["dtype"] = actor.dtype
        try:
            params: P = stage.Params.model_validate(told)  # type: ignore[assignment]  # Params is the stage's own P
        except ValidationError as error:
            options = set(stage.Params.model_fields) - set(StageParams.model_fields)
            allowed = f"; the options are {', '.join(sorted(options)) or 'none'}"
            raise ProfileError(f"profile {self.source or self.name}, actors.{stage.actor}: {_first(error)}{allowed}") from None
        return params.resolved()

    def pinned(self, stages: Iterable[type[Stage[Any]]]) -> "Profile":
        """The same with the precision of these stages made concrete, so that every machine uses the planning one's."""
        concrete = {
            stage.actor: self.actor_of(stage).model_copy(update={"dtype": self.params(stage).dtype}) for stage in stages
        }
        return self.model_copy(update={"actors": {**self.actors, **concrete}})

    def actor_of(self, stage: type[Stage[Any]]) -> ActorProfile:
        if stage.actor not in self.actors:
            raise ProfileError(f"profile {self.name}: stage {stage.name} needs an entry 'actors.{stage.actor}'")
        return self.actors[stage.actor]


def builtin_profiles() -> list[str]:
    folder = resources.files("vidgen_ray") / "profiles"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_profile(name_or_path: str) -> Profile:
    """A built-in profile by name, or a YAML file by path. Raises ProfileError with file, field and what is allowed."""
    path = Path(name_or_path)
    source: Path | None = None
    try:
        if path.suffix in (".yaml", ".yml"):
            text, source = path.read_text(encoding="utf-8"), path.absolute()
        elif name_or_path in builtin_profiles():
            text = (resources.files("vidgen_ray") / "profiles" / f"{name_or_path}.yaml").read_text("utf-8")
        else:
            known = ", ".join(builtin_profiles())
            raise ProfileError(f"profile {name_or_path!r}: must be one of {known}, or the path of a .yaml file")
        content = yaml.safe_load(text)
    except OSError as error:
        raise ProfileError(f"profile {name_or_path!r}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"profile {name_or_path!r}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Profile.model_validate(content).model_copy(update={"source": source})
    except ValidationError as error:
        raise ProfileError(f"profile {name_or_path!r}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in detail["loc"]) or "the file"
    return f"{field}: got {detail['input']!r}, {detail['msg'][0].lower()}{detail['msg'][1:]}"
