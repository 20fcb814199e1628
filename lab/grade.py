"""The exercises, graded: is each function that you have written again right?

    python -m lab.grade                  the exercises of the ten lectures
    python -m lab.grade 6                that of lecture 6
    python -m lab.grade patchify         that function; also as --only=patchify
    python -m lab.grade --all            every exercise of the repository

An exercise stands in the comment at the end of a file: the function whose body you delete and write
again, what to think about, its test, and about how long it takes. This file reads those comments:

    # 1. patchify: one einops pattern that makes the four patches of a 2x2 group neighbours.
    #    pytest tests/test_model.py -k block_major; 15 minutes.
    # 2. rotary_pairs in lib/rotary.py: from its docstring alone.
    #    pytest tests/test_model.py -k rotations; 15 minutes.

What does not begin with the name of a function and a colon is a question, and is not graded.

Each test runs in a process of its own. An exercise is `green` if its test passes, `red` if it fails
or if there is nothing to test: no body, no function, or a file that Python can't read. It is
`skipped` where a package is missing (triton, or what requirements-peers.txt lists). The exit code
is 0 if all are green, else 1. A test that was changed is named: it proves nothing.
"""
import ast
import contextlib
import difflib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from lab.git import git_or_none
from lib import PACKAGES, where_packages_are
from lib.cli import check_options, cli, main, UserError

ROOT = Path(__file__).resolve().parent.parent   # lib.common has it too, but imports torch
LECTURES = {1: ("pretrain.py", "loss_sum"), 2: ("vit.py", "patchify"),
            3: ("lib/captions.py", "random_mask"), 4: ("train_vit.py", "cached_gradients"),
            5: ("model.py", "rope_positions"), 6: ("mmtp.py", "accept"),
            7: ("tasks/verify.py", "iou"), 8: ("rl.py", "advantages"),
            9: ("lib/losses.py", "_LinearCrossEntropy.forward"), 10: ("lib/scoring.py", "interval")}
LONGEST = 300       # seconds that a test may take: a loop may have no end


@dataclass
class Args:
    only: list[str] = field(default_factory=list)   # lectures or functions, also as bare words
    all: bool = False           # every exercise of the repository


# ---- the comments -------------------------------------------------------------------------------

# "Engine._draft and Engine._advance_head: ", or "ring in lib/ring.py: "
BEGIN = re.compile(r"(?P<names>[\w.]+(?: and [\w.]+)*)(?: in (?P<file>[\w/]+\.py))?: ")
TEST = re.compile(r"(?P<interpreted>TRITON_INTERPRET=1 )?pytest (?P<test>tests/.+); "
                  r"(?P<minutes>\d+) minutes\.$")


@dataclass(frozen=True)
class Exercise:
    """Functions to write again, and their test."""
    source: str                 # the file at whose end it stands
    file: str                   # the file of the functions
    names: tuple[str, ...]      # "patchify", or with its class "Engine._release"
    test: str                   # what `pytest` is called with
    minutes: int                # for which a student may need
    interpreted: bool           # whether it runs in Triton's interpreter, on the CPU

    @property
    def name(self) -> str:
        return " and ".join(self.names)

    @property
    def lecture(self) -> int | None:
        for number, (file, name) in LECTURES.items():
            if (self.file, self.name) == (file, name):
                return number


def items(source: str) -> list[str]:
    """The numbered items of the comment `# Exercises`, each as one line without its number."""
    comment = re.search(r"^# Exercises.*\n((?:#.*\n)*)", source + "\n", re.MULTILINE)
    found = []
    for line in comment[1].splitlines() if comment else []:
        number = re.match(r"# \d+\. ", line)
        if number:
            found.append(line[number.end():])
        elif found:
            found[-1] += " " + line.lstrip("# ")
    return found


def exercises_in(source: str, name: str) -> list[Exercise]:
    """The exercises of the file `name`, whose text is `source`. Raises UserError where one names a
    function, but no test."""
    found = []
    for number, item in enumerate(items(source), 1):
        begin, end = BEGIN.match(item), TEST.search(item)
        if begin and not end:
            raise UserError(f"{name}, exercise {number} does not end with its test and its time, "
                            "as in 'pytest tests/test_model.py -k rotations; 15 minutes.'")
        if begin:
            found.append(Exercise(name, begin["file"] or name, tuple(begin["names"].split(" and ")),
                                  end["test"], int(end["minutes"]), bool(end["interpreted"])))
    return found


