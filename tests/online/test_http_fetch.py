"""SSRF protection of the HTTP client, image URLs and webhooks."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.online.directors import SMALL, client_of, listening_on_a_port, local_server, settings_with_keys
from tests.online.test_api_videos import ended, error_of
from tests.online.test_store import Clock, new_job
from vidgen_ray.online import http_fetch
from vidgen_ray.online import webhooks as webhooks_module
from vidgen_ray.online.http_fetch import BlockedUrl, ImageFetcher, PublicHttpClient, UnreachableUrl, check_address, parse_url
from vidgen_ray.online.server_settings import OnlineSettings, Webhooks
from vidgen_ray.online.store.jobs import JobState, new_id
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.webhooks import WebhookSender

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


PRIVATE = """
    127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 100.100.100.200 169.254.169.254 168.63.129.16
    192.0.0.192 198.18.0.1 224.0.0.1 255.255.255.255 240.0.0.1 :: ::1 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:169.254.169.254
    fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1::
    2001:0:4136:e378:8000:63bf:3fff:fdd2 ff02::1 2001:db8::1
"""
PUBLIC = "93.184.216.34 8.8.8.8 2606:2800:220:1:248:1893:25c8:1946 ::ffff:8.8.8.8"
LOCALHOST = """
    127.0.0.1 localhost 2130706433 0x7f.1 0x7f000001 017700000001 127.1 0 [::1] [::ffff:7f00:1] [::ffff:127.0.0.1] localhost.
    LOCALHOST
"""


def test_private_addresses_are_blocked():
    for address in PRIVATE.split():
        with pytest.raises(BlockedUrl):
            check_address(address)
    for address in PUBLIC.split():
        check_address(address)


def test_ambiguous_url_is_blocked():
    for url in (
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "//example.com/x",
        "example.com/x",
        "http://",
        "http:///x",
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
    ):
        with pytest.raises(BlockedUrl):
            parse_url(url)


def test_every_spelling_of_localhost_is_blocked(monkeypatch):
    connected = []
    monkeypatch.setattr(http_fetch.httpcore.SyncBackend, "connect_tcp", lambda *args, **kwargs: connected.append(args))
    for host in LOCALHOST.split():
        # The address is checked even without a list of allowed hosts.
        with pytest.raises((BlockedUrl, UnreachableUrl)):
            PublicHttpClient(2).request("GET", f"http://{host}/", max_bytes=10)
        with pytest.raises((BlockedUrl, UnreachableUrl)):
            ImageFetcher(["example.com"], 10).fetch(f"http://{host}/")
    assert connected == []


def test_dns_rebinding_private_addresses_and_other_ports_are_blocked(monkeypatch):
    """The host resolves to a public address for the check and to a private one afterwards."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    resolved, connected = [], []

    def resolve(host, port, **_):
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[len(resolved) - 1]]

    def connect(self, host, *args, **kwargs):
        connected.append(host)
        raise http_fetch.httpcore.ConnectError

    monkeypatch.setattr(http_fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(http_fetch.httpcore.SyncBackend, "connect_tcp", connect)
    with pytest.raises(UnreachableUrl):
        PublicHttpClient(2).request("GET", "http://rebind.example/", max_bytes=10)
    assert (resolved, connected) == (["rebind.example"], ["93.184.216.34"])
    both = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(http_fetch.socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(BlockedUrl, match=r"10\.0\.0\.1"):
        PublicHttpClient(2).request("GET", "http://both.example/", max_bytes=10)
    with pytest.raises(BlockedUrl, match="port 6379"):
        PublicHttpClient(2).request("GET", "http://example.com:6379/", max_bytes=10)


@pytest.fixture
def site():
    """Web server on localhost. `responses`: path -> status, headers, body. `requests`: path, headers and body of each."""
    site = SimpleNamespace(responses={}, requests=[])

    async def answer(request):
        site.requests.append((request.url.path, dict(request.headers), await request.body()))
        status, headers, content = site.responses.get(request.url.path, (404, {}, b""))
        return StreamingResponse(iter([content]), status, headers)  # without Content-Length

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    with listening_on_a_port(app) as site.url:
        yield site


def image_fetcher(hosts=("127.0.0.1",)) -> ImageFetcher:
    return ImageFetcher(hosts, 1000, allow_private=True)


def test_redirects_are_followed_and_checked(site):
    site.responses = {"/b": (200, {}, b"content")}
    site.responses |= {path: (302, {"Location": to}, b"") for path, to in (("/a", "/b"), ("/loop", "/loop"))}
    assert image_fetcher().fetch(f"{site.url}/a") == b"content"
    for target in ("file:///etc/passwd", "http://169.254.169.254/", "http://elsewhere.example/", "//[::1]/x"):
        site.responses["/a"] = (302, {"Location": target}, b"")
        with pytest.raises(BlockedUrl):
            image_fetcher().fetch(f"{site.url}/a")
    site.requests.clear()
    with pytest.raises(BlockedUrl, match="more than 3"):
        image_fetcher().fetch(f"{site.url}/loop")
    assert len(site.requests) == 4
    with pytest.raises(BlockedUrl, match=r"not in url_inputs\.allow_hosts"):
        image_fetcher(["*.example.com", "127.0.0.10"]).fetch(f"{site.url}/a")
    assert len(site.requests) == 4


def test_response_size_is_limited_without_content_length(site):
    site.responses = {"/a": (200, {}, b"x" * 5000), "/b": (404, {}, b"x" * 5000)}
    with pytest.raises(BlockedUrl, match="larger than 1000 bytes"):
        image_fetcher().fetch(f"{site.url}/a")
    with pytest.raises(UnreachableUrl, match="status 404"):
        image_fetcher().fetch(f"{site.url}/b")


def store_with(tmp_path, clock, webhooks) -> JobStore:
    times = {"now": clock, "steady": clock}
    return JobStore(f"sqlite:///{tmp_path}/jobs.db", targets=webhooks.names_for, gpu_hour_price=1800, **times)


def finish_job(store) -> str:
    job, _ = store.create(new_job())
    store.queue.claim("d", 30, 1)
    store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={}, gpu_seconds=3.0)
    return job.id


def webhooks_to(url: str) -> Webhooks:
    return Webhooks(targets=[{"name": "a", "url": url, "secret": SECRET}], allow_private=True)


def test_openai_client_verifies_a_webhook_message(site, tmp_path):
    openai = pytest.importorskip("openai")
    webhooks = webhooks_to(f"{site.url}/hook")
    store = store_with(tmp_path, Clock(), webhooks)
    job_id = finish_job(store)
    site.responses = {"/hook": (204, {}, b"")}
    assert WebhookSender(webhooks, store).deliver_due() == 1
    ((_, headers, body),) = site.requests
    client = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("video.completed", job_id)
    assert event.data.usage == {"gpu_seconds": 3.0, "cost": 1.5}
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)
    assert WebhookSender(webhooks, store).deliver_due() == 0
    assert len(site.requests) == 1


