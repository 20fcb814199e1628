"""The lectures in course/ against what they speak of: functions, pictures, commands, exercises."""
import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from course import draw
from lab import sheet
from lab.grade import all_exercises, LECTURES
from lib.cli import cli, UserError
from lib.common import ROOT

COURSE = ROOT / "course"
PAGES = sorted(COURSE.glob("[0-9][0-9]-*.md"))
HEADINGS = ["The idea", "Read", "One picture", "Run it", "Exercise", "Homework: a lab sheet",
            "Questions"]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [*PAGES, COURSE / "README.md"]}
GUIDES = ("docs/using.md", "docs/data.md", "CONTRIBUTING.md")   # their commands are checked, too
# The sheet of each lecture, and the field that bare words are for where a script has one.
SHEETS = {1: "muon", 2: "naflex", 3: "collapse", 4: "big_batch", 5: "text_kept", 6: "mmtp_loss",
          7: "vague_tasks", 8: "rl_beats_sft", 9: "async_rl", 10: "harness"}
BARE = {"lab": "what", "lab.grade": "only", "lab.report": "run", "course.draw": "what",
        "course.draw_rl": "what"}


def number_of(name: str) -> int:
    return int(name[:2])


def part(text: str, heading: str) -> str:
    """What a page has below a heading, up to the next one."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[list[str]]:
    """The words behind `.venv/bin/python` of every command of a page, in blocks and in sentences.
    A program that is typed in is ["-", the program]."""
    found = []
    for program in re.findall(r"\.venv/bin/python - <<'EOF'\n(.*?)\nEOF\n", text, re.S):
        found.append(["-", program])
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(".venv/bin/python ") and "<<" not in line:
                found.append(shlex.split(line.replace("<your student number>", "1"),
                                         comments=True)[1:])
    for line in re.findall(r"`\.venv/bin/python ([^`]+)`", text):
        found.append(shlex.split(line.replace("<your student number>", "1")))
    return found


def defined(path) -> set[str]:
    """The functions and classes of a file; methods as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}" for child in node.body
                      if isinstance(child, ast.FunctionDef)}
    return found


@functools.cache
def names_in(path: str) -> list[str]:
    return [name for name in defined(ROOT / path) if name.startswith("test_")]


def check_pytest(words: list[str]):
    """Raises unless the file has a test whose name holds the word behind -k."""
    path, *rest = [word for word in words if word not in ("-q", "-x")]
    assert rest[:1] == ["-k"] and re.fullmatch(r"\w+", rest[1]), words
    assert any(rest[1] in name for name in names_in(path)), words


def check_command(words: list[str]):
    """Raises unless the script is there and takes these options."""
    if words[0] == "-":
        return compile(words[1], "a lecture", "exec")
    script, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if script == "pytest":
        return check_pytest(rest)
    path = ROOT / script.removesuffix(".py").replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), script
    name = script.removesuffix(".py")
    module = importlib.import_module("lab.__main__" if name == "lab" else name)
    if hasattr(module, "VERBS"):
        verb, *rest = rest
        assert verb in module.VERBS, words
        config, _, bare = module.VERBS[verb]
    else:
        config, bare = module.Args, BARE.get(name)
    args = cli(config, rest, positional=bare)
    if name == "lab":
        assert {*args.what} <= {"list", "show", "all", *sheet.names()}, words
    return args


def test_there_are_ten_lectures():
    assert [number_of(path.name) for path in PAGES] == list(range(1, 11)) == list(LECTURES)


@pytest.mark.parametrize("name", TEXTS)
def test_pages_are_short(name):
    lines = TEXTS[name].splitlines()
    assert len(lines) <= 120
    prose = [line for line in lines if not line.startswith("|")]     # a table's rows can't be cut
    assert [line for line in prose if len(line) > 100 or line != line.rstrip()] == []
    assert "@@" not in TEXTS[name]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_lecture_has_its_parts_in_order(path):
    text = TEXTS[path.name]
    assert re.match(rf"# {number_of(path.name)}\. \w.*\n\n\w", text)
    assert re.findall(r"^## (.+)$", text, re.M) == HEADINGS
    questions = part(text, "Questions")
    assert questions.count("<details>") == questions.count("</details>") == 3
    assert "`" not in questions, "between HTML tags it is shown as it stands: write <code>"
    for answer in re.findall(r"</summary>(.*?)</details>", questions, re.S):
        assert len(answer.split()) >= 10, answer


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_to_be_read_exists(path):
    items = re.findall(r"^\d+\. (.+)$", part(TEXTS[path.name], "Read"), re.M)
    assert 5 <= len(items) <= 9
    for item in items:
        entry = re.match(r"`([\w/]+\.py)`: `([\w.]+)` – \S", item)
        assert entry, item
        assert entry[2] in defined(ROOT / entry[1]), item


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pictures_exist_and_are_small(path):
    text = TEXTS[path.name]
    found = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", part(text, "One picture"))
    assert found
    for name in found:
        assert name.startswith(f"pictures/{path.name[:2]}-"), name
        assert 0 < (COURSE / name).stat().st_size <= 200_000, name
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert name.startswith("http") or (COURSE / name).exists(), name


