"""OpenAI's and Anthropic's requests and replies, tools, folding: without a model and a server."""
import base64
import io
import json
import random
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import gym
from data import document
from lib.anthropic_api import Anthropic
from lib.api import ApiError, Limits, parse_body, start
from lib.checkpoint import load_config
from lib.cli import UserError
from lib.common import ROOT
from lib.openai_api import OpenAI
from lib.tool_use import Call, CallStream, read_call, read_reply, Tool, usage_line, write_call
from tokenizer import tokenizer_of

CONFIG = load_config(ROOT / "ckpt" / "demo")
TOKENS = tokenizer_of(CONFIG)
LIMITS = Limits(("demo", "nanoglm-v"))
PROTOCOLS = {"openai": OpenAI(TOKENS), "anthropic": Anthropic(TOKENS, CONFIG)}


def png(image=None, kind="PNG") -> str:
    """A picture as a file in base64."""
    file = io.BytesIO()
    (image or Image.new("RGB", (40, 30), "red")).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def uri(image=None) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}


def block(image=None) -> dict:
    return {"type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": png(image)}}


def ask(protocol: str, text="What color?", **fields) -> dict:
    """A request with one message."""
    body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
    return body | ({"max_tokens": 9} if protocol == "anthropic" else {}) | fields


def read(protocol: str, body: dict, limits=LIMITS):
    return PROTOCOLS[protocol].read(parse_body(json.dumps(body).encode(), limits), limits)


