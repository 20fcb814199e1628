"""Lab sheets: the rule by hand, resuming, what may be kept, and the answers beside the sheets."""
import ast
import re
import subprocess
import sys
import types
from datetime import datetime

import pytest

from lab import sheet
from lab.__main__ import Args, run
from lib.cli import UserError
from lib.common import read_json, ROOT, write_json

GAIN = sheet.Gain("points", lambda runs: runs["new"]["x"] - runs["old"]["x"], 5, "[O] for a test")
LOSS = sheet.NoLoss("points", GAIN.of, 5, "[O] for a test")


def found(low, mean, high, detectable):
    return {"mean": mean, "low": low, "high": high, "detectable": detectable}


def test_an_effect_of_three_seeds():
    """By hand: a deviation of 1 over three seeds is an error of 1 / sqrt(3) = 0.577."""
    got = sheet.effect([1.0, 2.0, 3.0])
    assert got == pytest.approx(found(2 - 2.484, 2, 2 + 2.484, 3.097), abs=1e-3)
    assert sheet.effect([4.0]) == {"mean": 4.0}
    assert sheet.effect([2.0, 2.0, 2.0]) == found(2, 2, 2, 0)


def test_an_interval_of_many_seeds_is_not_too_narrow():
    """Student's t of 11 values is 2.228, and that of a normal distribution 1.96."""
    got = sheet.effect([float(i) for i in range(11)])       # their error is 1
    assert 2.228 <= got["high"] - got["mean"] < 2.3


@pytest.mark.parametrize("effect,verdict", [
    (found(1, 4, 7, 4), "reproduced"),              # above 0, and 5 is not too much for it
    (found(6, 8, 10, 3), "reproduced"),
    (found(1, 2, 3, 1.5), "not at this scale"),     # there, but smaller than claimed
    (found(-2, 0, 2, 3), "not at this scale"),      # 5 would have been seen
    (found(-6, 1, 8, 9), "underpowered"),           # 5 might have been missed
    (found(-9, -6, -3, 4), "contradicted"),
    ({"mean": 50.0}, "underpowered")])              # one seed
def test_the_rule_of_a_gain(effect, verdict):
    assert GAIN.verdict(effect) == verdict


@pytest.mark.parametrize("effect,verdict", [
    (found(-4, -1, 2, 4), "reproduced"),            # a loss of 5 is excluded
    (found(1, 2, 3, 1), "reproduced"),
    (found(-8, -3, 2, 6), "underpowered"),
    (found(-12, -9, -6, 4), "contradicted"),
    ({"mean": 0.0}, "underpowered")])