@pytest.mark.parametrize("name", [*TEXTS, *GUIDES])
def test_commands_are_understood(name):
    found = commands(TEXTS[name] if name in TEXTS else (ROOT / name).read_text(encoding="utf-8"))
    assert found
    for words in found:
        check_command(words)


def test_a_wrong_command_is_noticed():
    for words in (["pretrain.py", "--stps=3"], ["train_vit.py", "--steps=x"], ["pretrian.py"],
                  ["-m", "pytest", "tests/test_model.py", "-k", "no_such_test"], ["-", "x = ("],
                  ["-m", "lab", "no_such_sheet"], ["sample.py", "aks"]):
        with pytest.raises((AssertionError, UserError, SyntaxError)):
            check_command(words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_live_run_is_there_with_its_output(path):
    text = part(TEXTS[path.name], "Run it")
    assert commands(text), "no command"
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    outputs = [inside for kind, inside in blocks if kind in ("", "text")]
    assert outputs and all(re.search(r"\d", output) for output in outputs), outputs


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_exercise_is_that_of_its_file(path):
    """Function, test and minutes as in the comment at the end of the file."""
    number, text = number_of(path.name), part(TEXTS[path.name], "Exercise")
    [exercise] = [e for e in all_exercises() if e.lecture == number]
    assert f"`{exercise.name}`" in text and f"`{exercise.file}`" in text
    assert f".venv/bin/python -m pytest {exercise.test}\n" in text
    assert f"{exercise.minutes} minutes" in text
    assert f"`git show HEAD:{exercise.file}`" in text and "lab.grade" in text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_homework_is_a_sheet(path):
    text = part(TEXTS[path.name], "Homework: a lab sheet")
    name = SHEETS[number_of(path.name)]
    assert f".venv/bin/python -m lab {name} --seed=<your student number>" in text
    assert "--out=out/changed" in text and name in sheet.names()


def test_the_index_is_that_of_the_lectures():
    rows = re.findall(r"^\| (\d+) \| \[([^\]]+)\]\(([\w-]+\.md)\) \| (.+) \| `([\w.]+)` \|"
                      r" `(\w+)`.* \|$", TEXTS["README.md"], re.M)
    assert [int(number) for number, *_ in rows] == list(LECTURES)
    for number, title, page, files, function, name in rows:
        assert (COURSE / page) in PAGES
        assert TEXTS[page].startswith(f"# {number}. {title}\n"), title
        assert function == LECTURES[int(number)][1] and name == SHEETS[int(number)]
        read = part(TEXTS[page], "Read")
        assert re.findall(r"`[\w/]+\.py`", files), files
        for file in re.findall(r"`([\w/]+\.py)`", files):
            assert f"`{file}`: " in read, (page, file)


def test_the_minutes_of_the_short_path_add_up():
    """README.md: a lecture of 90 minutes; each row begins where the one before it ends."""
    rows = re.findall(r"^\| (\d+)-(\d+) \|", TEXTS["README.md"], re.M)
    ends = [0, *(int(end) for _, end in rows)]
    assert [int(begin) for begin, _ in rows] == ends[:-1] and ends[-1] == 90


def test_the_pictures_are_drawn_by_the_code_that_the_lectures_name(tmp_path):
    """As in course/pictures, but for letters, which other versions of Pillow draw otherwise."""
    draw.run(draw.Args(what=["patches", "row"], out=str(tmp_path)))
    for name in ("02-patches.png", "05-row.png"):
        drawn, kept = (np.asarray(Image.open(folder / name).convert("RGB"), float)
                       for folder in (tmp_path, COURSE / "pictures"))
        assert drawn.shape == kept.shape and abs(drawn - kept).mean() < 2, name


@pytest.mark.parametrize("what,run,said", [
    (["patches", "other"], "", "no picture 'other'"), (["retrieval"], "", "needs --run"),
    (["retrieval"], "ckpt/demo", "--run=ckpt/demo is no run of lecture 4")])
def test_what_can_not_be_drawn_is_one_clear_line(what, run, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        draw.run(draw.Args(what=what, run=run, out=str(tmp_path)))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_what_exchanged_positions_do_is_what_lecture_5_says():
    """Its program, run as it stands there: each share is at most 5 points from the printed one."""
    text = part(TEXTS["05-decoder.md"], "Run it")
    printed = re.search(r"```text\n(.*?)```", text, re.S)[1]
    [program] = [words[1] for words in commands(text) if words[0] == "-"]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr

    def shares(output):
        return [int(share) for share in re.findall(r"(\d+)%", output)]
    assert len(shares(printed)) == 12
    assert shares(done.stdout) == pytest.approx(shares(printed), abs=5)