def refused(protocol: str, body: dict, limits=LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(protocol, body, limits)
    assert "\n" not in caught.value.message
    return caught.value


def turn(text="", finish="stop", **fields):
    """What whole and stream read of a Turn that is done."""
    return SimpleNamespace(**{"text": text, "finish": finish, "thought": "", "stopped": "",
                              "ids": [1, 2, 3], "prompt_tokens": 20} | fields)


def lines_of(messages) -> list[tuple]:
    return [(m.role, m.text, len(m.images)) for m in messages]


# ---- tools and calls ----------------------------------------------------------------------------

def tool(name, /, **properties) -> Tool:
    return Tool(name, "", {"type": "object", "properties": properties})


NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
CLICK, DONE = tool("click", x=NUMBER, y=NUMBER), tool("done")
FIND = tool("find", word=TEXT, limit=NUMBER, page=NUMBER)


@pytest.mark.parametrize("name, arguments, text", [
    ("click", {"x": 412, "y": 377}, "click(412, 377)"),
    ("click", {"y": 377, "x": 412}, "click(412, 377)"),
    ("done", {}, "done()"),
    ("find", {"word": 'a"\n)'}, 'find("a\\"\\n)")'),
    ("find", {"word": "a", "limit": 3}, 'find("a", 3)'),
    ("find", {"word": "a", "page": 3}, 'find(word="a", page=3)'),
    ("find", {"word": None, "limit": [1, {"a": True}]}, 'find(None, [1, {"a": True}])')])
def test_a_call_is_written_and_read_again(name, arguments, text):
    tools = (CLICK, DONE, FIND)
    assert write_call(Call(name, arguments), tools) == text
    assert read_call(f" {text} ", tools) == Call(name, arguments)


@pytest.mark.parametrize("text", [
    "press(1, 2)", "click(1, 2, 3)", "click(z=1)", "click(x)", "click(1, 2", "a click(1, 2)",
    "click(__import__('os'))", "click(1, y=2)", "clicks(1)", "", "(", "click",
    'find("\\ud800")', 'find(word={"\\udfff": 1})'])    # halves of a surrogate pair
def test_other_text_is_no_call(text):
    assert read_call(text, (CLICK, DONE, FIND)) is None
    assert read_reply(text, (CLICK, FIND)) == (text, [])


REPLIES = ["click(412, 377)", "  click(1, 2) \n", "Now:\nclick(1, 2)\nfind(\"a\")", "click on it",
           "find it\n\nfind(\"b\")", "click(1, 2)\nand more", "cl", "a\n\n", "click(1, 2", "",
           "click(1, 2)\n\nfind(3)\n", "no call at all\nclickety"]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_streamed_reply_is_the_whole_one(reply):
    """Cut anywhere, the pieces make the same text and calls, and nothing of a call was shown."""
    tools, rng = (CLICK, FIND), random.Random(1)
    for _ in range(20):
        stream, said, left = CallStream(tools), "", reply
        while left:
            n = rng.randint(1, 4)
            said += stream.add(left[:n])
            left = left[n:]
        rest, calls = stream.end()
        assert (said + rest, calls) == read_reply(reply, tools)


def test_text_that_can_be_no_call_is_shown_at_once():
    stream = CallStream((CLICK,))
    assert [stream.add(c) for c in "cl, it"] == ["", "", "cl,", "", " i", "t"]
    assert CallStream(()).add("click(") == "click("


def test_the_line_about_tools():
    known = [tool("crop", x0=NUMBER, y0=NUMBER, x1=NUMBER, y1=NUMBER), tool("answer", text=TEXT)]
    assert usage_line([FIND], False) == 'One call a turn: find("word", limit, page).'
    assert usage_line(known, True) == ("One call a turn, points in 0-999 of the last whole picture:"
                                       ' crop(x0, y0, x1, y1), answer("...").')
    assert usage_line([replace(known[0], parameters={})], True) == "One call a turn: crop()."


# ---- conversations ------------------------------------------------------------------------------

def openai_tools(tools) -> list[dict]:
    return [{"type": "function", "function": {"name": t.name, "parameters": t.parameters}}
            for t in tools]


def anthropic_tools(tools) -> list[dict]:
    return [{"name": t.name, "input_schema": t.parameters} for t in tools]


def play(task: gym.Task, tools, turns: int):
    """The gym's own prompt after some turns of the oracle, and the same turns as the protocols have
    them: a function that makes the request in either, where the pictures come in the results or,
    for "user", in a message after them."""
    env = gym.make(task)
    episode = gym.drive(env)
    prompt, oracle = next(episode), env.oracle()
    texts = [prompt[-1].text.split("\nOne call")[0].replace(gym.IMAGE, "")]
    shown, calls = [prompt[-1].images], []
    for _ in range(turns):
        reply = next(oracle)
        calls.append(read_call(reply, tools))
        prompt = episode.send(reply)
        shown.append(prompt[-1].images)
        texts.append("" if env.layout == "segment" else prompt[-1].text.replace(gym.IMAGE, ""))

    def openai(where="result"):
        messages = [{"role": "user", "content": [
            *map(uri, shown[0]), {"type": "text", "text": texts[0]}]}]
        for n, call in enumerate(calls):
            messages.append({"role": "assistant", "content": None, "tool_calls": [
                {"id": f"call{n}", "type": "function",
                 "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}]})
            said = [{"type": "text", "text": texts[n + 1]}] if texts[n + 1] else []
            pictures = [*map(uri, shown[n + 1])]
            messages.append({"role": "tool", "tool_call_id": f"call{n}",
                             "content": said + pictures * (where == "result")})
            if where == "user" and pictures:
                messages.append({"role": "user", "content": pictures})
        return {"model": "demo", "messages": messages, "tools": openai_tools(tools)}

    def anthropic(where="result"):
        messages = [{"role": "user", "content": [
            *map(block, shown[0]), {"type": "text", "text": texts[0]}]}]
        for n, call in enumerate(calls):
            said = [{"type": "text", "text": texts[n + 1]}] if texts[n + 1] else []
            pictures = [*map(block, shown[n + 1])]
            result = {"type": "tool_result", "tool_use_id": f"call{n}",
                      "content": said + pictures * (where == "result")}
            messages += [
                {"role": "assistant", "content": [{"type": "tool_use", "id": f"call{n}",
                                                   "name": call.name, "input": call.arguments}]},
                {"role": "user", "content": [result, *pictures * (where == "user")]}]
        return {"model": "demo", "max_tokens": 20, "messages": messages,
                "tools": anthropic_tools(tools)}

    return prompt, {"openai": openai, "anthropic": anthropic}


POINTS = {"x": NUMBER, "y": NUMBER}
BOX = {"x0": NUMBER, "y0": NUMBER, "x1": NUMBER, "y1": NUMBER}
TOOLBOX = (tool("crop", **BOX), tool("zoom", **POINTS), tool("draw_box", **BOX),
           tool("draw_point", **POINTS), tool("calc", sum=TEXT), tool("answer", text=TEXT))
LIBRARY = (tool("search_text", words=TEXT), tool("open", name=TEXT), tool("calc", sum=TEXT),
           tool("answer", text=TEXT))
CASES = [("gui_form", 4, 0, (CLICK, DONE)), ("gui_form", 4, 1, (CLICK, DONE)),
         ("gui_form", 4, 2, (CLICK, DONE)),
         ("gui_navigate", 1, 2, (CLICK, tool("scroll", direction=TEXT), DONE)),
         ("visual_tools", 3, 1, TOOLBOX), ("text_tools", 3, 1, LIBRARY)]


@pytest.mark.parametrize("where", ["result", "user"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("category, seed, turns, tools", CASES)
def test_the_prompt_is_the_gyms_own(category, seed, turns, tools, protocol, where):
    """Screens are folded into the gym's form, tools keep the growing conversation: to the token
    and the pixel what the model was trained on."""
    level = 1 if category == "gui_form" else 0      # two boxes to tick
    wanted, bodies = play(gym.Task(category, seed, level), tools, turns)
    chat = read(protocol, bodies[protocol](where))
    ours, theirs = (document(m, TOKENS, CONFIG, answer=True) for m in (chat.messages, wanted))
    assert lines_of(chat.messages) == lines_of(wanted)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert all(map(np.array_equal, ours.images, theirs.images))


def screens(*messages) -> list[tuple]:
    """The folded form of a conversation in Anthropic's protocol, as (role, text, pictures)."""
    body = {"model": "demo", "max_tokens": 9, "messages": list(messages),
            "tools": anthropic_tools([CLICK, DONE])}
    return lines_of(read("anthropic", body).messages)


def called(n: int, **arguments) -> dict:
    use = {"type": "tool_use", "id": f"c{n}", "name": "click", "input": arguments}
    return {"role": "assistant", "content": [{"type": "text", "text": "I click."}, use]}


def result(n: int, *content, **fields) -> dict:
    return {"type": "tool_result", "tool_use_id": f"c{n}", "content": list(content), **fields}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def test_folding_keeps_the_goal_the_calls_and_the_newest_picture():
    first = {"role": "user", "content": [said("Tick A."), block()]}
    assert screens(first) == [("user", "<|image|>Tick A.", 1)]
    failed = result(1, said("no such box"), is_error=True)
    worked = result(0, said("ok"), block())
    told = [first, called(0, x=1, y=2), {"role": "user", "content": [worked]},
            called(1, x=3, y=4), {"role": "user", "content": [failed]}]
    assert screens(*told) == [("user", "<|image|>Tick A.\nclick(1, 2)\n? no such box", 1)]
    # A new goal begins a new list of calls.
    told[-1] = {"role": "user", "content": [failed, said("Tick B.")]}
    assert screens(*told) == [("user", "<|image|>Tick B.", 1)]
    assert screens(*told, {"role": "assistant", "content": "Why?"},
                   {"role": "user", "content": [block()]}) == [("user", "<|image|>Tick B.\n?", 1)]


def test_the_newest_picture_is_taken():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    body = ask("anthropic", tools=anthropic_tools([CLICK]), messages=[
        {"role": "user", "content": [block(red), said("Tick A.")]}, called(0, x=1, y=2),
        {"role": "user", "content": [result(0, block(blue))]}])
    image, = read("anthropic", body).messages[-1].images
    assert image.open().getpixel((0, 0)) == (0, 0, 255)


def test_without_a_picture_nothing_is_folded():
    assert screens({"role": "user", "content": "Tick A."}, called(0, x=1, y=2),
                   {"role": "user", "content": [result(0, said("ok"))]}) == [
        ("user", "Tick A.", 0), ("assistant", "I click.\nclick(1, 2)", 0),
        ("observation", "ok", 0)]


def test_thoughts_stay_until_the_user_speaks_again():
    """As in GLM's template; both protocols have the same rule."""
    thinking = {"type": "thinking", "thinking": "It is red.", "signature": "x"}
    use = {"type": "tool_use", "id": "c0", "name": "find", "input": {"word": "a"}}
    told = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": [thinking, use]},
            {"role": "user", "content": [result(0, said("b"))]}]
    body = {"model": "demo", "max_tokens": 9, "tools": anthropic_tools([FIND])}
    messages = read("anthropic", body | {"messages": told}).messages
    assert messages[1].text == '<think>It is red.</think>\nfind("a")'
    told += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "Sure?"}]
    messages = read("anthropic", body | {"messages": told}).messages
    assert messages[1].text == 'find("a")'
    reply = {"role": "assistant", "content": "b", "reasoning_content": "It is red."}
    question = {"role": "user", "content": "A?"}
    messages = read("openai", {"model": "demo", "messages": [question, reply, question]}).messages
    assert lines_of(messages) == [("user", "A?", 0), ("assistant", "b", 0), ("user", "A?", 0)]


def test_parts_become_one_text_with_marks():
    content = [said("Left:"), uri(), said("Right:"), said("<|image|>"), uri()]
    messages = read("openai", ask("openai", content)).messages
    assert lines_of(messages) == [
        ("user", "Left:<|image|>Right:\n< |image|><|image|>", 2)]
    system = [said("Be brief.") | {"cache_control": {"type": "ephemeral"}}, said("Be kind.")]
    messages = read("anthropic", ask("anthropic", [block(), said("A?")], system=system)).messages
    assert lines_of(messages) == [("system", "Be brief.\nBe kind.", 0), ("user", "<|image|>A?", 1)]
    follow = [{"role": "user", "content": text} for text in ("A?", "B?")]
    assert lines_of(read("anthropic", ask("anthropic", messages=follow)).messages) == [
        ("user", "A?\nB?", 0)]


# ---- settings -----------------------------------------------------------------------------------

def test_settings_of_openai():
    plain = read("openai", ask("openai")).settings
    assert (plain.max_new, plain.temperature, plain.top_p, plain.think, plain.stop) == (
        512, 0, 1, 0, ())
    assert plain.seed != read("openai", ask("openai")).settings.seed
    chat = read("openai", ask(
        "openai", max_completion_tokens=7, temperature=2, top_p=0, seed=-3, stop="END",
        stream=True, stream_options={"include_usage": True}, reasoning_effort="low",
        n=1, logprobs=False, frequency_penalty=0.0, user="me", metadata={"a": 1}, store=True,
        parallel_tool_calls=False, response_format={"type": "text"}, top_logprobs=None))
    s = chat.settings
    assert (s.max_new, s.temperature, s.top_p, s.seed, s.stop, s.think) == (
        4, 2, 0, -3, ("END",), 3)
    assert chat.stream and chat.usage and chat.one_call
    assert read("openai", ask("openai", max_tokens=10 ** 9)).settings.max_new == LIMITS.max_new
    long = read("openai", ask("openai", reasoning_effort="low")).settings
    assert (long.max_new, long.think) == (448, 64)


def test_settings_of_anthropic():
    assert read("anthropic", ask("anthropic")).settings.temperature == 0
    chat = read("anthropic", ask(
        "anthropic", max_tokens=200, temperature=1, top_p=0.5, stop_sequences=["\n\nHuman:"],
        thinking={"type": "enabled", "budget_tokens": 100}, stream=True))
    s = chat.settings
    assert (s.max_new, s.temperature, s.top_p, s.stop, s.think) == (
        100, 1, 0.5, ("\n\nHuman:",), 100)
    assert chat.stream
    begun = ask("anthropic", tools=anthropic_tools([CLICK]))
    begun["messages"].append({"role": "assistant", "content": [said("click(")]})
    chat = read("anthropic", begun)
    assert chat.settings.prefix == "click(" and chat.tools == () and len(chat.messages) == 1


def allowed(settings, text: str) -> bool:
    """Whether the form of a reply lets this text be written, up to its last token."""
    try:
        settings.form.after(TOKENS.encode_reply(text))
        return True
    except UserError:
        return False


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_that_must_be_made(protocol):
    """The gym's own actions have points in 0-999, other tools what their schemas say of types."""
    limited = tool("find", word={"type": "string", "minLength": 3, "pattern": "a+"}, limit={
        "type": "integer", "minimum": 1}, kind={"enum": ["a", "b"]})
    tools = [CLICK, limited]
    declared, must, named = {
        "openai": (openai_tools(tools), "required",
                   {"type": "function", "function": {"name": "find"}}),
        "anthropic": (anthropic_tools(tools), {"type": "any"},
                      {"type": "tool", "name": "find"})}[protocol]
    only_click = declared[:1]
    must_be = read(protocol, ask(protocol, tools=only_click, tool_choice=must)).settings
    assert allowed(must_be, "click(1, 2)")
    assert not any(allowed(must_be, text) for text in ("click(1000, 2)", "done()", "A", 'find("a'))
    must_be = read(protocol, ask(protocol, tools=declared, tool_choice=must)).settings
    assert allowed(must_be, "click(1, 2)") and allowed(must_be, 'find("a", 3, "b")')
    wrong = ("done()", "find(3", 'find("a", 3, "c"', "No")
    assert not any(allowed(must_be, text) for text in wrong)
    must_be = read(protocol, ask(protocol, tools=declared, tool_choice=named)).settings
    assert allowed(must_be, 'find(limit=3)') and not allowed(must_be, "click(")
    assert read(protocol, ask(protocol, tools=declared)).settings.form is None


def test_json_replies():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    bodies = [("openai", {"response_format": wanted}),
              ("anthropic", {"output_config": {"format": {"type": "json_schema",
                                                          "schema": schema}}})]
    for protocol, fields in bodies:
        must_be = read(protocol, ask(protocol, **fields)).settings
        assert allowed(must_be, '{"a": 3}') and not allowed(must_be, '{"b"')
        fields |= {"tools": openai_tools([FIND]) if protocol == "openai" else
                   anthropic_tools([FIND])}
        assert "exclude each other" in refused(protocol, ask(protocol, **fields)).message
    must_be = read("openai", ask("openai", response_format={"type": "json_object"})).settings
    assert allowed(must_be, '{"b": [1, null]}') and not allowed(must_be, "[")


def test_what_claude_code_sends():
    """Many blocks, marks of caches everywhere, fields of betas: read or ignored."""
    cache = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    chat = read("anthropic", {
        "model": "nanoglm-v", "max_tokens": 32000, "stream": True, "temperature": 1,
        "system": [said("You are an agent.") | cache, said("Use tools.") | cache],
        "messages": [{"role": "user", "content": [said("<system-reminder>"), said("hi") | cache]},
                     {"role": "assistant", "content": [
                         {"type": "thinking", "thinking": "", "signature": "abc"},
                         {"type": "tool_use", "id": "t1", "name": "Read",
                          "input": {"file": "a.py"}, "caller": {"type": "direct"}} | cache]},
                     {"role": "user", "content": [
                         {"type": "tool_result", "tool_use_id": "t1", "content": "x = 1"}
                         | cache]}],
        "tools": [{"name": "Read", "description": "reads", "input_schema": {
            "$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
            "properties": {"file": {"type": "string"}}, "required": ["file"],
            "additionalProperties": False}, "eager_input_streaming": True} | cache],
        "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"}, "betas": ["x"], "diagnostics": None})
    assert lines_of(chat.messages) == [
        ("system", "You are an agent.\nUse tools.", 0),
        ("user", '<system-reminder>\nhi\nOne call a turn: Read("file").', 0),
        ("assistant", 'Read("a.py")', 0), ("observation", "x = 1", 0)]
    assert chat.settings.think == 0 and chat.settings.max_new == LIMITS.max_new


def test_counting_tokens():
    body = {"model": "demo", "system": "Be brief.",
            "messages": [{"role": "user", "content": [block(), said("A?")]}]}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 4096}}
    counted = PROTOCOLS["anthropic"].count(body | thinking, LIMITS)
    chat = read("anthropic", body | {"max_tokens": 5})
    assert counted == {"input_tokens": start(chat, TOKENS, CONFIG, LIMITS).prompt_tokens}


# ---- replies ------------------------------------------------------------------------------------

def events_of(sent: bytes) -> list:
    """[(name, data)] of server-sent events."""
    found = []
    for part in sent.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in part.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


def streamed(protocol, chat, done, pieces) -> list:
    stream = PROTOCOLS[protocol].stream(chat)
    sent = stream.begin(done)
    for kind, text in pieces:
        sent += stream.piece(kind, text)
    return events_of(sent + stream.end(done))


def test_a_reply_of_openai():
    chat = read("openai", ask("openai", tools=openai_tools([CLICK])))
    answer = PROTOCOLS["openai"].whole(chat, turn("red", "length"))
    choice, = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "red", "refusal": None}
    assert choice["finish_reason"] == "length" and answer["model"] == "demo"
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
    choice, = PROTOCOLS["openai"].whole(chat, turn("click(1, 2)", thought="hm"))["choices"]
    call, = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "click", "arguments": '{"x": 1, "y": 2}'}
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "hm"


