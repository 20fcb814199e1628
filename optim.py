"""Muon for the matrices, AdamW for the rest, and the schedules.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction of the
update has the same size. Newton-Schulz finds it with five matrix products [C]; the update is
scaled to the RMS of a typical AdamW step, so that one learning rate serves both [R: Moonlight].
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class OptimConfig:
    """Rates are for the end of warm-up; `scales` multiplies them and `decays` replaces the weight
    decay by module, first match wins."""
    lr: float = 4e-3
    weight_decay: float = 0.05
    momentum: float = 0.95
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0
    scales: tuple = ()  # ((name prefix, factor), ...), e.g. (("model.visual", 0.1),)
    decays: tuple = ()  # ((name prefix, weight decay), ...)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of x. (..., R, C) -> (..., R, C)

    The quintic with (3.4445, -4.7750, 2.0315) drives singular values into about 0.7-1.2 [C]. On a
    GPU in bf16, on a CPU in fp32.
    """
    x = x.bfloat16() if x.is_cuda else x.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    return x.mT if tall else x


def is_matrix(name: str, p: Tensor) -> bool:
    """Muon takes what maps hidden states to hidden states. Embeddings, norms and biases go to
    AdamW [R: GLM-4.5]; so do the two ends, patch embedding and output head [O]."""
    ends = ("embed_tokens", "lm_head", "patch_embed")
    return p.ndim >= 2 and not any(end in name for end in ends)


def fused_parts(name: str) -> int:
    """How many matrices stand stacked in one weight: each is orthogonalised by itself [R]."""
    return 3 if name.endswith("qkv.weight") else 2 if "gate_up_proj" in name else 1


class Optimizer:
    """Muon and AdamW over one model, with fp32 masters and one flat fp32 gradient buffer.

    A model in bf16 keeps its true weights here: `accumulate` adds each micro-batch's gradients to
    the buffer in fp32, `step` updates the masters and copies them back. The buffer is flat so that
    data parallelism is a single all-reduce.
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
        self.shapes = defaultdict(list)  # matrices of one shape go through Newton-Schulz together
        for name in self.muon:
            matrix = self.masters[name].flatten(1)
            parts = fused_parts(name)
            self.shapes[(matrix.shape[0] // parts, matrix.shape[1])].append((name, parts))
        rest = [n for n in self.params if n not in self.momenta]
        for name in rest:  # AdamW reads the buffer's views
            self.masters[name].grad = self.grads[name]
        groups = defaultdict(list)
        for name in rest:
            decay = self._decay(name) if self.params[name].ndim >= 2 else 0.0
            groups[self._scale(name), decay].append(self.masters[name])
        self.adam = torch.optim.AdamW(
            [{"params": p, "weight_decay": d, "scale": s} for (s, d), p in groups.items()],
            lr=config.lr, betas=config.betas, eps=1e-10, fused=True)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
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
    def step(self, rate: float, apply: bool = True, skip_prefix: str = "", process_group=None) -> float:
        """One update at `rate` times the configured learning rate, from the collected gradients,
        summed over ranks. Returns the gradient norm; if that isn't finite, or without `apply`,
        nothing is changed. idle: matrices whose names begin so are left out; nobody uses them
        yet, and Newton-Schulz on zeros takes as long as any. group: the ranks that train, if not
        all do."""
        if dist.is_initialized():
            dist.all_reduce(self.flat_grad, group=process_group)
        norm = self.flat_grad.norm().item()
        if apply and math.isfinite(norm):
            c = self.config
            if norm > c.clip:
                self.flat_grad.mul_(c.clip / norm)
            for shape, members in self.shapes.items():
                busy = [m for m in members if not skip_prefix or not m[0].startswith(skip_prefix)]
                if busy:
                    self._muon(shape, busy, rate)
            for group in self.adam.param_groups:
                group["lr"] = c.lr * rate * group["scale"]
            self.adam.step()
            torch._foreach_copy_(list(self.params.values()), list(self.masters.values()))
        self.flat_grad.zero_()
        return norm

    def _muon(self, shape, members, rate):
        c, updates = self.config, []
        for name, parts in members:
            grad, momentum = self.grads[name], self.momenta[name]
            momentum.mul_(c.momentum).add_(grad)
            nesterov = grad + c.momentum * momentum
            updates += nesterov.flatten(1).chunk(parts)
        size = 0.2 * math.sqrt(max(shape))  # RMS 0.2 an element
        ortho = (newton_schulz(torch.stack(updates)).float() * size).unbind()
        at = 0
        for name, parts in members:
            lr, master = c.lr * rate * self._scale(name), self.masters[name]
            master.mul_(1 - lr * self._decay(name))
            master.sub_(torch.cat(ortho[at:at + parts]).view_as(master), alpha=lr)
            at += parts

    def state_dict(self) -> dict:
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict):
        """The masters are not here: they are the checkpoint's fp32 weights."""
        for name, value in state["momenta"].items():
            self.momenta[name].copy_(value)
        own = [(group["weight_decay"], group["scale"]) for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        for group, (decay, scale) in zip(self.adam.param_groups, own):  # the options may be others
            group.update(weight_decay=decay, scale=scale)

    @torch.no_grad()
    def load_masters(self, weights: dict[str, Tensor]):
        """Take fp32 weights by name and copy them into the model."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
            self.params[name].copy_(master)


def schedule(step: int, steps: int, warmup: int, kind: str = "linear", decay: float = 0.4) -> float:
    """The factor on the learning rate at `step` (from 0).

    Linear warm-up, then `constant`; `linear`: constant, then down to 0 over the last `decay` of
    the steps [O]; `cosine`: down to a tenth [R: GLM-4.5].
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
# 2. Let is_matrix return False, so that AdamW takes all, and train 800 steps with --lr=2e-3
#    beside Muon; 5 minutes each. How many steps later does reading appear?
