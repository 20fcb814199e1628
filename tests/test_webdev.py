"""The HTML renderer, the measure of likeness, and workflows on pages."""
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gym import make, play_out, Rewards
from tasks import draw, html_render, Task
from tasks.base import box, IMAGE
from tasks.html_render import Broken, page_view, SIDE, Site, View, word_mask
from tasks.webdev import (assign, ciede2000, edit_between, Page, page_score, relative_rewards,
                          run_workflow)
from tasks.words import invent

ROOT = Path(__file__).parent.parent
CARD = ('<style>.c{width:100px;margin:10px;padding:5px;background:#224488;color:#fff}</style>'
        '<body><div class="c"><h1>Big</h1><p>small text</p></div></body>')
SITE = ('<body><a href="#a">A</a> <a href="#b">B</a><div id="a"><p>first</p></div>'
        '<div id="b"><label><input type="checkbox"> Tick me</label>'
        '<details><summary>More</summary><p>inside</p></details></div></body>')


def texts(html):
    return [block.text for block in page_view(html).blocks]


def spearman(a, b):
    def ranks(values):
        values = np.asarray(values, float)
        return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
    return np.corrcoef(ranks(a), ranks(b))[0, 1]


# ---- renderer -----------------------------------------------------------------------------------

def test_boxes_are_placed_by_their_style():
    view = page_view(CARD)
    big, small = view.blocks
    assert big.box[0] == small.box[0] == 15 and big.box[3] < small.box[1]
    assert big.color == (255, 255, 255) and big.ground == (0x22, 0x44, 0x88)
    picture = view.image(SIDE)
    assert picture.getpixel((11, 12)) == (0x22, 0x44, 0x88)
    assert picture.getpixel((9, 12)) == picture.getpixel((111, 12)) == (255, 255, 255)
    assert view.image(4 * SIDE).getpixel((44, 48)) == (0x22, 0x44, 0x88)


def test_rows_share_the_width_and_words_wrap():
    row = '<div style="display:flex;gap:6px">{}</div>'
    left, right = page_view(row.format('<p style="flex:1">l</p><p style="flex:1">r</p>')).blocks
    assert right.box[0] - left.box[0] == (SIDE - 6) / 2 + 6
    apart = row.replace("gap:6px", "justify-content:space-between")
    left, right = page_view(apart.format("<p>l</p><p>r</p>")).blocks
    assert left.box[0] == 0 and right.box[2] == SIDE
    one, two = (page_view(f'<p style="width:{w}px">one two three</p>').blocks[0].box
                for w in (200, 40))
    assert two[3] - two[1] > 2 * (one[3] - one[1])
    assert texts("<table><tr><th>a<td>b<tr><td>c<td>d</table>") == ["a", "b", "c", "d"]
    table = "<table><tr><td>aaaa<td>b<tr><td>c<td>d</table>"
    cell = [block.box for block in page_view(table).blocks]
    assert cell[0][0] == cell[2][0] and cell[1][0] == cell[3][0]


def test_only_text_that_can_be_seen_counts():
    for style in ("display:none", "font-size:1px", "font-size:0", "font-size:0.01px",
                  "color:#fff", "color:#fdfdfd", "padding:300px", "margin-left:250px",
                  "color:#123456;background:#123456"):
        assert texts(f'<p style="{style}">words</p><p>seen</p>') in (["seen"], []), style
    assert texts("<details><summary>More</summary>inside</details>") == ["More"]
    assert texts("<p>zero\u200bwidth \u0416</p>") == ["zero?width ?"]


def test_unknown_markup_is_counted_and_too_much_is_broken():
    assert Site('<p style="float:left;color:#000">x</p><marquee>y</marquee></i>').unknown == 3
    for html in ("<p>x</p> or not", "text", "<div>" * 17, "<p></p>" * 201, "<p>" + "x" * 4000):
        with pytest.raises(Broken):
            Site(html)
    rng, alphabet = np.random.default_rng(0), ['<', '>', '/', '"', '=', 'p', 'div', 'table', 'td',
        'tr', 'style', '{', '}', '.c', 'display:flex', ';', ' ', '&#0;', '<!', '[', '--', '99%',
        'details', 'summary', 'li', 'img', 'input', 'font-size:999', 'width:0', 'id=a', '<body ']
    for _ in range(600):
        html = "<p>" + "".join(rng.choice(alphabet, int(rng.integers(1, 40))))
        try:
            page_view(html).image(64)
        except Broken:
            pass


def test_no_size_raises():
    for value in ("0", "0.01", "0.1px", "0.49", "0.99px", "1", "999.99px", "-5px", "nan", "1e9"):
        for name in sorted(html_render.LENGTHS) + ["margin", "padding", "line-height"]:
            for above in ("", "display:flex;height:1px;align-items:center", "text-align:center"):
                page_view(f'<div style="{above};border-radius:999px;background:#f00">'
                           f'<p style="border:9px solid #000;{name}:{value}">x</p></div>').image(64)
    for pixels in (64, 1024):       # nothing is drawn of what is too small
        blank = page_view("<p></p>").image(pixels).tobytes()
        assert page_view("<p style='font-size:0.9px'>words</p>").image(pixels).tobytes() == blank