def test_a_streamed_reply_of_openai():
    body = ask("openai", tools=openai_tools([CLICK]), stream=True)
    chat = read("openai", body | {"stream_options": {"include_usage": True}})
    pieces = [("thought", "hm"), ("text", "Now:"), ("text", "\ncli"), ("text", "ck(1, 2)")]
    *chunks, last, (_, end) = streamed("openai", chat, turn(), pieces)
    assert end == "[DONE]"
    assert last[1]["choices"] == [] and last[1]["usage"]["total_tokens"] == 23
    assert {c["id"] for _, c in chunks} == {last[1]["id"]}
    deltas = [c["choices"][0]["delta"] for _, c in chunks]
    call = deltas[3].pop("tool_calls")[0]
    assert deltas == [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"},
                      {"content": "Now:"}, {}, {}]
    assert call["index"] == 0 and call["function"]["name"] == "click"
    assert [c["choices"][0]["finish_reason"] for _, c in chunks][-2:] == [None, "tool_calls"]
    *_, last, _ = streamed("openai", read("openai", body), turn(), [])
    assert "usage" not in last[1] and last[1]["choices"][0]["finish_reason"] == "stop"


def test_a_reply_of_anthropic():
    chat = read("anthropic", ask("anthropic", tools=anthropic_tools([CLICK])))
    answer = PROTOCOLS["anthropic"].whole(chat, turn("Now:\nclick(1, 2)", thought="hm"))
    thinking, text, use = answer["content"]
    assert thinking["thinking"] == "hm" and text == {"type": "text", "text": "Now:"}
    assert use.pop("id").startswith("toolu_")
    assert use == {"type": "tool_use", "name": "click", "input": {"x": 1, "y": 2}}
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
    assert answer["usage"]["input_tokens"] == 20 and answer["usage"]["output_tokens"] == 3
    for finish, reason in (("stop", "end_turn"), ("length", "max_tokens"),
                           ("context", "model_context_window_exceeded")):
        assert PROTOCOLS["anthropic"].whole(chat, turn("a", finish))["stop_reason"] == reason
    answer = PROTOCOLS["anthropic"].whole(chat, turn("a", "stop text", stopped="END"))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")


