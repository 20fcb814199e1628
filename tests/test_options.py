"""Odd values for every option of every script: one clear line, or a run that would begin.

Each script is called as its command line calls it, with the functions that take long replaced by
one that raises Begun. So all of its checks run, and nothing is trained or drawn.
"""
import dataclasses
import functools
import importlib
import typing

import pytest

from lib.cli import cli, UserError
from lib.common import ROOT

ODD = ("-1", "0", "1e400", "-1e400", "nan", "inf", "1e18", "1e300", "", " ", "word", "point:inf",
       "point:nan", "point:-1", "1,2,x", "²", ",")
# script: (dataclass of its options, function of them, its parts that take long, words without which
# nothing runs). A script with verbs has an entry for each verb.
ENTRIES = {
    "pretrain": [("Args", "run", ("build",), ())],
    "rl": [("Args", "run", ("make_engine", "async_rl.run"), ())],
    "train_vit": [("Args", "run", ("train",), ())],
    "sample": [("Ask", "ask", ("seen", "list_questions"), ("--question=?",)),
               ("Chat", "chat", ("seen",), ()),
               ("Agent", "agent", ("Watched", "act_once"), ()),
               ("Eval", "evaluation", ("evaluate", "evaluate_harnesses"), ())],
    "serve": [("Args", "run", ("EngineThread",), ("--port=0",))],
    "gym": [("List", "list_categories", (), ()),
            ("Actions", "list_actions", (), ()),
            ("Sheet", "save_contact_sheet", ("contact_sheet",), ()),
            ("Show", "show", ("demonstrate",), ("--name=point",)),
            ("Play", "play", ("drive",), ("--name=point", "--script=x")),
            ("Check", "check", ("in_fresh_process", "check_category", "ThreadPoolExecutor"), ()),
            ("Bench", "bench", ("make",), ())],
    "lab.demo": [("Args", "demo", ("train_tower", "pretrain.run"), ())],
    "lab.worlds": [("Args", "worlds", ("timed",), ())],
    "lab.joint": [("Args", "joint", ("timed", "examine"), ())],
    "lab.dino": [("Args", "run", ("Student",), ())],
    "lab.bench": [("Args", "run", ("setup",), ("--what=train",))],
    "lab.bench_busy": [("Args", "worker", ("training_step",), ())],
    "lab.mmtp_options": [("Args", "run", ("count_bytes",), ())],
    "lab.out_of_gym": [("Args", "out_of_gym", ("find_browser",), ())],
    "lab.drafts": [("Args", "run", ("load",), ())],
    "lab.grade": [("Args", "run", ("examine",), ())],
    "lab.roofline": [("Args", "run", ("Packer",), ())],
    "lab.kernels": [("Args", "run", ("check", "in_a_process"), ())],
    "lab.vit_claims": [("Args", "run", ("one_seed", "one_step"), ())],
    "lab.verify": [("Args", "run", ("peers",), ("--ckpt=x",))],
    "lab.vit_pays": [("Args", "pays", ("make_tower",), ())],
    "lab.__main__": [("Args", "run", ("sheet.run",), ("qk_norm",))],
    "lab.load": [("Args", "run", ("server_process",), ())],
    "lab.reference": [("Args", "run", (), ())],
    "lab.records": [("List", "list_records", (), ()),
                    ("Verify", "verify", ("measure",),
                     (f"--entries={ROOT / 'records/falling_rate.json'}",)),
                    ("Trial", "trial", ("Meter",), ())],
    "lab.report": [("Args", "report", ("write",), ())]}
CASES = [(script, *entry) for script, entries in ENTRIES.items() for entry in entries]
ELSEWHERE = {"lab.bench_rl": "takes the options of rl.py", "lab.campaign": "kills processes",
             "lab.bench_serve": "takes the options of serve.py"}


class Begun(Exception):
    """The script has checked its options and would begin."""


def begin(*args, **options):
    raise Begun


def test_every_script_with_options_is_here():
    scripts = {".".join(path.relative_to(ROOT).with_suffix("").parts)
               for path in [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")]
               if "cli(" in (text := path.read_text(encoding="utf-8")) or "run_verb(" in text}
    assert scripts == {*ENTRIES, *ELSEWHERE} - ({"lab.campaign"} - scripts)
    for script in ("gym", "sample"):
        verbs = importlib.import_module(script).VERBS.values()
        assert [config.__name__ for config, *_ in verbs] == [case[0] for case in ENTRIES[script]]


@pytest.mark.parametrize("script,config,function,parts,words", CASES,
                         ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_odd_values_are_one_line_or_a_run(script, config, function, parts, words, tmp_path,
                                          monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    if hasattr(module, "load_model"):       # many runs would read the same checkpoint
        monkeypatch.setattr(module, "load_model", functools.cache(module.load_model))
    for part in parts:
        monkeypatch.setattr(f"{script}.{part}", begin)
    options, wrong = getattr(module, config), []
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        for value in (ODD if kinds[field.name] is not bool else ("", "word", "2", "-1")):
            try:
                getattr(module, function)(cli(options, [*words, f"--{field.name}={value}"]))
            except Begun:
                pass
            except UserError as error:
                if "\n" in str(error) or not str(error).strip():
                    wrong.append(f"--{field.name}={value}: {str(error)!r}")
            except OSError:         # no such file: one line as well
                pass
            except Exception as error:
                wrong.append(f"--{field.name}={value}: {type(error).__name__}: {error}")
            else:
                if parts and value not in ("", "word", " "):
                    wrong.append(f"--{field.name}={value}: it ended without doing anything")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script,config", [case[:2] for case in CASES])
def test_every_number_has_limits(script, config):
    """A bare int or float takes values that no run can have."""
    options = getattr(importlib.import_module(script), config)
    hints = typing.get_type_hints(options, include_extras=True)
    assert [name for name, kind in hints.items() if kind in (int, float)] == []
