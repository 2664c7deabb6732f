"""Readers of untrusted files, on damaged files and random values: they accept a file or raise their own error.

VIDGEN_FUZZ_EXAMPLES sets the number of examples per test, at random; without it, the same few examples are used in every run.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.hostile.files import IMAGES, good_mp4
from vidgen_ray.errors import MediaError, ProfileError, ScriptError, SetupError, StageError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import read_image
from vidgen_ray.nets.lora_files import check_lora_file
from vidgen_ray.profile import load_profile
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.shot import Shot


@dataclass(frozen=True)
class Reader:
    """A function that reads a file, the errors that it may raise, and valid files."""

    name: str
    """Name of the file."""
    read: Callable[[Path], object]
    errors: type[Exception] | tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def accepts(self, path: Path, content: bytes) -> bool:
        """Read a file with this content. Return whether it is accepted. Raises exceptions other than `errors`."""
        path.write_bytes(content)
        try:
            self.read(path)
        except self.errors as error:
            str(error)
            return False
        return True


def read_lines(path: Path) -> None:
    script = read_script(ScriptSettings(path))
    for error in script.errors:
        assert str(error).isprintable()


def read_frames(path: Path) -> None:
    with open_video(path, backend="pyav") as video:
        video.frames(0, min(2, video.frame_count))


LINES = [
    {"prompt": "a {red|blue} ball", "seed": 7, "lora": [{"path": "a.safetensors", "weight": 0.5}], "flux.steps": 2},
    {"id": "b", "prompt": "b", "metadata": {"a": [1, None, {"b": "c"}]}, "matrix": {"fps": [5, 6]}, "variants": 2},
    {"prompt": "c", "width": 64, "height": 64, "video_model": "wan", "num_frames": "auto", "steps": {"flux": 1}},
]
YAML = b"""title: t
defaults: {fps: 6, steps: {flux: 2}}
characters: {ada: {trigger: sks, description: a woman}}
styles: {film: {prompt: on film, negative_prompt: blur}}
scenes:
- title: one
  defaults: {seed: 1}
  shots: [a ball, {prompt: "{ada} runs", style: film, id: x}]
"""
PROFILE = b"""name: x
about: y
defaults: {width: 64, height: 64}
encode: {crf: 20, preset: fast}
cpu_workers: 2
actors:
  flux: {weights: "builtin:tiny/flux", memory_gb: 1.5, cpus: 2, seconds: {flux: 1.5}, options: {steps: 4}}
"""


@cache
def parquet() -> bytes:
    table = pa.table({"prompt": ["a", "b"], "seed": [1, None], "metadata": [{"x": [1]}, None], "fps": [5.0, float("nan")]})
    with TemporaryDirectory() as folder:
        pq.write_table(table, path := Path(folder) / "a.parquet")
        return path.read_bytes()


@cache
def image_seeds() -> list[bytes]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        seeds = []
        for case in IMAGES:
            if case.outcome == "used":
                case.build(path)
                seeds.append(path.read_bytes())
        return seeds


def lora() -> bytes:
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    return save({f"{layer}.lora_A.weight": np.ones((2, 4), np.float32), f"{layer}.lora_B.weight": np.ones((4, 2), np.float32)})


READERS = {
    "jsonl": Reader("s.jsonl", read_lines, ScriptError, lambda: ["".join(f"{json.dumps(line)}\n" for line in LINES).encode()]),
    "csv": Reader("s.csv", read_lines, ScriptError, lambda: [b'prompt,seed,lora,metadata.x\na,7,"[""b""]",1\n"c, d",,,\n']),
    "txt": Reader("s.txt", read_lines, ScriptError, lambda: [b"a ball\n# comment\n{a|b} house\n"]),
    "yaml": Reader("s.yaml", read_lines, ScriptError, lambda: [YAML]),
    "parquet": Reader("s.parquet", read_lines, ScriptError, lambda: [parquet()]),
    "characters": Reader("c.yaml", read_characters, ScriptError, lambda: [b"ada: {trigger: sks, description: a woman}\n"]),
    "profile": Reader("p.yaml", lambda path: load_profile(str(path)), (ProfileError, SetupError), lambda: [PROFILE]),
    "lora": Reader("a.safetensors", check_lora_file, StageError, lambda: [lora()]),
    "image": Reader("a.png", read_image, MediaError, image_seeds),
    "video": Reader("a.mp4", read_frames, MediaError, lambda: [good_mp4()]),
}
"""Door -> its reader."""


EXAMPLES = int(os.environ.get("VIDGEN_FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 10,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

PIECES = [b"\n", b"\r", b"[" * 300, *b'\0 \xff \xff\xda { [ ] } " | : - !! &a *a 1e999 NaN'.split()]
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 8), st.one_of(st.binary(max_size=4), st.sampled_from(PIECES)))
"""Place in the file, number of bytes that are removed there, bytes that replace them."""


def damaged(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, inserted in edits:
        begin = int(place * len(content))
        content = content[:begin] + inserted + content[begin + removed :]
    return content


@pytest.mark.parametrize("door", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files(tmp_path, door):
    reader = READERS[door]
    seeds = reader.seeds()
    assert all(reader.accepts(tmp_path / reader.name, seed) for seed in seeds)

    @fuzzed
    @given(st.sampled_from(seeds), st.lists(EDIT, min_size=1, max_size=6))
    def run(seed, edits):
        reader.accepts(tmp_path / reader.name, damaged(seed, edits))

    run()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a|b", "{a|b}", "auto", "..", "~x/y"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
FIELDS = [*Shot.model_fields, "matrix", "style", "failure", "flux.steps", "steps.flux", "metadata.x"]


@pytest.mark.parametrize("door", ["jsonl", "yaml"])
def test_random_fields(tmp_path, door):
    reader = READERS[door]
    names = st.one_of(st.sampled_from(FIELDS), st.text(max_size=8))

    @fuzzed
    @given(st.lists(st.dictionaries(names, VALUES, max_size=6), min_size=1, max_size=3))
    def run(lines):
        lines = [{"prompt": "a", **line} for line in lines]
        # JSON is YAML, but for NaN.
        text = json.dumps({"shots": lines}) if door == "yaml" else "".join(f"{json.dumps(line)}\n" for line in lines)
        reader.accepts(tmp_path / reader.name, text.encode())

    run()
