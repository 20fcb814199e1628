"""The gym: categories by name, one driver for every layout, and the reward system.

    python gym.py list                          the categories
    python gym.py show point --level 2          a sheet of instances, out/gym/point.png
    python gym.py check                         the contract that every category keeps
    python gym.py play gui_form                 be the model, in the terminal
    python gym.py bench                         how fast each category draws

An environment gives no reward; it hands out evidence, and `Rewards` judges that. The two know
each other only through the table RULES, so a verifier can be mended without touching a task, and
a verifier that fails gives an error, never a zero that would train the model away from its work.
"""
import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tasks import CATEGORIES, verify
from tasks.base import box, Env, IMAGE, Message, Obs, Step, Task
from tasks.contract import examine, fingerprints, in_fresh_process
from tasks.draw import sheet, strip, tile
from tasks.driver import begin, demonstrate, drive, make, names, play_out
from tasks.rewards import one_line, Rewards, Score


# --------------------------------------------------------------------------------- the command line

def verb_list(args):
    """Print the table of categories."""
    print(f"{'category':16} {'family':11} tier verifier turns layout   pixels chance 0-4")
    for name, kind in ((name, c.env) for name, c in CATEGORIES.items()):
        chance = " ".join(f"{kind.chance(level):.2f}" for level in range(5))
        print(f"{name:16} {kind.family:11} {kind.tier:4} {kind.verifier:8} {kind.max_turns:5} "
              f"{kind.layout:8} {kind.min_pixels:6} {chance}")


def levels(args, default):
    return range(5) if args.all_levels else [args.level] if args.level is not None else default


