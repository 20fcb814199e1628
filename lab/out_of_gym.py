"""Does a model click outside its gym? The gym's small screens, drawn by a browser as HTML.

    python -m lab.out_of_gym                     the model in ckpt/gym, a minute or two
    python -m lab.out_of_gym --ckpt=ckpt/demo    the demo's, which knows fewer categories

Held-out tasks of `gui_click` at level 0, answered greedily. `gym` is the gym's own picture,
`browser` the same buttons at the same places as HTML in Chromium, without the gym's decoration.
Each further row changes one thing in the way of people's screens: a white page, words set as
ordinary text, all buttons beside the grid, smaller ones, a taller screen with buttons far apart.
Grey buttons can't be named by their colour; the row to compare them with is `named by label`, the
same tasks in colour.
"""
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import gym
from data import document, task_pixels
from engine import Engine, Request
from lab import report
from lib.cli import check_options, cli, Count, Device, Dtype, main, Seed, UserError
from lib.common import write_json, write_text
from lib.images import open_image
from lib.scoring import interval
from sample import load
from tasks.base import IMAGE, Message, Task
from tasks.draw import CELL, font, ink_on, OUTLINES, SHAPES, sheet, tile, UNITS
from tasks.verify import inside, is_point, parse_action

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS, ON_A_PAGE = 10, 200    # screens side by side, and of one page: Chromium starts once a page
WHITE = (255, 255, 255)
SHOWN = 6                       # screens of each row on the sheet
MAX_NEW = 48                    # tokens of a reply at most


@dataclass
class Args:
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    count: Count = 200            # held-out screens
    seed: Seed = 1_000_000        # of the first task; the next one has the next seed
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16
    out: str = "out/out_of_gym"   # folder: report.json, report.html, screens.png, the HTML pages


# ---- screens ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Screen:
    """What the HTML of a screen with n buttons is made from."""
    goal: str
    target: int                 # which of the buttons the goal names
    size: np.ndarray            # (2,): width and height in pixels
    ground: tuple               # colour of the page
    labels: tuple               # n times a word, the name of a shape, or ""
    paints: tuple               # n times (fill, edge), or None for the browser's own grey button
    areas: np.ndarray           # (n, 4): x0, y0, x1, y1 in pixels
    letters: bool = True        # each letter in a cell of its own; else a word is ordinary text

    def gold(self) -> list:
        """The target's x0, y0, x1, y1 in the 0-999 of answers."""
        return (self.areas[self.target] * 999 / np.tile(self.size, 2)).tolist()


def commonest(pixels: np.ndarray) -> tuple:
    """The colour that most pixels of a picture have."""
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return tuple(colors[counts.argmax()].tolist())


