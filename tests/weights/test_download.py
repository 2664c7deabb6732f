"""`vidgen models pull`: downloads from a local hub with tiny repositories of the published layouts."""

import hashlib
import io
import shutil
import zipfile

import huggingface_hub.constants
import pytest

from tests.weights.hub_server import running_hub
from vidgen_ray.errors import SetupError
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import download, resolve
from vidgen_ray.weights.download import Hub, PublishedFile, RemoteFile, download_weights, pull_all

SVD, FLUX = "hub:stabilityai/stable-video-diffusion-img2vid-xt", "hub:black-forest-labs/FLUX.1-dev"
UNET = "unet/diffusion_pytorch_model.safetensors"
UNUSED = (
    "README.md",
    "svd_xt.safetensors",
    "svd_xt_image_decoder.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
)
DUPLICATES = ("infusenet_sim_bf16.safetensors", "infusenet_sim_fp8e4m3fn.safetensors")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Tiny repositories with the files beside the pipeline that the published ones have."""
    folder = tmp_path_factory.mktemp("repositories")
    svd = shutil.copytree(resolve("builtin:tiny/svd"), folder / "svd")
    for name in UNUSED:
        (svd / name).write_bytes(b"unused")
    infusenet = shutil.copytree(resolve("builtin:tiny/infusenet"), folder / "infiniteyou" / "infu_flux_v1.0" / "sim_stage1")
    shutil.copytree(infusenet, infusenet.parent / "aes_stage2")
    for name in DUPLICATES:
        (infusenet / name).write_bytes(b"the weights of InfuseNetModel, once more")
    names = (SVD.removeprefix("hub:"), FLUX.removeprefix("hub:"), "ByteDance/InfiniteYou")
    return dict(zip(names, (svd, resolve("builtin:tiny/flux"), folder / "infiniteyou"), strict=True))


@pytest.fixture
def server(repositories, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as hub_server:
        hub_server.repositories = repositories
        yield hub_server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """Hub whose cache is also the one that weights are resolved in."""
    cache = tmp_path / "home" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return Hub(cache, server.url)


def test_pull_downloads_the_loaded_files_once_and_no_others(hub, server, repositories):
    repository = repositories[SVD.removeprefix("hub:")]
    planned = download_weights(SVD, hub=hub, dry_run=True)
    assert planned.downloaded_bytes >= (repository / UNET).stat().st_size
    assert set(server.downloads()) == {"model_index.json"}
    pulled = download_weights(SVD, hub=hub)
    assert pulled.path == str(resolve(SVD))
    assert digest(resolve(SVD)) == digest(repository)
    assert planned.downloaded_bytes == pulled.size_bytes
    assert not {name.rsplit("/", 1)[-1] for name in UNUSED} & set(server.downloads())
    assert server.downloads().total() == len({path for _, path, _ in server.requests if "/resolve/" in path})
    server.requests.clear()
    assert download_weights(SVD, hub=hub).downloaded_bytes == 0
    assert server.downloads().total() == 0


def test_pull_of_a_subfolder_downloads_only_that(hub, server):
    reference = "hub:ByteDance/InfiniteYou@main:infu_flux_v1.0/sim_stage1"
    download_weights(reference, hub=hub)
    assert (resolve(reference) / "InfuseNetModel" / "config.json").is_file()
    assert not [path for _, path, _ in server.requests if "aes_stage2" in path]
    assert not set(DUPLICATES) & set(server.downloads())


def test_file_with_a_wrong_digest_is_deleted_and_downloaded_again(hub, server):
    server.corrupt.add(UNET)
    with pytest.raises(SetupError, match=rf"{UNET} does not have the digest that the hub states, and was deleted"):
        download_weights(SVD, hub=hub)
    server.corrupt.clear()
    assert download_weights(SVD, hub=hub).downloaded_bytes > 0
    assert download_weights(SVD, hub=hub, verify=True).downloaded_bytes == 0


def test_interrupted_download_continues(hub, server, monkeypatch):
    """A broken connection continues in the file. After the end of a command the next one downloads the missing files only."""

    def interrupted(seconds):
        raise ConnectionError("the command ends while it waits for the next attempt")

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    server.cut_after[UNET] = 1000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", interrupted)
    with pytest.raises(SetupError, match="run the same command to continue"):
        download_weights(SVD, hub=hub)
    missing = download_weights(SVD, hub=hub, dry_run=True).downloaded_bytes
    server.requests.clear()
    server.cut_after[UNET] = 1000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    assert download_weights(SVD, hub=hub).downloaded_bytes == missing
    unet = [start for method, path, start in server.requests if method == "GET" and UNET in path]
    assert unet == [None, "bytes=1000-"]
    assert server.downloads().total() < 9


def test_damaged_files_in_the_cache_are_found_and_replaced(hub):
    download_weights(SVD, hub=hub)
    file = resolve(SVD) / UNET
    content = file.read_bytes()
    file.resolve().write_bytes(content[:100])
    assert download_weights(SVD, hub=hub).downloaded_bytes == len(content)
    file.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert download_weights(SVD, hub=hub).downloaded_bytes == 0, "of the same size"
    assert download_weights(SVD, hub=hub, verify=True).downloaded_bytes == len(content)
    assert file.read_bytes() == content
    file.resolve().unlink()
    with pytest.raises(SetupError, match=rf"{UNET} missing; run `vidgen models pull {SVD}`"):
        resolve(SVD)


def test_failed_downloads_are_reported_and_stop_no_other(hub, server, monkeypatch):
    server.gated.add(FLUX.removeprefix("hub:"))
    references = [FLUX, "hub:nobody/nothing", f"{SVD}@v9", f"{SVD}:vea", "hub:x/y/z", SVD]
    result = pull_all([(reference, None) for reference in references], hub, dry_run=False, verify=False)
    assert [one.reference for one in result.pulled] == [SVD]
    expected = (
        "is gated; request access on https://huggingface.co/black-forest-labs/FLUX.1-dev, then run `hf auth login`",
        "no repository at",
        "no such revision",
        "has no vea at revision main",
        "must be hub:OWNER/NAME",
    )
    assert all(text in problem for text, problem in zip(expected, result.problems, strict=True)), result.problems
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert download_weights(FLUX, hub=hub, dry_run=True).downloaded_bytes > 0


def test_pull_that_cannot_start_says_why(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "SPARE_BYTES", 2**60)
        with pytest.raises(SetupError, match=r"needs 0.0 GB, .* free; free some space, or use another folder with --to"):
            download_weights(SVD, hub=hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE is set"):
        download_weights(SVD, hub=hub)


@pytest.fixture
def published(server, monkeypatch):
    """A pack in an archive and a single file at URLs of the server."""
    contents = {"detector.onnx": b"d" * 3000, "recogniser.onnx": b"r" * 5000}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(f"pack/{name}", content)
    server.files = {"/pack.zip": archive.getvalue(), "/face.pth": b"f" * 4000}

    def remote(path):
        content = server.files[path]
        return RemoteFile(f"{server.url}{path}", hashlib.sha256(content).hexdigest(), len(content))

    def listed(name, content, source, member=None):
        return PublishedFile(name, hashlib.sha256(content).hexdigest(), len(content), source, member)

    pack = tuple(listed(name, content, remote("/pack.zip"), f"pack/{name}") for name, content in contents.items())
    single = (listed("face.pth", server.files["/face.pth"], remote("/face.pth")),)
    monkeypatch.setattr(download, "PUBLISHED", {"pack": pack, "face.pth": single})


def test_pull_of_a_pack_unpacks_the_archive(server, published, tmp_path):
    assert download_weights("models/pack", tmp_path).downloaded_bytes == len(server.files["/pack.zip"])
    assert {path.name: path.stat().st_size for path in (tmp_path / "models" / "pack").glob("*.onnx")} == {
        "detector.onnx": 3000,
        "recogniser.onnx": 5000,
    }
    assert not list(tmp_path.rglob("*.part"))
    assert download_weights("models/pack", tmp_path, verify=True).downloaded_bytes == 0
    # Unpacked by hand, the archive makes a folder of its own.
    (tmp_path / "models").rename(tmp_path / "pack")
    assert download_weights("pack", tmp_path).downloaded_bytes == 0
    assert server.downloads() == {"pack.zip": 1}


def test_single_file_continues_in_the_next_command_and_is_checked(server, published, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_ATTEMPTS", 1)
    server.cut_after["/face.pth"] = 1500
    with pytest.raises(SetupError, match=r"face.pth failed .* run the same command to continue"):
        download_weights("face.pth", tmp_path)
    download_weights("face.pth", tmp_path)
    assert (tmp_path / "face.pth").read_bytes() == server.files["/face.pth"]
    assert [requested for method, _, requested in server.requests if method == "GET"] == [None, "bytes=1500-"]
    (tmp_path / "face.pth").unlink()
    server.corrupt.add("/face.pth")
    with pytest.raises(SetupError, match="does not have the expected sha256"):
        download_weights("face.pth", tmp_path)
    assert not list(tmp_path.glob("*.pth"))
