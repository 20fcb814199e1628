"""Play tasks of the gym with a model and count what it solves: accuracy, blank pictures, chance.

`sample.py eval` prints these figures; the demo, the reports and the experiments in lab/ call the
same functions. What is computed of several categories is in lib/summary.py.
"""
import sys
from collections import Counter

from tqdm import tqdm

import gym
from data import document, parse_mix, sight, task_pixels
from engine import Engine
from lib.card import trained_on
from lib.checkpoint import load_config
from lib.cli import UserError
from lib.rollout import Episode, Rollout, rollout, RolloutSettings
from lib.scoring import interval
from lib.summary import compare, mean_of, not_played, outcome, percentages, summary
from tasks.base import Task
from tasks.rewards import pass_at_k


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
              blank: bool = False, bar=None, samples: int = 0, drafts: int = 0,
              steps: Counter | None = None, kind=Rollout, think: int = 0) -> list[Episode]:
    """Let the model do `tasks`, greedily and `slots` of them side by side. Returns their Episodes
    in the same order.

    context, max_new: tokens, 0 takes those of `budget`. blank: every picture is replaced by plain
    grey of the same size. samples: play each task so often at temperature 1 instead; its Episodes
    follow each other. drafts: tokens that the MTP head drafts. steps: the engine's `steps` and
    `tokens` are added to it. kind: the class of the rollouts. think: tokens of a thought before
    each reply, beside those of `context`; 0: none.
    """
    if not (context and max_new):
        most, reply = budget(tasks, tokens, model.config)
        context, max_new = context or most, max_new or reply
    context += think
    episodes = [Episode(task, i, j) for i, task in enumerate(tasks) for j in range(samples or 1)]
    # adapt=False: how many drafts pay here and now has no influence on the tokens a step
    engine = Engine(model, max(1, min(slots, len(episodes))), context, drafts, adapt=False,
                    say=lambda line: None)
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    settings = RolloutSettings(tokens, model.config, context, max_new, think,
                               temperature=float(samples > 0), blank=blank)
    rollout(engine, episodes, settings, gym.Rewards(), bar, kind)
    if steps is not None:
        steps.update(steps=engine.steps, tokens=engine.tokens)
    return episodes


def figures(tasks, shown, blanked) -> dict | None:
    """The figures of `tasks` from their Episodes with pictures and with blank ones; None where all
    ended in errors: nothing was measured, and 0% would be wrong."""
    valid, grey = ([e for e in played if e.score.error is None] for played in (shown, blanked))
    if not valid:
        return None
    accuracy, blank = (sum(e.score.solved for e in played) / max(1, len(played))
                       for played in (valid, grey))
    low, high = interval(accuracy, len(valid))
    chance = sum(gym.CATEGORIES[t.category].env.chance(t.level) for t in tasks) / len(tasks)
    return {"accuracy": accuracy, "low": low, "high": high, "blank": blank, "chance": chance,
            "reward": sum(e.score.reward for e in valid) / len(valid),
            "errors": len(shown) - len(valid), "n": len(tasks)}


def reply_figures(shown, tokens) -> dict:
    """How many replies an episode has, and how many tokens a reply: means over the episodes that
    did not end in errors, with the token that ends a reply."""
    valid = [e for e in shown if e.score.error is None]
    replies = sum(len(e.replies(tokens)) for e in valid)
    sampled = sum(float(d.weights.sum()) for e in valid for d in e.documents)
    return {"replies": replies / len(valid), "reply_tokens": sampled / max(1, replies)}


def pass_figures(sampled: list[list[Episode]]) -> dict[str, dict]:
    """{k: {value, low, high}} of pass@k for k = 1, 2, 4, ... and the number of samples of a task.

    sampled: the Episodes of each task. value: the mean of the unbiased estimates (`pass_at_k`),
    low and high its 95% interval over tasks, by `interval`. Samples that ended in errors are left
    out; so are tasks with fewer than k others. {} if there are none.
    """
    counts = []
    for episodes in sampled:
        scores = [e.score for e in episodes if e.score.error is None]
        counts.append((sum(score.solved for score in scores), len(scores)))
    most, found = max(map(len, sampled)), {}
    for k in sorted({2 ** i for i in range(most.bit_length()) if 2 ** i < most} | {most}):
        estimates = [pass_at_k(right, n, k) for right, n in counts if n >= k]
        if estimates:
            value = sum(estimates) / len(estimates)
            low, high = interval(value, len(estimates))
            found[str(k)] = {"value": value, "low": low, "high": high}
    return found