def test_a_streamed_reply_of_anthropic():
    chat = read("anthropic", ask("anthropic", tools=anthropic_tools([CLICK]), stream=True))
    pieces = [("thought", "h"), ("thought", "m"), ("text", "Now:"), ("text", "\nclick(1, 2)")]
    found = streamed("anthropic", chat, turn(), pieces)
    assert all(name == data["type"] for name, data in found)
    assert [(name, data.get("index")) for name, data in found] == [
        ("message_start", None), ("ping", None), ("content_block_start", 0),
        *[("content_block_delta", 0)] * 3, ("content_block_stop", 0), ("content_block_start", 1),
        ("content_block_delta", 1), ("content_block_stop", 1), ("content_block_start", 2),
        ("content_block_delta", 2), ("content_block_stop", 2), ("message_delta", None),
        ("message_stop", None)]
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "h"}, {"type": "thinking_delta", "thinking": "m"},
        {"type": "signature_delta", "signature": "nanoglm-v"},
        {"type": "text_delta", "text": "Now:"},
        {"type": "input_json_delta", "partial_json": '{"x": 1, "y": 2}'}]
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_one_call_at_most():
    two = "click(1, 2)\nclick(3, 4)"
    body = ask("openai", tools=openai_tools([CLICK]))
    for one, count in ((True, 2), (False, 1)):
        chat = read("openai", body | {"parallel_tool_calls": one})
        message = PROTOCOLS["openai"].whole(chat, turn(two))["choices"][0]["message"]
        assert len(message["tool_calls"]) == count
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    chat = read("anthropic", ask("anthropic", tools=anthropic_tools([CLICK]), tool_choice=choice))
    assert len(PROTOCOLS["anthropic"].whole(chat, turn(two))["content"]) == 1


