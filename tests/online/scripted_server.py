"""`vidgen serve` with scripted stages, as a process to kill: `python -m tests.online.scripted_server SETTINGS_JSON`."""

import json
import sys

from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.online.serve_command import serve_command
from vidgen_ray.online.server_settings import OnlineSettings

if __name__ == "__main__":
    serve_command(OnlineSettings(**json.loads(sys.argv[1])), address=None, grace_s=0, stages=SCRIPTED)
