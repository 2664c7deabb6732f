"""Profiles: YAML files with the weights, precision, memory and stage seconds of each actor."""

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, JsonValue, ValidationError, field_validator
from pydantic.json_schema import SkipJsonSchema

from vidgen_ray.errors import ProfileError, SetupError, StrictModel, allowed_of, shortened_value
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.safety import ContentPolicy, Safety, SafetySettings, safety_of
from vidgen_ray.shot import wrong_defaults
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.system.files import load_yaml, parse_yaml
from vidgen_ray.weights import NO_WEIGHTS, resolve, with_commit
from vidgen_ray.weights.ledger import WeightLicence, licence_of

_P = TypeVar("_P", bound=StageParams)
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SmallerGpu(StrictModel):
    """Changes of an actor on GPUs with less memory."""

    below_gb: float = Field(gt=0, allow_inf_nan=False, description="GPUs with less memory in GB (2^30 bytes) than this.")
    weights: str | None = Field(default=None, description="Other weights. Default: those of the actor.")
    extra_weights: dict[str, str] | None = Field(default=None, description="Other extra weights. Default: those of the actor.")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="Parameters of the stage that replace the actor's.")
    trial_options: dict[str, JsonValue] | None = Field(
        default=None, description="Other parameters to try. Default: those of the actor."
    )
    lossy_trial_options: dict[str, JsonValue] | None = Field(
        default=None, description="Other lossy parameters to try. Default: those of the actor."
    )


class SmallerDefaults(StrictModel):
    """Other defaults on GPUs with less memory."""

    below_gb: float = Field(gt=0, allow_inf_nan=False, description="GPUs with less memory in GB (2^30 bytes) than this.")
    defaults: dict[str, JsonValue] = Field(description="Default values of shot fields that replace the profile's.")


class ActorProfile(StrictModel):
    """Weights and resources of an actor. An actor runs one stage, or several stages that share weights."""

    weights: str = Field(
        default=NO_WEIGHTS,
        description="A path (relative to the profile), hub:OWNER/NAME[@REVISION][:SUBFOLDER], builtin:NAME, or remote:NAME for "
        "a model that servers have. Required unless the stage has no weights.",
    )
    extra_weights: dict[str, str] = Field(
        default_factory=dict,
        description="Extra weights: name -> reference, in the same format. Only shots that need them fail without them.",
    )
    dtype: str | None = Field(default=None, description="Precision, e.g. bfloat16. Default: that of the stage.")
    device: Literal["cpu", "cuda"] = "cpu"
    cpus: float = Field(
        default=1, gt=0, allow_inf_nan=False, description="Number of CPUs. torch uses as many threads, at least one."
    )
    memory_gb: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="Memory in GB (2^30 bytes) with activations: GPU memory for cuda, host memory for cpu. For cuda, "
        "0 computes it for the published weights.",
    )
    seconds: dict[str, _Seconds] = Field(
        default_factory=dict,
        description="Stage -> seconds of the reference shot (1024x576, 25 frames, default steps) on this device. Default: "
        "from the work of its networks and the data sheet of the card.",
    )
    timeout_s: float = Field(
        default=1800, gt=0, allow_inf_nan=False, description="Timeout in seconds of one attempt of one stage."
    )
    options: dict[str, JsonValue] = Field(default_factory=dict, description="Parameters of the stage.")
    trial_options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Further parameters that are used if a trial on this kind of GPU finds them faster and the result "
        "close to that without them. They are tried one after another.",
    )
    lossy_trial_options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Parameters that change results by more than rounding. With `allow_loss` they are tried before "
        "`trial_options`, and used if they are faster and the loss in three images or clips is within the limit of the option.",
    )
    smaller: tuple[SmallerGpu, ...] = Field(
        default=(),
        description="Changes on GPUs with less memory. Of the entries that apply, the one with the smallest `below_gb` counts.",
    )
    reason: SkipJsonSchema[str] = Field(default="", exclude=True)
    """Why the options differ from those for the largest GPUs."""

    def for_gpu(self, memory_gb: float) -> "ActorProfile":
        """Return the actor for a GPU with this memory in GB."""
        changed: dict[str, Any] = {"smaller": ()}
        if change := _for_memory(self.smaller, memory_gb):
            lossy = change.lossy_trial_options
            extra_weights = self.extra_weights if change.extra_weights is None else change.extra_weights
            changed |= {
                "weights": change.weights or self.weights,
                "extra_weights": extra_weights,
                "options": {**self.options, **change.options},
                "trial_options": self.trial_options if change.trial_options is None else change.trial_options,
                "lossy_trial_options": self.lossy_trial_options if lossy is None else lossy,
                "reason": f"GPUs below {change.below_gb:g} GB",
            }
        return self.model_copy(update=changed)