def test_no_tool_may_be_called():
    chat = read("openai", ask("openai", tools=openai_tools([CLICK]), tool_choice="none"))
    message = PROTOCOLS["openai"].whole(chat, turn("click(1, 2)"))["choices"][0]["message"]
    assert message["content"] == "click(1, 2)" and "tool_calls" not in message


# ---- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b"\xff{}", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}',
    b'{"\\udfff": 1}', b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000,
    b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"])
def test_a_body_that_is_no_json(raw):
    with pytest.raises(ApiError) as caught:
        parse_body(raw, LIMITS)
    assert caught.value.status == 400 and caught.value.kind == "invalid_json"


BOMB = png(Image.new("1", (4000, 4000)))
NOT_A_PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\nnothing").decode()
CUT_OFF = base64.b64encode(base64.b64decode(png())[:60]).decode()
EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
# Values of fields that are wrong in both protocols, and the field that the error names.
BOTH = [
    ({"model": None}, "model"), ({"model": 3}, "model"), ({"messages": None}, "messages"),
    ({"messages": {}}, "messages"), ({"messages": []}, "messages"),
    ({"messages": [3]}, "messages"), ({"messages": [{}]}, "role"),
    ({"messages": [{"role": "cat", "content": "a"}]}, "role"),
    ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type"),
    ({"messages": [{"role": "user", "content": "a", "cat": 1}]}, "cat"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}] * 1001}, "messages"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"top_p": 1.1}, "top_p"), ({"top_p": []}, "top_p"),
    ({"temperature": 10 ** 400}, "temperature"), ({"stream": 1}, "stream"),
    ({"tools": {}}, "tools"), ({"tools": [{}]}, "tools"), ({"tool_choice": 3}, "tool_choice"),
    ({"cat": 1}, "cat"), ({"top_k": 3}, "top_k")]
