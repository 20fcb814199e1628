"""The gym: 36 categories of tasks, one driver for all kinds of episodes, and the reward system.

    python gym.py list                          the categories
    python gym.py sheet                         one instance of each on one picture, docs/gym.png
    python gym.py show point --level=2          many instances of one, out/gym/point.png
    python gym.py play shape_attr               answer as the model would, in the terminal
    python gym.py actions                       the calls that an agent can write, and its goals
    python gym.py check                         the contract that every category keeps
    python gym.py bench                         how fast each category draws

In Python:

    task = gym.Task("shape_attr", seed=3, level=1)      # these fields identify the instance
    env = gym.make(task)
    obs = env.reset()                                   # obs.text, obs.images (PIL, RGB)
    step = env.step("<|begin_of_box|>red<|end_of_box|>")        # step.obs, step.done
    score = gym.Rewards().score(task, env.evidence())   # score.reward in [0, 1], or score.error

`names()` lists the categories, `drive(env)` runs an episode message by message, `demonstrate(task)`
returns conversations in which the oracle answers, and `play_out(task, policy)` plays an episode to
its end. An environment never gives a reward: it returns evidence, and `Rewards` scores it. A
verifier that fails gives an error, never a zero, which would train the model away from a good
reply. The parts lie in tasks/; tasks/README.md explains them and how to add a category.
"""
import lib  # first of all, before torch: see lib/__init__.py

import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from lib.cli import Count, main, Natural, Positive, Range, run_verb, Seed, UserError
from tasks import CATEGORIES, verify
from tasks.actions import ACTIONS, known_goals
from tasks.base import box, Env, IMAGE, Message, Obs, OneShot, Step, Task
from tasks.contact_sheet import contact_sheet
from tasks.contract import check_category, fingerprints, in_fresh_process
from tasks.draw import sheet, strip, tile
from tasks.driver import begin, demonstrate, drive, make, names, play_out
from tasks.rewards import one_line, Rewards, Score

__all__ = ["begin", "CATEGORIES", "demonstrate", "drive", "Env", "IMAGE", "make", "Message",
           "names", "Obs", "OneShot", "play_out", "Rewards", "Score", "Step", "Task"]

Level = Annotated[int, Range(0, 4)]


def check_task(task: Task):
    """Raise UserError unless the task can be made."""
    try:
        make(task)
    except ValueError as error:
        raise UserError(str(error)) from None


