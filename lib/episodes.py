"""Episodes: what a rollout leaves behind, as bytes for another process, and as figures."""
import io
import json
from dataclasses import astuple, dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image

import gym
from data import Document
from tasks.base import Task
from tasks.rewards import tally
from tokenizer import Tokenizer


PICTURES: WeakValueDictionary = WeakValueDictionary()


def intern_image(image: np.ndarray) -> np.ndarray:
    """The same picture in memory once, for as long as anything holds it: rollouts of a task see
    what the others saw, and `collate` lays down each array once."""
    return PICTURES.setdefault((image.shape, image.tobytes()), image)


@dataclass
class Episode:
    """One rollout of a task: ordered, played, judged. Those of a group share their task."""
    task: Task
    group: int
    index: int
    documents: list = field(default_factory=list)  # one; or one a turn, in the segment layout
    score: gym.Score | None = None                 # a reward, or an error
    status: str = ""                               # done, truncated (a reply was cut off) or error

    def replies(self, tokens: Tokenizer) -> list[str]:
        """What the model said, turn by turn."""
        said = [run for d in self.documents for run, own in zip(
            *(np.split(x, 1 + np.diff(d.weights > 0).nonzero()[0]) for x in (d.ids, d.weights)))
            if own.any()]
        return [tokens.decode(ids[:-1] if ids[-1] in tokens.stops else ids) for ids in said]


def to_bytes(episodes: list[Episode]) -> bytes:
    """Episodes for another process, or for later, as arrays and plain text: reading them can run
    nothing."""
    arrays, plain = {}, []
    for i, e in enumerate(episodes):
        for j, d in enumerate(e.documents):
            extras = {f"+{name}": array for name, array in d.extras.items()}
            parts = {"ids": d.ids, "weights": d.weights, **extras}
            arrays |= {f"{i}/{j}/{name}": array for name, array in parts.items()}
            arrays |= {f"{i}/{j}/{n}": image for n, image in enumerate(d.images)}
        heads = [[d.source, len(d.images), list(d.extras)] for d in e.documents]
        plain.append([astuple(e.task), e.group, e.index, heads, e.score and vars(e.score),
                      e.status])
    buffer = io.BytesIO()
    np.savez(buffer, plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes) -> list[Episode]:
    """What `to_bytes` was given. Raises ValueError on anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return [Episode(Task(*task), group, index, [
                        Document(arrays[f"{i}/{j}/ids"], arrays[f"{i}/{j}/weights"],
                                 [intern_image(arrays[f"{i}/{j}/{n}"]) for n in range(images)],
                                 source,
                                 {name: arrays[f"{i}/{j}/+{name}"] for name in extras})
                        for j, (source, images, extras) in enumerate(heads)],
                            score and gym.Score(**score), status)
                    for i, (task, group, index, heads, score, status)
                    in enumerate(json.loads(arrays["plain"].tobytes()))]
    except Exception as error:  # of damage zipfile and numpy have many kinds
        raise ValueError(f"these bytes are no episodes: {error}") from None


def ages_of(groups: list[list[Episode]], step: int) -> dict:
    """How many updates the tokens that are learnt from lag behind those done: mean and most."""
    ages = [step - d.extras["version"][d.weights > 0]
            for group in groups for e in group if not e.score.error for d in e.documents]
    ages = np.concatenate(ages) if ages else np.zeros(0)
    return {"stale": float(ages.mean()), "stale_max": float(ages.max())} if len(ages) else {}


def figures_of(groups: list[list[Episode]], live) -> dict:
    """What the groups show that ended in a step, learnt from or not; `by` category, reward and
    pass@k. Errors count for neither."""
    episodes = [e for group in groups for e in group]
    if not episodes:
        return {}
    size = len(groups[0])
    scores = {group[0].task: [e.score for e in group] for group in groups}
    once, often = tally(scores), tally(scores, size)
    valid = [e for e in episodes if not e.score.error]
    rewards = [e.score.reward for e in valid]
    count = len(episodes)
    return {**({"reward": float(np.mean(rewards))} if rewards else {}),
            "pass1": sum(r > 0.999 for r in rewards) / max(1, len(rewards)),
            "silent": sum(not live(group) for group in groups) / len(groups),
            "truncated": sum(e.status == "truncated" for e in episodes) / count,
            "errors": 1 - len(valid) / count, "samples": count,
            "by": {name: {"reward": row["reward"], "pass1": row["pass"],
                          f"pass{size}": often[name]["pass"],
                          "errors": row["errors"] / (row["tasks"] * size)}
                   for name, row in once.items()}}


def accuracy(episodes: list[Episode]) -> dict[str, float]:
    """Share of full rewards by category, and their mean."""
    table = {name: row["pass"] for name, row in
             tally({e.task: [e.score] for e in episodes}).items()}
    return {**table, "mean": float(np.nanmean(list(table.values())))}


def samples(episodes: list[Episode], tokens: Tokenizer, folder: Path) -> list[dict]:
    """The best and the worst Episode of each category for report.json, with pictures on disk."""
    folder.mkdir(parents=True, exist_ok=True)

    def words(ids):
        return tokens.decode([i for i in ids if i < tokens.n_ranks]).strip()

    made = []
    for name in dict.fromkeys(e.task.category for e in episodes):
        own = sorted((e for e in episodes if e.task.category == name and not e.score.error),
                     key=lambda e: -e.score.reward)
        for e in own[:1] + own[1:][-1:]:
            files = []
            for i, image in enumerate(image for d in e.documents for image in d.images):
                files.append(f"{name}-{e.task.seed}-{i}.png")
                Image.fromarray(image).save(folder / files[-1])
            first, truth = e.documents[0], " → ".join(gym.play_out(e.task)[1])
            made.append({
                "category": name, "level": e.task.level, "pictures": files,
                "question": words(first.ids[:int(first.weights.argmax())]).replace("\n", " "),
                "answer": " → ".join(words(d.ids[d.weights > 0]) for d in e.documents),
                "truth": words(tokens.encode_reply(truth)), "reward": e.score.reward})
    return made
