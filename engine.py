"""Continuous batched generation: the only place in the project that generates.

A Request is a prompt and the way to sample its reply. `submit` queues it. Every `step`
1. admits waiting requests to free slots: one packed forward reads all their prompts, images
   included, and gives the first token of each reply. A prompt that several requests share is read
   once: RL samples eight replies to each;
2. gives each running request its next token, or several where the model has an MTP head: the head
   drafts K tokens, one forward of the trunk verifies them, and the cache is rewound to the last
   accepted one;
3. appends the new tokens, returns the requests that have ended, and releases their slots.

The running requests occupy the slots 0..n-1: when one ends, the last one moves into its slot, so
that decoding reads one dense block of the cache.

    engine = Engine(model, slots=32, context=1024, drafts=3)
    engine.submit(Request(prompt))           # a Document that ends where the reply begins
    while engine.busy:
        for result in engine.step(): ...

Letters: S cache slots, n running requests, K drafts, T tokens of a packed row, D documents in it,
W width of the model, H query heads, G key-value heads, C channels of a head, V vocabulary.
"""
import math
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
from lib.draft_tuner import DraftTuner
from lib.forms import allowed_of, check_room, Form, within_forms
from lib.prefetch import send
from mmtp import categorical
from model import Config, GLMV
from tokenizer import tokenizer_of

PATIENCE = 1    # how long slots may stay free while requests wait, in steps of all slots [O]


# ---- the KV cache -------------------------------------------------------------------------------

