"""The shipped nginx config: limits on headers, bodies, time and connections. Runs the real program."""

import asyncio
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack, suppress
from http.client import HTTPSConnection, RemoteDisconnected
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from tests.online.directors import listening_on_a_port
from vidgen_ray.online.server_settings import OnlineSettings

CONFIG = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
OPENSSL = shutil.which("openssl")
CONNECTIONS = 64
BODY_BYTES = 101_000_000

pytestmark = pytest.mark.skipif(
    not (NGINX and OPENSSL), reason="nginx or openssl is not installed (Debian: apt-get install nginx openssl)"
)


class Proxy:
    """Running nginx, and the server behind it.

    It answers GET with an event, and with a second one after `released` is set, and POST with the size of the body.
    """

    def __init__(self, port):
        self.port, self.seen, self.released = port, [], threading.Event()
        self.tls = ssl._create_unverified_context()
        routes = [Route("/events", self._events), Route("/v1/files", self._size, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def _events(self, request):
        async def events():
            yield b"data: first\n\n"
            while not self.released.is_set():
                await asyncio.sleep(0.01)  # polls: the tests run in another thread
            yield b"data: second\n\n"

        self.seen.append(request.headers)
        return StreamingResponse(events(), media_type="text/event-stream")

    async def _size(self, request):
        self.seen.append(request.headers)
        return PlainTextResponse(str(len(await request.body())))

    def connect(self):
        return HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)

    def tls_socket(self):
        return self.tls.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 60))

    def stream(self):
        """Return an event stream whose first event has arrived."""
        connection = self.connect()
        connection.request("GET", "/events")
        return connection, connection.getresponse()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    """Running nginx with the shipped config, except that its timeouts of 10 s are of 3 s."""
    tmp_path = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, backend_port = (free.getsockname()[1] for free in (one, other))
    proxy = Proxy(port)
    key = ["-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt", "-subj", "/CN=vidgen"]
    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([OPENSSL, "req", "-x509", "-nodes", *ec, *key], check=True, capture_output=True)
    shipped = CONFIG.replace("/etc/vidgen", str(tmp_path)).replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    shipped = shipped.replace("vidgen.example.com", "127.0.0.1 x")
    shipped = shipped.replace("server 127.0.0.1:8000;", f"server 127.0.0.1:{backend_port};")
    shipped = shipped.replace("_timeout 10s;", "_timeout 3s;")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {tmp_path}/pid; events {{ worker_connections 512; }}\n"
        f"http {{ access_log off;\n{folders}\n{shipped} }}"
    )
    command = [NGINX, "-p", tmp_path, "-e", tmp_path / "log", "-c", tmp_path / "nginx.conf"]
    with listening_on_a_port(proxy.app, backend_port), subprocess.Popen(command) as process:
        while process.poll() is None:
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 60).close()
                break
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield proxy
        process.terminate()


@pytest.fixture
def proxy(nginx):
    nginx.seen.clear()
    nginx.released.clear()
    yield nginx
    nginx.released.set()


def test_large_headers_and_bodies_and_other_hosts_are_refused(proxy):
    for line in (b"X-%d: " + b"a" * 1000, b"X: " + b"a" * 20_000):
        with proxy.tls_socket() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            for number in range(100):
                connection.sendall((line % number if b"%" in line else line) + b"\r\n")
            # The header has not ended.
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    connection = proxy.connect()
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Length", str(BODY_BYTES + 1))
    connection.endheaders(b"x")
    assert connection.getresponse().status == 413
    connection = proxy.connect()
    connection.request("GET", "/events", headers={"Host": "rebound.example"})
    with pytest.raises(RemoteDisconnected):
        connection.getresponse()
    assert proxy.seen == []
    connection = proxy.connect()
    connection.request("POST", "/v1/files", b"x" * 3_000_000)
    assert connection.getresponse().read() == b"3000000"
    assert OnlineSettings().uploads.body_bytes == BODY_BYTES
    assert f"client_max_body_size {BODY_BYTES};" in CONFIG
    (wait_s,) = re.findall(r"proxy_read_timeout (\d+)s", CONFIG)
    assert int(wait_s) > OnlineSettings().wait_s


def test_events_are_not_buffered_and_headers_reach_server_and_browser(proxy):
    _, response = proxy.stream()
    # The backend sends the second event after the client has received the first.
    assert response.read(len(b"data: first\n\n")) == b"data: first\n\n"
    proxy.released.set()
    assert response.read() == b"data: second\n\n"
    (headers,) = proxy.seen
    assert (headers["host"], headers["x-forwarded-proto"]) == (f"127.0.0.1:{proxy.port}", "https")
    assert response.getheader("Strict-Transport-Security") == "max-age=31536000"


def test_connections_of_one_address_are_limited(proxy):
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection, response = proxy.stream()
            stack.callback(connection.close)
            assert response.status == 200
        _, refused = proxy.stream()
        assert refused.status == 429


def test_slow_clients_are_disconnected(proxy):
    """Half-open connections, slow headers and slow bodies, none of which reaches the backend."""
    body = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with ExitStack() as stack:
        half_open = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 60))
        connections = [half_open, *(stack.enter_context(proxy.tls_socket()) for _ in range(2))]
        for connection, sent in zip(connections[1:], (b"GET / HTTP/1.1\r\nHost", body), strict=True):
            connection.sendall(sent)
        for connection in connections:
            connection.settimeout(40)
            with suppress(ConnectionResetError):
                answer = connection.recv(1000)
                assert answer == b"" or b" 408 " in answer
    assert proxy.seen == []
