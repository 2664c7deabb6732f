"""Limits of requests for each API key: their rate, and the size of jobs."""

from __future__ import annotations

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from vidgen_ray.online.api_error import ApiError, too_many_requests
from vidgen_ray.online.server_settings import Limits
from vidgen_ray.shot import Shot


class RequestRateLimiter:
    """Counter of each key's requests per minute, in this process. With N API replicas a key may send N times as many."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, key_id: str, limits: Limits) -> None:
        """Count a request. Raises ApiError 429 over the limit."""
        allowed = RateLimitItemPerMinute(limits.requests_per_minute)
        if not self._limiter.hit(allowed, key_id):
            wait_s = self._limiter.get_window_stats(allowed, key_id).reset_time - time.time()
            message = f"More than {limits.requests_per_minute} requests in a minute with this key"
            raise too_many_requests(message, "rate_limit_exceeded", max(0.05, wait_s))


def check_size(limits: Limits, shot: Shot, count: int = 1) -> None:
    """Raises ApiError 400 if the models would draw more pixels for `count` such shots than the limit allows."""
    frames = shot.clip_frames if shot.generate_video else 1
    total, allowed = shot.width * shot.height * frames * count, limits.pixel_frames
    if total > allowed:
        results = f" x {count} results" if count > 1 else ""
        raise ApiError(
            400,
            f"{shot.width} x {shot.height} pixels x {frames} frames{results} is {total}, "
            f"must be at most {allowed} for this key. Request fewer frames, fewer results or a smaller size.",
            code="too_large",
            param="num_frames" if shot.generate_video else "size",
        )
