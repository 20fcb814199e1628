"""Forms: a reply is kept within a grammar, token by token.

    form = action_form(tokens)                  # or named_form("action", tokens)
    engine.submit(Request(prompt, form=form))   # the reply is a call such as click(412, 377)

lib/grammar.py says which texts a form allows. Here is the machine that runs it:

- A **stack** is what a reply must still write: a tuple of items, the next one in front. A rule in
  front is replaced by each of its alternatives, until every stack begins with bytes or a special
  token. A **state** is the set of all stacks that are possible after what has been written. A form
  is complete where the empty stack is among them.
- A **token** is several bytes. To find those that are allowed, the machine walks the vocabulary as
  a tree, in which tokens that begin alike share their first steps, all tokens of one length at a
  time. What it finds is kept for the next time that a reply is in this state.
- **Room.** A token is only allowed if the reply can be completed with the tokens that are left, so
  that a reply is never cut in the middle. Stop tokens are allowed where the form is complete.

So a reply always has its form, whatever the weights are; and a greedy reply that has the form by
itself is not changed, as its tokens are allowed and no others get better by that. [O]
"""
import functools
import json
import math

import numpy as np
import torch
from torch import Tensor

from lib.cli import UserError
from lib.grammar import (actions, boxed, call, document, JSON, mapping, properties_of, PYTHON,
                         schema_item, shortest)
from lib.prefetch import send
from tasks.actions import ACTIONS
from tasks.verify import BEGIN, END
from tokenizer import Tokenizer

MOST_STATES = 20_000            # whose next states are kept, a kilobyte each
MOST_BYTES = 2 ** 26            # of what is kept of the tokens after states


# ---- the vocabulary as a tree -------------------------------------------------------------------

class Vocabulary:
    """The tokens that are text, as a tree: a node for each beginning of a token, node 0 the empty
    one. levels: (parents, last bytes) of the nodes of 1, 2, ... bytes; nodes: of each id, the node
    of the whole token, 0 where it has none."""

    def __init__(self, tokens: Tokenizer):
        special, self.decode = set(tokens.special.values()), tokens.decode
        words = {i: word for i, word in tokens.words.items() if i not in special and word}
        self.width, self.special = max(tokens.words) + 1, tokens.special
        self.stops = [i for i in tokens.stops if i < self.width]
        self.bytes_of, self.words = words, set(words.values())
        self.names = {id: name for name, id in tokens.special.items()}
        self.number, self.levels = {b"": 0}, []
        for length in range(1, max(map(len, self.words)) + 1):
            level = sorted({word[:length] for word in self.words if len(word) >= length})
            self.levels.append((np.array([self.number[begin[:-1]] for begin in level]),
                                np.array([begin[-1] for begin in level])))
            self.number |= zip(level, range(len(self.number), len(self.number) + len(level)))
        self.nodes = np.zeros(self.width, np.int64)
        self.nodes[list(words)] = [self.number[word] for word in words.values()]

    def symbols(self, id: int) -> bytes | list:
        """The bytes of an id, or the name of a special token."""
        return [self.names[id]] if id in self.names else self.bytes_of.get(id, b"")

    def fewest(self, symbols: list) -> int:
        """The fewest tokens that write these bytes and special tokens."""
        best = [0] * (len(symbols) + 1)     # best[i]: of the symbols from i on
        for i in reversed(range(len(symbols))):
            best[i] = 1 + best[i + 1]
            begin, j = b"", i
            while j < len(symbols) and not isinstance(symbols[j], str):
                begin, j = begin + bytes([symbols[j]]), j + 1
                if begin not in self.number:
                    break
                if begin in self.words:
                    best[i] = min(best[i], 1 + best[j])
        return best[0]


@functools.lru_cache(8)
def vocabulary_of(tokens: Tokenizer) -> Vocabulary:
    return Vocabulary(tokens)


# ---- the machine --------------------------------------------------------------------------------

def opened(stack: tuple) -> set:
    """The stacks that a stack becomes when the rules in front are replaced by their alternatives,
    until each begins with bytes or a special token, or is empty."""
    while stack and stack[0] == b"":
        stack = stack[1:]
    if not stack or not isinstance(stack[0], tuple):
        return {stack}
    rule, *arguments = stack[0]
    found = set()
    for way in rule(*arguments):
        found |= opened((*way, *stack[1:]))
    return found


def symbol_after(state: frozenset, symbol: int | str) -> frozenset:
    """The state after one byte or one special token; empty where it is not allowed."""
    rests = []
    for front, *rest in filter(None, state):
        if isinstance(front, bytes) and front[0] == symbol:
            rests.append((front[1:], *rest))
        elif front == symbol or isinstance(front, frozenset) and symbol in front:
            rests.append(tuple(rest))
    return frozenset().union(*map(opened, rests))


