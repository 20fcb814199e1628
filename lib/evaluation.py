"""Play tasks of the gym with a model and count what it solves: accuracy, blank pictures, chance.

`sample.py eval` prints these figures; the demo, the reports and the experiments in lab/ call the
same functions.
"""
import sys

from tqdm import tqdm

import gym
from data import document, parse_mix, sight, task_pixels
from engine import Engine
from lib.cli import UserError
from lib.rollout import Episode, rollout, RolloutSettings
from lib.scoring import interval
from tasks.base import Task


def budget(tasks, tokens, config) -> tuple[int, int]:
    """How many tokens to allow for a conversation and for a reply: twice as many as the oracle's
    longest in 24 of the tasks, since a model may take detours, and some to spare."""
    longest = reply = 0
    for task in tasks[::max(1, len(tasks) // 24)]:
        for talk in gym.demonstrate(task):
            d = document(talk, tokens, config)
            longest = max(longest, len(d.ids))
            reply = max(reply, max(len(tokens.encode(m.text)) for m in talk[1::2]))
    return min(2 * longest + 64, config.text.max_position_embeddings), 2 * reply + 16


def run_tasks(model, tokens, tasks, slots: int = 64, context: int = 0, max_new: int = 0,
              blank: bool = False, bar=None) -> list[Episode]:
    """Let the model do `tasks`, greedily and `slots` of them side by side. Returns their Episodes
    in the same order. context, max_new: tokens, 0 takes those of `budget`. blank: every picture is
    replaced by plain grey of the same size."""
    if not (context and max_new):
        most, reply = budget(tasks, tokens, model.config)
        context, max_new = context or most, max_new or reply
    engine = Engine(model, max(1, min(slots, len(tasks))), context)
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    settings = RolloutSettings(tokens, model.config, context, max_new, temperature=0.0, blank=blank)
    episodes = [Episode(task, i, 0) for i, task in enumerate(tasks)]
    return rollout(engine, episodes, settings, gym.Rewards(), bar)


def figures(tasks, shown, blanked) -> dict | None:
    """The figures of `tasks` from their Episodes with pictures and with blank ones; None where all
    ended in errors: nothing was measured, and 0% would be wrong."""
    valid, grey = ([e for e in played if e.score.error is None] for played in (shown, blanked))
    if not valid:
        return None
    accuracy, blank = (sum(e.score.reward > 0.999 for e in played) / max(1, len(played))
                       for played in (valid, grey))
    low, high = interval(accuracy, len(valid))
    chance = sum(type(gym.make(t)).chance(t.level) for t in tasks) / len(tasks)
    return {"accuracy": accuracy, "low": low, "high": high, "blank": blank, "chance": chance,
            "reward": sum(e.score.reward for e in valid) / len(valid),
            "errors": len(shown) - len(valid), "n": len(tasks)}


def evaluate(model, tokens, mix="gym", levels=2, count=200, split="test", seed=1_000_000,
             slots=64, pixels=0, context=0, max_new=0) -> dict:
    """Evaluate a model on `count` tasks of each category in `mix`, from levels 0..levels-1 in turn.

    Returns {category: {accuracy, low, high, blank, chance, reward, errors, n, by_level}}: accuracy
    is the share of tasks with full reward, low and high its 95% interval, blank the share with grey
    pictures, chance the share that a guess would get, reward the mean reward, and by_level the same
    figures for each level. Tasks that end in an error are counted in `errors` only; a category
    without any other task is left out and named on stderr. Raises UserError if `mix` names what is
    no category, or none is left.
    """
    names = [name for name, _ in parse_mix(mix, sight(model.config))]
    if not names:
        raise UserError("--mix names no category")
    unknown = [name for name in names if name not in gym.names()]
    if unknown:
        raise UserError(f"there is no category '{unknown[0]}'; `python gym.py list` shows them")
    table = {}
    bar = tqdm(total=2 * count * len(names), desc="eval", disable=not sys.stderr.isatty())
    for name in names:
        side = task_pixels(name, model.config, pixels)
        tasks = [Task(name, seed + i, i % levels, split, side) for i in range(count)]
        bar.set_postfix_str(name)
        most, reply = budget(tasks, tokens, model.config)
        shown, blanked = (run_tasks(model, tokens, tasks, slots, context or most, max_new or reply,
                                    blank, bar) for blank in (False, True))
        row = figures(tasks, shown, blanked)
        if row is None:
            print(f"{name} is left out, as all {count} tasks ended in errors, the first one in: "
                  f"{shown[0].score.error}", file=sys.stderr)
            continue
        row["by_level"] = [figures(tasks[k::levels], shown[k::levels], blanked[k::levels])
                           for k in range(min(levels, count))]
        table[name] = row
    bar.close()
    if not table:
        raise UserError(f"no task of {', '.join(names)} could be played: there is nothing to show")
    return table


def show(table: dict):
    """Print the table of `evaluate`."""
    levels = max(len(row["by_level"]) for row in table.values())
    print(f"{'category':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>6}"
          + "".join(f"{f'level {k}':>9}" for k in range(levels) if levels > 1))
    for name, row in table.items():
        print(f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{row['chance']:>8.1%}{row['n']:>6}"
              + "".join(f"{level['accuracy']:>9.1%}" if level else f"{'-':>9}"
                        for level in row["by_level"] if levels > 1)
              + (f"  {row['errors']} not counted: errors" if row["errors"] else ""))
    mean = sum(row["accuracy"] for row in table.values()) / len(table)
    print(f"{'mean':<17}{mean:>9.1%}")
