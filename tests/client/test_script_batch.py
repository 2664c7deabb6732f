"""`vidgen render --to`: a script as batches of a server, in an output folder like that of a run here."""

import json

import httpx2
import pytest
import typer

from tests.conftest import ASTRONAUT
from tests.online.directors import listening_on_a_port, local_server
from vidgen_client import AsyncClient, Client, async_client
from vidgen_client.models import BatchLine
from vidgen_client.script_batch import STATE
from vidgen_ray.cli import main
from vidgen_ray.cli.app import app
from vidgen_ray.cli.render_on_server import WITHOUT_MEANING
from vidgen_ray.licences import UsedWeights
from vidgen_ray.online.server_settings import OnlineSettings

SMALL = {"num_frames": 2}
FACE = {"face_image": str(ASTRONAUT), "consent": {"subject": "Ada", "basis": "written"}}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(async_client, "POLL_S", 0.05)
    monkeypatch.setattr(async_client.random, "uniform", lambda *_: 0)


@pytest.fixture
def server(tiny, tmp_path):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "server"), gpu_hour_price=3600.0)
    with local_server(tiny, settings) as running:
        yield running


@pytest.fixture
def url(server):
    with listening_on_a_port(server.app) as url:
        yield url


class Folder:
    """Output folder of `vidgen render --to` and its script."""

    def __init__(self, tmp_path, url, capsys):
        self.script, self.out, self.url = tmp_path / "s.jsonl", tmp_path / "out", url
        self._capsys = capsys

    def write(self, *prompts, **fields):
        self.script.write_text("".join(json.dumps({"prompt": prompt, **SMALL, **fields}) + "\n" for prompt in prompts))

    def render(self, *options):
        """Return the exit code, the report or what was printed, and the messages."""
        code = main(["render", str(self.script), "--to", self.url, "--out", str(self.out), "--json", *options])
        printed = self._capsys.readouterr()
        return code, json.loads(printed.out) if printed.out.startswith("{") else printed.out, printed.err

    def counts(self, *options):
        code, report, _ = self.render(*options)
        return code, report["done"], report["skipped"], report["failed"]

    def records(self):
        return {path.parent.name: json.loads(path.read_text()) for path in self.out.glob("shots/*/*/shot.json")}


@pytest.fixture
def folder(tmp_path, url, capsys):
    return Folder(tmp_path, url, capsys)


def batches_of(server):
    return server.store.batches.list("local", None, 99)


@pytest.fixture
def interrupted(folder, server, monkeypatch):
    """A batch of `a` and `b` that is on the server, of a command that was stopped."""
    folder.write("a", "b")
    server.director.held.set()

    async def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AsyncClient, "wait_for_batch", interrupt)
        code, _, printed = folder.render()
    assert (code, "The batch continues on the server" in printed) == (130, True)
    assert (folder.out / STATE).exists()
    return batches_of(server)[0]


def release(server):
    server.director.held.clear()
    server.director.wake()


