"""`vidgen models`: output, acceptance of licences and exit codes."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights.hub_server import running_hub
from vidgen_ray.cli import main
from vidgen_ray.profile import load_profile
from vidgen_ray.weights import resolve
from vidgen_ray.weights.ledger import accepted_licences

SVD = "stabilityai/stable-video-diffusion-img2vid-xt"
URL_TEMPLATE = "{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
PROFILE = f"""
name: mine
about: published weights
actors:
  svd: {{weights: "hub:{SVD}@main"}}
  realesrgan: {{weights: "builtin:realesrgan"}}
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with a tiny SVD-XT, an empty cache for its files, and an empty cache of this project."""
    repository = shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "svd")
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with running_hub() as hub:
        hub.repositories = {SVD: repository}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", URL_TEMPLATE.format(hub.url))
        yield hub


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "mine.yaml").write_text(PROFILE)
    return str(tmp_path / "mine.yaml")


def test_restricted_licences_are_accepted_once_and_all_problems_are_checked(server, profile, capsys):
    pull = ["models", "pull", profile, "--actor", "svd"]
    assert main(pull) == 2
    err = capsys.readouterr().err
    assert "Stable Video Diffusion XT: Stability AI Community License, commercial use: conditional" in err
    assert "1 licences restrict the use of these weights" in err
    assert server.downloads().total() == 0
    assert main(["models", "list", profile]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert all(text in row for text in (f"hub:{SVD}@main", "missing", "Stability AI Community License", "conditional")), row
    assert main([*pull, "--accept-license"]) == 0
    assert accepted_licences() == {"svd-xt"}
    assert f"hub:{SVD}@main is at commit {server.commit}" in capsys.readouterr().out
    assert main(pull) == 0
    assert "0 bytes downloaded, 0 of 1 failed" in capsys.readouterr().out
    assert main(["models", "list", profile, "--json"]) == 0
    svd, upscaler = json.loads(capsys.readouterr().out)
    assert (svd["state"], svd["accepted"], svd["gated"]) == ("present", True, f"https://huggingface.co/{SVD}")
    assert svd["size_bytes"] > 1e6
    assert (upscaler["state"], upscaler["licence"]) == ("built in", "BSD-3-Clause")
    for component in ("unet", "vae"):
        file = resolve(f"hub:{SVD}@main") / component / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[sorted(tensors)[0]] = torch.zeros(3)
        save_file(tensors, file)
    assert main(["models", "check", profile]) == 4
    out, err = capsys.readouterr()
    assert f"FAIL hub:{SVD}@main" in out
    assert "ok   builtin:realesrgan" in out
    assert all(f"{component}: tensors of another shape" in err for component in ("unet", "vae"))


def test_table_is_printed_before_a_full_disk_is_refused(server, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    assert main(["models", "pull", profile, "--accept-license"]) == 4
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith(f"hub:{SVD}@main"))
    assert row.split()[1:4] == ["9", "0.00", "0.00"]
    assert "Stability AI Community License" in row
    assert "3.75 MB in 9 files, 3.75 MB to download; " in out
    assert f"{tmp_path / 'hub'} has 2 MB free" in out
    assert "these weights: needs 0.0 GB" in err
    assert "free some space, or use another folder with --to" in err
    assert server.downloads() == {"model_index.json": 1}


def test_to_writes_a_folder_that_is_usable_as_hf_home(server, profile, tmp_path, monkeypatch, capsys):
    shared, check = tmp_path / "shared", ["models", "check", profile, "--actor", "svd"]
    assert main(["models", "pull", profile, "--actor", "svd", "--to", str(shared), "--accept-license"]) == 0
    assert f"Set HF_HOME={shared}" in capsys.readouterr().out
    assert main(check) == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(shared / "hub"))
    assert main(check) == 0


def planned(capsys, *args):
    """Return the references that `vidgen models pull` would download."""
    assert main(["models", "pull", *args, "--dry-run", "--json"]) in (0, 4)
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    return {one["reference"] for one in node["pulled"]} | {problem.split(": ")[0] for problem in node["problems"]}


def test_pull_takes_the_default_chain_all_weights_or_those_of_a_script(server, tmp_path, capsys):
    chain = planned(capsys, "gpu-80gb")
    names = ("antelopev2", "arcface_ir_se50.pth", "FLUX.1-dev@", "InfiniteYou@", "img2vid-xt@", "builtin:realesrgan")
    assert len(chain) == len(names)
    assert all(any(name in reference for reference in chain) for name in names), chain
    everything = load_profile("gpu-80gb")
    assert planned(capsys, "gpu-80gb", "--all") == set(everything.weight_licences(everything.actors))
    ltx = '{"prompt": "a boat", "video_model": "ltx", "num_frames": "auto"}'
    (tmp_path / "s.jsonl").write_text(f'{ltx}\n{{"prompt": "a boat", "generate_video": false}}\n{{"prompt": 7}}\n')
    (tmp_path / "s.yaml").write_text(f"shots: [{ltx}]")
    for script in ("s.jsonl", "s.yaml"):
        used = planned(capsys, str(tmp_path / script), "-p", "gpu-80gb")
        assert len(used) == 3
        assert {"FLUX.1-dev", "LTX-Video"} < {reference.rpartition("/")[2].split("@")[0] for reference in used}


def test_failures_are_printed_together_with_exit_code_4(server, profile, capsys):
    assert main(["models", "pull", "hub:nobody/nothing", "hub:nobody/else"]) == 4
    out, err = capsys.readouterr()
    assert err.count("no repository at") == 2
    assert "2 of 2 failed" in out
    assert main(["models", "list", profile, "--actor", "flux"]) == 2
    assert "--actor: got 'flux'" in capsys.readouterr().err
