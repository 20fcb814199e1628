"""lab.report: the page of a run of each script, and the explanation of every field of a log."""
import copy
import dataclasses
import json
import math
import re

import pytest

import gym
import pretrain
import rl
import train_vit
from lab import compare, drawing, fields, report
from lib.cli import UserError
from lib.probes import read_report
from model import sized
from tasks.base import Task


def test_a_curve_stays_inside_its_axes():
    svg = drawing.curve({"loss": [(0, 100.0), (1, 1.0), (2, -0.9), (3, 0.8)]}, "loss", clip=True)
    points = [tuple(map(float, p.split(",")))
              for p in svg.split('points="')[1].split('"')[0].split()]
    assert all(drawing.LEFT <= x <= drawing.WIDE and 0 <= y <= 300 - drawing.BOTTOM
               for x, y in points)


@pytest.mark.parametrize("most,expected", [(60, [0, 20, 40, 60]),
                                           (0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
                                           (7, [0, 2, 4, 6])])
def test_axes_have_round_numbers(most, expected):
    assert drawing.ticks(most, 5) == pytest.approx(expected)


def test_rows_that_share_no_column_with_those_above_get_a_table_of_their_own():
    page = drawing.figures_html({"a": {"x": 1.0}, "b": {"x": 2.0, "y": 3.0}, "c": {"z": 4.0}})
    assert page.count("<table>") == 2 and page.index("4") > page.index("<th>z</th>")


def test_a_wide_table_lies_on_its_side():
    """Nine columns and two rows become nine rows; what a row lacks stays empty."""
    page = drawing.figures_html({"before": {f"c{i}": i for i in range(9)}, "after": {"c3": 1200}})
    assert page.count("<tr>") == 10 and "<th>before</th><th>after</th>" in page
    assert "<td>c3</td><td>3</td><td>1,200</td>" in page
    assert "<td>c4</td><td>4</td><td></td>" in page


def test_losses_by_source_are_drawn_with_the_held_out_loss():
    lines = [{"step": k, "loss": 3.0, "held_out": 2.0, "held_out_cats": 1.5, "held_out_gym": 2.5}
             for k in (1, 2)]
    page = report.charts(lines)
    assert page.count("<figure>") == 1 and page.count("<polyline") == 4
    assert "held out, cats <b>1.5</b>" in page and "held out <b>2</b>" in page
    assert "one source alone" in fields.field_of("held_out_cats").meaning
    assert "one source" not in fields.field_of("held_out").meaning


def test_a_page_of_own_questions(tmp_path):
    row = {"accuracy": 0.5, "low": 0.1, "high": 0.9, "blank": 0.25, "chance": None, "unread": 1,
           "n": 4}
    page = page_with(tmp_path, {
        "data": "a<b.jsonl", "groups": {"boxes": row | {"chance": 0.01, "mean_iou": 0.4321}},
        "all": row, "skipped": {"missing image": [3, "no picture at <x>"]}, "cut_off": 2,
        "samples": [{"category": "boxes", "detail": "iou: 0", "pictures": [], "question": "Where?",
                     "answer": "[1, 2]", "truth": "[1, 2, 3, 4]", "reward": 0.0}]})
    for shown in ("Questions of a&lt;b.jsonl", "<td>0.432</td>", "<td>1.0%</td>", "boxes, iou: 0",
                  "3 x missing image, the first: no picture at &lt;x&gt;", "2 replies were cut"):
        assert shown in page, shown


def test_a_curve_of_one_point_is_none():
    assert drawing.curve({"linear": [(9, 0.5)]}, "probes") == ""
    page = drawing.curve({"training": [(1, 2.0), (2, 1.0)], "held out": [(2, 1.0)]}, "loss")
    assert page.count("<polyline") == 1


def test_damaged_files_of_a_run_folder_are_one_line(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="json is damaged: remove it to go on"):
        report.write(tmp_path)


ODD = (None, 5, -1, 1.5, "x", [], {}, [5], {"a": 5}, True, math.nan, math.inf, 10 ** 400)
FACTS = {
    "title": "run", "hardware": "cpu", "torch": "2", "seed": 0, "training_seconds": 5.0, "steps": 9,
    "seconds": 9.0, "parameters": {"total": 10 ** 6}, "note": "as measured", "unit": "minutes",
    "stages": {"sft": {"figure": "accuracy", "before": 1.0, "after": 9.0, "random": 0.5}},
    "table": {"point": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "blank": 0.1, "chance": 0.1,
                        "n": 9}},
    "samples": [{"category": "point", "level": 0, "pictures": ["a.png"], "question": "?",
                 "truth": "a", "reward": 0.0, "answer": "b"}],
    "answered_by": "step_000009", "figures": {"align": {"linear": 0.5}},
    "pictures": [["a.png", "a picture"]], "curves": {"c": {"s": [[0, 1.0], [1, 2.0]]}}}