def test_failed_webhook_is_retried_until_tries_are_used_up_or_its_receiver_is_gone(site, tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks_module, "MAX_TRIES", 3)
    clock, webhooks = Clock(), webhooks_to(f"{site.url}/hook")
    store = store_with(tmp_path, clock, webhooks)
    finish_job(store)
    sender = WebhookSender(webhooks, store)
    site.responses = {"/hook": (500, {}, b"")}
    for attempts in (1, 2, 3):
        assert sender.deliver_due() == 0
        assert len(site.requests) == attempts
        sender.deliver_due()
        assert len(site.requests) == attempts
        clock.seconds += 100
    sender.deliver_due()
    assert len(site.requests) == 3
    assert len({headers["webhook-id"] for _, headers, _ in site.requests}) == 1
    # Status 410 ends the tries at once.
    site.responses = {"/hook": (410, {}, b"")}
    finish_job(store)
    for _ in range(2):
        sender.deliver_due()
        assert len(site.requests) == 4
        clock.seconds += 10_000
    finish_job(store)
    assert WebhookSender(webhooks.model_copy(update={"allow_private": False}), store).deliver_due() == 0
    assert len(site.requests) == 4, "an address that is not public"


def test_failing_webhook_does_not_delay_others(site, tmp_path):
    targets = [{"name": name, "url": f"{site.url}/{name}", "secret": SECRET} for name in ("down", "up")]
    webhooks = Webhooks(targets=targets, allow_private=True)
    store = store_with(tmp_path, Clock(), webhooks)
    for _ in range(3):
        finish_job(store)
    site.responses = {"/down": (500, {}, b""), "/up": (204, {}, b"")}
    assert WebhookSender(webhooks, store).deliver_due() == 3
    assert sorted(path for path, _, _ in site.requests) == ["/down"] + ["/up"] * 3


