"""The command line: every form of an option, --help, and bad input as one line and exit code 2."""
import importlib
import io
import json
import math
import os
import platform
import re
import runpy
import subprocess
import sys
import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace

import pytest
import torch
from PIL import Image

import pretrain
import rl
import sample
from lib.checkpoint import save_model
from lib.cli import check_options, cli, field_comments, main as run_main, Share, UserError
from lib.common import cores, cpu_quotas, fast_bf16, ROOT
from model import GLMV, sized


@dataclass
class Demo:
    steps: int = 10             # how many
    lr: float = 0.1             # how fast
    name: str = ""              # who # and why
    resume: bool = False        # go on
    warm: bool = True           # begin slowly
    image: list[str] = field(default_factory=list)  # pictures
    save_every: int = 5         # how often


@pytest.mark.parametrize("words,want", [
    ("", {}),
    ("--steps=20", {"steps": 20}), ("--steps 20", {"steps": 20}),
    ("--steps=-3", {"steps": -3}), ("--steps -3", {"steps": -3}),
    ("--steps=1e3", {"steps": 1000}), ("--steps=1_000", {"steps": 1000}),
    ("--lr=4e-3", {"lr": 0.004}), ("--lr -2.5", {"lr": -2.5}), ("--lr=1", {"lr": 1.0}),
    ("--name=a=b", {"name": "a=b"}), ("--name=", {"name": ""}), ("--name=7", {"name": "7"}),
    ("--resume", {"resume": True}), ("--resume --steps=2", {"resume": True, "steps": 2}),
    ("--resume=false", {"resume": False}), ("--resume=True", {"resume": True}),
    ("--warm=0", {"warm": False}), ("--warm=no", {"warm": False}),
    ("--image=a --image b", {"image": ["a", "b"]}),
    ("--steps=1 --steps=2", {"steps": 2}),
    ("--save-every=3", {"save_every": 3}), ("--save_every=3", {"save_every": 3})])
def test_all_forms_of_an_option(words, want):
    got = cli(Demo, words.split())
    assert got == Demo(**want)
    assert all(type(getattr(got, name)) is type(value) for name, value in want.items())


@pytest.mark.parametrize("words,message", [
    ("--stepz=3", "no option --stepz; did you mean --steps"), ("--xyzzy", "no option --xyzzy"),
    ("--steps=ten", "--steps takes a whole number, not 'ten'"),
    ("--steps=2.5", "--steps takes a whole"), ("--steps=1e-3", "--steps takes a whole"),
    ("--steps=1e999", "--steps takes a whole number"),
    ("--steps=", "--steps takes a whole number"), ("--lr=fast", "--lr takes a number, not 'fast'"),
    ("--lr=nan", "--lr takes a number"), ("--resume=maybe", "--resume takes true or false"),
    ("--steps", "--steps needs a value"), ("--name --resume", "--name needs a value"),
    ("word", "unexpected 'word'"), ("-x", "unexpected '-x'"), ("--", "no option --")])
def test_wrong_options_are_refused(words, message):
    with pytest.raises(UserError) as error:
        cli(Demo, words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bare_word():
    assert cli(Demo, ["--steps=2", "who is it?"], positional="name").name == "who is it?"
    with pytest.raises(UserError, match="unexpected 'two'"):
        cli(Demo, ["one", "two"], positional="name")


def test_a_text_may_be_empty_only_where_that_is_the_default():
    @dataclass
    class Texts:
        out: str = "out/x"
        init: str = ""

    assert cli(Texts, ["--init="]) == Texts()
    for value in ("", " "):
        with pytest.raises(UserError, match="--out is empty; without this option it is 'out/x'"):
            cli(Texts, [f"--out={value}"])


def test_numbers_without_an_upper_limit_end_at_a_billion():
    """2^63 and more overflow in torch and numpy, and 1e300 seconds in the standard library."""
    assert cli(pretrain.Args, ["--steps=1e9"]).steps == 10 ** 9
    for option in ("--steps=1e18", "--warmup=1000000001", "--lr=1e300"):
        with pytest.raises(UserError, match="a billion at most"):
            cli(pretrain.Args, [option])


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UserError, match="not valid UTF-8"):
        cli(Demo, ["--name=" + os.fsdecode(b"\xff")])