OPENAI = [
    ({"seed": 2 ** 64}, "seed"), ({"seed": 1.0}, "seed"), ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"), ({"stop": [3]}, "stop"), ({"stop": "a" * 201}, "stop"), ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"functions": []}, "functions"), ({"modalities": ["audio"]}, "modalities"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "enum": [*range(1000)]}}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "array", "items": {"const": 40_000 * "x"}}}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "cat"}}}}, "response_format.json_schema.schema"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
     "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
        "url": "https://example.com/a.png"}}]}]}, "messages[0].content[0].image_url.url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
        "url": "file:///etc/passwd"}}]}]}, "messages[0].content[0].image_url.url")]
OPENAI += [({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
    "url": f"data:image/png;base64,{data}"}}]}]}, "messages[0].content[0].image_url.url")
    for data in (BOMB, NOT_A_PICTURE, EPS, "", "%%%", "é")]
USER = {"role": "user", "content": "a"}
USE = {"id": "c0", "type": "function", "function": {"name": "find", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [USE]}
OPENAI += [({"messages": messages}, place) for messages, place in [
    ([USER, {"role": "tool", "tool_call_id": "c0", "content": "a"}], "messages[1]"),
    ([USER, CALLED, USER], "messages[2]"), ([USER, CALLED], "messages[1]"),
    ([USER, CALLED, {"role": "tool", "tool_call_id": "c1", "content": "a"}], "messages[2]"),
    ([USER, CALLED, {"role": "tool", "content": "a"}], "messages[2].tool_call_id"),
    ([USER, {**CALLED, "tool_calls": [USE, USE]}, USER], "messages[1]"),
    ([USER, {"role": "assistant", "content": "b"}], "messages[1]"),
    ([USER, {"role": "assistant"}, USER], "messages[1].content"),
    ([USER, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "b"}, USER],
     "messages[2]"),
    ([{"role": "assistant", "content": "b"}, USER], "messages[0]"),
    ([{"role": "system", "content": "b"}], "messages"),
    ([{"role": "system", "content": [uri()]}, USER], "messages[0].content[0].type"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [
        {**USE, "function": {"name": "find", "arguments": "{"}}]}, USER],
     "messages[1].tool_calls[0].function.arguments"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [
        {**USE, "function": {"name": "a b", "arguments": "{}"}}]},
      {"role": "tool", "tool_call_id": "c0", "content": "a"}], "messages"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [
        {**USE, "function": {"name": "find", "arguments": '{"word": "\\ud800"}'}}]},
      {"role": "tool", "tool_call_id": "c0", "content": "a"}], "messages"),
    ([{"role": "user", "content": [uri()] * 17}], "messages")]]
