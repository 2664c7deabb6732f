"""Hostile script lines, script files and profiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.files import Case, content, refused, used


def line(**fields: Any):
    return lambda _: {"prompt": "a", **fields}


def raw(text: str):
    """Return a builder of a line that is not written as JSON."""
    return lambda _: text


def nested(levels: int) -> str:
    return '{"prompt": "a", "metadata": ' + '{"x": ' * levels + "1" + "}" * levels + "}"


LINES: list[Case] = [
    refused("blank prompt", "must not be blank", line(prompt=" \t "), field="prompt"),
    refused("prompt of 100 kB", "at most 10000 characters", line(prompt="x" * 100_000), field="prompt"),
    refused("NUL in the prompt", "must not contain control characters", line(prompt="a\0b"), field="prompt"),
    refused("escape sequence in a prompt", "control characters", line(negative_prompt="\x1b[2J"), field="negative_prompt"),
    refused("carriage return in a prompt", "control characters", line(style_prompt="a\rb"), field="style_prompt"),
    refused("lone surrogate in the prompt", "unicode string", raw('{"prompt": "\\ud800"}'), field="prompt"),
    refused("lone surrogate in metadata", "plain JSON", raw('{"prompt": "a", "metadata": {"x": "\\ud800"}}'), field="metadata"),
    refused("id that leaves the folder", "must be 1 to 128 characters", line(id="../../etc/cron.d/x"), field="id"),
    refused("id of 300 characters", "must be 1 to 128 characters", line(id="x" * 300), field="id"),
    refused("hidden id", "without a dot at the start or end", line(id=".tmp-a"), field="id"),
    refused("id with escape sequences", "must be 1 to 128 characters", line(id="\x1b[2Ja"), field="id"),
    refused("id twice", "has the same id", line(id="good-0"), field="id"),
    refused("seed 2^64", "must be less than", line(seed=2**64), field="seed"),
    refused("seed true", "valid integer", line(seed=True), field="seed"),
    refused("seed with 5,000 digits", "must be a JSON object", raw('{"prompt": "a", "seed": ' + "1" * 5000 + "}")),
    refused("width 7", "multiple of 16", line(width=7), field="width"),
    refused("width NaN", "valid integer", raw('{"prompt": "a", "width": NaN}'), field="width"),
    refused("1,000,000 frames", "less than or equal to 256", line(num_frames=1_000_000), field="num_frames"),
    refused("1,000,000 variants", "less than or equal to 1000", line(variants=1_000_000), field="variants"),
    refused("choices for 10^9 shots", "must be at most 1000", line(prompt="{a|b|c}" * 19), field="prompt"),
    refused(
        "matrix of 10^9 shots",
        "must be at most 1000",
        line(matrix={name: [*range(1, 1001)] for name in ("seed", "fps", "motion_bucket_id")}),
        field="matrix",
    ),
    refused(
        "LoRA weight 1e9", "less than or equal to 2", line(lora=[{"path": "a.safetensors", "weight": 1e9}]), field="lora.weight"
    ),
    refused("photo as URL", "URLs are not read", line(face_image="http://169.254.169.254/x.png"), field="face_image"),
    refused("photo as device", "must be an existing file", line(face_image="/dev/zero"), field="face_image"),
    refused("path of 5,000 characters", "must be an existing file", line(image="x" * 5000), field="image"),
    refused("NUL in a path", "must be an existing file", line(image="a\0.png"), field="image"),
    refused("LoRA with another ending", "must be an existing .safetensors file", line(lora="/etc/passwd"), field="lora"),
    refused("unknown field", "did you mean prompt", line(promt="b"), field="promt"),
    refused("field twice", "must appear only once", raw('{"prompt": "a", "prompt": "b"}'), field="prompt"),
    refused(
        "100,000 fields, the last one twice",
        "must appear only once",
        raw("{" + "".join(f'"{n}": 1, ' for n in range(100_000)) + '"99999": 2}'),
        field="99999",
    ),
    refused("no prompt", "this field is required", lambda _: {"seed": 1}, field="prompt"),
    refused("100,000 brackets", "must be a JSON object", raw("[" * 100_000)),
    refused("metadata nested 300 times", "at most 200 levels", raw(nested(300)), field="metadata"),
    refused(
        "matrix nested 900 times",
        "at most 200 levels",
        raw('{"prompt": "a", "matrix": {"seed": ' + "[" * 900 + "1" + "]" * 900 + "}}"),
        field="matrix",
    ),
    refused("metadata NaN", "must be a finite number", raw('{"prompt": "a", "metadata": {"x": NaN}}'), field="metadata.x"),
    used("escape sequences in metadata", line(metadata={"x": "a\x1b[2J\x1b]0;owned\x07b"})),
    used("right-to-left override and ZWJ emoji", line(prompt="a \u202egpj.exe \U0001f469\u200d\U0001f680")),
    used("HTML and script", line(prompt="</script><script>alert(1)</script><img src=x onerror=alert(1)>")),
    used("template", line(prompt="{{7*7}} ${7*7} %s %(x)s {0.__class__}")),
    used("device name as id", line(id="CON")),
]


def parquet(**columns: Any):
    return lambda path: pq.write_table(pa.table(columns), path)


def extension_type(path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 2)))
    pq.write_table(pa.table({"prompt": ["a"], "metadata.x": tensors}), path)


RAY_TENSOR = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": "\x80\x04."}
"""Metadata of a column with Ray's tensor type, whose parameters earlier versions of Ray unpickled (CVE-2026-41486)."""


