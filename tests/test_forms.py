"""Forms: what they accept, masks against brute force, and replies of random and trained models."""
import ast
import itertools
import json
import random
import time
from functools import cache

import numpy as np
import pytest
import torch

import mmtp
from conftest import odd_config, random_document
from data import collate, document
from engine import Engine, probabilities, Request
from lib import forms
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.common import ROOT
from lib.conversations import parse_call
from lib.forms import (action_form, allowed_of, boxed_form, call_form, Form, form_of, json_form,
                       NAMED, named_form)
from lib.grammar import maybe, shortest
from lib.tool_use import read_call, Tool
from model import GLMV
from tasks.actions import ACTIONS
from tasks.base import Message
from tasks.driver import demonstrate, Task
from tasks.verify import boxed, is_point, parse_action, parse_boxes
from tokenizer import SPECIAL, tokenizer_of

CONFIG = odd_config()
TOKENS = tokenizer_of(CONFIG)
PERSON = {"type": "object", "required": ["name", "tags"], "additionalProperties": False,
          "properties": {
              "name": {"type": "string", "description": "how they are called"},
              "age": {"type": ["integer", "null"]},
              "tags": {"type": "array", "items": {"enum": ["a", "bc", 7, None]},
                       "minItems": 1, "maxItems": 3},
              "at": {"anyOf": [{"type": "number"}, {"const": [1, {"x": "ä"}]}]}}}
TOOLS = [Tool("click", "", {"type": "object", "required": ["x", "y"], "properties": {
             "x": {"type": "integer"}, "y": {"type": "integer"}}}),
         Tool("find", "", {"type": "object", "required": ["word"], "properties": {
             "word": {"type": "string"}, "limit": {"type": "integer"},
             "deep": {"type": "boolean"}}}),
         Tool("get", "", {"properties": {"file-name": {"type": "string"}}}), Tool("stop")]


# ---- what is accepted ---------------------------------------------------------------------------

def accepts(form: Form, text: str) -> bool:
    """Whether a text is a whole reply of this form."""
    try:
        return form.after(TOKENS.encode_reply(text)).complete
    except UserError:
        return False


def box(text) -> str:
    return f"<|begin_of_box|>{text}<|end_of_box|>"


ACCEPTED = {
    "action": ("click(412, 377)", "click(0,999)", 'type("hello")', 'scroll("down")', "back()",
               "done()", 'done("infeasible")', 'answer("7")', 'remember("x")', 'open("Shop")',
               "crop(1, 2, 300, 400)", 'calc("2*(3+4)")', 'answer("ä 漢 🎈 \\" \\\\ \\n \\u00e4")',
               'answer("a < b </thin k> <thinker>")', f'answer("{"x" * 390}")', 'answer("")'),
    "click": ("click(412, 377)", "click(0,0)"),
    "box": (box("[0, 0, 1, 1]"), box("[998,7,999,8]"), box("[9, 99, 10, 100]")),
    "point": (box("[0, 0]"), box("[412, 377]"), box("[999,999]")),
    "integer": (box(0), box(-12), box("007"), box("9" * 12)),
    "text": (box(""), box("two words\nand a line"), box("ä < 漢 </b> <thinking>"), box("x" * 3900)),
    "json": ("{}", ' {"a": 1}\n', '{"a":[true,false,null,-0.5e+3,"\\u00e4\\/\\ud83d\\ude00"]}',
             '{ "ä" : { "" : [ ] } }', '{"a": 1, "a": 2}')}
