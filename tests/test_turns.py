"""Turns and stop texts: what is shown of a reply, and where it ends. The engine samples from a
script here, so that every reply is known."""
import dataclasses

import pytest
import torch

import mmtp
from conftest import odd_config
from engine import Engine, Request
from lib.cli import UserError
from lib.forms import action_form, boxed_form
from lib.turns import cut_at_stop, play, prompt_of, ReplySettings, TextStream, Turn
from model import GLMV
from tasks.base import Message
from tokenizer import tokenizer_of

CONFIG = odd_config()
TOKENS = tokenizer_of(CONFIG)
BEGIN, END, THINK, CLOSE, USER = map(TOKENS.mark, (
    "<|begin_of_box|>", "<|end_of_box|>", "<think>", "</think>", "<|user|>"))
ASK = [Message("user", "Red?")]


@pytest.fixture(scope="module")
def model():
    return GLMV(CONFIG, seed=1).eval()


def letters(text: str) -> list[int]:
    """A token for each byte: ranks.txt begins with the 256 bytes, in order."""
    return list(text.encode())


class Scripted(Engine):
    """An engine that samples the tokens of a script: one list of ids for each request."""

    def __init__(self, model, *scripts, context=128):
        super().__init__(model, 2, context)
        self.scripts, self.requests = scripts, []

    def submit(self, request: Request) -> int:
        self.requests.append(request)
        return super().submit(request)

    def _sample(self, logits, first):
        return torch.tensor([self.scripts[s.id - 1][len(s.ids)] for s in self.running[first:]])


def played(model, *scripts, context=128, **settings) -> tuple[Turn, list, Scripted]:
    """The turn, its pieces [(kind, text), ...], and the engine."""
    engine, pieces = Scripted(model, *scripts, context=context), []
    turn = Turn(ASK, ReplySettings(**settings), TOKENS, CONFIG)
    play(engine, turn, lambda *piece: pieces.append(piece))
    assert turn.done and not engine.busy
    thought, text = ("".join(new for kind, new in pieces if kind == wanted)
                     for wanted in ("thought", "text"))
    assert text == turn.text and thought.strip() == turn.thought
    assert all(text for _, text in pieces)
    return turn, pieces, engine


# ---- the text in pieces -------------------------------------------------------------------------

def test_a_character_is_shown_when_it_is_complete(model):
    turn, pieces, _ = played(model, [*letters("aä漢🎈"), USER])
    assert [text for _, text in pieces] == ["a", "ä", "漢", "🎈"]
    assert (turn.text, turn.raw, turn.finish) == ("aä漢🎈", "aä漢🎈", "stop")
    assert turn.ids == [*letters("aä漢🎈"), USER]


@pytest.mark.parametrize("broken,text", [
    (b"a\xffb", "a\ufffdb"), (b"\xe6\xbc", "\ufffd"), (b"\xe6b", "\ufffdb"),
    (b"\xc3\xa4\x84", "ä\ufffd"), (b"\xf0\x9f\x8e", "\ufffd")], ids=str)
def test_wrong_bytes_become_replacement_characters(model, broken, text):
    assert played(model, [*broken, USER])[0].text == text


def test_special_tokens_are_not_shown(model):
    turn, pieces, _ = played(model, [BEGIN, *letters("7"), END, USER])
    assert (turn.text, turn.raw) == ("7", "<|begin_of_box|>7<|end_of_box|>")
    assert pieces == [("text", "7")]


def test_random_replies_come_in_pieces_that_never_change(model):
    """Of a model with random weights at temperature 1, with drafts: several tokens a step."""
    drafting, count = GLMV(CONFIG, seed=1).eval(), 0
    mmtp.attach(drafting, 2)
    for seed in range(8):
        stop = ("a", "##") if seed % 2 else ()
        settings = ReplySettings(40, temperature=1.0, seed=seed, stop=stop)
        for drafts, made in ((2, drafting), (0, model)):
            turn = Turn(ASK, settings, TOKENS, CONFIG)
            engine = Engine(made, 1, 128, drafts=drafts, adapt=False, say=lambda _: None)
            pieces = []
            play(engine, turn, lambda *piece: pieces.append(piece))
            assert "".join(text for _, text in pieces) == turn.text
            assert "a" not in turn.text or not settings.stop
            count += len(pieces)
    assert count > 100


# ---- stop texts ---------------------------------------------------------------------------------

