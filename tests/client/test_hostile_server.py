"""Every method of the client and every tool of the MCP server against a server that answers what it should not."""

import asyncio
import json
from collections import defaultdict

import pytest
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.conftest import ASTRONAUT
from tests.online.directors import listening_on_a_port
from vidgen_client import AsyncClient, ClientError, async_client

KEY = "vg-secret"
PROMPT = {"prompt": "a man"}
LONG = "a" * 5000


def answer(name="video_1", **changes):
    """Return an object that every method accepts as its answer, whose ids are `name`."""
    flat = {
        "id": name,
        "custom_id": "0",
        "output_file_id": name,
        "status": "completed",
        "created_at": 1,
        "endpoint": "/v1/shots",
        "bytes": 1,
        "name": "Ada",
        "photos": [name],
        "characters": [name],
        "videos": [name],
        "videos_deleted": False,
        "render_s": 1,
        "gpu_seconds": 1,
        "queue_position": 0,
        "queue_wait_s": 0,
        "size": "64x64",
        "model_size": "64x64",
        "shot": {},
        "b64_json": "aGk=",
        "num_frames": 2,
        "seconds": 1,
        "seed": 1,
        **changes,
    }
    return {**flat, "response": {"body": flat}, "data": [flat], "last_id": name}


IDS = {
    "parent folder": "../evil",
    "absolute path": "/tmp/evil",
    "NUL": "video_1\0",
    "escape": "\x1b[2Jx",
    "hidden": "..",
    "": "",
    "line break": "video_1\n",
    "long": LONG,
    "number": 7,
    "object": {"id": "x"},
    "Windows": "..\\evil",
    "option": "-rf",
}
JSON = {"content-type": "application/json"}


async def open_stream():
    yield f"data: {json.dumps(answer())}\n\n".encode()
    while True:
        yield b": " + b"a" * 65536 + b"\n"
        await asyncio.sleep(0)


async def endless():
    while True:
        yield b'{"id": "' + b"a" * 65536
        await asyncio.sleep(0)


def responses(elsewhere):
    """Return name -> function that makes a response."""
    found = {
        f"id: {name}": lambda value=value: Response(json.dumps(answer(value)), headers=JSON) for name, value in IDS.items()
    }
    bodies = {
        "other id": json.dumps(answer("video_2")),
        "no fields": "{}",
        "list": "[]",
        "null": "null",
        "text": "hello",
        "nothing": "",
        "nested": "[" * 100_000,
        "surrogate": '{"id": "\\ud800"}',
        "NaN": json.dumps(answer(render_s=float("nan"))),
        "error is text": json.dumps(answer(status="failed", error="cancelled")),
        "no seconds": json.dumps(answer(seconds=None)),
        "no numbers": json.dumps(answer(created_at="x", num_frames="x", bytes="x", render_s="x", custom_id=7)),
    }
    found = {name: lambda body=body: Response(body, headers=JSON) for name, body in bodies.items()}
    page = {"content-type": "text/html"}
    found["page"] = lambda: Response("<h1>Sign in</h1>", headers=page)
    found["endless"] = lambda: StreamingResponse(endless(), headers=JSON)
    found["open stream"] = lambda: StreamingResponse(open_stream(), headers={"content-type": "text/event-stream"})
    found["endless error"] = lambda: StreamingResponse(endless(), 500, headers=JSON)
    found["broken gzip"] = lambda: Response("hello", headers={**JSON, "content-encoding": "gzip"})
    found["endless delay"] = lambda: Response("{}", 429, headers={"retry-after": "nan"})
    found["file name"] = lambda: Response(
        "x", headers={"content-type": "video/mp4", "content-disposition": 'filename="../evil"'}
    )
    for name, url in {"other host": f"{elsewhere}/x", "file": "file:///etc/passwd", "loop": "/v1/models"}.items():
        found[f"redirect: {name}"] = lambda url=url: Response(status_code=302, headers={"location": url})
    return found


