"""Losses over a vocabulary, without keeping the logits of all tokens.

Letters: T tokens, W width of the model, V vocabulary.
"""
import torch
from torch import Tensor


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
