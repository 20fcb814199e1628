"""`sample.act` uses web pages: it sees a screenshot of headless Chromium, and its clicks are made.

    python -m recipes.browser                           a form; each action is printed
    python -m recipes.browser --page=dialog --seed=3 --ckpt=ckpt/demo --film=out/dialog.gif
    python -m recipes.browser --page=list --count=100   how often the goal is reached
    python -m recipes.browser --oracle                  the page's own actions, without a model

The pages in recipes/browser look like the gym's screens of level 0, since a model of this size is
lost on others. The title of a page is the goal, and at the end "reached" or "missed".
"""
import lib  # first of all, before torch: see lib/__init__.py

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sample
from data import task_pixels
from lib.cli import cli, Count, main, Seed
from lib.film import film, save_film, Shot, Verdict
from recipes.webdriver import browser
from tasks.verify import parse_action

SIDE, TURNS = 512, 8            # of the window in CSS pixels; actions on a page, at most


@dataclass
class Args:
    page: Literal["form", "list", "dialog"] = "form"  # which of the pages in recipes/browser
    seed: Seed = 0                # of the first page; the next one has the next seed
    count: Count = 1              # pages
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    film: str = ""                # GIF of the last page
    oracle: bool = False          # ask the page for the right action instead of a model


def carry_out(window, name: str, args: list):
    """Make an action on the page. Other ones, such as remember("7"), change nothing there."""
    if name == "click":
        window.click(*(min(SIDE - 1, place * SIDE // 999) for place in args))
    elif name == "scroll":
        window.scroll(SIDE / 2 if args == ["down"] else -SIDE / 2)
    elif name == "type":
        window.type(args[0])


def play(window, choose) -> tuple[str, list[Shot], bool]:
    """Play the page to its end -> (goal, turns, whether it is reached).
    choose(screen, goal, earlier actions) -> the next action as text."""
    goal, shots = window.title, []
    print(goal)
    while window.title == goal and len(shots) < TURNS:
        screen = window.screenshot()
        action = choose(screen, goal, [shot.action for shot in shots])
        print(f"  {action}")
        name, args = parse_action(action) or ("", [])
        shots.append(Shot([screen], action=action, mark=tuple(args) if name == "click" else (),
                          marked=screen))
        carry_out(window, name, args)
        if name in ("done", "answer"):
            break
    print("  not reached" if window.title == goal else f"  {window.title}")
    return goal, shots, window.title == "reached"


def drive(args: Args):
    """Play pages and print how often the goal was reached."""
    model, *_ = sample.load(args.ckpt, "auto", "auto")
    page, reached = Path(__file__).parent / "browser" / f"{args.page}.html", 0
    with browser(SIDE, SIDE, task_pixels("gui_form", model.config)) as window:
        by_model = lambda *seen: str(sample.act(model, *seen))
        by_page = lambda *seen: window.run("return oracle()")
        for seed in range(args.seed, args.seed + args.count):
            window.open(f"{page.as_uri()}?{seed}")
            goal, shots, good = play(window, by_page if args.oracle else by_model)
            reached += good
    print(f"{reached} of {args.count} reached the goal")
    if args.film:
        Path(args.film).parent.mkdir(parents=True, exist_ok=True)
        end = Verdict(good, "the goal is reached" if good else "the goal is not reached")
        save_film(film(goal, f"{page.name}, seed {seed}", shots, end), args.film)


if __name__ == "__main__":
    main(lambda: drive(cli(Args, about=__doc__)))
