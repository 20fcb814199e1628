"""Episodes: what a rollout leaves behind, as bytes for another process and as figures for a log.

    order      Episode(task, group=7, index=2)      which task, and which of its GRPO group
    played     + documents                          tokens, weights, log-probabilities, images
    scored     + score, status                      a reward in [0, 1], or an error
"""
import io
import json
import math
import sys
from dataclasses import astuple, dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image

import gym
from data import Document
from lib.common import write_json
from tasks.base import Task
from tasks.rewards import tally
from tasks.webdev import relative_rewards
from tokenizer import Tokenizer

IMAGES: WeakValueDictionary = WeakValueDictionary()


def intern_image(image: np.ndarray) -> np.ndarray:
    """Return the one array in memory that holds this picture, for as long as anybody uses it. All
    rollouts of a group see the same picture, and `collate` encodes each array once."""
    return IMAGES.setdefault((image.shape, image.tobytes()), image)


@dataclass
class Episode:
    """One rollout of a task: first only ordered, then played, then scored.

    documents: one for a one-shot task and in the append layout, one per turn in the segment layout
    (lib/rollout.py). Each has the extras `logp` and `version`, (T,) float32: the log-probability
    with which a token was sampled, and the number of the optimizer step whose weights sampled it.
    """
    task: Task
    group: int                                     # number of its GRPO group
    index: int                                     # its place in the group
    documents: list[Document] = field(default_factory=list)
    score: gym.Score | None = None
    status: str = ""                               # done, truncated (a reply was cut off) or error

    def replies(self, tokens: Tokenizer) -> list[str]:
        """The text of the model's replies, turn by turn."""
        replies = []
        for d in self.documents:
            # Sampled tokens have weight 1, prompts 0: a reply is a run of positive weights.
            borders = 1 + np.diff(d.weights > 0).nonzero()[0]
            for ids, weights in zip(np.split(d.ids, borders), np.split(d.weights, borders)):
                if weights.any():
                    replies.append(tokens.decode(ids[:-1] if ids[-1] in tokens.stops else ids))
        return replies


# In these categories the pages of a group are compared with each other: RVPO [R: UI2Code^N]. The
# value is the `reference` of relative_rewards. In ui_to_code a reward of 0 means a page that shows
# nothing: it failed. In ui_polish it means a page no better than the draft: below the reference.
PAGES = {"ui_to_code": None, "ui_polish": 1e-9}


def rewards_of(group: list[Episode]) -> list[float]:
    """The rewards that a GRPO group learns from; NaN for an episode that ended in an error."""
    rewards = [math.nan if e.score.error else e.score.reward for e in group]
    category = group[0].task.category
    if category in PAGES:
        valid = [i for i, e in enumerate(group) if not e.score.error]
        scores = [rewards[i] if rewards[i] or PAGES[category] else None for i in valid]
        for i, reward in zip(valid, relative_rewards(scores, PAGES[category])):
            rewards[i] = reward
    return rewards


def distinct(group: list[Episode], advantages: list[float]) -> list[tuple[Episode, float, int]]:
    """(episode, advantage, how often it occurs) for each different episode of a group that has
    something to learn. Two are equal if the same weights sampled the same tokens and earned the
    same; of short answers many are, and to learn each once saves a third of the update. [O]"""
    equal: dict[tuple, list[Episode]] = {}
    for episode, advantage in zip(group, advantages, strict=True):
        if not episode.score.error and any(d.weights.any() for d in episode.documents):
            tokens = [(d.ids.tobytes(), d.extras["version"].tobytes()) for d in episode.documents]
            equal.setdefault((advantage, *tokens), []).append(episode)
    return [(same[0], key[0], len(same)) for key, same in equal.items()]


# ---- bytes --------------------------------------------------------------------------------------

