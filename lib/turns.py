"""One reply of the model, from the messages before it to text: for ask, chat, act, the server.

    turn = Turn(messages, ReplySettings(max_new=64), tokens, config)
    play(engine, turn)                  # on its own; or, where many turns share an engine:

    request = turn.request
    id = engine.submit(request)
    while engine.busy:
        results = engine.step()
        for kind, text in turn.read(engine.so_far(id)): ...     # what is new: "thought" or "text"
        ... request = turn.advance(result)                      # a second Request after a thought

A reply may have a thought in front. The model first gets up to `think` tokens for it; where it has
not closed the thought by then, </think> is put in, and it must answer [R: GLM-4.5V].
"""
import codecs
from dataclasses import dataclass

import numpy as np

from data import Document, document
from engine import Engine, Request, Result
from lib.forms import Form
from tokenizer import Tokenizer

CLOSE = "</think>"


@dataclass(frozen=True)
class ReplySettings:
    """How the model should reply. prefix: the text that the reply begins with. form: what it must
    look like, after the prefix and the thought. stop: texts that end it."""
    max_new: int = 256          # tokens of the reply, without the thought
    temperature: float = 0.0    # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    think: int = 0              # tokens of a thought before it; 0: no thought
    prefix: str = ""
    form: Form | None = None
    stop: tuple[str, ...] = ()