_S = TypeVar("_S", SmallerGpu, SmallerDefaults)


def _for_memory(changes: Iterable[_S], memory_gb: float) -> _S | None:
    """Return the change for a GPU with this memory. `None` if there is none."""
    return min((change for change in changes if memory_gb < change.below_gb), key=lambda change: change.below_gb, default=None)


MAX_LABEL_LETTERS = 60

Detail = Literal["full", "private", "off"]


class ProvenanceSettings(StrictModel):
    """Metadata, label and signature of images and clips. Every field but `c2pa_key` changes the bytes of files."""

    metadata: Detail = Field(
        default="full",
        description="full: mark files as AI-generated, with the tool, the content key and the settings of the shot. private: "
        "without the settings of the shot and the digests of its photos. off: write nothing and do not sign.",
    )
    label: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_LABEL_LETTERS,
        description="Text that is drawn into the lower right corner of images and clips. Default: none.",
    )
    c2pa_key: Path | None = Field(
        default=None,
        description="File with a private key and its certificates, see `vidgen keys c2pa`, with which files are signed (C2PA). "
        "An absolute path that every machine of the run has. Default: files are not signed.",
    )

    @field_validator("label")
    @classmethod
    def _check_label(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or not value.isprintable()):
            raise ValueError("must be one line of printable letters")
        return value

    def for_key(self) -> dict[str, Any]:
        """Return the fields that change the bytes of files before they are signed."""
        return self.model_dump(exclude={"c2pa_key"})

    @property
    def signing_key(self) -> Path | None:
        """File with which to sign, or `None` if files are not signed."""
        return None if self.metadata == "off" else self.c2pa_key


DEFAULT_PROVENANCE = ProvenanceSettings()


