"""`vidgen retry`: the failed lines of an output folder, and the profile of its last run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.failures import FILE
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.provenance.settings import ProvenanceSettings


def last_profile(outputs: OutputFolder) -> Profile:
    """Return the profile of the last run, which `run.json` names.

    Raises SetupError if it names none, and ProfileError if its profile does not exist any more.
    """
    try:
        run = json.loads(outputs.storage.read("run.json") or b"{}")
        name = run["profile_source"] or run["profile"]["name"]
    except (ValueError, KeyError, TypeError):
        raise SetupError(f"{outputs.url}: run.json does not name the profile of the last run; pass --profile") from None
    return load_profile(name)


def last_provenance(outputs: OutputFolder) -> ProvenanceSettings | None:
    """Return how the last run marked its files, or `None` if `run.json` does not say: it is of an earlier version."""
    with suppress(ValueError, KeyError, TypeError):
        run = json.loads(outputs.storage.read("run.json") or b"{}")
        return ProvenanceSettings.model_validate(run["profile"]["provenance"])
    return None


@contextmanager
def failed_lines(outputs: OutputFolder) -> Iterator[Path]:
    """Yield the file of failed lines, as a script. Raises SetupError if no line has failed."""
    lines = outputs.storage.read(FILE)
    if lines is None:
        raise SetupError(f"{outputs.url}: no line has failed, there is no {FILE}")
    if outputs.storage.local is not None:
        yield outputs.storage.local / FILE
        return
    with TemporaryDirectory(prefix="vidgen-retry-") as folder:
        (Path(folder) / FILE).write_bytes(lines)
        yield Path(folder) / FILE
