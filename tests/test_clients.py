"""The official clients `openai` and `anthropic` against serve.py: they are the referees."""
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest

import gym
import serve
from lib.checkpoint import load_model
from lib.common import ROOT
from lib.forms import action_form, json_form
from lib.tool_use import read_call, Tool
from lib.turns import engine_for, play, ReplySettings, Turn
from tasks.base import Message
from tokenizer import tokenizer_of

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")
pytestmark = pytest.mark.slow       # importing both takes some seconds

MODEL = serve.MODEL
CLICK = Tool("click", "press a point, in 0-999 of the picture", {
    "type": "object", "required": ["x", "y"], "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 999},
        "y": {"type": "integer", "minimum": 0, "maximum": 999}}})
OPENAI_TOOLS = [{"type": "function", "function": {
    "name": "click", "description": CLICK.description, "parameters": CLICK.parameters}}]
ANTHROPIC_TOOLS = [{"name": "click", "input_schema": CLICK.parameters}]


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "ckpt" / "demo")


@pytest.fixture(scope="module")
def url(model):
    with serve.running(model, context=512, slots=8) as url:
        yield url


@pytest.fixture(scope="module")
def ours(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def theirs(url):
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        yield client


def expected(model, messages, **settings) -> Turn:
    """The reply that the engine gives on its own."""
    tokens = tokenizer_of(model.config)
    turn = Turn(messages, ReplySettings(**settings), tokens, model.config)
    return play(engine_for(model, turn), turn)


def question(category: str, seed: int):
    """(text, picture) of a task."""
    obs = gym.make(gym.Task(category, seed, split="test")).reset()
    return obs.text.replace(gym.IMAGE, ""), obs.images[0]


def asked(text, image) -> list[Message]:
    return [Message("user", gym.IMAGE + text, (image,))]


def png(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def part(image) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}


def block(image) -> dict:
    return {"type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": png(image)}}


def user(*content) -> dict:
    """A message of the user, the same in both protocols but for pictures."""
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c
                                        for c in content]}


# ---- plain, streamed, with a picture ------------------------------------------------------------

def test_openai_plain_and_streamed(ours, model):
    text, image = question("shape_attr", 1)
    wanted = expected(model, asked(text, image), max_new=20)
    request = dict(model=MODEL, messages=[user(part(image), text)], max_tokens=20, temperature=0)
    answer = ours.chat.completions.create(**request)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    assert answer.usage.completion_tokens == len(wanted.ids)
    with ours.chat.completions.stream(**request, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == wanted.text
    assert final.usage.total_tokens == wanted.prompt_tokens + len(wanted.ids)
    assert "".join(e.delta for e in events if e.type == "content.delta") == wanted.text


def test_anthropic_plain_and_streamed(theirs, model):
    text, image = question("shape_attr", 2)
    wanted = expected(model, asked(text, image), max_new=20)
    request = dict(model=MODEL, messages=[user(block(image), text)], max_tokens=20)
    answer = theirs.messages.create(**request)
    assert [b.text for b in answer.content] == [wanted.text]
    assert answer.stop_reason == "end_turn" and answer.usage.output_tokens == len(wanted.ids)
    with theirs.messages.stream(**request) as stream:
        assert "".join(stream.text_stream) == wanted.text
        final = stream.get_final_message()
    assert final.content[0].text == wanted.text and final.usage == answer.usage
    counted = theirs.messages.count_tokens(model=MODEL, messages=request["messages"])
    assert counted.input_tokens == wanted.prompt_tokens == answer.usage.input_tokens


def post(url: str, path: str, body: dict) -> str:
    """The answer to a request, as it was sent."""
    request = Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_answers_have_the_fields_that_the_clients_declare(url):
    """The clients take whatever comes, so their types check what was sent."""
    text, image = question("gui_click", 3)
    body = {"model": MODEL, "max_tokens": 20, "messages": [user(part(image), text)],
            "tools": OPENAI_TOOLS}
    openai.types.chat.ChatCompletion.model_validate_json(post(url, "/v1/chat/completions", body))
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, end, _ = post(url, "/v1/chat/completions", body).split("\n\n")
    for chunk in chunks:
        openai.types.chat.ChatCompletionChunk.model_validate_json(chunk.removeprefix("data: "))
    assert len(chunks) >= 4 and end == "data: [DONE]"
    body = {"model": MODEL, "max_tokens": 20, "messages": [user(block(image), text)],
            "tools": ANTHROPIC_TOOLS, "thinking": {"type": "enabled", "budget_tokens": 1}}
    anthropic.types.Message.model_validate_json(post(url, "/v1/messages", body))
    *events, _ = post(url, "/v1/messages", body | {"stream": True}).split("\n\n")
    kinds = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)
    for event in events:
        name, data = (line.partition(": ")[2] for line in event.split("\n"))
        if name != "ping":
            assert kinds.validate_json(data).type == name
    assert len(events) >= 8


