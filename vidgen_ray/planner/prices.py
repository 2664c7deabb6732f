"""Default prices of GPU-hours."""

from collections.abc import Sequence

PER_GPU_HOUR: Sequence[tuple[float, float]] = ((24, 0.6), (40, 1.3), (48, 1.0), (80, 2.5), (141, 3.8))
"""Maximum GB of memory and price in dollars: rough values from cloud price lists of 2025."""
TOLERANCE_GB = 1.0
"""GPUs may have slightly more memory than their nominal size."""


def default_price(memory_gb: float) -> float | None:
    """Return dollars per hour, or `None` for a GPU with more memory than those in the table."""
    return next((price for max_gb, price in PER_GPU_HOUR if memory_gb <= max_gb + TOLERANCE_GB), None)
