"""A second implementation of the face resampler, written from the published source as plain formulas; digests of layouts."""

import hashlib

import torch
from torch.nn.functional import gelu, layer_norm

HEAD_CHANNELS = 64


def published_tokens(weights: dict[str, torch.Tensor], faces: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, n, output) of embeddings (B, 512), computed from the state dict."""
    rows = len(faces)
    heads = len(weights["layers.0.0.to_q.weight"]) // HEAD_CHANNELS

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def split_heads(x):
        return x.reshape(rows, -1, heads, HEAD_CHANNELS).transpose(1, 2)

    projected = (linear(faces, "proj_in") + weights["proj_in.bias"])[:, None]
    latents = weights["latents"].repeat(rows, 1, 1)
    depth = max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")) + 1
    for n in range(depth):
        attention, feed_forward = f"layers.{n}.0", f"layers.{n}.1"
        queries = norm(latents, f"{attention}.norm2")
        context = torch.cat([norm(projected, f"{attention}.norm1"), queries], 1)
        keys, values = linear(context, f"{attention}.to_kv").chunk(2, -1)
        scores = split_heads(linear(queries, f"{attention}.to_q")) @ split_heads(keys).transpose(-2, -1) / HEAD_CHANNELS**0.5
        attended = (torch.softmax(scores, -1) @ split_heads(values)).transpose(1, 2).reshape(*latents.shape[:2], -1)
        latents = latents + linear(attended, f"{attention}.to_out")
        hidden = gelu(linear(norm(latents, f"{feed_forward}.0"), f"{feed_forward}.1"))
        latents = latents + linear(hidden, f"{feed_forward}.3")
    return norm(linear(latents, "proj_out") + weights["proj_out.bias"], "norm_out")


def layout(network: torch.nn.Module) -> str:
    """Return a digest of the names and shapes of all tensors of a network, sorted by name."""
    tensors = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    return hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16]
