"""`python jobs/render.py` of a checkout is `python -m vidgen_ray.jobs render`."""

import runpy
import sys

sys.argv.insert(1, "render")
runpy.run_module("vidgen_ray.jobs", run_name="__main__")