def read_screen(task: Task) -> tuple[Screen, Image.Image]:
    """The screen of a task of gui_click, and the gym's own picture of it. A widget knows only the
    name of its colour: the shade is read from the picture, in the middle of its upper edge. A
    widget without a colour becomes one of the browser's grey buttons."""
    env = gym.make(task)
    obs = env.reset()
    picture = obs.images[0]
    pixels, side = np.asarray(picture), picture.width
    areas = np.array([widget.area for widget in env.shown]) * side / 999
    areas = areas.round().astype(int)
    ground, paints = commonest(pixels), []
    for widget, (x0, y0, x1, _) in zip(env.shown, areas):
        edge = commonest(pixels[y0, (2 * x0 + x1) // 3:(x0 + 2 * x1) // 3])
        fill = ground if widget.kind == "outlined" else edge
        paints.append((fill, edge) if widget.color else None)
    labels = tuple(widget.label for widget in env.shown)
    target = [widget.area for widget in env.shown].index(env.evidence()["gold"]["box"])
    return Screen(obs.text.replace(IMAGE, ""), target, np.array([side, side]), ground, labels,
                  tuple(paints), areas), picture


# ---- changes: (Screen, random generator) -> Screen, or None where it makes no sense --------------

def white(screen: Screen, rng) -> Screen:
    """A white page, also inside of buttons that are only outlined."""
    paints = tuple(paint and (WHITE if paint[0] == screen.ground else paint[0], paint[1])
                   for paint in screen.paints)
    return replace(screen, ground=WHITE, paints=paints)


def as_text(screen: Screen, rng) -> Screen:
    return replace(screen, letters=False)


def by_label(screen: Screen, rng) -> Screen | None:
    """The goal names the button by its word or icon; None where it has none of its own."""
    label = screen.labels[screen.target]
    if not label or screen.labels.count(label) > 1:
        return None
    return replace(screen, goal=f"Click {'the ' * (label in SHAPES)}{label}.")


def grey(screen: Screen, rng) -> Screen | None:
    named = by_label(screen, rng)
    return named and replace(named, paints=(None,) * len(named.paints))


def move(screen: Screen, rng, most: float) -> Screen:
    """All buttons moved by the same random number of whole pixels, at most `most` in each
    direction, so that they stay inside the picture."""
    least = np.maximum(-most, -screen.areas[:, :2].min(0))
    largest = np.minimum(most, screen.size - screen.areas[:, 2:].max(0))
    by = rng.integers(np.ceil(least), np.floor(largest) + 1)
    return replace(screen, areas=screen.areas + np.tile(by, 2))


def half_a_cell(screen: Screen, rng) -> Screen:
    return move(screen, rng, CELL / 2 * screen.size[0] / UNITS)


def three_quarters(screen: Screen, rng) -> Screen:
    """All buttons and the spaces between them at 3/4 of their size, at a random place."""
    return move(replace(screen, areas=0.75 * screen.areas), rng, screen.size[0])


def tall(screen: Screen, rng) -> Screen:
    """A screen of 160 x 210 units instead of 64 x 64, with buttons of the same size. Their middles
    move apart as the sides grow, so buttons that were disjoint stay so."""
    growth = np.array([160, 210]) / UNITS
    middles = (screen.areas[:, :2] + screen.areas[:, 2:]) / 2
    return replace(screen, size=(screen.size * growth).round().astype(int),
                   areas=screen.areas + np.tile(middles * (growth - 1), 2))


ROWS = {                        # the changes of each row, one after the other
    "gym": (),
    "browser": (),
    "white page": (white,),
    "words as text": (as_text,),
    "half a cell": (half_a_cell,),
    "three quarters": (three_quarters,),
    "160 x 210": (tall,),
    "named by label": (by_label,),
    "grey buttons": (grey,),
    "all together": (white, as_text, grey, three_quarters, tall),
}


def changed(screen: Screen, changes: tuple, seed: int) -> Screen | None:
    """The screen after all `changes`, or None where one of them makes no sense."""
    rng = np.random.default_rng(seed)
    for change in changes:
        screen = screen and change(screen, rng)
    return screen


# ---- HTML ---------------------------------------------------------------------------------------

STYLE = """body { margin: 0 } div { position: absolute; overflow: hidden }
button { position: absolute; padding: 0; line-height: 0; font-family: Arial, sans-serif }
svg { display: block; margin: auto; fill: currentColor }
span { display: inline-block; width: 46.6% }"""


def place(x0, y0, x1, y1) -> str:
    """Position and size in pixels, as CSS."""
    return f"left:{x0:g}px;top:{y0:g}px;width:{x1 - x0:g}px;height:{y1 - y0:g}px"


def label_html(label: str, height: float, letters: bool) -> str:
    """A label: a word, or an icon as SVG, which has 5/7 of its button's height as in the gym."""
    if label in SHAPES:
        corners = " ".join(f"{x:.3f},{y:.3f}" for x, y in OUTLINES.get(label, ()))
        drawn = f'<polygon points="{corners}"/>' if corners else '<circle cx=".5" cy=".5" r=".5"/>'
        return f'<svg viewBox="0 0 1 1" width="{5 / 7 * height:g}">{drawn}</svg>'
    if letters and len(label) == 2:
        return "".join(f"<span>{escape(char)}</span>" for char in label)
    return escape(label)


def screen_html(screen: Screen, x: int = 0, y: int = 0) -> str:
    """A screen whose top left corner is at (x, y) of the page."""
    parts = []
    for label, paint, area in zip(screen.labels, screen.paints, screen.areas.tolist()):
        width, height = area[2] - area[0], area[3] - area[1]
        # As large as the button allows. A capital has 0.72 of a common font's size, as of ours.
        size = min(height, 0.8 * width * 32 / font(32).getlength(label or "-"))
        style = f"{place(*area)};font-size:{size:.3g}px"
        if paint:
            fill, edge = paint
            style += (f";border:0;border-radius:{3 / 14 * height:.3g}px;color:rgb{ink_on(fill)};"
                      f"background:rgb{fill};box-shadow:inset 0 0 0 {height / 7:.3g}px rgb{edge}")
        inner = label_html(label, height, screen.letters)
        parts.append(f'<button style="{style}">{inner}</button>')
    style = f"{place(x, y, x + screen.size[0], y + screen.size[1])};background:rgb{screen.ground}"
    return f'<div style="{style}">{"".join(parts)}</div>'


def find_browser() -> str:
    """The path of a Chromium. Raises UserError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise UserError(f"no browser: none of {', '.join(BROWSERS)} is on the PATH; on Debian the "
                        "package chromium has it (apt-get install chromium)")
    return found


def photograph(browser: str, screens: list[Screen], page: Path) -> list[Image.Image]:
    """The browser's pictures of screens of one size. All are drawn on one page, since a start takes
    a second, and its screenshot is cut up; the page is kept as `page`, beside its screenshot."""
    width, height = screens[0].size.tolist()
    corners = [(i % COLUMNS * width, i // COLUMNS * height) for i in range(len(screens))]
    body = "\n".join(screen_html(screen, *at) for screen, at in zip(screens, corners))
    write_text(page, f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>\n{body}\n')
    shot = page.with_suffix(".png")
    shot.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   "--force-device-scale-factor=1", "--no-first-run", f"--user-data-dir={profile}",
                   "--disable-background-networking", f"--screenshot={shot.resolve()}",
                   f"--window-size={COLUMNS * width},{max(640, corners[-1][1] + height)}",
                   page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                  timeout=120)
        except subprocess.TimeoutExpired:
            raise UserError(f"{browser} has not drawn {page} within two minutes") from None
    if not shot.exists():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{browser} could not draw {page}: {last[:200]}")
    whole = open_image(shot)
    return [whole.crop((x, y, x + width, y + height)) for x, y in corners]


def screens_of(name: str, tasks: list[Task], browser: str, folder: Path) -> tuple[list, list]:
    """(screens, their pictures) of a row: for `gym` the gym's own pictures, else the browser's,
    whose pages are kept in `folder`. Tasks in which a change makes no sense are left out."""
    plain, drawn = zip(*map(read_screen, tasks))
    made = [changed(screen, ROWS[name], task.seed) for screen, task in zip(plain, tasks)]
    screens, pictures = [screen for screen in made if screen], []
    if name == "gym":
        return screens, list(drawn)
    for i in range(0, len(screens), ON_A_PAGE):
        page = folder / f"{name.replace(' ', '_')}_{i // ON_A_PAGE}.html"
        pictures += photograph(browser, screens[i:i + ON_A_PAGE], page)
    return screens, pictures


# ---- measuring ----------------------------------------------------------------------------------

def ask(model, tokens, questions: list[str], pictures: list[Image.Image]) -> list[str]:
    """The model's greedy replies to questions, each about the picture at the same place."""
    prompts = [document([Message("user", IMAGE + question, (picture,))], tokens, model.config,
                        answer=True) for question, picture in zip(questions, pictures)]
    context = max(len(prompt.ids) for prompt in prompts) + MAX_NEW + 1
    engine = Engine(model, min(64, len(prompts)), context)
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    order = {engine.submit(Request(prompt, MAX_NEW)): i for i, prompt in enumerate(prompts)}
    replies = [""] * len(prompts)
    while engine.busy:
        for result in engine.step():
            ended = result.ids[-1] in engine.stops
            replies[order[result.id]] = tokens.decode(result.ids[:-1] if ended else result.ids)
    return replies


def point(reply: str) -> tuple | None:
    """Where a reply clicks, in 0-999; None if it is no click."""
    name, args = parse_action(reply) or ("", [])
    return tuple(args) if name == "click" and is_point(args) else None


def right(screen: Screen, reply: str) -> bool:
    """Whether the reply clicks in the target."""
    at = point(reply)
    return at is not None and inside(at, screen.gold())


def score(screens: list[Screen], replies: list[str]) -> dict:
    """The figures of one row. A random click is anywhere, a random button is clicked in it."""
    points, n = [point(reply) for reply in replies], len(screens)
    share = sum(map(right, screens, replies)) / n
    low, high = interval(share, n)
    golds = [screen.gold() for screen in screens]
    return {"right, %": 100 * share, "from": 100 * low, "to": 100 * high,
            "no click, %": 100 * points.count(None) / n, "points": len({*points} - {None}),
            "random button, %": 100 * sum(1 / len(screen.labels) for screen in screens) / n,
            "random click, %": 100 * sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in golds)
            / (n * 999 ** 2), "screens": n}


def marked(name: str, screen: Screen, picture: Image.Image, reply: str) -> Image.Image:
    """An enlarged screen with its goal and the reply; a ring marks the click, green if right."""
    scale, at = max(1, 192 // picture.width), point(reply)
    size = picture.width * scale, picture.height * scale
    big = picture.resize(size, Image.Resampling.NEAREST)
    if at:
        middle = at[0] * big.width / 999, at[1] * big.height / 999
        pen = ImageDraw.Draw(big)
        pen.circle(middle, 9, outline="white", width=6)
        pen.circle(middle, 8, outline="lime" if right(screen, reply) else "red", width=4)
    return tile(big, f"{name}: {screen.goal}\n{reply}")


def show(figures: dict[str, dict]):
    """Print the table."""
    print(f"{'':<16}{'right':>6}  {'95% interval':<14}{'no click':>8}{'points':>8}"
          f"{'any button':>12}{'any place':>11}{'n':>5}")
    for name, row in figures.items():
        share, low, high, other, points, button, anywhere, n = row.values()
        print(f"{name:<16}{share:>5.1f}%  {f'{low:.1f}-{high:.1f}%':<14}{other:>7.1f}%{points:>8}"
              f"{button:>11.1f}%{anywhere:>10.1f}%{n:>5}")


def out_of_gym(args: Args):
    """Measure all rows, print the table, write report.json, screens.png and the page."""
    check_options(args)
    browser, out = find_browser(), Path(args.out)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    version = subprocess.run([browser, "--version"], capture_output=True, text=True,
                             errors="replace").stdout
    where = f"{hw.description}; {version.strip()}"
    out.mkdir(parents=True, exist_ok=True)
    side = task_pixels("gui_click", model.config)
    tasks = [Task("gui_click", args.seed + i, 0, "test", side) for i in range(args.count)]
    figures, tiles = {}, []
    for name in ROWS:
        screens, pictures = screens_of(name, tasks, browser, out)
        if not screens:                     # of very few screens, none may have a label of its own
            continue
        replies = ask(model, tokens, [screen.goal for screen in screens], pictures)
        figures[name] = score(screens, replies)
        tiles.append([marked(name, *parts) for parts in zip(screens[:SHOWN], pictures, replies)])
    print(where)
    show(figures)
    sheet(tiles).save(out / "screens.png")
    write_json(out / "report.json", {
        "title": "Clicks outside the gym", "hardware": where, "seed": args.seed,
        "ckpt": args.ckpt or "ckpt/gym", "figures": figures,
        "note": "Right: the click lies in the named button; from, to: the 95% interval. Points: "
                "how many different places were clicked. Random: what a click on any of the "
                "buttons, and one anywhere, would hit on average.",
        "pictures": [("screens.png", "Green ring: a right click. Red ring: a wrong one.")]})
    print(f"the report is {report.write(out)}")


if __name__ == "__main__":
    main(lambda: out_of_gym(cli(Args, about=__doc__)))