class Machine:
    """One grammar over one vocabulary, and what has been found out about its states.

    States have numbers here; 0 is the one in which nothing is allowed. table (states, 256): the
    number of the state after each byte.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.forget()

    def forget(self):
        """Start again with nothing found out: what has been is used up by now, as a rule."""
        self.states, self.numbers = [frozenset()], {frozenset(): 0}
        self.table = np.zeros((64, 256), np.int32)
        self.known = np.zeros(64, bool)     # of which states the table is filled in
        self.known[0] = True
        self.after, self.closing = {}, {}   # what `tokens_after` and `tokens_to_close` have found

    def tidy(self):
        """Forget everything where it has become too much; no number is in use at this time."""
        kept = len(self.after) * self.vocabulary.width * self.table.itemsize
        if len(self.states) > MOST_STATES or kept > MOST_BYTES:
            self.forget()

    def number(self, state: frozenset) -> int:
        if state not in self.numbers:
            self.numbers[state] = len(self.states)
            self.states.append(state)
            if len(self.states) > len(self.table):
                self.table = np.concatenate([self.table, np.zeros_like(self.table)])
                self.known = np.concatenate([self.known, np.zeros_like(self.known)])
        return self.numbers[state]

    def fill(self, number: int):
        """Find the states that follow a state, byte by byte."""
        following = [[] for _ in range(256)]    # the stacks after each byte, not opened yet
        for stack in self.states[number]:
            front, rest = stack[:1], stack[1:]
            if front and isinstance(front[0], bytes):
                following[front[0][0]].append((front[0][1:], *rest))
            elif front and isinstance(front[0], frozenset):
                for byte in front[0]:
                    following[byte].append(rest)
        alike = {}                              # many bytes lead to the same stacks
        for byte, stacks in enumerate(following):
            alike.setdefault(tuple(stacks), []).append(byte)
        for stacks, letters in alike.items():
            state = frozenset().union(*map(opened, stacks))
            after = self.number(state)          # this may make the table longer
            self.table[number, letters] = after
        self.known[number] = True

    def tokens_after(self, state: frozenset) -> tuple[np.ndarray, np.ndarray]:
        """(the number of the state after each token, 0 where it is not allowed; those numbers,
        each once)."""
        if state in self.after:
            return self.after[state]
        v = self.vocabulary
        at = np.zeros(len(v.number), np.int32)      # the state at each node of the tree
        at[0], end = self.number(state), 1
        for parents, letters in v.levels:
            before = at[parents]
            if not before.any():
                break
            for number in np.unique(before[~self.known[before]]):
                self.fill(number)
            at[end:end + len(parents)] = self.table[before, letters]
            end += len(parents)
        at[0] = 0       # ids without text
        after = at[v.nodes]
        for name in {stack[0] for stack in state if stack and isinstance(stack[0], str)}:
            after[v.special[name]] = self.number(symbol_after(state, name))
        self.after[state] = after, np.unique(after[after > 0])
        return self.after[state]

    def tokens_to_close(self, number: int) -> int:
        """How many tokens, the stop token included, complete a reply by the shortest text: without
        white space, or with a space after commas and colons where this takes fewer."""
        if number not in self.closing:
            ways = [shortest(stack, usual) for stack in self.states[number]
                    for usual in (False, True)]
            self.closing[number] = 1 + min(map(self.vocabulary.fewest, ways))
        return self.closing[number]

    def closes(self, number: int, room: int) -> bool:
        """Whether a reply can be completed with `room` tokens, the stop token included.

        Where the shortest text takes a little more, another text may take fewer: in a text that is
        about to end, .") can be one token where ") are two. So one token is tried.
        """
        needed = self.tokens_to_close(number)
        if needed <= room or room < 2 or needed > room + 2:
            return needed <= room
        _, following = self.tokens_after(self.states[number])
        return any(self.tokens_to_close(after) < room for after in following)


# ---- forms --------------------------------------------------------------------------------------

class Form:
    """What a reply must look like, and what of it is still to be written. It never changes: `after`
    makes a new one, which shares the machine."""

    def __init__(self, machine: Machine, state: frozenset):
        self.machine, self.state = machine, state

    @property
    def complete(self) -> bool:
        """Whether the reply may end here."""
        return () in self.state

    def after(self, ids) -> "Form":
        """The form when these tokens have been written. Raises UserError where it does not allow
        them."""
        state, vocabulary = self.state, self.machine.vocabulary
        for id in ids:
            for symbol in vocabulary.symbols(id):
                state = symbol_after(state, symbol)
        if not state:
            raise UserError(f"a reply of this form can't begin with "
                            f"{vocabulary.decode(ids)[:60]!r}")
        return Form(self.machine, state)

    def fits(self, room: int) -> bool:
        """Whether the reply can be completed with `room` tokens, the stop token included."""
        return self.machine.closes(self.machine.number(self.state), room)

    def needs(self) -> int:
        """The fewest tokens, the stop token included, that complete the reply."""
        return self.machine.tokens_to_close(self.machine.number(self.state))

    def allowed(self, room: int) -> np.ndarray:
        """Which ids may come next, (ids,) of bool, where `room` tokens are left: those after which
        the reply can still be completed, the stop token included."""
        machine = self.machine
        machine.tidy()
        after, following = machine.tokens_after(self.state)
        fits = np.zeros(len(machine.states), bool)
        fits[[number for number in following if machine.closes(number, room - 1)]] = True
        allowed = fits[after]
        allowed[machine.vocabulary.stops] = self.complete
        return allowed


def allowed_tokens(forms: list, rooms: list, drafts: list, width: int) -> np.ndarray:
    """Which tokens may come at the next place of each reply and after each of its K drafts:
    (n, K+1, width) of bool, all True for a reply without a form. rooms: how many tokens each reply
    may still have; drafts: n lists of K ids."""
    allowed = np.ones((len(forms), len(drafts[0]) + 1, width), bool)
    for i, form in enumerate(forms):
        for j, draft in enumerate([*drafts[i], None] if form else ()):
            may = form.allowed(rooms[i] - j)
            allowed[i, j] = np.pad(may, (0, width - len(may)))
            if draft is None or not allowed[i, j, draft] or draft in form.machine.vocabulary.stops:
                break       # what follows a draft that is refused has no meaning
            form = form.after([draft])
    return allowed


def within_forms(logits: Tensor, forms: list, rooms: list, drafts: Tensor | None) -> Tensor:
    """The logits (n, V) at the next place of each reply, or (n, K+1, V) there and after each of its
    drafts (n, K), with -inf for tokens that its form refuses. The host alone knows the forms, so it
    waits for the drafts."""
    ids = [[]] * len(forms) if drafts is None else drafts.tolist()
    refused = torch.from_numpy(~allowed_tokens(forms, rooms, ids, logits.shape[-1]))
    return logits.masked_fill(send(refused, logits.device).view(logits.shape), -math.inf)


def allowed_of(chosen: Tensor, logits: Tensor, free: Tensor) -> Tensor:
    """The chosen tokens (...). Where a form refuses them, the best allowed ones: sampling adds up
    probabilities, and a rounded sum can lead to the neighbour of an allowed token.

    logits (..., V): those `within_forms`; free: the same object where there are no forms."""
    if logits is free:
        return chosen
    refused = logits.gather(-1, chosen[..., None])[..., 0] == -math.inf
    return torch.where(refused, logits.argmax(-1), chosen)


def form_of(tokens: Tokenizer, *items) -> Form:
    """A new form, whose grammar is these items one after another."""
    return Form(Machine(vocabulary_of(tokens)), frozenset(opened(items)))


@functools.lru_cache(16)
def action_form(tokens: Tokenizer, verbs: tuple[str, ...] | None = None) -> Form:
    """A call of the gym's action language (tasks/actions.py), of all its verbs or of these."""
    verbs = tuple(ACTIONS) if verbs is None else verbs
    if not verbs or not set(verbs) <= ACTIONS.keys():
        raise UserError(f"{' '.join(verbs) or 'nothing'} is no action; there are: "
                        f"{', '.join(ACTIONS)}")
    return form_of(tokens, (actions, verbs))


