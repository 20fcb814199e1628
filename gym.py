"""The gym: categories by name, one driver for every layout, and the reward system.

    python gym.py list                          the categories
    python gym.py show point --level 2          a sheet of instances, out/gym/point.png
    python gym.py check                         the contract that every category keeps
    python gym.py play gui_form                 be the model, in the terminal

An environment gives no reward; it hands out evidence, and `Rewards` judges that. The two know
each other only through the table RULES, so a verifier can be mended without touching a task, and
a verifier that fails gives an error, never a zero that would train the model away from its work.
"""
import difflib
import math
from dataclasses import dataclass, field

from tasks import CATEGORIES, verify
from tasks.base import Env, Message, OneShot, Task

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
