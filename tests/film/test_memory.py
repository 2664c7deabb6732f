"""Memory of long films."""

import pytest

from benchmarks.film import CLIPS, measure

MAX_MB = 400
FEW, MORE, MANY = 50, 200, 1000


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path, copied):
    """The growth from 50 to 200 clips, continued to 1,000, stays below the limit.

    Each shot has another caption. Cross-fades have none, so those between the same two clips are rendered once.
    """
    few, more = (measure(tmp_path / str(shots), shots, (160, 96), 6, copied=copied) for shots in (FEW, MORE))
    assert (more["copied"], more["rendered"]) == ((MORE, 0) if copied else (0, MORE + CLIPS))
    assert more["unchanged_rendered"] == 0
    for peak in ("peak_mb", "unchanged_peak_mb"):
        growth_per_clip = max(0, more[peak] - few[peak]) / (MORE - FEW)
        assert more[peak] + (MANY - MORE) * growth_per_clip < MAX_MB, (few, more)