REFUSED = {
    "action": ("", "click()", "click(1)", "click(1, 2, 3)", "click(1000, 1)", "click(01, 2)",
               "click(-1, 2)", "click(1, 2) ", " click(1, 2)", 'scroll("left")', "back(1)",
               'done("x")', "answer(7)", 'type("a\nb")', 'type("\\x")', 'type("\\ud83d")', "x",
               'answer("<think>")', 'answer("<</think>")', f'answer("{"x" * 391}")',
               "click(1, 2)click(1, 2)"),
    "click": ("back()", "click(1, 2"),
    "box": (box("[1, 0, 1, 1]"), box("[0, 9, 5, 8]"), box("[999, 0, 999, 1]"),
            box("[10, 99, 9, 100]"), box("[0, 0, 1]"), "[0, 0, 1, 1]"),
    "point": (box("[1000, 0]"), box("[00, 1]"), box("[1, 2, 3, 4]"), "[1, 2]", box("")),
    "integer": (box(""), box("1.5"), box("--1"), box("9" * 13), "7"),
    "text": ("", "x", box("x") + "x", box("<think>"), box("x<</think>"), box(box("x")),
             box("x" * 4000)),
    "json": ("", "[]", "1", '{"a"}', '{"a": 1,}', "{'a': 1}", '{"a": 01}', '{"a": .5}',
             '{"a": NaN}', '{"a": "\n"}', '{"a": "\\x"}', '{"a": "\\ud83d"}', "{}{}",
             '{"a": 1e999}',
             '{"a": ' * 33 + "1" + "}" * 33)}


@pytest.mark.parametrize("name", NAMED)
def test_what_a_form_accepts(name):
    form = named_form(name, TOKENS)
    assert [text for text in ACCEPTED[name] if not accepts(form, text)] == []
    assert [text for text in REFUSED[name] if accepts(form, text)] == []
    assert [text for text in ACCEPTED[name] if not is_good(name, text)] == []


def is_good(name: str, reply: str) -> bool:
    """Whether those who read the replies of a form can read this one."""
    if name in ("action", "click"):
        verb, arguments = parse_action(reply) or ("", [])
        kinds = list(ACTIONS[verb].arguments.values()) if verb in ACTIONS else None
        return kinds is not None and (name == "action" or verb == "click") and (
            not arguments and ACTIONS[verb].optional or len(arguments) == len(kinds)
            and all(fits_kind(*pair) for pair in zip(arguments, kinds)))
    if name == "json":
        return isinstance(json.loads(reply), dict)
    answer = boxed(reply)
    if name == "box":
        return len(parse_boxes(answer) or []) == 1
    if name == "point":
        return is_point(ast.literal_eval(answer))
    return answer is not None and (name == "text" or int(answer) is not None)


def fits_kind(argument, kind) -> bool:
    if kind == "coordinate":
        return type(argument) is int and 0 <= argument <= 999
    return type(argument) is str and (kind == "text" or argument in kind)


def test_all_that_the_oracles_say_is_accepted():
    """The actions of the gym's categories, with all their verbs."""
    form, said = action_form(TOKENS), set()
    for category, seed in itertools.product(
            ("gui_click", "gui_form", "gui_navigate", "gui_multi_app", "visual_tools",
             "text_tools", "image_mining"), range(4)):
        for conversation in demonstrate(Task(category, seed, 2, pixels=128)):
            said |= {m.text for m in conversation if m.role == "assistant"}
    calls = {text for text in said if "_of_box" not in text}
    assert len(calls) > 60 and [text for text in calls if not accepts(form, text)] == []
    assert {text.split("(")[0] for text in calls} >= {
        "click", "scroll", "open", "done", "zoom", "calc", "answer", "search_text"}


def test_a_schema():
    form = json_form(TOKENS, PERSON)
    for good in ('{"name": "x", "tags": ["a"]}', '{"tags":["bc",7,null],"name":""}',
                 '{"age": null, "at": [1, {"x": "ä"}], "tags": [7], "name": "\\n"}',
                 '{"at": -1.5, "name": "x", "age": 3, "tags": ["a"]}'):
        assert json.loads(good) and accepts(form, good), good
    for bad in ("{}", '{"name": "x"}', '{"name": "x", "tags": []}', '{"name": 1, "tags": ["a"]}',
                '{"name": "x", "tags": ["a", "a", "a", "a"]}', '{"name": "x", "tags": ["b"]}',
                '{"name": "x", "tags": ["a"], "more": 1}',
                '{"name": "x", "tags": ["a"], "age": 1.5}',
                '{"name": "x", "name": "y", "tags": ["a"]}',
                '{"name": "x", "tags": ["a"], "at": ""}'):
        assert not accepts(form, bad), bad
    assert accepts(json_form(TOKENS), "{" + 32 * " " + "}")
    assert not accepts(json_form(TOKENS), "{" + 33 * " " + "}")      # a limit of our own
    assert accepts(json_form(TOKENS, {}), "[1, {}]") and accepts(json_form(TOKENS, True), "null")
    assert accepts(json_form(TOKENS, {"type": "object"}), '{"any": 1}')
    only = json_form(TOKENS, {"type": "object", "additionalProperties": False})
    assert accepts(only, "{ }") and not accepts(only, '{"any": 1}')
    typed = json_form(TOKENS, {"type": "integer", "enum": [1, True, "1"]})
    assert accepts(typed, "1") and not accepts(typed, "true") and not accepts(typed, '"1"')


