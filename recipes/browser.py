"""`sample.act` uses web pages: it sees a screenshot of headless Chromium, and its clicks are made.

    python -m recipes.browser                           a form; each turn is printed
    python -m recipes.browser --page=dialog --seed=3 --ckpt=ckpt/demo --film=out/dialog.png
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
from recipes.webdriver import browser
from tasks.draw import strip
from tasks.verify import parse_action

SIDE, TURNS = 512, 8            # side of the window in CSS pixels; actions on a page, at most


@dataclass
class Args:
    page: Literal["form", "list", "dialog"] = "form"  # which of the pages in recipes/browser
    seed: Seed = 0                # of the first page; the next one has the next seed
    count: Count = 1              # pages
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    film: str = ""                # picture file for the screens of the last page
    oracle: bool = False          # ask the page for the right action instead of a model


def carry_out(page, action: str) -> bool:
    """Make an action on the page -> whether it is the last one. What is no action is ignored."""
    name, args = parse_action(action) or ("", [])
    if name == "click":
        page.click(args[0] / 999 * page.width, args[1] / 999 * page.height)
    elif name == "scroll":
        page.scroll(page.height / 2 if args == ["down"] else -page.height / 2)
    elif name == "type":
        page.type(args[0])
    elif name == "back":
        page.back()
    return name in ("done", "answer")


def play(page, address: str, choose) -> tuple[bool, list]:
    """Play one page to its end -> (whether the goal is reached, all screens).
    choose(screen, goal, earlier actions) -> the next action as text."""
    page.open(address)
    goal, screens, history, ended = page.title, [page.screenshot()], [], False
    print(goal)
    while page.title == goal and len(history) < TURNS and not ended:
        history.append(choose(screens[-1], goal, history))
        ended = carry_out(page, history[-1])
        screens.append(page.screenshot())
        print(f"  {history[-1]}")
    print(f"  {'not reached' if page.title == goal else page.title}")
    return page.title == "reached", screens


def drive(args: Args):
    """Play pages and print how often the goal was reached."""
    model, *_ = sample.load(args.ckpt, "cpu", "auto")
    folder, seeds = Path(__file__).parent / "browser", range(args.seed, args.seed + args.count)
    with browser(SIDE, SIDE, task_pixels("gui_form", model.config)) as page:
        by_model = lambda *seen: str(sample.act(model, *seen))
        by_page = lambda *seen: page.run("return oracle()")
        played = [play(page, f"{(folder / args.page).as_uri()}.html?{seed}",
                       by_page if args.oracle else by_model) for seed in seeds]
    print(f"{sum(reached for reached, _ in played)} of {args.count} reached the goal")
    if args.film:
        strip(played[-1][1]).save(args.film)


if __name__ == "__main__":
    main(lambda: drive(cli(Args, about=__doc__)))
