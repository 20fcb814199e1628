"""Rollouts: a model and an environment of the gym in conversation, as tokens to learn from.

    rollout(engine, orders, policy, rewards)    plays and judges Episodes, all side by side

The same for all who play: RL samples, examinations are greedy, and collect.py's Actor takes a Play
step by step, as engine and environments get ready. Multi-turn layouts and the forced end of a
thought are here, so that the learning in rl.py knows of Documents only.
"""
import math
from dataclasses import dataclass

import numpy as np

import gym
from data import Document, document
from engine import Request
from gym import Score
from lib.episodes import Episode, intern_image
from model import Config
from tasks.rewards import one_line
from tokenizer import Tokenizer


@dataclass
class Policy:
    """What playing must know of the model and of the run. blank: pictures are shown as grey."""
    tokens: Tokenizer
    config: Config
    context: int
    max_new: int
    think: int = 0
    seed: int = 0
    temperature: float = 1.0
    blank: bool = False


def grow(d: Document, ids, images=(), sampled=None) -> Document:
    """`d` with more ids behind. Weight 1, log-probability and version where the engine's Result
    `sampled` brings them; 0 on what was put in: prompts, observations, a forced </think>."""
    def longer(name, values):
        had = d.extras.get(name, np.zeros(len(d.ids)))
        return np.append(had, values[:len(ids)] if sampled else np.zeros(len(ids)))
    new = {"logp": longer("logp", sampled and sampled.logps),
           "version": longer("version", sampled and sampled.versions)}
    return Document(np.append(d.ids, np.array(ids, np.int32)),
                    np.append(d.weights, np.full(len(ids), bool(sampled), np.float32)),
                    [*d.images, *images], d.source,
                    {name: value.astype(np.float32) for name, value in new.items()})


class Play:
    """A rollout under way: the environment on one side, growing Documents on the other. Tokens
    are kept as they were sampled; nothing is ever encoded a second time."""

    def __init__(self, episode: Episode, policy: Policy):
        self.episode, self.policy, self.drive, self.evidence = episode, policy, None, None
        self.turn, self.said = 0, []

    def advance(self, result=None) -> Request | None:
        """Take the engine's Result and go on to the next Request; None when the episode is over:
        then `evidence` is there, or the score an error. Never raises: what an environment does
        wrong is not the model's failure."""
        try:
            if self.drive is None:
                self.env = gym.begin(self.episode.task)
                self.layout, self.drive = self.env.layout, gym.drive(self.env)
                return self._ask(next(self.drive))
            reply = self._hear(result)
            if self.thinking:
                return self._request(self.policy.max_new, thinking=False)
            return self._ask(self.drive.send(reply))
        except StopIteration as end:
            self.evidence = end.value
        except Exception as error:
            self.judged(Score(math.nan, {}, one_line(error)))
        return None

    def judged(self, score: Score) -> Episode:
        self.episode.score = score
        self.episode.status = "error" if score.error else self.episode.status or "done"
        return self.episode

    def _ask(self, messages) -> Request | None:
        p, documents = self.policy, self.episode.documents
        old = self.layout == "append" and bool(documents)
        new = document(messages[-1:] if old else messages, p.tokens, p.config, answer=True)
        ids = new.ids
        if p.think:         # the template ends in <think></think> and a newline: reopen the thought
            ids = ids[:-1 - len(p.tokens.encode("\n"))]
        images = [intern_image(np.full_like(image, 128) if p.blank else image)
                  for image in new.images]
        if old:             # without [gMASK]<sop>; the model may have said who speaks next itself
            ids = ids[3 if documents[-1].ids[-1] == ids[2] else 2:]
            documents[-1] = grow(documents[-1], ids, images)
        else:           # the group sees the same picture, and the encoder sees it once
            documents.append(grow(Document(ids[:0], new.weights[:0]), ids, images))
        self.said = [p.tokens.special["<think>"]] if p.think else []
        return self._request(p.think or p.max_new, thinking=bool(p.think))

    def _request(self, most: int, thinking: bool) -> Request | None:
        prompt, e = self.episode.documents[-1], self.episode
        put_in = len(prompt.ids) - int(prompt.weights.sum())
        if put_in >= self.policy.context:
            raise ValueError(f"{put_in} tokens, the model's own left out, outgrew the context")
        if len(prompt.ids) >= self.policy.context:      # it has talked too much: judged as it is
            e.status, self.evidence = "truncated", self.env.evidence()
            return None
        key = [self.policy.seed, e.group, e.index, self.turn]
        self.turn, self.thinking = self.turn + 1, thinking
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return Request(prompt, most, self.policy.temperature, seed=seed)

    def _hear(self, result) -> str:
        """Note what the model said; the reply's text."""
        tokens, ids = self.policy.tokens, list(result.ids)
        if ids[-1] == tokens.image:     # it ended the reply; a slot without pixels teaches nothing
            ids = ids[:-1]
        documents = self.episode.documents
        documents[-1] = grow(documents[-1], ids, sampled=result)
        self.said += ids[:-1] if ids and ids[-1] in tokens.stops else ids
        self.thinking = self.thinking and result.finish == "length"
        if self.thinking and tokens.special["</think>"] not in self.said:
            close = [tokens.special["</think>"], *tokens.encode("\n")]  # time to answer [R]
            documents[-1] = grow(documents[-1], close)
            self.said += close
        elif result.finish != "stop" and not self.thinking:
            self.episode.status = "truncated"
        return tokens.decode(self.said)


def rollout(engine, orders: list[Episode], policy: Policy, rewards, bar=None) -> list[Episode]:
    """Play and judge `orders`, all side by side; returned in their order. bar: of tqdm's kind."""
    asked = {}

    def go_on(play, result=None):
        request = play.advance(result)
        if request:
            asked[engine.submit(request)] = play
            return
        if play.evidence is not None:
            play.judged(rewards.score(play.episode.task, play.evidence))
        if bar:
            bar.update(1)

    for order in orders:
        go_on(Play(order, policy))
    while engine.busy:
        for result in engine.step():
            go_on(asked.pop(result.id), result)
    return orders
