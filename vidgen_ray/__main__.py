"""`python -m vidgen_ray` is `vidgen`."""

import sys

from vidgen_ray.cli import main

sys.exit(main())
