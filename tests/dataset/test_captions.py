"""`vidgen caption`: answers of a server with faults, what is asked again, costs, the demo captioner, and who reads captions."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.dataset.conftest import make_folder, moving
from tests.remote.fake_server import MODEL, FakeServer
from training.classifier import truth
from training.dataset import scenes
from training.drawing import draw
from training.world import COLOURS, HAIRS, SKINS
from vidgen_ray.cli import main
from vidgen_ray.dataset import demo_captioner
from vidgen_ray.dataset.captions import Answer
from vidgen_ray.dataset.tables import open_tables
from vidgen_ray.engine.ray_cluster import _unused_ports
from vidgen_ray.remote import video_server
from vidgen_ray.report.gallery_page import gallery_rows

SIZE = (64, 128)
ODD_TEXT = 'two\nlines, "quotes", \u202bعربي\u202c, \U0001f6a2 and ' + "very " * 1000 + "long"
FAULTS_ONCE = ("busy", "500", "html", "nothing", "prose")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with FakeServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def folder_of(path, prompts):
    clips = [({"id": f"clip-{n}", "prompt": text}, moving(4, seed=n, size=SIZE)) for n, text in enumerate(prompts)]
    return make_folder(path, clips)


def caption(outputs, *servers, options=(), model=MODEL):
    urls = [word for each in servers for word in ("--server", each.url)]
    return main(["caption", outputs.url, *urls, "--model", model, *options])


def rows(outputs, sql="SELECT prompt, caption, caption_model, agrees, missing, caption_error FROM clips ORDER BY id"):
    with open_tables(outputs.storage) as database:
        return database.sql(sql).fetchall()


def answered(server, outputs):
    prompts = {prompt for (prompt,) in rows(outputs, "SELECT prompt FROM clips")}
    return Counter(each["prompt"] for each in server.events("answered") if each["prompt"] in prompts)


def test_faults_of_a_server_lose_no_caption_and_pay_none_twice(tmp_path, server, capsys):
    prompts = [f"{tmp_path.name} fault:{fault}" for fault in FAULTS_ONCE]
    outputs = folder_of(tmp_path / "out", prompts)
    assert caption(outputs, server, options=("--price", "0.01", "--max-cost", "0.06", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["done"], report["requests"], report["cost"]) == (5, 6, 0.06)
    assert [row[1] for row in rows(outputs)] == [f"4 images of {prompt}" for prompt in prompts]
    assert answered(server, outputs) == Counter(prompts) + Counter([prompts[FAULTS_ONCE.index("prose")]])
    # Nothing is asked for again, also after another model or template was used.
    (tmp_path / "template.txt").write_text("In {three} words.")
    for options in ((), ("--template", str(tmp_path / "template.txt")), ()):
        assert caption(outputs, server, options=options) == 0
    assert answered(server, outputs).total() == 6 + 5
    assert rows(outputs, "SELECT count(*), count(DISTINCT clip_sha256) FROM scores") == [(5, 5)]


def write_answering_model(folder, answer):
    """Write a model of images and text that gives this answer to everything: most weights are zero."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    pieces = ["<pad>", "<image>", "<s>", answer, "</s>", *sorted(ByteLevel.alphabet())]
    words = Tokenizer(BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), Fuse()
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    parts = "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    chat = "{% for message in messages %}" + parts + "{% endfor %}<s>"
    patches = {"patch_size": 16, "num_additional_image_tokens": 1}
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size=side, crop_size=side), PreTrainedTokenizerFast(tokenizer_object=words, **special)
    LlavaProcessor(*processor, vision_feature_select_strategy="full", chat_template=chat, **patches).save_pretrained(folder)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **sizes},
        text_config={"model_type": "llama", "vocab_size": len(pieces), "num_key_value_heads": 1, "eos_token_id": 4, **sizes},
        image_token_id=1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for weights in model.parameters():
        weights.data.zero_()
    model.model.language_model.norm.weight.data.fill_(1)
    for number in (2, 3):  # the answer follows <s>, and </s> the answer
        model.model.language_model.embed_tokens.weight.data[number, number] = 1
        model.lm_head.weight.data[number + 1, number] = 1
    model.save_pretrained(folder)


