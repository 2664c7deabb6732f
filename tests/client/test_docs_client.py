"""The examples in docs/client.md run, in order."""

import re
from pathlib import Path

from tests.conftest import EXAMPLES
from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.server_settings import OnlineSettings

DOCS = Path(__file__).parents[2] / "docs" / "client.md"


def test_examples_run_in_order(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    examples = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert len(examples) >= 4
    names: dict[str, object] = {}
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"))
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url:
        for example in examples:
            exec(compile(example.replace("http://127.0.0.1:8000", url), str(DOCS), "exec"), names)
    assert Path("boat.mp4").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "completed 100" in printed
    assert "400 invalid_value num_frames" in printed
