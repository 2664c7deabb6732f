"""Memory of long films."""

import pytest

from benchmarks.film import measure

MAX_MB = 400


@pytest.mark.very_slow
@pytest.mark.parametrize("copied", [False, True])
def test_film_of_a_thousand_clips_takes_less_than_400_mb(tmp_path, copied):
    figures = measure(tmp_path, 1000, (320, 192), 6, copied=copied)
    assert (figures["copied"], figures["rendered"]) == ((1000, 0) if copied else (0, 1999))
    assert figures["unchanged_rendered"] == 0
    assert figures["peak_mb"] < MAX_MB
    assert figures["unchanged_peak_mb"] < MAX_MB