@pytest.mark.parametrize("schema,words", [
    ({"type": "string", "pattern": "a*"}, "the schema uses pattern"),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}},
     "the schema, a uses minimum"),
    ({"$ref": "#/x"}, "uses \\$ref without a type"), ({"oneOf": [True]}, "uses oneOf"),
    ({"enum": [1], "minimum": 0}, "uses minimum beside enum"),
    ({"type": "thing"}, "unknown type: \"thing\""), ({"type": {}}, "unknown type"),
    ({"enum": []}, "enum is no list, or an empty one"), ({"anyOf": 1}, "anyOf is no list"),
    ({"type": "integer", "const": "x"}, "nothing of the type integer"),
    ({"type": "array", "minItems": 65}, "minItems is no integer from 0 to 64"),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "at least 2 and at most 1"),
    ({"type": "object", "required": ["a"]}, "requires \"a\", which is not among"),
    ({"type": "object", "required": [[]], "properties": {}}, "requires \\[\\]"),
    ({"type": "object", "properties": []}, "properties is no object"),
    ({"type": "object", "properties": {"a": True}, "additionalProperties": True},
     "uses additionalProperties beside properties"),
    ({"type": "object", "additionalProperties": {"type": "string"}}, "with a schema"),
    ({"type": "array", "minItems": 64, "items": {"type": "array", "minItems": 64}},
     "wants 64 items: over 4,096 bytes"),
    ({"const": "x" * 5000}, "at least 5,002 bytes"),
    ({"enum": [f"{i}{'x' * 100}" for i in range(200)]}, "in 201 ways, which have 20,994 together"),
    ({"const": "\ud83d"}, "can't be written"), ({"enum": [float("nan")]}, "can't be written"),
    ([], "no JSON schema"), ({"type": "array", "items": 3}, "items is no JSON schema")],
    ids=lambda value: str(value)[:60])
def test_schemas_that_are_not_built(schema, words):
    with pytest.raises(UserError, match=words) as error:
        json_form(TOKENS, schema)
    assert "\n" not in str(error.value)


def test_calls_of_tools():
    form = call_form(TOKENS, TOOLS)
    for good in ("click(412, 377)", "click(y=1, x=2)", 'find("x")', 'find("x", 3)', "stop()",
                 'find("x", 3, True)', 'find(word="x", deep=False)', 'get("a")', "get()",
                 'get(**{"file-name": "a"})'):
        assert accepts(form, good) and read_call(good, TOOLS), good
    for bad in ("click(1)", "click(x=1)", "find()", "find(limit=3)", "find(word=1)", "stop(1)",
                "click(1, y=2)", "click(x=1, x=2)", 'find("a\nb")', "get(file-name=1)", "close()",
                'find("x", deep=true)'):
        assert not accepts(form, bad), bad
    with pytest.raises(UserError, match="the schema of f, a uses pattern"):
        call_form(TOKENS, [Tool("f", "", {"properties": {"a": {"type": "string", "pattern": ""}}})])


def test_forms_that_there_are_not():
    with pytest.raises(UserError, match="no form 'xml': action, click, box"):
        named_form("xml", TOKENS)
    with pytest.raises(UserError, match="jump is no action; there are: click"):
        action_form(TOKENS, ("jump",))
    with pytest.raises(UserError, match="nothing is no action"):
        action_form(TOKENS, ())


