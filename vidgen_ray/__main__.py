"""`python -m vidgen_ray` is `vidgen`."""

import sys

from vidgen_ray.cli import run_process

sys.exit(run_process())
