"""Every hostile input is refused with one sentence that names it, or used; never a traceback, never code that runs."""

import json
from collections import Counter

import pytest

from tests.batch.test_batch import Events
from tests.fake_stages import FAKES, profile_of_fakes
from tests.hostile.files import IMAGES, LORAS, UPSCALERS, VIDEOS
from tests.hostile.scripts import LINES, PROFILES, SCRIPTS
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError, ProfileError, StageError
from vidgen_ray.film.timeline import probe_clip
from vidgen_ray.media.decode import open_foreign_video, open_video
from vidgen_ray.media.images import read_image, verify_image
from vidgen_ray.nets.lora_files import check_lora_file
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.stages.realesrgan import load_network
from vidgen_ray.upscale.source import read_source


def assert_sentence(error, case, name):
    """Check the text of an error: one line without control characters that names the file and the reason."""
    text = str(error)
    assert name in text
    assert case.message in text
    assert text.isprintable(), text
    assert len(text) < 1000


@pytest.mark.parametrize("case", IMAGES, ids=str)
@pytest.mark.filterwarnings("error")
def test_image(tmp_path, case):
    path = tmp_path / "photo.png"
    case.build(path)
    if case.outcome == "used":
        verify_image(path)
        assert read_image(path).shape[2] == 3
        return
    for read in (read_image, verify_image):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert_sentence(caught.value, case, "photo.png")


@pytest.mark.parametrize("case", VIDEOS, ids=str)
def test_video(tmp_path, case):
    path = tmp_path / "clip.mp4"
    case.build(path)

    for read in (read_all, read_source, probe_clip, read_in_a_child_process):
        if case.outcome == "used":
            read(path)
            continue
        with pytest.raises(MediaError) as caught:
            read(path)
        assert_sentence(caught.value, case, "clip.mp4")


def read_all(path, opened_by=open_video):
    with opened_by(path) as video:
        assert len(video.frames(0, video.frame_count)) == video.frame_count > 0


def read_in_a_child_process(path):
    read_all(path, open_foreign_video)


def test_weights(tmp_path):
    for cases, read in ((LORAS, check_lora_file), (UPSCALERS, load_network)):
        for case in cases:
            path = tmp_path / f"weights{case.ending or '.safetensors'}"
            case.build(path)
            with pytest.raises(StageError) as caught:
                read(path)
            assert_sentence(caught.value, case, path.name)
            path.unlink()
    assert not (tmp_path / "RAN").exists()


def test_profiles(tmp_path):
    for case in PROFILES:
        path = tmp_path / "p.yaml"
        case.build(path)
        with pytest.raises(ProfileError) as caught:
            load_profile(str(path))
        assert_sentence(caught.value, case, path.name)


@pytest.mark.parametrize("case", SCRIPTS, ids=str)
def test_script(tmp_path, capsys, case):
    path = tmp_path / f"script{case.ending}"
    case.build(path)
    code = main(["validate", str(path)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert all(char.isprintable() or char.isspace() for char in out + err)
    messages = " ".join((out + err).replace("│", " ").split())
    assert (code, case.message in messages) == (0 if case.outcome == "used" else 3, True), messages[:2000]
    assert len(messages) < 20_000


@pytest.mark.usefixtures("local_ray")
def test_hostile_lines_fail_alone(tmp_path, tiny):
    """Good lines are done, hostile ones fail alone, and no worker is lost."""
    defaults = {**tiny.defaults, "generate_video": False}
    profile = profile_of_fakes(tiny, ("flux", "svd", "realesrgan"), timeout_s=30, defaults=defaults)
    lines, refused = [], {}

    def add(case, hostile):
        if len(lines) % 4 == 0:
            lines.append({"id": f"good-{len(lines)}", "prompt": f"good {len(lines)}"})
        lines.append(hostile)
        if case.outcome == "refused":
            refused[len(lines)] = case

    for case in LINES:
        add(case, case.build(tmp_path))
    for number, case in enumerate((*IMAGES, *LORAS)):
        field = "image" if case in IMAGES else "lora"
        path = tmp_path / f"{number}.{'png' if field == 'image' else 'safetensors'}"
        case.build(path)
        add(case, {"prompt": f"file {number}", field: path.name})
    script = tmp_path / "s.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    script.write_text("".join(f"{line}\n" for line in text))
    events = Events()
    report = render_shots(
        ScriptSettings(script, profile_defaults=profile.defaults),
        profile,
        OutputFolder(tmp_path / "out"),
        RenderOptions(cluster=parse_gpus("1x80GB"), stages=FAKES),
        listener=events,
    )
    rows = {row.line: row for row in read_manifest(tmp_path / "out")}
    assert Counter(row.status for row in rows.values()) == {"done": len(lines) - len(refused), "failed": len(refused)}
    assert (report.done, report.failed) == (len(lines) - len(refused), len(refused))
    for number, case in refused.items():
        row = rows[number]
        assert row.status == "failed", case
        assert row.failure_attempts <= 2, (case, row.failure_attempts)
        assert "Traceback" not in row.failure_message
        assert row.failure_message.isprintable()
        if case in LINES:
            assert f"s.jsonl line {number}" in row.failure_message, row.failure_message
            assert f", {case.field}:" in row.failure_message or case.field is None
        assert case.message in row.failure_message, (case, row.failure_message)
    assert not [message for message in events.messages if "crash" in message or "quarantine" in message]
    assert not (tmp_path / "RAN").exists()
