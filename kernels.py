"""The operations that take most of the time, each in plain PyTorch behind one public function.

Where torch has a fused kernel that is faster, it is used: varlen attention and rms_norm on a GPU.
The rest is written so that a CPU is not slow and memory stays small: attention without padding,
losses without all their logits.

Letters: T tokens of a packed row, D documents in it, L length of a document, H query heads, G
key-value heads, C channels of a head, W width of the model, V vocabulary; N images, M texts and
E width of their vectors in sigmoid_loss.
"""
import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

try:    # a fused kernel for packed rows: CUDA only, and only in half precision
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with a backward of its own: F.rms_norm has no fused one on a CPU, and takes twice as
    long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        full = x.float()
        scale = (full.square().mean(-1, keepdim=True) + eps).rsqrt_()
        normal = full * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal.to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        normal, scale, weight = ctx.saved_tensors
        each = grad.float() * normal
        # the part of the gradient along x would change its length only, which the norm divides out
        along = each @ weight.float()[:, None] / len(weight)
        d_x = (grad * weight).float().addcmul(normal, along, value=-1).mul_(scale)
        d_weight = each.flatten(0, -2).sum(0)
        return d_x.to(grad.dtype), d_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension, rms in fp32. (..., W), (W,) -> (..., W)"""
    if x.requires_grad and x.device.type == "cpu":
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; all of one shape."""
    return F.silu(gate) * up