def test_slow_receivers_of_a_tenant_delay_neither_other_tenants_nor_targets(site, tmp_path, monkeypatch):
    webhooks = webhooks_to(f"{site.url}/hook").model_copy(update={"allow_hosts": ("127.0.0.1",)})
    store, reached, released = store_with(tmp_path, Clock(), webhooks), Event(), Event()
    for tenant in ("ada", "ada", "bob"):
        store.create(new_job(tenant, state=JobState.COMPLETED, request={"webhook": f"{site.url}/{new_id(tenant)}"}))
    sender = WebhookSender(webhooks, store)
    posted, post = [], sender._post

    def slow_for_ada(target, message):
        posted.append((target.name, message.tenant))
        if posted[-1] == ("request", "ada") and not reached.is_set():
            reached.set()
            assert released.wait(60)
        return post(target, message)

    monkeypatch.setattr(sender, "_post", slow_for_ada)
    site.responses = {"/hook": (204, {}, b"")}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(sender.deliver_due, None, ["a"])
        try:
            assert reached.wait(60)
            assert sender.deliver_due("a") == 3
            assert sender.deliver_due(None, ["a"]) == 0, "the receivers do not exist"
            assert posted[1:] == [("a", "ada"), ("a", "ada"), ("a", "bob"), ("request", "bob")]
        finally:
            released.set()
        assert slow.result() == 0
    assert posted[5:] == [("request", "ada")]


def test_webhook_of_a_request_gets_signed_messages_if_its_host_is_allowed(site, tiny, tmp_path):
    openai = pytest.importorskip("openai")
    webhooks = {"allow_hosts": ["127.0.0.1", "*.example.com"], "allow_private": True}
    settings = settings_with_keys(tmp_path, {"ada": {}, "bob": {}}, webhooks=webhooks)
    site.responses = {"/hook": (204, {}, b"")}
    with local_server(tiny, settings) as server:
        ada, bob = (client_of(server, name) for name in ("ada", "bob"))
        sender = WebhookSender(settings.webhooks, server.store)
        shot = {"width": 64, "height": 64, "num_frames": 2}
        for path, fields in (("videos", SMALL), ("images/generations", {"size": "64x64"}), ("shots", shot)):
            created = ada.post(f"/v1/{path}", json={**fields, "prompt": path, "webhook": f"{site.url}/hook"})
            assert created.status_code == 200, created.text
            job_id = created.json().get("id") or created.json()["data"][0]["id"]
            ended(ada, job_id)
            assert sender.deliver_due() == 1
            _, headers, content = site.requests[-1]
            keys = [each.get("/v1/webhooks/default/secret").json()["key"] for each in (ada, bob)]
            event = openai.OpenAI(api_key="x", webhook_secret=keys[0]).webhooks.unwrap(content, headers)
            assert (event.data.id, event.type.partition(".")[2]) == (job_id, "completed")
            with pytest.raises(openai.InvalidWebhookSignatureError):
                openai.OpenAI(api_key="x", webhook_secret=keys[1]).webhooks.unwrap(content, headers)
        for url in (
            "https://example.com/",
            "https://a.example.org/",
            "ftp://a.example.com/",
            "https://u:p@a.example.com/",
            "x",
        ):
            error = error_of(ada.post("/v1/videos", json={**SMALL, "webhook": url}), 400)
            assert (error["param"], error["code"]) == ("webhook", "webhook_not_allowed"), url
        # The host is no longer allowed when the job ends.
        ended(ada, ada.post("/v1/videos", json={**SMALL, "webhook": f"{site.url}/hook"}).json()["id"])
        others = settings.webhooks.model_copy(update={"allow_hosts": ("a.example.com",)})
        for sent in (others, settings.webhooks):
            assert WebhookSender(sent, server.store).deliver_due() == 0
        # Private addresses need the name of the host itself.
        wildcard = settings.webhooks.model_copy(update={"allow_hosts": ("*.0.0.1",)})
        ended(ada, ada.post("/v1/videos", json={**SMALL, "webhook": f"{site.url}/hook"}).json()["id"])
        assert WebhookSender(wildcard, server.store).deliver_due() == 0
    assert len(site.requests) == 3


def test_webhook_with_a_tenant_receives_only_its_jobs():
    webhook = {"name": "a", "url": "https://a.example", "secret": SECRET, "tenant": "ada"}
    settings = OnlineSettings(webhooks={"targets": [webhook, {**webhook, "name": "b", "tenant": None}]})
    assert settings.webhooks.names_for("ada", "video.failed", False) == ["a", "b"]
    assert settings.webhooks.names_for("bob", "video.failed", False) == ["b"]
    with pytest.raises(ValueError, match="names must be unique"):
        OnlineSettings(webhooks={"targets": [webhook, webhook]})
    with pytest.raises(ValueError, match="whsec_"):
        OnlineSettings(webhooks={"targets": [{**webhook, "secret": "whsec_"}]})
    assert SECRET not in json.dumps(settings.model_dump(mode="json"))
