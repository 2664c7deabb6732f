"""`python jobs/render.py` of a checkout is `python -m vidgen_ray.jobs.render`."""

import runpy

runpy.run_module("vidgen_ray.jobs.render", run_name="__main__")
