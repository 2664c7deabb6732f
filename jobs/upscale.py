"""`python jobs/upscale.py` of a checkout is `python -m vidgen_ray.ray_job upscale`."""

import runpy
import sys

sys.argv.insert(1, "upscale")
runpy.run_module("vidgen_ray.ray_job", run_name="__main__")