@pytest.mark.slow
def test_server_of_transformers_captions_a_folder(tmp_path):
    """A server that others wrote, with the code paths of a real model."""
    answer = {"caption": "A person walks.", "facts": [{"fact": "a person", "shown": "yes"}, {"fact": "rain", "shown": "no"}]}
    model, outputs = str(tmp_path / "model"), folder_of(tmp_path / "out", ["a person walks in rain", "a person"])
    write_answering_model(model, json.dumps(answer))
    (port,) = _unused_ports(1)
    words = ["serve", model, "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    command = [Path(sys.executable).with_name("transformers"), *words]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=offline, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert any("Uvicorn running" in line for line in serving.stderr)
            assert main(["caption", outputs.url, "--server", f"http://localhost:{port}", "--model", model]) == 0
        finally:
            serving.kill()
    assert [row[1:5] for row in rows(outputs)] == [("A person walks.", model, 0.5, "rain")] * 2


def test_request_that_hangs_is_repeated(tmp_path, server, monkeypatch):
    outputs = folder_of(tmp_path / "out", [f"{tmp_path.name} fault:hangs"])
    monkeypatch.setattr(video_server, "RESPONSE_S", 1.0)
    assert caption(outputs, server) == 0


def test_clip_without_a_caption_has_a_row_with_the_reason(tmp_path, server, capsys):
    faults = ("refused", "refusal", "only-prose", "no-content", "damaged")
    outputs = folder_of(tmp_path / "out", [f"{tmp_path.name} fault:{fault}" for fault in faults])
    clip = tmp_path / "out" / rows(outputs, "SELECT clip FROM clips WHERE id = 'clip-4'")[0][0]
    clip.write_bytes(b"\0" * clip.stat().st_size)
    assert caption(outputs, server) == 1
    reasons = {row[0].rpartition(":")[2]: (row[2], row[5]) for row in rows(outputs)}
    assert reasons["refused"] == (None, f"{server.url}/v1/chat/completions: 400: the prompt is against the rules")
    assert reasons["refusal"] == (MODEL, "refused by the model: 'I cannot help with that.'")
    assert reasons["only-prose"][0] == MODEL
    assert "no usable answer to 3 requests" in reasons["only-prose"][1]
    assert reasons["damaged"][0] is None
    assert "5 failed" in capsys.readouterr().out
    # Answers that were paid stay.
    before = answered(server, outputs)
    assert caption(outputs, server) == 1
    assert answered(server, outputs) == before
    assert "2 failed" in capsys.readouterr().out


def test_odd_texts_are_kept_on_one_line(tmp_path, server):
    outputs = folder_of(tmp_path / "out", ["a boat"])
    text = json.dumps({"caption": ODD_TEXT, "facts": [{"fact": "a\nboat", "shown": "no"}]})
    (server.folder / "caption.txt").write_text(f"<think>{{}}</think>Here it is:\n```json\n{text}\n```")
    try:
        assert caption(outputs, server) == 0
    finally:
        (server.folder / "caption.txt").unlink()
    assert rows(outputs) == [("a boat", " ".join(ODD_TEXT.split()), MODEL, 0.0, "a boat", None)]
    assert main(["export", outputs.url, str(tmp_path / "set"), "--format", "captions", "--caption", "{caption}"]) == 0
    (text_file,) = (tmp_path / "set" / "train").glob("clip-0-*.txt")
    assert text_file.read_text() == " ".join(ODD_TEXT.split())
    assert ODD_TEXT[:3] in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[]", "{}", '{"caption": "x"}', '{"caption": " ", "facts": []}',
        '{"caption": "x", "facts": [{"fact": "y"}]}',
        '{"caption": "\\ud83d", "facts": []}', "{" * 5000, json.dumps({"caption": "x" * 20_000, "facts": []}),
        '{"caption": "x", "facts": [{"fact": "y", "shown": "maybe"}]}',
    ],
)  # fmt: skip
def test_unusable_answers_are_refused(content):
    with pytest.raises(ValueError, match=r"\w"):
        Answer.parse(content)