def test_where_the_vocabulary_has_no_box_marks_they_are_text():
    bare = Letters([b"7"], special=())
    form = boxed_form(bare, "integer")
    assert form.needs() == 16 + 14 + 2
    assert form.after([*box("-7").encode()]).complete


# ---- masks against brute force ------------------------------------------------------------------

class Letters:
    """A tokenizer of the 256 bytes, some longer tokens, some special ones and one stop token."""

    def __init__(self, longer, special=("<|begin_of_box|>", "<|end_of_box|>")):
        words = [*(bytes([i]) for i in range(256)), *longer]
        names = ["<|user|>", *special]
        self.special = {name: len(words) + i for i, name in enumerate(names)}
        self.words = dict(enumerate(words + [name.encode() for name in names]))
        self.stops = (self.special["<|user|>"],)

    def decode(self, ids) -> str:
        return b"".join(self.words[i] for i in ids).decode(errors="replace")


def nested():
    return [(b"x",), (b"(", (nested,), b")"), (b"[", (maybe, b" "), (nested,), b"]"),
            (b"q", (quoted,), b"')")]


def quoted():
    return [(), (frozenset(b"a."), (quoted,))]


@cache
def texts_of(length: int) -> list[str]:
    """All texts of `nested` of this length, from the definition."""
    if length < 1:
        return []
    return [*["x"] * (length == 1),
            *(f"q{''.join(inner)}')" for n in [length - 3] if n >= 0
              for inner in itertools.product("a.", repeat=n)),
            *(f"({inner})" for inner in texts_of(length - 2)),
            *(f"[{inner}]" for inner in texts_of(length - 2)),
            *(f"[ {inner}]" for inner in texts_of(length - 3))]


def tokens_needed(tokens: Letters, most: float) -> dict[str, int]:
    """Of each beginning of a text of at most 12 and `most` characters: the fewest tokens that
    complete it to any text, with the stop token."""
    words = {word.decode("latin-1") for i, word in tokens.words.items()}
    needed = {}
    for text in itertools.chain(*map(texts_of, range(1, 1 + int(min(12, most))))):
        rest = [1] * (len(text) + 1)
        for i in reversed(range(len(text))):
            rest[i] = 1 + min(rest[j] for j in range(i + 1, len(text) + 1) if text[i:j] in words)
        for i, n in enumerate(rest):
            needed[text[:i]] = min(n, needed.get(text[:i], n))
    return needed


@pytest.mark.parametrize("longer", [
    [b"))", b"]]", b"[[", b"x)", b".')", b"a.'", b"(x)", b"])"], [b"')", b"x))", b"[ ["],
    [b")))", b"] ", b"qa", b"]x"]], ids=str)
@pytest.mark.parametrize("most", [float("inf"), 7])
def test_masks_are_the_tokens_after_which_a_reply_can_be_completed(longer, most):
    """And there always is one, until the reply has ended."""
    tokens = Letters(longer)
    needed = tokens_needed(tokens, most)
    start = form_of(tokens, (nested,), most=most)
    assert start.needs() == needed[""]
    seen = 0
    for text in [text for text in needed if len(text) < 5]:
        form = start.after(text.encode())
        for room in range(needed[text], 6):
            want = {i for i, word in tokens.words.items()
                    if needed.get(text + word.decode("latin-1"), 99) < room}
            want |= set(tokens.stops) if form.complete else set()
            assert set(np.flatnonzero(form.allowed(room))) == want, (text, room)
            assert want
            seen += 1
    assert seen > 100


# ---- random replies -----------------------------------------------------------------------------

def all_forms(tokens=TOKENS) -> dict:
    return {name: named_form(name, tokens) for name in NAMED} | {
        "schema": json_form(tokens, PERSON), "call": call_form(tokens, TOOLS)}


def check(name: str, reply: str):
    """Raise AssertionError unless a reply has its form, by those who read it."""
    if name == "schema":
        found = json.loads(reply)
        assert {"name", "tags"} <= found.keys() <= {"name", "age", "tags", "at"}, reply
        assert 1 <= len(found["tags"]) <= 3 and type(found["name"]) is str, reply
    elif name == "call":
        assert read_call(reply, TOOLS) and parse_call(reply), reply
    else:
        assert is_good(name, reply), (name, reply)


