"""The house rules: who imports whom, what is imported at all, how long lines and files are."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.common import ROOT

# A file imports only files of a lower floor. `lib` and `lab` have a floor a file; what is not named
# here is on its folder's floor.
FLOORS = {
    "lib": 0, "lib.cli": 0.1, "lib.tensors": 0.2, "lib.dispatch": 0.2, "lib.rotary": 0.4,
    "lib.vocabulary": 0.3,
    "lib.attention": 0.5, "lib.sigmoid": 0.5,
    "lib.losses": 0.5, "lib.memory": 0.5, "lib.prefetch": 0.5, "lib.common": 1,
    "lib.runs": 1.1, "lib.loader": 1.2, "lib.web": 0.2,
    "tokenizer": 1, "kernels": 1, "lib.ring": 1.2, "tasks": 2, "vit": 2, "optim": 2,
    "gym": 3, "model": 3, "lib.images": 3, "lib.teachers": 3,
    "lib.index": 0.3, "lib.records": 3.05, "lib.parquet": 3.06, "lib.shards": 3.1,
    "lib.conversations": 3.2,
    "lib.scoring": 2.5, "lib.summary": 3.1,
    "lib.batch": 3.5, "lib.hub": 4, "lib.lora": 4.5, "lib.partition": 3.6, "data": 4, "mmtp": 4,
    "lib.pairs": 4.4, "lib.captions": 4.5,
    "engine": 5, "lib.checkpoint": 5, "lib.episodes": 5,
    "lib.card": 5.1, "lib.evaluation": 5.2, "lib.harness": 5.25, "lib.turns": 5.1,
    "lib.forms": 4.5, "lib.grammar": 4.3, "lib.json_grammar": 4.4,
    "lib.terminal": 5.2, "lib.film": 2.5, "lib.watch": 5.25,
    "lib.tool_use": 3.3, "lib.api": 5.2, "lib.openai_api": 5.3, "lib.anthropic_api": 5.3,
    "lib.own_eval": 5.1, "lib.curriculum": 5.1, "lib.probes": 5.1,
    "lib.rollout": 5.1, "lib.ranks": 5.1, "lib.meta": 1.1, "lib.roofline": 1.2, "lib.async_rl": 5.2,
    "pretrain": 6, "train_vit": 6, "rl": 6, "sample": 6, "serve": 6, "lab": 7, "recipes": 7,
    "course": 7}
PACKAGES = {"torch", "numpy", "einops", "tiktoken", "PIL", "tqdm", "triton", "pytest"}
# A file may import these inside functions, and says in one line where they are missing.
OPTIONAL = {"lib.parquet": {"pyarrow"}}
NOT_OURS = {".git", ".venv", "out", "__pycache__", ".pytest_cache"}


def files() -> list[Path]:
    """The files of the repository; where git is missing, whatever lies here."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [p.relative_to(ROOT) for p in ROOT.rglob("*")
                  if not NOT_OURS & set(p.relative_to(ROOT).parts)]
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


SOURCES = sorted(p.relative_to(ROOT) for p in files() if p.suffix == ".py")
HOUSE = [p for p in SOURCES if p.parts[0] != "tests"]


def name_of(source: Path) -> str:
    """The name under which others import it: pretrain, lib.cli; tasks and lab as a whole."""
    name = ".".join(source.with_suffix("").parts).removesuffix(".__init__")
    return name if name in FLOORS else source.parts[0].removesuffix(".py")


def short(module: str) -> str:
    return module if module in FLOORS else module.split(".")[0]


