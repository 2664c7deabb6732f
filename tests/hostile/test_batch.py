"""One batch run with every hostile line, image and LoRA between good lines: good lines are done, no worker is lost."""

import json
from collections import Counter

import pytest

from tests.batch.test_batch import Events
from tests.fake_stages import FAKES, profile_of_fakes
from tests.hostile.files import IMAGES, LORAS
from tests.hostile.scripts import LINES
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.planner import parse_gpus
from vidgen_ray.script.lines import ScriptSettings

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def profile(tiny):
    defaults = {**tiny.defaults, "generate_video": False}
    return profile_of_fakes(tiny, ("flux", "svd", "realesrgan"), timeout_s=30, defaults=defaults)


def test_hostile_lines_fail_alone(tmp_path, profile):
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
    report = render(
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