def test_the_rule_of_no_loss(effect, verdict):
    assert LOSS.verdict(effect) == verdict


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A sheet `toy` in a folder of its own, which notes what is measured."""
    calls = []

    def measure(arm, seed, folder):
        calls.append((arm, seed))
        if calls == [("old", 0), ("new", 0), ("old", 1)] and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            raise KeyboardInterrupt
        return {"x": seed + (10 if arm == "new" else 0), "curve of x": [(1, 0.0), (2, 1.0)],
                "x over CPU minutes": [(0.5, 0.0), (0.7, 1.0)]}

    module = types.ModuleType("lab.sheets.toy", "New is better than old.\n\nThe paper says so.")
    module.SHEET = sheet.Sheet(arms=("old", "new"), measure=measure, tests=(GAIN,), minutes=1,
                               equal="everything")
    monkeypatch.setitem(sys.modules, "lab.sheets.toy", module)
    monkeypatch.setattr(sheet, "names", lambda: ["toy"])
    monkeypatch.setattr(sheet, "FOLDER", tmp_path / "sheets")
    monkeypatch.setattr(sheet, "setup", lambda device: types.SimpleNamespace(description="here"))
    module.calls = calls
    return module


def test_an_interrupted_sheet_goes_on(toy, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        sheet.run("toy", out=tmp_path)
    got = sheet.run("toy", out=tmp_path)
    assert toy.calls == [("old", 0), ("new", 0), ("old", 1), ("old", 1), ("new", 1), ("old", 2),
                         ("new", 2)]                # finished ones are not repeated
    assert got["verdict"] == "reproduced" and got["tests"]["points"]["seeds"] == [10, 10, 10]
    assert "left" in capsys.readouterr().out
    page = (tmp_path / "toy" / "report.html").read_text(encoding="utf-8")
    assert "The paper says so." in page and "<svg" in page and "reproduced" in page
    assert [page.count(f">{unit}</text>") for unit in ("step", "CPU minute")] == [1, 1]
    sheet.show("toy", got)
    assert "verdict: reproduced" in capsys.readouterr().out


def test_runs_that_are_there_already_say_how_long_the_others_take(toy, tmp_path, capsys):
    """A minute is for three seeds of two arms: ten seconds a run."""
    toy.calls.append(None)
    sheet.run("toy", seeds=1, out=tmp_path)
    capsys.readouterr()
    sheet.run("toy", seeds=1, out=tmp_path)
    assert "1 of 2 runs, seed 0, old: x 0; about 10s left" in capsys.readouterr().out


def test_a_curve_is_the_mean_over_the_seeds():
    """Of x as well, which may be minutes."""
    runs = {0: {"new": {"loss": [(1, 4.0), (2, 3.0)], "last": 3.0}},
            1: {"new": {"loss": [(3, 2.0), (4, 1.0), (5, 0.0)], "last": 0.0}}}
    assert sheet.curves(runs) == {"loss": {"new": [(2, 3.0), (3, 2.0)]}}


def test_runs_of_other_code_are_not_mixed(toy, tmp_path):
    toy.calls.append(None)                          # so that nothing is interrupted
    sheet.run("toy", seeds=1, out=tmp_path)
    code = tmp_path / "toy" / "code.json"
    assert "lab/sheet.py" in read_json(code)
    write_json(code, {"lab/sheet.py": read_json(code)["lab/sheet.py"]})
    sheet.run("toy", seeds=1, out=tmp_path)         # more files are imported than then
    write_json(code, read_json(code) | {"mmtp.py": "something else"})
    with pytest.raises(UserError, match="mmtp.py has changed"):
        sheet.run("toy", out=tmp_path)


def test_only_an_answer_whose_rule_is_older_is_kept(toy, tmp_path):
    (tmp_path / "sheets").mkdir()
    toy.calls.append(None)
    got = sheet.run("toy", out=tmp_path)
    late = {"commit": "abc", "date": "2999-01-01T00:00:00+00:00"}
    for rule, words in ((None, "not committed"), (late, "after the first")):
        with pytest.raises(UserError, match=words):
            sheet.keep("toy", got | {"rule": rule})
    good = got | {"rule": {"commit": "abc", "date": "2020-01-01T00:00:00+02:00"}}
    few = {"points": good["tests"]["points"] | {"seeds": [1, 2]}}
    with pytest.raises(UserError, match="three seeds"):
        sheet.keep("toy", good | {"tests": few})
    sheet.keep("toy", good)
    assert sheet.kept("toy") == good


def test_the_command_line(toy, tmp_path, capsys):
    toy.calls.append(None)
    run(Args(what=["toy"], seed=3, out=str(tmp_path)))
    assert toy.calls[1:] == [(arm, seed) for seed in (3, 4, 5) for arm in ("old", "new")]
    run(Args(what=["show", "toy"]))
    assert "not yet run" in capsys.readouterr().out
    with pytest.raises(UserError, match="no sheet 'tay'"):
        run(Args(what=["toy", "tay"]))


def test_what_can_not_be_kept_is_refused_before_it_is_run(toy, tmp_path, monkeypatch):
    for rule, seeds, words in ((None, 3, "not committed"), ({"commit": "abc"}, 2, "three seeds")):
        monkeypatch.setattr(sheet, "rule_of", lambda name: rule)
        with pytest.raises(UserError, match=words):
            run(Args(what=["toy"], seeds=seeds, keep=True, out=str(tmp_path)))
    assert toy.calls == []


# ---- the sheets and their answers ----------------------------------------------------------------

def test_the_list_names_every_sheet(capsys):
    run(Args(what=["list"]))
    printed = capsys.readouterr().out
    assert len(sheet.names()) >= 20
    for name in sheet.names():
        assert name in printed and sheet.claim(name) in printed
    run(Args(what=["list", "muon"]))
    printed = capsys.readouterr().out
    assert sheet.claim("muon") in printed and sheet.claim("qk_norm") not in printed
    with pytest.raises(UserError, match="no sheet 'tay'"):
        run(Args(what=["list", "tay"]))


@pytest.mark.parametrize("name", sheet.names())
def test_a_sheet_says_what_it_needs_to(name):
    module = sheet.load(name)
    plan, text = module.SHEET, module.__doc__
    assert plan.seeds >= 3 and len(plan.arms) >= 1 and plan.kind in ("bench", "night")
    assert plan.kind == "night" or plan.minutes <= 40       # of one core: 20 minutes of two
    assert sheet.claim(name).endswith(".") and re.search(r"\[[CRO][\]:,]", text)
    for test in plan.tests:
        assert test.claimed > 0 and re.match(r"\[[CRO][\]:,]", test.source), test
    assert len((sheet.FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 110


def rule_in(source: str) -> str:
    """The tests in a sheet's source, `SHEET = Sheet(..., tests=...)`, without the words that give
    the source of a number."""
    sheets = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)
              and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SHEET"]
    tests = next(word.value for word in sheets[0].keywords if word.arg == "tests")
    for node in ast.walk(tests):
        if isinstance(node, ast.Call):
            node.keywords = [word for word in node.keywords if word.arg != "source"]
    return ast.dump(tests)


KEPT = [name for name in sheet.names() if sheet.kept(name)]


@pytest.mark.parametrize("name", KEPT)
def test_an_answer_follows_from_its_rule(name):
    """The tests are those of the sheet, their verdicts follow from the seeds, and the rule was
    committed before the first run, where git still knows that commit."""
    answer, plan = sheet.kept(name), sheet.load(name).SHEET
    assert [test.name for test in plan.tests] == list(answer["tests"])
    for test in plan.tests:
        got = answer["tests"][test.name]
        assert got["claimed"] == test.claimed and len(got["seeds"]) >= 3
        effect = sheet.effect(got["seeds"])
        assert {key: got[key] for key in effect} == pytest.approx(effect)
        assert got["verdict"] == test.verdict(effect)
    assert answer["verdict"] == max((got["verdict"] for got in answer["tests"].values()),
                                    key=sheet.VERDICTS.index)
    rule = answer["rule"]
    assert datetime.fromisoformat(rule["date"]) <= datetime.fromisoformat(answer["began"])
    path = f"lab/sheets/{name}.py"
    known = subprocess.run(["git", "show", f"{rule['commit']}:{path}"], cwd=ROOT, text=True,
                           capture_output=True)
    if known.returncode == 0:       # a shallow clone does not have it
        now = (ROOT / path).read_text(encoding="utf-8")
        assert rule_in(known.stdout) == rule_in(now)


def test_fourteen_claims_are_answered():
    answers = [sheet.kept(name)["verdict"] for name in KEPT]
    assert sum(verdict != "underpowered" for verdict in answers) >= 14