def test_lists_are_not_shared():
    cli(Demo, ["--image=a"])
    assert cli(Demo, []).image == []


def test_help_lists_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        cli(Demo, ["--steps=2", "--help"], about="What it is.")
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "What it is." and len(lines) == 1 + len(fields(Demo))
    assert [line.split(None, 1)[1] for line in lines[1:]] == [
        "how many", "how fast", "who # and why", "go on", "begin slowly", "pictures", "how often"]
    assert lines[1].split()[0] == "--steps=10"


@pytest.mark.parametrize("config", [pretrain.Args, rl.Args, sample.Ask, sample.Chat, sample.Eval])
def test_every_field_has_a_comment(config):
    assert field_comments(config).keys() == {f.name for f in fields(config)}


def test_how_a_script_ends(capsys):
    def end_by(error):
        def entry():
            raise error
        with pytest.raises(SystemExit) as end:
            run_main(entry)
        return end.value.code, capsys.readouterr().err
    assert end_by(UserError("too bad")) == (2, "error: too bad\n")
    assert end_by(OSError(28, "No space left")) == (2, "error: [Errno 28] No space left\n")
    assert end_by(KeyboardInterrupt())[0] == 130
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 TiB")):
        assert end_by(error) == (2, "error: the memory does not suffice: take smaller numbers "
                                    "(--help lists the options)\n")
    for error in (ZeroDivisionError(), RuntimeError("shapes differ")):
        with pytest.raises(type(error)):    # our own mistakes keep their traceback
            end_by(error)
    assert run_main(lambda: None) is None


# ---- which values an option takes, in all scripts -----------------------------------------------

SCRIPTS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts)
                 for path in [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")])


def options_of(script: str) -> list:
    """The dataclasses of a script that have a field whose type has limits."""
    everything = vars(importlib.import_module(script)).values()
    own = [x for x in everything if is_dataclass(x) and x.__module__ == script]
    return [config for config in own if limited_fields(config)]


def limited_fields(config) -> dict:
    """{field: its type} of the fields that do not take every value."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {name: kind for name, kind in hints.items()
            if typing.get_origin(kind) in (typing.Annotated, typing.Literal)}


def allowed_and_refused(kind) -> tuple[list, list]:
    """Values at the limits of a type, and values just outside."""
    if typing.get_origin(kind) is typing.Literal:
        allowed = list(typing.get_args(kind))
        return allowed, [word for word in ("", "nonsense") if word not in allowed]
    number, limits = typing.get_args(kind)
    least, most = number(limits.least), limits.most
    allowed = [least, number(10 ** 9) if most == math.inf else number(most)]
    outside = 1 if number is int else 1e-6
    refused = [least - outside, math.inf]
    if most < math.inf:
        refused.append(most + outside)
    return allowed, refused


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_limited_option_refuses_the_values_just_outside(script):
    """With one line that names the option and the values that it takes; also from a command line,
    where a number is text. The defaults and the limits themselves are taken."""
    for config in options_of(script):
        args = config()
        check_options(args)
        for name, kind in limited_fields(config).items():
            allowed, refused = allowed_and_refused(kind)
            for value in allowed:
                check_options(replace(args, **{name: value}))
            for value in refused:
                with pytest.raises(UserError) as error:
                    check_options(replace(args, **{name: value}))
                check_message(str(error.value), name, kind, value)
                with pytest.raises(UserError, match=f"^--{name} takes "):
                    cli(config, [f"--{name}={value}"])


def check_message(text: str, name: str, kind, value):
    assert text.startswith(f"--{name} takes ") and str(value) in text and "\n" not in text
    if typing.get_origin(kind) is typing.Literal:
        assert all(choice in text for choice in typing.get_args(kind))
    else:
        assert str(typing.get_args(kind)[1]) in text


def test_the_training_scripts_have_limited_options():
    assert all(options_of(script) for script in ("pretrain", "rl", "train_vit"))


def test_help_names_the_values_unless_the_comment_does(capsys):
    @dataclass
    class Choices:
        loss: typing.Literal["sum", "mean"] = "sum"         # over a row
        size: typing.Literal["tiny", "small"] = "tiny"      # tiny (2 cores) or small (one GPU)
        share: Share = 0.5                                  # of what

    with pytest.raises(SystemExit):
        cli(Choices, ["--help"])
    lines = [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["over a row (sum or mean)", "tiny (2 cores) or small (one GPU)", "of what"]


# ---- how many cores a process may use -----------------------------------------------------------

def control_groups(tmp_path, lines: str, files: dict[str, str]) -> list[float]:
    """cpu_quotas of a machine whose /proc/self/cgroup and /sys/fs/cgroup hold this."""
    (tmp_path / "cgroup").write_text(lines)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quotas(tmp_path / "cgroup", tmp_path / "mount")


@pytest.mark.parametrize("lines,files,quotas", [
    ("0::/\n", {"cpu.max": "max 100000\n"}, []),                        # version 2, no limit
    ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),                  # in a container
    ("0::/a.slice/b\n", {"a.slice/cpu.max": "400000 100000\n",         # the group around counts
                         "a.slice/b/cpu.max": "max 100000\n"}, [4.0]),
    ("0::/on/the/host\n", {"cpu.max": "200000 100000\n"}, [2.0]),       # a path of the host
    ("3:memory:/\n2:cpu,cpuacct:/docker/x\n",                           # version 1
     {"cpu/docker/x/cpu.cfs_quota_us": "50000\n", "cpu/docker/x/cpu.cfs_period_us": "100000\n",
      "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, [0.5]),
    ("1:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "300000\n",
                           "cpu/cpu.cfs_period_us": "100000\n"}, [3.0]),
    ("4:cpuset:/\n", {}, []), ("", {}, [])])
def test_the_quota_of_a_container(tmp_path, lines, files, quotas):
    assert control_groups(tmp_path, lines, files) == quotas


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_bf16_is_fast_only_where_the_cpu_has_instructions_for_it(monkeypatch, avx512, amx):
    """oneDNN says that it supports bf16 on any CPU with AVX-512, where it converts."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_bf16() == (avx512 or amx)


def test_cores_are_at_least_one_and_at_most_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5, 7}, raising=False)
    places = tmp_path / "cgroup", tmp_path / "mount"
    assert cores(*places) == 4                                  # no such file, as on macOS
    for quota, want in (("max", 4), ("900000", 4), ("250000", 2), ("20000", 1)):
        control_groups(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})
        assert cores(*places) == want
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path / "nowhere", tmp_path) == 1


