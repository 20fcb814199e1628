"""Muon for the matrices, AdamW for the rest, and the learning rate schedules.

A gradient matrix is mostly made of a few directions: its first singular values are far larger than
the others. SGD moves the weights along those few only. Muon keeps the singular vectors of the
momentum, U S V^T, and sets all singular values to about 1: U V^T. So rare directions learn as fast
as common ones. An exact SVD is slow; Newton-Schulz gets there with matrix products alone [C]: a
polynomial of X like a X + b X X^T X + c X X^T X X^T X leaves the singular vectors as they are and
applies s -> a s + b s^3 + c s^5 to each singular value s.

U V^T of an R x C matrix has entries of RMS 1 / sqrt(max(R, C)). Times 0.2 sqrt(max(R, C)) they have
RMS 0.2, as AdamW's updates typically do, so that one learning rate and one weight decay serve both
[R: Moonlight]. A fused weight such as qkv is three matrices in one tensor: each is made orthogonal
by itself, or the one with the largest gradient would take most of the update [R].
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class OptimConfig:
    """Settings of the optimizer. In `scales` and `decays` the first prefix that matches a
    parameter's name counts."""
    lr: float = 4e-3            # at the end of warm-up; Muon and AdamW alike
    weight_decay: float = 0.05  # on matrices; norms and biases have none
    momentum: float = 0.95      # Muon's, with Nesterov's step [R: Moonlight]
    betas: tuple = (0.9, 0.95)  # AdamW's; 0.95 as for language models, not PyTorch's 0.999
    clip: float = 1.0           # largest norm of the gradient of all parameters together
    scales: tuple = ()  # factors on lr: ((name prefix, factor), ...), e.g. (("model.visual", 0.1),)
    decays: tuple = ()  # weight decay in place of the above: ((name prefix, weight decay), ...)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Make matrices nearly orthogonal, with the singular vectors of x. (..., R, C) -> (..., R, C)

    Five rounds of s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 bring the singular values to about
    0.7-1.2 [C]: the steep start at 0 lifts small values quickly, and exactly 1 is not needed. In
    bf16 on a GPU, in fp32 on a CPU.
    """
    x = x.bfloat16() if x.is_cuda else x.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x             # x @ x.mT is then the smaller of the two squares
    # The Frobenius norm is at least the largest singular value, so all values are now at most 1,
    # where the polynomial converges.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    return x.mT if tall else x


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon updates this parameter: a matrix from hidden states to hidden states. AdamW
    updates embeddings, norms and biases [R: GLM-4.5], and patch embedding and output head [O]."""
    ends = ("embed_tokens", "lm_head", "patch_embed")
    return p.ndim >= 2 and not any(end in name for end in ends)


def fused_parts(name: str) -> int:
    """How many matrices are stacked in one weight; each is made orthogonal by itself [R]."""
    if name.endswith("qkv.weight"):
        return 3
    return 2 if "gate_up_proj" in name else 1


