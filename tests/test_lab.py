"""The demo and its page, end to end at a few steps."""
import json

import pytest

import pretrain
from common import UserError
from data import parse_mix
from lab import demo, report


def test_the_demo_trains_examines_answers_and_reports(tmp_path, monkeypatch):
    full = pretrain.Args
    small = {"workers": 0, "rows": 1, "row_tokens": 512}
    monkeypatch.setattr(pretrain, "Args", lambda **kw: full(**kw | small))
    args = demo.Args(steps=3, count=2, out=str(tmp_path / "run"), keep=str(tmp_path / "kept"))
    demo.demo(args)
    facts = json.loads((tmp_path / "run/report.json").read_text())
    assert list(facts["table"]) == [name for name, _ in parse_mix(demo.MIX)]
    assert len(facts["samples"]) == 2 * len(facts["table"])
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 12 and "polyline" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "kept/model.safetensors").exists()
    before = (tmp_path / "run/pretrain/log.jsonl").read_text()
    demo.demo(args)  # once more: nothing is trained again
    assert (tmp_path / "run/pretrain/log.jsonl").read_text() == before


def test_a_curve_stays_inside_its_axes():
    svg = report.curve({"loss": [(0, 100.0), (1, 1.0), (2, 0.9), (3, 0.8)]}, "loss", 620, 220)
    points = svg.split('points="')[1].split('"')[0].split()
    assert all(0 <= float(p.split(",")[1]) <= 220 for p in points)


def test_an_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="nothing to show"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="no run folder"):
        report.write(tmp_path / "missing")