@functools.lru_cache(16)
def boxed_form(tokens: Tokenizer, kind: str = "text") -> Form:
    """An answer between the box marks, and nothing else. kind: text; integer; point, [x, y]; box,
    [x0, y0, x1, y1] with x0 < x1 and y0 < y1, all from 0 to 999."""
    begin, end = (mark if mark in tokens.special else mark.encode() for mark in (BEGIN, END))
    return form_of(tokens, (boxed, begin, end, kind))


def json_form(tokens: Tokenizer, schema=None) -> Form:
    """An object of JSON, nested at most 32 times, or what a JSON schema allows. Raises UserError
    where the schema says what is not built (lib/grammar.py)."""
    return _json_form(tokens, json.dumps(schema))


@functools.lru_cache(16)
def _json_form(tokens: Tokenizer, schema: str) -> Form:
    schema = json.loads(schema)
    item = (mapping, JSON) if schema is None else schema_item(schema, JSON)
    return form_of(tokens, (document, item, JSON))


def call_form(tokens: Tokenizer, tools) -> Form:
    """A call of one of the tools, as lib/tool_use.py writes it. tools: objects with name and
    parameters, a JSON schema. Raises UserError where a schema says what is not built."""
    return _call_form(tokens, json.dumps([[tool.name, tool.parameters] for tool in tools]))


@functools.lru_cache(16)
def _call_form(tokens: Tokenizer, tools: str) -> Form:
    found = []
    for name, schema in json.loads(tools):
        arguments = properties_of(schema, PYTHON, f"the schema of {name}")
        found.append((name, tuple(arguments or ())))
    return form_of(tokens, (call, tuple(found), PYTHON))


NAMED = {"action": action_form,
         "click": functools.partial(action_form, verbs=("click",)),
         **{kind: functools.partial(boxed_form, kind=kind)
            for kind in ("box", "point", "integer", "text")},
         "json": json_form}


def named_form(name: str, tokens: Tokenizer) -> Form:
    """The form of this name, as `--form` takes it. Raises UserError where there is none."""
    if name not in NAMED:
        raise UserError(f"there is no form '{name}': {', '.join(NAMED)}")
    return NAMED[name](tokens)
