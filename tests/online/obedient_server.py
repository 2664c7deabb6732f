"""`vidgen serve` with stages that do what the prompt says, for tests that end its process: python -m ... SETTINGS-AS-JSON"""

import json
import sys

from tests.online.obedient_stages import OBEDIENT
from vidgen_ray.cli.serve import serve_command
from vidgen_ray.online.settings import OnlineSettings

if __name__ == "__main__":
    serve_command(OnlineSettings(**json.loads(sys.argv[1])), address=None, grace_s=0, stages=OBEDIENT)
