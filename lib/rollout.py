"""Rollouts: the model and an environment of the gym take turns; the tokens are kept for learning.

    rollout(engine, episodes, settings, rewards)    plays and scores episodes, all side by side

RL samples with it and evaluations are greedy; lib/async_rl.py advances each Rollout by itself as
engine and environments become ready. Multi-turn layouts and the thinking budget are handled here,
so that rl.py only sees Documents.

Tokens in, tokens out [R: GLM-5]: what the model has sampled is kept as token ids and is never
encoded again from text, which could give other ids than those that were sampled. `_prompt` is the
one place where a document grows. For two turns of a search task:

    append layout: one document, each turn is added at its end
                                                                      weight  logp
      turn 1  [gMASK] <sop> <|user|> What is ... <|assistant|>          0      0     prompt
              open("Labone") <|observation|>                            1    -0.3    sampled
      turn 2  Labone is a city. ... <|assistant|>                       0      0     observation
              answer("86") <|user|>                                     1    -0.1    sampled

    segment layout: one document a turn; the prompt repeats the goal and the earlier actions
      turn 1  [gMASK] <sop> <|user|> IMAGE Tick B. <|assistant|>        0      0     prompt
              click(874, 874) <|user|>                                  1    -0.2    sampled
      turn 2  [gMASK] <sop> <|user|> IMAGE Tick B. click(874, 874) ...  0      0     prompt
              click(749, 125) <|user|>                                  1    -0.1    sampled

In turn 2 of the append layout the observation is encoded as a conversation of its own,
[gMASK] <sop> <|observation|> Labone ..., and its first tokens are cut off: the document begins with
[gMASK] <sop> already, and <|observation|> is the token with which the model ended turn 1.
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
class RolloutSettings:
    """How to play. context, max_new and think count tokens."""
    tokens: Tokenizer
    config: Config
    context: int                # of a whole conversation
    max_new: int                # of a reply
    think: int = 0              # of a thought before it; 0: the model does not think
    seed: int = 0
    temperature: float = 1.0    # 0: greedy
    blank: bool = False         # replace every picture by grey


def grow(d: Document, ids, images=(), sampled=None) -> Document:
    """Return `d` with `ids` at its end.

    sampled: the engine's Result if the model sampled these tokens; they get weight 1, their
    log-probability and their version. Otherwise they were put in (prompt, observation, forced
    </think>) and get 0 in all three: the model does not learn to predict them.
    """
    zeros, extras = np.zeros(len(ids)), {}
    for name, values in (("logp", sampled and sampled.logps),
                         ("version", sampled and sampled.versions)):
        before = d.extras.get(name, np.zeros(len(d.ids)))
        after = values[:len(ids)] if sampled else zeros
        extras[name] = np.append(before, after).astype(np.float32)
    weights = np.full(len(ids), bool(sampled), np.float32)
    return Document(np.append(d.ids, np.array(ids, np.int32)), np.append(d.weights, weights),
                    [*d.images, *images], d.source, extras)


class Rollout:
    """One episode in play: an environment on one side, growing Documents on the other.

        rollout = Rollout(episode, settings)
        request = rollout.advance()             # the first prompt
        while request:
            request = rollout.advance(result)   # result: what the engine made of the request
        rollout.finish(score)                   # score: of rollout.evidence
    """

    def __init__(self, episode: Episode, settings: RolloutSettings):
        self.episode, self.settings = episode, settings
        self.driver = None          # gym.drive's generator, once the environment is made
        self.evidence = None        # what to score, once the episode is over
        self.requests = 0           # so far; each one has its own random seed
        self.reply: list[int] = []  # tokens of the reply that is being generated
        self.thinking = False       # whether the engine generates a thought

    def advance(self, result=None) -> Request | None:
        """Take the engine's Result and return the next Request, or None when the episode is over:
        then `evidence` is set, or the score is an error. Never raises: what goes wrong in an
        environment is an error of the episode and not a failure of the model."""
        try:
            if self.driver is None:
                env = gym.begin(self.episode.task)
                self.append_layout, self.env = env.layout == "append", env
                self.driver = self.drive(env)
                return self._prompt(next(self.driver))
            text = self._take(result)
            if self.thinking:       # the thought has ended: now the answer
                return self._request(self.settings.max_new, thinking=False)
            return self._prompt(self.driver.send(text))
        except StopIteration as end:
            self.evidence = end.value
        except Exception as error:
            self.finish(Score(math.nan, {}, one_line(error)))
        return None

    def drive(self, env):
        """The generator that plays the episode, as gym.drive: lib/harness.py has others."""
        return gym.drive(env)

    def finish(self, score: Score) -> Episode:
        """Set the score and return the episode."""
        self.episode.score = score
        self.episode.status = "error" if score.error else self.episode.status or "done"
        return self.episode

    def _prompt(self, messages) -> Request | None:
        """Add the conversation's next prompt to the documents and ask for a reply."""
        s, documents = self.settings, self.episode.documents
        grows = self.append_layout and bool(documents)
        new = document(messages[-1:] if grows else messages, s.tokens, s.config, answer=True)
        ids = new.ids
        if s.think:     # instead of the empty thought with which the prompt may end
            ids = ids[:len(ids) - len(s.tokens.begin_reply)]
            ids = np.append(ids, np.int32(s.tokens.special["<think>"]))
        images = [np.full_like(image, 128) if s.blank else image for image in new.images]
        images = [intern_image(image) for image in images]
        if grows:
            # [gMASK] <sop> and, if the model ended its reply with it, the role token: see above.
            role_is_there = documents[-1].ids[-1] == ids[2]
            documents[-1] = grow(documents[-1], ids[3 if role_is_there else 2:], images)
        else:
            documents.append(grow(Document(ids[:0], new.weights[:0]), ids, images))
        self.reply = [s.tokens.special["<think>"]] if s.think else []
        return self._request(s.think or s.max_new, thinking=bool(s.think))

    def _request(self, max_new: int, thinking: bool) -> Request | None:
        """Ask the engine to continue the last document by at most `max_new` tokens."""
        s, e, prompt = self.settings, self.episode, self.episode.documents[-1]
        # Tokens that the model did not write. All sampled tokens are subtracted, as the prompt of
        # the segment layout repeats earlier replies.
        put_in = len(prompt.ids) - sum(int(d.weights.sum()) for d in e.documents)
        if put_in >= s.context:
            raise ValueError(f"{put_in} tokens, the model's own left out, outgrew the context")
        if len(prompt.ids) >= s.context:    # the model filled it: its own failure, which is scored
            e.status, self.evidence = "truncated", self.env.evidence()
            return None
        # A seed for each request: the samples do not depend on what else runs beside them.
        key = [s.seed, e.group, e.index, self.requests]
        self.requests, self.thinking = self.requests + 1, thinking
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return Request(prompt, max_new, s.temperature, seed=seed)

    def _take(self, result) -> str:
        """Add what the model sampled to the last document; return the reply's text so far."""
        tokens, documents, ids = self.settings.tokens, self.episode.documents, list(result.ids)
        # <|image|> ends a reply in RL, since it has no pixels; its token is not learned.
        if ids[-1] == tokens.image:
            ids = ids[:-1]
        documents[-1] = grow(documents[-1], ids, sampled=result)
        self.reply += ids[:-1] if ids and ids[-1] in tokens.stops else ids
        # A reply that ends by itself within the thinking budget is complete, answer included.
        self.thinking = self.thinking and result.finish == "length"
        if self.thinking and tokens.special["</think>"] not in self.reply:
            # The thinking budget is used up: insert </think> and let it answer [R: GLM-4.5V].
            close = [tokens.special["</think>"], *tokens.encode("\n")]
            documents[-1] = grow(documents[-1], close)
            self.reply += close
        elif result.finish != "stop" and not self.thinking:
            self.episode.status = "truncated"
        return tokens.decode(self.reply)


def rollout(engine, episodes: list[Episode], settings: RolloutSettings, rewards,
            bar=None, kind=Rollout) -> list[Episode]:
    """Play and score `episodes`, all side by side, and return them in their order.

    rewards: a gym.Rewards. bar: a progress bar of tqdm, advanced by 1 for each episode. kind: the
    class of the rollouts.
    """
    generating = {}             # the engine's request id: Rollout
    ready = [(kind(episode, settings), None) for episode in episodes]
    while ready or engine.busy:
        for play, result in ready:
            request = play.advance(result)
            if request:
                generating[engine.submit(request)] = play
                continue
            if play.evidence is not None:
                play.finish(rewards.score(play.episode.task, play.evidence))
            if bar:
                bar.update(1)
        # One step of the engine gives every running request a token; some requests end.
        results = engine.step() if engine.busy else []
        ready = [(generating.pop(result.id), result) for result in results]
    return episodes
