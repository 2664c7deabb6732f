"""`vidgen retry`: the failed lines of an output folder, and the profile and the options of its last run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vidgen_ray.batch.run_options import RecordedOptions
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder, read_last_run
from vidgen_ray.outputs.manifest_writer import FILE
from vidgen_ray.profile import Profile, load_profile


def last_profile(outputs: OutputFolder) -> Profile:
    """Return the profile of the last run, which `run.json` names.

    Raises SetupError if it names none, and ProfileError if its profile does not exist any more.
    """
    try:
        if not (run := read_last_run(outputs)):
            raise SetupError(f"{outputs.url}: has no results; pass the output folder of `vidgen render`")
        name = run["profile_source"] or run["profile"]["name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{outputs.url}: run.json does not name the profile of the last run; pass --profile") from None
    return load_profile(name)


def last_options(outputs: OutputFolder) -> RecordedOptions:
    """Return the options of the last run, or the defaults if there was none, or one of a version that did not record them."""
    try:
        return RecordedOptions.model_validate(read_last_run(outputs)["options"])
    except (ValueError, KeyError, TypeError):
        return RecordedOptions()


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
