"""Hostile and damaged weights: LoRAs of script lines, and upscalers of the folder of a profile."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.hostile.case import Case, content, refused


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCode(path.with_name("RAN"))))


def pickled_checkpoint(path: Path) -> None:
    import torch

    torch.save({"params": RunsCode(path.with_name("RAN"))}, path)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensors(**shapes: tuple[int, ...]):
    return lambda path: save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)


def header(**spans: tuple[int, int]) -> bytes:
    """Return a header of float tensors of one element, each with its begin and end in the data."""
    return json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": span} for name, span in spans.items()}).encode()


LAYER = "transformer.single_transformer_blocks.0.attn.to_q"
UNREADABLE = "not a readable .safetensors file"


def large(path: Path) -> None:
    path.write_bytes(safetensors(header(a=(0, 4)), bytes(4)))
    os.truncate(path, 9 * 2**30)


LORAS: list[Case] = [
    refused("pickle named .safetensors", UNREADABLE, pickled),
    refused("torch checkpoint with code, named .safetensors", UNREADABLE, pickled_checkpoint),
    refused("empty file", UNREADABLE, content(b"")),
    refused("header of 2^63 bytes", "must be at most 16,777,216", content(safetensors(b"{}", length=2**63))),
    refused("header of 90 MB", "must be at most 16,777,216", content(safetensors(b"{}", length=90_000_000))),
    refused("header that is not JSON", UNREADABLE, content(safetensors(b"\xff" * 64))),
    refused("header nested 10,000 times", UNREADABLE, content(lambda: safetensors(b'{"a":' * 10_000 + b"0" + b"}" * 10_000))),
    refused("overlapping tensors", UNREADABLE, content(safetensors(header(a=(0, 4), b=(0, 4)), bytes(4)))),
    refused("tensor outside of the file", UNREADABLE, content(safetensors(header(a=(0, 4)), b""))),
    refused("offsets that do not fit the shape", UNREADABLE, content(safetensors(header(a=(0, 8)), bytes(8)))),
    refused("no tensors", "has no tensors", content(safetensors(b"{}"))),
    refused("file of 9 GB", "must have at most 8,589,934,592", large),
    refused(
        "factors of different rank",
        "have rank 4 and 8",
        tensors(**{f"{LAYER}.lora_A.weight": (4, 16), f"{LAYER}.lora_B.weight": (16, 8)}),
    ),
    refused("half of a layer", "one of its two factors only", tensors(**{f"{LAYER}.lora_A.weight": (4, 16)})),
    refused("keys of a whole model", "has no layers of a LoRA", tensors(**{"model.0.weight": (4, 4)})),
    refused(
        "LoRA of Stable Diffusion 1.5",
        "was trained for Stable Diffusion or SDXL",
        tensors(**{"lora_unet_down_blocks_0_attn.lora_up.weight": (4, 4)}),
    ),
]

UPSCALERS: list[Case] = [
    refused("pickle named .pth", "holds other objects than tensors", pickled, ending=".pth"),
    refused("torch checkpoint with code", "holds other objects than tensors", pickled_checkpoint, ending=".pth"),
    refused("empty .pth", "is damaged", content(b""), ending=".pth"),
    refused("damaged .safetensors", "cannot be loaded", content(b"\xff" * 64), ending=".safetensors"),
]