def angles(positions: Tensor, sections: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotary angles, with the frequencies of a head divided among several position axes.

    positions: integers, one row for each axis: (3, T) for t, h, w or (2, T) for h, w. sections: how
    many of the C/2 frequencies each axis gets, in contiguous blocks. Returns (T, C/2) in fp32.
    """
    half = sum(sections)
    frequency = theta ** -(torch.arange(half, device=positions.device) / half)
    axis = torch.repeat_interleave(torch.arange(len(sections), device=positions.device),
                                   torch.tensor(sections, device=positions.device))
    return positions[axis].T.float() * frequency


def rotary_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels i and i + C/2 as a pair, as the ViT does. x (T, H, C); cos, sin (T, C/2);
    returns (T, H, C)."""
    # (a, b) -> (a cos - b sin, b cos + a sin): x times cos, plus x with halves exchanged times sin.
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotary_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels 2i and 2i + 1 as a pair, as the decoder does. x (T, H, C); cos, sin
    (T, C/2); returns (T, H, C)."""
    # Two neighbours in memory are one complex number, and its rotation is one product. This takes a
    # seventh of the time of slices [..., 0::2] and [..., 1::2].
    numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    rotated = numbers * torch.complex(cos.float(), sin.float())[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


class Segments:
    """Where the documents of a packed row begin and end; made once a batch, used by every layer.

    On a GPU in half precision the varlen kernel reads `cu_seqlens` (D+1,) as it is. Elsewhere there
    is no such kernel, so documents of the same length become small dense batches (see `layout`).
    """

    def __init__(self, cu_seqlens: Tensor, causal: bool):
        self.causal, self.cu_seqlens = causal, cu_seqlens

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @functools.cached_property
    def layout(self) -> tuple[list[tuple[int, int]], Tensor | None]:
        """The dense batches as pairs (documents, length), and the place (T,) of each token when all
        batches are laid end to end; no places if all lengths are equal, since then the row itself
        is the only batch.

        Without a mask on padding, a batch can only hold documents of one length. Where attention is
        causal, lengths are first rounded up to multiples of 16, to make fewer batches: the padding
        comes after every real token, and causal attention does not look there. For bidirectional
        documents of 3, 2 and 3 tokens,

            row     a0 a1 a2 b0 b1 c0 c1 c2
            shapes  (1, 2), (2, 3)              one document of 2 tokens, then two of 3
            dense   b0 b1 | a0 a1 a2 | c0 c1 c2
            place   2 3 4 0 1 5 6 7             where a0, a1, ... c2 are in the line above

        and (shapes, place) is returned.
        """
        borders = self.cu_seqlens.cpu().long()
        starts, lengths = borders[:-1], borders.diff()
        if bool((lengths == lengths[0]).all()):
            return [(len(lengths), int(lengths[0]))], None
        room = (lengths + 15) // 16 * 16 if self.causal else lengths
        sizes, counts = room.unique(return_counts=True)
        order = room.argsort(stable=True)
        begins = torch.empty_like(room)
        begins[order] = room[order].cumsum(0) - room[order]
        place = torch.arange(int(borders[-1])) + torch.repeat_interleave(begins - starts, lengths)
        shapes = [(n, size) for n, size in zip(counts.tolist(), sizes.tolist()) if size]
        return shapes, place.to(self.cu_seqlens.device)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention inside each document of a packed row, scaled by C ** -0.5.

    q: (T, H, C); k, v: (T, G, C), where G divides H. Returns (T, H, C).
    """
    if q.is_cuda and varlen_attn is not None and q.dtype in (torch.bfloat16, torch.float16):
        cu, longest = segments.cu_seqlens, segments.longest
        window = (-1, 0) if segments.causal else (-1, -1)
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)
    shapes, place = segments.layout
    if place is not None:
        # Each token is copied to its place; the backward of index_copy is a plain gather.
        total = sum(n * size for n, size in shapes)
        q, k, v = (x.new_zeros(total, *x.shape[1:]).index_copy(0, place, x) for x in (q, k, v))
    parts = [x.split([n * size for n, size in shapes]) for x in (q, k, v)]
    outs = [_dense(*(x.unflatten(0, shape) for x in part), segments.causal).flatten(0, 1)
            for shape, part in zip(shapes, zip(*parts))]
    return outs[0] if place is None else torch.cat(outs).index_select(0, place)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of B documents of one length. q (B, L, H, C); k, v (B, L, G, C) -> (B, L, H, C)"""
    length, heads, groups = *q.shape[1:3], k.shape[2]
    if length > 512 or q.dtype == torch.float32:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=heads != groups).transpose(1, 2)
    # In bf16 torch's flash kernel for CPUs is slow: for short documents two matrix products and a
    # softmax are two to five times as fast. The r query heads that share a key head become rows of
    # one matrix, so that the keys need no copies.
    repeat = heads // groups
    q = rearrange(q * q.shape[-1] ** -0.5, "b l (g r) c -> (b g) (r l) c", r=repeat)
    k, v = (rearrange(x, "b l g c -> (b g) l c") for x in (k, v))
    scores = rearrange(q @ k.transpose(1, 2), "b (r l) m -> b r l m", r=repeat)
    if causal:
        scores.add_(torch.full((length, length), float("-inf"), device=q.device).triu(1))
    out = rearrange(scores.softmax(-1), "b r l m -> b (r l) m") @ v
    return rearrange(out, "(b g) (r l) c -> b l (g r) c", g=groups, r=repeat)


class _LinearCrossEntropy(torch.autograd.Function):
    """See linear_cross_entropy. The backward only scales gradients that the forward has made."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, chunk):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), chunk):
            h, t, w = hidden[i:i + chunk], targets[i:i + chunk, None], weights[i:i + chunk, None]
            logits = (h @ weight.T).float()
            right, top = logits.gather(1, t), logits.amax(-1, keepdim=True)
            powers = logits.sub_(top).exp_()
            mass = powers.sum(-1, keepdim=True)
            total += ((mass.log() + top - right) * w).sum()
            # d loss / d logits = (softmax - onehot) * w, made in place of the logits
            grad = powers.mul_(w / mass)
            grad.scatter_add_(1, t, -w)
            grad = grad.to(hidden.dtype)
            d_hidden[i:i + chunk] = grad @ weight
            d_weight += grad.T @ h
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        grads = d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype)
        return *grads, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor,
                         chunk: int = 0) -> Tensor:
    """sum_t weights[t] * -log softmax(hidden[t] @ weight.T)[targets[t]], an fp32 scalar, without
    keeping all T x V logits.

    hidden: (T, W); weight: (V, W); targets: (T,) int64; weights: (T,) fp32. Since the weights are
    known in the forward, the gradients are computed there, for `chunk` rows at a time: three matrix
    products, and never more than chunk x V logits (chunk 0: about 16 million).
    """
    chunk = chunk or max(64, 2 ** 24 // len(weight))
    used = weights.nonzero()[:, 0]  # rows of weight 0 take no time
    if len(used) < len(weights):
        hidden, targets, weights = hidden[used], targets[used], weights[used]
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, chunk)