def verb_show(args):
    """Save a sheet of instances with their questions and answers."""
    rows = []
    for level in levels(args, [0]):
        tiles = []
        for seed in range(args.seed, args.seed + args.count):
            talks = demonstrate(Task(args.name, seed, level, args.split, args.pixels))
            turns = [talk[i:i + 2] for talk in talks for i in range(0, len(talk), 2)]
            many = CATEGORIES[args.name].env.max_turns > 1      # then an episode is a row
            frames = [tile(strip(asked.images), f"{asked.text.replace(IMAGE, '')}\n> "
                           f"{verify.boxed(said.text) or said.text}", 192 * len(asked.images))
                      for asked, said in (turns if many else turns[:1])]
            rows += [frames] if many else []
            tiles += [] if many else frames
        row = max(1, 1300 // max((t.width for t in tiles), default=1))
        rows += [tiles[i:i + row] for i in range(0, len(tiles), row)]
    save(sheet(rows), args.out or f"out/gym/{args.name}.png")


def save(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(path)


def verb_check(args):
    """Measure every clause of the contract; exit code 1 when one is broken."""
    cases = [(name, level, args.split, args.pixels, args.count)
             for name in args.names or names() for level in levels(args, [0, 4])]
    broken, tasks = [], []

    def work(case):
        try:
            return in_fresh_process("examine", *case) if args.jobs > 1 else examine(*case)
        except Exception as error:              # one category's fault hides no other's
            return {}, [one_line(error)]

    with ThreadPoolExecutor(args.jobs) as pool:
        for i, (case, (row, wrong)) in enumerate(zip(cases, pool.map(work, cases))):
            name, level, *_ = case
            if not i:
                print(f"{'category':16} lv", *(f"{key:>8}" for key in row))
            print(f"{name:16} {level:2}", *(f"{value:8.3f}" for value in row.values()), flush=True)
            if sys.stderr.isatty():
                print(f"{i + 1}/{len(cases)}", end="\r", file=sys.stderr, flush=True)
            broken += [f"{name}, level {level}: {clause}" for clause in wrong]
            tasks += [Task(name, seed, level, args.split, args.pixels)
                      for seed in range(5) if row]
    both = zip(tasks, in_fresh_process("fingerprints", tasks), fingerprints(tasks))
    broken += dict.fromkeys(f"{task.category}, level {task.level}: not the same in a fresh process"
                            for task, there, here in both if there != here)
    print("\n".join(broken) or "the contract holds")
    return 1 if broken else 0


def verb_bench(args):
    """Measure how fast instances are drawn, and, where there are several turns, stepped through."""
    print(f"{'category':16} pixels  a second  ms each  ms a step")
    rates = []
    for name in args.names or names():
        draws, steps = [], []
        for seed in range(-5, args.count):          # the first ones fill the caches of masks
            env = make(Task(name, abs(seed), abs(seed) % 5, args.split, args.pixels))
            start = time.perf_counter()
            env.reset()
            draws.append(time.perf_counter() - start)
            for reply in env.oracle() if env.max_turns > 1 and seed < 20 else ():
                start = time.perf_counter()
                env.step(reply)
                steps.append(time.perf_counter() - start)
        rates.append((len(draws) - 5) / sum(draws[5:]))
        print(f"{name:16} {env.pixels:6} {rates[-1]:9.0f} {1000 * np.median(draws[5:]):8.2f}",
              f"{1000 * np.median(steps):10.2f}" if steps else "", flush=True)
    print(f"{'median':16} {np.median(rates):16.0f}")


def verb_play(args):
    """Answer one instance yourself; the pictures of each turn are saved as a PNG."""
    task = Task(args.name, args.seed, args.level or 0, args.split, args.pixels)
    lines = [line.strip() for line in args.script.split(";")] if args.script else None
    env, out = make(task), args.out or f"out/gym/play_{args.name}.png"
    episode = drive(env)
    messages = next(episode)
    # the marks of a boxed answer are tedious to type, so they are put around it
    boxes = verify.BEGIN in play_out(task)[1][0]
    try:
        while True:
            if messages[-1].images:
                save(strip(messages[-1].images), out)
            print(messages[-1].text.replace(IMAGE, ""))
            if lines is None:
                reply = input("> ")
            elif lines:
                print(">", reply := lines.pop(0))
            else:
                print("the script ended before the task did")
                return 0
            bare = not boxes or verify.BEGIN in reply or reply == "done()"
            messages = episode.send(reply if bare else box(reply))
    except StopIteration as end:
        score = Rewards().score(task, end.value)
        print(f"reward {score.reward:.2f} {score.error or score.parts} "
              f"(gold: {end.value.get('gold')!s:.500})")
    except EOFError:
        print("stopped")
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parser():
    verbs = {"list": verb_list, "show": verb_show, "check": verb_check, "play": verb_play,
             "bench": verb_bench}
    top = Parser(prog="gym.py", description=__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    subs = top.add_subparsers(dest="verb", required=True, metavar="|".join(verbs))
    for name, call in verbs.items():
        sub = subs.add_parser(name, help=call.__doc__, description=call.__doc__)
        sub.set_defaults(call=call)
        if name == "list":
            continue
        sub.add_argument("--split", default="train", help="train, or anything else: held out")
        sub.add_argument("--pixels", type=int, default=0, help="side of the picture; 0: the least")
        if name in ("check", "bench"):
            sub.add_argument("names", nargs="*", metavar="NAME", help="categories (default: all)")
        else:
            sub.add_argument("name", metavar="NAME", help="a category")
            sub.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
            sub.add_argument("--out", help="the PNG to write (default: under out/gym)")
        if name != "bench":
            sub.add_argument("--level", type=int, help="0 (easy) to 4")
        if name == "play":
            sub.add_argument("--script", help='replies instead of a person, "click(1, 2); ..."')
        else:
            sub.add_argument("--count", type=int, default=12 if name == "show" else 200,
                             help="how many instances (default %(default)s)")
        if name in ("show", "check"):
            sub.add_argument("--all-levels", action="store_true", help="levels 0 to 4")
        if name == "check":
            sub.add_argument("--jobs", type=int, default=1, help="processes side by side")
    return top


def main(argv=None) -> int:
    """The command line: 0 on success, 1 on a broken contract, 2 on bad input."""
    try:
        args = parser().parse_args(argv)
        for option in ("count", "jobs"):
            if getattr(args, option, 1) < 1:
                raise ValueError(f"--{option} must be at least 1, not {getattr(args, option)}")
        for name in [args.name] if "name" in args else getattr(args, "names", []):
            level = getattr(args, "level", None) or 0
            make(Task(name, getattr(args, "seed", 0), level, args.split, args.pixels))
        return args.call(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