@pytest.mark.parametrize("name", all_forms())
def test_random_tokens_always_make_a_reply(name):
    """Each allowed token is equally likely; the room is anything from the least on."""
    start, rng = all_forms()[name], random.Random(name)
    lengths = set()
    for n in range(30 if name != "box" else 6):
        form, ids, full = start, [], start.needs() + rng.choice((0, 1, 2, 3, 10, 40))
        while not ids or ids[-1] not in TOKENS.stops:
            ids.append(int(rng.choice(np.flatnonzero(form.allowed(full - len(ids))))))
            form = form if ids[-1] in TOKENS.stops else form.after(ids[-1:])
        assert len(ids) <= full
        check(name, TOKENS.decode(ids[:-1]))
        lengths.add(len(ids))
    assert len(lengths) > 2
    with pytest.raises(UserError, match="can't begin with"):
        start.after(TOKENS.encode("!"))


def test_the_first_alternatives_lead_to_the_shortest_text():
    for name, form in all_forms().items():
        texts = [[symbol for symbol in shortest(stack) if not isinstance(symbol, str)]
                 for stack in form.state]
        least = min(map(len, texts))
        assert all(len(TOKENS.decode_bytes(ids)) >= least for ids in walks(form, 6)), name


def walks(form: Form, count: int) -> list[list]:
    """The shortest replies of many: the room is the least that is possible."""
    found = []
    for seed in range(count):
        rng, now, ids = random.Random(seed), form, []
        while not ids or ids[-1] not in TOKENS.stops:
            allowed = np.flatnonzero(now.allowed(form.needs() - len(ids)))
            ids.append(int(rng.choice(allowed)))
            now = now if ids[-1] in TOKENS.stops else now.after(ids[-1:])
        found.append([i for i in ids if i not in TOKENS.special.values()])
    return found


def test_what_is_kept_is_bounded(monkeypatch):
    """And forgetting changes no mask."""
    form = boxed_form(TOKENS, "box")
    want, ids = [], TOKENS.encode_reply(box("[412, 37, 800, 99]"))
    for n in range(len(ids)):
        want.append(form.after(ids[:n]).allowed(40))
    form.machine.forget()
    monkeypatch.setattr(forms, "MOST_STATES", 40)
    for n in range(len(ids)):
        assert (form.after(ids[:n]).allowed(40) == want[n]).all()
        assert len(form.machine.states) < 200
    monkeypatch.setattr(forms, "MOST_BYTES", 3 * 4 * 544)
    for n in range(len(ids)):
        form.after(ids[:n]).allowed(40)
        assert len(form.machine.after) <= 4


# ---- in the engine ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    made = GLMV(CONFIG, seed=1).eval()
    mmtp.attach(made, 2)
    return made


@pytest.fixture(scope="module")
def prompt():
    return random_document(CONFIG, ((4, 6),), 9, 0)


def serve(model, requests, drafts=0, slots=16, context=128) -> list:
    """All results, in the order of `requests`."""
    engine = Engine(model, slots, context, drafts=drafts, adapt=False, say=lambda _: None)
    order = [engine.submit(r) for r in requests]
    results = {}
    while engine.busy:
        results |= {result.id: result for result in engine.step()}
    return [results[id] for id in order]


@pytest.mark.parametrize("drafts", [0, 2])
def test_replies_of_a_random_model_have_their_form(model, prompt, drafts):
    """At temperature 1 and 0, with as many tokens as are needed or a few more, in one batch with
    requests without a form; `context` is a limit like max_new."""
    names, requests = [], []
    for n, (name, form) in enumerate(4 * [*all_forms().items()]):
        names.append(name)
        requests.append(Request(prompt, form.needs() + (0, 1, 4, 30)[n % 4],
                                temperature=(1.0, 1.0, 0.0)[n % 3], seed=n, form=form,
                                top_p=(1.0, 0.5)[n % 2]))
    free = [Request(prompt, 9, temperature=1.0, seed=n) for n in range(4)]
    *made, last = serve(model, [*free, *requests, Request(prompt, 999, 1.0, form=requests[3].form)],
                        drafts, context=len(prompt.ids) + 60)
    for name, result, request in zip(names, made[4:], requests, strict=True):
        assert result.finish == "stop" and len(result.ids) <= request.max_new
        check(name, TOKENS.decode(result.ids[:-1]))
    assert last.finish == "stop" and len(last.ids) <= 60
    # Requests without a form are the same, to the last bit, when there are none in the batch.
    alone = serve(model, free, drafts)
    assert [r.ids for r in alone] == [r.ids for r in made[:4]]


