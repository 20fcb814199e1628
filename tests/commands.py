"""The commands in a Markdown file, parsed as the scripts themselves would parse them."""
import functools
import importlib
import re
import shlex
from pathlib import Path

from lib.cli import cli, UserError
from lib.common import ROOT

PYTHON = {"python", "python3", ".venv/bin/python", ".venv/bin/torchrun", "torchrun"}
OF_TORCHRUN = ("--nproc_per_node", "--standalone", "--max-restarts", "--nnodes", "--node_rank")
DEMONSTRATED = {"dice"}     # the category that tasks/README.md lets its reader write


def commands_in(text: str) -> list[tuple[list[str], bool]]:
    """(words, whether it is in a fenced block) of each shell command in blocks marked sh or bash,
    and between backticks."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.M | re.S)
    lines = [(line, True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    fenced = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [(" ".join(code.split()), False) for code in re.findall(r"`([^`]+)`", fenced)]
    found = []
    for line, in_block in lines:
        try:
            words = shlex.split(line.replace("<your student number>", "4711"), comments=True)
        except ValueError:          # a quotation mark that goes on in the next line: curl's data
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):      # OMP_NUM_THREADS=1 python ...
            words = words[1:]
        if words:
            found.append((words, in_block))
    return found


@functools.cache
def entry(script: str):
    """(module, the option that bare words are for) of a script without verbs."""
    path = ROOT / (script.replace(".", "/") + ".py")
    bare = re.search(r"cli\(Args.*positional=\"(\w+)\"", path.read_text(encoding="utf-8"))
    return importlib.import_module(script), bare and bare[1]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its words) of a command that runs a script of this repository, else None."""
    if words[0].endswith(".py") and (ROOT / words[0]).exists():
        words = ["python", *words]      # `gym.py sheet`, as it is written in the text
    if words[0] not in PYTHON:
        return None
    words = [word for word in words[1:] if not word.startswith(OF_TORCHRUN)]
    if words[:1] == ["-m"]:
        name = "lab.__main__" if words[1] == "lab" else words[1]
        return (name, words[2:]) if name.startswith("lab") else None
    if not words or not re.fullmatch(r"[\w/]+\.py", words[0]):
        return None
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def check(words: list[str]):
    """Raises UserError, or AssertionError, if a command names what does not exist."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return [check_target(word, targets) for word in words[1:] if "=" not in word]
    if words[0] == "bash" and words[1:] and not words[1].startswith("-"):
        assert (ROOT / words[1]).exists(), words
        return None
    if not (found := script_of(words)):
        return None
    script, rest = found
    assert (ROOT / (script.replace(".", "/") + ".py")).exists(), words
    if not rest and words[0].endswith(".py"):
        return None             # a file that is named, not run
    module, bare = entry(script)
    if hasattr(module, "VERBS") and script != "lab.bench":
        verb, *rest = rest
        if verb == "--help":
            return None
        if verb not in module.VERBS:
            raise UserError(f"{script} has no verb {verb}")
        config, _, bare = module.VERBS[verb]
    elif hasattr(module, "Args"):
        config = module.Args
    else:
        return None
    if "--help" in rest:
        return None
    args = cli(config, rest, positional=bare)
    if script == "lab.__main__":
        for name in args.what:
            if name not in ("list", "show", "all", "NAME"):
                module.sheet.load(name)
    return args


def check_target(word: str, targets: list[str]):
    assert word in targets or word.startswith(".venv"), f"make has no target {word}"


def wrong_commands(text: str) -> list[str]:
    """Each command of a text that can't be run, with the reason."""
    wrong = []
    for words, in_block in commands_in(text):
        if any(word.strip("[]") in ("...", "…", "NAME...") or "|" in word for word in words):
            continue            # a pattern for commands, not a command
        try:
            check(words)
        except (UserError, AssertionError) as error:
            if not in_block and str(error).endswith("needs a value"):
                continue        # a sentence names an option, as in `pretrain.py --init`
            wrong.append(f"{' '.join(words)}: {error}")
    return wrong


def pages() -> list[Path]:
    """The Markdown files that a reader meets."""
    folders = (ROOT, ROOT / "docs", ROOT / "course", ROOT / "tasks", ROOT / "ckpt/gym")
    return sorted(path for folder in folders for path in folder.glob("*.md")
                  if path.name != "LOG.md")