def imports(source: Path, everywhere: bool = True) -> set[str]:
    """The first names of what a file imports; `everywhere`: also inside functions."""
    def walk(node):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if everywhere or not inside:
                yield child
                yield from walk(child)
    found = set()
    for node in walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {short(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {short(f"lib.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(short(node.module) if not node.level else name_of(source))
    return found


def foreign(names: set[str]) -> set[str]:
    return names - sys.stdlib_module_names - PACKAGES - FLOORS.keys()


def test_there_is_something_to_read():
    assert {"lib/common.py", "model.py", "pretrain.py"} <= {str(p) for p in HOUSE}
    assert imports(Path("gym.py")) >= {"tasks", "numpy"}


@pytest.mark.parametrize("source", HOUSE, ids=str)
def test_imports_go_down_the_floors(source):
    floor = FLOORS[name_of(source)]
    for other in imports(source) & FLOORS.keys() - {name_of(source)}:
        assert FLOORS[other] < floor, f"{source} on floor {floor} imports {other}"


@pytest.mark.parametrize("source", [p for p in HOUSE if name_of(p) != "recipes"], ids=str)
def test_eight_packages_are_enough(source):
    """lab/ may compare with peers, which it imports where they are used."""
    assert not foreign(imports(source, everywhere=False))
    if source.parts[0] != "lab":
        assert foreign(imports(source)) <= OPTIONAL.get(name_of(source), set())


@pytest.mark.parametrize("source", [p for p in HOUSE if name_of(p) in ("gym", "tasks")], ids=str)
def test_tasks_know_no_torch(source):
    assert not imports(source) & {"torch", "einops", "triton", "lib.common", "lib.tensors"}


def test_a_drawing_worker_starts_without_torch():
    look = "import sys, gym; gym.demonstrate(gym.Task('point', 1)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "gym" in loaded and not loaded & {"torch", "data"}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_lines_fit(source):
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100 or line != line.rstrip()] == []


def lines_of(source: Path) -> list[str]:
    return (ROOT / source).read_text(encoding="utf-8").splitlines()


def test_the_top_level_is_what_the_readme_promises():
    top = {p.name for p in HOUSE if len(p.parts) == 1}
    assert top == {
        "vit.py", "mmtp.py", "model.py", "train_vit.py", "pretrain.py", "rl.py", "gym.py",
        "sample.py", "serve.py", "kernels.py", "tokenizer.py", "data.py", "optim.py", "engine.py"}


@pytest.mark.parametrize("source", [p for p in HOUSE if p.parts[0] in ("lib", p.name)], ids=str)
def test_files_are_short(source):
    assert len(lines_of(source)) <= 600


def shelves() -> dict[str, tuple[int, int]]:
    """{shelf: (number of files, lines)} of the top level and of each folder of sources."""
    found = {}
    for source in HOUSE:
        shelf = source.parts[0] if len(source.parts) > 1 else "top"
        files, lines = found.get(shelf, (0, 0))
        found[shelf] = files + 1, lines + len(lines_of(source))
    return found


def test_the_shelves_have_room():
    """Aims, in lines; clarity goes before a count, so a tenth more is allowed.
    `pytest -s tests/test_house.py -k shelves` prints the counts."""
    aims = {"top": 6500, "lib": 13500, "tasks": 7000, "lab": 9500}
    for shelf, aim in aims.items():
        files, lines = shelves()[shelf]
        print(f"{shelf:<6} {files:3} files {lines:6,} lines of {aim:,}")
        assert lines <= 1.1 * aim, shelf


# ---- the training scripts -----------------------------------------------------------------------

TRAINING = [Path(name) for name in ("train_vit.py", "pretrain.py", "rl.py")]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)


def functions(source: Path) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def depth(node: ast.AST, level: int = 0) -> int:
    """How many blocks lie inside one another; `elif` is no deeper than its `if`."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, depth(child, level + deeper))
    return deepest


def comments(lines: list[str]) -> int:
    return sum("# " in line for line in lines)


@pytest.mark.parametrize("source", TRAINING, ids=str)
def test_a_training_script_is_easy_to_follow(source):
    """No function of over 120 lines without its comments and docstring, nothing nested deeper than
    five blocks, no function inside another one; and the comments in the loop, printed."""
    lines = lines_of(source)
    for function in functions(source):
        own = lines[function.lineno - 1:function.end_lineno]
        code = [line for line in own if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= 120, function.name
        assert depth(function) <= 5, function.name
        inside = [node.name for node in ast.walk(function)
                  if isinstance(node, ast.FunctionDef) and node is not function]
        assert not inside, (function.name, inside)
    loop = max((f for f in functions(source) if any(isinstance(n, (ast.For, ast.While))
                                                    for n in ast.walk(f))),
               key=lambda f: comments(lines[f.lineno - 1:f.end_lineno]))
    own = lines[loop.lineno - 1:loop.end_lineno]
    share = 100 * comments(own) / len(own)
    print(f"{source} {loop.name}: {len(own)} lines, {share:.0f} comments in 100 lines")
    assert share >= 20


@pytest.mark.parametrize("source", [p for p in HOUSE if len(p.parts) == 1], ids=str)
def test_scripts_set_the_environment_before_torch(source):
    """`import lib` comes first in every script that is run and loads torch."""
    text = (ROOT / source).read_text(encoding="utf-8")
    runs, loads = "__main__" in text, {"torch", "data", "engine"} & imports(source)
    if runs and loads:
        first = next(node for node in ast.parse(text).body
                     if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert isinstance(first, ast.Import) and first.names[0].name == "lib"


def test_the_environment_reaches_torch():
    look = "import lib, os; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, env=clean, capture_output=True,
                          text=True)
    assert done.stdout.split()[0] == "passive"
    own = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True,
                         env=clean | {"OMP_WAIT_POLICY": "active"})
    assert own.stdout.split()[0] == "active"        # what the user has set stays


def test_nothing_points_to_the_desk_it_was_made_on():
    local = re.compile("/" + r"work/|/" + r"root/|/" + r"home/\w|/tmp" + r"/peers|issue" + r" #\d")
    found = []
    for path in files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if "\0" not in text and path.name != "corpus.txt":
            found += [(str(path.relative_to(ROOT)), m.group()) for m in local.finditer(text)]
    assert found == []


def test_debugging_stays_out():
    """No environment variable but the launcher's is read, and nobody stops in a debugger."""
    for source in HOUSE:
        text = (ROOT / source).read_text(encoding="utf-8")
        read = set(re.findall(r"environ(?:\.get\(|\[)\s*[\"'](\w+)", text))
        assert read <= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS",
                        "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "NANOGLMV_KERNELS",
                        "NANOGLMV_ATTENTION", "NANOGLMV_API_KEY", "TRITON_INTERPRET"}, source
        assert not re.search(r"\bbreakpoint\(\)|\bpdb\b", text), source