def test_requests_without_a_form_know_nothing_of_forms(model, prompt, monkeypatch):
    want = serve(model, [Request(prompt, 9, temperature=1.0)], drafts=2)
    monkeypatch.setattr("engine.within_forms", None)
    got = serve(model, [Request(prompt, 9, temperature=1.0)], drafts=2)
    assert (got[0].ids, got[0].logps) == (want[0].ids, want[0].logps)


def test_a_form_that_does_not_fit(model, prompt):
    form = boxed_form(TOKENS, "box")
    with pytest.raises(UserError, match="takes at least 12 tokens, the end included, and there is "
                                        "room for 11$"):
        serve(model, [Request(prompt, 11, form=form)])
    with pytest.raises(UserError, match="room for 5$"):
        serve(model, [Request(prompt, form=form)], context=len(prompt.ids) + 5)
    with pytest.raises(UserError, match="can't begin with 'click'"):
        form.after(TOKENS.encode("click"))
    begun = form.after(TOKENS.encode_reply("<|begin_of_box|>[412, "))
    [result] = serve(model, [Request(prompt, begun.needs(), 1.0, form=begun)])
    assert is_good("box", "<|begin_of_box|>[412, " + TOKENS.decode(result.ids[:-1]))


@torch.no_grad()
def following(model, prompt, beginnings) -> torch.Tensor:
    """The distribution of the token after each of these beginnings of a reply, (n, V)."""
    documents = [random_document(CONFIG, ((4, 6),), 9, 0) for _ in beginnings]
    for one, ids in zip(documents, beginnings):
        one.ids = np.append(one.ids, ids).astype(np.int32)
        one.weights = np.zeros(len(one.ids), np.float32)
    batch = collate(documents, CONFIG)
    hidden = model(batch, model.encode_images(batch))
    return model.lm_head(hidden[batch.cu_seqlens[1:].long() - 1]).double()


def test_sampling_keeps_the_distribution_among_allowed_tokens(model, prompt):
    """Two digits in 2,000 replies, of which the second one is drafted: chi-square against the exact
    probabilities, renormalised to the allowed tokens. The log-probabilities are those among all
    tokens."""
    form = boxed_form(TOKENS, "integer").after([TOKENS.mark("<|begin_of_box|>")])
    digits = TOKENS.encode("0123456789")
    results = serve(model, [Request(prompt, 4, 1.0, seed=n, form=form) for n in range(2000)],
                    drafts=1, slots=400)
    seen = np.zeros((10, 10))
    for result in results:
        if {*result.ids[:2]} <= {*digits}:
            seen[tuple(digits.index(i) for i in result.ids[:2])] += 1

    def shares(ids, now):
        logits = following(model, prompt, ids)
        allowed = torch.from_numpy(np.pad(now.allowed(4 - len(ids[0])), (0, 10))[:544])
        return logits, logits.masked_fill(~allowed, float("-inf")).softmax(-1)[:, digits]

    logits, first = shares([[]], form)
    second_logits, second = shares([[i] for i in digits], form.after(digits[:1]))
    want = 2000 * (first[0][:, None] * second).numpy()
    likely = want >= 5              # all others count as one cell
    want, count = (np.append(x[likely], 2000 - x[likely].sum()) for x in (want, seen))
    chi, free = ((count - want) ** 2 / want).sum(), len(want) - 1
    assert free > 50 and abs(chi - free) < 4.5 * (2 * free) ** 0.5, (chi, free)
    one = next(r for r in results if {*r.ids[:2]} <= {*digits})
    row = second_logits[digits.index(one.ids[0])]
    assert one.logps[0] == pytest.approx(float(logits[0].log_softmax(-1)[one.ids[0]]), abs=1e-4)
    assert one.logps[1] == pytest.approx(float(row.log_softmax(-1)[one.ids[1]]), abs=1e-4)