def test_an_odd_value_in_report_json_is_shown_or_one_line(tmp_path):
    """Every value in turn, also those inside others; and the keys that are left out."""
    def places(values, path=()):
        for name in list(values) if isinstance(values, dict) else range(len(values)):
            yield (*path, name)
            if isinstance(values[name], dict | list):
                yield from places(values[name], (*path, name))

    (tmp_path / "pictures").mkdir()
    assert "as measured" in page_with(tmp_path, FACTS)
    refusals = 0
    for path in places(FACTS):
        for odd in (*ODD, "left out"):
            facts = inner = copy.deepcopy(FACTS)
            for name in path[:-1]:
                inner = inner[name]
            if odd == "left out":
                del inner[path[-1]]
            else:
                inner[path[-1]] = odd
            try:
                page_with(tmp_path, facts)
            except UserError as error:
                refusals += 1
                assert re.search("report.json is damaged [^\n]*: remove it to go on$", str(error))
    assert refusals > 100
    for text in ("5", "[]", "null", "[" * 50):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="report.json is damaged"):
            report.page(tmp_path)


@pytest.mark.parametrize("odd", [5, [5], None, {"figures": 5}, {"figures": [1]},
                                 {"pictures": 5}, {"pictures": [1]}, {"pictures": [[1, "title"]]}])
