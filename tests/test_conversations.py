"""Own data as conversations: every layout, marks, videos, calls of tools, and what is refused."""
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import document
from lib.cli import UserError
from lib.conversations import (call_text, CAPTIONS, conversation, layout_of, LLAVA, NANOVLM, OPENAI,
                               openai_record, parse_call, PLAIN, plain_text, QUESTIONS)
from lib.images import BadRecord, Frames, Picture
from lib.shards import Record
from model import sized
from tasks.base import IMAGE, Message
from tasks.verify import parse_action
from tokenizer import Tokenizer

TINY = sized("tiny")
TOKENS = Tokenizer(TINY.n_ranks)


def raw(value=None, text=None, pictures=()) -> Record:
    """A record that is not in a file: its value, the text and the pictures beside it."""
    pictures = list(pictures)
    return Record("made up", value, text, pictures, [str(p) for p in pictures], Path())


def says(role, content, **fields):
    return {"role": role, "content": content, **fields}


def talk(*turns, **fields):
    """A record of OpenAI's layout."""
    return raw({"messages": list(turns), **fields})


def shown(messages) -> list[tuple]:
    """[(role, text, names of pictures), ...]"""
    return [(m.role, m.text, [str(image) for image in m.images]) for m in messages]


def refused(record) -> str:
    """The kind of the BadRecord that a record raises."""
    with pytest.raises(BadRecord) as caught:
        conversation(record)
    assert str(caught.value) and "\n" not in str(caught.value)
    return caught.value.kind


def image_part(name):
    return {"type": "image_url", "image_url": {"url": name}}


# ---- layouts ------------------------------------------------------------------------------------

ASKED = [("user", IMAGE + "What is it?", ["cat.png"]), ("assistant", "A cat.", [])]


