"""Captions of the clips of an output folder, and whether a clip shows its prompt. Read `caption_folder` first.

They are scores: files in `scores/`, by the digest of the clip. A clip without an answer has a row with the reason, and is asked
for again by the next call.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
import unicodedata
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow
from PIL import Image as PILImage
from pydantic import BaseModel, ValidationError

from vidgen_ray.cli.commands import note
from vidgen_ray.dataset import demo_captioner
from vidgen_ray.dataset.score_folder import (
    ClipScores,
    FolderReport,
    ScoreWriter,
    finished_clips,
    local_clip,
    part_tables,
    shown_progress,
)
from vidgen_ray.dataset.scorers import WEIGHTS, Column, ScoreTable, reduced
from vidgen_ray.dataset.tables import CAPTION, DIGEST
from vidgen_ray.errors import Cancelled, OtherWeights, SetupError, TooExpensive, shortened_value
from vidgen_ray.media.decode import open_foreign_video
from vidgen_ray.media.images import read_image
from vidgen_ray.media.media_file import CLIP_SUFFIXES
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.remote.stages import RemoteImageStage, RemoteParams
from vidgen_ray.remote.video_server import ServerFailed, VideoServers, WrongAnswer, auth_headers
from vidgen_ray.stages.base import Frames, Image
from vidgen_ray.system.quantities import amount_text, count

_VERSION = 1
"""Raise it when INSTRUCTIONS or the demo captioner change."""
_TEXT = pyarrow.string()
COLUMNS: Mapping[str, Column] = {
    "caption": Column(_TEXT, "What the clip shows, in the words of `caption_model`."),
    "caption_model": Column(_TEXT, "Model that has answered for the clip."),
    "agrees": Column(pyarrow.float64(), "Share of the facts of the prompt that the clip shows, 0 to 1; null without facts."),
    "missing": Column(_TEXT, "Facts of the prompt that it does not show, unclear ones with `?`; null without any."),
    "caption_error": Column(_TEXT, "Why there is no caption, such as a refusal."),
}
SIDE_PX, QUALITY = 768, 90
"""Longer side of frames that are sent, and their JPEG quality."""
TEMPLATE = "Describe in one or two plain sentences who or what is seen: appearance, clothes, action, place, light and style."
INSTRUCTIONS = """The images are {frames} frames of one clip, in order. {template} This is `caption`, from the images alone.

The clip was made for this prompt: {prompt}

Divide the prompt into the facts that images can show, each in a few words: subjects, attributes, colours, actions, place, time,
style. Say for each one whether the images show it: "yes", "no" or "unclear". Judge by the images, not by the prompt.

