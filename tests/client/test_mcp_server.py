"""`vidgen mcp` as an assistant uses it: the SDK's client, standard input and output, a real server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.conftest import ASTRONAUT
from vidgen_client import AsyncClient
from vidgen_ray.cli import main

SMALL = {"num_frames": 2, "upscale": False}


@pytest.fixture(scope="module")
def mcp():
    """The SDK, which takes a second to import."""
    import mcp

    return mcp


@pytest.fixture
def mcp_server(url, tmp_path):
    """MCP server in this process whose downloads go to tmp_path."""
    from vidgen_client.mcp_server import make_server

    return make_server(AsyncClient(url), tmp_path / "clips")


def text_of(result) -> str:
    return "\n".join(block.text for block in result.content if block.type == "text")


VIDGEN_MCP = ["-m", "vidgen_client"]
MCP_OF_VIDGEN = ["-c", "from vidgen_ray.cli import run_process; run_process()", "mcp"]


def started_by_an_assistant(mcp, start, url, folder):
    """Return the parameters of a server as in an assistant's configuration: a command, arguments, environment variables."""
    environment = {**os.environ, "VIDGEN_URL": url}
    return mcp.StdioServerParameters(command=sys.executable, args=[*start, "--folder", str(folder)], env=environment)


def test_assistant_creates_waits_and_downloads(mcp, server, url, tmp_path):
    command = started_by_an_assistant(mcp, MCP_OF_VIDGEN, url, tmp_path / "clips")
    progress = []

    async def on_progress(done, total, message):
        progress.append((done, total, message))
        if "flux" in message:
            server.director.paused.clear()

    async def scenario():
        async with mcp.Client(command) as client:
            tools = (await client.list_tools()).tools
            undescribed = [
                (tool.name, name)
                for tool in tools
                for name, schema in tool.input_schema["properties"].items()
                if not schema.get("description")
            ]
            assert undescribed == []
            assert [tool.name for tool in tools if not tool.description] == []

            arguments = {"prompt": "a man", "size": "64x64", "seed": 1, "fields": SMALL}
            plan = (await client.call_tool("plan", arguments)).structured_content
            assert plan["render_s"] > 0
            assert (plan["size"], plan["num_frames"], plan["is_rendered"]) == ("64x64", 2, False)
            assert (await client.call_tool("list_videos", {})).structured_content["result"] == []

            server.director.paused.set()
            created = await client.call_tool("create_video", arguments)
            video = created.structured_content
            assert (video["status"], video["seed"]) == ("queued", 1)
            waited = await client.call_tool("wait", {"video_id": video["id"]}, progress_callback=on_progress)
            assert text_of(waited).startswith(f"{video['id']}: completed, 64x64")
            (preview,) = [block for block in waited.content if block.type == "image"]
            assert preview.mime_type == "image/jpeg"

            saved = text_of(await client.call_tool("download", {"video_id": video["id"]}))
            assert saved == str(tmp_path / "clips" / f"{video['id']}.mp4")
            assert Path(saved).stat().st_size > 1000
            first = text_of(await client.call_tool("download", {"video_id": video["id"], "variant": "image"}))
            assert Path(first).read_bytes().startswith(b"\x89PNG")

            listed = await client.call_tool("list_videos", {})
            assert [each["id"] for each in listed.structured_content["result"]] == [video["id"]]
            assert (await client.call_tool("plan", arguments)).structured_content["is_rendered"]

    asyncio.run(scenario())
    assert (progress[-1][:2], {total for _, total, _ in progress}) == ((100, 100), {100})
    assert any("in_progress" in message and "flux" in message for _, _, message in progress)


def test_assistant_creates_an_image_of_a_character_and_cancels_a_video(mcp, server, mcp_server):
    async def scenario():
        async with mcp.Client(mcp_server) as client:
            made = await client.call_tool("create_character", {"name": "Eileen", "photos": [str(ASTRONAUT)]})
            character = made.structured_content
            assert [each["name"] for each in (await client.call_tool("list_characters")).structured_content["result"]] == [
                "Eileen"
            ]
            arguments = {"prompt": "a woman", "size": "64x64", "character": "Eileen", "input_reference": str(ASTRONAUT)}
            image = (await client.call_tool("create_image", arguments)).structured_content
            waited = await client.call_tool("wait", {"video_id": image["id"]})
            assert [block.mime_type for block in waited.content if block.type == "image"] == ["image/webp"]
            saved = text_of(await client.call_tool("download", {"video_id": image["id"]}))
            assert saved.endswith(f"{image['id']}.png")
            await client.call_tool("delete_character", {"character_id": character["id"]})
            assert (await client.call_tool("list_characters")).structured_content["result"] == []

            server.director.held.set()
            arguments = {"prompt": "a man", "priority": "low", "fields": SMALL}
            video = (await client.call_tool("create_video", arguments)).structured_content
            assert video["priority"] == "low"
            waited = await client.call_tool("wait", {"video_id": video["id"], "timeout_s": 0.2})
            assert "Not done after 0.2 s. Call wait again." in text_of(waited)
            cancelled = await client.call_tool("cancel", {"video_id": video["id"]})
            assert cancelled.structured_content["status"] == "cancelled"
            waited = await client.call_tool("wait", {"video_id": video["id"]})
            assert (waited.is_error, text_of(waited)) == (False, f"{video['id']}: cancelled")

    try:
        asyncio.run(scenario())
    finally:
        server.director.held.clear()


