"""A dataclass as the command line of a script, and errors as one line.

    @dataclass
    class Args:
        steps: Positive = 200                           # optimizer updates
        loss: Literal["grpo", "icepop"] = "grpo"        # which policy loss
        out: str = "out/rl"                             # run folder

    args = cli(Args)          # python rl.py --steps=50 --loss icepop

The type of a field says which values are allowed, its comment becomes its line of `--help`.
Nothing here imports torch, so that gym.py starts in a fifth of a second.
"""
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import sys
import tokenize
import typing
from dataclasses import dataclass
from typing import Annotated, Literal


class UserError(Exception):
    """Something that the user can correct; the message is one clear line."""


# ---- running a script ---------------------------------------------------------------------------

def distributed() -> bool:
    """Whether this process has joined a process group; torch is not imported to find out."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_initialized())


def open_streams():
    """Make the standard streams safe to use. A stream that the shell has closed (`>&-`) is None: it
    becomes an empty file. A terminal without UTF-8 shows question marks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def flush_or_drop():
    """Write out what was printed. What can't be written, since the disk is full or the reader has
    gone (`| head`), is dropped: Python would try again at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def out_of_memory(error) -> bool:
    """Whether memory has run out, on the CPU or on a GPU: torch raises a RuntimeError then."""
    words = "can't allocate memory", "out of memory", "Storage size calculation overflowed"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def main(entry, *args, less: str = "smaller numbers (--help lists the options)"):
    """Run a script's entry point. A UserError, a missing file, a full disk or a lack of memory is
    printed as one line and ends with exit code 2, Ctrl-C with 130. less: the options that make a
    script take less memory."""
    open_streams()
    try:
        entry(*args)
        sys.stdout.flush()
    except BrokenPipeError:                     # `python ... | head`: the reader has gone
        pass
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        if out_of_memory(error):
            error = f"the memory does not suffice: take {less}"
        print(f"error: {error}", file=sys.stderr)
        if distributed():                       # gloo would wait for a peer whose machine is gone
            flush_or_drop()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        flush_or_drop()
        if distributed():
            sys.modules["torch.distributed"].destroy_process_group()


# ---- which values an option may have ------------------------------------------------------------

MOST = 10 ** 9      # where a Range has no upper end: more is a mistake, and overflows an int64


@dataclass(frozen=True)
class Range:
    """The least and the largest value of a number, both allowed."""
    least: float
    most: float = math.inf

    def __str__(self):
        if self.most == math.inf:
            return f"{self.least} or more"
        return f"{self.least} to {self.most}"


Positive = Annotated[int, Range(1)]             # steps, rows, counts
Natural = Annotated[int, Range(0)]              # where 0 means none, or the default
Share = Annotated[float, Range(0, 1)]           # a part of a whole
NonNegative = Annotated[float, Range(0)]        # weights of losses, learning rates
Count = Annotated[int, Range(1, 100_000)]       # tasks or documents that are kept in memory
Drafts = Annotated[int, Range(0, 16)]           # tokens that the MTP head looks ahead; 0: none
Levels = Annotated[int, Range(1, 5)]            # how many of the gym's levels, counted from 0
Seed = Annotated[int, Range(0, 2 ** 63 - 1)]    # what numpy and torch both take
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]


def choices(kind) -> str:
    """The values of a Literal as text: 'tiny, small or base'."""
    *others, last = (str(value) or "nothing" for value in typing.get_args(kind))
    return f"{', '.join(others)} or {last}" if others else last


def check_options(args):
    """Raise UserError unless every field of the dataclass `args` has a value that its type allows.
    A text may be empty only where that is the default. `cli` calls this; code that builds the
    arguments of a script by itself calls it as well."""
    kinds = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        name, kind, value = field.name, kinds[field.name], getattr(args, field.name)
        origin = typing.get_origin(kind)
        if origin is Literal and value not in typing.get_args(kind):
            raise UserError(f"--{name} takes {choices(kind)}, not '{value}'")
        if kind is str and field.default and not value.strip():
            raise UserError(f"--{name} is empty; without this option it is '{field.default}'")
        if origin is Annotated:
            limits = kind.__metadata__[0]
            if not limits.least <= value <= limits.most:    # not true for nan
                raise UserError(f"--{name} takes {limits}, not {value}")
            if limits.most == math.inf and value > MOST:
                raise UserError(f"--{name} takes {limits}, a billion at most, not {value}")


# ---- the command line ---------------------------------------------------------------------------

def field_comments(config) -> dict[str, str]:
    """{field: the comment after it on its line in the source}, which `--help` prints."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            name = re.match(r"\s*(\w+)\s*:", lines[token.start[0] - 1])
            if name:
                comments[name[1]] = token.string.lstrip("# ")
    return comments


