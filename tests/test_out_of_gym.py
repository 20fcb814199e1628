"""lab/out_of_gym.py: screens as HTML, their changes, the table, and one look by the browser."""
import json
import re
import shutil

import numpy as np
import pytest

from lab import out_of_gym
from lab.out_of_gym import changed, read_screen, ROWS, screen_html
from lib.checkpoint import save_model
from lib.cli import UserError
from model import GLMV, sized
from tasks.base import Task
from tasks.draw import SHAPES

TASKS = [Task("gui_click", 7_000 + i, 0, "test", pixels) for i in range(20) for pixels in (64, 112)]


@pytest.fixture(scope="module")
def screens():
    return [read_screen(task)[0] for task in TASKS]


def buttons(html: str) -> np.ndarray:
    """(n, 4): x0, y0, x1, y1 of the buttons in the HTML of a screen."""
    pixels = "left:(.+?)px;top:(.+?)px;width:(.+?)px;height:(.+?)px"
    places = re.findall(f'<button style="{pixels}', html)
    x, y, width, height = np.array(places, float).T
    return np.stack([x, y, x + width, y + height], 1)


def test_the_html_has_every_button_at_its_place(screens):
    for screen in screens:
        html = screen_html(screen, 100, 200)
        side = screen.size[0]
        assert html.startswith(f'<div style="left:100px;top:200px;width:{side}px;height:{side}px;')
        assert f"background:rgb{screen.ground}" in html
        np.testing.assert_allclose(buttons(html), screen.areas)
        for label, paint, part in zip(screen.labels, screen.paints, html.split("<button")[1:]):
            assert ("background" in part) == bool(paint)
            assert not paint or f"background:rgb{paint[0]};" in part and f"rgb{paint[1]}" in part
            text = re.sub("<[^>]*>", "", "<" + part)
            assert text == ("" if label in SHAPES else label)
            assert ("<svg" in part) == (label in SHAPES)


def test_the_screen_is_the_tasks_own(screens):
    for task, screen in zip(TASKS, screens):
        env = out_of_gym.gym.make(task)
        assert env.reset().text.endswith(screen.goal) and "<|" not in screen.goal
        np.testing.assert_allclose(screen.gold(), env.evidence()["gold"]["box"], atol=0.1)


@pytest.mark.parametrize("row", ROWS)
def test_changes_keep_the_buttons_apart_and_inside(row, screens):
    kept = [(screen, made) for i, screen in enumerate(screens)
            if (made := changed(screen, ROWS[row], i))]
    assert len(kept) >= len(screens) / 2
    for screen, made in kept:
        areas = made.areas
        assert made.target == screen.target and len(areas) == len(screen.areas)
        assert areas.min() >= 0 and (areas[:, 2:] <= made.size).all()
        assert all(0 <= edge <= 999 for edge in made.gold())
        for i, a in enumerate(areas):
            for b in areas[:i]:
                assert (a[:2] >= b[2:] - 1e-9).any() or (b[:2] >= a[2:] - 1e-9).any()
        assert "all together" == row or (made.size == screen.size).all() == (row != "160 x 210")
    if row == "half a cell":
        moves = np.stack([(made.areas - screen.areas) * 64 / screen.size[0]
                          for screen, made in kept if len(made.areas) == 2])
        assert np.ptp(moves, axis=1).max() == 0                 # all buttons by the same offset
        assert 4 < np.abs(moves).max() <= 8
    if row == "160 x 210":
        for screen, made in kept:       # same size, and more than 3 times as far apart
            sides = [areas[:, 2:] - areas[:, :2] for areas in (screen.areas, made.areas)]
            np.testing.assert_allclose(*sides)
            np.testing.assert_allclose(made.size / screen.size, [2.5, 210 / 64], rtol=0.01)


def test_grey_buttons_are_named_by_label_only(screens):
    for i, screen in enumerate(screens):
        made = changed(screen, ROWS["grey buttons"], i)
        label = screen.labels[screen.target]
        assert (made is None) == (not label or screen.labels.count(label) > 1)
        if made:
            assert made.goal == f"Click the {label}." if label in SHAPES else f"Click {label}."
            assert "rgb" not in screen_html(made).split("<button", 1)[1]


