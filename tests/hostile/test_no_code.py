"""No input runs code: a pickle is sent through every door, and the package calls nothing that would run one."""

import ast
import pickle
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.hostile.files import RunsCode
from vidgen_ray.errors import VidgenError
from vidgen_ray.film.film_settings import read_film_file
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import read_image
from vidgen_ray.nets.identity_networks import read_parts
from vidgen_ray.nets.ir_se50 import read_network
from vidgen_ray.nets.lora_files import check_lora_file
from vidgen_ray.nets.rife_network import load_rife
from vidgen_ray.online.auth import load_keys
from vidgen_ray.online.server_settings import Limits
from vidgen_ray.outputs.stage_cache import face_from_json
from vidgen_ray.profile import load_profile
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.shot import LoraRef
from vidgen_ray.stages.lora import LoraAdapters
from vidgen_ray.stages.realesrgan import load_network

PACKAGE = Path(__file__).parent.parent.parent / "vidgen_ray"


def script(path: Path) -> None:
    if (read := read_script(ScriptSettings(path))).errors:
        raise VidgenError(read.errors[0])


class FluxPipe:
    """The part of a pipeline that reads LoRA files."""

    @staticmethod
    def lora_state_dict(*args, **options):
        from diffusers import FluxPipeline

        return FluxPipeline.lora_state_dict(*args, **options)

    def get_list_adapters(self):
        return {}


def lora_stage(path: Path) -> None:
    with LoraAdapters(FluxPipe(), 1, "FLUX").active([LoraRef(path=str(path))]):
        pass


FILES = {
    "LoRA, when it is checked": ("a.safetensors", check_lora_file),
    "LoRA, when it is loaded": ("a.safetensors", lora_stage),
    "LoRA with another ending": ("a.bin", lora_stage),
    "upscaler .pth": ("a.pth", load_network),
    "upscaler .safetensors": ("a.safetensors", load_network),
    "RIFE": ("flownet.pkl", load_rife),
    "face recogniser": ("a.pth", read_network),
    "face resampler": ("a.bin", lambda path: read_parts(path, "ip_adapter")),
    "script .jsonl": ("a.jsonl", script),
    "script .csv": ("a.csv", script),
    "script .txt": ("a.txt", script),
    "script .yaml": ("a.yaml", script),
    "script .parquet": ("a.parquet", script),
    "characters": ("a.yaml", read_characters),
    "profile": ("a.yaml", lambda path: load_profile(str(path))),
    "film": ("a.yaml", read_film_file),
    "API keys": ("a.yaml", lambda path: load_keys(path, Limits())),
    "photo": ("a.png", read_image),
    "video": ("a.mp4", open_video),
}
"""Door -> name of its file, and the function that reads it."""


def as_pickle(path: Path, payload: RunsCode) -> None:
    path.write_bytes(pickle.dumps(payload))


def as_text_pickle(path: Path, payload: RunsCode) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=0))


def as_checkpoint(path: Path, payload: RunsCode) -> None:
    torch.save({"params": payload, "ip_adapter": {"a": payload}}, path)


KINDS = [as_pickle, as_text_pickle, as_checkpoint]


def test_payload_runs_when_it_is_unpickled(tmp_path):
    """Positive control of the tests below."""
    as_checkpoint(tmp_path / "a", RunsCode(tmp_path / "RAN"))
    torch.load(tmp_path / "a", weights_only=False)
    assert (tmp_path / "RAN").is_dir()


@pytest.mark.parametrize("write", KINDS)
def test_pickle_in_a_file_is_refused_and_does_not_run(tmp_path, write):
    for door, (name, read) in FILES.items():
        write(tmp_path / name, RunsCode(tmp_path / "RAN"))
        # Its text is a list of prompts.
        is_text = (door, write) == ("script .txt", as_text_pickle)
        with nullcontext() if is_text else pytest.raises(VidgenError, match=r"^((?!weights_only)[\s\S])*$"):
            read(tmp_path / name)
        assert not (tmp_path / "RAN").exists(), door


def test_pickle_in_a_column_of_parquet_does_not_run(tmp_path):
    payload = pickle.dumps(RunsCode(tmp_path / "RAN"))
    marked = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": payload}
    for column in (pa.field("metadata.x", pa.binary()), pa.field("metadata.x", pa.binary(), metadata=marked)):
        # Bytes without a type are metadata, in Base64.
        is_metadata = column.metadata is None
        schema = pa.schema([pa.field("prompt", pa.string()), column])
        pq.write_table(pa.table({"prompt": ["a"], "metadata.x": [payload]}, schema), tmp_path / "a.parquet")
        with nullcontext() if is_metadata else pytest.raises(VidgenError):
            script(tmp_path / "a.parquet")
    assert not (tmp_path / "RAN").exists()


def test_face_features_are_json(tmp_path):
    with pytest.raises(ValueError):  # noqa: PT011  # any error of JSON
        face_from_json(pickle.dumps(RunsCode(tmp_path / "RAN"), protocol=0).decode("latin-1"))
    assert not (tmp_path / "RAN").exists()


# What the package calls

FORBIDDEN = ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
INTERNAL_PICKLES = {"batch/line_planner.py", "data.py", "dataset/score_folder.py", "engine/gpu_group.py"}
"""Modules that pickle objects between processes of one run. They read no file."""
SUSPICIOUS = re.compile("|".join([*PICKLERS, *FORBIDDEN, "torch.load", "allow_pickle", "shell"]))


def calls() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield module, name and keywords of each call in suspicious modules. Keywords that are no literals are `None`."""
    for path in PACKAGE.rglob("*.py"):
        if SUSPICIOUS.search(text := path.read_text()):
            for node in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
                keywords = {word.arg or "**": getattr(word.value, "value", None) for word in node.keywords}
                yield str(path.relative_to(PACKAGE)), ast.unparse(node.func), keywords


def test_package_makes_no_call_that_runs_code_of_a_file():
    wrong = []
    for module, name, keywords in calls():
        runs_pickle = name.split(".")[0] in PICKLERS and module not in INTERNAL_PICKLES
        loads_objects = name.endswith("torch.load") and keywords.get("weights_only") is not True
        if runs_pickle or loads_objects or name in FORBIDDEN or keywords.get("allow_pickle") or keywords.get("shell"):
            wrong.append((module, name))
    assert wrong == [("system/files.py", "yaml.load")]


def test_code_of_model_repositories_is_never_enabled():
    for folder in (PACKAGE, *(PACKAGE.parent / name for name in ("training", "jobs", "examples", "benchmarks"))):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".yaml", ".ipynb"):
                assert "trust_remote_code" not in path.read_text(), path
