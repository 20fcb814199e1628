"""lab/records.py: the contest's rule, its clock, its entries, and the table in RECORDS.md."""
import json
import math
import subprocess
from dataclasses import replace
from unittest import mock

import pytest

import pretrain
from lab import records
from lib.cli import UserError
from lib.common import read_json, ROOT

TRACK = records.Track(60.0, 10.0, 10.0, records.TRACKS["short"].options)
GOOD = {"author": "A", "date": "2026-11-30", "what": "A higher rate.", "track": "short",
        "options": {"lr": 0.006}}


# ---- the rule -----------------------------------------------------------------------------------

def end(minutes, reached=True):
    return {"reached": reached, "step": 10, "minutes": minutes, "percent": 60.0,
            "seconds_a_step": 0.2}


def result(logs, reached=(True, True, True)):
    """A result whose ratios have these logarithms."""
    runs = {str(seed): {"baseline": end(4.0), "x": end(4 * math.exp(log), r)}
            for seed, (log, r) in enumerate(zip(logs, reached))}
    return {"entry": {"name": "x", **GOOD, "patch": ""}, "date": "2026-11-30",
            **records.compare(runs, "x")}


def test_the_interval_by_hand():
    """Logarithms ln 0.5 - 0.1, ln 0.5, ln 0.5 + 0.1: their standard deviation is 0.1, its error
    0.1 / sqrt(3) = 0.05774, times 4.303 (Student's t, two degrees of freedom) 0.24844."""
    ratio = result([math.log(0.5) + x for x in (-0.1, 0.0, 0.1)])["ratio"]
    assert ratio == {"mean": pytest.approx(0.5),
                     "low": pytest.approx(0.5 * math.exp(-0.24844), 1e-4),
                     "high": pytest.approx(0.5 * math.exp(0.24844), 1e-4)}


@pytest.mark.parametrize("logs,reached,beats", [
    ((-0.35, -0.25, -0.15), (1, 1, 1), True),       # -0.25 + 0.248 < 0
    ((-0.34, -0.24, -0.14), (1, 1, 1), False),      # -0.24 + 0.248 > 0
    ((-0.1, -0.1, -0.1), (1, 1, 1), True),
    ((-0.9, -0.9, -0.9), (1, 0, 1), False),         # one seed has not reached the goal
    ((0.3, 0.3, 0.3), (1, 1, 1), False),
    ((-0.9,), (1,), False)])                        # of one seed there is no interval
def test_what_beats_the_baseline(logs, reached, beats):
    assert records.beats(result(logs, map(bool, reached))) == beats


def test_a_baseline_that_has_not_reached_the_goal_is_no_objection():
    """Its time would have been longer, and so the ratio smaller."""
    found = result([-0.5, -0.5, -0.5])
    found["seeds"]["1"]["baseline"]["reached"] = False
    assert records.beats(found) and records.missed(found) == []


# ---- the clock ----------------------------------------------------------------------------------

class Pretended:
    """A training whose step takes 2 seconds of CPU time and an evaluation 5; after `step` steps
    `percent(step)` of the tasks are solved. It saves at every fifth step, and is killed after
    `killed`."""

    def __init__(self, percent, killed=0):
        self.percent, self.killed, self.now, self.step, self.played = percent, killed, 100.0, 0, []

    def examine(self, model, count, first=0):
        self.now += 5
        self.played.append(count - first)
        return self.percent(self.step) / 100 * (count - first) * len(records.NAMES)

    def run(self, args):
        folder = records.Path(args.out)
        done = sorted(folder.glob("step_*"))
        self.step = records.step_of(done[-1]) if done else 0
        while self.step < args.steps:
            self.step += 1
            self.now += 2
            pretrain.held_out_losses(None, {})
            if self.step == self.killed:
                raise KeyboardInterrupt
            if self.step % 5 == 0:
                (folder / f"step_{self.step:06d}").mkdir(parents=True)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """pretend(percent, killed=, **options): run a trial, and return (its end, the training)."""
    monkeypatch.setitem(records.COMMON, "save_every", 5)

    def go(percent, killed=0, track=TRACK, **options):
        training = Pretended(percent, killed)
        (tmp_path / "trial.json").write_text(json.dumps(
            {"track": records.asdict(track), "options": options, "seed": 0}))
        with (mock.patch.object(pretrain, "run", training.run),
              mock.patch.object(records, "examine", training.examine),
              mock.patch.object(records.time, "process_time", lambda: training.now)):
            records.trial(records.Trial(str(tmp_path)))
        return read_json(tmp_path / "end.json"), training
    return go


