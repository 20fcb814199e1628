"""The operations that take most of the time, each in plain PyTorch behind one public function.

Where torch has a fused kernel that is faster, it is used: varlen attention and rms_norm on a GPU.
The rest is written so that a CPU is not slow and memory stays small: attention without padding,
losses without all their logits.

Attention and rotary positions are in lib/attention.py, losses over a vocabulary in lib/losses.py;
they can be imported from here too.

Letters: T tokens of a packed row, W width of the model; N images, M texts and E width of their
vectors in sigmoid_loss.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.attention import angles, attention, rotary_half, rotary_pairs, Segments
from lib.losses import linear_cross_entropy, linear_logp


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