ENDED = {"id": "batch_1", "endpoint": "/v1/shots", "status": "completed"}
METHODS = {
    "create_video": lambda client, _: client.create_video("a", face_image=str(ASTRONAUT)),
    "estimate_video": lambda client, _: client.estimate_video("a"),
    "estimate_shot": lambda client, _: client.estimate_shot(prompt="a"),
    "remix_video": lambda client, _: client.remix_video("video_1"),
    "get_video": lambda client, _: client.get_video("video_1"),
    "get_shot": lambda client, _: client.get_shot("video_1"),
    "list_videos": lambda client, _: client.list_videos(),
    "cancel_video": lambda client, _: client.cancel_video("video_1"),
    "delete_video": lambda client, _: client.delete_video("video_1"),
    "follow_video": lambda client, _: anext(client.follow_video("video_1")),
    "wait_for_video": lambda client, _: client.wait_for_video("video_1"),
    "read_video": lambda client, _: client.read_video("video_1"),
    "download_video": lambda client, folder: client.download_video("video_1", folder),
    "create_images": lambda client, _: client.create_images("a"),
    "edit_images": lambda client, _: client.edit_images(str(ASTRONAUT), "a"),
    "upload_image": lambda client, _: client.upload_image(ASTRONAUT),
    "create_character": lambda client, _: client.create_character("Ada", ASTRONAUT),
    "list_characters": lambda client, _: client.list_characters(),
    "delete_character": lambda client, _: client.delete_character("char_1"),
    "erase_character": lambda client, _: client.erase_character("char_1"),
    "upload_batch": lambda client, _: client.upload_batch(b"{}"),
    "create_batch": lambda client, _: client.create_batch("file-1"),
    "get_batch": lambda client, _: client.get_batch("batch_1"),
    "list_batches": lambda client, _: client.list_batches(),
    "cancel_batch": lambda client, _: client.cancel_batch("batch_1"),
    "wait_for_batch": lambda client, _: client.wait_for_batch("batch_1"),
    "batch_results": lambda client, _: client.batch_results(
        async_client.Batch(id="b", endpoint="", status="", output_file_id="f")
    ),
    "batch_lines": lambda client, _: client.batch_lines(async_client.Batch(id="b", endpoint="", status="", error_file_id="f")),
    "list_models": lambda client, _: client.list_models(),
}
WITHOUT_ID = {
    *("delete_video", "delete_character", "read_video", "download_video", "estimate_video", "estimate_shot", "erase_character"),
    *("list_models", "batch_results", "batch_lines"),
}
"""Methods whose answers have no id, or none that becomes part of a URL or of a file name."""
ABOUT_AN_ID = {name for name in METHODS if name.startswith(("get_", "cancel_", "follow_", "wait_"))}


def must_refuse(answered):
    """Return the methods that must not accept an answer."""
    if answered == "other id":
        return ABOUT_AN_ID
    return METHODS.keys() - WITHOUT_ID if answered.startswith("id: ") else ()


TOOLS = {
    "create_video": PROMPT,
    "plan": PROMPT,
    "create_image": PROMPT,
    "list_videos": {},
    "list_characters": {},
    "list_models": {},
    **{name: {"video_id": "video_1"} for name in ("wait", "status", "cancel", "download")},
    "create_batch": {"prompts": ["a"]},
    "batch_status": {"batch_id": "video_1"},
    "cancel_batch": {"batch_id": "video_1"},
    "create_character": {"name": "a", "photos": [str(ASTRONAUT)]},
    "delete_character": {"character_id": "char_1"},
}


@pytest.fixture
def hostile(monkeypatch):
    """URL of a hostile server, the function that sets its response, and the requests to another host."""
    for limit in ("MAX_ANSWER_BYTES", "MAX_FILE_BYTES", "MAX_DOWNLOAD_BYTES", "MAX_ERROR_BYTES"):
        monkeypatch.setattr(async_client, limit, 1 << 17)
    monkeypatch.setattr(async_client.random, "uniform", lambda *_: 0)
    current, received = [Response], []

    async def respond(_):
        return current[0]()

    async def other_host(request):
        received.append(request)
        return Response("{}")

    def app(endpoint):
        return Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST", "DELETE"])])

    with listening_on_a_port(app(respond)) as url, listening_on_a_port(app(other_host)) as elsewhere:
        yield url, responses(elsewhere), lambda response: current.__setitem__(0, response), received


def test_no_answer_of_a_server_escapes_from_a_method(hostile, tmp_path):
    """Every method returns or raises ClientError. Files are written into the folder only, with the id that was asked for."""
    url, answers, respond_with, received = hostile
    folder = tmp_path / "clips"
    folder.mkdir()
    assert METHODS.keys() == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"close"}
    escaped = defaultdict(list)

    async def scenario():
        async with AsyncClient(url, KEY, retries=1) as client:
            for answered, response in answers.items():
                respond_with(response)
                for name, call in METHODS.items():
                    try:
                        await asyncio.wait_for(call(client, folder), 20)
                        if name in must_refuse(answered):
                            escaped[answered].append(f"{name} accepts it")
                    except ClientError as error:
                        if len(str(error)) > 3000:
                            escaped[answered].append(f"{name}: a long message")
                    except (Exception, asyncio.CancelledError) as error:
                        escaped[answered].append(f"{name}: {type(error).__name__}")

    asyncio.run(scenario())
    assert dict(escaped) == {}
    assert received == []
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} <= {"clips", "clips/video_1.mp4"}


def test_no_answer_of_a_server_escapes_from_a_tool(hostile, tmp_path):
    """Every tool of the MCP server answers, and names what was wrong."""
    mcp = pytest.importorskip("mcp")
    from vidgen_client.mcp_server import make_server

    url, answers, respond_with, received = hostile
    folder, wrong = tmp_path / "clips", defaultdict(list)

    async def scenario():
        async with mcp.Client(make_server(AsyncClient(url, KEY, retries=0), folder)) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS.keys()
            for answered, response in answers.items():
                respond_with(response)
                for name, arguments in TOOLS.items():
                    result = await asyncio.wait_for(client.call_tool(name, arguments), 20)
                    text = "".join(getattr(block, "text", "") for block in result.content)
                    if (
                        text == f"Error executing tool {name}"
                        or "\x1b" in text
                        or "Error'" in text
                        or (result.is_error and not 0 < len(text) < 3000)
                    ):
                        wrong[answered].append(f"{name}: {text[:100]}")

    asyncio.run(scenario())
    assert dict(wrong) == {}
    assert received == []
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} <= {"clips", "clips/video_1.mp4"}