def test_wrong_servers_end_the_call(tmp_path, server, capsys):
    outputs = folder_of(tmp_path / "out", [f"{tmp_path.name} fault:other-model"])
    assert caption(outputs, server) == 4
    assert "answers as 'another', must be" in capsys.readouterr().err
    assert caption(outputs, server, model="none") == 4
    assert f"has no model 'none', must be one of {MODEL}" in capsys.readouterr().err
    down = FakeServer(tmp_path / "down")
    assert caption(outputs, down) == 4
    assert main(["caption", outputs.url, "--server", "vision", "--model", "m"]) == 2
    assert "--server: got ['vision']" in capsys.readouterr().err
    assert main(["caption", outputs.url]) == 2
    assert "pass --server URL" in capsys.readouterr().err
    # One server of two is enough.
    outputs = folder_of(tmp_path / "other", ["a boat"])
    assert caption(outputs, down, server) == 0
    assert f"not used: remote:{MODEL}: no server responds" in capsys.readouterr().err


def test_max_cost_ends_the_call_before_it_is_exceeded(tmp_path, server, capsys):
    outputs = folder_of(tmp_path / "out", [f"{tmp_path.name} fault:only-prose", f"{tmp_path.name} a boat"])
    options = ("--price", "1", "--parallel", "1")
    assert caption(outputs, server, options=(*options, "--max-cost", "1.5")) == 5
    assert not answered(server, outputs)
    assert "2 requests would cost 2.00, --max-cost allows 1.50" in capsys.readouterr().err
    assert caption(outputs, server, options=(*options, "--max-cost", "3")) == 5
    assert answered(server, outputs).total() == 3
    assert caption(outputs, server, options=(*options, "--max-cost", "3")) == 0
    assert answered(server, outputs)[f"{tmp_path.name} a boat"] == 1


@pytest.mark.slow
def test_killed_call_is_resumed_and_pays_for_no_stored_answer_twice(tmp_path, server):
    prompts = [f"{tmp_path.name} number {n}" for n in range(60)]
    outputs = folder_of(tmp_path / "out", prompts)
    command = ["caption", outputs.url, "--server", server.url, "--model", MODEL, "--parallel", "2"]
    process = subprocess.Popen([sys.executable, "-m", "vidgen_ray", *command])
    while answered(server, outputs).total() < 10:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = {prompt for prompt, *_ in rows(outputs, "SELECT prompt FROM clips WHERE caption IS NOT NULL")}
    assert len(stored) >= 6
    assert caption(outputs, server) == 0
    paid = answered(server, outputs)
    assert set(paid) == set(prompts)
    assert all(paid[prompt] == 1 for prompt in stored)
    assert paid.total() <= len(prompts) + 4


def test_demo_captioner_reads_drawings():
    for name, colours in {"colour": COLOURS, "hair": HAIRS, "skin": SKINS}.items():
        assert demo_captioner.LABELS[name] == tuple(colours)
    network, right = demo_captioner.load(), Counter()
    world = scenes()[:60]
    for scene in world:
        seen = demo_captioner.labels(demo_captioner.read(network, draw(scene, 128)[None]))
        right.update(name for name, value in truth(scene).items() if seen.get(name) == value)
    assert min(right[name] for name in ("subject", "place", "weather", "side")) >= 57
    people = sum("hair" in truth(scene) for scene in world)
    assert min(right[name] for name in ("hair", "glasses", "beard", "skin")) >= 0.8 * people


