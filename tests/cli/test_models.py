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


def test_restricted_licences_are_accepted_once(server, profile, capsys):
    assert main(["models", "pull", profile, "--actor", "svd"]) == 2
    err = capsys.readouterr().err
    assert "Stable Video Diffusion XT: Stability AI Community License, commercial use: conditional" in err
    assert "1 licences restrict the use of these weights" in err
    assert server.downloads().total() == 0
    assert main(["models", "pull", profile, "--actor", "svd", "--accept-license"]) == 0
    assert accepted_licences() == {"svd-xt"}
    assert f"hub:{SVD}@main is at commit {server.commit}" in capsys.readouterr().out
    assert main(["models", "pull", profile, "--actor", "svd"]) == 0
    assert "0 bytes downloaded, 0 of 1 failed" in capsys.readouterr().out


def test_dry_run_needs_no_acceptance_and_prints_sizes(server, profile, capsys):
    assert main(["models", "pull", profile, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (node,) = report["nodes"]
    svd, upscaler = node["pulled"]
    assert (report["dry_run"], node["problems"], svd["downloaded_bytes"] > 1e6, svd["files"]) == (True, [], True, 9)
    assert (upscaler["reference"], upscaler["size_bytes"]) == ("builtin:realesrgan", 0)
    (disk,) = node["disks"]
    assert (disk["needed_bytes"], disk["free_bytes"] > 0) == (svd["downloaded_bytes"], True)


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


def test_list_shows_state_size_and_licence(server, profile, capsys):
    assert main(["models", "list", profile]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert all(text in row for text in (f"hub:{SVD}@main", "missing", "Stability AI Community License", "conditional")), row
    main(["models", "pull", profile, "--actor", "svd", "--accept-license"])
    capsys.readouterr()
    assert main(["models", "list", profile, "--json"]) == 0
    svd, upscaler = json.loads(capsys.readouterr().out)
    assert (svd["state"], svd["accepted"], svd["gated"]) == ("present", True, f"https://huggingface.co/{SVD}")
    assert svd["size_bytes"] > 1e6
    assert (upscaler["state"], upscaler["licence"]) == ("built in", "BSD-3-Clause")


def test_to_writes_a_folder_that_is_usable_as_hf_home(server, profile, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "shared"
    assert main(["models", "pull", profile, "--actor", "svd", "--to", str(shared), "--accept-license"]) == 0
    assert f"Set HF_HOME={shared}" in capsys.readouterr().out
    assert main(["models", "check", profile, "--actor", "svd"]) == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(shared / "hub"))
    assert main(["models", "check", profile, "--actor", "svd"]) == 0


def test_check_prints_all_problems(server, profile, capsys):
    main(["models", "pull", profile, "--actor", "svd", "--accept-license"])
    folder = resolve(f"hub:{SVD}@main")
    for component in ("unet", "vae"):
        file = folder / component / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[sorted(tensors)[0]] = torch.zeros(3)
        save_file(tensors, file)
    capsys.readouterr()
    assert main(["models", "check", profile]) == 4
    out, err = capsys.readouterr()
    assert f"FAIL hub:{SVD}@main" in out
    assert "ok   builtin:realesrgan" in out
    assert "1 of 2 weights are usable" in out
    assert "unet: tensors of another shape" in err
    assert "vae: tensors of another shape" in err


def planned(capsys, *args):
    """Return the references that `vidgen models pull` would download."""
    assert main(["models", "pull", *args, "--dry-run", "--json"]) in (0, 4)
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    return [one["reference"] for one in node["pulled"]] + [problem.split(": ")[0] for problem in node["problems"]]


def test_pull_takes_the_default_chain_all_weights_or_those_of_a_script(server, tmp_path, capsys):
    chain = set(planned(capsys, "gpu-80gb"))
    names = (
        "antelopev2",
        "recognition_arcface_ir_se50.pth",
        "FLUX.1-dev@",
        "InfiniteYou@",
        "img2vid-xt@",
        "builtin:realesrgan",
    )
    assert len(chain) == len(names)
    assert all(any(name in reference for reference in chain) for name in names), chain
    assert planned(capsys, "-p", "gpu-80gb") == planned(capsys, "gpu-80gb")
    everything = set(planned(capsys, "gpu-80gb", "--all"))
    assert everything == set(load_profile("gpu-80gb").weight_licences(load_profile("gpu-80gb").actors))
    lines = (
        {"prompt": "a boat", "video_model": "ltx", "num_frames": "auto"},
        {"prompt": "a boat", "generate_video": False},
        {"prompt": 7},
    )
    (tmp_path / "script.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "script.yaml").write_text("shots: [{prompt: a boat, video_model: ltx, num_frames: auto}]")
    for script in ("script.jsonl", "script.yaml"):
        used = planned(capsys, str(tmp_path / script), "-p", "gpu-80gb")
        assert len(used) == 3
        assert {"FLUX.1-dev", "LTX-Video"} < {reference.rpartition("/")[2].split("@")[0] for reference in used}


def test_failures_are_printed_together_with_exit_code_4(server, capsys):
    assert main(["models", "pull", "hub:nobody/nothing", "hub:nobody/else"]) == 4
    out, err = capsys.readouterr()
    assert err.count("no repository at") == 2
    assert "2 of 2 failed" in out


def test_unknown_actor_is_rejected(profile, capsys):
    assert main(["models", "list", profile, "--actor", "flux"]) == 2
    assert "--actor: got 'flux'" in capsys.readouterr().err