def test_a_damaged_report_of_a_tower_run_is_one_line(tmp_path, odd):
    (tmp_path / "report.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match="report.json is damaged: remove it to go on"):
        read_report(tmp_path)


def page_with(run, facts) -> str:
    (run / "report.json").write_text(json.dumps(facts))
    return report.page(run)


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    by = {"point": {"reward": 0.5, "pass1": "x"}, "text": 5}
    lines = [*ODD, {"loss": 3.0}, *({"step": odd, "loss": 99.0} for odd in ODD[:5] if odd != 5),
             *({"step": 7, "loss": odd, "lr": odd, "by": odd, "dt": odd} for odd in ODD),
             {"step": 8, "loss": 1.0, "by": by}, {"step": 9, "loss": 2.0, "by": {"point": None}}]
    good = fields.usable(copy.deepcopy(lines))
    assert all(isinstance(line.get("by", {}), dict) for line in good)
    assert {line["step"] for line in good} == {7, 8, 9}
    assert {line["loss"] for line in good if "loss" in line} == {-1, 1.0, 1.5, 2.0, 5}
    assert good[-2] == {"step": 8, "loss": 1.0, "by": {"point": {"reward": 0.5}}}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text('{"hardware": 5, "seed": [1]}')
    assert "polyline" in report.page(tmp_path)
    for text in ("5", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json is damaged"):
            report.page(tmp_path)


@pytest.mark.parametrize("name,odd", [("mix", 5), ("mix", None), ("levels", "x"), ("levels", 0),
                                      ("levels", [])])
def test_odd_options_of_a_run_do_not_hide_its_curves(tmp_path, capsys, name, odd):
    config = dataclasses.asdict(pretrain.Args()) | {name: odd}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    (tmp_path / "step_000001").mkdir()
    report.report(report.Args([str(tmp_path)]))
    assert f"{name} is {odd!r}" in capsys.readouterr().out
    assert "polyline" in (tmp_path / "report.html").read_text()


def test_categories_early_and_late_without_steps_of_errors_alone():
    def line(value):
        return {"step": 1, "by": {"point": {"reward": value}}}
    steps = [0.5, math.nan, *[0.0] * 16, 1.0, 0.5]
    lines = fields.usable([*map(line, steps), {"step": 2}])
    assert report.by_category(lines) == {
        "point": {"reward, first": 0.5, "reward, last": 0.5}}


def test_an_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="nothing to show"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="no run folder"):
        report.write(tmp_path / "missing")
    with pytest.raises(UserError, match=f"that of one is {tmp_path}/report.html"):
        report.report(report.Args([str(tmp_path)], out="elsewhere.html"))


# ---- pages of real runs -------------------------------------------------------------------------

def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def explained(lines: list[dict]) -> set[str]:
    """All keys of a log; each of them must have an explanation."""
    keys = {key for line in lines for key in line}
    assert {key for key in keys if fields.field_of(key) is None} == set()
    return keys


def test_a_pretraining_run_shows_questions_settings_and_all_its_curves(tmp_path, capsys):
    pretrain.run(pretrain.Args(steps=4, rows=1, row_tokens=512, workers=0, mix="point,counting",
                               eval_every=2, mtp_share=0.9, save_every=2, device="cpu",
                               out=str(tmp_path)))
    assert explained(log_of(tmp_path)) >= {"loss", "held_out", "mtp1", "mtp2", "mtp3"}
    report.report(report.Args([str(tmp_path)]))
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["answered_by"] == "step_000004" and len(facts["samples"]) == report.QUESTIONS
    assert {(s["category"], s["level"]) for s in facts["samples"]} == {
        (name, level) for name in ("point", "counting") for level in (0, 1)}
    page = (tmp_path / "report.html").read_text()
    for shown in ("held-out loss", "depth 3", "parameters", "Questions and answers", "truth: ",
                  "python pretrain.py --steps=4 --rows=1", "packed rows", "by step_000004",
                  "options at their defaults", "Norm of the whole gradient"):
        assert shown in page, shown
    for title in ("loss", "loss of the multi-token prediction head, nats a token"):
        assert page.count(f"<figcaption>{title}</figcaption>") == 1
    written = (tmp_path / "report.json").stat().st_mtime_ns
    report.report(report.Args([str(tmp_path)]))       # the same checkpoint: nothing is asked again
    assert (tmp_path / "report.json").stat().st_mtime_ns == written
    (tmp_path / "step_000004/model.safetensors").write_text("damaged")
    (tmp_path / "report.json").unlink()
    report.report(report.Args([str(tmp_path)]))
    assert "no questions are answered" in capsys.readouterr().out
    assert "polyline" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_every_field_of_a_tower_run_is_explained(tmp_path):
    train_vit.run(train_vit.Args(steps=2, batch=4, micro=4, workers=0, probes=64, clips=0.5,
                                 eval_every=1, device="cpu", out=str(tmp_path)))
    keys = set()
    for stage in train_vit.STAGES:
        keys |= explained(log_of(tmp_path / stage))
    assert keys >= {"loss", "linear", "zero_shot_zh", "moves_en", "cos_texture"}
    page = report.page(tmp_path)
    assert page.index("<h2>semantic</h2>") < page.index("<h2>align</h2>")
    assert "cosine to the features" in page and "python train_vit.py" in page


@pytest.mark.parametrize("staleness", [0, 2])
def test_every_field_of_an_rl_run_is_explained(tmp_path, staleness):
    rl.run(rl.Args(mix="counting,point", prompts=1, group=2, steps=2, slots=4, eval_every=1,
                   eval_count=2, max_new=4, context=128, max_staleness=staleness, device="cpu",
                   out=str(tmp_path)))
    lines = log_of(tmp_path)
    assert explained(lines) >= {"reward", "no_signal", "accuracy"}
    assert explained([row for line in lines for row in line["by"].values()]) >= {"pass1", "pass2"}
    page = report.page(tmp_path)
    assert "Questions and answers" in page and "python rl.py" in page
    assert "The policy-gradient loss" in page


def test_fields_are_printed(capsys):
    report.report(report.Args(["fields"]))
    said = capsys.readouterr().out
    assert "mtpN [nats a token]" in said and "rl.py" in said
    everything = [field for group in fields.FIELDS.values() for field in group]
    assert all(field.meaning.endswith((".", "?")) for field in everything)


def test_every_curve_is_of_a_field_that_is_explained_and_drawn_once():
    keys = [key for chart in fields.CHARTS for key in chart.lines]
    assert len(keys) == len(set(keys))
    assert all(fields.field_of(key.replace("*", "cats")) for key in keys)


def test_questions_are_spread_over_categories_and_levels():
    few = report.tasks_of("point:3,counting,text", 2, sized("tiny"), 6)
    assert [t.category for t in few] == ["point"] * 3 + ["counting"] * 3
    assert [t.level for t in few] == [0, 1] * 3 and len(set(few)) == 6
    many = report.tasks_of("gym", 1, sized("tiny"), 12)
    assert len({t.category for t in many}) == 12
    assert report.tasks_of("text,code", 1, sized("tiny")) == []


def test_pictures_of_an_answer_are_those_that_the_model_saw():
    task = Task("gui_form", 3, 0, "test")
    replies = gym.play_out(task)[1]
    frames, question = report.frames_of(task, replies)
    assert len(frames) == len(replies) > 1 and question and "<|image|>" not in question


def test_a_config_of_no_script_has_no_settings():
    assert report.settings({"tower_steps": 1, "steps": 3}) == ""


# ---- several runs -------------------------------------------------------------------------------

def a_run(folder, losses, lr=0.1, steps=None, **options):
    """A run folder with these losses of its steps; options that differ from the defaults."""
    folder.mkdir()
    config = dataclasses.asdict(pretrain.Args(lr=lr, steps=steps or len(losses), **options))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"step": k, "loss": loss}) + "\n" for k, loss in enumerate(losses, 1)))
    return folder