def category_names(mix: str, config) -> list[str]:
    """The categories of a mix that a model sees. Raises UserError where it names anything else."""
    names = [name for name, _ in parse_mix(mix, sight(config))]
    if not names:
        raise UserError("--mix names no category")
    unknown = [name for name in names if name not in gym.names()]
    if unknown:
        raise UserError(f"there is no category '{unknown[0]}'; `python gym.py list` shows them")
    return names


def known_tasks(folders, mix: str, levels: int) -> tuple[str, int, str]:
    """(mix, levels, where the mix is from) to evaluate the checkpoints in `folders` on: those that
    are given, or else the categories and levels that all of them were trained on. Raises UserError
    where there are none, or where one of the models can't see what is asked for."""
    configs = [load_config(folder) for folder in folders]
    trained = [trained_on(folder) for folder in folders]
    levels = levels or min(known for _, known, _ in trained)
    if mix:     # "gym" is what the model with the least room for pictures sees
        return ",".join(category_names(mix, min(configs, key=sight))), levels, "--mix"
    known = [dict(parse_mix(names, sight(config)))
             for (names, *_), config in zip(trained, configs)]
    shared = [name for name in known[0]                 # without text and code
              if name in gym.names() and all(name in names for names in known)]
    sources = " and ".join(dict.fromkeys(source for *_, source in trained))
    if not shared:
        only = trained[0][0] if len(trained) == 1 else "nothing that all have in common"
        raise UserError(f"{sources} names no category, only {only}: give --mix")
    return ",".join(shared), levels, sources


def tasks_of(name: str, config, levels: int, count: int, split: str, seed: int,
             pixels: int = 0) -> list[Task]:
    """`count` tasks of a category, from levels 0..levels-1 in turn."""
    side = task_pixels(name, config, pixels)
    return [Task(name, seed + i, i % levels, split, side) for i in range(count)]


def evaluate(model, tokens, mix="gym", levels=2, count=200, split="test", seed=1_000_000,
             slots=64, pixels=0, context=0, max_new=0, passes=0, drafts=0) -> dict:
    """Evaluate a model on `count` tasks of each category in `mix`, from levels 0..levels-1 in turn.

    Returns {category: {accuracy, low, high, blank, chance, reward, errors, n, replies,
    reply_tokens, solved, by_level}}: accuracy is the share of tasks with full reward, low and high
    its 95% interval, blank the share with grey pictures (0 where tasks have none), chance the share
    that a guess would get, reward the mean reward, replies those of an episode, reply_tokens those
    of a reply, solved a character for each task (lib/summary.py) and by_level the first eight
    figures for each level.
    With passes: `pass`, see pass_figures. With drafts: `tokens_a_step`.

    Tasks that end in an error are counted in `errors` only; a category without any other task is
    left out and named on stderr. Raises UserError if `mix` names what is no category, or none is
    left.
    """
    names, table = category_names(mix, model.config), {}
    bar = tqdm(total=(2 + passes) * count * len(names), desc="eval",
               disable=not sys.stderr.isatty())
    for name in names:
        tasks = tasks_of(name, model.config, levels, count, split, seed, pixels)
        bar.set_postfix_str(name)
        most, reply = budget(tasks, tokens, model.config)
        play = (slots, context or most, max_new or reply)
        steps = Counter()
        shown = run_tasks(model, tokens, tasks, *play, False, bar, drafts=drafts, steps=steps)
        if any(d.images for e in shown for d in e.documents):
            blanked = run_tasks(model, tokens, tasks, *play, True, bar)
        else:           # only text: there is nothing to blank, and so no accuracy without it
            blanked = []
            bar.update(count)
        row = figures(tasks, shown, blanked)
        if row is None:
            print(f"{name} is left out, as all {count} tasks ended in errors, the first one in: "
                  f"{shown[0].score.error}", file=sys.stderr)
            continue
        row |= reply_figures(shown, tokens)
        row["solved"] = "".join(outcome(e.score) for e in shown)
        if passes:
            sampled = run_tasks(model, tokens, tasks, *play, False, bar, samples=passes)
            row["pass"] = pass_figures([sampled[i:i + passes]
                                        for i in range(0, len(sampled), passes)])
        if drafts and steps["steps"]:       # replies of one token take no step after the prompt
            row["tokens_a_step"] = steps["tokens"] / steps["steps"]
        row["by_level"] = [figures(tasks[k::levels], shown[k::levels], blanked[k::levels])
                           for k in range(min(levels, count))]
        table[name] = row
    bar.close()
    if not table:
        raise UserError(f"no task of {', '.join(names)} could be played: there is nothing to show")
    return table