@pytest.mark.parametrize("said,stop,text,stopped", [
    ("hello world", ("lo w",), "hel", "lo w"),
    ("hello world", ("world", "o"), "hell", "o"),
    ("aab", ("ab",), "a", "ab"),
    ("äöü", ("ö",), "ä", "ö"),
    ("x\n\ny", ("\n\n",), "x", "\n\n"),
    ("stop", ("stop",), "", "stop")])
def test_a_stop_text_ends_a_reply(model, said, stop, text, stopped):
    """Nothing behind it is generated, and nothing of it is shown."""
    turn, _, engine = played(model, letters(said), stop=stop)
    assert (turn.text, turn.raw, turn.finish, turn.stopped) == (text, text, "stop text", stopped)
    assert len(turn.ids) == len((text + stopped).encode())


def test_a_stop_text_may_end_within_a_token(model):
    word = next(i for i, w in TOKENS.words.items() if w == b"lor")
    turn, _, _ = played(model, [*letters("co"), word], stop=("ol", "l"))
    assert (turn.text, turn.stopped) == ("c", "ol")


def test_what_may_become_a_stop_text_is_held_back(model):
    turn, pieces, _ = played(model, [*letters("a##b#"), USER], stop=("###", "#!"))
    assert (turn.text, turn.finish, turn.stopped) == ("a##b#", "stop", "")
    assert [text for _, text in pieces] == ["a", "##b", "#"]


def test_special_tokens_count_for_nothing_within_a_stop_text(model):
    turn, _, _ = played(model, [BEGIN, *letters("xa"), END, *letters("b")], stop=("ab",))
    assert (turn.text, turn.raw, turn.stopped) == ("x", "<|begin_of_box|>x", "ab")
    # Their names are no text.
    turn, _, _ = played(model, [BEGIN, *letters("7"), END, USER], stop=("box", "<|", "7<"))
    assert (turn.text, turn.raw, turn.finish) == ("7", "<|begin_of_box|>7<|end_of_box|>", "stop")


def test_a_stop_text_may_be_the_name_of_a_special_token(model):
    turn, _, _ = played(model, [BEGIN, *letters("7"), END], stop=("x", "<|end_of_box|>"))
    assert (turn.text, turn.raw) == ("7", "<|begin_of_box|>7")
    assert (turn.finish, turn.stopped) == ("stop text", "<|end_of_box|>")


def test_ids_without_bytes_do_not_hide_a_stop_text(model):
    empty = [CONFIG.text.vocab_size - 1] * 20       # the padding of the vocabulary
    turn, _, _ = played(model, [*letters("xa"), *empty, *letters("b")], stop=("ab",))
    assert (turn.text, turn.stopped) == ("x", "ab")


def test_an_empty_stop_text_is_refused(model):
    with pytest.raises(UserError, match="a stop text must not be empty"):
        played(model, letters("a"), stop=("b", ""))


def test_cut_at_stop():
    assert cut_at_stop("abc", ()) == ("abc", "")
    assert cut_at_stop("abcab", ("cab", "b", "bc")) == ("a", "b")
    stream = TextStream(TOKENS, ("bc",))
    assert [stream.add(letters("abcd")[:n]) for n in range(5)] == ["", "a", "", "", ""]


# ---- thoughts -----------------------------------------------------------------------------------

def test_a_thought_and_a_reply(model):
    turn, pieces, engine = played(model, [*letters("\nhm"), CLOSE], [*letters("yes"), USER],
                                  think=20, max_new=10)
    assert (turn.thought, turn.text, turn.raw, turn.finish) == ("hm", "yes", "yes", "stop")
    # The first step of a request gives two tokens.
    assert pieces == [("thought", "\nh"), ("thought", "m"), ("text", "ye"), ("text", "s")]
    assert turn.ids == [*letters("\nhm"), CLOSE, *letters("yes"), USER]
    thinking, answering = engine.requests
    assert (thinking.max_new, answering.max_new) == (20, 10)
    # The conversation is as in training: <think>, the thought, </think>, a line break, the reply.
    asked = thinking.prompt.ids.tolist()
    assert asked[-1] == THINK and TOKENS.decode(asked).endswith("Red?<|assistant|>\n<think>")
    assert answering.prompt.ids.tolist() == [*asked, *letters("\nhm"), CLOSE, *TOKENS.encode("\n")]


def test_a_thought_that_is_not_closed_in_time(model):
    turn, _, engine = played(model, letters("hmmmm"), [*letters("yes"), USER], think=3)
    assert (turn.thought, turn.text) == ("hmm", "yes")
    assert engine.requests[1].prompt.ids.tolist()[-5:] == [*letters("hmm"), CLOSE, letters("\n")[0]]


