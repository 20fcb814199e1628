"""The demo, its page and the lab sheets, end to end at a few steps."""
import json

import pytest

import mmtp
import pretrain
from common import UserError
from data import parse_mix
from lab import demo, mmtp_options, report


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


@pytest.mark.slow
def test_two_stages_compute_what_one_process_does_and_send_what_the_formula_says(tmp_path):
    """The model cut in two over gloo: losses of all three options, and bytes, counted."""
    args = mmtp_options.Args(out=str(tmp_path), depths=2)
    rows = mmtp_options.count_bytes(args)
    model, batch = mmtp_options.example(args)
    for option, row in rows.items():
        assert row["bytes"] == row["formula"]
        main, further = pretrain.loss_sum(model, batch, 2, option)
        assert row["loss"] == pytest.approx((main + 0.1 * sum(further)).item(), rel=1e-5)
    assert rows["embed"]["bytes"] > rows["token"]["bytes"] == rows["mask"]["bytes"]


def test_an_ablation_in_small(tmp_path, monkeypatch):
    """Two options, one seed, a few steps: figures for each, and a page."""
    monkeypatch.setattr(mmtp, "OPTIONS", ("embed", "token"))
    monkeypatch.setattr(mmtp_options, "count_bytes", lambda args: {})
    args = mmtp_options.Args(steps=4, seeds=1, depths=2, mix="point,text", out=str(tmp_path))
    mmtp_options.run(args)
    table = json.loads((tmp_path / "report.json").read_text())["table"]
    for row in table.values():
        assert len(row["mtp2"]) == 1 and row["mtp2"][0] > 0
        assert all(0 <= share <= 1 for runs in row["acceptance"].values() for share in runs[0])
    assert "<svg" in (tmp_path / "report.html").read_text()
