"""Render a script as a Ray job: `ray job submit -- python -m vidgen_ray.jobs.render SCRIPT -o OUT [options]`.

Takes the options of `vidgen render`. All nodes must be able to read the script and write to the output folder. To resume a job,
submit it again with the same arguments. Finished shots are skipped.
"""

import sys

from vidgen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["render", *sys.argv[1:], "--address", "auto"]))