def help_text(kind, comment: str) -> str:
    """A field's line of --help: its comment, and the values of a Literal unless it names them."""
    values = [str(value) for value in typing.get_args(kind)]
    if typing.get_origin(kind) is Literal and not all(value in comment for value in values):
        return f"{comment} ({choices(kind)})" if comment else choices(kind)
    return comment


def print_help(config, about: str):
    """Print `about` and a line for each option, with its default."""
    comments, kinds = field_comments(config), typing.get_type_hints(config)
    print(about.strip() + "\n" if about else "", end="")
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else "none"
        option = f"{field.name}={default if default != '' else '...'}"
        text = help_text(kinds[field.name], comments.get(field.name, ""))
        print(f"  --{option:<28} {text}")


def convert(text: str, kind, name: str):
    """The text of an option as a value of the field's type. Raises UserError."""
    if typing.get_origin(kind) is list:
        return text
    if typing.get_origin(kind) is Literal:      # check_options says which words are allowed
        return text
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name} takes true or false, not '{text}'")
        return words[text.lower()]
    try:                                        # people write 1_000 and 1e3
        value = float(text) if kind is int and "e" in text.lower() else kind(text)
        if kind(value) != value:
            raise ValueError("1e-3 is not an int")
        return kind(value)
    except (ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name} takes {what}, not '{text}'") from None


def cli(config, argv=None, about: str = "", positional: str | None = None):
    """Fill a dataclass from the command line: --key=value, --key value, --flag, --flag=false.

    config: the dataclass; argv: the words, sys.argv's by default; about: text on top of --help;
    positional: the field that takes a word without dashes. A list field may be given several times.
    Raises UserError on an unknown option, a value of the wrong type, or one that the field does not
    allow.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(config)}
    kinds = typing.get_type_hints(config)       # without the limits
    if "--help" in argv or "-h" in argv:
        print_help(config, about)
        sys.exit(0)
    values: dict = {}
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):    # stand for other bytes
            raise UserError(f"{ascii(word)} is not valid UTF-8")
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            is_list = positional and typing.get_origin(kinds[positional]) is list
            if positional is None or positional in values and not is_list:
                raise UserError(f"unexpected '{word}' (options are written --key=value)")
            value = convert(word, kinds[positional], positional)
            values[positional] = [*values.get(positional, []), value] if is_list else value
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists them"
            raise UserError(f"there is no option --{name}{hint}")
        if not equals:
            follows = bool(argv) and not argv[0].startswith("--")
            if kinds[name] is bool:
                text = "true"
            elif follows:
                text = argv.pop(0)
            else:
                raise UserError(f"--{name} needs a value")
        value = convert(text, kinds[name], name)
        if typing.get_origin(kinds[name]) is list:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    args = config(**values)
    check_options(args)
    return args


def run_verb(verbs: dict, about: str, argv: list[str] | None = None):
    """The command line of a script with verbs, such as `gym.py show point --level=2`.

    verbs: {verb: (dataclass of its options, function of them, field that bare words are for)}. The
    function's docstring stands on top of the verb's --help, `about` on top of the script's. Raises
    UserError on an unknown verb, and as `cli` does.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("--help", "-h"):
        print(f"{about}\nVerbs: {', '.join(verbs)}; `VERB --help` lists the options of one.")
        return
    if not words or words[0] not in verbs:
        what = f"'{words[0]}' is not one of" if words else "a verb is missing:"
        raise UserError(f"{what} {', '.join(verbs)}; --help explains them")
    config, function, positional = verbs[words[0]]
    function(cli(config, words[1:], inspect.getdoc(function) + "\n", positional))
