"""The Triton kernel of ESRGAN's dense blocks: against spandrel's network in Triton's interpreter, and compiled for GPUs.

Both run in other processes, because Triton decides while it is imported whether it interprets.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton, which comes with torch for GPUs")

EQUAL = """
import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet
from vidgen_ray.nets.dense_blocks import DenseTrunk, supports

torch.manual_seed(0)
network = RRDBNet(num_blocks=1).eval()
assert supports(network)
for other in (RRDBNet(num_blocks=1, num_filters=32), RRDBNet(num_blocks=1, plus=True), torch.nn.Linear(1, 1)):
    assert not supports(other)
# No side is a multiple of the tile's.
with torch.inference_mode():
    for shape in ((2, 3, 9, 7), (1, 3, 5, 17)):
        pixels = torch.rand(shape)
        expected = network(pixels)
        assert expected.std() > 0.01
        assert (DenseTrunk(network)(pixels) - expected).abs().max() < 1e-5
    half = network.half()
    errors = [(run(pixels.half()).float() - expected).abs().mean() for run in (half, DenseTrunk(half))]
    # The kernel rounds less often than the network.
    assert 0 < errors[1] < 1.05 * errors[0], errors
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidgen_ray.nets import dense_blocks as module

names = module._convolve.arg_names
common = (module.BLOCK_CHANNELS, module.GROWTH, module.TILE_HEIGHT, module.TILE_WIDTH, module.SLOPE, module.RESIDUAL_SCALE)
for capability, instruction in ((80, "mma.sync"), (89, "mma.sync"), (90, "wgmma.mma_async")):
    for channels, outputs, kind in ((64, 32, 0), (192, 64, 2)):
        constants = dict(zip(names[7:], (channels, outputs, common[0], kind, *common[1:]), strict=True))
        types = dict.fromkeys(names[:5], "*fp16") | dict.fromkeys(names[5:7], "i32") | dict.fromkeys(constants, "constexpr")
        # As Triton finds them: buffers begin at multiples of 16 bytes.
        aligned = {(position,): [["tt.divisibility", 16]] for position in range(5)}
        fixed = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(module._convolve, signature=types, constexprs=fixed, attrs=aligned)
        kernel = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 4})
        assert instruction in kernel.asm["ptx"], capability
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared < 99 * 1024
"""


def run(code, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_kernel_equals_the_network_within_rounding():
    run(EQUAL, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernel_compiles_to_tensor_core_code_for_cards_with_and_without_wgmma(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