# ---- tables for the terminal --------------------------------------------------------------------

def show(table: dict):
    """Print the table of `evaluate`."""
    levels = max(len(row["by_level"]) for row in table.values())
    most = max((int(k) for row in table.values() for k in row.get("pass", ())), default=0)
    passes = [str(k) for k in sorted({1, most})] if most else []
    steps = any("tokens_a_step" in row for row in table.values())
    print(f"{'category':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>6}"
          f"{'tokens':>8}" + "".join(f"{f'pass@{k}':>9}{'':<8}" for k in passes)
          + f"{'a step':>7}" * steps
          + "".join(f"{f'level {k}':>9}" for k in range(levels) if levels > 1))
    for name, row in table.items():
        print(f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{row['chance']:>8.1%}{row['n']:>6}{row['reply_tokens']:>8.1f}"
              + "".join(pass_cell(row["pass"].get(k)) for k in passes)
              + (f"{row['tokens_a_step']:>7.2f}" if "tokens_a_step" in row else
                 f"{'-':>7}" * steps)
              + "".join(f"{level['accuracy']:>9.1%}" if level else f"{'-':>9}"
                        for level in row["by_level"] if levels > 1)
              + (f"  {row['errors']} not counted: errors" if row["errors"] else ""))
    print(line_of("mean", mean_of(list(table.values()))))


def pass_cell(found: dict | None) -> str:
    """pass@k with its interval; None: no task had k samples without an error."""
    if found is None:
        return f"{'-':>9}{'':<8}"
    return f"{found['value']:>9.1%} {100 * found['low']:>3.0f}-{100 * found['high']:<3.0f}"


def line_of(name: str, row: dict) -> str:
    """A line of the table for a mean over categories."""
    return (f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
            f"{row['blank']:>7.1%}{row['chance']:>8.1%}")


def show_summary(table: dict):
    """Print the means by family and tier, and the composites."""
    rows = summary(table)
    print(f"\n{'means of':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}"
          f"{'categories':>12}{'ahead':>7}")
    for kind in ("all", "family", "tier", "composite"):
        for name, row in rows[kind].items():
            print(f"{line_of(name, row)}{row['categories']:>12}{row['ahead']:>7}")
    for name, parts in not_played(table).items():
        print(f"{name:<17}left out, since not played: {', '.join(parts)}")
    print("ahead: categories that are 20 points or more above blank pictures and above chance; "
          "tokens: of a reply;\na step: tokens that a step of the engine gives with drafts")


def show_comparison(found: dict[str, dict[str, dict]], first: str):
    """Print what `compare` returns: the accuracies, a column for each table, and below them the
    differences from `first`."""
    columns = list(next(iter(found.values())))
    others = [column for column in columns if column != first]
    wide = max(16, *(len(column) + 2 for column in columns))

    def block(title, columns, wide, cell, names=found):
        print(f"\n{title:<17}" + "".join(f"{column:>{wide}}" for column in columns))
        for name in names:
            cells = "".join(f"{cell(found[name][column]):>{wide}}" for column in columns)
            print(f"{name:<17}{cells}".rstrip())

    block("accuracy, 95%", columns, wide, lambda row:
          f"{row['accuracy']:.1%} {100 * row['low']:>4.0f}-{100 * row['high']:<3.0f}")
    if others:
        block(f"minus {first}", others, max(24, wide), difference_cell)
        print("in points, on the same tasks, with 95% intervals; *: 0 is outside")
    longer = [name for name, row in found.items() if row[first].get("replies", 1) > 1]
    if longer:
        block("replies a task", columns, wide, lambda row: f"{row['replies']:.2f}    ", longer)


def difference_cell(row: dict) -> str:
    """A difference in points with its interval, and a star where 0 is outside."""
    if "difference" not in row:
        return "- "
    moved, low, high = (100 * value for value in row["difference"])
    return f"{moved:+.1f} [{low:+.1f}, {high:+.1f}]" + " *"[low > 0 or high < 0]


def comparison(tables: dict[str, dict], first: str) -> dict:
    """Compare tables about the same tasks with the one named `first`, print it, and return what is
    kept of it: `title`, `figures` and `note` are for lab.report."""
    found = compare(tables, first)
    if not found:
        raise UserError("no category could be played in all of them: there is nothing to compare")
    show_comparison(found, first)
    return {"title": ", ".join(tables), "tables": tables, "first": first, "compared": found,
            "figures": percentages(found, first),
            "note": f"Accuracies in percent; differences from {first} in points, on equal tasks."}
