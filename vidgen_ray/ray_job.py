"""Run a command as a Ray job on the cluster that runs it: `ray job submit -- python -m vidgen_ray.ray_job render SCRIPT`.

Takes the commands and options of `vidgen` that have `--address`. All nodes must be able to read the inputs and the weights, and
to write to the output folder. To resume a job, submit it again with the same arguments.
"""

import sys

from vidgen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--address", "auto"]))