def test_the_models_are_listed(ours, theirs):
    assert [m.id for m in ours.models.list()] == [m.id for m in theirs.models.list()] == [MODEL]
    assert ours.models.retrieve(MODEL).owned_by and theirs.models.retrieve(MODEL).type == "model"


def test_a_thought(ours, theirs, model):
    """The demo has not learnt to think: it goes on where its thought is cut off, and where it is
    not, the thought is all that it says."""
    text, image = question("counting", 1)
    request = dict(model=MODEL, max_tokens=20, messages=[user(block(image), text)],
                   thinking={"type": "enabled", "budget_tokens": 1})
    wanted = expected(model, asked(text, image), max_new=19, think=1)
    assert wanted.thought and wanted.text
    thinking, said = theirs.messages.create(**request).content
    assert (thinking.thinking, said.text) == (wanted.thought, wanted.text)
    with theirs.messages.stream(**request) as stream:
        thinking, said = stream.get_final_message().content
    assert (thinking.thinking.strip(), said.text) == (wanted.thought, wanted.text)
    wanted = expected(model, asked(text, image), max_new=10, think=10)
    answer = ours.chat.completions.create(model=MODEL, messages=[user(part(image), text)],
                                          reasoning_effort="low", max_tokens=20)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (wanted.thought, wanted.text)


# ---- forms, stops -------------------------------------------------------------------------------

def test_a_json_schema(ours, theirs, model):
    text, image = question("shape_attr", 3)
    schema = {"type": "object", "required": ["color", "sure"], "additionalProperties": False,
              "properties": {"color": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}}}
    wanted = expected(model, asked(text, image), max_new=60,
                      form=json_form(tokenizer_of(model.config), schema))
    answer = ours.chat.completions.create(
        model=MODEL, messages=[user(part(image), text)], max_completion_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert answer.choices[0].message.content == wanted.text
    found = json.loads(wanted.text)
    assert found["color"] in ("red", "blue") and isinstance(found["sure"], bool)
    answer = theirs.messages.create(
        model=MODEL, messages=[user(block(image), text)], max_tokens=60,
        output_config={"format": {"type": "json_schema", "schema": schema}})
    assert answer.content[0].text == wanted.text
    with pytest.raises(openai.BadRequestError, match="schema"):
        ours.chat.completions.create(model=MODEL, messages=[user("A?")], response_format={
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "cat"}}})


def test_stop_texts(ours, theirs, model):
    text, image = question("ocr_line", 1)
    whole = expected(model, asked(text, image), max_new=20).text
    stop = whole[1:2]
    answer = ours.chat.completions.create(
        model=MODEL, messages=[user(part(image), text)], stop=stop, max_tokens=20)
    assert answer.choices[0].message.content == whole[:whole.find(stop)] != ""
    assert answer.choices[0].finish_reason == "stop"
    with theirs.messages.stream(model=MODEL, messages=[user(block(image), text)], max_tokens=20,
                                stop_sequences=["#", stop]) as stream:
        shown, final = "".join(stream.text_stream), stream.get_final_message()
    assert shown == whole[:whole.find(stop)]
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)


def test_the_reply_goes_on_after_a_beginning(theirs, model):
    text, image = question("gui_click", 1)
    wanted = expected(model, asked(text, image), max_new=20, prefix="click(4")
    answer = theirs.messages.create(model=MODEL, max_tokens=20, messages=[
        user(block(image), text), {"role": "assistant", "content": "click(4"}])
    assert answer.content[0].text == wanted.text and wanted.raw.startswith("click(4")


