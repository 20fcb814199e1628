"""lab.reference: a run beside reference curves, and the references in lab/references."""
import dataclasses
import json
import math
import re

import numpy as np
import pytest

import pretrain
import rl
import train_vit
from lab import reference, report
from lib.cli import check_options, UserError

OPTIONS = dataclasses.asdict(pretrain.Args(steps=300, rows=2, row_tokens=2048))
SIZE = 20_000           # bytes that a reference may have


def losses(seed: int, steps: int = 300, shift=lambda step: 0.0) -> list[dict]:
    """The lines of a log: a loss that falls from 6 to about 2, with noise of its own."""
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        loss = 2 + 4 * math.exp(-step / 40) + rng.normal(0, 0.05) + shift(step)
        lines.append({"step": step, "loss": loss, "lr": 0.004})
        if step % 50 == 0:
            lines[-1]["held_out"] = loss + 0.1
    return lines


def leave(folder, lines: list[dict], **changed):
    """A run folder with these lines as its log and OPTIONS, some of them changed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(
        {**OPTIONS, "out": str(folder), "hardware": "cpu", "parameters": {}, **changed}))
    return folder


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A reference of three runs, `falls`, in a folder that takes the place of lab/references."""
    runs = [str(leave(tmp_path / f"seed{seed}", losses(seed), seed=seed)) for seed in range(3)]
    reference.run(reference.Args(run=runs, name="falls", out=str(tmp_path / "known"), commit="abc"))
    known = reference.references(tmp_path / "known")
    monkeypatch.setattr(reference, "references", lambda: known)
    return known


def compared(folder):
    one, = reference.compare_all(folder)
    return one


def test_a_reference_holds_what_the_runs_measured(known, tmp_path):
    falls, = known
    assert falls["seeds"] == [0, 1, 2] and falls["hardware"] == "cpu" and falls["commit"] == "abc"
    assert falls["config"]["steps"] == 300 and "out" not in falls["config"]
    assert falls["command"] == "python pretrain.py --steps=300 --rows=2 --row_tokens=2048"
    assert "3 runs" in falls["band"] and len(falls["final"]["loss"]) == 3
    assert falls["curves"].keys() == {"loss", "held_out"}
    loss, held_out = falls["curves"]["loss"], falls["curves"]["held_out"]
    assert loss["size"] == 5 and len(loss["points"]) == 60
    assert held_out["size"] == 1 and [row[0] for row in held_out["points"]] == list(
        range(50, 301, 50))
    by_hand = np.mean([[line["loss"] for line in losses(seed)[:5]] for seed in range(3)])
    assert loss["points"][0][:2] == [3.0, pytest.approx(by_hand, rel=1e-3)]
    assert all(low < mean < high for _, mean, low, high in loss["points"])
    text = (tmp_path / "known/falls.json").read_text()
    assert len(text) < SIZE and json.loads(text) == falls
    assert re.search(r"^ *\[3\.0, [\d.]+, [\d.]+, [\d.]+\],$", text, re.M)


def test_a_run_with_another_seed_and_another_folder_is_right(known, tmp_path):
    one = compared(leave(tmp_path / "far/away", losses(7), seed=7, workers=0, device="cpu"))
    assert one.reference["name"] == "falls" and not one.differs
    assert one.verdict == "your run looks right"
    assert re.match(r"loss: within the reference's band at (59|60) of 60 points; last [\d.]+, "
                    r"reference [\d.]+ \([\d.]+ to [\d.]+\)$", one.curves[0].text)


def test_a_wrong_learning_rate_is_seen_from_the_step_on_at_which_it_acts(known, tmp_path):
    """From step 120 on the loss falls no longer; the stretches have five steps."""
    def shift(step):
        return 4 * (math.exp(-min(step, 120) / 40) - math.exp(-step / 40)) + 0.4 * (step > 120)

    one = compared(leave(tmp_path / "run", losses(7, shift=shift)))
    found = re.fullmatch(r"your run differs from step (\d+) on: loss ([\d.]+), reference ([\d.]+) "
                         r"\(([\d.]+) to ([\d.]+)\)", one.verdict)
    step, loss, mean, low, high = map(float, found.groups())
    assert 119 < step < 130 and loss > high > mean > low


def test_a_run_that_comes_back_into_the_band_says_until_when_it_was_outside(known, tmp_path):
    one = compared(leave(tmp_path / "run", losses(7, shift=lambda s: 1.0 * (100 < s <= 150))))
    assert re.match(r"your run differs from step 10\d to step 1[45]\d: loss", one.verdict)


def test_a_better_loss_than_the_reference_is_a_difference_as_well(known, tmp_path):
    assert compared(leave(tmp_path / "run", losses(7, shift=lambda s: -1.0))).differs