class Profile(StrictModel):
    """Built-in profile, or the user's own profile file."""

    name: str = Field(description="Name of the profile.")
    about: str = Field(description="One sentence that describes the profile.")
    defaults: dict[str, JsonValue] = Field(default_factory=dict, description="Default values of shot fields.")
    encode: Mp4Settings = Mp4Settings()
    provenance: ProvenanceSettings = DEFAULT_PROVENANCE
    layout: Literal["auto", "fused", "staged"] = Field(
        default="auto",
        description="auto: the fastest layout that fits. fused: one worker per GPU holds all models. staged: each worker holds "
        "one entry of `actors`, as many of each as needed, and small ones share a GPU.",
    )
    cpu_workers: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of workers of a profile without GPUs. Default: as many as the CPUs allow.",
    )
    allow_loss: bool = Field(
        default=False,
        description="Try and use `lossy_trial_options`. Built-in profiles do if their name ends with `-lossy`: auto-lossy.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Price of a GPU-hour, for the estimated cost."
    )
    require_consent: bool = Field(
        default=True,
        description="Reject face photos without a `consent`. false is recorded in run.json and in the jobs of a server.",
    )
    safety: SafetySettings | None = Field(default=None, description="Checker of prompts and images. Default: none.")
    licences: tuple[WeightLicence, ...] = Field(
        default=(), description="Licences of weights of your own. They take precedence over those that vidgen knows."
    )
    smaller: tuple[SmallerDefaults, ...] = Field(
        default=(), description="Other defaults on GPUs with less memory, as in `actors`."
    )
    actors: dict[str, ActorProfile]
    source: SkipJsonSchema[Path | None] = Field(default=None, exclude=True)

    @property
    def is_demo(self) -> bool:
        """Return whether the profile uses models of the demo, which know a drawn world only."""
        return any(actor.weights.startswith("builtin:demo/") for actor in self.actors.values())

    @field_validator("defaults")
    @classmethod
    def _check_defaults(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for field, got, allowed in wrong_defaults(value):
            raise ValueError(f"{field} is {got}: {allowed}")
        return value

    def tried_options(self, actor: str) -> tuple[tuple[str, JsonValue], ...]:
        """Return options and values to try for an actor, in order."""
        section = self.actors[actor]
        lossy = section.lossy_trial_options if self.allow_loss else {}
        return (*lossy.items(), *section.trial_options.items())

    def allowing_loss(self) -> "Profile":
        """Return the profile with `allow_loss`, under another name, since its shots take another time."""
        return self.model_copy(update={"allow_loss": True, "name": f"{self.name}{LOSSY}"})

    @property
    def checker(self) -> Safety | None:
        """Safety checker of the profile."""
        return None if self.safety is None else safety_of(self.safety)

    @property
    def policy(self) -> ContentPolicy:
        """Rules for the content of lines."""
        return ContentPolicy(require_consent=self.require_consent, safety=self.safety)

    def params(self, stage: type[Stage[_P]]) -> _P:
        """Return the stage's parameters with local paths of its weights, and of the extra weights that this machine has.

        Raises ProfileError for an unknown option and SetupError if the weights are not on this machine.
        """
        actor = self.actor_of(stage)
        folder = self.source.parent if self.source else None
        extra_weights, missing = _resolve_all(actor.extra_weights, folder)
        params = self._params(stage, resolve(actor.weights, folder), extra_weights, missing)
        return params.model_copy(update=params.pins())

    def options_of(self, stage: type[Stage[_P]]) -> _P:
        """Return the stage's parameters for estimates. The weights need not be on this machine.

        Raises ProfileError for an unknown option.
        """
        actor = self.actor_of(stage)
        extra_weights = {name: Path(weights) for name, weights in actor.extra_weights.items()}
        return self._params(stage, Path(actor.weights), extra_weights, {})

    def _params(self, stage: type[Stage[_P]], weights: Path, extra_weights: dict[str, Path], missing: dict[str, str]) -> _P:
        actor = self.actor_of(stage)
        place = f"profile {self.source or self.name}, actors.{stage.actor}"
        values: dict[str, Any] = {
            "weights": weights,
            "extra_weights": extra_weights,
            "missing": missing,
            "device": actor.device,
            "threads": max(1, int(actor.cpus)),
            "timeout_s": actor.timeout_s,
        }
        if actor.dtype is not None:
            values["dtype"] = actor.dtype
        if own := sorted(actor.options.keys() & StageParams.model_fields.keys()):
            raise ProfileError(f"{place}: {own[0]} is not an option; it follows from the fields of the actor")
        values.update(actor.options)
        try:
            params: _P = stage.Params.model_validate(values)  # type: ignore[assignment]  # Params is the stage's P
        except ValidationError as error:
            options = set(stage.Params.model_fields) - set(StageParams.model_fields)
            allowed = f". Options: {', '.join(sorted(options)) or 'none'}"
            raise ProfileError(f"{place}: {_first_error(error)}{allowed}") from None
        return params.resolved()

    def with_provenance(self, settings: ProvenanceSettings | None) -> "Profile":
        """Return the profile with other settings of the provenance. `None` keeps its own."""
        return self if settings is None else self.model_copy(update={"provenance": settings})

    def for_size(self, nominal_gb: int) -> "Profile":
        """Return the profile for GPUs of this nominal size in GB, which is part of its new name."""
        memory_gb = nominal_gb * REPORTED_SHARE
        actors = {actor: section.for_gpu(memory_gb) for actor, section in self.actors.items()}
        change = _for_memory(self.smaller, memory_gb)
        defaults = {**self.defaults, **change.defaults} if change else self.defaults
        return self.model_copy(
            update={"actors": actors, "smaller": (), "defaults": defaults, "name": f"{self.name}-{nominal_gb}gb"}
        )

    def with_options(self, options: Mapping[str, Mapping[str, JsonValue]]) -> "Profile":
        """Return the profile with other options of some actors. `options`: actor -> option -> value."""
        changed = {
            name: self.actors[name].model_copy(update={"options": {**self.actors[name].options, **own}})
            for name, own in options.items()
        }
        return self.model_copy(update={"actors": {**self.actors, **changed}})

    def with_commits(self) -> "Profile":
        """Return the profile with the commit of each Hugging Face snapshot that is on this machine, in place of a branch.

        A branch may mean another commit on another machine, or later in a run.
        """
        actors = {
            name: actor.model_copy(
                update={
                    "weights": with_commit(actor.weights),
                    "extra_weights": {extra: with_commit(reference) for extra, reference in actor.extra_weights.items()},
                }
            )
            for name, actor in self.actors.items()
        }
        return self.model_copy(update={"actors": actors})

    def pinned(self, stages: Iterable[type[Stage[Any]]]) -> "Profile":
        """Return the profile with commits, and with the resolved precision and pins of these stages.

        With it, all machines use the revisions and the precision of this one.
        """
        profile, resolved = self.with_commits(), {}
        for stage in stages:
            params, actor = profile.params(stage), profile.actor_of(stage)
            options = {**actor.options, **params.pins()}
            resolved[stage.actor] = actor.model_copy(update={"dtype": params.dtype, "options": options})
        return profile.model_copy(update={"actors": {**profile.actors, **resolved}})

    def actor_of(self, stage: type[Stage[Any]]) -> ActorProfile:
        """Return the profile of the actor that runs the stage. Raises ProfileError if there is none.

        A stage without weights needs no entry.
        """
        if stage.actor not in self.actors and not stage.has_weights:
            return ActorProfile()
        if stage.actor not in self.actors:
            raise ProfileError(f"profile {self.name}: stage {stage.name} needs an entry actors.{stage.actor}")
        return self.actors[stage.actor]

    def weight_licences(self, actors: Iterable[str]) -> dict[str, WeightLicence | None]:
        """Return weight reference -> licence of all weights and extra weights of these actors. `None` if it is unknown."""
        references = [
            reference for name in actors for reference in (self.actors[name].weights, *self.actors[name].extra_weights.values())
        ]
        return {each: licence_of(each, self.licences) for each in references if each != NO_WEIGHTS}


def _resolve_all(references: Mapping[str, str], folder: Path | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Return name -> local path of available weights, and name -> error message of missing ones."""
    available: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name, reference in references.items():
        try:
            available[name] = resolve(reference, folder)
        except SetupError as error:
            missing[name] = str(error)
    return available, missing


AUTO = "auto"
"""Name of the profile that is chosen for the GPUs at hand, see `planner.profile_for`."""
LOSSY = "-lossy"
"""Ending of the name of a built-in profile with `allow_loss`."""
SIZED = re.compile(r"gpu-(\d+)gb")
"""Names of the profile `gpu` for a GPU of this nominal size."""
REPORTED_SHARE = 0.98
"""Memory that torch reports, relative to the nominal size."""


def builtin_profiles() -> list[str]:
    """Return the names of the built-in profiles, with those of `gpu` for common sizes."""
    folder = resources.files("vidgen_ray") / "profiles"
    files = (p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    return sorted({*files, "gpu-24gb", "gpu-48gb", "gpu-80gb"} - {"gpu"})


def is_builtin(name: str) -> bool:
    """Return whether this is the name of a built-in profile, and no path."""
    plain = name.removesuffix(LOSSY)
    return plain in (AUTO, *builtin_profiles()) or SIZED.fullmatch(plain) is not None


def is_auto(name: str) -> bool:
    """Return whether the profile of this name is chosen for the GPUs at hand."""
    return name.removesuffix(LOSSY) == AUTO


def load_profile(name_or_path: str) -> Profile:
    """Load a built-in profile by name, or a YAML file by path.

    Raises ProfileError with the file, the field and what is allowed.
    """
    path = Path(name_or_path)
    source: Path | None = None
    try:
        if path.suffix in (".yaml", ".yml"):
            content, source = load_yaml(path), path.absolute()
        elif name_or_path.endswith(LOSSY):
            return load_profile(name_or_path.removesuffix(LOSSY)).allowing_loss()
        elif sized := SIZED.fullmatch(name_or_path):
            return load_profile("gpu").for_size(int(sized[1]))
        elif name_or_path in ("gpu", *builtin_profiles()):
            text = (resources.files("vidgen_ray") / "profiles" / f"{name_or_path}.yaml").read_text("utf-8")
            content = parse_yaml(text)
        else:
            names = ", ".join((AUTO, *builtin_profiles()))
            raise ProfileError(f"profile {name_or_path!r}: must be one of {names}, or the path of a .yaml file")
    except OSError as error:
        raise ProfileError(f"profile {name_or_path!r}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ProfileError(f"profile {name_or_path!r}: is not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:
        raise ProfileError(f"profile {name_or_path!r}: invalid YAML: {error}") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else shortened_value(content)
        raise ProfileError(f"profile {name_or_path!r}: got {got}, must be a mapping with name, about and actors")
    try:
        return Profile.model_validate(content).model_copy(update={"source": source})
    except ValidationError as error:
        raise ProfileError(f"profile {name_or_path!r}: {_first_error(error)}") from None


def _first_error(error: ValidationError) -> str:
    """Describe the first of pydantic's errors: field, value and what is allowed."""
    detail = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in detail["loc"]) or "top level"
    return f"{field}: got {shortened_value(detail['input'])}, {allowed_of(detail)}"