def test_a_reply_is_cut_at_max_tokens(ours, theirs):
    answer = ours.chat.completions.create(model=MODEL, messages=[user("Say a lot.")], max_tokens=1)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 1
    answer = theirs.messages.create(model=MODEL, messages=[user("Say a lot.")], max_tokens=1)
    assert answer.stop_reason == "max_tokens"


# ---- tools --------------------------------------------------------------------------------------

def played(model, task) -> tuple[list[str], dict]:
    """(replies, evidence) of the model in the gym, without a server."""
    return gym.play_out(task, lambda env, messages: expected(model, messages, max_new=24).text)[1:]


def openai_loop(client, task, stream=False, shown="result"):
    """The same through OpenAI's tool loop. shown: whether a picture comes in the result or in a
    message of the user after it."""
    env = gym.make(task)
    obs, replies = env.reset(), []
    messages = [user(part(obs.images[0]), obs.text.replace(gym.IMAGE, ""))]
    while True:
        request = dict(model=MODEL, messages=messages, tools=OPENAI_TOOLS, max_tokens=24)
        if stream:
            with client.chat.completions.stream(**request) as events:
                answer = events.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**request).choices[0]
        call, = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        at = json.loads(call.function.arguments)
        replies.append(f"click({at['x']}, {at['y']})")
        step = env.step(replies[-1])
        if step.done:
            return replies, env.evidence()
        screen = part(step.obs.images[0])
        messages += [answer.message.to_dict(), {
            "role": "tool", "tool_call_id": call.id,
            "content": [screen] if shown == "result" else "clicked"}]
        messages += [user(screen)] * (shown == "user")


def anthropic_loop(client, task, stream=False, shown="result"):
    env = gym.make(task)
    obs, replies = env.reset(), []
    messages = [user(block(obs.images[0]), obs.text.replace(gym.IMAGE, ""))]
    while True:
        request = dict(model=MODEL, messages=messages, tools=ANTHROPIC_TOOLS, max_tokens=24)
        if stream:
            with client.messages.stream(**request) as events:
                answer = events.get_final_message()
        else:
            answer = client.messages.create(**request)
        use, = answer.content
        assert answer.stop_reason == "tool_use" and use.name == "click"
        replies.append(f"click({use.input['x']}, {use.input['y']})")
        step = env.step(replies[-1])
        if step.done:
            return replies, env.evidence()
        screen = block(step.obs.images[0])
        result = {"type": "tool_result", "tool_use_id": use.id,
                  "content": [screen] if shown == "result" else "clicked"}
        messages += [{"role": "assistant", "content": answer.content},
                     user(result, *[screen] * (shown == "user"))]


@pytest.mark.parametrize("stream, shown", [(False, "result"), (True, "user")])
def test_the_tool_loop_plays_a_form_as_the_gym_does(ours, theirs, model, stream, shown):
    """Action by action; the model of the demo solves nearly all forms."""
    solved = 0
    for seed in range(3):
        task = gym.Task("gui_form", seed, split="test")
        replies, evidence = played(model, task)
        for loop, client in ((openai_loop, ours), (anthropic_loop, theirs)):
            assert loop(client, task, stream=stream, shown=shown) == (replies, evidence)
        assert len(replies) > 1
        solved += gym.Rewards().score(task, evidence).reward == 1
    assert solved >= 2


def test_a_call_that_must_be_made(ours, theirs, model):
    """Also where the model would answer in words."""
    text, image = question("shape_attr", 5)
    form = action_form(tokenizer_of(model.config), ("click",))
    wanted = read_call(expected(model, asked(text, image), max_new=30, form=form).text, [CLICK])
    named = {"type": "function", "function": {"name": "click"}}
    for choice in ("required", named):
        answer = ours.chat.completions.create(
            model=MODEL, messages=[user(part(image), text)], tools=OPENAI_TOOLS, max_tokens=30,
            tool_choice=choice)
        call, = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == wanted.arguments
    for choice in ({"type": "any"}, {"type": "tool", "name": "click"}):
        answer = theirs.messages.create(
            model=MODEL, messages=[user(block(image), text)], tools=ANTHROPIC_TOOLS, max_tokens=30,
            tool_choice=choice)
        assert answer.content[0].input == wanted.arguments
    answer = ours.chat.completions.create(
        model=MODEL, messages=[user(part(image), text)], tools=OPENAI_TOOLS, max_tokens=30)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


