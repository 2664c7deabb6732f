"""`vidgen retry`: the failed lines of an output folder, and the profile of its last run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.failures import FILE
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.last_run import read_last_run
from vidgen_ray.profile import Profile, load_profile


def last_profile(outputs: OutputFolder) -> Profile:
    """Return the profile of the last run, which `run.json` names.

    Raises SetupError if it names none, and ProfileError if its profile does not exist any more.
    """
    try:
        run = read_last_run(outputs)
        name = run["profile_source"] or run["profile"]["name"]
    except (ValueError, KeyError, TypeError):
        raise SetupError(f"{outputs.url}: run.json does not name the profile of the last run; pass --profile") from None
    return load_profile(name)


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
