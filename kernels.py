"""The operations that take most of the time, each in plain PyTorch behind one public function.

Where torch has a fused kernel that is faster, it is used: varlen attention and rms_norm on a GPU.
The rest is written so that a CPU is not slow and memory stays small: attention without padding,
losses without all their logits.

Attention and rotary positions are in lib/attention.py and can be imported from here too.

Letters: T tokens of a packed row, W width of the model, V vocabulary; N images, M texts and E width
of their vectors in sigmoid_loss.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.attention import angles, attention, rotary_half, rotary_pairs, Segments


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
