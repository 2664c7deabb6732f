"""The client against a server on a port: all methods, errors, retries, resumed downloads."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from tests.conftest import ASTRONAUT, EXAMPLES, SYNTHETIC
from tests.online.directors import listening_on_a_port, local_server
from vidgen_client import (
    ApiError,
    AsyncClient,
    Client,
    ClientError,
    ConnectionFailed,
    JobCancelled,
    JobFailed,
    WaitTimeout,
)
from vidgen_client.image_inputs import file_of
from vidgen_ray.media.images import read_image
from vidgen_ray.online.auth import LOCAL_TENANT, KeyRecord, add_key, hash_key, new_key
from vidgen_ray.online.server_settings import OnlineSettings

DOCS = Path(__file__).parents[2] / "docs" / "client.md"
SMALL = {"size": "64x64", "num_frames": 2, "upscale": False}


@pytest.fixture
def client(url):
    with Client(url) as client:
        yield client


def stored_shot(server, video):
    return server.store.get(video.id, LOCAL_TENANT).shot


def scripted(*answers):
    """App that answers every request with the next answer, and with the last one from then on."""
    left = list(answers)

    async def answer(_):
        return left.pop(0) if len(left) > 1 else left[0]

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


def test_create_wait_and_download(client, server, tmp_path):
    states = []
    server.director.paused.set()

    def on_progress(state):
        states.append(state)
        if state.stage == "flux":
            server.director.paused.clear()
        # A callback may call the client.
        assert client.get_video(state).prompt == "a man"

    video = client.create_video("a man", seed=3, **SMALL)
    assert (video.status, video.seed, video.prompt) == ("queued", 3, "a man")
    done = client.wait_for_video(video, on_progress=on_progress)
    assert (done.status, done.progress, done.num_frames) == ("completed", 100, 2)
    assert states[-1] == done
    assert {state.stage for state in states} >= {"flux", None}
    path = client.download_video(done, tmp_path)
    assert path == tmp_path / f"{done.id}.mp4"
    assert path.read_bytes() == client.read_video(done)
    assert client.download_video(done.id, tmp_path / "first.png", variant="image").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, "first.png"])


def test_async_client_has_the_same_methods_and_the_other_works_in_a_running_event_loop(url, client, tmp_path):
    async def scenario():
        async with AsyncClient(url) as other:
            done = await other.wait_for_video(await other.create_video("a man", seed=10, **SMALL))
            states = [state.status async for state in other.follow_video(done)]
            assert client.get_video(done).id == done.id
            return done, states, await other.download_video(done, tmp_path)

    done, states, path = asyncio.run(scenario())
    assert (done.status, states) == ("completed", ["completed"])
    assert path.stat().st_size > 1000
    public = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert {name for name in vars(Client) if not name.startswith("_")} == public


@pytest.fixture
def interrupt():
    """Function that raises KeyboardInterrupt in the main thread, once, a moment after it is called."""
    raised = threading.Event()

    def raise_once(*_):
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def send_until_raised():
        # Python handles a signal that arrives just before a thread waits when the wait is over, or at the next signal.
        while not raised.wait(0.1):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, raise_once)
    sender = threading.Thread(target=send_until_raised)
    yield sender.start
    raised.set()
    sender.join()
    signal.signal(signal.SIGINT, before)


def test_interrupted_wait_leaves_the_client_usable(client, held, interrupt):
    video = client.create_video("a man", seed=13, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        client.wait_for_video(video, on_progress=lambda _: interrupt())
    for state in client.follow_video(video):
        assert state.status == "queued"
        break
    assert client.cancel_video(video).status == "cancelled"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_client_works_after_fork_and_does_not_keep_a_program_running(url, client):
    """A program ends although its client is open and follows a video. So does a child process that uses the client.

    They never share a connection, on which each would read answers to requests of the other.
    """
    program = f"""
import os
from vidgen_client import Client
connections = []
async def on_response(response):
    connections.append(response.extensions["network_stream"].get_extra_info("client_addr"))
client = Client({url!r}, event_hooks={{"response": [on_response]}})
client.list_models()
if not (child := os.fork()):
    print(len(client.list_models()), flush=True)
    os._exit(len({{*connections}}) != 2)
assert os.waitpid(child, 0)[1] == 0
states = client.follow_video(client.create_video("a man", **{SMALL}))
print(next(states).prompt)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert (run.stdout.splitlines(), run.stderr) == ([str(len(client.list_models())), "a man"], "")