def test_folder_of_a_server_is_an_output_folder(folder, server, capsys):
    lines = [{"prompt": f"a boat {n}", "variants": 1 + n % 2, **SMALL} for n in range(3)]
    lines += [{"prompt": "a", **FACE, **SMALL}, {"prompt": "x", "fps": 0}, {"prompt": "fail", **SMALL}]
    folder.script.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert folder.counts("--prune") == (1, 5, 0, 2)
    assert {name for record in folder.records().values() for name in record["files"]} == {"image.png", "video.mp4", "hd.mp4"}
    rendered = len(server.director.rendered)
    code, report, printed = folder.render()
    assert (code, report["skipped"], report["failed"]) == (1, 5, 2)
    assert "sending 1 line to http" in printed, "a failed line is sent again"
    assert (len(batches_of(server)), len(server.director.rendered)) == (2, rendered)
    assert main(["verify", str(folder.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shots"] == 5
    assert main(["status", str(folder.out)]) == 0
    printed = capsys.readouterr().out
    assert "5 done, 2 failed" in printed
    assert "Render them again: the command of the run" in printed
    for command in (["retry", str(folder.out)], ["verify", str(folder.out), "--repair"]):
        assert main(command) == 4
        assert f"was rendered by {folder.url}. Run its command again" in capsys.readouterr().err
    clip = next(folder.out.glob("shots/*/*/hd.mp4"))
    clip.write_bytes(b"damaged")
    assert main(["verify", str(folder.out)]) == 1
    capsys.readouterr()
    assert folder.counts() == (1, 1, 4, 2)
    assert main(["verify", str(folder.out)]) == 0


def test_unchanged_script_resumes_its_batch(folder, server, interrupted):
    release(server)
    assert folder.counts() == (0, 2, 0, 0)
    assert [each.id for each in batches_of(server)] == [interrupted.id]
    assert not (folder.out / STATE).exists()
    assert folder.counts() == (0, 0, 2, 0)


def test_added_and_changed_lines_are_sent_in_the_same_call(folder, server, interrupted):
    release(server)
    folder.write("a", "b", "c")
    code, report, printed = folder.render()
    assert (code, report["done"]) == (0, 3)
    assert "sending 1 line to http" in printed
    assert server.store.batches.get(interrupted.id, "local").status == "completed"
    folder.write("a", "b", "changed")
    assert folder.counts("--prune") == (0, 1, 2, 0)
    assert sorted(name.partition("-")[0] for name in folder.records()) == ["a", "b", "changed"]


def test_batch_with_removed_lines_is_cancelled(folder, server, interrupted, monkeypatch):
    cancel = AsyncClient.cancel_batch

    async def cancel_and_release(client, batch):
        cancelled = await cancel(client, batch)
        release(server)
        return cancelled

    monkeypatch.setattr(AsyncClient, "cancel_batch", cancel_and_release)
    folder.write("a", "other")
    code, report, printed = folder.render()
    assert (code, report["done"], "is cancelled: the script has changed" in printed) == (0, 2, True)
    assert server.store.batches.get(interrupted.id, "local").status == "cancelled"
    assert sorted(name.partition("-")[0] for name in folder.records()) == ["a", "other"]


@pytest.mark.parametrize("stale", ["other server", "damaged", "input deleted", "batch unknown", "files deleted"])
def test_stale_state_heals_itself(folder, server, interrupted, stale):
    state = folder.out / STATE
    sent = json.loads(state.read_text())
    release(server)
    if stale == "damaged":
        state.write_text('{"url": ')
    elif stale == "other server":
        state.write_text(json.dumps({**sent, "url": "http://127.0.0.1:1"}))
    elif stale == "batch unknown":
        state.write_text(json.dumps({**sent, "key": "other", "file": "file-batch-" + "0" * 64}))
    else:
        with Client(folder.url) as client:
            ended = client.wait_for_batch(interrupted.id)
        file = interrupted.input_file_id if stale == "input deleted" else ended.output_file_id
        httpx2.delete(f"{folder.url}/v1/files/{file}").raise_for_status()
    code, report, printed = folder.render()
    assert (code, report["done"], report["failed"]) == (0, 2, 0)
    # The server keeps an ended batch without its input.
    assert ("sent again" in printed) == (stale != "input deleted")
    assert not state.exists()


def test_fresh_sends_all_lines_again(folder, server):
    folder.write("a", "b")
    assert folder.counts() == (0, 2, 0, 0)
    assert folder.counts("--fresh") == (0, 2, 0, 0)
    assert len(batches_of(server)) == 2


HONOURED = {
    *("scripts", "out", "profile", "seed", "until", "prune", "strict", "require", "to", "as_json", "mode", "aspect", "fields"),
    *("characters", "consent", "columns", "keep_columns", "name", "team", "price", "max_cost", "fresh", "replace", "help_all"),
}
"""Parameters of `vidgen render` that mean the same with `--to`."""
VALUES = {"--keep": "stages", "--gpus": "1x80GB", "--cache": "all", "--c2pa-key": "key.pem", "--record": "events.jsonl"}


def test_every_option_has_its_meaning_on_a_server_or_is_refused(folder, capsys):
    """A new option of `vidgen render` needs a decision: `HONOURED` here, or WITHOUT_MEANING."""
    command = typer.main.get_command(app).get_command(None, "render")
    assert {each.name for each in command.params} == HONOURED | WITHOUT_MEANING.keys()
    folder.write("a")
    for each in command.params:
        if each.name in WITHOUT_MEANING:
            option = max(each.opts, key=len)
            value = [] if each.is_flag else [VALUES.get(option, "1")]
            code, _, printed = folder.render(option, *value)
            assert (code, f"{option}: cannot be combined with --to" in printed) == (2, True), printed
    assert not folder.out.exists()


def test_limits_hold_on_a_server(folder, server, monkeypatch):
    folder.write("a", "b")
    monkeypatch.setattr(type(server.serving_profile), "gpu_seconds", lambda *_: 2.0)
    code, _, printed = folder.render("--max-cost", "3.9")
    assert (code, "2 lines would cost about 4.00 on the server. Nothing was sent" in printed) == (5, True)
    assert folder.render("--max-cost", "1", "--price", "3600")[0] == 5
    assert batches_of(server) == []
    assert folder.counts("--max-cost", "1", "--price", "1", "--strict") == (0, 2, 0, 0)
    folder.write("c")
    private = UsedWeights(weights="flux-dev", licence="FLUX.1", commercial_use="no")
    monkeypatch.setattr(type(server.serving_profile.licences), "__call__", lambda *_: (private,))
    code, _, printed = folder.render("--require-licence", "commercial")
    assert (code, "--require-licence commercial: not allowed with flux-dev" in printed) == (3, True), printed
    folder.script.write_text('{"prompt": "a", "fps": 0}\n')
    assert folder.render("--strict")[0] == 3
    assert len(batches_of(server)) == 1


def test_results_of_lines_that_were_not_sent_are_refused(folder, server, monkeypatch, tmp_path):
    folder.write("a")
    lines = AsyncClient.batch_lines
    for name in ("../evil", str(tmp_path / "evil"), "\x1b[2J", "b", "", "a" * 5000):

        async def renamed(client, batch, name=name):
            output, errors = await lines(client, batch)
            return [BatchLine.model_validate({**line.model_dump(), "custom_id": name}) for line in output], errors

        monkeypatch.setattr(AsyncClient, "batch_lines", renamed)
        code, _, printed = folder.render()
        assert (code, "which was not sent" in printed, "\x1b" in printed) == (4, True, False)
    assert {path.name for path in tmp_path.iterdir()} <= {"s.jsonl", "out", "server"}
    assert folder.records() == {}


def test_unusable_answers_about_one_line_fail_that_line(folder, server, monkeypatch):
    """Others are finished. The line is sent again by the next call."""
    download, get_shot = AsyncClient.download_video, AsyncClient.get_shot
    wrong, jobs = [None], []

    async def cut(client, video, path, **options):
        await download(client, video, path, **options)
        if video.id == jobs[0] and path.suffix in wrong[0]:
            size = path.stat().st_size
            path.write_bytes(path.read_bytes()[: size // 2 if len(wrong[0]) == 1 else 0])

    async def other(client, video):
        jobs.append(video.id)
        return await get_shot(client, video) | ({"width": -1} if wrong[0] == "width" and video.id == jobs[0] else {})

    monkeypatch.setattr(AsyncClient, "download_video", cut)
    monkeypatch.setattr(AsyncClient, "get_shot", other)
    folder.write("a", "b")
    for case, message in (
        ([".mp4"], "has sent an unusable video.mp4: "),
        ([".mp4", ".empty"], "has sent an unusable video.mp4: "),
        ([".png"], "has sent an unusable image.png: cannot be read as an image"),
        ("width", "unusable answer: width: Value error, must be a multiple of 16"),
    ):
        wrong[0] = case
        jobs.clear()
        code, report, printed = folder.render("--fresh")
        assert (code, report["done"], report["failed"]) == (1, 1, 1)
        assert message in printed
        assert "pydantic" not in printed
    wrong[0] = []
    assert folder.counts() == (0, 1, 1, 0)


def test_other_servers_and_missing_ones_are_errors(folder, tmp_path):
    folder.write("a")
    folder.url = "http://127.0.0.1:9"
    code, _, printed = folder.render()
    assert (code, "--to http://127.0.0.1:9: " in printed) == (4, True)


def test_client_follows_and_cancels_batches(server, url):
    server.director.held.set()
    body = {"prompt": "a boat", "num_frames": 2}
    content = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": body}).encode()
    with Client(url) as client:
        first, second = (client.create_batch(client.upload_batch(content)) for _ in range(2))
        assert {each.id for each in client.list_batches()} == {first.id, second.id}
        assert not client.cancel_batch(first).is_final
        server.director.held.clear()
        states = []
        assert client.wait_for_batch(second, on_progress=states.append).status == "completed"
        assert states[-1].request_counts.completed == 1
        output, errors = client.batch_results(states[-1])
        assert (output[0]["custom_id"], errors) == ("a", [])
        assert client.wait_for_batch(first).status == "cancelled"
        assert client.batch_results(client.get_batch(first))[1][0]["error"]["code"] == "batch_cancelled"
