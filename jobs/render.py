"""`python jobs/render.py` of a checkout is `python -m vidgen_ray.ray_job render`."""

import runpy
import sys

sys.argv.insert(1, "render")
runpy.run_module("vidgen_ray.ray_job", run_name="__main__")
