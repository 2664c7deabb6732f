"""Application of scripted stages, as a Serve config imports it."""

from typing import Any

from ray.serve import Application

from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.online.application import build_with


def build(args: dict[str, Any]) -> Application:
    return build_with(args, SCRIPTED)
