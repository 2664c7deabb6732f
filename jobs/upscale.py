"""`python jobs/upscale.py` of a checkout is `python -m vidgen_ray.jobs upscale`."""

import runpy
import sys

sys.argv.insert(1, "upscale")
runpy.run_module("vidgen_ray.jobs", run_name="__main__")