@pytest.mark.parametrize("layout,record", [
    (OPENAI, talk(says("user", [image_part("cat.png"), {"type": "text", "text": "What is it?"}]),
                  says("assistant", "A cat."))),
    (OPENAI, talk(says("user", [{"type": "input_image", "image_url": "cat.png"},
                                {"type": "input_text", "text": "What is it?"}]),
                  says("assistant", [{"type": "output_text", "text": "A cat."}]))),
    (OPENAI, talk(says("user", [{"image": "cat.png"}, {"text": "What is it?"}]),
                  says("assistant", "A cat."))),
    (OPENAI, talk(says("user", [{"type": "image", "text": None}, {"type": "text", "image": None,
                                                                  "text": "What is it?"}]),
                  says("assistant", "A cat."), images=["cat.png"])),
    (OPENAI, talk(says("user", "<image>What is it?"), says("assistant", "A cat."),
                  images=["cat.png"])),
    (LLAVA, raw({"id": 7, "image": "cat.png", "conversations": [
        {"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]})),
    (LLAVA, raw({"conversations": [
        {"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]},
        pictures=[Picture("cat.png")])),
    (NANOVLM, raw({"images": ["cat.png"], "texts": [
        {"user": "What is it?", "assistant": "A cat.", "source": "vqa"}]})),
    (QUESTIONS, raw({"image": "cat.png", "question": "What is it?", "answer": "A cat."})),
    (QUESTIONS, raw({"images": ["cat.png"], "question": "What is it?", "answers": ["A cat.", "cat"],
                     "metric": "anls", "group": "cats"})),
])
def test_one_question_in_every_layout(layout, record):
    assert layout_of(record) == layout
    assert shown(conversation(record)) == ASKED


@pytest.mark.parametrize("record", [
    raw({"image": "cat.png", "caption": "A cat."}), raw({"image": "cat.png", "text": "A cat."}),
    raw(None, "A cat.", [Picture("cat.png")]),
    raw({"url": "http://x", "caption": "no"}, "A cat.", [Picture("cat.png")])])
def test_a_caption_is_the_answer_to_its_picture(record):
    assert layout_of(record) == CAPTIONS
    assert shown(conversation(record)) == [("user", IMAGE, ["cat.png"]), ASKED[1]]


@pytest.mark.parametrize("fields,question,reply", [
    ({"answer": "a cat", "metric": "choice", "choices": ["a dog", "a cat"]},
     "Which?\nA. a dog\nB. a cat", "B"),
    ({"answer": "C", "metric": "choice", "choices": ["A", "B", "C"]}, "Which?", "C"),
    ({"answer": [10, 20, 30, 61], "metric": "iou"}, "Which?", "[10, 20, 30, 61]"),
    ({"answer": [10, 20, 30, 61], "metric": "point-in-box"}, "Which?", "[20, 40]"),
    ({"answers": [40, "40%"], "metric": "relaxed"}, "Which?", "40")])
def test_questions_are_answered_as_their_metric_asks(fields, question, reply):
    found = conversation(raw({"question": "Which?", **fields}))
    assert shown(found) == [("user", question, []), ("assistant", reply, [])]


def test_plain_text_is_no_conversation():
    for record in (raw({"text": "Once."}), raw(None, "Once.")):
        assert layout_of(record) == PLAIN and plain_text(record) == "Once."
    assert plain_text(talk(says("user", "a"), says("assistant", "b"))) is None
    for value in ({"words": 1}, {}, {"text": None}):
        with pytest.raises(BadRecord) as caught:
            plain_text(raw(value))
        assert caught.value.kind == "unknown layout"


def test_pictures_and_turns_keep_their_order():
    record = raw({"images": ["a", "b", "c"], "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "First <image>, second <image>."},
        {"from": "gpt", "value": "Yes"},
        {"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "No"}]})
    assert shown(conversation(record)) == [
        ("system", "Be brief.", []), ("user", f"First {IMAGE}, second {IMAGE}.", ["a", "b"]),
        ("assistant", "Yes", []), ("user", f"{IMAGE}\nAnd this?", ["c"]), ("assistant", "No", [])]
    several = raw({"images": ["a", "b"], "texts": [{"user": "1", "assistant": "2"},
                                                    {"user": "3", "assistant": "4"}]})
    assert shown(conversation(several))[::2] == [("user", IMAGE * 2 + "1", ["a", "b"]),
                                                 ("user", "3", [])]


def test_tools_thoughts_and_weights():
    call = {"id": "1", "type": "function",
            "function": {"name": "search", "arguments": '{"query": "cats", "deep": true}'}}
    record = talk(
        says("developer", "Use tools."), says("user", "Cats?", name="Ann"),
        says("assistant", None, tool_calls=[call], reasoning_content="I look them up.", weight=0),
        says("tool", [image_part("found.png"), {"type": "text", "text": "3 cats"}],
             tool_call_id="1"),
        says("assistant", "<|begin_of_box|>3<|end_of_box|>", weight=0.5))
    messages = conversation(record)
    assert shown(messages) == [
        ("system", "Use tools.", []), ("user", "Cats?", []),
        ("assistant", '<think>I look them up.</think>\nsearch(query="cats", deep=True)', []),
        ("observation", IMAGE + "3 cats", ["found.png"]),
        ("assistant", "<|begin_of_box|>3<|end_of_box|>", [])]
    assert [m.weight for m in messages] == [None, None, 0, None, 0.5]
    both = conversation(talk(says("user", "x"), says("assistant", "Two.", tool_calls=[call, call])))
    assert both[1].text == "\n".join(["Two."] + ['search(query="cats", deep=True)'] * 2)
    boxed = document([messages[1], messages[4]], TOKENS, TINY)
    learnt = TOKENS.decode(boxed.ids[boxed.weights == 0.5])
    assert learnt == "<|begin_of_box|>3<|end_of_box|><|user|>" and set(boxed.weights) == {0, 0.5}


def test_a_thought_reads_as_those_of_the_gym():
    record = talk(says("user", "7+1?"), says("assistant", "8", reasoning_content="One more."))
    assert conversation(record)[1] == Message("assistant", "<think>One more.</think>\n8")


# ---- marks that are not ours --------------------------------------------------------------------

def test_a_mark_typed_by_the_user_is_text(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    picture = Picture(tmp_path / "a.png")
    turn = {"user": f"Is {IMAGE} a mark? <|user|>", "assistant": f"No, {IMAGE}."}
    typed = raw({"texts": [turn]}, pictures=[picture])
    [question, reply] = conversation(typed)
    assert question.text == f"{IMAGE}Is < |image|> a mark? <|user|>"
    made = document([question, reply], TOKENS, TINY)
    assert (made.ids == TOKENS.image).sum() == 4 and len(made.images) == 1     # 32 x 32: 2 x 2
    assert TOKENS.decode(made.ids[made.weights == 1]) == f"No, {IMAGE}.<|user|>"
    assert (made.ids == TOKENS.special["<|user|>"]).sum() == 2      # the question's, the reply's
    halves = says("user", [{"type": "text", "text": "<|ima"}, {"type": "text", "text": "ge|> "},
                           image_part("a")])
    assert conversation(talk(halves, says("assistant", "b")))[0].text == f"< |image|> {IMAGE}"


def test_image_is_a_word_where_no_pictures_are_listed():
    record = talk(says("user", "What does <image> do?"), says("assistant", "<image> is a tag."))
    assert [m.text for m in conversation(record)] == ["What does <image> do?", "<image> is a tag."]
    parts = says("user", [image_part("a.png"), {"type": "text", "text": "Does it say <image>?"}])
    assert conversation(talk(parts, says("assistant", "No")))[0].text.endswith("say <image>?")


@pytest.mark.parametrize("images,text", [
    (["a"], "no mark"), ([], "<image>"), (["a"], "<image><image>"), (["a", "b"], "<image>")])
def test_as_many_marks_as_pictures(images, text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
    assert refused(raw({"images": images, "conversations": turns})) == "image marks"
    assert refused(raw({"conversations": turns}, pictures=map(Picture, images))) == "image marks"


# ---- what is refused ----------------------------------------------------------------------------

Q, A = says("user", "Q"), says("assistant", "A")


@pytest.mark.parametrize("kind,record", [
    ("no question", raw({"question": 5, "answer": "yes"})),
    ("odd answer", raw({"question": "Which?"})),
    ("odd answer", raw({"question": "Which?", "answer": "c", "metric": "choice",
                        "choices": ["a", "b"]})),
    ("odd choices", raw({"question": "Which?", "answer": "a", "choices": "a"})),
    ("unknown role", talk(Q, says("robot", "A"))), ("unknown role", talk(Q, {"content": "A"})),
    ("unknown role", talk(says(["user"], "Q"), A)), ("no reply", talk(Q)),
    ("wrong role order", talk(A, Q, A)), ("wrong role order", talk(Q, A, A)),
    ("wrong role order", talk(Q, A, says("system", "S"), Q, A)),
    ("empty content", talk(says("user", " \n"), A)),
    ("empty content", talk(Q, says("assistant", ""))),
    ("empty content", talk(Q, says("assistant", None))), ("empty content", talk()),
    ("empty content", raw({"image": "a", "caption": " "})),
    ("empty content", raw({"texts": [{"user": "x"}]})),
    ("not a text", raw({"image": "a", "caption": ["a", "b"]})),
    ("not a text", talk(says("user", 5), A)),
    ("not a text", talk(says("user", [{"type": "text", "text": 5}]), A)),
    ("not an object", raw({"conversations": ["hi"]})),
    ("not an object", talk(says("user", [7]), A)),
    ("unknown part", talk(says("user", [{"type": "input_audio"}]), A)),
    ("wrong weight", talk(Q, A | {"weight": -1})), ("wrong weight", talk(Q, A | {"weight": "1"})),
    ("wrong weight", talk(Q, A | {"weight": float("nan")})),
    ("wrong weight", talk(Q, A | {"weight": True})),
    ("nothing to learn", talk(Q, A | {"weight": 0})),
    ("missing image", talk(says("user", [image_part(5)]), A)),
    ("missing image", talk(says("user", [{"type": "video", "video": [None]}]), A)),
    ("damaged data URI", talk(says("user", [image_part("data:image/png;base64,+")]), A)),
    ("picture in a reply", talk(Q, says("assistant", [image_part("a.png")]))),
    ("damaged tool call", talk(Q, says("assistant", None, tool_calls=[{"function": {
        "name": "f", "arguments": "{"}}]))),
    ("damaged tool call", talk(Q, says("assistant", None, tool_calls=[{"function": {
        "name": "f(x)", "arguments": "{}"}}]))),
    ("not an object", talk(Q, says("assistant", None, tool_calls=[5]))),
    ("wrong fps", talk(says("user", [{"type": "video", "video": ["a"], "fps": "fast"}]), A)),
    ("empty content", talk(says("user", [{"type": "video", "video": []}]), A)),
    ("unknown layout", raw({"prompt": "?"}))])
def test_what_cant_be_trained_on_is_named(kind, record):
    assert refused(record) == kind


def test_empty_observations_and_system_messages_are_no_fault():
    call = {"function": {"name": "f", "arguments": {}}}
    record = talk(says("system", ""), Q, says("assistant", None, tool_calls=[call]),
                  says("tool", ""), A)
    assert shown(conversation(record))[1:3] == [("assistant", "f()", []), ("observation", "", [])]


def test_nothing_in_a_record_raises_anything_else():
    """Random values in the places of a record's fields, at every depth."""
    rng = random.Random(0)
    odd = [None, 5, -1.5, True, "", "x", "<image>", [], {}, ["x"], {"url": "x"}, [[]], "\ud800",
           {"type": "image"}, {"type": "video", "video": "x"}, {"from": "gpt"}, float("inf")]

    def spoil(value):
        if rng.random() < 0.12:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: spoil(x) for key, x in value.items() if rng.random() < 0.95}
        return [spoil(x) for x in value] if isinstance(value, list) else value

    call = {"function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
    whole = [
        {"messages": [says("user", [image_part("a"), {"type": "text", "text": "Q"}], weight=1),
                      says("assistant", "A", tool_calls=[call], reasoning_content="R", weight=1),
                      says("tool", "T"), A]},
        {"image": "a", "conversations": [{"from": "human", "value": "<image>Q"},
                                         {"from": "gpt", "value": "A"}]},
        {"images": ["a", "b"], "texts": [{"user": "Q", "assistant": "A"}] * 2},
        {"videos": [["a", "b", "c"]], "messages": [says("user", "<video>Q"), A]},
        {"image": "a", "caption": "C"}]
    worked = 0
    for n in range(3000):
        record = raw(spoil(whole[n % len(whole)]) or {})
        if not isinstance(record.value, dict):
            continue
        try:
            if plain_text(record) is None:
                assert TOKENS.chat(conversation(record))
                worked += 1
        except BadRecord:
            pass
    assert 500 < worked < 2500


# ---- videos -------------------------------------------------------------------------------------

def test_a_video_is_pairs_of_frames_with_their_times(tmp_path):
    for n in range(5):
        Image.new("RGB", (64, 32), (50 * n, 0, 0)).save(tmp_path / f"{n}.png")
    names = [str(tmp_path / f"{n}.png") for n in range(5)]
    part = {"type": "video", "video": names, "fps": 2}
    [question, _] = conversation(talk(says("user", [part, {"type": "text", "text": "?"}]), A))
    assert question.text == f"{IMAGE}0.0 seconds{IMAGE}1.0 seconds{IMAGE}2.0 seconds?"
    assert [[str(p) for p in image.pictures] for image in question.images] == [
        names[:2], names[2:4], [names[4]] * 2]
    made = document([question, Message("assistant", "A")], TOKENS, TINY)
    # Three runs share the 16 tokens that a picture of `tiny` may have: at most 5 each.
    assert [image.shape for image in made.images] == [(2, 16, 48, 3)] * 3
    assert (made.ids == TOKENS.image).sum() == 9
    reds = [image[:, 0, 0, 0].tolist() for image in made.images]
    assert reds == [[0, 50], [100, 150], [200, 200]]
    listed = talk(says("user", "<video>?"), A, videos=[names])
    assert len(conversation(listed)[0].images) == 3


def test_a_long_video_is_thinned_evenly():
    part = {"type": "video", "video": [str(n) for n in range(100)]}
    [question, _] = conversation(talk(says("user", [part]), A), pairs=4)
    assert [str(image.pictures[0]) for image in question.images] == ["0", "32", "64", "98"]
    assert {image.pairs for image in question.images} == {4}
    [question, _] = conversation(talk(says("user", [part]), A), pairs=1)
    assert len(question.images) == 1


def test_a_gif_is_a_video(tmp_path):
    frames = [Image.new("RGB", (32, 32), (80 * n, 0, 0)) for n in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[500] * 4)
    part = {"type": "video_url", "video_url": {"url": str(tmp_path / "a.gif")}}
    [question, _] = conversation(talk(says("user", [part]), A))
    assert question.text == f"{IMAGE}0.0 seconds{IMAGE}1.0 seconds"
    assert all(isinstance(image, Frames) for image in question.images)
    made = document([question, Message("assistant", "A")], TOKENS, TINY)
    reds = np.array([image[:, 0, 0, 0] for image in made.images])
    assert np.abs(reds - [[0, 80], [160, 240]]).max() <= 3
    still = {"type": "image", "image": str(tmp_path / "a.gif")}
    [question, _] = conversation(talk(says("user", [still]), A))
    made = document([question, Message("assistant", "A")], TOKENS, TINY)
    assert made.images[0].shape == (32, 32, 3)


# ---- what is written ----------------------------------------------------------------------------

def test_a_conversation_is_written_and_read_back(tmp_path):
    """Texts that look like marks, thoughts, pictures of two formats, a tool's reply, weights."""
    pictures = []
    for kind, color in (("PNG", "red"), ("JPEG", "blue")):
        file = io.BytesIO()
        Image.new("RGB", (8, 6), color).save(file, kind)
        pictures.append(Picture(file.getvalue()))
    Image.new("RGB", (4, 4), "green").save(tmp_path / "green.webp")
    pictures.append(Picture(tmp_path / "green.webp"))
    messages = [
        Message("system", "Be <image> brief."),
        Message("user", f"{IMAGE}{IMAGE}\nWhich one? 红 <video>", tuple(pictures[:2])),
        Message("assistant", "<think>red\nor blue</think>\n<|begin_of_box|>1<|end_of_box|>"),
        Message("user", f"And {IMAGE} this?", (pictures[2],)),
        Message("assistant", "<think></think>\nlook()", weight=0.5),
        Message("observation", "< |image|> {}"),
        Message("assistant", "<think>  </think>\n", weight=0.0)]
    record = json.loads(json.dumps(openai_record(messages)))
    kinds = [part["image_url"]["url"][:15] for turn in record["messages"]
             if isinstance(turn["content"], list) for part in turn["content"]
             if part["type"] == "image_url"]
    assert kinds == ["data:image/png;", "data:image/jpeg", "data:image/webp"]
    assert record["messages"][2]["reasoning_content"] == "red\nor blue"
    again = conversation(raw(record))
    assert [(m.role, m.text, m.weight) for m in again] == [
        (m.role, m.text, m.weight) for m in messages]
    assert [[p.open().tobytes() for p in m.images] for m in again] == [
        [p.open().tobytes() for p in m.images] for m in messages]


def test_a_video_is_not_written():
    video = Message("user", IMAGE, (Frames((Picture(b"x"),) * 2),))
    with pytest.raises(UserError, match="a conversation with a video can't be written"):
        openai_record([video])


# ---- calls of tools -----------------------------------------------------------------------------

def random_json(rng, depth=0):
    kinds = [None, True, False, rng.randrange(-10 ** 20, 10 ** 20), rng.uniform(-1e9, 1e9), 1e300,
             "".join(chr(rng.choice((34, 39, 92, 10, 0, 13, 0x7f, 0x2028, 0x4e2d, 0x1f600, 97)))
                     for _ in range(rng.randrange(8)))]
    if depth < 3 and rng.random() < 0.4:
        inside = [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inside if rng.random() < 0.5 else {f"k {n}\n": x for n, x in enumerate(inside)}
    return rng.choice(kinds)


def test_calls_come_back_as_they_were():
    rng = random.Random(1)
    keys = ["query", "x", "file-name", "class", "ﬁ", "", "a b", "None", "__debug__"]
    for _ in range(1000):
        count = rng.randrange(1, 4)
        arguments = {key: random_json(rng) for key in rng.sample(keys, count)}
        if rng.random() < 0.3:
            arguments = list(arguments.values())
        text = call_text("get-weather.now", arguments)
        name, back = parse_call(text)
        assert name == "get-weather.now" and back == arguments, text
        assert json.dumps(back) == json.dumps(arguments)        # True is not 1
        assert text.count("\n") == 0
    assert call_text("click", [412, 377]) == "click(412, 377)"
    assert call_text("type", ['say "hi"']) == 'type("say \\"hi\\"")'
    assert parse_action(call_text("type", ["hello"])) == ("type", ["hello"])    # the gym's own
    assert parse_call("f()") == ("f", {})


@pytest.mark.parametrize("text", [
    "", "hello", "f", "f(", "f(x)", "f(1)(2)", "f(__import__('os'))", "f(1, a=2)", "f(*[1])",
    "f((1, 2))", "f({1: 2})", "f({1, 2})", "f(b'x')", "f(1j)", "f(1); g(2)", "f(1) + g(2)",
    "a = f(1)", "f(a=x)", "2f(1)", "f(1e999)", "f(" + "[" * 5000 + "]" * 5000 + ")",
    "f(**[('a', 1)])", "f(lambda: 1)"])
def test_what_is_no_call_is_none(text):
    assert parse_call(text) is None


def test_what_is_no_call_cant_be_written():
    for name, arguments in (("f g", {}), ("", {}), (None, {}), ("f", None), ("f", "x"),
                            ("f", {"a": {1}}), ("f", [float("nan")]), ("f", {"a": float("inf")})):
        with pytest.raises(ValueError):
            call_text(name, arguments)
