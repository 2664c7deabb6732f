"""A server on Ray Serve, deployed with a config as `serve deploy` does it."""

import json
import socket
import time
from contextlib import suppress
from http.client import HTTPConnection

import psutil
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from tests.online.on_serve.applications import POLL_S

BUILD = "tests.online.on_serve.scripted_application:build"


class ServeCluster:
    """Ray Serve with one application, `vidgen`."""

    def __init__(self, args):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.args = {**args, "port": self.port}
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = serve_start(http_options={"host": "127.0.0.1", "port": self.port})

    def deploy(self, *others, api_replicas=2, **changes):
        """Deploy the application with changed args, beside `others`."""
        self.args |= changes
        api = {"name": "Api", "num_replicas": api_replicas}
        own = {"name": "vidgen", "route_prefix": "/", "import_path": BUILD, "args": self.args, "deployments": [api]}
        self._client.deploy_apps(ServeDeploySchema.model_validate({"applications": [own, *others]}))

    def status(self, name="vidgen"):
        return serve.status().applications.get(name)

    def wait_until_running(self, api_replicas=2):
        while True:
            status = self.status()
            replicas = {} if status is None else {name: each.replica_states for name, each in status.deployments.items()}
            if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
                raise AssertionError(status)
            is_running = status is not None and status.status == ApplicationStatus.RUNNING
            if is_running and replicas["Api"] == {"RUNNING": api_replicas}:
                return
            time.sleep(POLL_S)

    def request(self, method, path, body=None, key="vg-ada-key"):
        """Return the status and the content of a response, `None` and the error if the connection was lost."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except OSError as error:
            return None, error
        finally:
            connection.close()
        with suppress(ValueError):
            return response.status, json.loads(content)
        return response.status, content

    def shutdown(self):
        serve.shutdown()


def pids_of(title):
    """Return the pids of Ray's processes with this start of their title."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{title}"):
                pids.append(process.pid)
    return pids