@pytest.mark.parametrize("values,expected", [
    ([3.0], (3, 3, 3)), ([1.0, 4.0], (2.5, 1, 4)),
    ([1.0, 2.0, 3.0], (2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5)),     # std 1, t of 2 degrees
    ([0.0, 0.0, 2.0, 2.0], (1, 1 - 3.182 / 3 ** 0.5, 1 + 3.182 / 3 ** 0.5))])
def test_the_interval_over_seeds(values, expected):
    assert compare.spread(values) == pytest.approx(expected)


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
    folders = [a_run(tmp_path / f"run{k}", [4.0, 2.0 + k, 1.0 + k], seed=k, workers=k)
               for k in range(3)]
    folders += [a_run(tmp_path / "other", [4.0, 3.0, 0.5], lr=0.2),
                a_run(tmp_path / "short", [9.0, 9.0], steps=3)]     # its group has better runs
    runs = [compare.read_run(folder) for folder in folders]
    groups = compare.grouped(runs)
    assert {name: [run.folder.name for run in members] for name, members in groups.items()} == {
        "1: lr=0.1": ["run0", "run1", "run2", "short"], "2: lr=0.2": ["other"]}
    logs = [run.logs[""] for run in compare.counted(groups["1: lr=0.1"])]
    means, band = compare.group_curve(logs, "loss", True)
    assert means == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert band[0] == (1, 4.0, 4.0)
    assert band[2][1:] == pytest.approx((2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5))
    page = compare.page(runs)
    assert page.count("<polygon") == 1 and page.count("<polyline") == 2
    assert "not ended: step 2 of 3" in page and "<td class=\"text\">-0.484 – 4.48</td>" in page
    assert page.count("<td><code>lr</code></td>") == 1      # the only option that differs


def test_damaged_runs_are_named_and_the_others_compared(tmp_path, capsys):
    good, cut, odd, empty = (a_run(tmp_path / name, [2.0, 1.0]) for name in "abcd")
    (cut / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 5}\n{"step": 3, ')
    (odd / "config.json").write_text("[1]")
    (empty / "log.jsonl").write_text("\n")
    (tmp_path / "e").write_text("a file")
    args = report.Args([str(p) for p in (good, cut, odd, empty, tmp_path / "e", tmp_path / "f")],
                       str(tmp_path / "page.html"))
    report.report(args)
    assert "page.html" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    for shown in ("6 runs in 1 group<", "ended; damaged lines of its log: 1",
                  "config.json is damaged", "no log.jsonl with a line", "1: all runs <b>3</b>",
                  "1 – 5"):
        assert shown in page, shown
    assert page.count("there is no such folder") == 2
    with pytest.raises(UserError, match="none of these runs can be shown: .*no such folder"):
        report.report(report.Args([str(tmp_path / "e"), str(tmp_path / "f")]))


def test_stages_stand_in_the_order_in_which_they_ran(tmp_path):
    for seed in range(2):
        for stage in ("align", "semantic"):
            (tmp_path / f"run{seed}").mkdir(exist_ok=True)
            a_run(tmp_path / f"run{seed}" / stage, [2.0, 1.0 + seed], seed=seed)
    runs = [compare.read_run(tmp_path / f"run{seed}") for seed in range(2)]
    page = compare.page(runs)
    assert page.index("<h2>semantic</h2>") < page.index("<h2>align</h2>")
    assert page.count("<polygon") == 2 and [run.state() for run in runs] == ["ended"] * 2


def test_the_final_figure_of_a_field():
    """Of a field of every step the mean over the last twentieth; of a rare one its last value."""
    lines = [{"step": k, "loss": float(k)} for k in range(1, 41)]
    lines[9]["held_out"], lines[19]["held_out"] = 7.0, 8.0
    assert compare.final(lines, "loss") == 39.5
    assert compare.final(lines, "held_out") == 8.0 and compare.final(lines, "norm") is None
