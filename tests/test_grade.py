"""lab/grade.py: its table on small exercises, and that no exercise is green without its body."""
import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_house import files

from lab import grade
from lab.grade import all_exercises, choose, exercises_in, functions_of
from lib.cli import cli, UserError
from lib.common import ROOT

EXERCISES = all_exercises()


def arguments(*words):
    return cli(grade.Args, list(words), positional="only")


# ---- the comments -------------------------------------------------------------------------------

def test_exercises_name_functions_of_their_files_and_lectures_name_exercises():
    functions = {file: functions_of((ROOT / file).read_bytes())
                 for file in {exercise.file for exercise in EXERCISES}}
    for exercise in EXERCISES:
        for name in exercise.names:
            assert not grade.is_deleted(functions[exercise.file][name]), exercise
        assert 5 <= exercise.minutes <= 60
    names = [name for exercise in EXERCISES for name in exercise.names]
    assert len(names) == len(set(names)) >= 30
    assert [exercise.lecture for exercise in choose(arguments())] == [*range(1, 11)]


def test_every_exercise_names_tests_that_there_are():
    """A word after -k is part of a test's name, or of a parameter. That the tests run is seen by
    the slow test below."""
    for exercise in EXERCISES:
        file, *choice = shlex.split(exercise.test)
        words = re.findall(r"(?<![\w-])[a-z]\w*", choice[1]) if choice else []
        assert choice[:1] in ([], ["-k"]) and len(choice) != 1
        source = (ROOT / file).read_text(encoding="utf-8")
        names = " ".join(re.findall(r"^def test_\w+|\"\w+\"", source, re.M))
        for word in {*words} - {"and", "or", "not"}:
            assert word in names, f"{file} has no test of '{word}'"


TEXT = """
# Exercises. Delete the body, write it again, run the test.
# 1. double: with a line
#    that goes on. pytest tests/test_one.py -k "two or four"; 5 minutes.
# 2. A.first and A.second in lib/two.py: TRITON_INTERPRET=1 pytest tests/test_one.py; 30 minutes.
# 3. Write a source: in another language. pytest tests/test_one.py -k source. Why? 10 minutes.
# 4. The condition in `_admit`. pytest tests/test_one.py -k admission; 20 minutes.

print("the comment has ended: # 5. triple: it")
"""


def test_questions_are_no_exercises():
    one, two = exercises_in(TEXT, "one.py")
    assert one == grade.Exercise("one.py", "one.py", ("double",),
                                 'tests/test_one.py -k "two or four"', 5, False)
    assert (two.file, two.name, two.interpreted) == ("lib/two.py", "A.first and A.second", True)
    assert exercises_in("# nothing", "one.py") == []
    with pytest.raises(UserError, match="^one.py, exercise 1 does not end with its test"):
        exercises_in(TEXT.replace("5 minutes.", "5 min."), "one.py")


@pytest.mark.parametrize("words,said", [
    (["11"], "there is no lecture 11"), (["patchfy"], "did you mean patchify"),
    (["forward"], "DecoderLayer.forward or VitAttention.forward"), ([""], "no exercise ''"),
    (["--all", "iou"], "leave out the names"), (["-1"], "no exercise '-1'")])
def test_bad_input_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        choose(arguments(*words))
    assert "\n" not in str(error.value)


def test_exercises_are_chosen_by_lecture_and_by_name():
    chosen = choose(arguments("6", "_release", "VitAttention.forward", "accept"))
    assert [exercise.name for exercise in chosen] == [
        "accept", "Engine._release", "VitAttention.forward"]
    assert choose(arguments("--all")) == EXERCISES


# ---- the table ----------------------------------------------------------------------------------

