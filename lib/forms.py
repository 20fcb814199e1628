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
  that a reply is never cut in the middle. Stop tokens are allowed where the form is complete. Some
  forms also have a limit in characters, which is counted beside the grammar.

So a reply always has its form, whatever the weights are, unless a stop text ends it. And a greedy
reply that has the form by itself, and ends within its room, is not changed: all its tokens are
allowed, and each of them is still the best. [O]
"""
import functools
import json
import math

import numpy as np
import torch
from torch import Tensor

from lib.cli import UserError
from lib.grammar import actions, boxed, JSON, MOST_SHORTEST, PYTHON, shortest
from lib.json_grammar import call, document, mapping, properties_of, schema_item
from lib.prefetch import send
from tasks.actions import ACTIONS
from tasks.verify import BEGIN, END, LONGEST_ACTION, LONGEST_REPLY
from tokenizer import Tokenizer

MOST_STATES = 20_000        # of a machine, a kilobyte each, before it forgets them
MOST_BYTES = 2 ** 25        # of what is kept of the tokens after states


# ---- the vocabulary as a tree -------------------------------------------------------------------

class Vocabulary:
    """The tokens that are text, as a tree: a node for each beginning of a token, node 0 the empty
    one. node: {beginning: its node}; levels: (parents, last bytes) of the nodes of 1, 2, ... bytes.
    Of each id: nodes, the node of the whole token, 0 where it has none; lengths, its characters."""

    def __init__(self, tokens: Tokenizer):
        special, self.decode = set(tokens.special.values()), tokens.decode
        words = {i: word for i, word in tokens.words.items() if i not in special and word}
        self.width, self.special = max(tokens.words) + 1, tokens.special
        self.stops = [i for i in tokens.stops if i < self.width]
        self.bytes_of, self.words = words, set(words.values())
        self.names = {id: name for name, id in tokens.special.items()}
        self.node, self.levels = {b"": 0}, []
        for length in range(1, max(map(len, self.words)) + 1):
            level = sorted({word[:length] for word in self.words if len(word) >= length})
            self.levels.append((np.array([self.node[begin[:-1]] for begin in level]),
                                np.array([begin[-1] for begin in level])))
            self.node |= zip(level, range(len(self.node), len(self.node) + len(level)))
        self.lengths = np.array([length_of(self.symbols(id)) for id in range(self.width)])
        self.nodes = np.zeros(self.width, np.int64)
        self.nodes[list(words)] = [self.node[word] for word in words.values()]

    def symbols(self, id: int) -> bytes | list:
        """The bytes of an id, or the name of a special token."""
        return [self.names[id]] if id in self.names else self.bytes_of.get(id, b"")

    def fewest(self, symbols: tuple) -> int:
        """The fewest tokens that write these bytes and special tokens."""
        best = [0] * (len(symbols) + 1)     # best[i]: of the symbols from i on
        for i in reversed(range(len(symbols))):
            best[i] = 1 + best[i + 1]
            begin, j = b"", i
            while j < len(symbols) and not isinstance(symbols[j], str):
                begin, j = begin + bytes([symbols[j]]), j + 1
                if begin not in self.node:
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


def distinct(numbers: np.ndarray) -> list[int]:
    """Each of the numbers once, in order; np.unique would sort them."""
    return np.flatnonzero(np.bincount(numbers)).tolist()


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
        self.after, self.bounds, self.closing = {}, {}, {}  # found by the methods below

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
        rests, following = [], [[] for _ in range(256)]     # of each byte: places in rests
        for front, *rest in filter(None, self.states[number]):
            letters = front[:1] if isinstance(front, bytes) else front
            for letter in letters if not isinstance(front, str) else ():
                following[letter].append(len(rests))
            rests.append((front[1:], *rest) if isinstance(front, bytes) else tuple(rest))
        alike = {}                                          # many bytes lead to the same state
        for letter, places in enumerate(following):
            alike.setdefault(tuple(places), []).append(letter)
        for places, letters in alike.items():
            state = frozenset().union(*(opened(rests[place]) for place in places))
            after = self.number(state)                      # which may make the table longer
            self.table[number, letters] = after
        self.known[number] = True

    def tokens_after(self, state: frozenset) -> tuple[np.ndarray, np.ndarray]:
        """(the number of the state after each token, 0 where it is not allowed; those numbers,
        each once)."""
        if state in self.after:
            return self.after[state]
        v = self.vocabulary
        at = np.zeros(len(v.node), np.int32)      # the state at each node of the tree
        at[0], end = self.number(state), 1
        for parents, letters in v.levels:
            before = at[parents]
            if not before.any():
                break
            for number in distinct(before[~self.known[before]]):
                self.fill(number)
            at[end:end + len(parents)] = self.table[before, letters]
            end += len(parents)
        at[0] = 0       # ids without text
        after = at[v.nodes]
        for name in {stack[0] for stack in state if stack and isinstance(stack[0], str)}:
            after[v.special[name]] = self.number(symbol_after(state, name))
        self.after[state] = after, distinct(after[after > 0])
        return self.after[state]

    def enough(self, number: int) -> int:
        """A number of tokens, the stop token included, that is surely enough to complete a reply:
        a short text in single bytes."""
        if number not in self.bounds:
            self.bounds[number] = 1 + len(shortest(min(self.states[number], key=len)))
        return self.bounds[number]

    def endings(self, number: int) -> list[tuple[int, int]]:
        """The shortest texts that complete a reply, without white space and with a space after
        commas and colons: (the fewest tokens that write it and the stop token, its characters)."""
        if number not in self.closing:
            texts = {tuple(shortest(stack, usual)) for stack in self.states[number]
                     for usual in (False, True)}
            self.closing[number] = [(1 + self.vocabulary.fewest(text), length_of(text))
                                    for text in texts]
        return self.closing[number]

    def to_close(self, number: int, room: int) -> float:
        """The fewest characters that complete a reply with `room` tokens, the stop token included;
        inf where this is not possible.

        Where the shortest text takes a little more, another one may take fewer tokens: at the end
        of a text, .") can be one token where ") are two. So one token is tried.
        """
        found = fewest_characters(self.endings(number), room)
        nearly = min(self.endings(number))[0] - room in (1, 2)
        if found < math.inf or not nearly or room < 2:
            return found
        after, following = self.tokens_after(self.states[number])
        needed = np.full(len(self.states), math.inf)
        for number in following:
            needed[number] = fewest_characters(self.endings(number), room - 1)
        return float((self.vocabulary.lengths + needed[after]).min())


def fewest_characters(endings: list[tuple[int, int]], room: int) -> float:
    """Of the endings that take at most `room` tokens, the fewest characters; inf without any."""
    return min((length for tokens, length in endings if tokens <= room), default=math.inf)


def length_of(symbols) -> int:
    """The characters of bytes in UTF-8 and names of special tokens."""
    return sum(len(symbol) if isinstance(symbol, str) else symbol & 0xC0 != 0x80
               for symbol in symbols)


# ---- forms --------------------------------------------------------------------------------------

class Form:
    """What a reply must look like, and what of it is still to be written. It never changes: `after`
    makes a new one, which shares the machine. spare: how many characters may still be written.

    Any thread may make forms and call `after`; `needs` and `allowed` write down what they find, so
    they belong to the thread of the engine."""

    def __init__(self, machine: Machine, state: frozenset, spare: float = math.inf):
        self.machine, self.state, self.spare = machine, state, spare

    @property
    def complete(self) -> bool:
        """Whether the reply may end here."""
        return () in self.state

    def after(self, ids) -> "Form":
        """The form when these tokens have been written. Raises UserError where it does not allow
        them."""
        vocabulary, state, spare = self.machine.vocabulary, self.state, self.spare
        for id in ids:
            spare -= vocabulary.lengths[id]
            for symbol in vocabulary.symbols(id):
                state = symbol_after(state, symbol)
        if not state or spare < 0:
            raise UserError(f"a reply of this form can't begin with "
                            f"{vocabulary.decode(ids)[:60]!r}")
        return Form(self.machine, state, spare)

    def needs(self) -> int:
        """The fewest tokens, the stop token included, that complete the reply."""
        machine, number = self.machine, self.machine.number(self.state)
        least = min(machine.endings(number))[0]
        return next((room for room in (least - 2, least - 1)
                     if machine.to_close(number, room) < math.inf), least)

    def allowed(self, room: int) -> np.ndarray:
        """Which ids may come next, (ids,) of bool, where `room` tokens are left: those after which
        the reply can still be completed, the stop token included."""
        machine, vocabulary = self.machine, self.machine.vocabulary
        machine.tidy()
        after, following = machine.tokens_after(self.state)
        ample = [self.spare == math.inf and machine.enough(number) < room for number in following]
        to_close = [0.0 if enough else machine.to_close(number, room - 1)
                    for number, enough in zip(following, ample)]
        table = np.full(len(machine.states), math.inf)
        table[following] = to_close
        needed = table[after] + vocabulary.lengths      # characters: of the token, and to the end
        allowed = (needed < math.inf) & (needed <= self.spare)
        allowed[vocabulary.stops] = self.complete
        return allowed


def check_room(form: Form | None, room: int):
    """Raise UserError where no reply of a form fits into `room` tokens."""
    if form and form.needs() > room:
        raise UserError(f"a reply of this form takes at least {form.needs()} tokens, the end "
                        f"included, and there is room for {room}")


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


def form_of(tokens: Tokenizer, *items, most: float = math.inf) -> Form:
    """A new form, whose grammar is these items one after another, of at most so many characters.
    Raises UserError where even its shortest texts are too long."""
    state = frozenset(opened(items))
    lengths = [len(shortest(stack)) for stack in state]     # one for each way to begin
    if min(lengths) > MOST_SHORTEST or sum(lengths) > 4 * MOST_SHORTEST:
        raise UserError(f"a reply of this form has at least {min(lengths):,} bytes, and may begin "
                        f"in {len(lengths)} ways, which have {sum(lengths):,} together: too many")
    return Form(Machine(vocabulary_of(tokens)), state, most)


@functools.lru_cache(16)
def action_form(tokens: Tokenizer, verbs: tuple[str, ...] | None = None) -> Form:
    """A call of the gym's action language (tasks/actions.py), of all its verbs or of these."""
    verbs = tuple(ACTIONS) if verbs is None else verbs
    if not verbs or not set(verbs) <= ACTIONS.keys():
        raise UserError(f"{' '.join(verbs) or 'nothing'} is no action; there are: "
                        f"{', '.join(ACTIONS)}")
    return form_of(tokens, (actions, verbs), most=LONGEST_ACTION)


