"""Upscale videos as a Ray job: `ray job submit -- python -m vidgen_ray.jobs.upscale VIDEO... -o OUT [options]`.

Takes the options of `vidgen upscale`. All nodes must be able to read the videos and the weights. To resume a job, submit it
again with the same arguments.
"""

import sys

from vidgen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["upscale", *sys.argv[1:], "--address", "auto"]))
