"""A second implementation of the face resampler, written from the published source as plain formulas."""

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


def published_shapes(depth: int, dim: int, inner: int, tokens: int, output: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of `image_proj` by name.

    `inner` is the number of channels of all heads, `hidden` that of a feed-forward layer.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, dim),
        "proj_in.weight": (dim, 512),
        "proj_in.bias": (dim,),
        "proj_out.weight": (output, dim),
        "proj_out.bias": (output,),
        "norm_out.weight": (output,),
        "norm_out.bias": (output,),
    }
    for n in range(depth):
        attention = {"to_q": (inner, dim), "to_kv": (2 * inner, dim), "to_out": (dim, inner)}
        shapes |= {f"layers.{n}.0.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"layers.{n}.1.1.weight": (hidden, dim), f"layers.{n}.1.3.weight": (dim, hidden)}
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{n}.{norm}.weight": (dim,), f"layers.{n}.{norm}.bias": (dim,)}
    return shapes