class Cache:
    """Keys and values of S conversations, each in a slot of its own.

    keys, values: (layers, S, G, context, C). `length` (S,): tokens that each slot holds.
    `position` (S,): the M-RoPE position of the slot's next text token; it is smaller than `length`
    where there are images, since h x w visual tokens take only max(h, w) positions. Both are on the
    CPU, which would otherwise wait for the GPU in every step to learn how far attention reaches.
    """

    def __init__(self, config: Config, slots: int, context: int, device, dtype, layers: int = 0):
        c = config.text
        shape = (layers or c.num_hidden_layers, slots, c.num_key_value_heads, context, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(slots, dtype=torch.long)
        self.position = torch.zeros(slots, dtype=torch.long)

    def prefill(self, first: int, cu_seqlens: Tensor, positions: Tensor,
                which: Tensor | None = None) -> "Prefill":
        """Prepare a forward over whole prompts, which end in text; their keys and values go to the
        slots from `first` on.

        cu_seqlens (D+1,), positions (3, T): of the packed row, on the CPU. Document i goes to slot
        first + i; or, with which (n,), document which[i] goes to slot first + i, so that several
        slots can begin with the same prompt.
        """
        if which is None:
            which = torch.arange(len(cu_seqlens) - 1)
        borders = cu_seqlens.long()
        lengths, end = borders.diff()[which], first + len(which)
        self.length[first:end] = lengths
        self.position[first:end] = positions[0, borders[1:] - 1][which] + 1
        # For every token that is kept: its slot, its place in the slot, its row in the batch.
        slot = torch.repeat_interleave(torch.arange(first, end), lengths)
        place = torch.arange(len(slot))
        place = place - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        row = torch.repeat_interleave(borders[:-1][which], lengths) + place
        return Prefill(self, slot, place, row)

    def extend(self, slots: int, n: int) -> "Extend":
        """Prepare a forward over n new text tokens in each of the first `slots` slots. Length and
        position move forward by n at once."""
        return Extend(self, slots, n)

    def rewind(self, slots: int, tokens: int | Tensor):
        """Take back the last `tokens` text tokens of each of the first `slots` slots: one number
        for all of them, or one for each, (slots,) on the CPU.

        Only the two integers of a slot go back. The keys and values beyond `length` stay in
        memory, where no query attends to them, until the next tokens overwrite them.
        """
        self.length[:slots] -= tokens
        self.position[:slots] -= tokens

    def move(self, source: int, target: int):
        """Copy the conversation in slot `source` to slot `target`."""
        held = int(self.length[source])
        for store in (self.keys, self.values):
            store[:, target, :, :held] = store[:, source, :, :held]
        self.length[target] = self.length[source]
        self.position[target] = self.position[source]


class Prefill:
    """Attention inside whole prompts, which also stores keys and values: those of row[i] of the
    batch go to slot[i] at place[i]. All three are given on the CPU."""

    def __init__(self, cache: Cache, slot: Tensor, place: Tensor, row: Tensor):
        self.cache, self.row_on_cpu = cache, row
        self.slot, self.place, self.row = (send(x, cache.keys.device) for x in (slot, place, row))

    def attend(self, layer, q, k, v, segments):
        self.cache.keys[layer, self.slot, :, self.place] = k[self.row]
        self.cache.values[layer, self.slot, :, self.place] = v[self.row]
        return attention(q, k, v, segments)


class Extend:
    """Attention of n new tokens a slot to everything that the slot holds; (S*n, H, C) in and out.

    positions (3, S*n): the M-RoPE positions of the new tokens.
    """

    def __init__(self, cache: Cache, slots: int, n: int):
        self.cache, self.slots, self.n = cache, slots, n
        device, new = cache.keys.device, torch.arange(n)
        self.reach = int(cache.length[:slots].max()) + n
        self.slot = torch.arange(slots, device=device)[:, None]
        self.place = send(cache.length[:slots, None] + new, device)     # (S, n)
        positions = cache.position[:slots, None] + new
        self.positions = send(positions.flatten(), device).expand(3, -1)
        later = torch.arange(self.reach, device=device) > self.place[:, :, None]
        self.mask = torch.zeros(later.shape, device=device, dtype=cache.keys.dtype)
        self.mask = self.mask.masked_fill(later, float("-inf"))[:, None]  # (S, 1, n, reach)
        cache.length[:slots] += n
        cache.position[:slots] += n

    def attend(self, layer, q, k, v, segments):
        cache = self.cache
        q, k, v = (rearrange(x, "(s n) h c -> s n h c", n=self.n) for x in (q, k, v))
        cache.keys[layer, self.slot, :, self.place] = k
        cache.values[layer, self.slot, :, self.place] = v
        keys = cache.keys[layer, :self.slots, :, :self.reach]
        values = cache.values[layer, :self.slots, :, :self.reach]
        # The r query heads that share a key head lie below one another: keys need no copies.
        repeat = q.shape[2] // keys.shape[1]
        q = rearrange(q, "s n (g r) c -> s g (r n) c", r=repeat) * q.shape[-1] ** -0.5
        scores = q @ keys.mT
        scores = (scores.unflatten(2, (repeat, self.n)) + self.mask[:, :, None]).flatten(2, 3)
        out = scores.softmax(-1) @ values
        return rearrange(out, "s g (r n) c -> (s n) (g r) c", n=self.n)


# ---- sampling -----------------------------------------------------------------------------------

def probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """The distribution that tokens are sampled from. (..., V), (...), (...) -> (..., V)

    temperature and top_p are on the CPU, which decides by them what has to be computed. Temperature
    0 gives all probability to the best token. top_p keeps the most likely tokens, as many as are
    needed to reach that probability together, and always the best one.
    """
    below = logits.float() - logits.float().amax(-1, keepdim=True)  # 0 for the best: no overflow
    cut, greedy = bool((top_p < 1).any()), bool((temperature <= 0).any())
    temperature, top_p = send(temperature, logits.device), send(top_p, logits.device)
    probs = (below / temperature.clamp_min(1e-30)[..., None]).softmax(-1)
    if cut:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered   # of all more likely tokens: 0 for the first
        kept = ordered * (before < top_p.clamp_min(1e-6)[..., None])
        kept = kept / kept.sum(-1, keepdim=True)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    if greedy:
        best = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(probs.dtype)
        probs = torch.where((temperature > 0)[..., None], probs, best)
    return probs


def check_finite(finite: bool, what: str):
    """Raise UserError where a model has computed nan or inf, which no token can be sampled from."""
    if not finite:
        raise UserError(f"the {what} computes numbers that are not finite: its weights are broken, "
                        "perhaps by a learning rate that was too high")


# ---- requests -----------------------------------------------------------------------------------

@dataclass
class Request:
    """A prompt and the way to sample the reply. temperature 0 is greedy; each request has its own
    random numbers, by `seed`, so that its reply does not depend on its neighbours."""
    prompt: Document
    max_new: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    form: Form | None = None    # what the reply must look like: see lib/forms.py
    stop: tuple[str, ...] = ()  # texts that end the reply; its ids still hold them


@dataclass
class Result:
    """A request that has ended. finish: stop | length (max_new reached) | context (cache full).
    logps: the log-probability of each token at temperature 1 among all tokens, also where a form
    allows only some. versions: the version of the weights that made each token."""
    id: int
    ids: list[int]
    finish: str
    logps: list[float]
    versions: list[int]


@dataclass
class _Sequence:
    """A request that waits or runs, with its reply so far."""
    id: int
    request: Request
    generator: torch.Generator
    form: Form | None           # of what is still to be written
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    versions: list = field(default_factory=list)


@dataclass
class _NewTokens:
    """New tokens of running requests, with the fields of a Batch that the model's forward reads."""
    tokens: Tensor              # (n*k,)
    positions: Tensor           # (3, n*k)
    cu_seqlens: None = None


# ---- the engine ---------------------------------------------------------------------------------

class Engine:
    """Generation in `slots` conversations of at most `context` tokens each.

    drafts: how many tokens the MTP head may draft in a step. adapt: the engine finds by itself how
    many pay, down to none. The times that it measures differ from run to run. Greedy replies don't
    depend on that; sampled replies do, though their distribution stays the same. say: prints what
    the user should know about drafts.
    """

    def __init__(self, model: GLMV, slots: int = 32, context: int = 1024, drafts: int = 0,
                 adapt: bool = True, say=print):
        weight = model.lm_head.weight
        self.model, self.slots, self.context = model, slots, context
        self.device, self.version = weight.device, 0
        self.tokenizer = tokenizer_of(model.config)
        self.stops, special = set(self.tokenizer.stops), set(self.tokenizer.special.values())
        self.spelled = {i: w for i, w in self.tokenizer.words.items() if i not in special}
        if drafts and mmtp.head_of(model) is None:
            say("no MTP head in this checkpoint: speculation is off")
            drafts = 0
        if drafts > model.config.mtp_depths > 0:
            say(f"the MTP head was trained for {model.config.mtp_depths} drafts, {drafts} are made")
        self.drafts, self.tuner = drafts, DraftTuner(drafts, adapt)
        layers = model.config.text.num_hidden_layers + (drafts > 0)     # the head has keys as well
        self.cache = Cache(model.config, slots, context + drafts, self.device, weight.dtype, layers)
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []      # running[i] is in slot i
        self.submitted = 0
        self.left_free = 0                      # slots not filled while requests wait, over steps
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)  # token to read next
        self.state = weight.new_zeros(slots, weight.shape[1])   # of the MTP head, at token `last`
        self.steps = self.tokens = 0    # steps, summed over running requests; tokens they gave
        self.trace = None               # called as trace(drafts, accepted, chosen) if it drafts

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError if it can't be served."""
        length = len(request.prompt.ids)
        if not (0 <= request.temperature < math.inf and 0 <= request.top_p <= 1):   # nan: not true
            raise UserError("a reply needs a temperature from 0 on and a top_p from 0 to 1, not "
                            f"{request.temperature} and {request.top_p}")
        if request.max_new < 1:
            raise UserError(f"a reply needs room for a token, not for {request.max_new}")
        if not length:
            raise UserError("an empty prompt: there is nothing to go on from")
        if length >= self.context:
            raise UserError(f"a prompt of {length} tokens leaves no room in a context of "
                            f"{self.context}")
        if not all(request.stop):
            raise UserError("a stop text must not be empty")
        check_room(request.form, self._room(request))
        self.submitted += 1
        generator = torch.Generator().manual_seed(request.seed)
        self.waiting.append(_Sequence(self.submitted, request, generator, request.form))
        return self.submitted

    def _room(self, request: Request) -> int:
        """How many tokens a reply may have."""
        return min(request.max_new, self.context - len(request.prompt.ids))

    # ---- admitting requests -----------------------------------------------------------------

    def _admit(self) -> list[Result]:
        """Read the prompts of waiting requests into free slots and sample their first tokens.

        To read a few prompts takes about as long as to read many. So while more requests wait than
        there are free slots, admission is put off until the slots left free, added up over steps,
        are worth PATIENCE steps of all slots. If all waiting requests fit, or nothing is running,
        they are admitted at once.
        """
        first, free = len(self.running), self.slots - len(self.running)
        if first and free < len(self.waiting):
            self.left_free += free
            if self.left_free < PATIENCE * self.slots:
                return []
        self.left_free = 0
        new = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        if not new:
            return []
        self.running += new
        # Prompts are the same where ids are equal and images are the very same arrays.
        prompts = [sequence.request.prompt for sequence in new]
        keys = [(p.ids.tobytes(), *map(id, p.images)) for p in prompts]
        distinct = dict(zip(keys, prompts))
        number = {key: i for i, key in enumerate(distinct)}
        which = torch.tensor([number[key] for key in keys])
        batch = collate(list(distinct.values()), self.model.config).to(self.device)
        merged = self.model.encode_images(batch)
        host = batch.host
        cache = self.cache.prefill(first, host.cu_seqlens, host.positions, which)
        hidden = self.model(batch, merged, cache)
        ends = send(host.cu_seqlens[1:].long()[which] - 1, self.device)
        logits = self.model.lm_head(hidden[ends])[:, None]
        chosen = self._sample(logits[:, 0], first)
        if self.tuner.best:
            self._start_head(first, batch, hidden, cache, chosen)
        made = self._fetch(chosen[:, None], torch.zeros_like(chosen), logits, first)  # no drafts
        return self._append(*made, first)

    def _start_head(self, first: int, batch, hidden, cache: Prefill, chosen):
        """Let the head read the prompts of the slots from `first` on. The first drafts begin from
        its state at their ends.

        At position i of a prompt the head joins h_i with token i+1, so at the last one it needs the
        first token of the reply, `chosen` (n,). There equal prompts differ, so the head reads each
        request's prompt. cache.row: where each of their tokens is in the batch.
        """
        lengths, row = self.cache.length[first:first + len(chosen)], cache.row
        host = F.pad(lengths.cumsum(0), (1, 0)).int()
        borders = send(host, self.device)
        ends = borders[1:].long() - 1
        ahead = batch.tokens[row].roll(-1).index_copy(0, ends, chosen)
        own = self.cache.prefill(first, host, batch.host.positions[:, cache.row_on_cpu])
        states = mmtp.draft(self.model, hidden[row], ahead, batch.positions[:, row],
                            Segments(borders, causal=True, host=host), own)
        self.state[first:first + len(chosen)] = states[ends]

    # ---- a step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Result]:
        """Admit waiting requests, then give every running one a token or more. Returns the requests
        that have ended."""
        ended = self._admit()
        if n := len(self.running):
            ended += self._speculate(n) if self.tuner.best else self._decode(n)
        return ended

    def _forward(self, tokens: Tensor, states: Tensor | None = None) -> Tensor:
        """Let the trunk read k more tokens (n, k) in each of the first n slots; or the MTP head, if
        the states (n, k, W) that it joins with them are given. Returns (n, k, W)."""
        n, k = tokens.shape
        cache = self.cache.extend(n, k)
        if states is None:
            hidden = self.model(_NewTokens(tokens.flatten(), cache.positions), cache=cache)
        else:
            hidden = mmtp.draft(self.model, states.flatten(0, 1), tokens.flatten(), cache.positions,
                                cache=cache)
        return hidden.unflatten(0, (n, k))

    def _decode(self, n: int) -> list[Result]:
        """Plain decoding: one token for each of n slots."""
        logits = self.model.lm_head(self._forward(self.last[:n, None]))
        chosen = self._sample(logits[:, 0], 0)
        self.steps, self.tokens = self.steps + n, self.tokens + n
        made = self._fetch(chosen[:, None], torch.zeros_like(chosen), logits, 0)    # no drafts
        return self._append(*made, 0)

    def _speculate(self, n: int) -> list[Result]:
        """Speculative decoding: K drafts for each of n slots, of which the trunk accepts some and
        adds one token of its own."""
        k = self.tuner.choose(n)
        began = time.perf_counter()
        drafts, draft_probs = self._draft(n, k)
        drafted = time.perf_counter()
        hidden = self._forward(torch.cat([self.last[:n, None], drafts], 1))
        logits = self.model.lm_head(hidden)
        accepted, chosen = self._verify(logits, drafts, draft_probs)
        ids, logps, counts = self._fetch(chosen, accepted, logits, 0, draft_probs)
        verified = time.perf_counter()      # the fetch has waited for the device
        self._advance_head(hidden, chosen, accepted)
        self.cache.rewind(n, k - torch.tensor(counts))
        alive = [sum(count >= j for count in counts) for j in range(k + 1)]     # see DraftTuner
        head_seconds = drafted - began + time.perf_counter() - verified
        self.tuner.note(alive, verified - drafted, head_seconds)
        self.steps, self.tokens = self.steps + n, self.tokens + sum(alive)
        if self.trace:
            self.trace(drafts, accepted, chosen)
        return self._append(ids, logps, counts, 0)

    def _draft(self, n: int, k: int) -> tuple[Tensor, Tensor | None]:
        """K drafts for each of n slots, (n, K), and the distributions that they were sampled from,
        (n, K, V), or None where all requests are greedy. The cache is as it was before."""
        shaping, state = self._shaping(self.running), self.state[:n]
        drafts = self.last.new_zeros(n, k)
        draft_probs = None
        if shaping is not None:
            draft_probs = torch.zeros(n, k, self.model.config.text.vocab_size, device=self.device)
        for j in range(k):
            if j:       # the head goes on from its own state and the token that it led to
                state = self._forward(drafts[:, j - 1:j], state[:, None])[:, 0]
            logits = mmtp.logits(self.model, state)
            if shaping is None:
                drafts[:, j] = logits.argmax(-1)
            else:
                draft_probs[:, j] = probabilities(logits, *shaping)
                uniforms = self._uniforms(self.running, 1)[:, 0]
                drafts[:, j] = categorical(draft_probs[:, j], uniforms)
        self.cache.rewind(n, max(0, k - 1))
        return drafts, draft_probs

    def _verify(self, logits, drafts, draft_probs) -> tuple[Tensor, Tensor]:
        """How many drafts each slot accepts, (n,), and its new tokens (n, K+1): the accepted drafts
        and one of the trunk's own; whatever follows has no meaning."""
        n, k = drafts.shape
        logits, free = self._within_forms(logits, self.running, drafts), logits
        if draft_probs is None:         # all greedy: accepted are those that the trunk would choose
            best = logits.argmax(-1)
            return (drafts == best[:, :k]).long().cumprod(1).sum(1), best
        temperature, top_p = (x[:, None].expand(n, k + 1) for x in self._shaping(self.running))
        accepted, token = mmtp.accept(probabilities(logits, temperature, top_p), draft_probs,
                                      drafts, self._uniforms(self.running, k + 1))
        chosen = torch.cat([drafts, token[:, None]], 1)
        chosen = chosen.scatter(1, accepted[:, None], token[:, None])
        return accepted, allowed_of(chosen, logits, free)

    def _advance_head(self, hidden, chosen, accepted):
        """Let the head read what the trunk has just read, each hidden state with the token that
        follows it. The next drafts begin from its state at the last token that counts."""
        n, new = chosen.shape           # new: K + 1
        self.cache.rewind(n, new)       # the head writes to the places that the trunk has filled
        states = self._forward(chosen, hidden)
        self.state[:n] = states[torch.arange(n, device=self.device), accepted]

    # ---- sampling ---------------------------------------------------------------------------

    def _shaping(self, sequences) -> list[Tensor] | None:
        """Temperatures and top-p, (n,) each on the CPU; None where all sequences are greedy."""
        requests = [sequence.request for sequence in sequences]
        if all(r.temperature <= 0 for r in requests):
            return None
        return [torch.tensor([float(r.temperature) for r in requests]),
                torch.tensor([float(r.top_p) for r in requests])]

    def _uniforms(self, sequences, count: int) -> Tensor:
        """Random numbers in [0, 1), (n, count), each row from its sequence's own generator."""
        return send(torch.stack([torch.rand(count, generator=s.generator) for s in sequences]),
                    self.device)

    def _sample(self, logits: Tensor, first: int) -> Tensor:
        """One token for each slot from `first` on. (n, V) -> (n,)"""
        sequences = self.running[first:first + len(logits)]
        logits, free = self._within_forms(logits, sequences), logits
        shaping = self._shaping(sequences)
        if shaping is None:
            return logits.argmax(-1)
        chosen = categorical(probabilities(logits, *shaping), self._uniforms(sequences, 1)[:, 0])
        return allowed_of(chosen, logits, free)

    def _within_forms(self, logits: Tensor, sequences, drafts: Tensor | None = None) -> Tensor:
        """The logits (n, V), or (n, K+1, V) with K drafts; -inf for tokens that forms refuse."""
        forms = [sequence.form for sequence in sequences]
        if not any(forms):
            return logits
        rooms = [self._room(s.request) - len(s.ids) for s in sequences]
        return within_forms(logits, forms, rooms, drafts)

    # ---- appending tokens, ending requests ----------------------------------------------------

    def _fetch(self, chosen, accepted, logits, first: int, draft_probs=None):
        """Keep the last tokens for the next step, and bring all that a step has made to the CPU.
        Only here does the host wait for the GPU, once: for one tensor, in fp32, which holds all ids
        below 2 ** 24.

        Of the slots from `first` on: chosen (n, K+1) and their logits (n, K+1, V), of which the
        `accepted` (n,) drafts and one more count. Returns lists of ids and log-probabilities, and
        how many drafts each slot has accepted. Raises UserError where the model is broken.
        """
        n, new = chosen.shape       # new: K + 1
        self.last[first:first + n] = chosen.gather(1, accepted[:, None])[:, 0]
        logps = logits.gather(-1, chosen[..., None])[..., 0].float() - logits.float().logsumexp(-1)
        drafted = torch.ones_like(accepted, dtype=torch.bool)
        if draft_probs is not None:
            drafted = draft_probs.isfinite().flatten(1).all(1)
        table = torch.cat([chosen, logps, accepted[:, None], drafted[:, None]], 1).tolist()
        check_finite(all(row[-1] for row in table), "MTP head")
        ids = [[int(id) for id in row[:new]] for row in table]
        logps = [row[new:2 * new] for row in table]     # nan where any of the logits is nan or inf
        check_finite(all(math.isfinite(logp) for row in logps for logp in row), "model")
        return ids, logps, [int(row[2 * new]) for row in table]

    def _append(self, ids, logps, counts, first: int) -> list[Result]:
        """Append new tokens, which `_fetch` has returned, to the slots from `first` on: in each the
        accepted drafts, `counts` of them, and one more. Returns the requests that ended."""
        ended = []
        for i in reversed(range(len(ids))):    # backwards, since a release moves the last slot
            sequence, finish = self.running[first + i], ""
            for token, logp in zip(ids[i][:counts[i] + 1], logps[i]):
                sequence.ids.append(token)
                sequence.logps.append(logp)
                sequence.versions.append(self.version)
                finish = self._finish(sequence)
                if finish:              # drafts after a stop token are dropped
                    break
                if sequence.form:
                    sequence.form = sequence.form.after([token])
            if finish:
                ended.append(Result(sequence.id, sequence.ids, finish, sequence.logps,
                                    sequence.versions))
                self._release(first + i)
        return ended[::-1]

    def _finish(self, sequence: _Sequence) -> str:
        """Why a sequence has ended with its newest token; empty where it goes on."""
        request, ids = sequence.request, sequence.ids
        if ids[-1] in self.stops or request.stop and self._has_stop_text(sequence):
            return "stop"
        if len(ids) < self._room(request):
            return ""
        return "length" if len(ids) >= request.max_new else "context"

    def _has_stop_text(self, sequence: _Sequence) -> bool:
        """Whether the newest token is the special token, or completes the text, of a stop text.
        Other special tokens count for nothing: a stop text may have one in its middle."""
        stop, ids = sequence.request.stop, sequence.ids
        if self.tokenizer.decode(ids[-1:]) in stop:
            return True
        longest = max(len(text.encode()) for text in stop)      # bytes; a token has at least one
        tail = b"".join([self.spelled[i] for i in ids if i in self.spelled][-longest:])
        return any(text.encode() in tail for text in stop)

    def so_far(self, id: int) -> list[int]:
        """The tokens that a request has so far: none while it waits, or after it has ended."""
        return next((s.ids for s in self.running if s.id == id), [])

    def _release(self, slot: int):
        """Free a slot: the last running request moves into it."""
        end = len(self.running) - 1
        if slot != end:
            self.running[slot] = self.running[end]
            self.last[slot] = self.last[end]
            self.state[slot] = self.state[end]
            self.cache.move(end, slot)
        self.running.pop()

    def abort(self, id: int):
        """Drop a request, whether it waits or runs. An unknown id is ignored: it may have ended."""
        self.waiting = deque(s for s in self.waiting if s.id != id)
        for slot, sequence in enumerate(self.running):
            if sequence.id == id:
                self._release(slot)
                return

    @torch.no_grad()
    def load(self, weights: dict, version: int):
        """Take new weights between two steps. Running requests continue with them; their keys and
        values in the cache stay those of the old weights."""
        own = dict(self.model.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)
        self.version = version
        self.tuner.reset()


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. Engine._release: the running requests stay in slots 0..n-1.
#    pytest tests/test_engine.py -k abort; 15 minutes.
# 2. Engine._draft and Engine._advance_head: to which places of the cache does the head write? Why
#    is it rewound three times a step? pytest tests/test_mmtp.py -k "greedy and 3-16"; 60 minutes.
# 3. The condition in `_admit` that puts admission off. How many prompts are read at a time without
#    it, and why should requests that all fit never wait?
#    pytest tests/test_engine.py -k admission; 20 minutes.
