"""sample.py: what `eval` evaluates, and what it refuses."""
import json
from pathlib import Path

import pytest

import sample
from lib.checkpoint import save_model
from lib.cli import UserError
from model import GLMV, sized


@pytest.fixture
def run(tmp_path) -> Path:
    """The run folder of a pretraining of one step."""
    save_model(GLMV(sized("tiny")), tmp_path / "run/step_000001")
    return tmp_path / "run"


def evaluated(run: Path, options: dict, **args) -> tuple[dict, int]:
    """The table and the levels after `eval` of a run with these options."""
    (run / "config.json").write_text(json.dumps(options))
    out = run / "eval.json"
    sample.evaluation(sample.Eval(ckpt=str(run), count=2, out=str(out), device="cpu",
                                  dtype="float32", **args))
    found = json.loads(out.read_text())
    return found["table"], found["levels"]


def test_eval_takes_mix_and_levels_of_the_training(run, capsys):
    """The run's categories without its text; the level, too, unless the options say otherwise."""
    options = {"mix": "counting:3,point,text:1,code:1", "levels": 2, "steps": 1}
    table, levels = evaluated(run, options)
    assert list(table) == ["counting", "point"] and levels == 2
    assert "config.json: counting,point" in capsys.readouterr().out
    table, levels = evaluated(run, options, mix="shape_attr")
    assert list(table) == ["shape_attr"] and levels == 2
    table, levels = evaluated(run, options, levels=1)
    assert list(table) == ["counting", "point"] and levels == 1


def test_eval_of_the_same_checkpoint_by_its_own_folder(run):
    (run / "config.json").write_text(json.dumps({"mix": "point", "levels": 3}))
    assert sample.trained_on(run / "step_000001")[:2] == ("point", 3)


def test_eval_of_a_run_on_text_only(run):
    with pytest.raises(UserError, match="only text: give --mix"):
        evaluated(run, {"mix": "text", "levels": 1})


def test_what_the_shipped_model_was_trained_on():
    mix, levels, source = sample.trained_on(sample.DEMO)
    assert "shape_attr" in mix and levels == 1 and source.endswith("report.json")


def test_a_folder_that_says_nothing_of_its_training(tmp_path):
    assert sample.trained_on(tmp_path / "checkpoint") == ("gym", 1, "no file")