def test_two_odd_points_in_a_row_make_no_difference(known, tmp_path):
    one = compared(leave(tmp_path / "run", losses(7, shift=lambda s: 9.0 * (101 <= s <= 110))))
    assert not one.differs and "at 58 of 60" in one.curves[0].text.replace("57", "58")


def test_an_unfinished_run_is_compared_as_far_as_it_goes(known, tmp_path):
    one = compared(leave(tmp_path / "run", losses(7)[:123]))
    assert one.verdict == "your run looks right as far as it goes, step 123 of 300"
    assert "of 24 points" in one.curves[0].text         # the stretch of step 121 is not full
    assert "of 2 points" in one.curves[1].text
    wrong = leave(tmp_path / "wrong", losses(7, shift=lambda s: 1.0 * (s > 60))[:123])
    assert "your run differs from step 6" in compared(wrong).verdict
    short = compared(leave(tmp_path / "short", losses(7)[:3]))
    assert short.verdict == "your run is too short to be compared: step 3 of 300"
    assert "held_out: not measured in this run so far" in short.curves[1].text


def test_a_log_that_was_measured_at_other_steps_is_compared(known, tmp_path):
    """--eval_every does not change what is learnt. The loss is bent: a line between two points of
    the reference would not do."""
    lines = [line | {"held_out": line["loss"] + 0.1} for line in losses(7)]
    one = compared(leave(tmp_path / "run", lines, eval_every=1))
    assert not one.differs and "of 6 points" in one.curves[1].text


def test_without_a_fitting_reference_the_nearest_and_its_options_are_named(known, tmp_path):
    one = compared(leave(tmp_path / "run", losses(7), lr=0.001, mix="point"))
    assert one.verdict == ("no reference fits; the nearest, falls, has mix nothing (yours: point), "
                           "lr 0.004 (yours: 0.001)")
    many = compared(leave(tmp_path / "many", losses(7), lr=1.0, mix="point", levels=1, think=0.5,
                          decay=0.9))
    assert many.verdict.endswith("lr 0.004 (yours: 1.0) and 1 option more")
    towers = leave(tmp_path / "tower", losses(7))
    (towers / "config.json").write_text(json.dumps(dataclasses.asdict(train_vit.Args())))
    assert compared(towers).verdict == "there is no reference of train_vit.py"
    (towers / "config.json").write_text("{}")
    assert re.match("no reference fits: .*config.json is missing or does not hold", compared(
        towers).verdict)


def test_a_folder_of_runs_is_compared_log_by_log(known, tmp_path):
    leave(tmp_path / "all/good", losses(7))
    leave(tmp_path / "all/deep/down/bad", losses(8, shift=lambda s: 1.0))
    leave(tmp_path / "all/unknown", losses(9), lr=0.5)
    found = reference.compare_all(tmp_path / "all")
    text = reference.in_words(tmp_path / "all", found)
    assert text.splitlines()[-1] == ("in all: 2 of 3 logs have a reference; your run differs in "
                                     "bad")
    assert "good: beside falls, a mean of 3 runs of `python pretrain.py --steps=300" in text
    assert "unknown: no reference fits" in text and "deep/down/bad: beside falls" in text


def test_the_report_prints_the_verdict_and_draws_the_reference(known, tmp_path, capsys):
    run = leave(tmp_path / "run", losses(7))
    report.report(report.Args(run=[str(run)], reference=True))
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["your run looks right", str(run / "report.html")]
    page = (run / "report.html").read_text()
    assert "Is this run right?" in page and "training, reference <b>" in page
    assert page.count("stroke-dasharray") == 2 and page.count("<polygon") == 2  # loss, held_out
    report.report(report.Args(run=[str(run)]))
    assert "reference" not in (run / "report.html").read_text()


def test_of_one_run_the_band_is_its_own_noise(tmp_path):
    found = reference.reference_of([leave(tmp_path / "run", losses(0))], "one")
    assert found["band"].startswith("one run only")
    width = np.array([high - low for _, _, low, high in found["curves"]["loss"]["points"]])
    # Four times 0.05, the noise of `losses`, and the range of five means of five of them.
    assert 0.2 < width[40:].mean() < 0.32
    assert width[2] > 4 * (math.exp(-3 / 40) - math.exp(-23 / 40))      # where the loss is steep
    assert len(found["curves"]["held_out"]["points"]) == 6


def test_a_reference_of_an_unfinished_run_says_how_far_it_goes(tmp_path, monkeypatch):
    half = leave(tmp_path / "half", losses(0)[:200])
    known = reference.reference_of([half], "half", unfinished=True)
    assert known["reaches"] == 200 and known["band"].endswith("it knows 200 of 300 steps")
    monkeypatch.setattr(reference, "references", lambda: [known])
    whole = compared(leave(tmp_path / "whole", losses(0)))
    assert whole.verdict == "your run looks right as far as the reference goes, step 200 of 300"
    assert "of 50 points" in whole.curves[0].text


