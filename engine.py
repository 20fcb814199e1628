"""Continuous batched generation: the only place in the project that generates.

Requests come and go one by one; every `step` first lets waiting prompts into free slots (one
packed forward for all of them, images included, and a prompt that several have is read once:
RL asks everything eight times), then gives each running request its next token, or several where
the model has an MTP head: the head drafts K tokens, one forward of the trunk verifies them all,
and the cache goes back to the last that stands. The cache keeps the running requests in slots
0..n-1: when one ends, the last moves into its place, so that decoding reads one dense block.

    engine = Engine(model, slots=32, context=1024, drafts=3)
    engine.submit(Request(prompt))           # a Document that ends where the reply begins
    while engine.busy:
        for result in engine.step(): ...

Letters: n running requests, K drafts, W width, V vocabulary.
"""
import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import mmtp
from data import collate, Document
from kernels import attention, Segments
from lib.cli import UserError
from mmtp import draw
from model import Config, GLMV
from tokenizer import Tokenizer

PATIENCE = 1    # steps of all slots that may be lost before prompts are read a few at a time [O]


class Cache:
    """Keys and values of S conversations side by side, each in its own slot.

    keys, values: (layers, S, G, context, C). `length` (S,): tokens held; `position` (S,): the
    M-RoPE position of the next text token, which falls behind `length` by what images save.
    Going back in a conversation is setting these two integers back.
    """

    def __init__(self, config: Config, slots: int, context: int, device, dtype, layers: int = 0):
        c = config.text
        shape = (layers or c.num_hidden_layers, slots, c.num_key_value_heads, context, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.position = torch.zeros(slots, dtype=torch.long, device=device)

    def fill(self, first: int, cu_seqlens: Tensor, which: Tensor | None = None) -> "Prefill":
        """For a forward over whole prompts, kept in the slots from `first` on: each in its own, or
        document which[i] in slot first + i, so that several slots go on from one."""
        if which is None:
            which = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
        lengths, end = cu_seqlens.diff().long()[which], first + len(which)
        self.length[first:end] = lengths
        slot = torch.repeat_interleave(torch.arange(first, end, device=lengths.device), lengths)
        place = torch.arange(len(slot), device=lengths.device)
        place = place - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        begin = torch.repeat_interleave(cu_seqlens[:-1].long()[which], lengths)
        return Prefill(self, slot, place, begin + place)

    def extend(self, slots: int, n: int) -> "Extend":
        """For a forward over n new tokens in each of the first `slots` slots."""
        return Extend(self, slots, n)

    def move(self, source: int, target: int):
        """Put slot `source` in the place of slot `target`."""
        held = int(self.length[source])
        for store in (self.keys, self.values):
            store[:, target, :, :held] = store[:, source, :, :held]
        self.length[target] = self.length[source]
        self.position[target] = self.position[source]


class Prefill:
    """Attention inside the prompts themselves; keys and values are kept on the way: those of row
    token[i] of the batch in slot[i] at place[i]."""

    def __init__(self, cache, slot, place, token):
        self.cache, self.slot, self.place, self.token = cache, slot, place, token

    def attend(self, layer, q, k, v, segments):
        self.cache.keys[layer, self.slot, :, self.place] = k[self.token]
        self.cache.values[layer, self.slot, :, self.place] = v[self.token]
        return attention(q, k, v, segments)


class Extend:
    """Attention of n new tokens a slot over the slot's whole past; (S*n, H, C) rows in and out."""

    def __init__(self, cache, slots, n):
        self.cache, self.slots, self.n = cache, slots, n
        held = cache.length[:slots]
        device = held.device
        self.reach = int(held.max()) + n
        self.row = torch.arange(slots, device=device)[:, None]
        self.place = held[:, None] + torch.arange(n, device=device)  # (S, n)
        later = torch.arange(self.reach, device=device) > self.place[:, :, None]
        self.mask = torch.zeros(later.shape, device=device, dtype=cache.keys.dtype)
        self.mask = self.mask.masked_fill(later, float("-inf"))[:, None]  # (S, 1, n, reach)
        held += n

    def attend(self, layer, q, k, v, segments):
        cache = self.cache
        q, k, v = (rearrange(x, "(s n) h c -> s n h c", n=self.n) for x in (q, k, v))
        cache.keys[layer, self.row, :, self.place] = k
        cache.values[layer, self.row, :, self.place] = v
        keys = cache.keys[layer, :self.slots, :, :self.reach]
        values = cache.values[layer, :self.slots, :, :self.reach]
        repeat = q.shape[2] // keys.shape[1]
        q = rearrange(q, "s n (g r) c -> s g (r n) c", r=repeat) * q.shape[-1] ** -0.5
        scores = q @ keys.mT  # no copy: slots and heads lie evenly in memory
        scores = (scores.unflatten(2, (repeat, self.n)) + self.mask[:, :, None]).flatten(2, 3)
        out = scores.softmax(-1) @ values
        return rearrange(out, "s g (r n) c -> (s n) (g r) c", n=self.n)


def probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """What tokens are drawn with. logits (..., V); temperature, top_p (...): temperature 0 puts
    all on the best; top_p keeps the most likely up to that mass. Returns (..., V)."""
    probs = (logits.float() / temperature.clamp_min(1e-4)[..., None]).softmax(-1)
    if bool((top_p < 1).any()):
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass in front of a token: the first always stays
        kept = ordered * (before < top_p[..., None])
        kept = kept / kept.sum(-1, keepdim=True)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    if bool((temperature <= 0).any()):
        best = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(probs.dtype)
        probs = torch.where((temperature > 0)[..., None], probs, best)
    return probs


@dataclass
class Request:
    """A reply to ask of the engine. temperature 0 is greedy; `seed` names its own random stream."""
    prompt: Document
    max_new: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Result:
    """What became of a request. finish: stop | length (max_new reached) | context (cache full).
    logps, versions: of each token, log-probability at temperature 1 and weights it came from."""
    id: int
    ids: list
    finish: str
    logps: list
    versions: list


@dataclass
class _Running:
    id: int
    request: Request
    generator: torch.Generator
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    versions: list = field(default_factory=list)


@dataclass
class _Next:
    """What the model's forward reads of a batch, for new tokens of running requests."""
    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: None = None


class Engine:
    """Generation over `slots` conversations of at most `context` tokens each.

    drafts: how many tokens the MTP head may guess ahead. With `adapt` the engine uses as many as
    pay, down to none, by the acceptance and the times it measures: greedy replies don't depend on
    that, and sampled ones keep their distribution, but not the same draws from run to run.
    """

    def __init__(self, model: GLMV, slots: int = 32, context: int = 1024, drafts: int = 0,
                 adapt: bool = True, say=print):
        weight = model.lm_head.weight
        self.model, self.slots, self.context = model, slots, context
        self.device, self.version = weight.device, 0
        self.stops = set(Tokenizer(model.config.n_ranks).stops)
        if drafts and mmtp.head_of(model) is None:
            say("no MTP head in this checkpoint: speculation is off")
            drafts = 0
        if drafts > model.config.mtp_depths > 0:
            say(f"the MTP head was trained for {model.config.mtp_depths} drafts, {drafts} are made")
        self.most, self.adapt = drafts, adapt
        layers = model.config.text.num_hidden_layers + (drafts > 0)
        self.cache = Cache(model.config, slots, context + drafts, self.device, weight.dtype, layers)
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running] = []
        self.count = self.lost = 0  # requests so far; slots left free while others wait, summed
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.none = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.state = weight.new_zeros(slots, weight.shape[1])  # the head's, behind each `last`
        self.steps = self.tokens = 0    # trunk steps times requests, and the tokens they gave
        self._measure_anew()

    def _measure_anew(self):
        self.depth, self.seconds = self.most, {}
        self.tried, self.stood = [0.0] * self.most, [0.0] * self.most

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
    def load(self, weights: dict, version: int):
        """Take new weights between two steps; what runs goes on with them, its cache as it is."""
        own = dict(self.model.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)
        self.version = version
        self._measure_anew()

    @torch.no_grad()
    def step(self) -> list[Result]:
        """Admit what fits, then a token or more for everybody. Returns the requests that ended."""
        ended = self._admit()
        n = len(self.running)
        if n:
            ended += self._speculate(n, self._worthwhile(n)) if self.depth else self._plain(n)
        return ended

    def _plain(self, n: int) -> list[Result]:
        """One token for each of n slots."""
        position = self.cache.position[:n]
        logits = self.model.lm_head(self._forward(self.last[:n, None], position))
        position += 1
        self.steps, self.tokens = self.steps + n, self.tokens + n
        return self._append(self._choose(logits[:, 0], 0)[:, None], self.none[:n], logits, 0)

    def _speculate(self, n: int, k: int) -> list[Result]:
        """Draft k tokens for each of n slots, verify them, go back to the last that stands."""
        began = time.perf_counter()
        length, position = self.cache.length[:n].clone(), self.cache.position[:n].clone()
        drafts, odds = self._guess(n, k)
        drafted = time.perf_counter()
        hidden = self._forward(torch.cat([self.last[:n, None], drafts], 1), position)
        logits = self.model.lm_head(hidden)
        stood, chosen = self._verify(logits, drafts, odds)
        alive = [n, *(stood[:, None] > torch.arange(k, device=self.device)).sum(0).tolist()]
        verified = time.perf_counter()  # the line above has waited for the device
        self._follow(hidden, chosen, stood, length, position)
        self.cache.length[:n] = length + stood + 1
        self.cache.position[:n] = position + stood + 1
        self._note(n, k, alive, verified - drafted,
                   time.perf_counter() - verified + drafted - began)
        return self._append(chosen, stood, logits, 0)

    def _forward(self, tokens, position, head=None):
        """The trunk (or, given states `head` (n, k, W), the MTP head) over k more tokens a slot.
        tokens (n, k) at text positions from position (n,) on. Returns (n, k, W)."""
        n, k = tokens.shape
        positions = position[:, None] + torch.arange(k, device=self.device)
        positions = positions.flatten().expand(3, -1)
        cache = self.cache.extend(n, k)
        if head is None:
            hidden = self.model(_Next(tokens.flatten(), positions), cache=cache)
        else:
            hidden = mmtp.draft(self.model, head.flatten(0, 1), tokens.flatten(), positions,
                                cache=cache)
        return hidden.unflatten(0, (n, k))

    def _admit(self) -> list[Result]:
        """Read the prompts of waiting requests into free slots, equal ones once.

        Reading a few costs as much time as reading many. So while more wait than there is room
        for, slots stay free until what that loses is worth a reading; who finds room for all,
        or nobody running, never waits."""
        first, free = len(self.running), self.slots - len(self.running)
        if first and free < len(self.waiting):
            self.lost += free
            if self.lost < PATIENCE * self.slots:
                return []
        self.lost = 0
        new = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        if not new:
            return []
        self.running += new
        prompts = [r.request.prompt for r in new]
        keys = [(p.ids.tobytes(), *map(id, p.images)) for p in prompts]  # `once`: the same array
        different = dict(zip(keys, prompts))
        number = {key: i for i, key in enumerate(different)}
        which = torch.tensor([number[key] for key in keys], device=self.device)
        batch = collate(list(different.values()), self.model.config).to(self.device)
        merged = self.model.encode_images(batch)
        cache = self.cache.fill(first, batch.cu_seqlens, which)
        hidden = self.model(batch, merged, cache)
        ends, rows = batch.cu_seqlens[1:].long() - 1, slice(first, len(self.running))
        self.cache.position[rows] = batch.positions[0, ends][which] + 1
        logits = self.model.lm_head(hidden[ends])[which, None]
        chosen = self._choose(logits[:, 0], first)
        if self.depth:
            self.state[rows] = self._read_ahead(first, batch, hidden, cache.token, chosen)
        return self._append(chosen[:, None], self.none[:len(new)], logits, first)

    def _read_ahead(self, first, batch, hidden, token, chosen):
        """Let the head read the prompts too, one token ahead. Each ends in what its request has
        `chosen`, so here none are equal; `token`: where in the batch their tokens lie."""
        borders = F.pad(self.cache.length[first:first + len(chosen)].cumsum(0), (1, 0)).int()
        ends = borders[1:].long() - 1
        ahead = batch.tokens[token].roll(-1).index_copy(0, ends, chosen)
        cache = self.cache.fill(first, borders)
        return mmtp.draft(self.model, hidden[token], ahead, batch.positions[:, token],
                          Segments(borders, causal=True), cache)[ends]

    # ---- choosing tokens --------------------------------------------------------------------

    def _shape(self, rows):
        """Temperature and top-p of running requests, (n,) each, or None where all are greedy."""
        requests = [r.request for r in rows]
        if all(r.temperature <= 0 for r in requests):
            return None
        return [torch.tensor([float(value) for value in values], device=self.device)
                for values in ([r.temperature for r in requests], [r.top_p for r in requests])]

    def _choose(self, logits, first: int):
        """One token for each slot from `first` on. (n, V) -> (n,)"""
        rows = self.running[first:first + len(logits)]
        shape = self._shape(rows)
        if shape is None:
            return logits.argmax(-1)
        return draw(probabilities(logits, *shape), self._uniforms(rows, 1)[:, 0])

    def _uniforms(self, rows, count: int):
        return torch.tensor([torch.rand(count, generator=r.generator).tolist() for r in rows],
                            device=self.device)

    def _verify(self, logits, drafts, odds):
        """How many drafts stand in each slot (n,), and the token that follows each place
        (n, K+1): those that stand, then the trunk's own; what is behind is void."""
        n, k = drafts.shape
        if odds is None:            # all greedy
            best = logits.argmax(-1)
            return (drafts == best[:, :k]).long().cumprod(1).sum(1), best
        shape = [x[:, None].expand(n, k + 1) for x in self._shape(self.running)]
        stood, token = mmtp.accept(probabilities(logits, *shape), odds, drafts,
                                   self._uniforms(self.running, k + 1))
        chosen = torch.cat([drafts, token[:, None]], 1)
        return stood, chosen.scatter(1, stood[:, None], token[:, None])

    def _append(self, chosen, stood, logits, first: int) -> list[Result]:
        """Give the slots from `first` on their new tokens; close the requests that are done."""
        row = torch.arange(len(chosen), device=self.device)
        self.last[first:first + len(row)] = chosen[row, stood]
        logps = logits.gather(-1, chosen[..., None])[..., 0].float()
        logps = (logps - logits.float().logsumexp(-1)).tolist()
        counts, ended = (stood + 1).tolist(), []
        chosen = chosen.tolist()
        for slot in reversed(range(first, first + len(row))):  # releasing moves the last slot down
            running, i = self.running[slot], slot - first
            for token, logp in zip(chosen[i][:counts[i]], logps[i]):
                running.ids.append(token)
                running.logps.append(logp)
                running.versions.append(self.version)
                held = len(running.request.prompt.ids) + len(running.ids)
                finish = ("stop" if token in self.stops
                          else "length" if len(running.ids) >= running.request.max_new
                          else "context" if held >= self.context else "")
                if finish:          # drafts behind a stop token are dropped
                    ended.append(Result(running.id, running.ids, finish, running.logps,
                                        running.versions))
                    self._release(slot)
                    break
        return ended[::-1]

    def _release(self, slot: int):
        end = len(self.running) - 1
        if slot != end:
            self.running[slot] = self.running[end]
            self.last[slot] = self.last[end]
            self.state[slot] = self.state[end]
            self.cache.move(end, slot)
        self.running.pop()

    # ---- drafting ---------------------------------------------------------------------------

    def _guess(self, n: int, k: int):
        """k drafts for each of n slots, (n, k), and the odds (n, k, V) they were drawn with, or
        None where all are greedy. What this writes into the cache lies behind what counts."""
        shape, state = self._shape(self.running), self.state[:n]
        length, position = self.cache.length[:n].clone(), self.cache.position[:n].clone()
        drafts, odds = [], []
        for j in range(k):
            if j:                   # from its own guess: the state, and the token it led to
                state = self._forward(drafts[-1][:, None], position + j - 1, state[:, None])[:, 0]
            logits = mmtp.logits(self.model, state)
            if shape is None:
                drafts.append(logits.argmax(-1))
            else:
                odds.append(probabilities(logits, *shape))
                drafts.append(draw(odds[-1], self._uniforms(self.running, 1)[:, 0]))
        self.cache.length[:n] = length
        return torch.stack(drafts, 1), torch.stack(odds, 1) if odds else None

    def _follow(self, hidden, chosen, stood, length, position):
        """Let the head take in what the trunk has just read, each state with the token that
        follows it; its last state that counts is where the next drafts begin."""
        n = len(chosen)
        self.cache.length[:n] = length
        states = self._forward(chosen, position, hidden)
        self.state[:n] = states[torch.arange(n, device=self.device), stood]

    def _note(self, n, k, alive, trunk, head):
        """Keep count of what stands, and of seconds: the least, which noise can only lengthen."""
        self.steps, self.tokens = self.steps + n, self.tokens + sum(alive)
        for j in range(k):          # of those whose earlier drafts stand, how many stand here too
            self.tried[j] = 0.98 * self.tried[j] + alive[j]
            self.stood[j] = 0.98 * self.stood[j] + alive[j + 1]
        seen = self.seconds.setdefault((n.bit_length(), k), [0, trunk, head])
        self.seconds[n.bit_length(), k] = [seen[0] + 1, min(1.02 * seen[1], trunk),
                                           min(1.02 * seen[2], head)]

    def _worthwhile(self, n: int) -> int:
        """How many drafts to make now. A plain step is timed by five that count for nothing; the
        times of all K follow from those of two, as lines. Once none pay, none are made until new
        weights arrive."""
        if not self.adapt:
            return self.depth
        size, most = n.bit_length(), self.most
        for k in {most, 1}:
            if self.seconds.get((size, k), [0])[0] < 2:
                return k
        if (size, 0) not in self.seconds:
            self.seconds[size, 0] = min(self._rehearse(n) for _ in range(5))
        if self.tried[0] > 32:          # (alone in its slot a request reaches 50, as they fade)
            (_, *last), (_, *first) = self.seconds[size, most], self.seconds[size, 1]
            step = max(0.0, sum(last) - sum(first)) / max(1, most - 1)
            cost = [self.seconds[size, 0]] + [sum(first) + k * step for k in range(most)]
            rates = [s / max(1.0, t) for s, t in zip(self.stood, self.tried)]
            self.depth = mmtp.worth(rates, cost)
        return max(1, self.depth)   # where it is 0 from now on, this is the last to draft

    def _rehearse(self, n: int) -> float:
        """Seconds of a plain step; the cache is as before, but for a place that counts for
        nothing yet."""
        began, length = time.perf_counter(), self.cache.length[:n].clone()
        hidden = self._forward(self.last[:n, None], self.cache.position[:n])
        self.model.lm_head(hidden).argmax(-1).tolist()
        self.cache.length[:n] = length
        return time.perf_counter() - began


# Exercises. Delete the body, write it again, run the test.
# 1. Engine._release, so that the running requests stay in slots 0..n-1.
#    pytest tests/test_engine.py; 15 minutes.
# 2. _guess and _follow: where does the head's part of the cache end, before and after?
#    pytest tests/test_mmtp.py -k greedy; 60 minutes.
# 3. The wait in `_admit`. How many prompts are read at a time without it, and why should who is
#    alone never wait? pytest tests/test_engine.py -k wait; 20 minutes.