ANTHROPIC = [
    ({"max_tokens": None}, "max_tokens"), ({"temperature": 1.5}, "temperature"),
    ({"system": 3}, "system"), ({"system": [block()]}, "system.0.type"),
    ({"stop_sequences": "a"}, "stop_sequences"), ({"stop_sequences": [" "]}, "stop_sequences"),
    ({"stop_sequences": ["a" * 201]}, "stop_sequences"),
    ({"mcp_servers": [{}]}, "mcp_servers"), ({"container": "c"}, "container"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "hard"}}, "thinking.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [{"name": "a"}]}, "tools.0.input_schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"name": "a", "input_schema": {"type": "object"}}],
      "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice.name"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"messages": [USER, {"role": "assistant", "content": "b "}]}, "messages.1"),
    ({"messages": [USER, {"role": "assistant", "content": []}]}, "messages.1"),
    ({"messages": [{"role": "user", "content": [result(0, said("a"))]}]}, "messages.0.content.0"),
    ({"messages": [USER, called(0, x=1), {"role": "user", "content": "a"}]}, "messages.2"),
    ({"messages": [USER, called(0, x=1)]}, "messages.1"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {
        "type": "url", "url": "http://localhost/a.png"}}]}]}, "messages.0.content.0.source.type")]
ANTHROPIC += [({"messages": [{"role": "user", "content": [{"type": "image", "source": {
    "type": "base64", "media_type": "image/png", "data": data}}]}]},
    "messages.0.content.0.source.data") for data in (BOMB, NOT_A_PICTURE, EPS, "", "%%%")]