class _LinearLogp(torch.autograd.Function):
    """See linear_logp. The backward computes the logits a second time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        logp = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(logp)
        for i in range(0, len(hidden), chunk):
            all_logp = (hidden[i:i + chunk] @ weight.T).float().log_softmax(-1)
            logp[i:i + chunk] = all_logp.gather(1, targets[i:i + chunk, None])[:, 0]
            entropy[i:i + chunk] = -(all_logp.exp() * all_logp).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk):
            h, g = hidden[i:i + ctx.chunk], grad[i:i + ctx.chunk, None]
            # d logp / d logits = onehot - softmax
            d_logits = (h @ weight.T).float().softmax(-1).mul_(-g)
            d_logits.scatter_add_(1, targets[i:i + ctx.chunk, None], g)
            d_logits = d_logits.to(h.dtype)
            d_hidden[i:i + ctx.chunk] = d_logits @ weight
            d_weight += d_logits.T @ h
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor,
                chunk: int = 0) -> tuple[Tensor, Tensor]:
    """log softmax(hidden[t] @ weight.T)[targets[t]] for each t, and the entropy of each softmax;
    both (T,) fp32.

    hidden: (T, W); weight: (V, W); targets: (T,) int64. For losses whose coefficients are known
    only after this forward (RL): the backward computes the logits again, so that there are four
    matrix products and never more than chunk x V logits (chunk 0: about 16 million). The entropy
    has no gradient.
    """
    return _LinearLogp.apply(hidden, weight, targets, chunk or max(64, 2 ** 24 // len(weight)))


class _SigmoidLoss(torch.autograd.Function):
    """See sigmoid_loss. The backward only scales gradients that the forward has made."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, paired, tile):
        x, y, scale, bias = (t.detach().float() for t in (x, y, scale, bias))
        total, d_scale, d_bias = (torch.zeros((), device=x.device) for _ in range(3))
        d_x, d_y = torch.zeros_like(x), torch.zeros_like(y)
        for i in range(0, len(x), tile):
            for j in range(0, len(y), tile):
                a, b = x[i:i + tile], y[j:j + tile]
                cosine = a @ b.T
                logits = cosine * scale + bias
                total += F.softplus(logits).sum()   # -log sigmoid(-logit), as if none were a pair
                grad = logits.sigmoid()
                if paired and i == j:
                    total -= logits.diagonal().sum()  # softplus(l) - l = -log sigmoid(l)
                    grad.diagonal().sub_(1)
                d_scale += (grad * cosine).sum()
                d_bias += grad.sum()
                d_x[i:i + tile].addmm_(grad, b)
                d_y[j:j + tile].addmm_(grad.T, a)
        ctx.grads = [d_x.mul_(scale), d_y.mul_(scale), d_scale, d_bias]
        return total

    @staticmethod
    def backward(ctx, grad):
        # The gradients are as large as the batch: they are scaled in place and then released.
        grads, ctx.grads = ctx.grads, None
        return *(made.mul_(grad) for made in grads), None, None


def sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, paired: bool = True,
                 tile: int = 1024) -> Tensor:
    """SigLIP's loss of N images against M texts, summed to an fp32 scalar, without keeping the
    N x M logits [C].

    x: (N, E), y: (M, E), with rows of length 1; scale, bias: scalars. The logit of x[i] and y[j] is
    their product times scale, plus bias. It adds -log sigmoid(logit) for a pair, which is i = j
    where `paired`, and -log sigmoid(-logit) otherwise. The gradients are computed in the forward,
    for tile x tile logits at a time.
    """
    return _SigmoidLoss.apply(x, y, scale, bias, paired, tile)


# Exercises. Delete the body, write it again, run the test.
# 1. rotary_pairs, from its docstring alone.
#    pytest tests/test_model.py -k rotations; 15 minutes.
# 2. _LinearCrossEntropy.forward: all gradients in one pass over chunks of rows, with never more
#    than `chunk` rows of logits. pytest tests/test_model.py -k linear_cross; 45 minutes.
# 3. _SigmoidLoss.forward, tile by tile, with all four gradients.
#    pytest tests/test_train_vit.py -k tiles; 30 minutes.