# ---- the scripts themselves, in this process ----------------------------------------------------

@pytest.fixture
def script(monkeypatch, capsys):
    """script("sample.py", "ask", ...) -> (exit code, stdout, stderr)"""
    def call(file, *words):
        monkeypatch.setattr(sys, "argv", [file, *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def piped(monkeypatch):
    """piped(b"...") makes these bytes the standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights, and pictures."""
    folder = tmp_path_factory.mktemp("ckpt")
    save_model(GLMV(sized("tiny")), folder)
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    return folder


@pytest.mark.parametrize("words,expect", [
    ("pretrain.py", "--row_tokens"), ("rl.py", "--max_staleness"), ("sample.py", "ask"),
    ("sample.py ask", "--top_p"), ("sample.py chat", "--think"), ("sample.py eval", "--count"),
    ("sample.py agent", "--screenshot"),
    ("gym.py", "play"),
    ("gym.py show", "--level"),
    ("serve.py", "--api_key"),
    ("tokenizer.py", "train"), ("lab/demo.py", "--keep"), ("lab/bench.py", "--rounds"),
    ("lab/report.py", "--run")])
def test_help(script, words, expect):
    code, out, err = script(*words.split(), "--help")
    assert code == 0 and expect in out and err == ""


@pytest.mark.parametrize("words,message", [
    ("pretrain.py --stepz=3", "did you mean --steps"), ("pretrain.py 3", "unexpected '3'"),
    ("pretrain.py --size=huge", "tiny, mini, small or base"), ("pretrain.py --seed=-1", "--seed"),
    ("pretrain.py --out=OUT --init=nowhere", "no such folder"),
    ("pretrain.py --out=OUT --mix=pont", "names 'pont'"),
    ("rl.py --out=OUT --mix=pont", "not 'pont'"), ("rl.py --group=1", "--group takes 2"),
    ("sample.py sing", "'sing' is not one of ask, chat, "),
    ("sample.py", "a verb is missing: ask, chat, "), ("gym.py", "a verb is missing: list, actions"),
    ("sample.py ask --image=CKPT/red.png", "nothing asked"),
    ("sample.py ask --json --ckpt=CKPT", "nothing asked"),
    ("sample.py ask - --ckpt=CKPT", "nothing asked"),
    ("sample.py ask - --image=-", "either the question or one picture, not both"),
    ("sample.py ask What? --image=- --image=-", "either the question or one picture"),
    ("sample.py ask What? --image=-", "standard input can't be read as a picture: it is empty"),
    ("sample.py ask What? --form=poem --ckpt=CKPT", "there is no form 'poem': action, "),
    ("sample.py ask What? --think=-1", "--think takes 0"),
    ("sample.py ask What? --json --ckpt=nowhere", "no such folder"),
    ("sample.py chat What?", "unexpected 'What?'"),
    ("sample.py chat --form=poem", "there is no form 'poem'"),
    ("sample.py chat --max_new=0", "--max_new takes 1"),
    ("sample.py chat --ckpt=nowhere", "no such folder"),
    ("sample.py ask What? --temperature=-1", "--temperature takes 0"),
    ("sample.py ask What? --temperature=nan", "--temperature takes"),
    ("sample.py ask What? --top_p=-0.1", "--top_p takes 0 to 1"),
    ("sample.py ask What? --top_p=nan", "--top_p takes"),
    ("sample.py ask What? --max_new=0", "--max_new takes 1"),
    ("sample.py ask What? --seed=18446744073709551616", "--seed takes 0 to 9223372036854775807"),
    ("sample.py ask What? --drafts=99999", "--drafts takes 0 to 16"),
    ("sample.py ask What? --image=nowhere.png", "no picture at nowhere.png"),
    ("sample.py ask What? --image=CKPT/broken.png", "can't be read as a picture"),
    ("sample.py ask What? --image=CKPT/config.json", "can't be read as a picture"),
    ("sample.py ask What? --ckpt=nowhere", "no such folder"),
    ("sample.py ask What? --ckpt=OUT", "no checkpoint at"),
    ("sample.py ask What? --dtype=int8", "--dtype takes"),
    ("sample.py ask What? --device=tpu", "--device takes"),
    ("sample.py eval --ckpt=CKPT --mix=pont", "no category 'pont'"),
    ("sample.py eval --ckpt=CKPT --mix=text", "no category 'text'"),
    ("sample.py eval --ckpt=CKPT --mix=,", "--mix"),
    ("sample.py eval --ckpt=CKPT --count=0", "--count"),
    ("sample.py eval --ckpt=CKPT --levels=9", "--levels"),
    ("sample.py eval --ckpt=CKPT --slots=0", "--slots"),
    ("sample.py eval --ckpt=CKPT --seed=-1", "--seed"),
    ("serve.py --ckpt=nowhere", "no such folder"), ("serve.py --port=70000", "--port takes 0"),
    ("serve.py --ckpt=CKPT --host=192.0.2.1", "can't listen at 192.0.2.1"),
    ("gym.py show pont", "did you mean point"), ("gym.py fly", "fly"),
    ("gym.py show point --wat", "--wat"), ("tokenizer.py fly", "fly")])
def test_bad_input_is_one_line_and_exit_code_2(script, folder, tmp_path, words, message, piped):
    piped(b"")
    words = words.replace("CKPT", str(folder)).replace("OUT", str(tmp_path)).split()
    code, _, err = script(*words)
    assert code == 2 and err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_a_prompt_longer_than_the_model_reads(script, folder):
    code, _, err = script("sample.py", "ask", "why? " * 3000, f"--ckpt={folder}")
    assert code == 2 and "leaves no room" in err and err.count("\n") == 1


def test_asking(script, folder):
    words = ["sample.py", "ask", f"--image={folder}/red.png", "What?", f"--ckpt={folder}",
             "--max_new=5", "--dtype=float32"]
    code, out, err = script(*words)
    assert code == 0 and out.strip() and err.startswith(f"{folder}/red.png is seen at 64x48 pixels")
    assert script(*words)[1] == out
    warm = [*words, "--temperature=1"]
    assert script(*warm, "--seed=1")[1] == script(*warm, "--seed=1")[1] != script(*warm)[1]


def test_asking_from_a_pipe(script, folder, piped):
    """The question, or a picture."""
    words = ["sample.py", "ask", f"--ckpt={folder}", "--max_new=5", "--dtype=float32"]
    _, out, err = script(*words, f"--image={folder}/red.png", "What is it?")
    piped("What is it?\n".encode())
    assert script(*words, f"--image={folder}/red.png", "-") == (0, out, err)
    piped((folder / "red.png").read_bytes())
    assert script(*words, "--image=-", "What is it?")[:2] == (0, out)
    for data, message in ((b"What\xff", "byte 4 is not UTF-8"), (b" \n", "nothing asked")):
        piped(data)
        code, _, err = script(*words, "-")
        assert code == 2 and message in err and err.count("\n") == 1


def test_asking_for_json(script, folder):
    words = ["sample.py", "ask", f"--ckpt={folder}", "--dtype=float32", "What?", "--max_new=6"]
    text = script(*words, "--prefix=click(")[1]
    code, out, _ = script(*words, "--prefix=click(", "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and found["reply"] == text.strip()
    assert found["reply"].startswith("click(") and found["raw"].startswith("click(")
    assert (found["thought"], found["finish"], found["unlike_training"]) == ("", "length", None)
    assert found["reply_tokens"] == 6 and found["tokens_a_step"] == 1.0
    more = json.loads(script(*words, "--json", "--think=4", "--drafts=2")[1])
    assert more["thought"] and 7 <= more["reply_tokens"] <= 10
    assert more["prompt_tokens"] == found["prompt_tokens"] == 11
    known = json.loads(script("sample.py", "ask", f"--ckpt={ROOT}/ckpt/demo", "Is there a dog?",
                              "--json", f"--image={ROOT}/docs/example.png")[1])
    assert len(known["unlike_training"]) == 1 and "worded" in known["unlike_training"][0]


def test_asking_for_a_form(script):
    words = ["sample.py", "ask", f"--ckpt={ROOT}/ckpt/demo", f"--image={ROOT}/docs/example.png"]
    assert re.fullmatch(r"click\(\d+, \d+\)\n", script(*words, "What is it?", "--form=click")[1])
    assert script(*words, "How many?", "--form=integer")[1].strip().isdigit()


def test_eval(script, folder, tmp_path):
    code, out, _ = script("sample.py", "eval", f"--ckpt={folder}", "--mix=counting,gui_form",
                          "--count=2", "--dtype=float32", f"--out={tmp_path}/new/eval.json")
    assert code == 0 and (tmp_path / "new/eval.json").is_file()
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["counting", "gui_form"]


# ---- the scripts as commands, in processes of their own ------------------------------------------

def typed(*words, cwd=None, **env):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, timeout=60,
                          cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.skipif(os.name != "posix", reason="closes streams by the shell")
@pytest.mark.parametrize("words,redirect,code,said", [
    ("list", ">&-", 0, ""), ("list", "2>&-", 0, ""), ("list", "<&- >&- 2>&-", 0, ""),
    ("show pont", "2>&-", 2, ""), ("play point --out=OUT/x.png", "<&- >&-", 0, ""),
    ("list", ">/dev/full", 2, "No space left"), ("--help", ">/dev/full", 2, "No space left")])
def test_closed_and_full_streams(tmp_path, words, redirect, code, said):
    """gym.py, which starts quickly. A closed stream is read and written as an empty file."""
    line = f"'{sys.executable}' '{ROOT}/gym.py' {words.replace('OUT', str(tmp_path))} {redirect}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert said in done.stderr and done.stderr.count("\n") == bool(said)


def test_from_another_folder_in_a_terminal_without_utf8(folder, tmp_path):
    """An untrained model samples any byte."""
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    done = typed(ROOT / "sample.py", "ask", "What?", f"--ckpt={folder}", "--max_new=40",
                 "--temperature=2", cwd=tmp_path, **plain)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"Warning" not in done.stderr
    assert done.stdout.isascii() and done.stdout.strip()


@pytest.mark.parametrize("words", ["sample.py agent", "-m lab list", "gym.py list",
                                   "-m lab.grade 2"])
def test_a_python_without_the_packages(words):
    """-S hides the installed packages."""
    done = subprocess.run([sys.executable, "-S", *words.split()], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1
    assert "use .venv/bin/python" in done.stderr
