"""Make an environment from a task and run episodes in it, whatever their layout."""
import difflib

from . import CATEGORIES
from .base import Env, IMAGE, Message, OneShot, Task
from .draw import cached_by_size

MOST_PIXELS = 1024      # side of the largest picture that a task may have


def names(pixels: int = MOST_PIXELS) -> list[str]:
    """The categories whose questions can be answered at this picture size, in table order."""
    return [name for name, category in CATEGORIES.items()
            if category.env.min_pixels <= pixels]


def make(task: Task) -> Env:
    """The environment of a task. Raises ValueError, in one line, if a field is out of range. [O]"""
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


# 300,000: about the bytes that an environment takes without its pictures
@cached_by_size(lambda drawn: 300_000 + sum(3 * i.width * i.height for i in drawn["obs"].images))
def _drawn(kind, task: Task) -> dict:
    """The attributes of a one-shot environment after its picture has been drawn."""
    env = kind(task)
    env.reset()
    return vars(env)


def begin(task: Task) -> Env:
    """Like `make`, for the rollouts of a GRPO group: a one-shot task is drawn once and all its
    environments share the picture, so the picture must not be changed."""
    env = make(task)
    if isinstance(env, OneShot):
        vars(env).update(_drawn(type(env), task))
    return env


def drive(env: Env):
    """Run one episode. A generator: it yields the list of Messages to answer, receives the reply's
    text through `send`, and returns the evidence (StopIteration.value).

    append layout: the list grows with every reply. segment layout: every list is one user message,
    since each observation repeats the goal and the earlier actions. [C]
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
    """Conversations in which the oracle answers; pretraining learns from them.

    A one-shot task or an episode in the append layout gives one conversation. In the segment layout
    each turn is a conversation, and so is each further question about its screen.
    think: put the thought before a reply, where there is one. parts: only the further questions
    about screens; an empty list where the category has none.
    """
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
    # In the append layout each conversation contains the ones before it.
    return conversations if env.layout == "segment" else conversations[-1:]


def play_out(task: Task, policy=None) -> tuple[str, list[str], dict]:
    """Play one episode and return (first prompt, replies, evidence).

    policy: None for the oracle; a list of replies, the last of which is repeated until the episode
    ends; or a function of (env, messages) that returns a reply.
    """
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