def test_errors_are_reported_to_the_assistant(mcp, server, mcp_server, tmp_path, capsys):
    from vidgen_client.mcp_server import make_server

    calls = [
        ("create_video", {"prompt": "a man", "fields": {"num_frames": 1}}, "num_frames: got 1"),
        (
            "create_video",
            {"prompt": "a man", "fields": {"image_reference": "/dev/zero"}},
            "/dev/zero: not sent, must be a regular file",
        ),
        ("status", {"video_id": "video_0"}, "video_not_found"),
        ("plan", {"prompt": "a man", "size": "large"}, "size"),
        ("create_video", {"prompt": "a man", "num_frames": 2}, "unknown argument num_frames"),
        ("create_video", {"prompt": "a man", "priority": "urgent"}, "'low', 'normal' or 'high'"),
    ]

    async def scenario():
        async with mcp.Client(mcp_server) as client:
            for name, arguments, message in calls:
                result = await client.call_tool(name, arguments)
                assert result.is_error
                assert message in text_of(result)
            failing = (await client.call_tool("create_video", {"prompt": "fail", "fields": SMALL})).structured_content
            result = await client.call_tool("wait", {"video_id": failing["id"]})
            assert result.is_error
            assert "the prompt asked for it" in text_of(result)
        async with mcp.Client(make_server(AsyncClient("http://127.0.0.1:9", retries=0), tmp_path)) as client:
            result = await client.call_tool("list_models")
            assert result.is_error
            assert "http://127.0.0.1:9/v1/models: " in text_of(result)

        async with mcp.Client(started_by_an_assistant(mcp, VIDGEN_MCP, "http://127.0.0.1:9", tmp_path)) as client:
            assert "download" in {tool.name for tool in (await client.list_tools()).tools}

    asyncio.run(scenario())
    assert main(["mcp", "--url", "localhost"]) == 2
    assert "must be the URL of a server" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["interrupted", "assistant ended"])
def test_server_on_stdio_ends_without_a_traceback(end):
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}}
    message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}).encode() + b"\n"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-m", "vidgen_client"], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(message)
        process.stdin.flush()
        assert process.stdout.readline()
        if end == "interrupted":
            # Standard input stays open, as that of a terminal.
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
            process.stdin.write(message)
            process.stdin.close()
        try:
            assert process.wait(60) == (130 if end == "interrupted" else 0)
            assert process.stderr.read() == b""
        finally:
            process.kill()


def test_streamable_http_on_loopback(mcp, url):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "vidgen_client", "--url", url, "--http", str(port)]
    with subprocess.Popen(arguments) as process:
        try:
            while True:
                assert process.poll() is None
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)

            async def scenario():
                async with mcp.Client(f"http://127.0.0.1:{port}/mcp") as client:
                    return (await client.call_tool("list_models")).structured_content

            models = [model["id"] for model in asyncio.run(scenario())["result"]]
            assert models == ["tiny", "tiny-fast", "tiny-wan", "tiny-ltx", "tiny-remote"]
            mcp_url = f"http://127.0.0.1:{port}/mcp"
            # As a web page would send them, also after DNS rebinding.
            for foreign in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                assert httpx2.post(mcp_url, json={}, headers=foreign).status_code in (403, 421)
            # The connection may end before the client has sent all and reads the answer.
            with suppress(httpx2.NetworkError):
                assert httpx2.get(mcp_url, headers={"a": "b" * 100_000}).status_code == 400
            with socket.create_connection(("127.0.0.1", port), timeout=60) as idle:
                assert idle.recv(1) == b""
        finally:
            process.terminate()


def test_assistant_renders_a_batch(mcp, server, mcp_server):
    async def scenario():
        async with mcp.Client(mcp_server) as client:
            fields = {"size": "64x64", **SMALL}
            batch = (await client.call_tool("create_batch", {"prompts": ["a", "b"], "fields": fields})).structured_content
            while True:
                status = (await client.call_tool("batch_status", {"batch_id": batch["id"]})).structured_content["result"]
                if status[0]["status"] == "completed":
                    break
                await asyncio.sleep(0.1)
            assert sorted(status[1]) == ["0", "1"]
            saved = text_of(await client.call_tool("download", {"video_id": status[1]["0"]}))
            assert Path(saved).stat().st_size
            cancelled = (await client.call_tool("cancel_batch", {"batch_id": batch["id"]})).structured_content
            assert cancelled["status"] == "completed"

    asyncio.run(scenario())
