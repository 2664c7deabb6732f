"""`python jobs/upscale.py` of a checkout is `python -m vidgen_ray.jobs.upscale`."""

import runpy

runpy.run_module("vidgen_ray.jobs.upscale", run_name="__main__")
