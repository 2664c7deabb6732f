"""How often and how much one key may ask. What is open in the store counts there, in the transaction that adds to it."""

from __future__ import annotations

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from vidgen_ray.online.api_error import ApiError, try_later
from vidgen_ray.online.auth import Tenant
from vidgen_ray.shot import Shot


class RequestRate:
    """Requests of the last minute of each key, in this process: with N replicas of the API a key may have up to N times
    as many."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, tenant: Tenant) -> None:
        """Count a request. Raises ApiError 429 where it is one too many."""
        allowed = RateLimitItemPerMinute(tenant.limits.requests_per_minute)
        if not self._limiter.hit(allowed, tenant.key_id):
            wait_s = self._limiter.get_window_stats(allowed, tenant.key_id).reset_time - time.time()
            message = f"More than {tenant.limits.requests_per_minute} requests in a minute with this key"
            raise try_later(message, "rate_limit_exceeded", max(0.05, wait_s))


def check_size(tenant: Tenant, shot: Shot) -> None:
    """Raises ApiError 400 for a shot that is larger than the key may have."""
    frames = shot.num_frames if shot.generate_video else 1
    asked, allowed = shot.width * shot.height * frames, tenant.limits.pixel_frames
    if asked > allowed:
        raise ApiError(
            400,
            f"{shot.width}x{shot.height} pixels of {frames} frames are {asked} together, at most {allowed} are allowed "
            "with this key; ask for fewer frames or a smaller size",
            code="too_large",
            param="num_frames" if shot.generate_video else "size",
        )