def test_the_goal_ends_a_run_and_evaluations_do_not_count(pretend):
    """10 seconds are 5 steps; the goal is reached at step 20, after 40 seconds."""
    found, training = pretend(lambda step: 3.0 * step)
    assert found == {"reached": True, "step": 20, "minutes": pytest.approx(40 / 60),
                     "percent": pytest.approx(60), "seconds_a_step": pytest.approx(2)}
    # Few tasks at 15, 30 and 45%, all at 60%.
    assert training.played == [50, 50, 50, 50, 150]


def test_many_tasks_decide(pretend):
    """58% is near the goal, so that all tasks are played, but it is not there."""
    found, training = pretend(lambda step: 58.0, steps=10)
    assert not found["reached"] and training.played == [50, 150, 50, 150]


def test_the_cap(pretend):
    """10 minutes are 300 steps."""
    found, _ = pretend(lambda step: 0.0, steps=3000)
    assert found == {"reached": False, "step": 300, "minutes": 10.0, "percent": 0.0,
                     "seconds_a_step": pytest.approx(2)}


def test_the_last_step_is_evaluated_and_an_end_without_the_goal_costs_the_cap(pretend):
    found, training = pretend(lambda step: 10.0, steps=7)
    assert (found["step"], found["minutes"], found["reached"]) == (7, 10.0, False)
    assert training.played == [50, 50]


def test_a_killed_run_goes_on_from_its_checkpoint(pretend, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretend(lambda step: 3.0 * step, killed=13)
    assert not (tmp_path / "end.json").exists()
    found, training = pretend(lambda step: 3.0 * step)
    # It goes on at step 10, after 20 seconds: steps 11 to 13 are done once more, and not counted
    # twice.
    assert training.played == [50, 50, 150] and found["minutes"] == pytest.approx(40 / 60)
    points = read_json(tmp_path / "meter.json")["points"]
    assert [p["step"] for p in points] == [5, 10, 15, 20]


def test_arms_take_turns_and_finished_runs_are_not_repeated(monkeypatch, tmp_path):
    begun = []

    class Child:
        def __init__(self, words, cwd):
            folder = records.Path(words[-1].partition("=")[2])
            begun.append(folder.name)
            asked = read_json(folder / "trial.json")
            records.write_json(folder / "end.json", end(4.0 - 2 * bool(asked["options"])))
            self.code = 1 if len(begun) == 3 else 0

        def wait(self):
            return self.code

    monkeypatch.setattr(records.subprocess, "Popen", Child)
    monkeypatch.setattr(records.signal, "signal", lambda *_: None)
    monkeypatch.setattr(records, "source", lambda: "the same")
    arms = {"baseline": (ROOT, {}), "x": (ROOT, {"lr": 0.006})}
    with pytest.raises(UserError, match="code 1"):
        records.measure(arms, TRACK, 2, tmp_path)
    (tmp_path / "baseline1" / "end.json").unlink()
    runs = records.measure(arms, TRACK, 2, tmp_path)
    assert begun == ["baseline0", "x0", "baseline1", "baseline1", "x1"]
    assert records.compare(runs, "x")["ratio"]["mean"] == pytest.approx(0.5)


# ---- entries ------------------------------------------------------------------------------------

def test_a_good_entry(tmp_path):
    path = tmp_path / "fast.json"
    path.write_text(json.dumps({**GOOD, "options": {"lr": 0.006, "own_question": False,
                                                    "schedule": "cosine", "vit": ""}}))
    entry = records.read_entry(path)
    assert (entry.name, entry.options["schedule"]) == ("fast", "cosine")
    settings = records.settings_of(TRACK.options | entry.options, 3, tmp_path)
    assert (settings.lr, settings.own_question, settings.vit, settings.seed, settings.workers,
            settings.rows) == (0.006, False, "", 3, 0, 1)


@pytest.mark.parametrize("change,line", [
    ("[1]", "damaged"), ("{", "damaged"), ({"author": None}, "author"),
    ({"what": "two\nlines"}, "what"), ({"what": "a | b"}, "what"), ({"what": " "}, "what"),
    ({"date": "yesterday"}, "2026-11-30"), ({"track": "shortest"}, "track"),
    ({"speed": 1}, "speed"), ({"options": [1]}, "object"), ({"options": {"lr": None}}, "lr"),
    ({"options": {"lr": "fast"}}, "lr"), ({"options": {"lr": -1}}, "lr"),
    ({"options": {"init": "ckpt/demo"}}, "init"), ({"options": {"data": "test.jsonl"}}, "data"),
    ({"options": {"seed": 7}}, "seed"), ({"options": {"vit": "ckpt/demo"}}, "vit"),
    ({"options": {"schedule": "__import__('os')"}}, "schedule"),
    ({"options": {"mix": "no_such_category"}}, "no_such_category"),
    ({"options": {"mix": ""}}, "mix"),
    ({"patch": "../../x.patch"}, "patch"), ({"patch": 3}, "patch")], ids=str)
def test_bad_entries_give_one_line(change, line, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**GOOD, **change}))
    with pytest.raises(UserError) as error:
        records.read_entry(path)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["baseline", "My entry", "a|b", "-o"])
