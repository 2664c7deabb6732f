"""What an hour of a GPU costs, where nobody says."""

from collections.abc import Sequence

PER_GPU_HOUR: Sequence[tuple[float, float]] = ((24, 0.6), (40, 1.3), (48, 1.0), (80, 2.5), (141, 3.8))
"""GB of memory up to which a price holds, and the price in dollars: an order of magnitude, from clouds' lists of 2025."""
ROOM_GB = 1.0
"""Cards have a little more or less than their name says."""


def default_price(memory_gb: float) -> float | None:
    """Dollars an hour; none for a card larger than those in the table."""
    return next((price for most, price in PER_GPU_HOUR if memory_gb <= most + ROOM_GB), None)
