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
import difflib
import hashlib
import math
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from tasks import CATEGORIES, machine, verify, webdev
from tasks.base import IMAGE, Env, Message, OneShot, Task, box
from tasks.draw import sheet, strip, tile
from tasks.jury import Pool, Score, attempt, combine, told

MOST_PIXELS = 1024


# ------------------------------------------------------------------------------------ environments

def names(pixels: int = MOST_PIXELS) -> list[str]:
    """The categories that can be read at this size, in the order of the table."""
    return [name for name, kind in CATEGORIES.items() if kind.min_pixels <= pixels]


def make(task: Task) -> Env:
    """The environment of a task. Raises ValueError, in one line, on a task that can't be. [O]"""
    if task.category not in CATEGORIES:
        near = difflib.get_close_matches(str(task.category), CATEGORIES, 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`gym.py list` shows them"
        raise ValueError(f"unknown category {task.category!r}; {hint}")
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


@lru_cache(maxsize=64)
def _drawn(kind, task: Task) -> dict:
    env = kind(task)
    env.reset()
    return vars(env)


def begin(task: Task) -> Env:
    """As `make`; but what one-shot tasks show is drawn once for all the rollouts of a group, and
    to be looked at only: the same objects are in the hands of the others."""
    env = make(task)
    if isinstance(env, OneShot):
        vars(env).update(_drawn(type(env), task))
    return env


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


def demonstrate(task: Task, think: bool = False, parts: bool = False) -> list[list[Message]]:
    """Whole conversations in which the oracle answers: one for a one-shot task, with all its
    turns about the picture; one a turn in the segment layout, and one for each further question
    about its screen; else one for the episode.
    think: the thought behind a reply stands before it, where the category states one; parts: only
    the further questions about screens, none where the category has no such."""
    env = make(task)

    def thoughtful(reply):
        return f"<think>{env.why}</think>\n{reply}" if think and env.why else reply

    if isinstance(env, OneShot):
        images, conversation = tuple(env.reset().images), []
        for question, reply in env.turns():
            reply = reply if conversation else thoughtful(reply)
            conversation += [Message("user", question, images), Message("assistant", reply)]
            images = ()
        return [] if parts else [conversation]
    episode, conversations = drive(env), []
    messages = next(episode)
    for reply in map(thoughtful, env.oracle()):
        if not parts:
            conversations.append([*messages, Message("assistant", reply)])
        if env.layout == "segment":
            conversations += [[Message("user", IMAGE + question, messages[-1].images),
                               Message("assistant", answer)] for question, answer in env.more]
        try:
            messages = episode.send(reply)
        except StopIteration:
            break
    return conversations if env.layout == "segment" else conversations[-1:]


# ------------------------------------------------------------------------------------------ rewards

# category: how the parts are put together, and the parts: (verifier, weight). A question in a
# verifier's place is for the judge, and left out where there is none.
RULES = {
    "shape_attr": ("mean", {"answer": (verify.exact, 1)}),
    "counting": ("mean", {"answer": (verify.number, 1)}),
    "ocr_line": ("mean", {"text": (verify.edit, 1)}),
    "ocr_document": ("mean", {"text": (verify.edit, 1), "order": (verify.reading, 1)}),
    "table_read": ("mean", {"answer": (verify.exact, 1)}),
    "chart_read": ("mean", {"number": (verify.value, 1)}),
    "ground_box": ("mean", {"overlap": (verify.hit_box, 1)}),
    "ground_multi": ("mean", {"boxes": (verify.match_boxes, 1)}),
    "point": ("mean", {"hit": (verify.hit_point, 1)}),
    "ui_ground": ("mean", {"box": (verify.hit_box, 1)}),
    "widget_state": ("mean", {"answer": (verify.exact, 1)}),
    "spot_diff": ("mean", {"boxes": (verify.match_boxes, 1)}),
    "video_events": ("mean", {"answer": (verify.moment, 1)}),
    "scene_to_json": ("mean", {"things": (verify.match_things, 9), "fluency": (
        "Is it tidy and fluent, said once and in plain words, without anything left over?", 1)}),
    "geometry": ("mean", {"number": (verify.number, 1)}),
    "chart_arith": ("mean", {"answer": (verify.value, 1)}),
    "doc_qa": ("mean", {"cited": (verify.cited, 1)}),
    "interleaved_qa": ("mean", {"answer": (verify.exact, 1)}),
    "spatial_relation": ("mean", {"answer": (verify.exact, 1)}),
    "map_route": ("mean", {"route": (verify.route, 1)}),
    "matrix_puzzle": ("mean", {"choice": (verify.exact, 1)}),
    "grid_logic": ("mean", {"grid": (verify.grid, 1)}),
    "code_output": ("mean", {"answer": (verify.exact, 1)}),
    "world_knowledge": ("mean", {"answer": (verify.exact, 1)}),
    "text_code": ("mean", {"cases": (machine.solves, 1)}),
    "gui_click": ("product", {"verb": (verify.verb, 1), "hit": (verify.hit_click, 1)}),
    "gui_next_action": ("product", {"verb": (verify.key_verb, 1), "place": (verify.key_place, 1),
                                    "text": (verify.key_text, 1)}),
    "gui_form": ("mean", {"state": (verify.state, 1)}),
    "gui_navigate": ("mean", {"state": (verify.state, 1)}),
    "gui_multi_app": ("mean", {"state": (verify.state, 1)}),
    "gui_critic": ("mean", {"answer": (verify.exact, 1)}),
    "ui_to_code": ("mean", {"look": (webdev.appearance, 4), "works": (webdev.workings, 1)}),
    "ui_polish": ("product", {"closer": (webdev.closer, 1), "kept": (webdev.kept, 1)}),
    "visual_tools": ("mean", {"answer": (verify.answered, 1)}),
    "text_tools": ("mean", {"answer": (verify.answered, 1)}),
    "image_mining": ("gate", {"seen": (verify.witnessed, 1), "answer": (verify.answered, 1)}),
}


class Rewards:
    """The reward system, independent of the environments.

    workers: so many processes run the verifiers, and one that takes longer than `deadline`
    seconds over an item is killed; with 0 they run here, and nothing stops them. judge: a
    jury.Judge. `errors` counts what failed, by category. For one thread at a time. [O]
    """

    def __init__(self, rules: dict = RULES, workers: int = 0, deadline: float = 5.0, judge=None):
        self.rules, self.judge, self.errors = rules, judge, Counter()
        self.pool = Pool(workers, deadline) if workers else None

    def score(self, task: Task, evidence: dict) -> Score:
        """Judge the evidence of one episode. Never raises: what fails becomes `.error`."""
        return self.score_all([(task, evidence)])[0]

    def score_all(self, pairs: list[tuple[Task, dict]]) -> list[Score]:
        """The same for many, in order; the judge is asked while the verifiers run."""
        jobs, asked = [], []
        for task, evidence in pairs:
            _, table = self.rules.get(task.category, ("", {}))
            jobs.append(({name: f for name, (f, _) in table.items() if callable(f)}, evidence))
            questions = {name: f for name, (f, _) in table.items() if not callable(f)}
            asked.append({name: self.judge.opinion(question, evidence)
                          for name, question in questions.items() if self.judge})
        found = self.pool.run(jobs) if self.pool else [attempt(*job) for job in jobs]
        return [self.put_together(task, opinions, *parts)
                for (task, _), opinions, parts in zip(pairs, asked, found)]

    def put_together(self, task, opinions, parts, error):
        try:
            if not error:
                parts = {**parts, **{k: self.judge.wait(o) for k, o in opinions.items()}}
                how, table = self.rules[task.category]
                weights = [weight for name, (_, weight) in table.items() if name in parts]
                values = [parts[name] for name in table if name in parts]
                return Score(combine(how, values, weights), parts)
        except Exception as fault:
            error = told(fault)
        self.errors[task.category] += 1
        return Score(math.nan, {}, error)

    def close(self):
        """End the workers. They also end with this process."""
        if self.pool:
            self.pool.stop()


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


def fingerprints(tasks: list[Task]) -> list[str]:
    return [fingerprint(task) for task in tasks]


def afar(call: str, *args):
    """What gym.<call>(*args) gives in a fresh process."""
    code = ("import gym, pickle, sys; call, args = pickle.load(sys.stdin.buffer); "
            "sys.stdout.buffer.write(pickle.dumps(getattr(gym, call)(*args)))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((call, args)),
                          check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    return pickle.loads(done.stdout)


def scramble(reply: str, rng) -> str:
    """The same form with other digits and, in a boxed answer or between quotes, other letters."""
    def other(found):
        return "".join(str(rng.integers(1, 10)) if c.isdigit() else
                       chr(rng.integers(97, 123)) if c.isalpha() else c for c in found[0])

    answer = verify.boxed(reply)
    if answer is None:
        return re.sub(r'"[^"]*"|\d', other, reply)
    return box(other([answer]))


class Exam:
    """The measurements of one category at one level, each a mean over `count` seeds. What the
    blind baselines may learn from is other seeds, four times as many, or as many where an
    episode has several turns."""

    def __init__(self, category: str, level: int, split="train", pixels=0, count=200):
        self.one_shot = issubclass(CATEGORIES[category], OneShot)
        self.rewards, self.count, self.earned = Rewards(), count, {}
        self.identity = category, level, split, pixels
        self.task = lambda seed: Task(category, seed, level, split, pixels)
        self.known = [self.task(100_000 + i) for i in range(count * (4 if self.one_shot else 1))]
        self.tasks = [self.task(seed) for seed in range(count)]
        self.played = {task: play_out(task) for task in self.tasks + self.known}
        self.solved = [self.played[task] for task in self.tasks]
        start = time.perf_counter()
        self.mean([replies for _, replies, _ in self.solved[:5]])
        self.slow = not self.one_shot or time.perf_counter() - start > 0.01    # 2 ms a verdict
        self.sees = any(m.images for task in self.tasks[:5] for c in demonstrate(task) for m in c)

    def reward(self, task, evidence):
        """A verifier's error is the category's fault, so here it is raised."""
        score = self.rewards.score(task, evidence)
        if score.error:
            raise RuntimeError(f"{task}: {score.error}")
        return score.reward

    def worth(self, task, script) -> float:
        """What a script earns. One reply changes nothing but itself: no need to draw again."""
        key = task, tuple(script)
        if key not in self.earned:
            evidence = self.played[task][2]
            self.earned[key] = self.reward(task, {**evidence, "reply": script[0]} if self.one_shot
                                           else play_out(task, script)[2])
        return self.earned[key]

    def mean(self, scripts):
        return float(np.mean([self.worth(*pair) for pair in zip(self.tasks, scripts)]))

    def best_script(self, tasks, few=16, seeds=200):
        """(worth, script) of that which earns most on these tasks; few tasks prove little."""
        if self.slow:
            few, seeds = 4, 10
        scripts = Counter(tuple(self.played[task][1]) for task in tasks)
        tasks = tasks[:seeds]
        return max((sum(self.worth(task, script) for task in tasks) / len(tasks)
                    - 0.5 / math.sqrt(len(tasks)), script)
                   for script, _ in scripts.most_common(few))

    def blind(self):
        """(majority, image-free): the best constant; and the best script for the prompt, or for
        one of its words, whichever promises most."""
        def clues(prompt):
            return dict.fromkeys([prompt, *prompt.split()])

        constant, groups = self.best_script(self.known), {}
        for task in self.known if self.sees else ():
            for clue in clues(self.played[task][0]):
                groups.setdefault(clue, []).append(task)
        best = {c: self.best_script(g, 6, 50) for c, g in groups.items() if len(g) >= 10}
        informed = [max([constant, *(best[c] for c in clues(prompt) if c in best)])[1]
                    for prompt, _, _ in self.solved]
        return self.mean([constant[1]] * self.count), self.mean(informed)

    def hacked(self):
        """The most that a hack earns; where there are many turns, a hack on each."""
        earned = []
        for task, (prompt, replies, _) in list(zip(self.tasks, self.solved))[:4]:
            tricks = verify.hacks(replies[0], prompt)
            n = 1 if self.one_shot else make(task).max_turns
            earned += [self.worth(task, tricks[i:i + n]) for i in range(0, len(tricks), n)]
        return max(earned)

    def measure(self) -> dict[str, float]:
        """The row of the table."""
        rng, scripts = np.random.default_rng(0), [replies for _, replies, _ in self.solved]
        noise = [[scramble(reply, rng) for reply in script] for script in scripts]
        majority, blind = self.blind()
        category, level, split, pixels = self.identity
        look = [glance(category, at, split, pixels, max(40, self.count)) for at in (0, 4)]
        return {"chance": CATEGORIES[category].chance(level),
                "oracle": self.mean(scripts), "other": self.mean(scripts[1:] + scripts[:1]),
                "random": self.mean(noise), "majority": majority, "no image": blind,
                "echo": self.mean([[prompt] for prompt, _, _ in self.solved]),
                "empty": self.mean([[""]] * self.count), "hacks": self.hacked(),
                "glance 0": look[0], "glance 4": look[1]}

    def violations(self, row: dict) -> list[str]:
        """The clauses of the contract that do not hold. Means over few seeds are noisy: bounds on
        them are wider by one over the root of their number."""
        slack = 0.10 + 1 / math.sqrt(self.count)
        blind = ("other", "random", "majority", *["no image"] * self.sees)
        wrong = [f"{name} {row[name]:.2f} is too far above chance, {row['chance']:.2f}"
                 for name in blind if row[name] > row["chance"] + slack]
        wrong += [f"{name} {row[name]:.2f} is above 0.05" for name in ("echo", "empty", "hacks")
                  if row[name] > 0.05]
        if row["oracle"] < 1 - 1e-9:
            wrong.append(f"oracle {row['oracle']:.3f} is not 1")
        if row["chance"] > max(row["majority"], row["no image"]) + slack:
            wrong.append("declared chance is above what blind guessing gives")
        if not row["glance 4"] < row["glance 0"]:       # true also of nan, a verifier's error
            wrong.append("level 4 is not harder than level 0 for a glance")
        for task, (_, replies, evidence) in list(zip(self.tasks, self.solved))[:10]:
            if pickle.loads(pickle.dumps(evidence)) != evidence:
                wrong.append("the evidence does not survive pickling")
            if self.one_shot and play_out(task, ["?"])[2] != {**evidence, "reply": "?"}:
                wrong.append("more of the evidence than the reply depends on the reply")
            env = make(task)
            env.reset()
            late = [env.step(reply) for reply in [*replies, replies[-1], "?", ""]]
            if not all(step.done for step in late[-4:]) or env.evidence() != evidence:
                wrong.append("steps after the end change something")
        return wrong


@lru_cache(maxsize=None)
def glance(category, level, split, pixels, count) -> float:
    """What one earns who sees but does not heed the question."""
    rng, rewards = np.random.default_rng(level), Rewards()
    tasks = [Task(category, seed, level, split, pixels) for seed in range(count)]

    def look(env, messages):
        return env.glance(rng)

    return float(np.mean([rewards.score(t, play_out(t, look)[2]).reward for t in tasks]))


def examine(category, level, split="train", pixels=0, count=200):
    """The row of one category at one level, and what is wrong with it."""
    exam = Exam(category, level, split, pixels, count)
    row = exam.measure()
    return row, exam.violations(row)


# --------------------------------------------------------------------------------- the command line

def verb_list(args):
    """Print the table of categories."""
    print(f"{'category':16} {'family':11} tier verifier turns layout   pixels chance 0-4")
    for name, kind in CATEGORIES.items():
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
            many = CATEGORIES[args.name].max_turns > 1      # then an episode is a row
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
            return afar("examine", *case) if args.jobs > 1 else examine(*case)
        except Exception as error:              # one category's fault hides no other's
            return {}, [told(error)]

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
    both = zip(tasks, afar("fingerprints", tasks), fingerprints(tasks))
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