def test_a_rounded_sum_can_choose_no_refused_token():
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    masked = logits.masked_fill(torch.tensor([[False, False, True]]), float("-inf"))
    assert allowed_of(torch.tensor([2]), masked, logits).tolist() == [1]
    assert allowed_of(torch.tensor([0]), masked, logits).tolist() == [0]
    assert allowed_of(torch.tensor([2]), logits, logits).tolist() == [2]
    one, all_of = torch.ones(1), torch.ones(1)
    assert probabilities(masked, one, all_of)[0, 2] == 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_greedy_replies_that_have_the_form_stay_the_same(drafts):
    """On the checkpoint that comes with the repository; the room is just that of the reply."""
    trained = load_model(ROOT / "ckpt/demo").eval()
    tokens, config = tokenizer_of(trained.config), trained.config
    prompts = []
    for (name, category), seed in itertools.product(
            (("action", "gui_click"), ("point", "point"), ("box", "ground_box"),
             ("integer", "counting"), ("text", "counting")), range(8)):
        messages = demonstrate(Task(category, 10 ** 6 + seed, 0, pixels=64))[0][:1]
        prompts.append((name, document(messages, tokens, config, answer=True)))
    free = serve(trained, [Request(prompt, 40) for _, prompt in prompts], drafts, context=512)
    requests, want = [], []
    for (name, prompt), result in zip(prompts, free):
        form = named_form(name, tokens)
        good = result.finish == "stop"
        try:
            good = good and form.after(result.ids[:-1]).complete
        except UserError:
            good = False
        requests.append(Request(prompt, len(result.ids) if good else 40, form=form))
        want.append(result.ids if good else None)
    made = serve(trained, requests, drafts, context=512)
    assert sum(ids is not None for ids in want) >= 24
    for (name, _), result, ids in zip(prompts, made, want):
        assert ids is None or result.ids == ids
        check(name, tokens.decode(result.ids[:-1]))


# ---- speed --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_masks_of_a_large_vocabulary_take_milliseconds():
    """59,000 tokens such as a released model has: words, numbers up to 999, marks, Chinese."""
    rng, words = random.Random(0), [str(n).encode() for n in range(10, 1000)]
    words += [b" " * n for n in range(2, 84)] + [b"\n" * n for n in range(2, 20)]
    marks, letters = "\"'(){}[],:;.<>/\\-_=+*", "etaoinshrdlucmfwypvbgkqjxz" * 2

    def some(alphabet, least, most, front=("",)):
        length = rng.randint(least, most)
        return (rng.choice(front) + "".join(rng.choices(alphabet, k=length))).encode()

    words += [some(marks, 2, 4) for _ in range(3000)]
    words += [some(letters, 2, 10, (" ", "")) for _ in range(38_000)]
    chinese = "".join(map(chr, range(0x4E00, 0x8000)))
    words += [some(chinese, 1, 4) for _ in range(22_000)]
    tokens = Letters(sorted(set(words)), [name for name in SPECIAL if name != "<|user|>"])
    assert 57_000 < len(tokens.words) < 62_000
    for name, start in all_forms(tokens).items():
        times = []
        for n in range(12):
            form, ids, full = start, [], (start.needs() + 1, 20, 60)[n % 3]
            while not ids or ids[-1] not in tokens.stops:
                began = time.process_time()
                allowed = form.allowed(full - len(ids))
                times.append(time.process_time() - began)
                ids.append(int(rng.choice(np.flatnonzero(allowed))))
                form = form if ids[-1] in tokens.stops else form.after(ids[-1:])
        middle, high = np.quantile(times, [0.5, 0.95]) * 1000
        print(f"{name:<8} {len(times):4} masks: median {middle:.2f} ms, 95% below {high:.1f} ms, "
              f"longest {1000 * max(times):.0f} ms")
        assert middle < 10, name
