"""CogViT, the vision encoder, and the adapter that hands its patches to the decoder.

An image becomes a grid of patches, stored block-major: the four patches of each 2x2 block (a
*downsample group*) are neighbours, so that any cut on a multiple of four is a clean cut. All
images of a batch are one packed row; attention stays inside a frame.

Letters: P patches of all images, N images, F frames a patch (1 still, 2 video), p patch side,
W width, H heads, C width of a head.

The sizes and names are those of the released relative GLM-OCR [R]; the class defaults are its
CogViT-L, 403M parameters.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn, Tensor

from kernels import angles, attention, rms_norm, rotary_half, Segments, swiglu

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's [R]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class VitConfig:
    """Field names are those of GLM-OCR's vision_config, so that config.json reads both ways."""
    depth: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 1536
    in_channels: int = 3
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True


# ---- from pixels to patches -------------------------------------------------------------------

def fit(h: int, w: int, unit: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """The size an image is given: multiples of `unit` pixels, min_tokens..max_tokens units in all.

    GLM's rounding [R]: each side to the nearest multiple; if that is too many (few) tokens, scale
    both sides by the same factor and round down (up). Raises ValueError on an aspect over 200.
    """
    if min(h, w) < 1 or max(h, w) > 200 * min(h, w):
        raise ValueError(f"an image of {w}x{h} pixels: no side may be 200 times the other")
    grown = max(1.0, unit / min(h, w))  # in units, and at least one unit each way
    high, wide = h * grown / unit, w * grown / unit
    rows, columns = round(high), round(wide)
    if rows * columns > max_tokens:
        shrink = math.sqrt(max_tokens / (high * wide))
        rows, columns = (max(1, math.floor(side * shrink)) for side in (high, wide))
        # A strip that is one unit high may still be too long [O].
        rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens / (high * wide))
        rows, columns = math.ceil(high * grow), math.ceil(wide * grow)
    return rows * unit, columns * unit


def naflex(h: int, w: int, unit: int, budget: int) -> tuple[int, int]:
    """NaFlex's size [R]: the largest scale at which both sides, each rounded up to whole units,
    have no more than `budget` units between them. Raises as `fit` does."""
    fit(h, w, unit, 1, budget)

    def most(a, b):  # units along side a, when side b follows in proportion and is rounded up
        n = min(budget, int(math.sqrt(budget * a / b)))
        while n * math.ceil(b * n / a) > budget:
            n -= 1
        return n

    rows, columns = most(h, w), most(w, h)
    if rows * w > columns * h:  # the larger scale is the one to take
        return rows * unit, math.ceil(w * rows / h) * unit
    return math.ceil(h * columns / w) * unit, columns * unit