def test_image_inputs(client, server, held):
    content = ASTRONAUT.read_bytes()
    upload = client.upload_image(ASTRONAUT)
    inputs = [ASTRONAUT, str(ASTRONAUT), content, upload, {"file_id": upload.id}]
    shots = [stored_shot(server, client.create_video("a man", input_reference=image, **SMALL)) for image in inputs]
    assert len({shot.image for shot in shots}) == 1
    pixels = Image.new("RGB", (64, 64), "red")
    shot = stored_shot(server, client.create_video("a man", face_image=[pixels, ASTRONAUT], consent=SYNTHETIC, **SMALL))
    assert (len(shot.face_image), shot.consent.model_dump(exclude_none=True)) == (2, SYNTHETIC)
    assert Image.open(shot.face_image[0]).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(TypeError, match="image: got int, must be a path"):
        client.create_video("a man", input_reference=7)
    with pytest.raises(FileNotFoundError):
        client.create_video("a man", input_reference="gone.png")


def test_pil_images_are_sent_as_their_files_are_read(tmp_path):
    path, sent = tmp_path / "photo", tmp_path / "sent"
    turned = Image.Exif()
    turned[274] = 6
    photo = Image.open(ASTRONAUT).convert("RGB")
    for image, kind in ((photo, "JPEG"), (photo, "PNG"), (photo.convert("CMYK"), "JPEG"), (photo.convert("LA"), "PNG")):
        image.resize((24, 16)).save(path, kind, exif=turned)
        sent.write_bytes(file_of(Image.open(path))[1])
        assert np.array_equal(read_image(sent), read_image(path))
    with pytest.raises(ClientError, match="image: not sent: cannot write mode F as PNG"):
        file_of(Image.new("F", (8, 8)))


PRIVATE = {
    "key.pem": b"-----BEGIN PRIVATE KEY-----",
    "notes.png": b"BM and other words",
    "large.png": b"\x89PNG\r\n\x1a\n" * 3_200_000,
}


@pytest.mark.parametrize("given", ["/dev/zero", "/proc/self/environ", "pipe", ".", "a\0", *PRIVATE])
def test_only_regular_files_of_images_are_sent(given, tmp_path):
    (tmp_path / given).write_bytes(PRIVATE[given]) if given in PRIVATE else None
    os.mkfifo(tmp_path / "pipe")
    with Client("http://127.0.0.1:9", retries=0) as offline:
        for send in (
            lambda path: offline.create_video("a man", face_image=[path]),
            lambda path: offline.create_character("Me", path),
            lambda path: offline.create_character("Me", video=path),
        ):
            with pytest.raises(ClientError, match=r": not sent, must be (a regular file|an image|a video|at most 25 MB)"):
                send(tmp_path / given)


def test_ids_cannot_leave_the_folder_of_downloads_or_change_the_url(tmp_path):
    video = {"id": "../.profile", "status": "completed", "created_at": 1}
    requests = []

    async def on_request(request):
        requests.append(request.url.path)

    with (
        listening_on_a_port(scripted(JSONResponse(video))) as url,
        Client(url, event_hooks={"request": [on_request]}) as client,
    ):
        for method in (client.get_video, client.cancel_video, client.delete_character):
            with pytest.raises(ClientError, match=r"id: got '\.\./x', must be 1 to 128 letters"):
                method("../x")
        assert requests == []
        with pytest.raises(ClientError, match=r"The answer is not a Video, id: "):
            client.get_video("video_1")


def test_wait_timeout_list_remix_cancel_delete(client, server, held):
    video = client.create_video("a man", seed=5, priority="high", **SMALL)
    assert video.priority == "high"
    with pytest.raises(WaitTimeout, match=r"is queued after 0\.1 s. Its job continues"):
        client.wait_for_video(video, timeout_s=0.1)
    remix = client.remix_video(video, prompt="a woman")
    assert (remix.seed, remix.prompt, remix.remixed_from_video_id) == (5, "a woman", video.id)
    page = client.list_videos(limit=1)
    assert ([each.id for each in page.data], page.has_more) == ([remix.id], True)
    assert client.list_videos(after=page.last_id, limit=1).data[0].id == video.id
    assert client.cancel_video(video).status == "cancelled"
    with pytest.raises(JobCancelled) as raised:
        client.wait_for_video(video)
    assert raised.value.video.id == video.id
    client.delete_video(video)
    with pytest.raises(ApiError) as gone:
        client.get_video(video)
    assert (gone.value.status, gone.value.code) == (404, "video_not_found")
    with pytest.raises(ApiError, match="video_not_found"):
        client.wait_for_video(video)


