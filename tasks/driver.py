"""Environments by name, and one driver for every layout."""
import difflib
from functools import lru_cache

from tasks import CATEGORIES
from tasks.base import Env, IMAGE, Message, OneShot, Task


MOST_PIXELS = 1024


def names(pixels: int = MOST_PIXELS) -> list[str]:
    """The categories that can be read at this size, in the order of the table."""
    return [name for name, category in CATEGORIES.items()
            if category.env.min_pixels <= pixels]


def make(task: Task) -> Env:
    """The environment of a task. Raises ValueError, in one line, on a task that can't be. [O]"""
    if task.category not in CATEGORIES:
        near = difflib.get_close_matches(str(task.category), CATEGORIES, 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`gym.py list` shows them"
        raise ValueError(f"unknown category {task.category!r}; {hint}")
    kind = CATEGORIES[task.category].env
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