def test_bad_names(name, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="small letters"):
        records.read_entry(tmp_path / f"{name}.json")


def test_a_track_may_keep_an_option(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(
        {**GOOD, "track": "sprint", "options": {"mix": "point"}}))
    with pytest.raises(UserError, match="can't set 'mix'"):
        records.read_entry(tmp_path / "x.json")


def test_entries_of_one_track_only(tmp_path):
    for name, track in (("a", "short"), ("b", "long")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**GOOD, "track": track}))
    for entries in ([], [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]):
        with pytest.raises(UserError, match="same track"):
            records.verify(records.Verify(entries))
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.json").write_text(json.dumps({**GOOD, "track": "short"}))
    with pytest.raises(UserError, match="two entries have the name 'a'"):
        records.verify(records.Verify([f"{tmp_path}/a.json", f"{tmp_path}/more/a.json"]))


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A small git repository in the place of ours, and a function that makes an entry in it."""
    monkeypatch.setattr(records, "ROOT", tmp_path)

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path,
                       check=True, capture_output=True)

    git("init")
    (tmp_path / "tasks").mkdir()
    for name in ("optim.py", "tasks/draw.py"):
        (tmp_path / name).write_text("one\n")
    git("add", ".")
    git("commit", "-m", "first")

    def entry(name):
        (tmp_path / "x.patch").write_text(
            f"--- a/{name}\n+++ b/{name}\n@@ -1 +1 @@\n-one\n+two\n")
        found = records.Entry("x", "A", "2026-11-30", "what", "short", patch="x.patch")
        return records.patched(found, tmp_path / "x.json", tmp_path / "tree")
    return entry


def test_a_patch_changes_a_tree_of_its_own(repository, tmp_path):
    for _ in range(2):          # the second time it is made anew
        tree = repository("optim.py")
        assert (tree / "optim.py").read_text() == "two\n"
        assert (tmp_path / "optim.py").read_text() == "one\n"


def test_a_source_that_changes_ends_the_verification(repository, tmp_path, monkeypatch):
    def run_trial(*args):
        (tmp_path / "optim.py").write_text("three\n")
        return end(4.0)

    monkeypatch.setattr(records, "run_trial", run_trial)
    with pytest.raises(UserError, match="stays as it is"):
        records.measure({"baseline": (tmp_path, {})}, TRACK, 2, tmp_path / "out")


def test_a_source_that_had_changes_before_and_gets_more(repository, tmp_path):
    """Two states that are not committed have different names."""
    found = [records.source()]
    for text in ("three\n", "four\n", "one\n"):
        (tmp_path / "optim.py").write_text(text)
        found.append(records.source())
    assert found[0] == found[3] and "dirty" not in found[0] and len(set(found)) == 3


def test_a_patch_may_not_move_a_file_that_is_the_same_for_all(repository, tmp_path):
    (tmp_path / "x.patch").write_text("diff --git a/tasks/draw.py b/draw.py\n"
                                      "similarity index 100%\nrename from tasks/draw.py\n"
                                      "rename to draw.py\n")
    found = records.Entry("x", "A", "2026-11-30", "what", "short", patch="x.patch")
    with pytest.raises(UserError, match="same for all"):
        records.patched(found, tmp_path / "x.json", tmp_path / "tree")


def test_a_verification_goes_on_with_the_same_patch_only(monkeypatch, tmp_path):
    def measure(arms, track, seeds, out):
        (out / "baseline0" / "step_000001").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "source", lambda: "the same")
    monkeypatch.setattr(records, "patched", lambda entry, path, tree: tree)
    monkeypatch.setattr(records, "measure", measure)
    (tmp_path / "x.json").write_text(json.dumps({**GOOD, "patch": "x.patch"}))
    args = records.Verify([f"{tmp_path}/x.json"], 1, str(tmp_path / "out"))
    for text, error in (("one", KeyboardInterrupt), ("one", KeyboardInterrupt), ("two", UserError)):
        (tmp_path / "x.patch").write_text(text)
        with pytest.raises(error):
            records.verify(args)


@pytest.mark.parametrize("name,line", [("tasks/draw.py", "same for all"), ("nowhere.py", "apply"),
                                       ("../outside.py", "apply")])
def test_a_patch_that_is_refused(name, line, repository):
    with pytest.raises(UserError, match=line):
        repository(name)


def test_a_patch_needs_a_clean_tree(repository, tmp_path):
    (tmp_path / "optim.py").write_text("three\n")
    with pytest.raises(UserError, match="commit"):
        repository("optim.py")


# ---- the table ----------------------------------------------------------------------------------

def test_records_and_others(tmp_path):
    def add(name, date, logs, reached=(True, True, True)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**GOOD, "date": date}))
        found = json.loads(json.dumps(result(logs, reached)).replace('"x"', f'"{name}"'))
        found["entry"]["date"] = date
        (tmp_path / f"{name}.result.json").write_text(json.dumps(found))

    add("first", "2026-12-01", [-0.3, -0.3, -0.3])
    add("slower", "2026-12-02", [-0.2, -0.2, -0.2])
    add("best", "2026-12-03", [-0.5, -0.5, -0.5])
    add("noise", "2026-12-04", [-1.0, 0.0, 0.1])
    add("stuck", "2026-12-05", [-0.5, -0.5, -0.5], (True, False, True))
    add("slow", "2026-12-06", [0.5, 0.5, 0.5])
    verdicts = [line.split(" | ")[4] for line in records.table(tmp_path, "short")]
    assert verdicts == ["**record**", "beats the baseline, not the record", "**record**",
                        "no difference that 3 seeds show", "goal not reached with seed 1",
                        "slower than the baseline"]
    assert records.table(tmp_path, "long") == []
    (tmp_path / "best.json").write_text(json.dumps({**GOOD, "options": {"lr": 0.1}}))
    with pytest.raises(UserError, match="verify it again"):
        records.table(tmp_path, "short")


def test_entries_are_good_and_the_table_is_that_of_the_results():
    folder, text = ROOT / "records", (ROOT / "RECORDS.md").read_text(encoding="utf-8")
    for path in folder.glob("*.json"):
        if not path.name.endswith(".result.json"):
            records.read_entry(path)
    lines = [line for name in records.TRACKS for line in records.table(folder, name)]
    assert [line for line in text.splitlines() if "](records/" in line] == lines
    for name, track in records.TRACKS.items():
        assert f"| `{name}` | {track.percent:g}% | {track.minutes:g} |" in text


@pytest.mark.slow
def test_a_miniature_verification(monkeypatch, tmp_path, capfd):
    """Two runs of two steps, in processes of their own; nobody reaches 100%."""
    short = replace(TRACK, percent=100.0, seconds=1000.0, options=TRACK.options | {"steps": 2})
    monkeypatch.setitem(records.TRACKS, "short", short)
    monkeypatch.setattr(records, "source", lambda: "the same")      # though somebody edits a file
    path = tmp_path / "fast.json"
    path.write_text(json.dumps(GOOD))
    args = records.Verify([str(path)], 1, str(tmp_path / "out"))
    records.verify(args)
    assert "goal not reached with seed 0" in capfd.readouterr().out
    assert not (tmp_path / "fast.result.json").exists()
    found = read_json(tmp_path / "out/fast/fast0/end.json")
    assert (found["reached"], found["step"], found["minutes"]) == (False, 2, 10.0)
    began = records.time.time()
    records.verify(args)                # it is done: nothing is run
    assert records.time.time() - began < 3
