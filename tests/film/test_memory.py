"""Memory of long films."""

import io
import json
from contextlib import redirect_stdout

import pytest

from benchmarks.film import CLIPS, measure
from tests import forked
from vidgen_ray.cli import main

MAX_GROWTH_MB = 100
FEW, MORE, MANY = 25, 100, 1000
FRAMES = 3
"""Frames of a clip. Most of the time is that of the sound."""


def film_in_a_fork(file, arguments):
    """Run the command, and write its report and the peak memory of its process."""
    with redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    file.write_text(json.dumps({"report": json.loads(printed.getvalue()), "peak_mb": forked.peak_mb(), "seconds": 0}))
    return code


def run(folder, arguments):
    process = forked.start(folder / "errors", film_in_a_fork, folder / "figures", arguments)
    process.join()
    assert process.exitcode == 0, (folder / "errors").read_text()
    return json.loads((folder / "figures").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path, copied):
    """The growth from 25 to 100 clips, continued to 1,000, stays below the limit.

    Each shot has another caption. Cross-fades have none, so those between the same two clips are rendered once.
    """
    few, more = (measure(tmp_path / str(shots), shots, (160, 96), FRAMES, copied=copied, run=run) for shots in (FEW, MORE))
    assert (more["copied"], more["rendered"]) == ((MORE, 0) if copied else (0, MORE + CLIPS))
    assert more["unchanged_rendered"] == 0
    for peak in ("peak_mb", "unchanged_peak_mb"):
        growth_per_clip = (more[peak] - few[peak]) / (MORE - FEW)
        assert (MANY - FEW) * growth_per_clip < MAX_GROWTH_MB, (few, more)
