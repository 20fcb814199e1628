"""lab/grade.py: its table on small exercises, and that no exercise is green without its body."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from test_house import files

from lab import grade
from lab.grade import all_exercises, exercises_in, functions_of
from lib.cli import cli, UserError
from lib.common import ROOT

EXERCISES = all_exercises()


def arguments(*words):
    return cli(grade.Args, list(words), positional="only")


# ---- slow: every exercise of the repository without its body ------------------------------------

def without_body(source: str, names) -> str:
    """The source with `raise NotImplementedError` in place of these functions' bodies. Signatures
    and docstrings stay."""
    lines, functions = source.splitlines(), functions_of(source)
    for function in sorted((functions[name] for name in names), key=lambda f: -f.lineno):
        body = function.body
        if isinstance(body[0], grade.ast.Expr) and isinstance(body[0].value, grade.ast.Constant):
            body = body[1:]
        indent = " " * body[0].col_offset
        lines[body[0].lineno - 1:body[-1].end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


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
