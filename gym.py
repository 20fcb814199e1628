"""The gym: categories by name, one driver for every layout, and the reward system.

    python gym.py list                          the categories
    python gym.py show point --level 2          a sheet of instances, out/gym/point.png
    python gym.py check                         the contract that every category keeps
    python gym.py play gui_form                 be the model, in the terminal

An environment gives no reward; it hands out evidence, and `Rewards` judges that. The two know
each other only through the table RULES, so a verifier can be mended without touching a task, and
a verifier that fails gives an error, never a zero that would train the model away from its work.
"""
import argparse
import difflib
import hashlib
import math
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tasks import CATEGORIES, verify
from tasks.base import IMAGE, Env, Message, OneShot, Task, box
from tasks.draw import sheet, tile

MOST_PIXELS = 1024


# ------------------------------------------------------------------------------------ environments

def names() -> list[str]:
    """The categories, in the order of the table."""
    return list(CATEGORIES)


def make(task: Task) -> Env:
    """The environment of a task. Raises ValueError, in one line, on a task that can't be. [O]"""
    if task.category not in CATEGORIES:
        near = difflib.get_close_matches(str(task.category), CATEGORIES, 3, 0.4) or CATEGORIES
        raise ValueError(f"unknown category {task.category!r}; did you mean {', '.join(near)}?")
    kind = CATEGORIES[task.category]
    if type(task.seed) is not int or task.seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, not {task.seed!r}")
    if type(task.level) is not int or not 0 <= task.level <= 4:
        raise ValueError(f"level must be an integer from 0 to 4, not {task.level!r}")
    if not isinstance(task.split, str) or not task.split:
        raise ValueError(f"split must be a word such as train or test, not {task.split!r}")
    if type(task.pixels) is not int or task.pixels and task.pixels < kind.min_pixels:
        raise ValueError(f"{task.category} needs at least {kind.min_pixels} pixels, "
                         f"not {task.pixels!r} (0 means the least)")
    if task.pixels > MOST_PIXELS:
        raise ValueError(f"pixels must be at most {MOST_PIXELS}, not {task.pixels}")
    return kind(task)


def drive(env: Env):
    """Run one episode, whatever its layout: a generator that yields the list of Messages to
    answer, takes the reply's text by `send`, and returns the evidence (StopIteration.value).

    append: the list grows, reply by reply. segment: every list is a fresh conversation of one
    user message, since the observation itself tells the goal and the earlier actions. [C]
    """
    obs, messages, role = env.reset(), [], "user"
    while obs is not None:
        message = Message(role, obs.text, tuple(obs.images))
        messages = [message] if env.layout == "segment" else [*messages, message]
        reply = yield messages
        step = env.step(reply)
        messages = [*messages, Message("assistant", reply)]
        obs = None if step.done else step.obs
        role = "user" if env.layout == "segment" else "observation"
    return env.evidence()


def demonstrate(task: Task) -> list[list[Message]]:
    """Whole conversations in which the oracle answers: one for a one-shot task, with all its
    turns about the picture; one a turn in the segment layout; else one for the episode."""
    env = make(task)
    if isinstance(env, OneShot):
        images, conversation = tuple(env.reset().images), []
        for question, reply in env.turns():
            conversation += [Message("user", question, images), Message("assistant", reply)]
            images = ()
        return [conversation]
    episode, conversations = drive(env), []
    messages = next(episode)
    for reply in env.oracle():
        conversations.append([*messages, Message("assistant", reply)])
        try:
            messages = episode.send(reply)
        except StopIteration:
            break
    return conversations if env.layout == "segment" else conversations[-1:]


# ------------------------------------------------------------------------------------------ rewards

@dataclass(frozen=True)
class Score:
    """A reward in [0, 1] and its parts; or an error, and then the reward means nothing."""
    reward: float
    parts: dict = field(default_factory=dict)
    error: str | None = None


# category: how the parts are put together, and the parts: (verifier, weight)
RULES = {
    "shape_attr": ("mean", {"answer": (verify.exact, 1)}),
    "counting": ("mean", {"answer": (verify.number, 1)}),
    "ocr_line": ("mean", {"text": (verify.edit, 1)}),
    "point": ("mean", {"hit": (verify.hit_point, 1)}),
    "gui_click": ("product", {"verb": (verify.verb, 1), "hit": (verify.hit_click, 1)}),
    "gui_form": ("mean", {"state": (verify.state, 1)}),
}