@pytest.mark.parametrize("protocol, fields, place", [
    *(("openai", *case) for case in OPENAI), *(("anthropic", *case) for case in ANTHROPIC),
    *((protocol, *case) for protocol in PROTOCOLS for case in BOTH)],
    ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(protocol, fields, place):
    error = refused(protocol, ask(protocol) | fields)
    assert error.status == 400 and place in error.param
    assert error.message.startswith(error.param)
    body = PROTOCOLS[protocol].error(error)
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["message"]


def test_errors_in_each_form():
    error = refused("openai", ask("openai", model="gpt"))
    assert (error.status, PROTOCOLS["openai"].error(error)["error"]["code"]) == (
        404, "model_not_found")
    assert PROTOCOLS["openai"].error(error)["error"]["param"] == "model"
    error = refused("anthropic", ask("anthropic", model="claude"))
    assert PROTOCOLS["anthropic"].error(error) == {
        "type": "error", "error": {"type": "not_found_error", "message": error.message}}
    for status, kind in ((401, "authentication_error"), (429, "rate_limit_error"),
                         (503, "overloaded_error"), (500, "api_error"), (413, "request_too_large"),
                         (405, "invalid_request_error")):
        assert PROTOCOLS["anthropic"].error(ApiError(status, "", ""))["error"]["type"] == kind
    stream = PROTOCOLS["anthropic"].stream(read("anthropic", ask("anthropic")))
    (name, data), = events_of(stream.fail(ApiError(500, "", "broken")))
    assert name == "error" and data["error"] == {"type": "api_error", "message": "broken"}


def test_a_prompt_that_is_too_long():
    for protocol in PROTOCOLS:
        chat = read(protocol, ask(protocol, "cat " * 3000))
        with pytest.raises(ApiError, match="the prompt is too long: .* tokens, .* 1024"):
            start(chat, TOKENS, CONFIG, LIMITS)
        chat = read(protocol, ask(protocol, "cat " * 1_000_000))
        with pytest.raises(ApiError, match="the prompt is too long: 4,000,000 characters"):
            start(chat, TOKENS, CONFIG, LIMITS)


def test_a_beginning_of_the_reply_that_is_too_long():
    """Its form never reads it: letter by letter that would take seconds."""
    schema = {"format": {"type": "json_schema", "schema": {"type": "string"}}}
    for words, said in ((3000, "too long: .* tokens, .* 1024"), (10 ** 6, "too long: .* char")):
        body = ask("anthropic", output_config=schema)
        body["messages"].append({"role": "assistant", "content": '"' + "cat " * words + "x"})
        with pytest.raises(ApiError, match=said):
            start(read("anthropic", body), TOKENS, CONFIG, LIMITS)


def test_messages_that_follow_on_one_another_are_one():
    body = ask("anthropic") | {"messages": [
        {"role": "user", "content": "a"}, {"role": "user", "content": [block()]},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]}
    assert lines_of(read("anthropic", body).messages) == [
        ("user", "a\n<|image|>\nb", 1), ("assistant", "c\nd", 0), ("user", "e", 0)]


def test_pictures_are_counted_before_they_are_looked_at(monkeypatch):
    monkeypatch.setattr("lib.images.Picture.size", property(lambda self: pytest.fail("looked at")))
    for protocol, one in (("openai", uri()), ("anthropic", block())):
        assert refused(protocol, ask(protocol, [one] * 17)).kind == "too_many"


def test_a_damaged_picture_is_found_at_the_latest_when_it_is_decoded():
    body = ask("anthropic", [block() | {"source": {
        "type": "base64", "media_type": "image/png", "data": CUT_OFF}}, said("A?")])
    with pytest.raises(ApiError) as caught:
        start(read("anthropic", body), TOKENS, CONFIG, LIMITS)
    assert caught.value.status == 400 and caught.value.kind == "invalid_image"
    assert "messages.0.content.0.source.data can't be read" in caught.value.message


def test_models():
    for protocol in PROTOCOLS.values():
        assert [m["id"] for m in protocol.models(LIMITS)["data"]] == ["demo", "nanoglm-v"]
        with pytest.raises(ApiError):
            protocol.model("gpt", LIMITS)


FULL = {
    "openai": ask("openai", [uri(), said("A?")], max_tokens=5, temperature=1, top_p=0.5, seed=1,
                  stop=["a"], stream=True, stream_options={"include_usage": True},
                  tools=openai_tools([FIND]), tool_choice="auto", reasoning_effort="low", n=1,
                  response_format={"type": "text"}),
    "anthropic": ask("anthropic", [block(), said("A?")], system=[said("b")], top_p=0.5,
                     stop_sequences=["a"], stream=True, tools=anthropic_tools([FIND]),
                     tool_choice={"type": "auto"}, metadata={"user_id": "a"},
                     thinking={"type": "enabled", "budget_tokens": 5})}
FULL["openai"]["messages"] += [CALLED, {"role": "tool", "tool_call_id": "c0", "content": "b"}]
FULL["anthropic"]["messages"] += [called(0, word="b"), {"role": "user", "content": [
    result(0, said("b"), block())]}]
FULL["anthropic"]["messages"][1]["content"][1]["name"] = "find"
ODD = [None, True, -1, 1.5, 10 ** 30, "", "a", "\0", [], [[]], {}, {"type": "text"}, [None], ["a"],
       [{}], {"a": {"b": []}}]


def places_in(value, path=()):
    """The paths of all values inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items if isinstance(value, (dict, list)) else ():
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places_in(child, (*path, key))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_value_anywhere_is_read_or_refused(protocol):
    """Each value of a full request is replaced, removed and copied: never another exception."""
    read(protocol, FULL[protocol])
    answers = 0
    for path in places_in(FULL[protocol]):
        for odd in [*ODD, "remove"]:
            holder = body = deepcopy(FULL[protocol])
            for key in path[:-1]:
                holder = holder[key]
            if odd == "remove":
                holder.pop(path[-1])
            else:
                holder[path[-1]] = odd
            try:
                PROTOCOLS[protocol].read(body, LIMITS)
                answers += 1
            except ApiError as error:
                assert error.status in (400, 404) and error.message
    assert answers > 50