def test_pages_are_read_in_linear_time(monkeypatch):
    """Each text here is a hundred times as long as a page may be. A pattern that tries again from
    every letter would take hours."""
    n = 400_000
    for part in ("a", "{", "}", "a,", "a{", " ", "a{b", "9px ", ":", ";", "#"):
        text = part * (n // len(part))
        assert len(html_render.rules(text + "}a")) <= 1
        for name in ("width:", "border:", "color:", "margin:", ""):
            assert html_render.declarations(name + text)[0] == {}
    monkeypatch.setattr(html_render, "LONGEST", 2 * n)
    assert Site(f"<style>{'a' * n}</style><p>x").rules == {}
    assert list(html_render.parse_sheet("}a{b}c{d{e}{f}g{h")) == [("a", "b"), ("d", "e")]


def test_caches_are_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(draw, "CACHE_BYTES", 0)     # these empty what other tests have left
    word_mask("odd", 97.3, False), draw.shape_mask("circle", 977), page_view("<p>odd</p>")
    monkeypatch.setattr(draw, "CACHE_BYTES", 1 << 20)
    kinds = word_mask, draw.shape_mask, page_view
    most = dict.fromkeys(kinds, 0)
    for i in range(40):
        words = "".join(f"<b style='font-size:{20 + i % 30}'>{i}W{k}</b>" for k in range(30))
        page = f"<div style='border-radius:{40 + i}px;height:200px;background:#f00'>{words}</div>"
        assert page_view(page) is page_view(page) and page_view(page).image(256)
        for kind in kinds:
            most[kind] = max(most[kind], kind.bytes)
    assert all(0 < kind.bytes <= most[kind] <= 1 << 20 for kind in kinds)
    assert word_mask("word", 20.0, False) is word_mask("word", 20.0, False)


def test_no_cache_of_pictures_is_bounded_by_entries():
    found = [f for name, module in sys.modules.items() if name.startswith("tasks.")
             for f in vars(module).values() if hasattr(f, "cache_info")]
    large = [f for f in found if f.__annotations__.get("return") in (Image.Image, View)]
    assert found and not large


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak there")
def test_rendering_takes_little_memory():
    """Pages with other words, sizes and corners each time, drawn at the largest size."""
    look = """
import re
from tasks.html_render import page_view
from tasks.webdev import page_score
def megabytes():
    return int(re.search("VmHWM:.*?([0-9]+)", open("/proc/self/status").read())[1]) / 1024
page_view("<p>x</p>").image(1024)
before = megabytes()
for i in range(50):
    words = "".join(f"<b style='font-size:{9 + i % 50}.{k};border-radius:{i + k}px;background:"
                    f"#f00;width:{40 + i}px'>{'W' * 20}{i * k}</b>" for k in range(20))
    tall = "width:999px;height:999px;border-radius:999px;background:#f00"
    for page in (f"<p style='display:flex;align-items:center;height:1px'><b style='{tall}'>{words}",
                 "<p>" + " ".join(str((7919 * i + 613 * k) % 999_983) for k in range(560))):
        page_view(page).image(1024)
        page_score(page, "<p>hello there</p>")
print(megabytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert 0 < float(done.stdout) < 200


# ---- score --------------------------------------------------------------------------------------

@pytest.mark.parametrize("one,other,gold", [        # Sharma, Wu, Dalal (2005), table 1
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0), ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
    ((50, -0.001, 2.49), (50, 0.0011, -2.49), 4.7461), ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492), ((50, 2.5, 0), (56, -27, -3), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082)])
def test_colour_difference(one, other, gold):
    assert ciede2000(one, other) == pytest.approx(gold, abs=1e-4)
    assert ciede2000(other, one) == pytest.approx(gold, abs=1e-4)


def test_assignment_is_the_cheapest():
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (3, 3), (3, 5), (5, 5)) * 10:
        cost = rng.integers(0, 6, (rows, columns)) / 5
        best = min(sum(cost[i, way[i]] for i in range(rows))
                   for way in itertools.permutations(range(columns), rows))
        assert sum(cost[i, j] for i, j in assign(cost)) == pytest.approx(best)


def damaged(rng, html, share):
    """The page with this share of its texts, and of its colours, replaced."""
    def name():
        return f"{invent(rng, False)} {invent(rng, False)}"
    for form, new in ((r"(?<=>)[^<>\n]+(?=<)", name),
                      (r"#[0-9a-f]{6}", lambda: f"#{int(rng.integers(1 << 24)):06x}")):
        found = list(re.finditer(form, html))
        for i in sorted(rng.permutation(len(found))[:round(share * len(found))], reverse=True):
            html = html[:found[i].start()] + new() + html[found[i].end():]
    return html


@pytest.mark.parametrize("pages", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_the_score_follows_the_damage(pages):
    damage, score = [], []
    for seed in range(pages):
        rng = np.random.default_rng(seed)
        gold = Page(rng, False, seed % 4).html
        assert page_score(gold, gold) == 1
        for share in (0, 0.2, 0.4, 0.6, 0.8):
            damage.append(share)
            score.append(page_score(damaged(rng, gold, share), gold))
    assert spearman(damage, score) <= -0.9


def test_empty_hidden_and_crammed_pages_earn_nothing():
    gold = Page(np.random.default_rng(1), False, 2)
    found = [block.text for block in gold.views[0].blocks]
    said = " ".join(found)
    for html in ("", "<p></p>", "<body></body>", f'<p style="color:#fff">{said}</p>',
                 f'<p style="font-size:2px">{said}</p>', "<p>word</p>" * 150):
        assert page_score(html, gold.html) == 0
    assert 0 < page_score("".join(f"<p>{text}</p>" for text in found), gold.html) < 0.8


def test_relative_rewards():
    assert relative_rewards([0.5, None, 0.9, 0.5]) == [2.5, -1, 4, 2.5]
    assert relative_rewards([0.5, None, 0.9, 0.6], reference=0.6) == [0, -1, 4, 3]
    assert relative_rewards([]) == [] and relative_rewards([0.0]) == [1]


# ---- workflow -----------------------------------------------------------------------------------

def test_a_step_after_a_failed_one_is_blocked():
    chains = [[("see", "first"), ("click", "B"), ("page", "b"), ("gone", "first"),
               ("click", "Tick me"), ("ticked", "Tick me"), ("click", "More"), ("see", "inside")],
              [("click", "nowhere"), ("see", "first")], [("see", "first")]]
    assert run_workflow(SITE, chains) == ["passed"] * 8 + ["failed", "blocked", "passed"]
    assert run_workflow("no page", chains)[:2] == ["failed", "blocked"]


def test_look_and_function_are_scored_separately():
    task = Task("ui_to_code", 0, 4)
    prompt, (reply,), evidence = play_out(task)
    deaf = {**evidence, "reply": re.sub('href="#', 'href="', reply)}
    whole, half = (Rewards().score(task, e).parts for e in (evidence, deaf))
    assert whole == {"look": 1, "works": 1} and half["look"] == 0.5 and half["works"] < 1


# ---- polish -------------------------------------------------------------------------------------

def test_an_edit_fits_one_place_only():
    for old, new in (("aXbXc", "aXbYc"), ("aa", "aaa"), ("abcabc", "abc"), ("<p>x</p>", "")):
        found = re.fullmatch(r"edit\('(.*)', '(.*)'\)", edit_between(old, new))
        assert old.count(found[1]) == 1 and old.replace(*found.groups()) == new


def test_polishing_rewards_gains_and_not_losses():
    task = Task("ui_polish", 3, 2)
    env = make(task)
    env.reset()
    gold, draft = env.chain[0], env.chain[-1]
    assert Rewards().score(task, play_out(task, [box(gold), "done()"])[2]).reward == 1
    for page in (draft, "<p>other</p>", "not a page", "<p>" * 50):
        assert Rewards().score(task, play_out(task, [box(page), "done()"])[2]).reward == 0
    one = Rewards().score(task, play_out(task, [env.glance(None), "done()"])[2]).reward
    assert 0 < one < 1


@pytest.mark.parametrize("page", [
    "<![<|image|>", "<p><!DOCTYPE <|user|>[<!x <|image|>]>", "<p style='font-size:0'>x</p>",
    "<p style='font-size:0.01'>x</p>", "<|image|>", "<p><|image|><|end_of_image|></p>",
    "edit('<', '<![<\\x7cimage|>')", "edit('</body>', '<![<|image|>')"])
def test_polishing_survives_any_page(page):
    task = Task("ui_polish", 1, 2)
    env = make(task)
    env.reset()
    obs = env.step(box(page)).obs
    assert obs.text.count("<|") == obs.text.count(IMAGE) == len(obs.images) == 1
    score = Rewards().score(task, play_out(task, [box(page), "done()"])[2])
    assert score.reward == 0 and not score.error


def test_polishing_shows_the_result_of_each_round():
    env = make(Task("ui_polish", 1, 4))
    first = env.reset()
    replies, seen = env.oracle(), [first.images[1].tobytes()]
    while not (step := env.step(next(replies))).done:
        assert "edits made" in step.obs.text
        seen.append(step.obs.images[0].tobytes())
    assert len(set(seen)) == len(seen) == 4 and seen[-1] == first.images[0].tobytes()
    assert not step.truncated and env.step("done()").done