def to_bytes(episodes: list[Episode]) -> bytes:
    """Serialise episodes as an .npz archive of arrays and JSON, which, unlike a pickle, cannot run
    code when it is read."""
    arrays, plain = {}, []
    for i, e in enumerate(episodes):
        headers = []
        for j, d in enumerate(e.documents):
            arrays[f"{i}/{j}/ids"], arrays[f"{i}/{j}/weights"] = d.ids, d.weights
            for name, values in d.extras.items():
                arrays[f"{i}/{j}/+{name}"] = values
            for n, image in enumerate(d.images):
                arrays[f"{i}/{j}/{n}"] = image
            headers.append([d.source, len(d.images), list(d.extras)])
        plain.append([astuple(e.task), e.group, e.index, headers, e.score and vars(e.score),
                      e.status])
    buffer = io.BytesIO()
    np.savez(buffer, plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes) -> list[Episode]:
    """The episodes that `to_bytes` was given. Raises ValueError on anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            episodes = []
            for i, row in enumerate(json.loads(arrays["plain"].tobytes())):
                task, group, index, headers, score, status = row
                documents = [_document(arrays, f"{i}/{j}", *header)
                             for j, header in enumerate(headers)]
                score = gym.Score(**score) if score else None
                episodes.append(Episode(Task(*task), group, index, documents, score, status))
            return episodes
    except Exception as error:  # zipfile, numpy and json report damage by many kinds of exception
        raise ValueError(f"these bytes are no episodes: {error}") from None


def _document(arrays, key: str, source: int, images: int, extras: list[str]) -> Document:
    return Document(arrays[f"{key}/ids"], arrays[f"{key}/weights"],
                    [intern_image(arrays[f"{key}/{n}"]) for n in range(images)], source,
                    {name: arrays[f"{key}/+{name}"] for name in extras})


# ---- figures ------------------------------------------------------------------------------------

def staleness_of(groups: list[list[Episode]], step: int) -> dict:
    """{stale: mean, stale_max: largest}: by how many optimizer steps the weights that sampled the
    tokens of `groups` were older than those of `step`. {} if nothing was sampled."""
    ages = [step - d.extras["version"][d.weights > 0]
            for group in groups for e in group if not e.score.error for d in e.documents]
    ages = np.concatenate(ages) if ages else np.zeros(0)
    return {"stale": float(ages.mean()), "stale_max": float(ages.max())} if len(ages) else {}


def figures_of(groups: list[list[Episode]], has_signal) -> dict:
    """Figures of all groups that ended in a step, whether the model learns from them or not; `by`
    category: reward and pass@k. Errors count neither as a reward nor as a failure."""
    episodes = [e for group in groups for e in group]
    if not episodes:
        return {}
    size, count = len(groups[0]), len(episodes)
    scores = {group[0].task: [e.score for e in group] for group in groups}
    at_1, at_size = tally(scores), tally(scores, size)
    rewards = [e.score.reward for e in episodes if not e.score.error]
    figures = {"reward": float(np.mean(rewards))} if rewards else {}
    figures |= {
        "pass1": sum(e.score.solved for e in episodes) / max(1, len(rewards)),
        "no_signal": sum(not has_signal(group) for group in groups) / len(groups),
        "truncated": sum(e.status == "truncated" for e in episodes) / count,
        "errors": 1 - len(rewards) / count, "samples": count, "by": {}}
    for name, row in at_1.items():
        figures["by"][name] = {
            "reward": row["reward"], "pass1": row["pass"], f"pass{size}": at_size[name]["pass"],
            "errors": row["errors"] / (row["tasks"] * size)}
    return figures


def accuracy(episodes: list[Episode]) -> dict[str, float]:
    """{category: share of full rewards} and their mean, from one episode a task."""
    table = tally({e.task: [e.score] for e in episodes})
    shares = {name: row["pass"] for name, row in table.items()}
    return {**shares, "mean": float(np.nanmean(list(shares.values())))}


def report_evaluation(history: list[dict], episodes: list[Episode], tokens: Tokenizer, out: Path):
    """Print the last evaluation of `history` and write report.json.

    history: {step, reward, accuracy} of each evaluation so far; reward: the mean sampled reward
    since the one before. Prints an alarm when accuracy on held-out tasks has fallen although the
    reward rises: then the model is paid for something else than what it should learn.
    """
    step, reward, last = (history[-1][key] for key in ("step", "reward", "accuracy"))
    print(f"held out, greedy, step {step}: "
          + ", ".join(f"{name} {value:.1%}" for name, value in last.items()))
    # history[0] is the start, when there is no sampled reward yet: compare with history[1].
    if len(history) > 2 and reward > history[1]["reward"] + 0.02 and (
            last["mean"] < history[1]["accuracy"]["mean"] - 0.02):
        print("ALARM: reward rises and held-out accuracy falls: what is rewarded? See "
              f"{out}/pictures")
    first = history[0]["accuracy"]
    try:
        write_json(out / "report.json", {
            "title": f"RL, {out.name}",
            "samples": best_and_worst(episodes, tokens, out / "pictures"),
            "figures": {name: {"before": first[name], f"after {step} steps": value}
                        for name, value in last.items()}})
    except OSError as error:        # a full disk is no reason to lose the run
        print(f"step {step}: {out}/report.json and its pictures are not written "
              f"({error.strerror or error})", file=sys.stderr)


def best_and_worst(episodes: list[Episode], tokens: Tokenizer, folder: Path) -> list[dict]:
    """The best and the worst episode of each category for report.json; their pictures are written
    to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for name in dict.fromkeys(e.task.category for e in episodes):
        own = sorted((e for e in episodes if e.task.category == name and not e.score.error),
                     key=lambda e: -e.score.reward)
        for e in own[:1] + own[1:][-1:]:    # the best and the worst, or the only one
            shown.append(_shown(e, tokens, folder))
    return shown


def _shown(e: Episode, tokens: Tokenizer, folder: Path) -> dict:
    files = []
    for i, image in enumerate(image for d in e.documents for image in d.images):
        files.append(f"{e.task.category}-{e.task.seed}-{i}.png")
        Image.fromarray(image).save(folder / files[-1])
    first = e.documents[0]
    question = first.ids[:int(first.weights.argmax())]      # all before the first sampled token
    answers = [_plain_text(d.ids[d.weights > 0], tokens) for d in e.documents]
    truth = " → ".join(gym.play_out(e.task)[1])
    return {"category": e.task.category, "level": e.task.level, "pictures": files,
            "question": _plain_text(question, tokens).replace("\n", " "),
            "answer": " → ".join(answers),
            "truth": _plain_text(tokens.encode_reply(truth), tokens), "reward": e.score.reward}


def _plain_text(ids, tokens: Tokenizer) -> str:
    """Text without special tokens."""
    return tokens.plain(ids).strip()
