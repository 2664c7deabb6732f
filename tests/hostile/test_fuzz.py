"""Readers of untrusted files, on damaged files and random values: they accept a file or raise their own error.

VIDGEN_FUZZ_EXAMPLES sets the number of examples per test, at random; without it, the same few examples are used in every run.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.readers import READERS
from vidgen_ray.shot import Shot

EXAMPLES = int(os.environ.get("VIDGEN_FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 15,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

PIECES = [
    b"\0",
    b"\xff",
    b"\xff\xda",
    b"{",
    b"[",
    b"]",
    b"}",
    b'"',
    b"|",
    b":",
    b"-",
    b"!!",
    b"&a",
    b"*a",
    b"\n",
    b"\r",
    b"1e999",
    b"NaN",
]
EDIT = st.tuples(
    st.floats(0, 1), st.integers(0, 8), st.one_of(st.binary(max_size=4), st.sampled_from(PIECES), st.just(b"[" * 300))
)
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
