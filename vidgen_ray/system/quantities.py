"""Durations, sizes and amounts of money as people read them."""

from __future__ import annotations

UNITS_S = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""Seconds of a unit, and of the next smaller one."""


def duration(seconds: float) -> str:
    """Return `4 s`, `4.2 s`, `42 s`, `4 min 9 s`, `2 h 5 min` or `3 d 4 h`."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    whole = round(seconds)
    for large_s, large, small_s, small in UNITS_S:
        if whole >= large_s:
            rest = whole % large_s // small_s
            return f"{whole // large_s} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def size(n_bytes: float, digits: int = 3) -> str:
    """Return a size in decimal units, with this many significant digits: `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.{digits}g} {unit}" if n_bytes < 10 ** (digits - 1) else f"{n_bytes:,.0f} {unit}"


def count(number: int, thing: str) -> str:
    """Return `1 shot` or `1,200 shots`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def amount_text(amount: float) -> str:
    """Return `1,234.50` or `0.0012`."""
    return f"{amount:,.2f}" if not amount or amount >= 0.1 else f"{amount:.2g}"


def money(amount: float, currency: str | None) -> str:
    """Return an amount with its currency. Without one, it is in that of `--price` or of the profile."""
    return f"{amount_text(amount)} {currency or '(in the currency of the price)'}"