def test_images_and_characters(client):
    first, second = client.create_images("a lighthouse", n=2, size="64x64", output_format="webp")
    assert (first.format, first.size) == ("webp", "64x64")
    assert Image.open(io.BytesIO(first.content)).format == "WEBP"
    assert first.content != second.content
    assert client.get_video(first.id).num_frames == 1
    (edited,) = client.edit_images(first.content, "an oil painting", size="64x64")
    assert Image.open(io.BytesIO(edited.content)).size == (64, 64)
    character = client.create_character("Me", [ASTRONAUT])
    assert client.erase_character(character).photos == character.photos
    assert character.name not in [each.name for each in client.list_characters()]
    with pytest.raises(ApiError) as no_face:
        client.create_character("Black", Image.new("RGB", (64, 64)), consent=SYNTHETIC)
    assert (no_face.value.status, no_face.value.code) == (400, "no_face")
    with pytest.raises(ApiError, match="consent: got nothing, a face needs"):
        client.create_character("Black", Image.new("RGB", (64, 64)))


def test_failed_and_cancelled_jobs_and_invalid_fields_are_errors_with_a_code(client):
    with pytest.raises(JobFailed, match="the prompt asked for it") as raised:
        client.wait_for_video(client.create_video("fail", **SMALL))
    assert (raised.value.code, raised.value.video.error.stage) == ("stage_failed", "flux")
    assert not isinstance(raised.value, JobCancelled)
    with pytest.raises(ApiError, match=r"num_frames: got 1, .* \(HTTP 400, invalid_value\)") as raised:
        client.create_video("a man", num_frames=1)
    assert (raised.value.status, raised.value.code, raised.value.param) == (400, "invalid_value", "num_frames")
    video = {"id": "video_1", "status": "failed", "created_at": 1, "error": {"code": "cancelled", "message": "x"}, "new": 7}
    with listening_on_a_port(scripted(JSONResponse(video))) as url, Client(url) as client:
        answer = client.get_video("video_1")
        assert (answer.status, answer.new) == ("cancelled", 7)
        with pytest.raises(JobCancelled):
            client.wait_for_video("video_1")


def test_busy_server_is_asked_again(server):
    busy = JSONResponse({"error": {"message": "busy", "code": "queue_full"}}, 429, {"retry-after-ms": "20"})
    down = HTMLResponse("<h1>Bad gateway</h1>", 502, {"Retry-After": "0"})
    answers = [busy, down, JSONResponse({"data": [{"id": "tiny"}]})]
    with listening_on_a_port(scripted(*answers)) as url, Client(url) as client:
        assert client.list_models()[0].id == "tiny"
    final = JSONResponse({"error": {"message": "never", "code": "queue_full"}}, 429, {"x-should-retry": "false"})
    for answer, code in ((final, "queue_full"), (down, None)):
        with (
            listening_on_a_port(scripted(answer, JSONResponse({"data": []}))) as url,
            Client(url, retries=0 if answer is down else 5) as client,
            pytest.raises(ApiError) as raised,
        ):
            client.list_models()
        assert (raised.value.status, raised.value.code) == (answer.status_code, code)


def test_unreachable_and_other_servers_are_errors():
    with (
        listening_on_a_port(scripted(HTMLResponse("<h1>Hello</h1>"))) as url,
        Client(url) as client,
        pytest.raises(ClientError, match="The answer is not a Listing"),
    ):
        client.list_models()
    with pytest.raises(ClientError, match="must be the URL of a server"):
        Client("127.0.0.1:8000")
    with (
        Client("http://127.0.0.1:9/v1", retries=1) as client,
        pytest.raises(ConnectionFailed, match=r"http://127\.0\.0\.1:9/v1/models"),
    ):
        client.list_models()


# Through a TCP proxy that loses connections.


