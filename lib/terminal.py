"""The model on a terminal: a reply while it is generated, and a conversation line by line.

The replies are the only thing that is written to stdout, besides the prompt of a terminal. What the
user should know about them goes to stderr, as does the model's thought, which a terminal shows dim.
So the replies of `python sample.py chat < questions.txt > replies.txt` can be used by a program.
"""
import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from lib.card import FURTHER, Seen
from lib.cli import out_of_memory, UserError
from lib.conversations import conversation, layout_of, openai_record, PLAIN, plainly
from lib.images import Picture, seen_size
from lib.records import MOST_BYTES, parse, Record
from lib.turns import engine_for, play, ReplySettings, Turn
from tasks.base import IMAGE, Message
from tokenizer import tokenizer_of

DIM, NORMAL = "\x1b[2m", "\x1b[0m"      # a terminal's codes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")     # what a terminal might obey
THOUGHT = 256       # tokens that a thought may have after /think on, unless --think says it [O]

HELP = """\
/image FILE     attach a picture to the next message; several may be attached
/think on|off   let the model think before it replies
/reset          begin a new conversation
/save FILE      add the conversation to a file of JSON lines, as `pretrain.py --data` takes it
/load FILE      go on with the last conversation in such a file
/help           print this
/quit           end, like Ctrl-D and Ctrl-C; while a reply is written, Ctrl-C stops the reply
Anything else is said to the model."""


# ---- what is shown ------------------------------------------------------------------------------

def note(text: str):
    """Print a line about the replies."""
    print(text, file=sys.stderr, flush=True)


class Screen:
    """Shows a reply and its thought piece by piece, without the white space around them."""

    def __init__(self, prefix: str = ""):
        self.said = {"thought": "", "text": ""}     # all pieces of each kind
        if prefix:
            self.show("text", prefix)

    def show(self, kind: str, text: str):
        """Take the next piece of the "thought" or the "text" and print what is new."""
        before = self.said[kind].strip()
        self.said[kind] += text
        new = self.said[kind].strip()[len(before):]
        if not new:
            return
        stream = sys.stdout if kind == "text" else sys.stderr
        if kind == "text" and not before:
            self.end_thought()
        if stream.isatty():
            new = CONTROL.sub("\ufffd", new)
            new = new if kind == "text" else DIM + new + NORMAL
        print(new, end="", file=stream, flush=True)

    def end_thought(self):
        if self.said["thought"].strip():
            note("")

    def end(self):
        """End the line that was written last."""
        if not self.said["text"].strip():
            self.end_thought()
        print(flush=True)


def introduction(name: str, model, trained: Seen | None) -> str:
    """Two lines on the checkpoint `name`: its size and what it was trained on."""
    size = f"{name}: {model.counts()['total'] / 1e6:,.1f}M parameters"
    if trained is None:
        return f"{size}\nno file beside it says what it was trained on"
    names = [category for category in trained.questions if category != FURTHER]
    what = ", ".join(names) if len(names) <= 8 else f"{len(names)} categories of the gym"
    return (f"{size}, trained on {what}\n`python sample.py ask --ckpt={name}` lists the questions "
            "that it knows; to others it gives some answer, which means nothing")


def note_unlike(trained: Seen | None, question: str, images) -> list[str] | None:
    """Print what is unlike the model's training in a question and its images (h, w, 3), and return
    it; None where it isn't known what the model was trained on."""
    unlike = trained and trained.differences(question, images)
    if unlike:
        note(f"unlike its training, so the answer may mean nothing: {'; '.join(unlike)}")
    return unlike


def note_end(turn: Turn, context: int):
    """Print why a reply was cut off, if it was. context: tokens that the model reads at most."""
    if turn.finish == "length":
        note(f"cut off after {turn.settings.max_new} tokens; --max_new allows more")
    if turn.finish == "context":
        note(f"cut off: the model reads {context:,} tokens at most, and here they end")


# ---- standard input -----------------------------------------------------------------------------

def read_all(file, name: str) -> bytes:
    """All bytes of an open file, unless they are too many. name: for the message."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{name} has more than {MOST_BYTES:,} bytes")
    return data


def typed(terminal: bool):
    """The lines that the user types, or those of a pipe. On a terminal the user can edit them and
    go back to earlier ones, where Python has its module readline."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if terminal:
                return
            raise
        yield line


# ---- the conversation ---------------------------------------------------------------------------

