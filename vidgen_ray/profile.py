"""With which models, on what: a YAML file with the weights, precision, memory and seconds of every actor."""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.media import Mp4Settings
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.strict_yaml import StrictLoader
from vidgen_ray.weights import resolve

P = TypeVar("P", bound=StageParams)
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActorProfile(_Section):
    """One actor: its weights and what of the machine it gets. An actor holds one stage, or several that share weights."""

    weights: str = Field(description="a path (relative to the profile), hub:OWNER/NAME@REVISION[:SUBFOLDER] or builtin:NAME")
    extra_weights: dict[str, str] = Field(
        default_factory=dict,
        # `also` is the name of this field in profiles written before 0.2.
        validation_alias=AliasChoices("extra_weights", "also"),
        description="further weights by name, written alike; missed only by shots that need them",
    )
    dtype: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    cpus: float = Field(1, gt=0, allow_inf_nan=False, description="CPUs; torch gets this many threads, at least one")
    memory_gb: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="GB with activations, of the GPU, or of the host on a CPU; cuda needs it",
    )
    seconds: dict[str, Seconds] = Field(
        default_factory=dict,
        description="stage -> seconds of the reference shot (1024x576, 25 frames, default steps) on this device",
    )
    timeout_s: float = Field(1800, gt=0, allow_inf_nan=False, description="seconds that one attempt of one stage may take")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="the stage's own parameters")

    @model_validator(mode="after")
    def _a_gpu_is_packed_by_memory(self) -> Self:
        if self.device == "cuda" and self.memory_gb == 0:
            raise ValueError("memory_gb must be given with device cuda: without it nothing can be packed on a GPU")
        return self


class Profile(_Section):
    """What `--profile` names: a built-in profile, or a file of the user's own."""

    name: str
    about: str
    defaults: dict[str, JsonValue] = Field(default_factory=dict, description="fields of the shot that a script leaves out")
    encode: Mp4Settings = Mp4Settings()
    layout: Literal["auto", "fused", "colocated", "staged"] = Field(
        "auto",
        description="auto: what the planner finds fastest; fused: a process a GPU holds everything; colocated: a process a "
        "GPU for each entry of `actors`; staged: every process holds one entry, as many of each as it needs",
    )
    cpu_workers: int | None = Field(None, ge=1, description="most workers of a profile without GPUs; none: as the CPUs allow")
    swap_gb_per_s: float = Field(
        20, gt=0, allow_inf_nan=False, description="GB a second between the host's memory and a GPU's, where stages take turns"
    )
    price_per_gpu_hour: float | None = Field(None, ge=0, allow_inf_nan=False, description="for the cost of a plan")
    actors: dict[str, ActorProfile]
    source: SkipJsonSchema[Path | None] = Field(None, exclude=True)

    def params(self, stage: type[Stage[P]]) -> P:
        """The stage's parameters with its weights as a local path, and further ones as far as they are on this machine.

        Raises ProfileError for an option the stage does not know, SetupError where the weights are not on this machine.
        """
        actor = self.actor_of(stage)
        folder = self.source.parent if self.source else None
        extra_weights, missing = _resolved_each(actor.extra_weights, folder)
        told: dict[str, Any] = {
            "weights": resolve(actor.weights, folder),
            "extra_weights": extra_weights,
            "missing": missing,
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


def _resolved_each(references: Mapping[str, str], folder: Path | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Name -> local path of those that are there, and name -> what to do of the others."""
    there: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name, reference in references.items():
        try:
            there[name] = resolve(reference, folder)
        except SetupError as error:
            missing[name] = str(error)
    return there, missing


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
        content = yaml.load(text, StrictLoader)
    except OSError as error:
        raise ProfileError(f"profile {name_or_path!r}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ProfileError(f"profile {name_or_path!r}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Profile.model_validate(content).model_copy(update={"source": source})
    except ValidationError as error:
        raise ProfileError(f"profile {name_or_path!r}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in detail["loc"]) or "the file"
    return f"{field}: got {detail['input']!r}, {detail['msg'][0].lower()}{detail['msg'][1:]}"
