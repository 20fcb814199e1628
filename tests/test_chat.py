"""sample.py chat: messages, pictures, commands, what is saved, and what stops it."""
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import lib.terminal as terminal
import sample
from engine import Engine
from lib.card import seen
from lib.checkpoint import load_model
from lib.common import ROOT
from lib.conversations import conversation
from lib.shards import open_shards
from lib.terminal import Conversation, Screen, talk
from lib.turns import cut_at_stop, ReplySettings, TextStream
from rl import DEMO
from tasks.base import IMAGE, Message
from tokenizer import tokenizer_of

EXAMPLE = ROOT / "docs/example.png"
COLOR = "What color is the diamond?"
PINK = "<|begin_of_box|>pink<|end_of_box|>"


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model(DEMO)


@pytest.fixture(scope="module")
def trained(model):
    return seen(DEMO, model.config)


@pytest.fixture
def script(model, trained, monkeypatch):
    """sample.py with the model loaded already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sample, "load_model", lambda *_: model)
    monkeypatch.setattr(sample, "seen", lambda *_: trained)
    return sample


@pytest.fixture
def chat(model, capsys):
    """chat(*lines, ...) -> (the Conversation, stdout, stderr)"""
    def call(*lines, conversation=None, terminal=False, **settings):
        settings = ReplySettings(**{"max_new": 24, **settings})
        conversation = conversation or Conversation(model, settings)
        talk(conversation, [str(line) for line in lines], terminal)
        return conversation, *capsys.readouterr()
    return call


def exact(messages) -> list[tuple]:
    """What the model is given of messages: roles, texts and pixels."""
    return [(m.role, m.text, [image.open().tobytes() for image in m.images]) for m in messages]


# ---- messages and pictures ----------------------------------------------------------------------

def test_a_picture_belongs_to_the_next_message_and_all_messages_are_kept(chat):
    talked, out, err = chat(f"/image {EXAMPLE}", COLOR, "", "List all.")
    first, second = out.splitlines()
    assert first == "pink" and "orange square" in second
    assert err == f"{EXAMPLE} is seen at 64x64 pixels\n"
    assert [m.role for m in talked.messages] == ["user", "assistant"] * 2
    assert [m.text for m in talked.messages[:3]] == [IMAGE + COLOR, PINK, "List all."]
    assert [len(m.images) for m in talked.messages] == [1, 0, 0, 0]


def test_several_pictures(chat):
    talked, _, _ = chat(f"/image {EXAMPLE}", f"/image '{EXAMPLE}'", COLOR)
    assert talked.messages[0].text == IMAGE * 2 + COLOR and len(talked.messages[0].images) == 2


def test_what_the_user_types_is_no_mark(chat, model):
    """Special tokens in a message are text, and so is the place of a picture."""
    talked, _, _ = chat("one <|image|> <|user|>")
    ids = tokenizer_of(model.config).chat(talked.messages[:1], answer=True)
    users = [id for piece, _, _ in ids for id in piece].count(
        tokenizer_of(model.config).mark("<|user|>"))
    assert users == 1 and talked.messages[0].images == ()


def test_chat_replies_as_ask_does(script, capsys):
    options = dict(ckpt="ckpt/demo", device="cpu", dtype="float32")
    for question in (COLOR, "List all.", "Is there a dog?"):
        script.ask(script.Ask(question, [str(EXAMPLE)], **options))
        asked = capsys.readouterr()
        script.chat(script.Chat(**options), [f"/image {EXAMPLE}", question])
        said = capsys.readouterr()
        assert said.out == asked.out
        assert ("unlike its training" in said.err) == ("unlike its training" in asked.err) == (
            "dog" in question)


def test_each_reply_has_draws_of_its_own_and_a_seed_repeats_them(chat):
    lines = ["List all.", "/reset"] * 3
    once, again, other = (chat(*lines, temperature=2.0, seed=seed, max_new=6)[1]
                          for seed in (3, 3, 2 ** 63 - 1))
    assert once == again != other and len(set(once.splitlines())) > 1


def test_replies_come_piece_by_piece(chat, monkeypatch):
    pieces = []
    show = Screen.show
    monkeypatch.setattr(Screen, "show", lambda self, kind, text: (
        pieces.append(text), show(self, kind, text)))
    _, out, _ = chat(f"/image {EXAMPLE}", "List all.")
    assert len(pieces) > 3 and "".join(pieces).strip() == out.strip()


def test_pieces_join_to_the_whole_text(model):
    """Of any tokens: special ones, halves of characters, and what might become a stop text."""
    tokens = tokenizer_of(model.config)
    for seed in range(40):
        ids = np.random.default_rng(seed).integers(0, tokens.vocab_size, 60).tolist()
        stop = (("ab", tokens.plain(ids)[20:22]) if seed % 2 else ())
        stream = TextStream(tokens, stop)
        pieces = [stream.add(ids[:n], n == 60) for n in range(1, 61)]
        assert "".join(pieces) == cut_at_stop(tokens.plain(ids), stop)[0]
        assert sum(map(bool, pieces)) > 3


def test_drafts_are_spoken_of_once(model, capsys):
    talked = Conversation(model, ReplySettings(8), drafts=model.config.mtp_depths + 1)
    talk(talked, ["List all.", "List all."])
    assert capsys.readouterr().err.count("the MTP head was trained for") == 1


# ---- thoughts -----------------------------------------------------------------------------------

def test_a_thought_is_kept_with_its_reply(chat, tmp_path):
    """The budget is over after five tokens, and the model has to reply."""
    file = tmp_path / "chat.jsonl"
    talked, out, err = chat("/think on", f"/image {EXAMPLE}", "List all.", "/think off", COLOR,
                            "/think 7", f"/save {file}", think=5)
    thought = re.match(r"<think>(.+)</think>\n(.+)", talked.messages[1].text)
    lines = err.splitlines()
    assert lines[0] == "a thought of up to 5 tokens before each reply"
    assert lines[2] == thought[1] and lines[3] == "no thoughts"
    assert lines[4] == "/think takes on or off" and thought[1] not in out
    assert "<think>" not in talked.messages[3].text
    saved = json.loads(file.read_text())["messages"]
    assert saved[1] == {"role": "assistant", "reasoning_content": thought[1], "content": thought[2]}
    assert exact(conversation(open_shards(str(file))[0])) == exact(talked.messages)


# ---- saving and loading -------------------------------------------------------------------------

def test_a_saved_chat_is_loaded_and_goes_on(chat, tmp_path):
    file = tmp_path / "a chat.jsonl"
    first, _, err = chat(f"/image {EXAMPLE}", COLOR, f"/save {file}")
    assert f"2 messages were added to {file}" in err
    saved = json.loads(file.read_text())["messages"]
    assert saved[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert saved[0]["content"][1:] == [{"type": "text", "text": COLOR}]
    assert saved[1] == {"role": "assistant", "content": PINK}
    again, _, err = chat("What is it?", f"/load {file}")
    assert "2 messages, 42 tokens of 4,096" in err
    assert exact(again.messages) == exact(first.messages)
    first, one, _ = chat("List all.", conversation=first)
    again, other, _ = chat("List all.", conversation=again)
    assert one == other and exact(again.messages) == exact(first.messages)


def test_save_adds_a_line_and_load_takes_the_last(chat, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "of somebody else"}')         # without a line break at its end
    talked, _, _ = chat(COLOR, f"/save {file}", "List all.", f"/save {file}")
    records = open_shards(str(file))
    assert len(records) == 3 and len(conversation(records[1])) == 2
    assert exact(conversation(records[2])) == exact(talked.messages)
    assert exact(chat(f"/load '{file}'")[0].messages) == exact(talked.messages)


# ---- what can't be done -------------------------------------------------------------------------

@pytest.mark.parametrize("line,message", [
    ("/sing", "there is no command /sing: /help lists them"), ("/images x", "no command /images"),
    ("/", "there is no command /"), ("/image", "the name of a file is missing"),
    ("/image DIR/nowhere.png", "no picture at"), ("/image DIR", "no picture at"),
    ("/image DIR/text", "it is in none of the formats JPEG"), ("/image DIR/empty", "empty"),
    ("/image \0", "the name of a file is missing"), ("/image ~nobody/x.png", "no picture at"),
    ("/think", "/think takes on or off"), ("/save DIR", "Is a directory"),
    ("/save DIR/no/x", "No such file"), ("/save ''", "the name of a file is missing"),
    ("/load DIR/nowhere", "No such file"), ("/load DIR/text", "is no JSON object but"),
    ("/load DIR/empty", "is empty"), ("/load DIR/plain", "is no conversation but plain text"),
    ("/load DIR/gone", "no picture at"), ("/load DIR/deep", "recursion|Expecting"),
    ("/load DIR/order", "the assistant's message is the first")])
def test_a_line_that_cant_be_followed(chat, tmp_path, line, message):
    """One line says why, and the conversation is as it was before."""
    (tmp_path / "text").write_text("7\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "plain").write_text('{"text": "a"}')
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "order").write_text('{"messages": [{"role": "assistant", "content": "a"}]}')
    (tmp_path / "gone").write_text(json.dumps({"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "gone.png"}}]},
        {"role": "assistant", "content": "a"}]}))
    if "empty" in line and "image" in line:
        (tmp_path / "empty").write_bytes(b"")
    talked, _, _ = chat(f"/image {EXAMPLE}")
    talked.messages = [Message("user", COLOR), Message("assistant", PINK)]
    before, waiting = list(talked.messages), list(talked.pictures)
    _, out, err = chat(line.replace("DIR", str(tmp_path)), conversation=talked)
    assert out == "" and err.count("\n") == 1 and re.search(message, err)
    assert talked.messages == before and talked.pictures == waiting


def test_nothing_to_save(chat, tmp_path):
    assert chat(f"/save {tmp_path}/x")[2] == "there is nothing to save yet\n"
    assert not (tmp_path / "x").exists()


def test_a_full_context_is_one_line_and_loses_nothing(chat, model, monkeypatch, tmp_path):
    monkeypatch.setattr(model.config.text, "max_position_embeddings", 100)
    file = tmp_path / "chat.jsonl"
    talked, out, err = chat(f"/image {EXAMPLE}", COLOR, f"/image {EXAMPLE}", "What? " * 40)
    assert out == "pink\n" and len(talked.messages) == 2 and len(talked.pictures) == 1
    full = err.splitlines()[-1]
    assert re.match(r"the context is full: \d+ tokens of 100; /save FILE keeps .*/reset", full)
    _, out, err = chat(f"/save {file}", "/reset", f"/image {EXAMPLE}", COLOR, conversation=talked)
    assert out == "pink\n" and len(talked.messages) == 2
    assert len(conversation(open_shards(str(file))[0])) == 2


def test_a_reply_that_is_cut_off(chat, model, monkeypatch):
    assert "cut off after 2 tokens; --max_new allows more" in chat("List all.", max_new=2)[2]
    monkeypatch.setattr(model.config.text, "max_position_embeddings", 43)
    talked, _, err = chat(f"/image {EXAMPLE}", "List all.")
    assert "cut off: the model reads 43 tokens at most" in err and len(talked.messages) == 2


def test_memory_that_does_not_suffice(chat, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 TiB")
    monkeypatch.setattr(Engine, "step", full)
    _, _, err = chat(COLOR, "/reset")
    assert err.splitlines()[-2:] == ["the memory does not suffice for that", "a new conversation"]
    monkeypatch.setattr(Engine, "step", lambda *_: [][1])
    with pytest.raises(IndexError):         # our own mistakes keep their traceback
        chat(COLOR)


# ---- how it ends --------------------------------------------------------------------------------

def interrupt(monkeypatch, steps: int):
    """Ctrl-C after so many steps of the engine."""
    step, done = Engine.step, iter(range(steps))

    def until(self):
        if next(done, None) is None:
            raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Engine, "step", until)


def test_ctrl_c_stops_a_reply_and_keeps_it(chat, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        talked, out, err = chat(f"/image {EXAMPLE}", "List all.", terminal=True)
    assert talked.messages[1] == Message("assistant", out.strip()) and "stopped\n" in err
    assert "purple triangle, pink diamond, orange square".startswith(out.strip()) and out.strip()
    _, out, _ = chat("/reset", f"/image {EXAMPLE}", COLOR, conversation=talked)
    assert out == "pink\n"


def test_ctrl_c_before_the_first_word(chat, monkeypatch):
    interrupt(monkeypatch, 0)
    talked, out, err = chat(f"/image {EXAMPLE}", COLOR, "/help", terminal=True)
    assert talked.messages == [] and len(talked.pictures) == 1 and out == "\n"
    assert "your message was not kept\nstopped\n" in err and "/save FILE" in err


def test_without_a_terminal_ctrl_c_ends_it(chat, monkeypatch):
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        chat(COLOR, "List all.")


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit", " /quit "])
def test_it_ends_with_one_line(model, monkeypatch, capsys, end):
    """What the user types at the prompt of a terminal."""
    lines, prompts = iter(["/think off", end, "never read"]), []

    def typed(prompt):
        prompts.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    talk(Conversation(model, ReplySettings()), None, True)
    out, err = capsys.readouterr()
    assert prompts == ["> ", "> "] and out == ""
    assert err == "no thoughts\n\nthe chat has ended\n"


def test_a_pipe(script, monkeypatch, capsys):
    """Only replies on stdout; bytes that are no text do no harm."""
    lines = f"/image {EXAMPLE}\n{COLOR}\n\n/nope\nWhat is \n".encode() + b"\xff?\n/reset"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    script.chat(script.Chat(ckpt="ckpt/demo", max_new=8, device="cpu", dtype="float32"))
    out, err = capsys.readouterr()
    assert out.startswith("pink\n") and ">" not in out and out.count("\n") == 3
    assert err.startswith("ckpt/demo: 1.0M parameters, trained on shape_attr")
    assert err.count("/nope") == 1 and err.endswith("a new conversation\n")


# ---- what is shown ------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_thoughts_are_dim_and_control_characters_are_not_obeyed(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    screen = Screen("click(")
    screen.show("text", "1, 2)\n")
    screen.end()
    screen = Screen()
    for kind, text in (("thought", "\n why"), ("thought", " not \n"), ("text", "\n a\x1b[2J"),
                       ("text", "\n"), ("text", "b\t\x9b")):
        screen.show(kind, text)
    screen.end()
    dim, normal = terminal.DIM, terminal.NORMAL
    assert shown.getvalue() == (f"click(1, 2)\n{dim}why{normal}{dim} not{normal}\n"
                                "a\ufffd[2J\nb\t\ufffd\n")


def test_the_introduction(model, trained):
    assert terminal.introduction("x", model, None).splitlines() == [
        "x: 1.0M parameters", "no file beside it says what it was trained on"]
    many = replace(trained, questions={str(n): {} for n in range(9)})
    assert "trained on 9 categories of the gym" in terminal.introduction("x", model, many)