def save(picture, path: str):
    """Write a picture and print its path. Raises UserError if the path names no known format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path, optimize=True)
    except ValueError as error:                 # Pillow knows no format of that name
        raise UserError(f"{path} can't be written: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} can't be written: Pillow can only read {error}") from None
    print(path)


# ---- list ---------------------------------------------------------------------------------------

@dataclass
class List:
    pass


def list_categories(args: List):
    """Print the table of categories. chance: the score of the best guess without the picture."""
    print(f"{'category':16} {'family':11} tier verifier turns layout   pixels chance 0-4")
    for name, category in CATEGORIES.items():
        env = category.env
        chance = " ".join(f"{env.chance(level):.2f}" for level in range(5))
        print(f"{name:16} {env.family:11} {env.tier:4} {env.verifier:8} {env.max_turns:5} "
              f"{env.layout:8} {env.min_pixels:6} {chance}")


# ---- actions ------------------------------------------------------------------------------------

@dataclass
class Actions:
    pass


def list_actions(args: Actions):
    """Print the action language: its calls, how turns follow each other, how goals are worded."""
    print("An action is a Python call with literal arguments, one a turn. It is parsed and never\n"
          "evaluated. Coordinates are integers from 0 to 999 of the picture as it is seen: 0 is\n"
          "its left or upper edge, 999 its right or lower one, whatever its size in pixels.\n")
    for verb in ACTIONS.values():
        used = textwrap.wrap(", ".join(verb.categories), 70)
        print(f"{verb.usage:<30}{verb.does}", *used, sep="\n" + " " * 30)
    by_layout = {"segment": [], "append": []}
    for name, category in CATEGORIES.items():
        if category.env.max_turns > 1:
            by_layout[category.env.layout].append(name)
    form, search = demonstrate(Task("gui_form", 2, 2)), demonstrate(Task("text_tools", 0))
    print(f"\nThe segment layout, of {', '.join(by_layout['segment'])}: every turn is a new\n"
          "conversation of one message. It has the current screen, the goal, and below it the\n"
          "earlier actions, one a line; ? and a reason take the place of a reply that was no\n"
          "valid action. The last turn of an episode:\n")
    print(textwrap.indent(f"{form[-1][0].text}\n> {form[-1][1].text}", "    "))
    print(f"\nThe append layout, of {', '.join(by_layout['append'])}: one\n"
          "conversation, in which every reply is followed by an observation. An episode:\n")
    for message in search[0]:
        mark = "> " if message.role == "assistant" else ""
        for line in message.text.splitlines():
            print(textwrap.fill(mark + line, 96, initial_indent="    ", subsequent_indent="    "))
    print("\nGoals as training words them, some of each kind. At level 0 only the first one or two "
          "of a\nkind occur.\n")
    for name, category in CATEGORIES.items():
        if category.env.family == "agent":
            kinds = known_goals(name)
            most = 2 if len(kinds) > 2 else 5       # wordings of each kind that are printed
            goals = [" | ".join(forms[:most]) for forms in kinds]
            if not kinds:
                text = make(Task(name, 0)).reset().text.replace(IMAGE, "")
                goals = [f"such as: {text.splitlines()[0]}"]
            lines = [line for goal in goals for line in textwrap.wrap(goal, 80)]
            print(f"{name:<18}" + ("\n" + " " * 18).join(lines))


# ---- sheet --------------------------------------------------------------------------------------

@dataclass
class Sheet:
    out: str = "docs/gym.png"     # the PNG to write


def save_contact_sheet(args: Sheet):
    """Draw one instance of every category on one picture."""
    save(contact_sheet(), args.out)


# ---- show ---------------------------------------------------------------------------------------

@dataclass
class Show:
    name: str = ""                # the category; also as a bare word on the command line
    level: Level = 0              # 0 (easy) to 4
    all_levels: bool = False      # show levels 0 to 4 instead
    count: Annotated[int, Range(1, 1000)] = 12  # instances of each level
    seed: Seed = 0                # of the first instance
    split: str = "train"          # train; any other word is a held-out split
    pixels: Natural = 0           # side of the picture; 0 = the smallest that can be read
    out: str = ""                 # the PNG to write; default: out/gym/NAME.png


def turn_tiles(task: Task) -> list:
    """One tile for each turn of a demonstration: pictures, question and reply."""
    tiles = []
    for conversation in demonstrate(task):
        for asked, said in zip(conversation[::2], conversation[1::2]):
            caption = (f"{asked.text.replace(IMAGE, '')}\n> "
                       f"{verify.boxed(said.text) or said.text}")
            tiles.append(tile(strip(asked.images), caption, 192 * len(asked.images)))
    return tiles


def show(args: Show):
    """Save a picture of several instances with their questions and answers."""
    check_task(Task(args.name, args.seed, args.level, args.split, args.pixels))
    rows = []
    for level in range(5) if args.all_levels else [args.level]:
        tasks = [Task(args.name, args.seed + i, level, args.split, args.pixels)
                 for i in range(args.count)]
        if CATEGORIES[args.name].env.max_turns > 1:         # an episode is a row
            rows += [turn_tiles(task) for task in tasks]
        else:                                               # only the task's own question
            tiles = [turn_tiles(task)[0] for task in tasks]
            columns = max(1, 1300 // max(picture.width for picture in tiles))
            rows += [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
    save(sheet(rows), args.out or f"out/gym/{args.name}.png")


# ---- play ---------------------------------------------------------------------------------------

@dataclass
class Play:
    name: str = ""                # the category; also as a bare word on the command line
    level: Level = 0              # 0 (easy) to 4
    seed: Seed = 0                # which instance
    split: str = "train"          # train; any other word is a held-out split
    pixels: Natural = 0           # side of the picture; 0 = the smallest that can be read
    script: str = ""              # replies in place of the keyboard, separated by semicolons
    out: str = ""                 # PNG of the current turn; default: out/gym/play_NAME.png


def read_replies(script: str):
    """Yield the replies of a script, or those that are typed."""
    if not script:
        while True:
            yield input("> ")
    for line in script.split(";"):
        print(">", line.strip())
        yield line.strip()


def play(args: Play):
    """Answer one instance yourself; the pictures of each turn are saved as a PNG. Two examples that
    solve their tasks:

    python gym.py play shape_attr --script=triangle
    python gym.py play gui_form --script="click(375, 375); click(500, 874)"
    """
    task = Task(args.name, args.seed, args.level, args.split, args.pixels)
    check_task(task)
    episode, replies = drive(make(task)), read_replies(args.script)
    messages = next(episode)
    # Box marks are tedious to type: where the right reply has them, they are put around what is
    # typed.
    boxed = verify.BEGIN in play_out(task)[1][0]
    try:
        while True:
            if messages[-1].images:
                save(strip(messages[-1].images), args.out or f"out/gym/play_{args.name}.png")
            print(messages[-1].text.replace(IMAGE, ""))
            reply = next(replies, None)
            if reply is None:
                print("the script ended before the task did")
                return
            if boxed and verify.BEGIN not in reply and reply != "done()":
                reply = box(reply)
            messages = episode.send(reply)
    except StopIteration as end:
        score = Rewards().score(task, end.value)
        print(f"reward {score.reward:.2f} {score.error or score.parts} "
              f"(gold: {end.value.get('gold')!s:.500})")
    except EOFError:
        print("stopped")


# ---- check --------------------------------------------------------------------------------------

@dataclass
class Check:
    names: list[str] = field(default_factory=list)  # categories, also as bare words; default: all
    level: Literal["ends", "0", "1", "2", "3", "4"] = "ends"    # 0 (easy) to 4; ends = 0 and 4
    all_levels: bool = False      # check levels 0 to 4 instead
    count: Count = 200            # instances of each category and level
    split: str = "train"          # train; any other word is a held-out split
    pixels: Natural = 0           # side of the picture; 0 = the smallest that can be read
    jobs: Positive = 1            # processes side by side


def check(args: Check):
    """Measure every clause of the contract (tasks/contract.py lists them). The exit code is 1 when
    one is broken."""
    for name in args.names:
        check_task(Task(name, 0, split=args.split, pixels=args.pixels))
    levels = [0, 4] if args.level == "ends" else [int(args.level)]
    cases = [(name, level, args.split, args.pixels, args.count)
             for name in args.names or names()
             for level in (range(5) if args.all_levels else levels)]

    def measure(case):
        try:
            if args.jobs > 1:
                return in_fresh_process("check_category", *case)
            return check_category(*case)
        except Exception as error:              # a fault in one category must not hide the others
            return {}, [one_line(error)]

    broken, tasks = [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        # A single job runs in this thread: Ctrl-C ends it at once, and would wait for another one.
        results = pool.map(measure, cases) if args.jobs > 1 else map(measure, cases)
        for i, (case, (row, violations)) in enumerate(zip(cases, results)):
            name, level, *_ = case
            if row and not tasks:               # the first row that could be measured
                print(f"{'category':16} lv", *(f"{key:>8}" for key in row))
            print(f"{name:16} {level:2}", *(f"{value:8.3f}" for value in row.values()), flush=True)
            if sys.stderr.isatty():
                print(f"{i + 1}/{len(cases)}", end="\r", file=sys.stderr, flush=True)
            broken += [f"{name}, level {level}: {clause}" for clause in violations]
            if row:
                tasks += [Task(name, seed, level, args.split, args.pixels) for seed in range(5)]
    # The same five fields must give the same bytes in every process.
    there, here = in_fresh_process("fingerprints", tasks), fingerprints(tasks)
    differ = [task for task, one, other in zip(tasks, there, here) if one != other]
    broken += dict.fromkeys(f"{task.category}, level {task.level}: not the same in a fresh process"
                            for task in differ)
    print("\n".join(broken) or "the contract holds")
    if broken:
        sys.exit(1)


# ---- bench --------------------------------------------------------------------------------------

@dataclass
class Bench:
    names: list[str] = field(default_factory=list)  # categories, also as bare words; default: all
    count: Count = 200            # instances of each category, levels 0 to 4 in turn
    split: str = "train"          # train; any other word is a held-out split
    pixels: Natural = 0           # side of the picture; 0 = the smallest that can be read


def bench(args: Bench):
    """Measure how fast instances are drawn and, where there are several turns, stepped through."""
    for name in args.names:
        check_task(Task(name, 0, split=args.split, pixels=args.pixels))
    print(f"{'category':16} pixels  a second  ms each  ms a step")
    rates, warmup = [], 5                       # the first 5 fill the caches of masks: not counted
    for name in args.names or names():
        draws, steps = [], []
        for seed in range(-warmup, args.count):
            env = make(Task(name, abs(seed), abs(seed) % 5, args.split, args.pixels))
            start = time.perf_counter()
            env.reset()
            draws.append(time.perf_counter() - start)
            if env.max_turns > 1 and 0 <= seed < 20:
                for reply in env.oracle():
                    start = time.perf_counter()
                    env.step(reply)
                    steps.append(time.perf_counter() - start)
        rates.append((len(draws) - warmup) / sum(draws[warmup:]))
        print(f"{name:16} {env.pixels:6} {rates[-1]:9.0f} {1000 * np.median(draws[warmup:]):8.2f}",
              f"{1000 * np.median(steps):10.2f}" if steps else "", flush=True)
    print(f"{'median':16} {np.median(rates):16.0f}")


# ---- the command line ---------------------------------------------------------------------------

VERBS = {                       # verb: (options, function, the option that bare words are for)
    "list": (List, list_categories, None), "actions": (Actions, list_actions, None),
    "sheet": (Sheet, save_contact_sheet, None),
    "show": (Show, show, "name"), "play": (Play, play, "name"),
    "check": (Check, check, "names"), "bench": (Bench, bench, "names")}


def entry(argv: list[str] | None = None):
    """Run a verb. Exit codes: 0, 1 for a broken contract, 2 for bad input, 130 for Ctrl-C."""
    run_verb(VERBS, __doc__, argv)


if __name__ == "__main__":
    main(entry)
