"""Continuous batched generation: the only place in the project that generates.

Requests come and go one by one; every `step` first lets waiting prompts into free slots (one
packed forward for all of them, images included), then gives each running request its next token.
The cache keeps the running requests in slots 0..n-1: when one ends, the last moves into its place,
so that decoding reads one dense block.

    engine = Engine(model, slots=32, context=1024)
    engine.submit(Request(prompt))           # a Document that ends where the reply begins
    while engine.busy:
        for result in engine.step(): ...
"""
from collections import deque
from dataclasses import dataclass, field

import torch

from common import UserError
from data import Document, collate
from kernels import sample
from model import Cache, GLMV
from tokenizer import Tokenizer


@dataclass
class Request:
    """temperature 0 is greedy; `seed` names the request's own random stream."""
    prompt: Document
    max_new: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Result:
    """What became of a request. finish: stop | length (max_new reached) | context (cache full)."""
    id: int
    ids: list
    finish: str


@dataclass
class _Running:
    id: int
    request: Request
    generator: torch.Generator
    ids: list = field(default_factory=list)


@dataclass
class _Next:
    """What the model's forward reads of a batch, for one new token a slot."""
    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: None = None


class Engine:
    """Generation over `slots` conversations of at most `context` tokens each."""

    def __init__(self, model: GLMV, slots: int = 32, context: int = 1024):
        weight = model.lm_head.weight
        self.model, self.slots, self.context = model, slots, context
        self.device = weight.device
        self.stops = set(Tokenizer(model.config.n_ranks).stops)
        self.cache = Cache(model.config, slots, context, self.device, weight.dtype)
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running] = []
        self.count = 0
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError where the prompt can't be served."""
        length = len(request.prompt.ids)
        if not length:
            raise UserError("an empty prompt: there is nothing to go on from")
        if length >= self.context:
            raise UserError(f"a prompt of {length} tokens leaves no room in a context of "
                            f"{self.context}")
        self.count += 1
        generator = torch.Generator().manual_seed(request.seed)
        self.waiting.append(_Running(self.count, request, generator))
        return self.count

    def abort(self, id: int):
        """Forget a request, waiting or running; an unknown id is none of our business."""
        self.waiting = deque(r for r in self.waiting if r.id != id)
        for slot, running in enumerate(self.running):
            if running.id == id:
                self._release(slot)
                return

    @torch.no_grad()
    def step(self) -> list[Result]:
        """Admit what fits, then one token for everybody. Returns the requests that ended."""
        ended = self._admit()
        n = len(self.running)
        if n:
            position = self.cache.position[:n]
            batch = _Next(self.last[:n], position.expand(3, n))
            hidden = self.model(batch, cache=self.cache.extend(n, 1))
            position += 1
            ended += self._choose(hidden, 0)
        return ended

    def _admit(self) -> list[Result]:
        first = len(self.running)
        new = [self.waiting.popleft() for _ in range(min(self.slots - first, len(self.waiting)))]
        if not new:
            return []
        self.running += new
        batch = collate([r.request.prompt for r in new], self.model.config).to(self.device)
        merged = self.model.encode(batch.patches, batch.grids) if len(batch.patches) else None
        hidden = self.model(batch, merged, self.cache.fill(first, batch.cu_seqlens))
        ends = batch.cu_seqlens[1:].long() - 1
        self.cache.position[first:len(self.running)] = batch.positions[0, ends] + 1
        return self._choose(hidden[ends], first)

    def _choose(self, hidden, first: int) -> list[Result]:
        """Draw the next token of the slots from `first` on; close the requests that are done."""
        rows = self.running[first:first + len(hidden)]
        logits = self.model.lm_head(hidden)
        if any(r.request.temperature > 0 for r in rows):
            def column(values):
                return torch.tensor(values, device=self.device)
            uniforms = column([torch.rand((), generator=r.generator).item() for r in rows])
            tokens = sample(logits, column([float(r.request.temperature) for r in rows]),
                            column([float(r.request.top_p) for r in rows]), uniforms)
        else:
            tokens = logits.argmax(-1)
        self.last[first:first + len(rows)] = tokens
        ended = []
        chosen = tokens.tolist()
        for slot in reversed(range(first, first + len(rows))):  # releasing moves the last slot down
            running = self.running[slot]
            running.ids.append(chosen[slot - first])
            held = len(running.request.prompt.ids) + len(running.ids)
            finish = ("stop" if running.ids[-1] in self.stops
                      else "length" if len(running.ids) >= running.request.max_new
                      else "context" if held >= self.context else "")
            if finish:
                ended.append(Result(running.id, running.ids, finish))
                self._release(slot)
        return ended[::-1]

    def _release(self, slot: int):
        end = len(self.running) - 1
        if slot != end:
            self.running[slot] = self.running[end]
            self.last[slot] = self.last[end]
            self.cache.move(end, slot)
        self.running.pop()


# Exercises. Delete the body, write it again, run the test.
# 1. Engine._release, so that the running requests stay in slots 0..n-1.
#    pytest tests/test_engine.py; 15 minutes.
# 2. Let `_admit` wait until half of the slots are free. What does that do to
#    `python -m lab.bench decode`, and why would a server not want it?
