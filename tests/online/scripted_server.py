"""`vidgen serve` with scripted stages, as a process to kill: `python -m tests.online.scripted_server SETTINGS_JSON`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from tests import ray_workers
from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.online.serve_command import serve_command
from vidgen_ray.online.server_settings import OnlineSettings

ROOT = Path(__file__).parents[2]
POLL_S = 0.1


class ServerProcess:
    """Running server."""

    def __init__(self, folder: Path, port: int) -> None:
        """Start a server with scripted stages, the profile `profile.yaml` of the folder, and its data in the folder."""
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log.txt"
        settings = {"profile": str(folder / "profile.yaml"), "data": str(folder / "data"), "port": port}
        command = [sys.executable, "-m", "tests.online.scripted_server", json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        while not self._is_up():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(POLL_S)

    def _is_up(self) -> bool:
        try:
            with urlopen(f"{self.url}/healthz", timeout=10) as answer:
                return json.load(answer) == {"status": "ok"}
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill the server with all its child processes, like a machine that goes down."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=30)


@contextmanager
def scripted_server(folder: Path, port: int) -> Iterator[ServerProcess]:
    """Start a server and wait until it is up. Kill it when the block ends."""
    # Its workers are forks of the process that this one has.
    ray_workers.start()
    server = ServerProcess(folder, port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


if __name__ == "__main__":
    ray_workers.start()
    serve_command(OnlineSettings(**json.loads(sys.argv[1])), address=None, grace_s=0, stages=SCRIPTED)