def patchify(frames: np.ndarray, patch: int, merge: int = 2) -> tuple[np.ndarray, tuple]:
    """Cut one image, or the two frames of one temporal patch, into block-major patches.

    frames: (h, w, 3) or (F, h, w, 3) uint8, sides multiples of patch * merge.
    Returns patches (P, F, 3*p*p) uint8 and the grid (1, h/p, w/p).
    """
    frames = frames[None] if frames.ndim == 3 else frames
    patches = rearrange(frames, "f (y b i) (x d j) c -> (y x b d) f (c i j)",
                        b=merge, d=merge, i=patch, j=patch)
    return patches, (1, frames.shape[1] // patch, frames.shape[2] // patch)


def patch_positions(grids: Tensor, merge: int = 2) -> Tensor:
    """Row and column of every patch, in stored order. grids (N, 3) -> (2, P)"""
    rows = []
    for t, h, w in grids.tolist():
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        order = "(y b) (x d) -> (y x b d)"
        one = torch.stack([rearrange(axis, order, b=merge, d=merge) for axis in (y, x)])
        rows.append(one.repeat(1, t))
    return torch.cat(rows, dim=1).to(grids.device)


# ---- the encoder ------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class PatchEmbed(nn.Module):
    """Conv3d with kernel = stride = (2, p, p): two frames make one patch [R]."""

    def __init__(self, c: VitConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, stride=kernel)
        self.area = c.patch_size ** 2
        self.set_normalisation()

    def set_normalisation(self):
        """CLIP's mean and deviation a pixel, in units of 0-255; no checkpoint holds these."""
        for name, values in (("mean", MEAN), ("std", STD)):
            full = 255 * torch.tensor(values).repeat_interleave(self.area)
            self.register_buffer(name, full.to(self.proj.weight), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, F, 3*p*p) uint8 -> (P, W). A still image counts as two equal frames."""
        kernel = rearrange(self.proj.weight, "w c f i j -> f (c i j) w")
        pixels = ((patches.to(self.mean.dtype) - self.mean) / self.std).to(kernel.dtype)
        if patches.shape[1] == 1:  # the same as doubling the image, at half the work
            return pixels[:, 0] @ kernel.sum(0) + self.proj.bias
        return torch.einsum("pfx,fxw->pw", pixels, kernel) + self.proj.bias


class VitAttention(nn.Module):
    """Fused qkv; RMSNorm per head on q and k *before* the rotary embedding (QK-Norm) [C]."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.attention_bias)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.hidden_size // c.num_heads, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.hidden_size // c.num_heads, c.rms_norm_eps)

    def forward(self, x, rope, segments):
        q, k, v = rearrange(self.qkv(x), "t (n h c) -> n t h c", n=3, h=self.heads)
        q, k = rotary_half(self.q_norm(q), *rope), rotary_half(self.k_norm(k), *rope)
        return self.proj(rearrange(attention(q, k, v, segments), "t h c -> t (h c)"))


class VitMLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class VitBlock(nn.Module):
    def __init__(self, c: VitConfig):
        super().__init__()
        self.norm1 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.norm2 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = VitAttention(c)
        self.mlp = VitMLP(c.hidden_size, c.intermediate_size, c.attention_bias)

    def forward(self, x, rope, segments):
        x = x + self.attn(self.norm1(x), rope, segments)
        return x + self.mlp(self.norm2(x))


class Merger(VitMLP):
    """The adapter after the 2x2 convolution: Linear, LayerNorm, GELU, SwiGLU; no biases [R]."""

    def __init__(self, c: VitConfig):
        super().__init__(c.out_hidden_size, c.out_hidden_size * c.in_channels, bias=False)
        self.proj = nn.Linear(c.out_hidden_size, c.out_hidden_size, bias=False)
        self.post_projection_norm = nn.LayerNorm(c.out_hidden_size)

    def forward(self, x):
        return super().forward(F.gelu(self.post_projection_norm(self.proj(x))))


class AttentionPool(nn.Module):
    """One vector a segment: a learnt query for each head looks at all of it [O]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.query = heads, nn.Parameter(torch.randn(width))
        self.k_proj = nn.Linear(width, width, bias=False)  # a bias would shift all scores alike
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (T, W), lengths (N,) of the segments -> (N, W)"""
        n, which = len(lengths), torch.repeat_interleave(lengths)
        q, k, v = (rearrange(y.float(), "... (h c) -> ... h c", h=self.heads)
                   for y in (self.query, self.k_proj(x), self.v_proj(x)))
        scores = (q * k).sum(-1) * q.shape[-1] ** -0.5  # (T, H)
        top = scores.detach().new_full((n, self.heads), float("-inf"))
        top = top.scatter_reduce(0, which[:, None].expand_as(scores), scores.detach(), "amax")
        weights = (scores - top[which]).exp()
        mass = weights.new_zeros(n, self.heads).index_add(0, which, weights)
        pooled = v.new_zeros(n, *v.shape[1:]).index_add(0, which, weights[..., None] * v)
        return self.o_proj(rearrange(pooled / mass[..., None], "n h c -> n (h c)").to(x.dtype))


class CogViT(nn.Module):
    """Patches of many images in, one vector a patch out; `merge` makes the decoder's tokens.

    2D axial rotary positions only: no learned table, no class token, no registers [R].
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([VitBlock(config) for _ in range(config.depth)])
        self.post_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        merge = config.spatial_merge_size
        self.downsample = nn.Conv2d(config.hidden_size, config.out_hidden_size, merge, stride=merge)
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grids: Tensor, mask: Tensor | None = None,
                token: Tensor | None = None) -> Tensor:
        """patches (P, F, 3*p*p) uint8, grids (N, 3) -> features (P, W) after the last norm.

        mask (P,) bool: these patches are hidden, `token` (W,) stands in place of their embedding.
        """
        c = self.config
        quarter = c.hidden_size // c.num_heads // 4  # a quarter of a head's dim: its h frequencies
        # Both axes use the same frequencies, so each gets its own table of a quarter of the head.
        h, w = patch_positions(grids, c.spatial_merge_size)
        freqs = torch.cat([angles(axis[None], (quarter,)) for axis in (h, w)], dim=-1)
        rope = freqs.cos(), freqs.sin()
        frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
        segments = Segments(F.pad(frames.cumsum(0), (1, 0)).int(), causal=False)
        x = self.patch_embed(patches)
        if mask is not None:
            x = torch.where(mask[:, None], token.to(x.dtype), x)
        for block in self.blocks:
            x = block(x, rope, segments)
        return self.post_layernorm(x)

    def merge(self, features: Tensor) -> Tensor:
        """(P, W) -> (P/4, out): each downsample group becomes one token of the decoder's width."""
        merge = self.config.spatial_merge_size
        groups = rearrange(features, "(n b d) w -> n (w b d)", b=merge, d=merge)
        tokens = F.linear(groups, self.downsample.weight.flatten(1), self.downsample.bias)
        return self.merger(tokens)


# Exercises. Delete the body, write it again, run the test.
# 1. patchify: one einops pattern that makes the four patches of a 2x2 group neighbours.
#    pytest tests/test_model.py -k block_major; 15 minutes.
# 2. VitAttention.forward. pytest tests/test_parity.py -k tower (needs requirements-peers.txt):
#    agreement with transformers to 1e-4; 30 minutes.
