"""The shipped nginx config: limits on headers, bodies, time and connections. Runs the real program."""

import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPSConnection, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vidgen_ray.online.server_settings import OnlineSettings

CONFIG = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
OPENSSL = shutil.which("openssl")
CONNECTIONS = 64
BODY_BYTES = 401_000_000

pytestmark = pytest.mark.skipif(
    not (NGINX and OPENSSL), reason="nginx or openssl is not installed (Debian: apt-get install nginx openssl)"
)


class Backend(BaseHTTPRequestHandler):
    """Answers GET with an event, and with a second one after `released` is set. Answers POST with the size of the body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(b"data: first\n\n")
        assert self.server.released.wait(60)
        self.chunk(b"data: second\n\n")
        self.chunk(b"")

    def do_POST(self):
        self.server.seen.append(dict(self.headers))
        size = len(self.rfile.read(int(self.headers["Content-Length"])))
        body = str(size).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Proxy:
    """Running nginx and its backend."""

    def __init__(self, port, backend):
        self.port, self.backend = port, backend
        self.tls = ssl._create_unverified_context()

    def connect(self):
        return HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)

    def tls_socket(self):
        return self.tls.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 60))

    def stream(self):
        """Return an event stream whose first event has arrived."""
        connection = self.connect()
        connection.request("GET", "/events")
        response = connection.getresponse()
        return connection, response


@pytest.fixture
def proxy(tmp_path, request):
    """Running nginx with the shipped config. Parameter: replacement for its timeouts of 10 s."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    backend = ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    backend.daemon_threads, backend.seen, backend.released = True, [], threading.Event()
    # Prints tracebacks of requests whose client has gone.
    backend.handle_error = lambda *_: None
    threading.Thread(target=backend.serve_forever, args=[0.01], daemon=True).start()
    key = ["-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt", "-subj", "/CN=vidgen"]
    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([OPENSSL, "req", "-x509", "-nodes", *ec, *key], check=True, capture_output=True)
    shipped = CONFIG.replace("/etc/vidgen", str(tmp_path)).replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    shipped = shipped.replace("vidgen.example.com", "127.0.0.1 x")
    shipped = shipped.replace("server 127.0.0.1:8000;", f"server 127.0.0.1:{backend.server_port};")
    shipped = shipped.replace("_timeout 10s;", f"_timeout {getattr(request, 'param', '10s')};")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {tmp_path}/pid; events {{ worker_connections 512; }}\n"
        f"http {{ access_log off;\n{folders}\n{shipped} }}"
    )
    command = [NGINX, "-p", tmp_path, "-e", tmp_path / "log", "-c", tmp_path / "nginx.conf"]
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 60).close()
                break
            except ConnectionRefusedError:
                continue
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield Proxy(port, backend)
    finally:
        backend.released.set()
        process.terminate()
        process.wait(30)
        backend.shutdown()
        backend.server_close()


@pytest.mark.parametrize("line", [b"X-%d: " + b"a" * 1000, b"X: " + b"a" * 20_000], ids=["many lines", "long line"])
def test_large_header_is_refused_before_its_end(proxy, line):
    with proxy.tls_socket() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for number in range(100):
            connection.sendall((line % number if b"%" in line else line) + b"\r\n")
        # The header has not ended.
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert proxy.backend.seen == []


def test_body_over_the_limit_is_refused(proxy):
    connection = proxy.connect()
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Length", str(BODY_BYTES + 1))
    connection.endheaders(b"x")
    assert connection.getresponse().status == 413
    assert proxy.backend.seen == []
    connection = proxy.connect()
    connection.request("POST", "/v1/files", b"x" * 3_000_000)
    assert connection.getresponse().read() == b"3000000"


def test_largest_body_is_that_of_the_settings():
    assert OnlineSettings().uploads.body_bytes == BODY_BYTES
    assert f"client_max_body_size {BODY_BYTES};" in CONFIG
    (wait_s,) = re.findall(r"proxy_read_timeout (\d+)s", CONFIG)
    assert int(wait_s) > OnlineSettings().wait_s


def test_events_are_not_buffered_and_headers_reach_the_server(proxy):
    _, response = proxy.stream()
    # The backend sends the second event after the client has received the first.
    assert response.read(len(b"data: first\n\n")) == b"data: first\n\n"
    proxy.backend.released.set()
    assert response.read() == b"data: second\n\n"
    (headers,) = proxy.backend.seen
    assert headers["Host"] == f"127.0.0.1:{proxy.port}"
    assert headers["X-Forwarded-Proto"] == "https"


def test_browsers_keep_to_https_and_requests_for_other_hosts_are_dropped(proxy):
    proxy.backend.released.set()
    _, response = proxy.stream()
    assert response.getheader("Strict-Transport-Security") == "max-age=31536000"
    seen = len(proxy.backend.seen)
    connection = proxy.connect()
    connection.request("GET", "/events", headers={"Host": "rebound.example"})
    with pytest.raises(RemoteDisconnected):
        connection.getresponse()
    assert len(proxy.backend.seen) == seen


def test_connections_of_one_address_are_limited(proxy):
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection, response = proxy.stream()
            stack.callback(connection.close)
            assert response.status == 200
        _, refused = proxy.stream()
        assert refused.status == 429


@contextmanager
def opened(proxy, first: bytes, tls: bool = True):
    with proxy.tls_socket() if tls else socket.create_connection(("127.0.0.1", proxy.port), 60) as connection:
        connection.sendall(first)
        yield connection


@pytest.mark.parametrize("proxy", ["3s"], indirect=True)
def test_slow_clients_are_disconnected(proxy):
    """Half-open connections, slow headers and slow bodies, none of which reaches the backend."""
    body = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    slow = [opened(proxy, b"", tls=False), opened(proxy, b"GET / HTTP/1.1\r\nHost"), opened(proxy, body)]

    def wait_for_end(connection) -> bytes:
        connection.settimeout(40)
        try:
            return connection.recv(1000)
        except ConnectionResetError:
            return b""

    with ExitStack() as stack:
        connections = [stack.enter_context(each) for each in slow]
        with ThreadPoolExecutor(len(connections)) as pool:
            assert all(answer == b"" or b" 408 " in answer for answer in pool.map(wait_for_end, connections))
    assert proxy.backend.seen == []