def all_exercises() -> list[Exercise]:
    """The exercises of the repository: of the scripts, then of lib/, tasks/ and lab/."""
    found = []
    for folder in (ROOT, ROOT / "lib", ROOT / "tasks", ROOT / "lab"):
        for path in sorted(folder.glob("*.py")):
            source = path.read_text(encoding="utf-8", errors="replace")
            found += exercises_in(source, path.relative_to(ROOT).as_posix())
    return found


def named(word: str, exercises: list[Exercise]) -> Exercise:
    """The exercise of a lecture's number, or of a function's name, with or without its class.
    Raises UserError where there is none, or more than one."""
    if word.isdecimal():
        if int(word) not in LECTURES:
            raise UserError(f"there is no lecture {word}: they are 1 to {len(LECTURES)}")
        found = [exercise for exercise in exercises if exercise.lecture == int(word)]
        if not found:
            file, name = LECTURES[int(word)]
            raise UserError(f"at the end of the repository's {file} there should be an exercise "
                            f"{name}, that of lecture {word}")
        return found[0]
    names = {name: exercise for exercise in exercises for name in exercise.names}
    if word in names:
        return names[word]
    found = [name for name in names if name.split(".")[-1] == word]
    if len(found) > 1:
        raise UserError(f"'{word}' may be {' or '.join(found)}")
    if not found:
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "--all shows them"
        raise UserError(f"there is no exercise '{word}'; {hint}")
    return names[found[0]]


def choose(args: Args) -> list[Exercise]:
    """The exercises that are wanted, each once. Raises UserError."""
    if args.all and args.only:
        raise UserError("--all already includes every exercise: leave out the names")
    exercises = all_exercises()
    if args.all:
        return exercises
    words = args.only or [str(lecture) for lecture in LECTURES]
    return list(dict.fromkeys(named(word, exercises) for word in words))


# ---- what was changed ---------------------------------------------------------------------------

def changed(exercises: list[Exercise]) -> list[str]:
    """What decides about green and red and differs from git's HEAD: files under tests/, pytest's
    settings, and the tests that the comments of these exercises name. Without git, nothing."""
    listed = git_or_none("status", "--porcelain", "--", "tests", "pytest.ini", "conftest.py",
                         where=ROOT) or ""
    found = [line[3:] for line in listed.splitlines()]
    for source in dict.fromkeys(exercise.source for exercise in exercises):
        before = git_or_none("show", f"HEAD:./{source}", where=ROOT)
        now = (ROOT / source).read_text(encoding="utf-8", errors="replace")
        if before is not None and exercises_in(before, source) != exercises_in(now, source):
            found.append(f"the exercises in {source}")
    return found


# ---- one exercise -------------------------------------------------------------------------------

def functions_of(source: str | bytes) -> dict[str, ast.FunctionDef]:
    """The functions of a file by name, those of its classes as `Class.name`. Raises SyntaxError, or
    ValueError where it holds zero bytes."""
    found = {}
    for node in ast.parse(source).body:
        prefix, inside = "", [node]
        if isinstance(node, ast.ClassDef):
            prefix, inside = f"{node.name}.", node.body
        found |= {prefix + child.name: child for child in inside
                  if isinstance(child, ast.FunctionDef)}
    return found


def is_deleted(function: ast.FunctionDef) -> bool:
    """Whether the body is only a docstring, `...`, `pass` and `raise NotImplementedError`."""
    for statement in function.body:
        constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        raised = isinstance(statement, ast.Raise) and "NotImplemented" in ast.unparse(statement)
        if not (constant or raised or isinstance(statement, ast.Pass)):
            return False
    return True


def damage(exercise: Exercise) -> str:
    """Why there is nothing to test, or "" if there is."""
    try:
        functions = functions_of((ROOT / exercise.file).read_bytes())
    except SyntaxError as error:
        return f"{exercise.file}, line {error.lineno}: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{exercise.file} can't be read: {error}"
    for name in exercise.names:
        if name not in functions:
            return f"there is no {name} in {exercise.file}"
        if is_deleted(functions[name]):
            return f"{name} has no body"
    return ""


