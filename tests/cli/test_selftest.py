"""`vidgen selftest`: this installation has the stored results, and a changed one is found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen_ray.cli import main, selftest
from vidgen_ray.upscale.network import UpscaleNetwork
from vidgen_ray.weights import resolve


@pytest.fixture
def results(capsys):
    """Return a function that runs the command: exit code and file -> its result."""

    def run(*options):
        code = main(["selftest", "--device", "cpu", "--json", *options])
        return code, {file["file"]: file for file in json.loads(capsys.readouterr().out)["files"]}

    return run


def test_selftest_finds_the_stored_results_and_names_device_and_versions(capsys):
    assert main(["selftest", "--device", "cpu"]) == 0
    versions, device, _, *rows, seconds, last = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert device.startswith("device: ")
    files = sorted(path for path in selftest._REFERENCES.rglob("*.*") if path.name != "kinds.json")
    assert sorted(row.split()[0] for row in rows) == [path.relative_to(selftest._REFERENCES).as_posix() for path in files]
    # A machine of another kind may have other bits.
    allowed = {"equal"} if "no results" not in device else {"equal", "unknown"}
    assert {row.split()[1] for row in rows} <= allowed
    assert seconds.startswith("seconds: quality ")
    assert last == "No result is different."
    assert sum(path.stat().st_size for path in files) < 200_000


def test_selftest_finds_a_broken_upscaler_also_on_an_unknown_device(results, monkeypatch):
    monkeypatch.setattr(selftest, "_ITEMS", ("upscaled",))
    monkeypatch.setattr(selftest, "_kind_of_device", lambda device: "another CPU")
    call = UpscaleNetwork.__call__
    monkeypatch.setattr(UpscaleNetwork, "__call__", lambda self, pixels: call(self, pixels) // 2)
    code, files = results()
    assert (code, files["upscaled/video.mp4"]["result"]) == (1, "different")
    assert files["upscaled/video.mp4"]["mean"] > 10


def test_selftest_finds_one_changed_weight_and_write_replaces_what_is_expected(results, monkeypatch, tmp_path):
    references = shutil.copytree(selftest._REFERENCES, tmp_path / "references")
    monkeypatch.setattr(selftest, "_REFERENCES", references)
    monkeypatch.setattr(selftest, "_SHOTS", {"fast": {**selftest._SHOTS["fast"], "generate_video": False}})
    monkeypatch.setattr(selftest, "_ITEMS", ("fast",))
    assert results("--write")[0] == 0
    flux = shutil.copytree(resolve("builtin:demo/flux"), tmp_path / "flux")
    file = next((flux / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    next(tensor for tensor in weights.values() if tensor.ndim == 2)[0, 0] += 0.5
    save_file(weights, file, {"format": "pt"})
    profile = selftest._profile("cpu")
    actors = {**profile.actors, "flux": profile.actors["flux"].model_copy(update={"weights": str(flux)})}
    monkeypatch.setattr(selftest, "_profile", lambda device: profile.model_copy(update={"actors": actors}))
    code, files = results("--write")
    image = files["fast/image.png"]
    assert (code, image["result"], image["largest"] > 0) == (0, "different", True)
    (stored,) = json.loads((references / "kinds.json").read_text()).values()
    assert stored["sha256"] == {"fast/image.png": image["sha256"]}
    assert [path.name for path in references.rglob("*.png")] == ["image.png"]


def test_selftest_of_a_gpu_needs_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["selftest", "--device", "cuda"]) == 4
    assert "torch finds no GPU" in capsys.readouterr().err
    assert main(["selftest", "--device", "tpu"]) == 2


@pytest.mark.parametrize("name", ["kinds.json", "upscaled/video.mp4", "fast/image.png"])
def test_selftest_names_a_damaged_reference(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setattr(selftest, "_REFERENCES", shutil.copytree(selftest._REFERENCES, tmp_path / "references"))
    file = tmp_path / "references" / name
    file.write_bytes(file.read_bytes()[:500])
    assert main(["selftest", "--device", "cpu"]) == 4
    assert "self-test are damaged; install vidgen-ray again" in capsys.readouterr().err