SOURCE = '''"""Some functions."""


def right(x):
    return 2 * x


def wrong(x):
    """Twice x."""
    return x + 2


def gone(x):
    """Nothing is left."""
    ...


def absent():
    return 1


# Exercises. Delete the body, write it again, run the test.
# 1. right: doubled. pytest tests/test_one.py -k right; 5 minutes.
# 2. wrong: doubled. pytest tests/test_one.py -k wrong; 5 minutes.
# 3. gone: doubled. pytest tests/test_one.py -k right; 5 minutes.
# 4. lost: there is no such function. pytest tests/test_one.py -k right; 5 minutes.
# 5. absent: its package is missing. pytest tests/test_two.py; 5 minutes.
# 6. broken in lib/broken.py: no Python. pytest tests/test_one.py -k right; 5 minutes.
'''
TESTS = """from one import right, wrong

def test_right():
    assert right(3) == 6

def test_wrong():
    assert wrong(2) == 4
    assert wrong(3) == 6, "three doubled is six"
"""
PEER = "import pytest\npytest.importorskip('no_such_package')\ndef test_peer():\n    pass\n"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small repository with exercises of all kinds."""
    for name, text in (("one.py", SOURCE), ("tests/test_one.py", TESTS),
                       ("tests/test_two.py", PEER), ("lib/broken.py", "\ndef broken(:\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    monkeypatch.setattr(grade, "LECTURES", {1: ("one.py", "right"), 2: ("one.py", "wrong")})
    return tmp_path


def test_the_table(tree, capsys):
    assert not grade.run(arguments("--all"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if " one.py " in line or " lib/broken.py " in line]
    assert [row[:-1] for row in rows] == [
        ["1", "right", "one.py", "green"], ["2", "wrong", "one.py", "red"],
        ["gone", "one.py", "red"], ["lost", "one.py", "red"], ["absent", "one.py", "skipped"],
        ["broken", "lib/broken.py", "red"]]
    said = [line.strip() for line in lines if line.startswith("         ")]
    assert said[0].startswith("test_wrong: AssertionError: three doubled is six")
    assert said[1] == "pytest tests/test_one.py -k wrong"
    for reason in ("gone has no body", "there is no lost in one.py",
                   "lib/broken.py, line 2: invalid syntax"):
        assert reason in said
    assert any("no_such_package" in line for line in said)
    assert lines[-1] == "1 of 6 green"


def test_a_loop_without_an_end_is_red(tree, monkeypatch):
    """And the process that runs it is ended."""
    monkeypatch.setattr(grade, "LONGEST", 0.5)
    (tree / "tests" / "test_one.py").write_text("while True:\n    pass\n")
    began = time.monotonic()
    assert grade.examine(choose(arguments("right"))[0]) == ("red", "not done after 0.5 seconds")
    assert time.monotonic() - began < 20


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(path) -> bool:
    """Whether the process whose id is in this file has ended."""
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{path.read_text()}/stat")     # a zombie, which nobody has waited for
    return status.exists() and status.read_text().split()[2] == "Z"


GREEN = "<testsuite><testcase name='test_right'/></testsuite>"
LEAVES = """
import pathlib, subprocess, sys
left = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(99)"])
pathlib.Path("left").write_text(str(left.pid))
pathlib.Path(sys.argv[1]).write_text(sys.argv[2])
"""
LOOPS = "import os, pathlib; pathlib.Path('began').write_text(str(os.getpid()))\nwhile True: pass"


def test_what_a_test_leaves_running_is_ended_and_not_waited_for(tree, monkeypatch):
    monkeypatch.setattr(grade, "command", lambda exercise, report: [
        sys.executable, "-S", "-c", LEAVES, report, GREEN])
    assert grade.examine(choose(arguments("right"))[0]) == ("green", "")
    wait_until(lambda: ended(tree / "left"))


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP])
def test_a_test_ends_with_the_process_that_grades(tree, which):
    """Also where the terminal is closed: the test has a session of its own."""
    program = f"""
import pathlib, sys
from lab import grade
grade.ROOT, grade.LECTURES = pathlib.Path({str(tree)!r}), {{1: ("one.py", "right")}}
grade.command = lambda *_: [sys.executable, "-S", "-c", {LOOPS!r}]
sys.argv[1:] = ["1"]
grade.entry()
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: (tree / "began").exists() and (tree / "began").read_text())
    process.send_signal(which)
    assert process.wait(20) == 128 + which
    wait_until(lambda: ended(tree / "began"))