def test_a_thought_that_is_closed_by_letters(model):
    turn, _, _ = played(model, letters("hm</think>"), [*letters("yes"), USER], think=30)
    assert (turn.thought, turn.text, turn.finish) == ("hm", "yes", "stop")


def test_a_stop_text_does_not_end_a_thought(model):
    turn, _, _ = played(model, [*letters("ab"), CLOSE], letters("cab"), think=9, stop=("ab",))
    assert (turn.thought, turn.text, turn.stopped) == ("ab", "c", "ab")


def test_a_turn_that_ends_within_its_thought(model):
    turn, _, engine = played(model, [*letters("hm"), USER], think=9)
    assert (turn.thought, turn.text, turn.finish) == ("hm", "", "stop")
    form = boxed_form(TOKENS, "integer")
    turn, _, engine = played(model, [*letters("hm"), USER], [BEGIN, *letters("7"), END, USER],
                             think=9, form=form)
    assert (turn.thought, turn.text) == ("hm", "7")
    assert USER not in engine.requests[1].prompt.ids.tolist()[-6:]


def test_a_context_that_is_full(model):
    length = len(Turn(ASK, ReplySettings(), TOKENS, CONFIG).prompt.ids)
    turn, _, _ = played(model, letters("hello"), context=length + 3)
    assert (turn.text, turn.finish) == ("hel", "context")
    turn, _, _ = played(model, letters("hello"), context=length + 3, max_new=2)
    assert (turn.text, turn.finish) == ("he", "length")
    turn, _, _ = played(model, letters("hmmmmmm"), context=length + 3, think=99)
    assert (turn.text, turn.finish) == ("", "context") and turn.thought.startswith("hmm")


# ---- prefix and form ----------------------------------------------------------------------------

def test_a_prefix(model):
    turn, _, engine = played(model, [*letters("12, 7)"), USER], prefix="click(", stop=("click",))
    assert (turn.text, turn.raw) == ("12, 7)", "click(12, 7)")
    [request] = engine.requests
    plain = Turn(ASK, ReplySettings(), TOKENS, CONFIG)
    assert request.prompt.ids.tolist() == [*plain.prompt.ids, *TOKENS.encode("click(")]
    assert turn.prompt_tokens == plain.prompt_tokens == len(plain.prompt.ids)
    boxed = Turn(ASK, ReplySettings(prefix="<|begin_of_box|>"), TOKENS, CONFIG)
    assert boxed.request.prompt.ids.tolist()[-1] == BEGIN


def test_a_prefix_begins_the_form():
    form = action_form(TOKENS)
    turn = Turn(ASK, ReplySettings(prefix="click(4", form=form), TOKENS, CONFIG)
    assert not turn.request.form.complete
    assert turn.request.form.after(TOKENS.encode("1, 2)")).complete
    with pytest.raises(UserError, match="can't begin with 'jump'"):
        Turn(ASK, ReplySettings(prefix="jump", form=form), TOKENS, CONFIG)


@pytest.mark.parametrize("think", [0, 5])
def test_a_form_holds_for_the_reply_alone(model, think):
    """With random weights and temperature 1: the thought may be anything."""
    for seed in range(4):
        form = boxed_form(TOKENS, "point")
        turn = Turn(ASK, ReplySettings(form.needs(), 1.0, seed=seed, think=think, form=form),
                    TOKENS, CONFIG)
        play(Engine(model, 1, 128), turn)
        assert turn.finish == "stop" and form.after(TOKENS.encode_reply(turn.raw)).complete


def test_a_vocabulary_without_thoughts(monkeypatch):
    bare = dataclasses.replace(CONFIG)
    monkeypatch.setattr(TOKENS, "special", {name: i for name, i in TOKENS.special.items()
                                            if name != "<think>"})
    with pytest.raises(UserError, match="no special token <think>"):
        Turn(ASK, ReplySettings(think=4), TOKENS, bare)


def test_tokens_so_far(model):
    engine = Scripted(model, letters("abc"), letters("xyz"))
    prompt = prompt_of(letters("hi"), [])
    first, second = engine.submit(Request(prompt, 3)), engine.submit(Request(prompt, 3))
    assert engine.so_far(first) == []
    engine.step()
    assert engine.so_far(first) == letters("ab") and engine.so_far(second) == letters("xy")
    engine.step()
    assert engine.so_far(first) == [] and engine.so_far(99) == []