Answer only with JSON: {{"caption": "...", "facts": [{{"fact": "...", "shown": "yes"}}]}}"""
TRIES = 3
"""Most requests until an answer is usable, and most servers that are asked for a clip."""
MAX_ANSWER = 20_000
"""Most characters of an answer."""
MAX_FAILED = 20
"""Clips in a row without a caption after which a call stops."""


class NoCaption(Exception):
    """A model has answered, but not with a caption."""


class Fact(BaseModel):
    fact: str
    shown: demo_captioner.Shown


class Answer(BaseModel):
    """Answer of a model for a clip."""

    caption: str
    facts: list[Fact]

    @classmethod
    def parse(cls, content: str) -> Answer:
        """Return the answer in the text of a model, which may have words around its JSON. Raises ValueError."""
        text = content.rpartition("</think>")[2]
        try:
            answer = cls.model_validate_json(text[max(0, text.find("{")) : text.rfind("}") + 1])
        except ValidationError as error:
            raise ValueError(error.errors(include_url=False, include_input=False)[0]["msg"]) from None
        if not one_line(answer.caption) or len(content) > MAX_ANSWER:
            raise ValueError(f"the caption must not be empty, and the answer have at most {MAX_ANSWER:,} characters")
        return answer

    def scores(self) -> dict[str, Any]:
        shown = [fact.shown == "yes" for fact in self.facts]
        missing = [one_line(fact.fact) + "?" * (fact.shown == "unclear") for fact in self.facts if fact.shown != "yes"]
        agrees = round(sum(shown) / len(shown), 4) if shown else None
        return {"caption": one_line(self.caption), "agrees": agrees, "missing": "; ".join(missing) or None}


def one_line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return "".join(sign for sign in " ".join(text.split()) if unicodedata.category(sign) not in ("Cc", "Cs"))


class DemoCaptioner:
    """The classifier of the world of the demo models."""

    model, template = "demo captioner", ""
    threads, requests, is_stopped = 1, 0, False

    def __init__(self) -> None:
        self._network = demo_captioner.load()

    def cost(self, requests: int) -> float | None:
        """Return the price of this many requests. `None` without one."""
        return None

    def check_cost(self, requests: int) -> None:
        """Raise TooExpensive if this many requests cost more than allowed."""

    def answer(self, key: str, frames: Frames, prompt: str) -> Answer:
        """Raises NoCaption, StageError or ServerFailed about this clip, and other errors that end the call."""
        seen = demo_captioner.read(self._network, frames)
        facts = [Fact(fact=each.words, shown=each.shown) for each in demo_captioner.facts(prompt, seen)]
        return Answer(caption=demo_captioner.caption_text(seen), facts=facts)


class ServerCaptioner(DemoCaptioner):
    """A vision model of servers with OpenAI's chat completions. Thread-safe."""

    def __init__(self, params: RemoteParams, template: str, max_cost: float | None) -> None:
        """Leaves out servers that cannot be used. Raises SetupError if none can."""
        self.model, self.template = params.model, template
        self._params, self._max_cost, self._lock = params, max_cost, threading.Lock()
        self._slots = SimpleQueue[VideoServers]()
        """A client for each request that a server may have at once."""
        servers, problems = list[VideoServers](), list[str]()
        for number, url in enumerate(params.servers):
            try:
                reported = str(params.model_copy(update={"servers": (url,)}).pins()["reported"])
                own_first = (url, *params.servers[:number], *params.servers[number + 1 :])
                settings = params.model, reported, own_first, auth_headers(params.key_env), params.timeout_s
                servers.append(VideoServers(*settings, self._check_stopped))
            except SetupError as error:
                problems.append(str(error))
        if not servers:
            raise SetupError("; ".join(problems))
        for problem in problems:
            note(f"not used: {problem}")
        self.threads = len(servers) * params.parallel
        for server in servers * params.parallel:
            self._slots.put(server)

    def cost(self, requests: int) -> float | None:
        return RemoteImageStage.price(self._params, requests)

    def check_cost(self, requests: int) -> None:
        cost = self.cost(requests) or 0.0
        if self._max_cost is not None and cost > self._max_cost:
            allowed = f"--max-cost allows {amount_text(self._max_cost)}"
            raise TooExpensive(f"{count(requests, 'request')} would cost {amount_text(cost)}, {allowed}")

    def _check_stopped(self, percent: int = 0) -> None:
        if self.is_stopped:
            raise Cancelled

    def answer(self, key: str, frames: Frames, prompt: str) -> Answer:
        body, failure = self._request(frames, prompt), ServerFailed()
        for _ in range(TRIES):
            server = self._slots.get()
            try:
                return self._answer(server, key, body)
            except ServerFailed as error:
                failure = error
            finally:
                self._slots.put(server)
            if self.threads == self._params.parallel:
                break
        raise failure

    def _answer(self, server: VideoServers, key: str, body: Mapping[str, Any]) -> Answer:
        failure: Exception
        for number in range(TRIES):
            self._check_stopped()
            with self._lock:
                self.check_cost(self.requests + 1)
                self.requests += 1
            try:
                chat = server.chat(f"{key}-{number}", body)
            except BaseException as error:
                with self._lock:
                    self.requests -= 1
                if not isinstance(error, WrongAnswer):
                    raise
                failure = error
                continue
            # A name such as gpt-4o stands for a version of it.
            if chat.model and not chat.model.startswith(self.model):
                raise OtherWeights(
                    f"the server answers as {shortened_value(chat.model)}, must be {self.model!r}; correct --model"
                )
            choice = chat.choices[0]
            if choice.message.refusal or choice.finish_reason == "content_filter":
                raise NoCaption(f"refused by the model: {shortened_value(choice.message.refusal or 'content filter')}")
            try:
                return Answer.parse(choice.message.content or "")
            except ValueError as error:
                failure = NoCaption(
                    f"no usable answer to {TRIES} requests: {error}; got {shortened_value(choice.message.content)}"
                )
        raise failure

    def _request(self, frames: Frames, prompt: str) -> dict[str, Any]:
        text = INSTRUCTIONS.format(frames=len(frames), template=self.template, prompt=json.dumps(prompt, ensure_ascii=False))
        images = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(frame)}"}} for frame in frames]
        schema = {"name": "answer", "schema": Answer.model_json_schema()}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}, *images]}],
            "response_format": {"type": "json_schema", "json_schema": schema},
        }