def test_what_one_run_measured_once_has_no_band_and_no_verdict(tmp_path, monkeypatch):
    lines = losses(0)[:-1] + [losses(0)[-1] | {"linear": 0.75}]
    known = reference.reference_of([leave(tmp_path / "one", lines)], "one")
    assert known["final"]["linear"] == [0.75] and "linear" not in known["curves"]
    monkeypatch.setattr(reference, "references", lambda: [known])
    lines[-1]["linear"] = 0.5
    one = compared(leave(tmp_path / "other", lines))
    assert one.curves[-1].text == "linear: 0.5 at the end, reference 0.75; no band is known"
    assert one.verdict == "your run looks right"


@pytest.mark.parametrize("change,message", [
    ({"lr": 0.5}, "run differs from .*seed0 in lr: a reference is of runs"),
    ({"steps": 400}, "run differs from .*seed0 in steps"),
    ({"missing": True}, "run/config.json is missing")])
def test_runs_that_differ_make_no_reference(tmp_path, change, message):
    first, run = leave(tmp_path / "seed0", losses(0)), leave(tmp_path / "run", losses(1), **change)
    if "missing" in change:
        (run / "config.json").unlink()
    with pytest.raises(UserError, match=message):
        reference.run(reference.Args(run=[str(first), str(run)], name="x", out=str(tmp_path)))


def test_two_runs_of_one_seed_make_no_reference(tmp_path):
    runs = [str(leave(tmp_path / name, losses(0), seed=3)) for name in ("one", "copy")]
    with pytest.raises(UserError, match="have the same seed, 3"):
        reference.run(reference.Args(run=runs, name="x", out=str(tmp_path)))


def test_what_is_no_finished_run_is_one_line(known, tmp_path):
    run = str(leave(tmp_path / "run", losses(0)[:200]))
    for args, message in (
            (reference.Args(run=[run], name="x"), "has not ended: its log does not reach step 300"),
            (reference.Args(run=[run], name="../x"), "--name takes small letters"),
            (reference.Args(name="x"), "which run?")):
        with pytest.raises(UserError, match=message):
            reference.run(args)
    empty = leave(tmp_path / "no_lines", [])
    with pytest.raises(UserError, match="no_lines holds no log.jsonl of a run"):
        reference.reference_of([empty], "x")
    with pytest.raises(UserError, match="there is no run folder"):
        reference.compare_all(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to compare in"):
        reference.compare_all(tmp_path / "empty")
    with pytest.raises(UserError, match="--reference takes one run"):
        report.report(report.Args(run=[run, run], reference=True))


def test_folders_are_compared_by_their_last_two_names(tmp_path):
    found = [reference.options_of(leave(tmp_path / name, [], vit=vit))["vit"]
             for name, vit in (("a", "/data/out/demo/vit/align"), ("b", "vit/align"), ("c", ""))]
    assert found == ["vit/align", "vit/align", ""]


def test_each_stage_of_the_tower_is_a_run_of_its_own(tmp_path):
    found = []
    for name in ("distill", "align"):
        leave(tmp_path / name, [])
        (tmp_path / name / "config.json").write_text(json.dumps(
            dataclasses.asdict(train_vit.Args())))
        found.append(reference.options_of(tmp_path / name))
    assert [options["log"] for options in found] == ["distill", "align"]
    assert reference.differences(*found) == ["log"]


# ---- the references that are shipped ------------------------------------------------------------

SHIPPED = sorted(reference.FOLDER.glob("*.json"))


def test_references_are_shipped_and_no_two_have_the_same_options():
    found = reference.references()
    assert {"first-look", "demo-pretrain", "demo-align", "rl-two-tasks"} <= {
        one["name"] for one in found}
    configs = [json.dumps(one["config"], sort_keys=True) for one in found]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_reference_is_small_and_fits_its_script(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["name"] == path.stem and path.stat().st_size <= SIZE
    assert found["command"] and found["hardware"] and found["commit"] and found["band"]
    script = {"pretrain.py": pretrain.Args, "train_vit.py": train_vit.Args, "rl.py": rl.Args}[
        found["config"]["script"]]
    options = {name: value for name, value in found["config"].items()
               if name not in ("script", "log")}
    assert options.keys() <= {field.name for field in dataclasses.fields(script)}
    check_options(script(**options))
    assert found["curves"] and found["curves"].keys() <= set(reference.CURVES)
    for curve in found["curves"].values():
        steps = [step for step, *_ in curve["points"]]
        assert 1 <= len(steps) <= reference.POINTS and steps == sorted(set(steps))
        assert 0 < steps[0] and steps[-1] <= found["reaches"] <= options["steps"]
        assert all(low <= mean <= high for _, mean, low, high in curve["points"])