def test_demo_captioner_says_which_facts_are_missing(tmp_path, capsys):
    sees = {"subject": "person", "colour": "blue", "side": "left", "place": "sea", "weather": "night", "style": "flat"}
    sees |= {"hair": "red", "hair_style": "bun", "skin": "pale", "glasses": "yes", "beard": "no"}
    seen = {name: {each: float(each == value) for each in demo_captioner.LABELS[name]} for name, value in sees.items()}
    text = "person, red hair in a bun, pale skin, glasses, blue shirt, on the left, by the sea, at night"
    assert demo_captioner.caption_text(seen) == text
    assert {fact.shown for fact in demo_captioner.facts(text, seen)} == {"yes"}
    other = "a portrait of a man with short red hair and a beard in an orange sweater at dusk, a pencil sketch"
    missing = {fact.words for fact in demo_captioner.facts(other, seen) if fact.shown == "no"}
    assert missing == {"short", "beard", "orange sweater", "at dusk", "pencil sketch"}
    seen["weather"] = {"night": 0.4, "sunset": 0.3}
    assert ("weather", "sunset", "at dusk", "unclear") in demo_captioner.facts(other, seen)


def test_folder_of_the_demo_is_captioned_without_a_server(tmp_path, capsys):
    pairs = [
        ("a red boat by the sea at night", "boat"),
        ("a red boat by the sea at night", "house"),
        ("an abstract thing", "car"),
    ]
    clips = []
    for number, (prompt, kind) in enumerate(pairs):
        scene = next(s for s in scenes() if getattr(s.subject, "kind", "") == kind and s.weather != "night")
        clips.append(({"id": f"clip-{number}", "prompt": prompt}, np.stack([draw(scene, 128)] * 4)))
    outputs = make_folder(tmp_path / "out", clips)
    (tmp_path / "out" / "run.json").write_text(json.dumps({"options": {"profile": "demo"}}))
    assert main(["caption", outputs.url]) == 0
    found = rows(outputs)
    assert "boat" in found[0][1]
    assert "at night" in found[0][4]
    assert found[1][3] < found[0][3]
    assert found[2][3:] == (None, None, None)
    assert {row[2] for row in found} == {"demo captioner"}
    row = gallery_rows(outputs.storage).rows[0]
    assert (row["caption"], row["settings"][0][1]) == (found[0][1], found[0][1])
    assert main(["query", outputs.url, "SELECT id FROM clips WHERE agrees < 1"]) == 0
    dest = tmp_path / "set"
    assert main(["export", outputs.url, str(dest), "--caption", "{caption}", "--where", "agrees < 1"]) == 0
    card = (dest / "README.md").read_text()
    assert "| demo captioner | 2 |" in card
    commands = card.split("## Reproduce")[1].split("## ")[0]
    assert re.search(r"vidgen render .*\nvidgen caption OUT\nvidgen export OUT DEST", commands), commands
    # Of a new clip, as after `vidgen retry --rejected`, nothing was seen.
    for path in (tmp_path / "out" / "scores").glob("caption@*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
    capsys.readouterr()
    assert main(["export", outputs.url, str(tmp_path / "all"), "--caption", "{caption}"]) == 1
    assert f"1 clip has no caption yet; run: vidgen caption {outputs.url}, and" in capsys.readouterr().err
    assert "![agrees from" in card


def test_commands_name_what_gives_captions(tmp_path, capsys):
    outputs = folder_of(tmp_path / "out", ["a boat"])
    assert main(["query", outputs.url, "SELECT id FROM clips WHERE agrees < 1"]) == 2
    assert f"no clip has agrees yet; run: vidgen caption {outputs.url}" in capsys.readouterr().err
    assert main(["export", outputs.url, str(tmp_path / "set"), "--caption", "{caption}"]) == 2
    assert f"--caption: no clip has caption yet; run: vidgen caption {outputs.url}" in capsys.readouterr().err
