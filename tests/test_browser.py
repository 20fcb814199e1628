"""The server's page and recipes/browser.py in headless Chromium; skipped where it is missing."""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import serve
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.common import ROOT
from recipes import browser as recipe
from recipes.webdriver import browser
from sample import answer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="no chromedriver: apt-get install chromium-driver")]
ENTER = "\ue007"
EXAMPLE = ROOT / "docs" / "example.png"


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "ckpt" / "demo")


@pytest.fixture(scope="module")
def window():
    with browser(1000, 700) as opened:
        yield opened


@pytest.fixture
def page(model, window):
    """The page of a server, when it has found its model."""
    with serve.running(model) as url:
        window.open(url)
        wait(window, "get('model').textContent")
        yield window
        window.open("about:blank")      # ends its requests before the server stops


def wait(window, condition: str):
    """Let the page work until this JavaScript is true."""
    window.run(f"""return new Promise(done => {{
        const look = () => {condition} ? done() : setTimeout(look, 5);
        look();
    }})""")


def press(window, selector: str, text: str = ""):
    """Click in the middle of the element that has this text."""
    window.click(*window.run(f"""
        const found = [...document.querySelectorAll({selector!r})];
        const box = found.find(e => e.textContent.includes({text!r})).getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]"""))


def lines(window) -> list[str]:
    return window.run("return [...get('talk').children].map(line => line.textContent)")


# ---- the page -----------------------------------------------------------------------------------

def test_a_question_by_keyboard_is_answered_as_by_the_model_itself(page, model):
    page.run("""window.seen = new Set();
        new MutationObserver(() => seen.add(get("talk").lastChild.textContent))
            .observe(get("talk"), {childList: true, subtree: true})""")
    page.type("List all." + ENTER)
    wait(page, "!running && get('talk').children.length")
    reply = answer(model, EXAMPLE, "List all.").text
    assert lines(page) == ["List all.", reply]
    first, *pieces = page.run("return [...seen]")
    assert first == "…" and len(pieces) > 3 and all(map(reply.startswith, pieces))
    size = page.run("return get('size').textContent")
    assert re.fullmatch(r"64 × 64 pixels; \d\d tokens read, \d+ written", size)


def test_a_click_is_drawn_where_the_reply_says(page):
    press(page, "#questions button", "Click the pink one.")
    wait(page, "!running && get('talk').children.length")
    x, y = map(int, re.fullmatch(r"click\((\d+), (\d+)\)", lines(page)[1]).groups())
    places = page.run("""
        const boxes = [get("picture"), get("marks").firstChild].map(e => e.getBoundingClientRect());
        return boxes.map(box => [box.left, box.top, box.width, box.height])""")
    (left, top, width, height), (x0, y0, *sides) = places
    assert abs(x0 + sides[0] / 2 - left - x / 999 * width) < 1
    assert abs(y0 + sides[1] / 2 - top - y / 999 * height) < 1
    red, green, blue = Image.open(EXAMPLE).convert("RGB").getpixel((x * 64 // 999, y * 64 // 999))
    assert red > 200 and green < 180 and blue > 120         # on the pink diamond


def test_boxes_and_points_are_drawn_and_other_numbers_are_not(page):
    page.run("drawMarks('[100, 200, 300, 400], [5, 6, 7] and [500,250]; 12, 13')")
    styles = page.run("return [...get('marks').children].map(e => [e.className, e.style.cssText])")
    assert [name for name, _ in styles] == ["box", "point"]
    assert re.findall(r"(\w+): ([\d.]{5})", styles[0][1]) == [
        ("left", "10.01"), ("top", "20.02"), ("width", "20.02"), ("height", "20.02")]


def test_each_question_is_on_its_own_or_goes_on_and_reset_forgets_them(page):
    read = "return ask('List all.').then(() => Number(get('size').textContent.split(' ')[4]))"
    alone = [page.run(read), page.run(read)]
    press(page, "#remember")
    third, prompt = page.run(read), page.run("return messagesOf(turns).map(m => m.content.length)")
    assert alone[0] == alone[1] < third and len(lines(page)) == 6
    assert prompt == [2, len(lines(page)[1]), 1, len(lines(page)[3]), 1, len(lines(page)[5])]
    press(page, "#reset")
    assert page.run("return [turns.length, get('marks').children.length]") == [0, 0]
    assert lines(page) == [] and page.run(read) == alone[0]


def test_an_error_is_one_line_and_the_question_is_not_lost(page):
    page.run("return ask('why ' + 'so '.repeat(5000))")
    error, kept = page.run("return [get('error').textContent, get('question').value.length]")
    assert "prompt" in error and "\n" not in error and kept > 15_000 and lines(page) == []
    page.run("setPicture('data:image/png;base64,AAAA')")
    wait(page, "get('error').textContent.includes('show this picture')")
    page.run("get('question').value = ''; setPicture(EXAMPLE); return ask('List all.')")
    assert page.run("return get('error').textContent") == "" and len(lines(page)) == 2


def test_a_reply_is_never_html(page):
    page.run("say('assistant', '<img src=x onerror=fail(1)><b>x</b>')")
    assert page.run("return get('talk').querySelectorAll('img, b').length") == 0
    assert lines(page) == ["<img src=x onerror=fail(1)><b>x</b>"]


def test_a_picture_is_dropped_pasted_or_chosen(page):
    make = """
        const canvas = document.createElement("canvas"), files = new DataTransfer();
        canvas.width = WIDTH;
        return new Promise(done => canvas.toBlob(done)).then(blob => {
            files.items.add(new File([blob], "a.png", {type: "image/png"}));
            EVENT
        })"""
    events = (
        "document.dispatchEvent(new DragEvent('drop', {dataTransfer: files, cancelable: true}));",
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files}));",
        "get('file').files = files.files; get('file').dispatchEvent(new Event('change'));")
    for width, event in enumerate(events, 40):
        page.run(make.replace("WIDTH", str(width)).replace("EVENT", event))
        wait(page, f"get('picture').naturalWidth === {width}")
        wait(page, f"get('size').textContent === '{width} × 150 pixels'")
    page.run("""const files = new DataTransfer();
        files.items.add(new File(["x"], "a.txt", {type: "text/plain"}));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer: files}))""")
    assert "not a picture" in page.run("return get('error').textContent")