@contextmanager
def cutting_proxy(url: str, cuts: Sequence[int]) -> Iterator[str]:
    """Forward connections to `url` and yield the URL of the proxy.

    The n-th connection is reset after `cuts[n]` bytes of answers. 0 loses a whole answer, when the server has sent it. Further
    connections are not cut.
    """
    upstream = (urlsplit(url).hostname, urlsplit(url).port)
    remaining = list(cuts)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                server = socket.create_connection(upstream)
                limit = remaining.pop(0) if remaining else None
                threading.Thread(target=forward, args=(client, server, None), daemon=True).start()
                threading.Thread(target=forward, args=(server, client, limit), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            # Wakes up accept(), which close() does not.
            listener.shutdown(socket.SHUT_RDWR)


def forward(source: socket.socket, target: socket.socket, limit: int | None) -> None:
    """Copy bytes until either side closes its connection, or until `limit` bytes are copied."""
    with suppress(OSError):
        while data := source.recv(65536):
            if limit is not None and len(data) > limit:
                target.sendall(data[:limit])
                break
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def test_lost_answer_creates_one_video(url, client, held):
    before = client.list_videos(limit=100).data
    with cutting_proxy(url, [0]) as proxy, Client(proxy) as unlucky:
        video = unlucky.create_video("once", **SMALL)
    new = [each.id for each in client.list_videos(limit=100).data if each not in before]
    assert new == [video.id]


def test_wait_polls_when_events_fail(url, client, server, held):
    video = client.create_video("a man", seed=21, **SMALL)
    requests = []

    def on_progress(_):
        # The stream is cut with its first event.
        server.director.held.clear()
        server.director.wake()

    async def on_request(request):
        requests.append(request.url.path.removeprefix(f"/v1/videos/{video.id}"))

    hooks = {"request": [on_request]}
    with cutting_proxy(url, [600]) as proxy, Client(proxy, event_hooks=hooks) as unlucky:
        assert unlucky.wait_for_video(video, on_progress=on_progress).status == "completed"
    assert requests[0] == "/events"
    assert set(requests[1:]) == {""}


def test_download_continues_after_a_lost_connection_and_of_a_stopped_program(url, client, tmp_path):
    finished = client.wait_for_video(client.create_video("noise", size="256x256", num_frames=8, upscale=False, seed=1))
    content, answers = client.read_video(finished), []

    async def on_response(response):
        answers.append((response.status_code, response.headers.get("content-range")))

    hooks = {"response": [on_response]}
    with cutting_proxy(url, [len(content) // 2]) as proxy, Client(proxy, event_hooks=hooks) as unlucky:
        path = unlucky.download_video(finished, tmp_path / "clip.mp4")
    assert path.read_bytes() == content
    assert [status for status, _ in answers] == [200, 200, 206]
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    with (
        cutting_proxy(url, [len(content) // 2]) as proxy,
        Client(proxy, retries=0) as stopped,
        pytest.raises(ConnectionFailed),
    ):
        stopped.download_video(finished, path)
    (part,) = tmp_path.iterdir()
    assert content.startswith(part.read_bytes())
    written = part.stat().st_size
    answers.clear()
    with Client(url, event_hooks=hooks) as again:
        assert again.download_video(finished, path).read_bytes() == content
    assert answers == [(200, None), (206, f"bytes {written}-{len(content) - 1}/{len(content)}")]


def test_download_refuses_another_part_of_the_file(tmp_path):
    content = bytes(range(200))

    async def cut():
        yield content[:50]
        raise httpx2.ReadError("lost")

    def answer(body, status=200, **headers):
        return httpx2.Response(status, content=body, headers={"content-type": "video/mp4", "etag": '"a"', **headers})

    whole = {"content-length": "200"}
    answers = [
        answer(cut(), **whole),
        answer(content),
        answer(content[:150], 206, **{"content-range": "bytes 0-149/200"}),
        answer(content),
    ]
    with Client(transport=httpx2.MockTransport(lambda _: answers.pop(0))) as client:
        assert client.download_video("video_1", tmp_path / "clip.mp4").read_bytes() == content
    assert answers == []


def test_url_and_key_come_from_the_environment(tiny, tmp_path, monkeypatch):
    key = new_key()
    add_key(tmp_path / "keys.yaml", KeyRecord(tenant="ada", sha256=hash_key(key)))
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), keys_file=tmp_path / "keys.yaml")
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url:
        monkeypatch.setenv("VIDGEN_URL", f"{url}/v1/")
        monkeypatch.setenv("VIDGEN_API_KEY", key)
        with Client() as client:
            assert client.list_models()[0].id == "tiny"
        with Client(api_key="vg-wrong") as client, pytest.raises(ApiError) as raised:
            client.list_models()
    assert (raised.value.status, raised.value.code) == (401, "invalid_api_key")


def test_examples_of_the_documentation_run_in_order(server, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    examples = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert len(examples) >= 4
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example.replace("http://127.0.0.1:8000", url), str(DOCS), "exec"), names)
    assert Path("boat.mp4").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "completed 100" in printed
    assert "400 invalid_value num_frames" in printed
