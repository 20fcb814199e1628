"""A dataclass as the command line of a script, and errors as one line."""
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import tokenize
import typing


class UserError(Exception):
    """Something the person at the keyboard can mend; the message is one clear line."""


def distributed() -> bool:
    """Whether this process has joined a group of ranks; this file never imports torch itself."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_initialized())


def main(entry, *args):
    """Run a script's entry point: a UserError, a path that is none or a full disk becomes one line
    and exit code 2, Ctrl-C code 130."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows question marks
        stream.reconfigure(errors="replace")
    try:
        entry(*args)
    except BrokenPipeError:  # `... | head`: the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if distributed():           # gloo would wait for a peer whose machine is gone
            sys.stdout.flush()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if distributed():
            sys.modules["torch.distributed"].destroy_process_group()


def field_comments(config) -> dict[str, str]:
    """{field: the comment that stands behind it in the source}; `--help` is made of these."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            name = re.match(r"\s*(\w+)\s*:", lines[token.start[0] - 1])
            if name:
                comments[name[1]] = token.string.lstrip("# ")
    return comments


def _convert(text: str, kind, name: str):
    if typing.get_origin(kind) is list:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name} takes true or false, not '{text}'")
        return words[text.lower()]
    try:  # 1_000 and 1e3 are both what people write
        value = float(text) if kind is int and "e" in text.lower() else kind(text)
        if kind(value) != value:
            raise ValueError("1e-3 is no int")
        return kind(value)
    except (ValueError, OverflowError):
        raise UserError(f"--{name} takes {kind.__name__}, not '{text}'") from None


def cli(config, argv=None, about: str = "", positional: str | None = None):
    """Fill a dataclass from the command line: --key=value, --key value, --flag, --flag=false.

    config: the dataclass; `about`: shown on top of --help; `positional`: the field that takes a
    bare word. A list field may be given several times. Raises UserError on an unknown key or a
    value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(config)}
    kinds = typing.get_type_hints(config)
    if "--help" in argv or "-h" in argv:
        comments = field_comments(config)
        print(about.strip() + "\n" if about else "", end="")
        for name, field in fields.items():
            default = field.default if field.default is not dataclasses.MISSING else "none"
            print(f"  --{name + '=' + str(default if default != '' else '...'):<28}"
                  f" {comments.get(name, '')}")
        sys.exit(0)
    values: dict = {}
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            if positional is None or positional in values:
                raise UserError(f"unexpected '{word}' (options are written --key=value)")
            values[positional] = _convert(word, kinds[positional], positional)
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
        value = _convert(text, kinds[name], name)
        if typing.get_origin(kinds[name]) is list:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return config(**values)