def test_the_exit_code_and_tests_that_were_changed(tree, monkeypatch, capsys):
    def exit_code(*words):
        monkeypatch.setattr(sys, "argv", ["grade", *words])
        try:
            grade.entry()
        except SystemExit as error:
            return error.code
        return 0
    assert grade.changed(grade.all_exercises()) == []       # without git nobody knows
    (tree / "tests" / "test_one.py").write_text("import one\nassert one.right(3) == 7\n")
    assert exit_code("1") == 1
    out = capsys.readouterr().out
    assert "assert 6 == 7" in out and out.endswith("0 of 1 green\n")

    if not shutil.which("git"):
        pytest.skip("git is missing")
    (tree / "tests" / "test_one.py").write_text(TESTS)
    for words in (["init", "-q"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    assert grade.changed(grade.all_exercises()) == []
    (tree / "tests" / "test_one.py").write_text("def test_right():\n    pass\n")
    (tree / "one.py").write_text(SOURCE.replace("tests/test_one.py -k wrong", "tests/test_two.py"))
    assert exit_code("right") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "note: not as in git's HEAD: tests/test_one.py, the exercises in one.py. Only the original "
        "tests count.")


# ---- slow: every exercise of the repository without its body ------------------------------------

def without_body(source: str, names) -> str:
    """The source with `raise NotImplementedError` in place of these functions' bodies. Signatures
    and docstrings stay."""
    lines, functions = source.split("\n"), functions_of(source)
    for function in sorted((functions[name] for name in names), key=lambda f: -f.lineno):
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        indent = " " * body[0].col_offset
        lines[body[0].lineno - 1:body[-1].end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines)


class Copy:
    """A copy of the repository, and a process that runs its tests."""

    def __init__(self, folder):
        self.folder = folder
        for path in files():
            name = path.relative_to(ROOT)
            if name.parts[0] not in ("ckpt", "docs"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, folder / name)
        for name in ("ckpt", "docs"):
            (folder / name).symlink_to(ROOT / name)
        self.runner = subprocess.Popen(
            [sys.executable, str(folder / "tests" / "forked_pytest.py")], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"})

    def pytest(self, exercise):
        """(exit code, output, what grade makes of it) of the exercise's test."""
        report, log = self.folder / "report.xml", self.folder / "log.txt"
        report.unlink(missing_ok=True)
        words = grade.command(exercise, str(report))[3:]
        environment = {"TRITON_INTERPRET": "1"} if exercise.interpreted else {}
        order = {"words": words, "environment": environment, "log": str(log)}
        print(json.dumps(order), file=self.runner.stdin, flush=True)
        code, self.seconds = json.loads(self.runner.stdout.readline())
        output = log.read_text(errors="replace")
        return code, output, grade.outcome(report, output)

    def close(self):
        self.runner.stdin.close()
        self.runner.wait()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    copy = Copy(tmp_path_factory.mktemp("repository"))
    yield copy
    copy.close()


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_without_its_body_an_exercise_is_red(copy, exercise):
    """And green with it: here for the lectures' exercises, the other tests run anyway."""
    own, changed = ROOT / exercise.file, copy.folder / exercise.file
    changed.write_text(without_body(own.read_text(encoding="utf-8"), exercise.names),
                       encoding="utf-8")
    # Python compares times in seconds to know whether a file has changed since it was compiled.
    os.utime(changed, (0, EXERCISES.index(exercise)))
    try:
        code, output, (result, reason) = copy.pytest(exercise)
    finally:
        shutil.copy2(own, changed)
    print(f"{copy.seconds} s without its body: {reason}")
    if result == "skipped":
        pytest.skip(reason)
    assert result == "red", f"pytest {exercise.test} does not need {exercise.name}"
    if code != 1:       # no test has run: then it must be for the body that is missing
        assert "NotImplementedError" in output, output
        print("it fails at the import")
    if exercise.lecture:
        code, output, (result, reason) = copy.pytest(exercise)
        print(f"{copy.seconds} s with its body")
        assert (code, result) == (0, "green"), output
