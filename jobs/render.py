"""Render a script as a Ray job: `ray job submit --working-dir . -- python jobs/render.py SCRIPT -o OUT [options]`.

The options are those of `vidgen render`; the cluster is the one the job runs on. Script and output folder must be visible
to every node. A job that ended early is submitted again with the same arguments: finished shots are skipped.
"""

import sys

from vidgen_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["render", *sys.argv[1:], "--address", "auto"]))
