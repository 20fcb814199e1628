"""The pictures of lectures 6 to 10, each drawn from what the models in `ckpt/` really do.

    python -m course.draw_rl                    all of them, in half a minute
    python -m course.draw_rl drafts rewards     some of them
    python -m course.draw_rl timeline --runs=out/staleness0,out/staleness2

timeline needs the two runs of lecture 9; without --runs it is left out.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

import gym
from course.draw import FOLDER, INK, save_pictures
from data import document
from engine import Engine, Request
from lib.cli import cli, main, UserError
from lib.common import read_log, ROOT
from lib.episodes import rewards_of
from lib.evaluation import run_tasks
from lib.film import with_point
from rl import advantages
from sample import act, load, readable
from tasks import verify
from tasks.base import box
from tasks.draw import font, sheet, tile

QUIET = "#5f6b7a"
GREEN, RED, BLUE = ("#15803d", "#dcfce7"), ("#b91c1c", "#fee2e2"), ("#1d4ed8", "#dbeafe")


@dataclass
class Args:
    what: list[str] = dataclasses.field(default_factory=list)   # names; default: all
    runs: str = ""      # folders of lecture 9: the synchronous run, then the asynchronous one
    out: str = str(FOLDER)


def drafts(args: Args):
    """06: a reply step by step: what the MTP head drafts, and what the trunk makes of it."""
    model, tokens, _ = load(str(ROOT / "ckpt/demo"), "cpu", "float32")
    task = gym.Task("gui_form", 3_000_002, split="test")    # the third one of lab.drafts --trace
    messages = next(gym.drive(gym.make(task)))
    prompt = document(messages, tokens, model.config, answer=True)
    engine, steps, results = Engine(model, 1, 256, drafts=3, adapt=False), [], []

    def note(drafted, accepted, chosen):
        count = int(accepted[0])
        steps.append((drafted[0].tolist(), count, int(chosen[0, count])))

    engine.trace = note
    engine.submit(Request(prompt))
    while engine.busy:
        results += engine.step()
    ids = results[0].ids
    # Each token of the reply has a column; the columns are as wide as their tokens.
    words = {id: tokens.decode([id]) for row, _, own in steps for id in [*row, own]}
    words |= {id: tokens.decode([id]) for id in ids}
    columns = [max(72, round(font(24).getlength(words[id])) + 36) for id in ids]
    places = [280 + sum(columns[:i]) + 10 * i for i in range(len(ids) + 1)]
    page = Image.new("RGB", (places[-1] + 20, 150 + 100 * (len(steps) + 1)), "white")
    pen = ImageDraw.Draw(page)

    def cell(x, row, id, colors, wide=72, struck=False):
        y = 90 + 100 * row
        pen.rounded_rectangle((x, y, x + wide, y + 60), 10, colors[1], colors[0], 2)
        pen.text((x + wide / 2, y + 30), words[id], colors[0], font(24), "mm")
        if struck:
            pen.line((x + 20, y + 30, x + wide - 20, y + 30), colors[0], 3)

    def label(row, title, below):
        pen.text((24, 94 + 100 * row), title, INK, font(26), stroke_width=0.5)
        pen.text((24, 126 + 100 * row), below, QUIET, font(21))

    pen.text((24, 20), messages[-1].text.replace(gym.IMAGE, ""), INK, font(26), stroke_width=0.5)
    for x, colors, text in ((480, GREEN, "draft, accepted"), (740, BLUE, "token of the trunk"),
                            (1030, RED, "draft, rejected")):
        pen.rounded_rectangle((x, 22, x + 26, 48), 6, colors[1], colors[0], 2)
        pen.text((x + 36, 22), text, INK, font(22))
    label(0, "prompt", "one forward")
    cell(places[0], 0, ids[0], BLUE, columns[0])
    at = 1                      # the column of the step's first token
    for row, (drafted, count, own) in enumerate(steps, 1):
        label(row, f"step {row}", f"{count} of {len(drafted)} accepted")
        for i, id in enumerate(drafted[:count]):
            cell(places[at + i], row, id, GREEN, columns[at + i])
        cell(places[at + count], row, own, BLUE, columns[at + count])
        for i, id in enumerate(drafted[count:]):
            cell(places[at + count + 1] + 20 + 90 * i, row, id, RED, struck=True)
        at += count + 1
    label(len(steps) + 0.9, "reply", f"{len(ids)} tokens, {1 + len(steps)} forwards")
    for x, wide, id in zip(places, columns, ids):
        pen.text((x + wide / 2, page.height - 50), words[id], INK, font(24), "mm")
    return page


def rewards(args: Args):
    """07: five replies to one task, and what the verifier gives for them."""
    task = gym.Task("ground_box", seed=10, pixels=256)
    env, tiles = gym.make(task), []
    env.reset()
    x0, y0, x1, y1 = gold = [round(c) for c in env.gold]
    for boxes in ([gold], [[x0 + 50, y0, x1 + 50, y1]], [[x0 + 100, y0, x1 + 100, y1]],
                  [gold, [100, 100, 300, 300]], [[0, 0, 999, 999]]):
        reply = box(boxes if len(boxes) > 1 else boxes[0])
        reward = gym.Rewards().score(task, {"reply": reply, "gold": env.gold}).reward
        picture = env.obs.images[0].copy()
        for b in boxes:
            corners = [c * picture.width // 1000 for c in b]
            ImageDraw.Draw(picture).rectangle(corners, outline="yellow", width=2)
        tiles.append(tile(picture, f"{verify.boxed(reply)}\nIoU {verify.iou(boxes[0], gold):.2f}, "
                                   f"reward {reward:g}"))
    return sheet([tiles])


def group(args: Args):
    """08: the eight rollouts of a GRPO group, with rewards and advantages."""
    model, tokens, _ = load(str(ROOT / "ckpt/untold"), "cpu", "float32")
    tasks = [gym.Task("gui_form", seed) for seed in range(24)]
    played = run_tasks(model, tokens, tasks, samples=8)[8 * 14:8 * 15]
    earned = rewards_of(played)
    page = Image.new("RGB", (1900, 640), "white")
    pen, screen = ImageDraw.Draw(page), gym.make(tasks[14]).reset()
    page.paste(screen.images[0].resize((384, 384), Image.Resampling.NEAREST), (32, 96))
    goal = screen.text.replace(gym.IMAGE, "")
    pen.text((32, 32), goal, INK, font(30), stroke_width=0.5)
    pen.text((32, 500), "eight rollouts of one task", QUIET, font(26))
    left, middle, zero = 460, 1240, 1590
    for x, title, anchor in ((left, "replies, one a turn", "la"), (middle, "reward", "ma"),
                             (zero, "advantage", "ma")):
        pen.text((x, 36), title, QUIET, font(27), anchor)
    for i, (episode, reward, advantage) in enumerate(zip(played, earned, advantages(earned))):
        y, color = 112 + 58 * i, GREEN[0] if advantage > 0 else RED[0]
        said = " > ".join(readable(reply) for reply in episode.replies(tokens))
        said = said if len(said) <= 46 else said[:43] + "..."
        pen.text((left, y), said, INK, font(27), "lm")
        pen.text((middle, y), f"{reward:g}", color, font(30), "mm", stroke_width=0.5)
        end = zero + 280 * advantage
        pen.rectangle((min(zero, end), y - 17, max(zero, end), y + 17), color)
        pen.text((end + (10 if advantage > 0 else -10), y), f"{advantage:+.3f}", color, font(27),
                 "lm" if advantage > 0 else "rm")
    pen.line((zero, 80, zero, 560), INK, 3)
    pen.text((left, 600), f"mean reward of the group: {sum(earned) / 8:g}; the advantages add up "
             "to 0", INK, font(28), "lm")
    return page


def timeline(args: Args):
    """09: when the trainer waits and when it learns, in two runs with slow verifiers."""
    folders = [Path(name) for name in args.runs.split(",")]
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    if len(logs) != 2 or not all(logs):
        raise UserError("--runs takes two run folders with a comma: the synchronous run first")
    if not all({"dt", "waited", "idle"} <= step.keys() for log in logs for step in log):
        raise UserError(f"--runs={args.runs} are not the runs of lecture 9, with an actor and a "
                        "learner each")
    longest = max(sum(step["dt"] for step in log) for log in logs)
    page = Image.new("RGB", (1900, 560), "white")
    pen = ImageDraw.Draw(page)

    def at(seconds):
        return 300 + seconds / longest * 1480

    for x, color, text in ((300, "#e5e7eb", "trainer waits for groups"), (690, "#2f6fd0", "learns"),
                           (880, "#d97706", "share of the time with nothing to generate")):
        pen.rectangle((x, 26, x + 30, 56), color)
        pen.text((x + 42, 41), text, INK, font(26), "lm")
    for row, (title, log) in enumerate(zip(("synchronous", "asynchronous"), logs)):
        y, now = 110 + 205 * row, 0.0
        pen.text((32, y + 42), title, INK, font(31), "lm", stroke_width=0.5)
        for number, step in enumerate(log, 1):
            start, learns, end = at(now), at(now + step["waited"]), at(now + step["dt"])
            pen.rectangle((start, y, learns, y + 84), "#e5e7eb")
            pen.rectangle((learns, y, end - 2, y + 84), "#2f6fd0")
            if learns - start > 20:
                pen.text(((start + learns) / 2, y + 42), str(number), QUIET, font(25), "mm")
            now += step["dt"]
        pen.text((at(now) + 16, y + 42), f"{now:.0f} s", INK, font(30), "lm", stroke_width=0.5)
        idle = sum(step["idle"] for step in log)
        pen.rectangle((at(0), y + 94, at(now), y + 114), "#fde68a")
        pen.rectangle((at(0), y + 94, at(idle), y + 114), "#d97706")
        pen.text((at(0), y + 138), f"nothing to generate: {idle / now:.0%} of the time", QUIET,
                 font(26), "lm")
    for seconds in range(0, int(longest) + 1, 10):
        pen.text((at(seconds), 520), f"{seconds} s", QUIET, font(26), "mm")
    return page


def agent(args: Args):
    """10: a form without the earlier actions in the prompt, four turns, and with them."""
    model, _, _ = load(str(ROOT / "ckpt/demo"), "cpu", "float32")
    rows = []
    for remembers in (False, True):
        env = gym.make(gym.Task("gui_form", 1_000_002, split="test"))
        obs, actions, row = env.reset(), [], []
        goal = obs.text.splitlines()[0].replace(gym.IMAGE, "")
        while obs and len(row) < 4:
            action = act(model, obs.images[0], goal, history=actions if remembers else [])
            large = obs.images[0].resize((256, 256), Image.Resampling.NEAREST)
            row.append(tile(with_point(large, [4 * c for c in action.point]), str(action)))
            actions, obs = [*actions, action], env.step(str(action)).obs
        rows.append(row)
    return sheet(rows)


PICTURES = {"drafts": (drafts, "06-drafts.png"), "rewards": (rewards, "07-rewards.png"),
            "group": (group, "08-group.png"), "timeline": (timeline, "09-timeline.png"),
            "agent": (agent, "10-agent.png")}


def run(args: Args):
    # 128 colours are enough, and make the files a third as large.
    save_pictures(args, PICTURES, without="" if args.runs else "timeline", colors=128)


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="what")))