def _jpeg(frame: Image) -> str:
    content = io.BytesIO()
    PILImage.fromarray(frame).save(content, "JPEG", quality=QUALITY)
    return base64.b64encode(content.getvalue()).decode()


def frames_of(storage: Storage, clip: Mapping[str, Any], number: int) -> Frames:
    """Return up to `number` frames (T, H, W, 3) from the first to the last of a clip. Raises VidgenError."""
    with local_clip(storage, clip) as path:
        if Path(clip["clip"]).suffix not in CLIP_SUFFIXES:
            return reduced(read_image(path)[None], SIDE_PX)
        with open_foreign_video(path) as video:
            places = np.linspace(0, video.frame_count - 1, min(number, video.frame_count)).round().astype(int).tolist()
            return np.concatenate([reduced(frame[None], SIDE_PX) for frame in video.each_frame(places)])


def caption_folder(storage: Storage, captioner: DemoCaptioner, frames: int) -> FolderReport:
    """Caption the clips for which the model has not answered this template, and write the answers as they come.

    Prints progress and failures. After an interrupt, waits for the clips that were begun. Raises TooExpensive, SetupError, and
    OSError if the storage fails.
    """
    started = time.monotonic()
    settings = {"model": captioner.model, "template": captioner.template, "frames": frames}
    table = ScoreTable(CAPTION, _VERSION, COLUMNS, json.dumps(settings, ensure_ascii=False))
    answered, newest = dict[str, dict[str, Any]](), dict[str, bool]()
    for part in part_tables(storage, table.folder):
        is_same = part.schema.metadata[WEIGHTS].decode() == table.digest
        newest |= dict.fromkeys(part[DIGEST].to_pylist(), is_same)
        if is_same:
            answered |= {row[DIGEST]: row for row in part.to_pylist() if row["caption_model"] is not None}
    clips = finished_clips(storage)
    # Those that have failed come last.
    pending = sorted((clip for clip in clips if clip[DIGEST] not in answered), key=lambda clip: clip[DIGEST] in newest)
    captioner.check_cost(len(pending))
    report, writer = FolderReport(len(clips), already_done=len(clips) - len(pending)), ScoreWriter(storage, [table])
    for digest, row in answered.items():
        if not newest[digest]:
            # Another model or template was used since.
            writer.add(ClipScores(digest, {CAPTION: row}))
    failed_in_a_row = 0

    def row_of(clip: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        row = dict.fromkeys(COLUMNS) | {DIGEST: clip[DIGEST]}
        try:
            if captioner.is_stopped:
                raise Cancelled
            images = frames_of(storage, clip, frames)
            key = hashlib.sha256(f"{clip[DIGEST]} {table.digest}".encode()).hexdigest()
            row |= {"caption_model": captioner.model} | captioner.answer(key, images, clip["prompt"] or "").scores()
        except NoCaption as error:
            row |= {"caption_model": captioner.model, "caption_error": str(error)}
        except (Cancelled, OtherWeights, TooExpensive):
            raise
        except Exception as error:  # decoders raise almost any exception
            row["caption_error"] = str(error) or repr(error)
        return clip["id"], row

    def add(name: str, row: dict[str, Any]) -> None:
        nonlocal failed_in_a_row
        writer.add(ClipScores(name, {CAPTION: row}))
        failed_in_a_row = failed_in_a_row + 1 if row["caption"] is None else 0
        report.add(name, row["caption_error"], "caption")

    pool, done = ThreadPoolExecutor(captioner.threads), SimpleQueue[Future[tuple[str, dict[str, Any]]]]()
    try:
        for clip in pending:
            pool.submit(row_of, clip).add_done_callback(done.put)
        for future in shown_progress((done.get() for _ in pending), len(pending), "captioning"):
            add(*future.result())
            if done.empty():
                writer.flush()
            if failed_in_a_row == MAX_FAILED:
                raise SetupError(f"stopped after {MAX_FAILED} clips in a row without a caption, see above")
    except KeyboardInterrupt:
        note("waiting for the clips that were begun; Ctrl-C again drops them")
        raise
    finally:
        captioner.is_stopped = True
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            while not done.empty():
                with suppress(Exception):  # cancelled, or for the reason of the first
                    add(*done.get().result())
            writer.flush()
    report.requests, report.cost = captioner.requests, captioner.cost(captioner.requests)
    report.seconds = round(time.monotonic() - started, 3)
    return report
