"""What a server fetches and tells on behalf of others: nothing that is not public, however it is spelled."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.online.test_store import Clock, a_job
from vidgen_ray.online.inputs import http_fetch
from vidgen_ray.online.inputs.http_fetch import (
    BlockedUrl,
    ImageFetcher,
    PublicHttpClient,
    UnreachableUrl,
    check_address,
    parse_url,
)
from vidgen_ray.online.settings import OnlineSettings, Webhooks
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.webhooks import WebhookSender, backoff_s

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
        "::ffff:169.254.169.254",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "ff02::1",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address):
    with pytest.raises(BlockedUrl):
        check_address(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"])
def test_public_addresses_are_not(address):
    check_address(address)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/x",
        "gopher://example.com/",
        "data:image/png;base64,AAAA",
        "//example.com/x",
        "example.com/x",
        "http://",
        "http:///x",
        "http://user@example.com/",
        "http://user:secret@example.com/",
        "http://example.com:0/",
        "http://example.com:99999/",
        "http://example.com\\@127.0.0.1/",
        "http://exam ple.com/",
        "http://example.com/\r\nHost: x",
        "http://exämple.com/",
        "http://127.0.0.1\t/",
        "http://[::1/",
        "http://{host}/",
    ],
)
def test_a_url_that_two_programs_may_read_differently_is_refused(url):
    with pytest.raises(BlockedUrl):
        parse_url(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "0x7f000001",
        "017700000001",
        "127.1",
        "0",
        "[::1]",
        "[::ffff:7f00:1]",
        "[::ffff:127.0.0.1]",
        "localhost.",
        "LOCALHOST",
    ],
)
def test_no_spelling_of_this_machine_gets_through(host, monkeypatch):
    connected = []
    monkeypatch.setattr(http_fetch.httpcore.SyncBackend, "connect_tcp", lambda *args, **kwargs: connected.append(args))
    # Were every host allowed, the address would still be looked at.
    with pytest.raises((BlockedUrl, UnreachableUrl)):
        PublicHttpClient(2).request("GET", f"http://{host}/", cap_bytes=10)
    with pytest.raises((BlockedUrl, UnreachableUrl)):
        ImageFetcher(["example.com"], 2, 3, 10).fetch(f"http://{host}/")
    assert connected == []


def test_a_name_that_means_two_things_is_asked_once(monkeypatch):
    """Rebinding: public when it is checked, private when it is connected to."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    asked, connected = [], []

    def resolve(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[len(asked) - 1]]

    def connect(self, host, *args, **kwargs):
        connected.append(host)
        raise http_fetch.httpcore.ConnectError

    monkeypatch.setattr(http_fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(http_fetch.httpcore.SyncBackend, "connect_tcp", connect)
    with pytest.raises(UnreachableUrl):
        PublicHttpClient(2).request("GET", "http://rebind.example/", cap_bytes=10)
    assert (asked, connected) == (["rebind.example"], ["93.184.216.34"])


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    both = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(http_fetch.socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(BlockedUrl, match=r"10\.0\.0\.1"):
        PublicHttpClient(2).request("GET", "http://both.example/", cap_bytes=10)


def test_other_ports_are_refused():
    with pytest.raises(BlockedUrl, match="port 6379"):
        PublicHttpClient(2).request("GET", "http://example.com:6379/", cap_bytes=10)


class PageContext:
    """A web server on this machine that says what it is told to."""

    def __init__(self) -> None:
        self.answers = {}
        self.asked = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                site.asked.append((self.path, dict(self.headers), body))
                status, headers, content = site.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site():
    made = PageContext()
    yield made
    made.server.shutdown()
    made.server.server_close()


def pictures(hosts=("127.0.0.1",), cap=1000) -> ImageFetcher:
    return ImageFetcher(hosts, 5, 3, cap, allow_private=True)


def test_a_picture_is_fetched_from_where_it_moved_to(site):
    site.answers = {"/a": (302, {"Location": "/b"}, b""), "/b": (200, {}, b"content")}
    assert pictures().fetch(f"{site.url}/a") == b"content"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://169.254.169.254/", "http://elsewhere.example/", "//[::1]/x"])
def test_a_redirect_is_checked_like_a_beginning(site, target):
    site.answers = {"/a": (302, {"Location": target}, b"")}
    with pytest.raises(BlockedUrl):
        pictures().fetch(f"{site.url}/a")


def test_redirects_without_end_are_refused(site):
    site.answers = {"/a": (302, {"Location": "/a"}, b"")}
    with pytest.raises(BlockedUrl, match="more than 3"):
        pictures().fetch(f"{site.url}/a")
    assert len(site.asked) == 4


def test_too_much_is_refused_whatever_the_header_says(site):
    site.answers = {"/a": (200, {}, b"x" * 5000), "/b": (404, {}, b"x" * 5000)}
    with pytest.raises(BlockedUrl, match="larger than 1000 bytes"):
        pictures().fetch(f"{site.url}/a")
    with pytest.raises(UnreachableUrl, match="answered 404"):
        pictures().fetch(f"{site.url}/b")


def test_only_hosts_that_are_allowed_are_asked(site):
    with pytest.raises(BlockedUrl, match="not among those"):
        pictures(["*.example.com", "127.0.0.10"]).fetch(f"{site.url}/a")
    assert site.asked == []


def store_with(tmp_path, clock, webhooks) -> JobStore:
    return JobStore(f"sqlite:///{tmp_path}/jobs.db", targets=webhooks.names_for, now=clock)


def ended_job(store) -> str:
    job, _ = store.create(a_job())
    store.queue.claim("d", 30, 1)
    store.queue.completed(job.id, "d", shot_id="s", stage_seconds={})
    return job.id


def hooks(url: str, **more) -> Webhooks:
    return Webhooks(targets=[{"name": "a", "url": url, "secret": SECRET}], allow_private=True, timeout_s=5, **more)


def test_a_webhook_gets_a_message_that_openais_client_can_check(site, tmp_path):
    openai = pytest.importorskip("openai")
    webhooks = hooks(f"{site.url}/hook")
    store = store_with(tmp_path, Clock(), webhooks)
    job_id = ended_job(store)
    site.answers = {"/hook": (204, {}, b"")}
    assert WebhookSender(webhooks, store.outbox).deliver_due() == 1
    ((_, headers, body),) = site.asked
    client = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("video.completed", job_id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)
    assert WebhookSender(webhooks, store.outbox).deliver_due() == 0
    assert len(site.asked) == 1


def test_a_message_that_is_not_taken_is_tried_again_later_and_given_up_at_last(site, tmp_path):
    clock, webhooks = Clock(), hooks(f"{site.url}/hook", tries=3)
    store = store_with(tmp_path, clock, webhooks)
    ended_job(store)
    courier = WebhookSender(webhooks, store.outbox)
    site.answers = {"/hook": (500, {}, b"")}
    for tried in (1, 2, 3):
        assert courier.deliver_due() == 0
        assert len(site.asked) == tried
        courier.deliver_due()
        assert len(site.asked) == tried
        clock.seconds += 100
    courier.deliver_due()
    assert len(site.asked) == 3
    assert len({headers["webhook-id"] for _, headers, _ in site.asked}) == 1


def test_who_is_gone_is_not_told_again(site, tmp_path):
    clock, webhooks = Clock(), hooks(f"{site.url}/hook")
    store = store_with(tmp_path, clock, webhooks)
    ended_job(store)
    site.answers = {"/hook": (410, {}, b"")}
    WebhookSender(webhooks, store.outbox).deliver_due()
    clock.seconds += 10_000
    WebhookSender(webhooks, store.outbox).deliver_due()
    assert len(site.asked) == 1


def test_a_webhook_inside_is_not_told_unless_that_is_allowed(site, tmp_path):
    webhooks = hooks(f"{site.url}/hook").model_copy(update={"allow_private": False})
    store = store_with(tmp_path, Clock(), webhooks)
    ended_job(store)
    assert WebhookSender(webhooks, store.outbox).deliver_due() == 0
    assert site.asked == []


def test_who_does_not_answer_holds_up_his_own_messages_alone(site, tmp_path):
    webhooks = Webhooks(
        targets=[{"name": name, "url": f"{site.url}/{name}", "secret": SECRET} for name in ("dead", "alive")],
        allow_private=True,
        timeout_s=5,
    )
    store = store_with(tmp_path, Clock(), webhooks)
    for _ in range(3):
        ended_job(store)
    site.answers = {"/dead": (500, {}, b""), "/alive": (204, {}, b"")}
    assert WebhookSender(webhooks, store.outbox).deliver_due() == 3
    assert sorted(path for path, _, _ in site.asked) == ["/alive"] * 3 + ["/dead"]


def test_waits_grow_to_an_hour():
    assert 5 <= backoff_s(1) <= 10
    assert backoff_s(1) < backoff_s(4) < backoff_s(8)
    assert backoff_s(50) <= 3600


def test_a_tenants_webhook_hears_of_its_own_jobs():
    of_ada = {"name": "a", "url": "https://a.example", "secret": SECRET, "tenant": "ada"}
    settings = OnlineSettings(webhooks={"targets": [of_ada, {**of_ada, "name": "b", "tenant": None}]})
    assert settings.webhooks.names_for("ada") == ["a", "b"]
    assert settings.webhooks.names_for("bob") == ["b"]
    with pytest.raises(ValueError, match="name of its own"):
        OnlineSettings(webhooks={"targets": [of_ada, of_ada]})
    with pytest.raises(ValueError, match="whsec_"):
        OnlineSettings(webhooks={"targets": [{**of_ada, "secret": "whsec_"}]})
    assert SECRET not in json.dumps(settings.model_dump(mode="json"))