@functools.lru_cache(16)
def boxed_form(tokens: Tokenizer, kind: str = "text") -> Form:
    """An answer between the box marks, and nothing else. kind: text; integer; point, [x, y]; box,
    [x0, y0, x1, y1] with x0 < x1 and y0 < y1, all from 0 to 999."""
    begin, end = (mark if mark in tokens.special else mark.encode() for mark in (BEGIN, END))
    most = LONGEST_REPLY if kind == "text" else math.inf    # the others can't be so long
    return form_of(tokens, (boxed, begin, end, kind), most=most)


def json_form(tokens: Tokenizer, schema=None) -> Form:
    """An object of JSON, nested at most 32 times, or what a JSON schema allows. Raises UserError
    where the schema says what is not built (lib/grammar.py)."""
    return _json_form(tokens, json.dumps(schema))


@functools.lru_cache(8)
def _json_form(tokens: Tokenizer, schema: str) -> Form:
    schema = json.loads(schema)
    item = (mapping, JSON) if schema is None else schema_item(schema, JSON)
    return form_of(tokens, (document, item, JSON))


def call_form(tokens: Tokenizer, tools) -> Form:
    """A call of one of the tools, as lib/tool_use.py writes it. tools: objects with name and
    parameters, a JSON schema. Raises UserError where a schema says what is not built."""
    return _call_form(tokens, json.dumps([[tool.name, tool.parameters] for tool in tools]))


@functools.lru_cache(8)
def _call_form(tokens: Tokenizer, tools: str) -> Form:
    found = []
    for name, schema in json.loads(tools):
        where = f"the schema of {name}"
        schema_item({"type": "object"} | schema, PYTHON, where)     # raises where it says more
        arguments = properties_of(schema, PYTHON, where)
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


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. opened and symbol_after: the whole machine, if there were no tokens.
#    pytest tests/test_forms.py -k "accepts or schema"; 30 minutes.
# 2. Machine.tokens_after: try each token by itself first. A mask of 59,000 tokens inside a text
#    then takes 13 s instead of 8 ms. pytest tests/test_forms.py -k masks_are; 45 minutes.
# 3. A form of your own: a date, 2024-02-29, but never 2023-02-29. A rule may have arguments, so the
#    day can know the month. 45 minutes.