class Optimizer:
    """Muon and AdamW over one model, with fp32 master weights and a flat fp32 gradient buffer.

    A model in bf16 cannot hold small updates: near 1 its next number is 0.8% away. So the exact
    weights, the masters, are here. After each backward pass `accumulate` adds the gradients to the
    buffer in fp32; `step` updates the masters and copies them, rounded, into the model. The buffer
    is one flat tensor so that summing it over ranks is a single all-reduce.
    """

    def __init__(self, named_parameters, config: OptimConfig):
        self.config = config
        self.params = {n: p for n, p in named_parameters if p.requires_grad}
        device = next(iter(self.params.values())).device
        sizes = [p.numel() for p in self.params.values()]
        self.flat_grad = torch.zeros(sum(sizes), device=device)
        self.grads = self._views(self.flat_grad)
        self.flat = torch.cat([p.detach().float().flatten() for p in self.params.values()])
        self.masters = self._views(self.flat)
        self.muon = [n for n, p in self.params.items() if is_matrix(n, p)]
        self.momenta = {n: torch.zeros_like(self.masters[n]) for n in self.muon}
        # Matrices of one shape go through Newton-Schulz in one batched product.
        self.shapes = defaultdict(list)     # (rows, columns) of a part -> [(name, parts), ...]
        for name in self.muon:
            matrix = self.masters[name].flatten(1)
            parts = fused_parts(name)
            self.shapes[(matrix.shape[0] // parts, matrix.shape[1])].append((name, parts))
        param_groups = defaultdict(list)    # (scale, weight decay) -> masters that AdamW updates
        for name in self.params:
            if name in self.momenta:
                continue
            self.masters[name].grad = self.grads[name]      # AdamW reads the buffer's views
            decay = self._decay(name) if self.params[name].ndim >= 2 else 0.0
            param_groups[self._scale(name), decay].append(self.masters[name])
        # eps is far below any gradient, so that rarely seen tokens, too, move at the full rate.
        self.adam = torch.optim.AdamW(
            [{"params": p, "weight_decay": d, "scale": s} for (s, d), p in param_groups.items()],
            lr=config.lr, betas=config.betas, eps=1e-10, fused=True)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """{parameter's name: its part of a flat tensor, in its shape}"""
        views, offset = {}, 0
        for name, p in self.params.items():
            views[name] = flat[offset:offset + p.numel()].view(p.shape)
            offset += p.numel()
        return views

    def _scale(self, name: str) -> float:
        return next((f for prefix, f in self.config.scales if name.startswith(prefix)), 1.0)

    def _decay(self, name: str) -> float:
        return next((d for prefix, d in self.config.decays if name.startswith(prefix)),
                    self.config.weight_decay)

    def accumulate(self):
        """Add the parameters' gradients to the fp32 buffer and clear them."""
        have = [(self.grads[n], p) for n, p in self.params.items() if p.grad is not None]
        torch._foreach_add_([g for g, _ in have], [p.grad.float() for _, p in have])
        for _, p in have:
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float, apply: bool = True, skip_prefix: str = "",
             process_group=None) -> float:
        """One update at `rate` times the configured learning rate. Returns the gradient's norm.

        The gradient is the buffer, summed over ranks; it is zero afterwards. If its norm is not
        finite, or without `apply`, weights and momenta stay as they are.
        skip_prefix: skip parameters whose names begin with this prefix: they have no gradient yet
        (an MTP head before its part of the run), and Newton-Schulz takes as long on zeros.
        process_group: the ranks that train, if not all do.
        """
        if dist.is_initialized():
            dist.all_reduce(self.flat_grad, group=process_group)
        norm = self.flat_grad.norm().item()
        if apply and math.isfinite(norm):
            c = self.config
            if norm > c.clip:
                self.flat_grad.mul_(c.clip / norm)
            for shape, members in self.shapes.items():
                if skip_prefix:
                    members = [m for m in members if not m[0].startswith(skip_prefix)]
                if members:
                    self._muon(shape, members, rate)
            for param_group in self.adam.param_groups:
                param_group["lr"] = c.lr * rate * param_group["scale"]
            self.adam.step()
            torch._foreach_copy_(list(self.params.values()), list(self.masters.values()))
        self.flat_grad.zero_()
        return norm

    def _muon(self, shape, members, rate):
        """Muon's update of all matrices whose parts have one shape; members: [(name, parts)]."""
        c, updates = self.config, []
        for name, parts in members:
            grad, momentum = self.grads[name], self.momenta[name]
            momentum.mul_(c.momentum).add_(grad)
            nesterov = grad + c.momentum * momentum     # one momentum step ahead
            updates += nesterov.flatten(1).chunk(parts)
        size = 0.2 * math.sqrt(max(shape))              # entries of RMS 0.2, see the top
        orthogonal = (newton_schulz(torch.stack(updates)).float() * size).unbind()
        first = 0
        for name, parts in members:
            lr, master = c.lr * rate * self._scale(name), self.masters[name]
            master.mul_(1 - lr * self._decay(name))     # decoupled decay, as AdamW's
            update = torch.cat(orthogonal[first:first + parts])
            master.sub_(update.view_as(master), alpha=lr)
            first += parts

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the fp32 weights, which are the masters."""
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict):
        """Take over momenta from `state_dict`; the masters come from load_masters."""
        for name, value in state["momenta"].items():
            self.momenta[name].copy_(value)
        # AdamW would also take over the saved settings; those of this run's options count.
        own = [(g["weight_decay"], g["scale"]) for g in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        for param_group, (decay, scale) in zip(self.adam.param_groups, own):
            param_group.update(weight_decay=decay, scale=scale)

    @torch.no_grad()
    def load_masters(self, weights: dict[str, Tensor]):
        """Copy fp32 weights, by name, into the masters and into the model."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
            self.params[name].copy_(master)


def schedule(step: int, steps: int, warmup: int, kind: str = "linear", decay: float = 0.4) -> float:
    """The factor on the learning rate at `step`, which counts from 0.

    It rises over `warmup` steps, then: constant: stays at 1; linear: stays at 1, then falls to 0
    over the last `decay` of the steps [O]; cosine: falls to 0.1 [R: GLM-4.5]. Raises ValueError on
    another kind.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return min(1.0, (steps - step) / max(1.0, steps * decay))
    if kind == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))
    raise ValueError(f"schedule is constant, linear or cosine, not '{kind}'")


# Exercises. Delete the body, write it again, run the test.
# 1. newton_schulz. pytest tests/test_optim.py -k newton; 20 minutes.
# 2. Let is_matrix return False, so that AdamW updates everything, and train 800 steps with
#    --lr=2e-3 and, for comparison, with Muon; 5 minutes each. How many steps later does the model
#    begin to read?