class TextStream:
    """The text of a growing list of ids, in pieces that never change later.

    Held back until it is clear how they go on: the first bytes of a character, and what may be the
    beginning of a stop text. Special tokens are left out.
    """

    def __init__(self, tokens: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokens, self.stop = tokens, stop
        self.shown = 0              # characters that were returned
        self.special = set(tokens.special.values())

    def add(self, ids, ended: bool = False) -> str:
        """The new text, given all ids so far. ended: nothing follows, so nothing is held back."""
        raw = self.tokens.decode_bytes(i for i in ids if i not in self.special)
        # This decoder holds back a character whose last bytes are missing; wrong bytes become
        # replacement characters at once, as in the whole text.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final=ended)
        text, found = cut_at_stop(text, self.stop)
        if not (ended or found):
            text = text[:len(text) - self._open_end(text)]
        new, self.shown = text[self.shown:], max(self.shown, len(text))
        return new

    def _open_end(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop text."""
        return max((n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1))
                    if text.endswith(stop[:n])), default=0)


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str]:
    """The text before the first of the stop texts, and which of them it was; "" for none."""
    places = [(text.find(word), word) for word in stop if word in text]
    place, word = min(places, default=(len(text), ""))
    return text[:place], word


def with_special_tokens(text: str, ids, tokens: Tokenizer) -> str:
    """A text with which the plain text of the ids begins, with the special tokens in it by name."""
    n = next(n for n in range(len(ids) + 1) if tokens.plain(ids[:n]).startswith(text))
    whole, more = tokens.decode(ids[:n]), len(tokens.plain(ids[:n])) - len(text)
    return whole[:len(whole) - more]


def prompt_of(ids, images) -> Document:
    """A prompt, of which nothing is learnt."""
    return Document(np.array(ids, np.int32), np.zeros(len(ids), np.float32), images)


class Turn:
    """A reply in the making. messages: the conversation before it (tasks.base.Message).

    When it is complete, `done` is True and these are set: `text`, the reply as a person reads it,
    without prefix and special tokens; `raw`, all of it, with prefix and box marks; `thought`;
    `finish`: stop | length | context | stop text; `stopped`, the stop text that ended it;
    `ids`, the tokens that were sampled.
    """

    def __init__(self, messages, settings: ReplySettings, tokens: Tokenizer, config):
        self.settings, self.tokens = settings, tokens
        self.prompt = document(messages, tokens, config, answer=True)
        self.prompt_tokens = len(self.prompt.ids)
        self.text = self.raw = self.thought = self.finish = self.stopped = ""
        self.ids, self.done, self.thinking = [], False, bool(settings.think)
        if self.thinking:
            ids = self.prompt.ids
            ids = ids[:len(ids) - len(tokens.begin_reply)]      # without the empty thought
            self.prompt = prompt_of([*ids, tokens.mark("<think>")], self.prompt.images)
            self.stream = TextStream(tokens, (CLOSE,))
            self.request = self._request(self.prompt, settings.think, stop=(CLOSE,))
        else:
            self.request = self._answer(self.prompt)

    def _request(self, prompt: Document, max_new: int, **options) -> Request:
        s = self.settings
        return Request(prompt, max_new, s.temperature, s.top_p, s.seed, **options)

    def _answer(self, prompt: Document) -> Request:
        """The request of the reply itself, which goes on after the prefix."""
        s, ids = self.settings, self.tokens.encode_reply(self.settings.prefix)
        form = s.form and s.form.after(ids)
        prompt = prompt_of([*prompt.ids, *ids], prompt.images)
        self.stream = TextStream(self.tokens, s.stop)
        return self._request(prompt, s.max_new, form=form, stop=s.stop)

    def read(self, ids, ended: bool = False) -> list[tuple[str, str]]:
        """What is new, given the ids that the running request has so far: [("text", "...")], or
        ("thought", "..."); an empty list if there is nothing to show yet."""
        new = self.stream.add(ids, ended)
        return [("thought" if self.thinking else "text", new)] if new else []

    def advance(self, result: Result) -> Request | None:
        """Take the engine's result. After a thought: the Request of the reply. None: `done`."""
        self.ids += result.ids
        if not self.thinking:
            ids = [i for i in result.ids if i not in self.tokens.stops]
            self.text, self.stopped = cut_at_stop(self.tokens.plain(ids), self.settings.stop)
            raw, newest = self.tokens.decode(ids), self.tokens.decode(ids[-1:])
            if self.stopped:
                raw = with_special_tokens(self.text, ids, self.tokens)
            elif newest in self.settings.stop:      # the name of a special token
                raw, self.stopped = raw.removesuffix(newest), newest
            self.raw = self.settings.prefix + raw
            self.finish = "stop text" if self.stopped else result.finish
            self.done = True
            return None
        self.thinking = False
        self.thought = cut_at_stop(self.tokens.plain(result.ids), (CLOSE,))[0].strip()
        stopped = result.ids[-1] in self.tokens.stops
        if result.finish == "context" or stopped and not self.settings.form:
            self.finish, self.done = result.finish, True        # it ended without a reply
            return None
        mark = self.tokens.mark(CLOSE)      # where a form is asked for, a reply follows in any case
        ids = [i for i in result.ids if i != mark and i not in self.tokens.stops]
        ids += [mark, *self.tokens.encode("\n")]
        return self._answer(prompt_of([*self.prompt.ids, *ids], self.prompt.images))


def engine_for(model, turn: Turn, drafts: int = 0, say=print) -> Engine:
    """An engine with room for one turn alone: its prompt, thought and reply. drafts, say: as Engine
    takes them; but drafts are not adapted to the times that are measured, so that a seed always
    gives the same reply."""
    s, limit = turn.settings, model.config.text.max_position_embeddings
    prefix = turn.tokens.encode_reply(s.prefix)
    room = turn.prompt_tokens + len(prefix) + s.think + s.max_new + 8   # 8: </think>, line break
    return Engine(model, 1, min(limit, room), drafts, adapt=False, say=say)


def play(engine: Engine, turn: Turn, on_text=lambda kind, text: None) -> Turn:
    """Generate a turn to its end, with the engine to itself. on_text(kind, text) is called with
    each new piece of text, where kind is "thought" or "text"."""
    request = turn.request
    while request:
        id, results = engine.submit(request), []
        while not results:
            results = engine.step()
            if not results:
                for piece in turn.read(engine.so_far(id)):
                    on_text(*piece)
        for piece in turn.read(results[0].ids, ended=True):
            on_text(*piece)
        request = turn.advance(results[0])
    return turn