def test_the_key_is_asked_for_only_where_the_server_wants_one(model, window):
    with serve.running(model, api_key="secret") as url:
        window.open(url)
        wait(window, "!get('locked').hidden")
        assert "key" in window.run("return get('error').textContent").lower()
        window.type("secret" + ENTER)           # the field has the focus
        wait(window, "get('model').textContent")
        window.run("return ask('List all.')")
        assert window.run("return get('error').textContent") == "" and len(lines(window)) == 2
        window.open("about:blank")


def test_the_example_is_the_readmes(page):
    data = np.asarray(Image.open(EXAMPLE).convert("RGB")).tolist()
    seen = page.run("""
        const canvas = document.createElement("canvas"), image = get("picture");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]""")
    assert np.array(seen).reshape(64, 64, 4)[:, :, :3].tolist() == data


def test_a_narrow_window_has_no_bar_to_scroll_sideways(model):
    with serve.running(model) as url, browser(360, 640) as narrow:
        narrow.open(url)
        assert narrow.run("return document.documentElement.scrollWidth") == 360


# ---- the recipe ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["form", "list", "dialog"])
def test_the_right_actions_reach_the_goal_of_every_page(name, tmp_path, capsys):
    film = tmp_path / "new" / "film.gif"
    recipe.drive(recipe.Args(page=name, count=8, oracle=True, ckpt="ckpt/demo", film=str(film)))
    said = capsys.readouterr().out
    assert said.endswith("8 of 8 reached the goal\n")
    assert ('scroll("down")' in said) == (name == "list")
    assert Image.open(film).n_frames > 3


def test_the_pages_are_also_missed_and_one_can_go_back(tmp_path):
    folder = ROOT / "recipes" / "browser"
    with browser(512, 512) as window:
        window.open(f"{(folder / 'form.html').as_uri()}?0")
        window.run("ok.click()")
        assert window.title == "missed"
        window.open(f"{(folder / 'dialog.html').as_uri()}?0")
        goal = window.title
        window.run("box.click(); ok.click(); no.click()")
        assert window.title == goal and not window.run("return dialog.open")
        window.run("ok.click(); yes.click()")
        assert window.title == "reached"


def test_the_model_uses_the_form(capsys):
    recipe.drive(recipe.Args(page="form", count=6, ckpt="ckpt/demo"))
    reached = re.search(r"(\d) of 6 reached the goal\n$", capsys.readouterr().out)
    assert int(reached[1]) >= 4


# ---- processes ----------------------------------------------------------------------------------

def state_and_parent(pid: int) -> tuple[str, int]:
    """("Z", 0) where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "Z", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def offspring(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have started."""
    everyone = {int(p.name): state_and_parent(int(p.name))[1]
                for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = [pid]
    for parent in found:                # it grows
        found += [one for one, its in everyone.items() if its == parent]
    return found[1:]


def test_without_a_driver_one_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "chromedriver").write_text("#!/bin/sh\nexit 1\n")
    for mode, message in ((0o600, "apt-get install"), (0o700, "ended before it was ready")):
        (tmp_path / "chromedriver").chmod(mode)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=message), browser(64, 64):
            pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_ctrl_c_leaves_no_process_and_no_file():
    folder = tempfile.TemporaryDirectory()      # tmp_path is too long for Chromium's sockets
    child = subprocess.Popen(
        [sys.executable, "-m", "recipes.browser", "--oracle", "--count=500", "--ckpt=ckpt/demo"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"TMPDIR": folder.name, "PYTHONUNBUFFERED": "1"})
    for line in child.stdout:
        if "reached" in line:
            break
    started = offspring(child.pid)
    assert len(started) > 2
    os.killpg(child.pid, signal.SIGINT)         # as a terminal does: to the whole group
    assert "interrupted" in child.communicate(timeout=60)[1] and child.returncode == 130
    latest = time.monotonic() + 20
    while any(state_and_parent(pid)[0] not in "ZX" for pid in started):
        assert time.monotonic() < latest        # Chromium's processes end one by one
    assert os.listdir(folder.name) == []
    folder.cleanup()
