"""CogViT, the vision encoder, and the adapter that hands its patches to the decoder.

An image becomes a grid of patches, stored block-major: the four patches of each 2x2 block (a
*downsample group*) are neighbours in memory, so a cut at any multiple of four splits no group. All
images of a batch are one packed row; attention stays inside a frame.

Letters: P patches of all images, N images, F frames a patch (1 still, 2 video), p patch side,
W width, H heads, C width of a head, T vectors in one packed row.

Sizes and names are those of the released relative GLM-OCR [R]; the class defaults are its CogViT-L
with 403M parameters.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn, Tensor

from kernels import add_norm, angles, attention, norm_rotary, rms_norm, Segments, swiglu
from lib.memory import in_chunks, Memory, Runner
from lib.prefetch import send

# With --compile a block is one graph before attention and one after it. Attention itself is left
# out: its kernels are compiled already, and its plain version has other shapes in every batch.
attention = torch.compiler.disable(attention)

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
    """The size (h, w) to resize an image to: multiples of `unit` pixels, between min_tokens and
    max_tokens units in all.

    GLM's rounding [R]: each side to the nearest multiple; if that gives too many (few) tokens,
    scale both sides by the same factor and round down (up). It is computed in the same order as in
    transformers, since a rounding error can decide about a row. Raises ValueError if one side is
    more than 200 times the other.
    """
    if min(h, w) < 1 or max(h, w) > 200 * min(h, w):
        raise ValueError(f"an image of {w}x{h} pixels: no side may be 200 times the other")
    if min(h, w) < unit:        # enlarge a side that is shorter than one unit
        scale = max(unit / h, unit / w)
        h, w = int(h * scale), int(w * scale)
    rows, columns = round(h / unit), round(w / unit)
    if rows * columns > max_tokens:
        shrink = math.sqrt(h * w / (max_tokens * unit ** 2))
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (h, w))
        # A strip one unit high can't shrink in height, so it may still be too long. [O]
        rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * unit ** 2 / (h * w))
        rows, columns = (math.ceil(side * grow / unit) for side in (h, w))
    return rows * unit, columns * unit


def naflex(h: int, w: int, unit: int, budget: int) -> tuple[int, int]:
    """NaFlex's size (h, w) [R]: the largest scale at which the two sides, each rounded up to whole
    units, have a product of at most `budget` units. Raises like `fit`."""
    fit(h, w, unit, 1, budget)      # only for its check of the sides

    def most(a, b):
        """The largest number n of units along side a for which n times the units along side b, in
        proportion and rounded up, is at most `budget`."""
        n = min(budget, int(math.sqrt(budget * a / b)))
        while n * math.ceil(b * n / a) > budget:
            n -= 1
        return n

    # At the largest scale one of the sides is a whole number of units. Try both and take the larger
    # scale: rows / h or columns / w.
    rows, columns = most(h, w), most(w, h)
    if rows * w > columns * h:
        return rows * unit, math.ceil(w * rows / h) * unit
    return math.ceil(h * columns / w) * unit, columns * unit


def patchify(frames: np.ndarray, patch: int, merge: int = 2) -> tuple[np.ndarray, tuple]:
    """Cut one image, or the two frames of one temporal patch, into block-major patches.

    frames: (h, w, 3) or (F, h, w, 3) uint8, sides multiples of patch * merge.
    Returns patches (P, F, 3*p*p) uint8 and the grid (1, h/p, w/p).
    """
    frames = frames[None] if frames.ndim == 3 else frames
    # (y, x): the block in the image, (b, d): the patch in its block, (i, j): the pixel in its patch
    patches = rearrange(frames, "f (y b i) (x d j) c -> (y x b d) f (c i j)",
                        b=merge, d=merge, i=patch, j=patch)
    return patches, (1, frames.shape[1] // patch, frames.shape[2] // patch)


def patch_positions(grids: Tensor, merge: int = 2) -> Tensor:
    """Row and column of every patch, in stored order. grids (N, 3) -> (2, P) int64, on the CPU"""
    sizes = torch.repeat_interleave(grids[:, 1:], grids[:, 0], dim=0)   # of each frame, in patches
    areas = sizes.prod(1)
    width = torch.repeat_interleave(sizes[:, 1], areas)     # (P,): of the frame a patch belongs to
    # Patch n of its frame is patch `inside` of its block; a band is one row of blocks.
    n = torch.arange(len(width)) - torch.repeat_interleave(areas.cumsum(0) - areas, areas)
    inside, band = n % merge ** 2, merge * width
    rows = n // band * merge + inside // merge
    columns = n % band // merge ** 2 * merge + inside % merge
    return torch.stack([rows, columns])


# ---- the encoder ------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class PatchEmbed(nn.Module):
    """Conv3d with kernel = stride = (2, p, p): two frames make one patch [R]. Since patches do not
    overlap, it is a matrix product with each patch's pixels."""

    def __init__(self, c: VitConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, stride=kernel)
        self.area = c.patch_size ** 2
        self.set_normalisation()

    def set_normalisation(self):
        """CLIP's mean and std of each channel, in units of 0-255 and in the pixels' order: buffers
        that no checkpoint holds, so they are set again after loading."""
        for name, values in (("mean", MEAN), ("std", STD)):
            full = 255 * torch.tensor(values).repeat_interleave(self.area)
            self.register_buffer(name, full.to(self.proj.weight), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, F, 3*p*p) uint8 -> (P, W). A still image counts as two equal frames."""
        kernel = rearrange(self.proj.weight, "w c f i j -> f (c i j) w")
        pixels = ((patches.to(self.mean.dtype) - self.mean) / self.std).to(kernel.dtype)
        if patches.shape[1] == 1:   # the same as repeating the frame, with half the work
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
        qkv = rearrange(self.qkv(x), "t (n h c) -> t n h c", n=3, h=self.heads)
        q, k, v = norm_rotary(qkv, self.q_norm, self.k_norm, *rope)
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
        out = self.attn(self.norm1(x), rope, segments)
        x, normed = add_norm(out, x, self.norm2.weight, self.norm2.eps)
        return x + self.mlp(normed)


class Merger(VitMLP):
    """The adapter after the 2x2 convolution: Linear, LayerNorm, GELU, SwiGLU; no biases [R].

    The MLP is out_hidden_size * in_channels wide, three times its input. That looks like a mistake,
    as the number of colour channels has nothing to do with it, but it is a quirk of GLM's released
    adapter, and its weights have these shapes.
    """

    def __init__(self, c: VitConfig):
        super().__init__(c.out_hidden_size, c.out_hidden_size * c.in_channels, bias=False)
        self.proj = nn.Linear(c.out_hidden_size, c.out_hidden_size, bias=False)
        self.post_projection_norm = nn.LayerNorm(c.out_hidden_size)

    def forward(self, x):
        return super().forward(F.gelu(self.post_projection_norm(self.proj(x))))


class AttentionPool(nn.Module):
    """One vector a segment: a learnt query for each head attends to the segment's tokens [O]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.query = heads, nn.Parameter(torch.randn(width))
        # Keys need no bias: it would add the same to all scores, which a softmax ignores.
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (T, W): N segments, one after the other; their lengths (N,), on the CPU -> (N, W)

        A softmax over each segment, without padding: lengths (3, 2) make segment (0, 0, 0, 1, 1),
        and sums over a segment are `index_add` into row segment[t].
        """
        n = len(lengths)
        segment = send(torch.repeat_interleave(lengths), x.device)      # (T,): of each token
        split = "... (h c) -> ... h c"
        q = rearrange(self.query.float(), split, h=self.heads)          # (H, C), the same for all
        k = rearrange(self.k_proj(x).float(), split, h=self.heads)      # (T, H, C)
        v = rearrange(self.v_proj(x).float(), split, h=self.heads)      # (T, H, C)
        scores = (q * k).sum(-1) * q.shape[-1] ** -0.5                  # (T, H)
        # Subtract each segment's largest score: exp can't overflow, and the result is the same.
        top = scores.detach().new_full((n, self.heads), float("-inf"))  # (N, H)
        index = segment[:, None].expand_as(scores)                      # (T, H)
        top = top.scatter_reduce(0, index, scores.detach(), "amax")     # (N, H)
        weights = (scores - top[segment]).exp()                         # (T, H), not yet divided
        total = weights.new_zeros(n, self.heads).index_add(0, segment, weights)             # (N, H)
        pooled = v.new_zeros(n, *v.shape[1:]).index_add(0, segment, weights[..., None] * v)
        pooled = pooled / total[..., None]                              # (N, H, C)
        return self.o_proj(rearrange(pooled, "n h c -> n (h c)").to(x.dtype))


class CogViT(nn.Module):
    """Encodes the patches of many images into one vector each; `merge` makes the decoder's tokens.

    Positions are 2D axial rotary angles only: no learnt table, no class token, no registers [R].
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
        self.memory = Memory()      # what the backward keeps, set by the training scripts

    def forward(self, patches: Tensor, grids: Tensor, mask: Tensor | None = None,
                token: Tensor | None = None) -> Tensor:
        """patches (P, F, 3*p*p) uint8, grids (N, 3) -> features (P, W) after the last norm.

        grids are on the CPU, where sizes are needed. mask (P,) bool: hidden patches, whose
        embedding is replaced by `token` (W,).
        """
        parameters = [*self.parameters(), *([] if token is None else [token])]
        return in_chunks(functools.partial(self.encode, token), parameters,
                         self.memory.chunk_patches, patches, grids, mask)

    def encode(self, token, patches, grids, mask):
        """`forward` for the images of one chunk."""
        c, grids = self.config, grids.cpu()     # on a GPU, the host would have to wait for them
        # A head of width C has C/2 angles: C/4 for the row and C/4 for the column, both with the
        # same frequencies.
        quarter = c.hidden_size // c.num_heads // 4
        h, w = send(patch_positions(grids, c.spatial_merge_size), patches.device)
        freqs = torch.cat([angles(axis[None], (quarter,)) for axis in (h, w)], dim=-1)
        rope = freqs.cos(), freqs.sin()
        # Every frame is a segment of its own: attention stays inside a frame.
        areas = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
        borders = F.pad(areas.cumsum(0), (1, 0)).int()
        segments = Segments(send(borders, patches.device), causal=False, host=borders)
        x = self.patch_embed(patches)
        if mask is not None:
            x = torch.where(mask[:, None], token.to(x.dtype), x)
        run = Runner(self.memory.vit)
        for block in self.blocks:
            x = run(block, x, rope, segments)
        return self.post_layernorm(x)

    def merge(self, features: Tensor) -> Tensor:
        """(P, W) -> (P/4, out_hidden_size): each downsample group becomes one token of the decoder.
        """
        parameters = *self.downsample.parameters(), *self.merger.parameters()
        return Runner(self.memory.adapter)(self.adapter, features, parameters=parameters)

    def adapter(self, features):
        """The 2x2 convolution is a matrix product: a group's patches are neighbours in memory."""
        merge = self.config.spatial_merge_size
        groups = rearrange(features, "(n b d) w -> n (w b d)", b=merge, d=merge)
        tokens = F.linear(groups, self.downsample.weight.flatten(1), self.downsample.bias)
        return self.merger(tokens)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade patchify`.
# 1. patchify: one einops pattern that makes the four patches of a 2x2 group neighbours.
#    pytest tests/test_model.py -k block_major; 15 minutes.
# 2. VitAttention.forward: agreement with transformers to 1e-4; it needs requirements-peers.txt.
#    pytest tests/test_parity.py -k tower; 30 minutes.