def ray_extension_type(path: Path) -> None:
    column = pa.field("metadata.x", pa.list_(pa.int64()), metadata=RAY_TENSOR)
    schema = pa.schema([pa.field("prompt", pa.string()), column])
    pq.write_table(pa.table({"prompt": ["a"], "metadata.x": [[1]]}, schema), path)


def inner_extension_type(path: Path) -> None:
    inner = pa.field("x", pa.list_(pa.int64()), metadata=RAY_TENSOR)
    schema = pa.schema([pa.field("prompt", pa.string()), pa.field("metadata", pa.list_(pa.struct([inner])))])
    pq.write_table(pa.table({"prompt": ["a"], "metadata": [[{"x": [1]}]]}, schema), path)


def column_name_in_latin_1(path: Path) -> None:
    parquet(**{"metadata.xx": ["a"], "prompt": ["a"]})(path)
    path.write_bytes(path.read_bytes().replace(b"metadata.xx", b"metadata.\xe4\xf6"))


def nested_column(levels: int):
    def build(path: Path) -> None:
        value = pa.array([1])
        for _ in range(levels):
            value = pa.StructArray.from_arrays([value], names=["x"])
        pq.write_table(pa.table({"prompt": ["a"], "metadata": value}), path)

    return build


def fields_of_yaml(count: int) -> bytes:
    return b"shots: [a]\n" + b"".join(b"f%d: 1\n" % n for n in range(count))


def billion_laughs() -> bytes:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'lol'}]" for n in range(10)]
    return "\n".join([*levels, "shots: [*a9]"]).encode()


SCRIPTS: list[Case] = [
    refused("YAML with a billion laughs", "aliases are not allowed", content(billion_laughs()), ending=".yaml"),
    refused("YAML with a Python object", "invalid YAML", content(b"!!python/object/apply:os.system ['true']"), ending=".yaml"),
    refused("YAML of 17 MB", "must be at most 16,777,216 bytes", content(lambda: b"#" * 17_000_000), ending=".yaml"),
    refused("YAML nested 2,000 times", "invalid YAML", content(b"shots: " + b"[" * 2000), ending=".yaml"),
    refused(
        "YAML number of base 60 with 20,000 digits",
        "more than 100 characters",
        content(b"shots: [{prompt: a, seed: 1" + b":1" * 20_000 + b"}]"),
        ending=".yaml",
    ),
    refused("YAML with 1,000 fields", "an unknown header field", content(fields_of_yaml(1000)), ending=".yaml"),
    refused("YAML in UTF-16", "not UTF-8", content("shots: [a]".encode("utf-16")), ending=".yaml"),
    refused("bytes that are not UTF-8", "line 2: got bytes that are not UTF-8", content(b"prompt\n\xff\xfe\n"), ending=".csv"),
    refused("line of 17 MB", "more than 16,777,216 characters", content(lambda: b"x" * 17_000_000), ending=".txt"),
    refused("CSV of 5,000 columns", "unknown columns", content(b",".join(b"c%d" % n for n in range(5000))), ending=".csv"),
    refused("CSV with a cell of 1 MB", "must be CSV", content(b"prompt\n" + b"x" * 1_000_000 + b"\n"), ending=".csv"),
    refused("CSV with an open quote", "a quote that opens here", content(b'prompt\n"a\nb\n'), ending=".csv"),
    refused(
        "truncated Parquet",
        "invalid Parquet",
        lambda path: (parquet(prompt=["a"])(path), path.write_bytes(path.read_bytes()[:-20])),
        ending=".parquet",
    ),
    refused("Parquet with an extension type", "got an extension type", extension_type, ending=".parquet"),
    refused("Parquet with Ray's tensor type", "got an extension type", ray_extension_type, ending=".parquet"),
    refused("Parquet with Ray's tensor type in a struct in a list", "extension type", inner_extension_type, ending=".parquet"),
    refused("Parquet with a column name in Latin-1", "invalid Parquet", column_name_in_latin_1, ending=".parquet"),
    refused(
        "Parquet with text that is not UTF-8",
        "a row that cannot be read",
        lambda path: pq.write_table(pa.table({"prompt": pa.array([b"\xff"]).view(pa.string())}), path),
        ending=".parquet",
    ),
    used(
        "JSONL with a byte order mark and CRLF", content(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n'), ending=".jsonl"
    ),
    refused("Parquet with a column nested 150 times", "must be a readable Parquet file", nested_column(150), ending=".parquet"),
]

PROFILES: list[Case] = [
    refused("pickle named .yaml", "is not UTF-8", content(b"\x80\x04cposix\nsystem\n(S'true'\ntR.")),
    refused("memory NaN", "memory_gb", content(b"{name: x, about: y, actors: {flux: {weights: a, memory_gb: .nan}}}")),
    refused("preset for the shell", "encode.preset", content(b"{name: x, about: y, encode: {preset: $(id)}, actors: {}}")),
]