def test_a_white_page_is_white_and_keeps_the_buttons(screens):
    for screen in screens:
        made = changed(screen, ROWS["white page"], 0)
        assert made.ground == (255, 255, 255)
        for before, after in zip(filter(None, screen.paints), filter(None, made.paints)):
            assert before[1] == after[1]
            assert after[0] == ((255, 255, 255) if before[0] == screen.ground else before[0])


def test_a_click_is_scored_in_the_picture_that_was_shown(screens):
    for screen in screens[:4]:
        made = changed(screen, ROWS["160 x 210"], 0)
        x0, y0, x1, y1 = made.gold()
        replies = [f"click({round((x0 + x1) / 2)}, {round((y0 + y1) / 2)})",
                   f"click({round(x1) + 5}, {round(y1) + 5})", "done()", ""]
        row = out_of_gym.score([made] * 4, replies)
        assert row["right, %"] == 25 and row["no click, %"] == 50 and row["points"] == 2
        assert row["from"] < 25 < row["to"] and row["screens"] == 4
        assert row["random click, %"] < row["random button, %"]
        assert row["random button, %"] == pytest.approx(100 / len(made.labels))


def test_without_a_browser_one_line_names_the_package(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^no browser: none of chromium, .*package chromium"):
        out_of_gym.out_of_gym(out_of_gym.Args())


def test_a_browser_that_fails_is_named_with_its_last_line(tmp_path, screens):
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho first >&2\necho no display >&2\nexit 1\n")
    browser.chmod(0o755)
    with pytest.raises(UserError, match="chromium could not draw .*page.html: no display$"):
        out_of_gym.photograph(str(browser), screens[:1], tmp_path / "page.html")


def test_the_table_the_sheet_and_the_page(tmp_path, monkeypatch, capsys):
    """With the gym's grounds for a browser, and a model of random weights."""
    save_model(GLMV(sized("tiny"), 0), tmp_path / "model")
    monkeypatch.setattr(out_of_gym, "find_browser", lambda: "/bin/echo")
    monkeypatch.setattr(out_of_gym, "photograph", lambda browser, screens, page: [
        out_of_gym.Image.new("RGB", tuple(screen.size.tolist()), screen.ground)
        for screen in screens])
    out_of_gym.out_of_gym(out_of_gym.Args(ckpt=str(tmp_path / "model"), count=6, device="cpu",
                                          out=str(tmp_path / "run")))
    facts = json.loads((tmp_path / "run/report.json").read_text())
    assert list(facts["figures"]) == list(ROWS)
    assert facts["figures"]["160 x 210"]["screens"] == 6
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in ROWS)
    page = (tmp_path / "run/report.html").read_text()
    assert "half a cell" in page and page.count("data:image/png;base64,") == 1


@pytest.mark.slow
def test_the_browser_draws_what_the_gym_draws(tmp_path):
    try:
        browser = out_of_gym.find_browser()
    except UserError as error:
        pytest.skip(str(error))
    drawn = [read_screen(task) for task in TASKS if task.pixels == 64]
    pictures = out_of_gym.photograph(browser, [screen for screen, _ in drawn], tmp_path / "a.html")
    gaps = []
    for (screen, own), theirs in zip(drawn, pictures):
        assert theirs.size == own.size
        for label, (x0, y0, x1, y1), paint in zip(screen.labels, screen.areas, screen.paints):
            if paint:       # grey ones are the browser's own; the gym also has small or thick words
                colors = [np.asarray(p)[y0:y1, x0:x1].mean((0, 1)) for p in (own, theirs)]
                gaps.append(np.abs(colors[0] - colors[1]).max())
                assert gaps[-1] < (30 if label in ("", *SHAPES) else 60)
        corners = {own.getpixel(at): theirs.getpixel(at) for at in ((0, 0), (0, 63))}
        assert corners[screen.ground] == screen.ground
    assert np.mean(gaps) < 15