def command(exercise: Exercise, report: str) -> list[str]:
    """The command line of its test, which writes what it finds to the file `report`."""
    return [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider",
            f"--junitxml={report}", *shlex.split(exercise.test)]


def last_error(output: str) -> str:
    """The last error in pytest's output, whose lines begin with an E; else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    errors = [line for line in marked if re.match(r"assert |[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or marked or lines or ["pytest ended without a word"])[-1]


def outcome(report: Path, output: str) -> tuple[str, str]:
    """("green", "red" or "skipped", the reason) from what pytest has written: `report` is the file
    of --junitxml, which is missing if no test could be imported, `output` what it printed."""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return "red", last_error(output)
    for case in cases:
        for kind in ("failure", "error"):
            wrong = case.find(kind)
            if wrong is None:
                continue
            if wrong.get("message") == "collection failure":
                return "red", last_error(wrong.text or "")
            return "red", f"{case.get('name')}: {wrong.get('message')}"
    skipped = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    if len(skipped) < len(cases):
        return "green", ""
    if not cases:
        return "red", "there is no such test"
    # Where a whole file is skipped, the reason stands in the text only.
    reason = re.search(r"Skipped: ([^\n\"]*)", skipped[0].text or "")
    return "skipped", reason[1] if reason else skipped[0].get("message")


def examine(exercise: Exercise) -> tuple[str, str]:
    """Run its test in a process of its own: ("green", "red" or "skipped", the reason)."""
    reason = damage(exercise)
    if reason:
        return "red", reason
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if exercise.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        report, printed = Path(folder) / "report.xml", Path(folder) / "output.txt"
        with open(printed, "wb") as output:
            # A session of its own, so that the processes that a test starts can be ended as well.
            child = subprocess.Popen(
                command(exercise, str(report)), cwd=ROOT, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            child.wait(LONGEST)
        except subprocess.TimeoutExpired:
            return "red", f"not done after {LONGEST} seconds"
        finally:                # also after Ctrl-C, and what a test that has ended left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return outcome(report, printed.read_text(encoding="utf-8", errors="replace"))


# ---- the table ----------------------------------------------------------------------------------

def progress(text: str):
    """Show a line on the terminal in place of the one before; nothing where stderr is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{textwrap.shorten(text, 79, placeholder='...')}", end="", file=sys.stderr,
              flush=True)


def run(args: Args) -> bool:
    """Grade the exercises that are wanted, print the table, and return whether all are green."""
    check_options(args)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(where_packages_are(package))
    chosen, green = choose(args), 0
    differing = changed(chosen)
    if differing:
        print(f"note: not as in git's HEAD: {', '.join(differing)}. Only the original tests count.")
    wide = max(len(exercise.name) for exercise in chosen)
    print(f"lecture  {'exercise':<{wide}}  {'file':<16}  {'result':<7}  seconds")
    for number, exercise in enumerate(chosen, 1):
        progress(f"{number} of {len(chosen)}: {exercise.name}, pytest {exercise.test}")
        began = time.monotonic()
        result, reason = examine(exercise)
        seconds = time.monotonic() - began
        progress("")
        green += result == "green"
        print(f"{exercise.lecture or '':>7}  {exercise.name:<{wide}}  {exercise.file:<16}  "
              f"{result:<7}  {seconds:7.1f}", flush=True)
        if reason:
            print(f"{'':9}{textwrap.shorten(reason, 150, placeholder='...')}")
        if result == "red":
            print(f"{'':9}{'TRITON_INTERPRET=1 ' * exercise.interpreted}pytest {exercise.test}")
    print(f"{green} of {len(chosen)} green")
    return green == len(chosen)


def entry():
    for which in (signal.SIGTERM, signal.SIGHUP):       # the test that runs has to end as well
        if signal.getsignal(which) != signal.SIG_IGN:
            signal.signal(which, lambda number, _: sys.exit(128 + number))
    if not run(cli(Args, about=__doc__, positional="only")):
        sys.exit(1)


if __name__ == "__main__":
    main(entry)