class Conversation:
    """A conversation with the model, and the commands by which its user changes it. Whatever can't
    be done raises UserError or OSError, and the conversation is as it was before."""

    def __init__(self, model, settings: ReplySettings, drafts: int = 0,
                 trained: Seen | None = None):
        self.model, self.settings, self.drafts, self.trained = model, settings, drafts, trained
        self.config, self.tokens = model.config, tokenizer_of(model.config)
        self.think = settings.think             # tokens of a thought; 0: the model does not think
        self.messages: list[Message] = []
        self.pictures: list[Picture] = []       # they will be part of the next message
        self.replies = 0

    def take(self, line: str):
        """Do what a line says: a command or a message."""
        word, _, rest = line.strip().partition(" ")
        if word in COMMANDS:
            COMMANDS[word](self, rest.strip())
        elif word.startswith("/"):
            raise UserError(f"there is no command {word}: /help lists them")
        elif word:
            self.say(line.strip())

    def say(self, text: str):
        """Send a message to the model, show its reply, and keep both."""
        text = IMAGE * len(self.pictures) + plainly(text)
        message = Message("user", text, tuple(self.pictures))
        # A seed for each reply: the same question asked twice gets two draws.
        settings = replace(self.settings, think=self.think,
                           seed=(self.settings.seed + self.replies) % 2 ** 63)
        turn = Turn([*self.messages, message], settings, self.tokens, self.config)
        self.check_room(turn.prompt_tokens + self.think)
        images = turn.prompt.images
        note_unlike(self.trained, text.replace(IMAGE, ""),
                    images[len(images) - len(self.pictures):])
        tell = (lambda line: None) if self.replies else note    # about drafts: once
        engine = engine_for(self.model, turn, self.drafts, tell)
        screen = Screen()
        try:
            play(engine, turn, screen.show)
        finally:            # Ctrl-C stops a reply: what has been written of it is kept
            screen.end()
            self.keep(message, turn, turn.raw if turn.done else screen.said["text"].strip())
        note_end(turn, self.limit)

    @property
    def limit(self) -> int:
        return self.config.text.max_position_embeddings

    def check_room(self, tokens: int):
        """Raise UserError where a prompt of so many tokens leaves no room for a reply."""
        if tokens + 8 >= self.limit:        # 8: </think> and what else stands around a reply
            raise UserError(f"the context is full: {tokens:,} tokens of {self.limit:,}; /save FILE "
                            "keeps the conversation, /reset begins a new one")

    def keep(self, message: Message, turn: Turn, reply: str):
        """Add a message and its reply. Without a reply neither is kept, since nothing can be learnt
        from them, and the pictures wait for the next message."""
        self.replies += 1
        if not reply.strip():
            return note("there was no reply, so your message was not kept")
        if turn.thought:
            reply = f"<think>{turn.thought}</think>\n{reply}"
        self.messages += [message, Message("assistant", reply)]
        self.pictures = []

    # ---- commands, each with the text that follows it ---------------------------------------

    def attach(self, name: str):
        path = path_of(name)
        Picture(path).open()                # raises if it can't be read
        picture = Picture(path.read_bytes(), str(path))     # as it is now, whatever happens to it
        height, width = seen_size(picture, self.config)
        self.pictures.append(picture)
        note(f"{path} is seen at {width}x{height} pixels")

    def set_think(self, word: str):
        if word not in ("on", "off"):
            raise UserError("/think takes on or off")
        self.tokens.mark("<think>")         # raises where the vocabulary has none
        self.think = (self.settings.think or THOUGHT) if word == "on" else 0
        note(f"a thought of up to {self.think} tokens before each reply" if self.think else
             "no thoughts")

    def reset(self, _):
        self.messages, self.pictures = [], []
        note("a new conversation")

    def save(self, name: str):
        """Add the conversation as a line to a file."""
        path = path_of(name)
        if not self.messages:
            raise UserError("there is nothing to save yet")
        line = json.dumps(openai_record(self.messages), ensure_ascii=False) + "\n"
        with open(path, "a+b") as file:
            if file.tell():                 # a file that others wrote may end within a line
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode("utf-8", "replace"))
        note(f"{len(self.messages)} messages were added to {path}")

    def load(self, name: str):
        """Replace the conversation by the last one of a file."""
        path = path_of(name)
        with open(path, "rb") as file:
            lines = read_all(file, str(path)).strip().splitlines()
        if not lines:
            raise UserError(f"{path} is empty")
        where = f"the last line of {path}"
        record = Record(where, parse(lines[-1], where), folder=path.parent)
        if layout_of(record) == PLAIN:
            raise UserError(f"{where} is no conversation but plain text")
        messages = conversation(record)
        turn = Turn(messages, ReplySettings(), self.tokens, self.config)    # reads the pictures
        self.check_room(turn.prompt_tokens)
        self.messages, self.pictures = messages, []
        note(f"{len(messages)} messages, {turn.prompt_tokens:,} tokens of {self.limit:,}")

    def help(self, _):
        note(HELP)


COMMANDS = {"/image": Conversation.attach, "/think": Conversation.set_think,
            "/reset": Conversation.reset, "/save": Conversation.save, "/load": Conversation.load,
            "/help": Conversation.help}


def path_of(name: str) -> Path:
    """The file that a command names; a terminal puts marks around a name that is dropped on it."""
    name = name[1:-1] if name[:1] in ("'", '"') and name[-1:] == name[:1] else name
    if not name or "\0" in name:
        raise UserError("the name of a file is missing")
    return Path(os.path.expanduser(name))


def talk(conversation: Conversation, lines=None, terminal: bool | None = None):
    """Take lines until there are no more, or one is /quit. lines: instead of standard input;
    terminal: whether a person types them."""
    if terminal is None:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for line in typed(terminal) if lines is None else lines:
        if line.strip() == "/quit":
            break
        try:
            conversation.take(line)
        except KeyboardInterrupt:           # Ctrl-C during a reply
            if not terminal:
                raise
            note("stopped")
        except BrokenPipeError:             # nobody reads the replies
            raise
        except (UserError, OSError) as error:
            note(str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            note("the memory does not suffice for that")
    if terminal:
        note("\nthe chat has ended")