def combine(how: str, scores: list[float], weights: list[float]) -> float:
    """mean: weighted; product: each to the power of its weight; gate: the first must be 1 for
    the weighted mean of the others to count. [C] for configurable aggregation, [O] for these."""
    if how == "product":
        return math.prod(s ** w for s, w in zip(scores, weights))
    if how == "gate":
        return combine("mean", scores[1:], weights[1:]) if scores[0] == 1 else 0.0
    if how != "mean":
        raise ValueError(f"unknown aggregation {how!r}")
    return sum(s * w for s, w in zip(scores, weights)) / sum(weights)


class Rewards:
    """The reward system, independent of the environments. `rules` defaults to RULES."""

    def __init__(self, rules: dict = RULES):
        self.rules = rules

    def score(self, task: Task, evidence: dict) -> Score:
        """Judge the evidence of one episode. Never raises: what fails becomes `.error`."""
        try:
            how, table = self.rules[task.category]
            parts = {name: float(function(evidence)) for name, (function, _) in table.items()}
            for name, value in parts.items():
                if not 0 <= value <= 1:         # also true of nan
                    raise ValueError(f"{name} gave {value}")
            reward = combine(how, list(parts.values()), [weight for _, weight in table.values()])
            return Score(reward, parts)
        except Exception as error:              # a verifier's fault must never look like a zero
            return Score(math.nan, {}, f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------- the contract

def play_out(task: Task, policy=None) -> tuple[str, list[str], dict]:
    """One episode -> (first prompt, replies, evidence). `policy` is a script, whose last line is
    said again and again, or a function of (env, messages); None is the oracle."""
    env = make(task)
    episode, oracle, replies = drive(env), env.oracle(), []
    messages = next(episode)
    prompt = messages[0].text
    while True:
        if policy is None:
            reply = next(oracle, "")
        elif callable(policy):
            reply = policy(env, messages)
        else:
            reply = policy[min(len(replies), len(policy) - 1)]
        replies.append(reply)
        try:
            messages = episode.send(reply)
        except StopIteration as end:
            return prompt, replies, end.value


def fingerprint(task: Task) -> str:
    """A digest of everything that the demonstrations of a task show and say, and of its gold."""
    digest = hashlib.sha256(repr(play_out(task)).encode())
    for message in (m for conversation in demonstrate(task) for m in conversation):
        digest.update(f"{message.role}\0{message.text}\0".encode())
        for image in message.images:
            digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def fresh_fingerprints(tasks: list[Task]) -> list[str]:
    """The same from a fresh process."""
    code = ("import gym, pickle, sys; "
            "print(*map(gym.fingerprint, pickle.load(sys.stdin.buffer)))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(tasks), check=True,
                          capture_output=True, cwd=Path(__file__).parent)
    return done.stdout.decode().split()


def scramble(reply: str, rng) -> str:
    """The same form with other digits and, in a boxed answer, other letters."""
    answer = verify.boxed(reply)
    chars = [str(rng.integers(1, 10)) if c.isdigit() else
             chr(rng.integers(97, 123)) if c.isalpha() and answer is not None else c
             for c in (reply if answer is None else answer)]
    return "".join(chars) if answer is None else box("".join(chars))


class Exam:
    """The measurements of one category at one level, each a mean over `count` seeds. What the
    blind baselines may learn from is four times as many other seeds."""

    def __init__(self, category: str, level: int, split="train", pixels=0, count=200):
        self.rewards, self.count = Rewards(), count
        self.task = lambda seed, at=level: Task(category, seed, at, split, pixels)
        self.tasks = [self.task(seed) for seed in range(count)]
        self.solved = [play_out(task) for task in self.tasks]
        self.known = [self.task(100_000 + i) for i in range(4 * count)]
        self.learned = [play_out(task) for task in self.known]

    def reward(self, task, evidence):
        """A verifier's error is the category's fault, so here it is raised."""
        score = self.rewards.score(task, evidence)
        if score.error:
            raise RuntimeError(f"{task}: {score.error}")
        return score.reward

    def mean(self, policies, tasks=None):
        return float(np.mean([self.reward(task, play_out(task, policy)[2])
                              for task, policy in zip(tasks or self.tasks, policies)]))

    def best_script(self, group):
        """The script that earns most on the known tasks of these indices: a blind answer."""
        def worth(script):
            total = 0
            for i in group[:200]:
                evidence = self.learned[i][2]
                if "reply" in evidence:             # one reply: no need to draw it again
                    evidence = {**evidence, "reply": script[0]}
                else:
                    evidence = play_out(self.known[i], script)[2]
                total += self.reward(self.known[i], evidence)
            return total

        scripts = Counter(tuple(self.learned[i][1]) for i in group)
        return max((script for script, _ in scripts.most_common(16)), key=worth)

    def blind(self):
        """(majority, image-free): the best constant, and the best for each prompt's text."""
        constant, groups = self.best_script(range(len(self.known))), {}
        for i, (prompt, _, _) in enumerate(self.learned):
            groups.setdefault(prompt, []).append(i)
        best = {prompt: self.best_script(g) for prompt, g in groups.items() if len(g) >= 10}
        informed = [best.get(prompt, constant) for prompt, _, _ in self.solved]
        return self.mean([constant] * self.count), self.mean(informed)

    def glance(self, level):
        """One who sees but does not heed the question, at any level."""
        rng, tasks = np.random.default_rng(level), [self.task(s, level) for s in range(self.count)]
        return self.mean([lambda env, messages: env.glance(rng)] * self.count, tasks)

    def measure(self) -> dict[str, float]:
        """The row of the table."""
        rng, scripts = np.random.default_rng(0), [replies for _, replies, _ in self.solved]
        noise = [[scramble(reply, rng) for reply in script] for script in scripts]
        majority, blind = self.blind()
        hacks = [self.mean([[text]], [task]) for task, (prompt, replies, _)
                 in list(zip(self.tasks, self.solved))[:4]
                 for text in verify.hacks(replies[0], prompt)]
        return {"chance": make(self.tasks[0]).chance(self.tasks[0].level),
                "oracle": self.mean(scripts), "other": self.mean(scripts[1:] + scripts[:1]),
                "random": self.mean(noise), "majority": majority, "no image": blind,
                "echo": self.mean([lambda env, messages: messages[-1].text] * self.count),
                "empty": self.mean([[""]] * self.count), "hacks": max(hacks),
                "glance 0": self.glance(0), "glance 4": self.glance(4)}

    def violations(self, row: dict) -> list[str]:
        """The clauses of the contract that do not hold. Means over few seeds are noisy: bounds on
        them are wider by one over the root of their number."""
        slack = 0.10 + 1 / math.sqrt(self.count)
        wrong = [f"{name} {row[name]:.2f} is too far above chance, {row['chance']:.2f}"
                 for name in ("other", "random", "majority", "no image")
                 if row[name] > row["chance"] + slack]
        wrong += [f"{name} {row[name]:.2f} is above 0.05" for name in ("echo", "empty", "hacks")
                  if row[name] > 0.05]
        if row["oracle"] != 1:
            wrong.append(f"oracle {row['oracle']:.3f} is not 1")
        if row["chance"] > max(row["majority"], row["no image"]) + slack:
            wrong.append("declared chance is above what blind guessing gives")
        if row["glance 4"] >= row["glance 0"]:
            wrong.append("level 4 is not harder than level 0 for a glance")
        for task, (_, replies, evidence) in list(zip(self.tasks, self.solved))[:10]:
            if pickle.loads(pickle.dumps(evidence)) != evidence:
                wrong.append("the evidence does not survive pickling")
            env = make(task)
            env.reset()
            late = [env.step(reply) for reply in [*replies, replies[-1], "?", ""]]
            if not all(step.done for step in late[-4:]) or env.evidence() != evidence:
                wrong.append("steps after the end change something")
        return wrong


# --------------------------------------------------------------------------------- the command line

def verb_list(args):
    """Print the table of categories."""
    print(f"{'category':12} {'family':11} tier verifier turns layout   pixels chance 0-4")
    for name, kind in CATEGORIES.items():
        chance = " ".join(f"{kind.chance(level):.2f}" for level in range(5))
        print(f"{name:12} {kind.family:11} {kind.tier:4} {kind.verifier:8} {kind.max_turns:5} "
              f"{kind.layout:8} {kind.min_pixels:6} {chance}")


def levels(args, default):
    return range(5) if args.all_levels else [args.level] if args.level is not None else default


def verb_show(args):
    """Save a sheet of instances with their questions and answers."""
    rows = []
    for level in levels(args, [0]):
        tiles = []
        for seed in range(args.seed, args.seed + args.count):
            conversations = demonstrate(Task(args.name, seed, level, args.split, args.pixels))
            frames = [tile(c[0].images[0], f"{c[0].text.replace(IMAGE, '')}\n> "
                           f"{verify.boxed(c[1].text) or c[1].text}") for c in conversations]
            if CATEGORIES[args.name].max_turns > 1:
                rows.append(frames)                 # an episode is a row
            else:
                tiles += frames
        rows += [tiles[i:i + 6] for i in range(0, len(tiles), 6)]
    save(sheet(rows), args.out or f"out/gym/{args.name}.png")


def save(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(path)


def verb_check(args):
    """Measure every clause of the contract; exit code 1 when one is broken."""
    picked = [(n, level) for n in args.names or names() for level in levels(args, [0, 4])]
    tasks = [Task(name, seed, level, args.split, args.pixels)
             for name, level in picked for seed in range(5)]
    there = fresh_fingerprints(tasks)
    broken = [f"{task} is not the same in a fresh process" for task, theirs in zip(tasks, there)
              if fingerprint(task) != theirs]
    for name, level in picked:
        exam = Exam(name, level, args.split, args.pixels, args.count)
        row = exam.measure()
        if (name, level) == picked[0]:
            print(f"{'category':12} lv", *(f"{key:>8}" for key in row))
        print(f"{name:12} {level:2}", *(f"{value:8.3f}" for value in row.values()), flush=True)
        broken += [f"{name}, level {level}: {wrong}" for wrong in exam.violations(row)]
    print("\n".join(broken) or "the contract holds")
    return 1 if broken else 0


def verb_play(args):
    """Answer one instance yourself; each turn's picture is saved as a PNG."""
    task = Task(args.name, args.seed, args.level or 0, args.split, args.pixels)
    lines = [line.strip() for line in args.script.split(";")] if args.script else None
    env, out = make(task), args.out or f"out/gym/play_{args.name}.png"
    episode = drive(env)
    messages = next(episode)
    try:
        while True:
            save(messages[-1].images[0], out)
            print(messages[-1].text.replace(IMAGE, ""))
            if lines is None:
                reply = input("> ")
            elif lines:
                print(">", reply := lines.pop(0))
            else:
                print("the script ended before the task did")
                return 0
            # the box marks of an answer are tedious to type; actions stand bare
            bare = env.family == "agent" or verify.BEGIN in reply
            messages = episode.send(reply if bare else box(reply))
    except StopIteration as end:
        score = Rewards().score(task, end.value)
        print(f"reward {score.reward:.2f} {score.parts} (gold: {end.value['gold']})")
    except EOFError:
        print("stopped")
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parser():
    top = Parser(prog="gym.py", description=__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="list|show|check|play")
    for name, call in (("list", verb_list), ("show", verb_show), ("check", verb_check),
                       ("play", verb_play)):
        sub = verbs.add_parser(name, help=call.__doc__, description=call.__doc__)
        sub.set_defaults(call=call)
        if name == "list":
            continue
        if name == "check":
            sub.add_argument("names", nargs="*", metavar="NAME", help="categories (default: all)")
        else:
            sub.add_argument("name", metavar="NAME", help="a category")
        sub.add_argument("--level", type=int, help="0 (easy) to 4")
        if name != "check":
            sub.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
            sub.add_argument("--out", help="the PNG to write (default: under out/gym)")
        sub.add_argument("--split", default="train", help="train, or anything else: held out")
        sub.add_argument("--pixels", type=int, default=0, help="side of the picture; 0: the least")
        if name == "play":
            sub.add_argument("--script", help='replies instead of a person, "click(1, 2); ..."')
        else:
            sub.add_argument("--count", type=int, default=12 if name == "show" else 200,
                             help="how many instances (default %(default)s)")
            sub.add_argument("--all-levels", action="store_true", help="levels 0 to 4")
    return top


def main(argv=None) -> int:
    """The command line: 0 on success, 1 on a broken contract, 2 on bad input."""
    try:
        args = parser().parse_args(argv)
        if getattr(args, "count", 1) < 1:
            raise ValueError(f"--count must be at least 1, not {args.count}")
        for name in [args.name] if "name" in args else getattr(args, "names", []):
            make(Task(name, getattr(args, "seed", 0), args.level or 0, args.split, args.pixels))
        return args.call(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