# ---- many, leaving, errors ----------------------------------------------------------------------

def test_sixteen_at_once(ours, theirs, model):
    """Each gets the answer that it gets on its own, whoever else is served."""
    tasks = [question(name, seed) for seed in range(4)
             for name in ("shape_attr", "point", "ocr_line", "gui_click")]
    wanted = [expected(model, asked(*task), max_new=24).text for task in tasks]

    def ask(n):
        text, image = tasks[n]
        if n % 2:
            answer = theirs.messages.create(model=MODEL, messages=[user(block(image), text)],
                                            max_tokens=24)
            return answer.content[0].text
        chunks = ours.chat.completions.create(model=MODEL, messages=[user(part(image), text)],
                                              max_tokens=24, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == wanted


def test_leaving_in_mid_stream(ours, theirs, model):
    """Others are served meanwhile and afterwards."""
    text, image = question("shape_attr", 7)
    wanted = expected(model, asked(text, image), max_new=20).text
    long = dict(model=MODEL, messages=[user("Tell a long story.")], max_tokens=400)
    for _ in range(3):
        stream = ours.chat.completions.create(**long, temperature=2, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        stream.close()
        with theirs.messages.stream(**long) as events:
            assert next(iter(events)).type == "message_start"
        answer = ours.chat.completions.create(model=MODEL, messages=[user(part(image), text)],
                                              max_tokens=20)
        assert answer.choices[0].message.content == wanted


@pytest.mark.parametrize("fields, kind, code", [
    ({"model": "gpt-5"}, "NotFoundError", "model_not_found"),
    ({"messages": []}, "BadRequestError", "invalid_value"),
    ({"max_tokens": -1}, "BadRequestError", "out_of_range"),
    ({"seed": 2 ** 64}, "BadRequestError", "out_of_range"),
    ({"extra_body": {"cat": 1}}, "BadRequestError", "unknown_parameter"),
    ({"messages": [user("cat " * 2000)]}, "BadRequestError", "context_length_exceeded"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "http://a/b.png"}})]},
     "BadRequestError", "invalid_image_url"),
    ({"messages": [user("a"), {"role": "tool", "tool_call_id": "a", "content": "b"}]},
     "BadRequestError", "invalid_value")], ids=lambda value: str(value)[:40])
def test_errors_of_openai(ours, fields, kind, code):
    with pytest.raises(getattr(openai, kind)) as caught:
        ours.chat.completions.create(**{"model": MODEL, "messages": [user("A?")]} | fields)
    assert caught.value.code == code and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("fields, kind, name", [
    ({"model": "claude"}, "NotFoundError", "not_found_error"),
    ({"max_tokens": 0}, "BadRequestError", "invalid_request_error"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "BadRequestError",
     "invalid_request_error"),
    ({"extra_body": {"top_k": 5}}, "BadRequestError", "invalid_request_error"),
    ({"messages": [user("cat " * 2000)]}, "BadRequestError", "invalid_request_error"),
    ({"messages": [user({"type": "image", "source": {"type": "url", "url": "http://a/b.png"}})]},
     "BadRequestError", "invalid_request_error")], ids=lambda value: str(value)[:40])
def test_errors_of_anthropic(theirs, fields, kind, name):
    request = {"model": MODEL, "messages": [user("A?")], "max_tokens": 9}
    with pytest.raises(getattr(anthropic, kind)) as caught:
        theirs.messages.create(**request | fields)
    assert caught.value.body["error"]["type"] == name


def test_a_key(model):
    with serve.running(model, context=128, slots=1, api_key="secret") as url:
        for key, wrong in (("secret", False), ("cat", True)):
            ours = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            theirs = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
            if not wrong:
                assert list(ours.models.list()) and list(theirs.models.list())
                continue
            with pytest.raises(openai.AuthenticationError):
                ours.models.list()
            with pytest.raises(anthropic.AuthenticationError):
                theirs.models.list()
