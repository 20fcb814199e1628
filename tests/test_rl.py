"""What rl.py and lib/async_rl.py guarantee: what the model learns from, resume, staleness, faults,
and the same losses from both trainers.

Runs are in process and take a few steps from small random models; stubs fail at fixed points.
"""
import contextlib
import copy
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_pretrain import after_step, alike, log_of, state_of

import gym
import rl
from data import collate, Document, document
from engine import Engine, Result
from faults import faulty
from gym import Rewards, Score
from kernels import linear_logp
from lib import async_rl
from lib.async_rl import Actor, Collector
from lib.checkpoint import save_model
from lib.cli import UserError
from lib.common import ROOT, setup, store_of_this_attempt
from lib.curriculum import Curriculum
from lib.episodes import figures_of, from_bytes, staleness_of, to_bytes
from lib.ranks import Remote, serve, Transfer
from lib.rollout import Episode, Rollout, RolloutSettings
from lib.runs import checkpoints
from lib.tensors import load_tensors
from mmtp import attach
from model import GLMV, sized
from optim import OptimConfig, Optimizer
from rl import Args
from tasks import Category, driver
from tasks.base import Message, Obs, OneShot, Task
from tokenizer import Tokenizer

TOKENS = Tokenizer(512)
SMALL = dict(prompts=2, group=4, row_tokens=512, max_new=8, slots=8, eval_every=0, warmup=2,
             mix="counting,gui_click", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny():
    """A random model with an MTP head; its replies are noise."""
    model = GLMV(sized("tiny"), seed=3).eval()
    attach(model, 3, seed=3)
    return model


@pytest.fixture(scope="module")
def begin(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begin")
    save_model(tiny, folder)
    return folder


def some_reward(monkeypatch):
    """Noise is never right: let the reward be the share of even bytes in a reply."""
    def score(self, task, evidence):
        said = str(evidence["reply"]).encode()
        return Score(sum(b % 2 == 0 for b in said) / max(1, len(said)), {})
    monkeypatch.setattr(Rewards, "score", score)


def settings_of(model, **more) -> RolloutSettings:
    return RolloutSettings(TOKENS, model.config, **{"context": 512, "max_new": 8, **more})


def episode(reward, ids=6, index=0, group=0, advantage=None, version=0) -> Episode:
    """An Episode of two prompt tokens and some sampled ones. reward None: it ended in an error."""
    rng = np.random.default_rng([group, index])
    extras = {"logp": np.full(ids, -1.0, np.float32), "version": np.full(ids, version, np.float32)}
    d = Document(rng.integers(0, 500, ids).astype(np.int32),
                 np.array([0, 0] + [1] * (ids - 2), np.float32), extras=extras)
    score = Score(math.nan, {}, "gone") if reward is None else Score(reward)
    return Episode(Task("counting", group), group, index, [d], score, "done")


# ---- losses and advantages, by hand --------------------------------------------------------------

@pytest.mark.parametrize("rewards,want", [
    ([1, math.nan, 3], [-1, 0, 1]), ([1], [0]), ([math.nan, 2], [0, 0]), ([], []),
    ([1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]), ([2, 2], [0, 0]),
    ([math.inf, 1, 0], [0, .5, -.5])])
def test_advantages_by_hand(rewards, want):
    assert rl.advantages(rewards) == pytest.approx(want)


def test_advantages_divided_by_the_std():
    assert rl.advantages([1, 0, 0, 0], std=True) == pytest.approx([3 ** .5] + [-3 ** -.5] * 3, 1e-4)
    assert rl.advantages([1, 1], std=True) == [0, 0]


# ratio, advantage: loss and gradient with respect to logp at clip 0.2 below, 0.3 above
GRPO = [(1.0, 2, -2.0, -2.0), (1.2, 1, -1.2, -1.2), (1.5, 1, -1.3, 0.0), (0.5, 1, -0.5, -0.5),
        (0.5, -1, 0.8, 0.0), (1.5, -1, 1.5, 1.5), (0.9, -1, 0.9, 0.9)]
TWO_SIDED = [(1.0, 2, -2.0), (1.2, 1, -1.2), (1.5, 1, 0.0), (0.5, 1, 0.0), (0.5, -1, 0.0),
             (1.5, -1, 0.0), (0.9, -1, 0.9)]


def gradient(loss, ratio, advantage, low, high):
    old = torch.tensor([-1.5])
    logp = (old + math.log(ratio)).requires_grad_()
    value = loss(logp, old, torch.tensor([float(advantage)]), low, high, [1])
    return value.item(), torch.autograd.grad(value, logp)[0].item()


@pytest.mark.parametrize("ratio,advantage,value,slope", GRPO)
def test_grpo_with_clip_higher_by_hand(ratio, advantage, value, slope):
    assert gradient(rl.clipped, ratio, advantage, 0.8, 1.3) == pytest.approx((value, slope), 1e-5)


@pytest.mark.parametrize("ratio,advantage,slope", TWO_SIDED)
def test_two_sided_importance_sampling_by_hand(ratio, advantage, slope):
    _, got = gradient(rl.masked, ratio, advantage, 0.8, 1.3)
    assert got == pytest.approx(slope, rel=1e-5)


def test_the_bands():
    assert rl.band(Args(loss="icepop")) == (0.5, 2.0)
    assert rl.band(Args(clip_low=0.1, clip_high=0.4)) == (0.9, 1.4)
    assert gradient(rl.masked, 1.99, 1, *rl.band(Args(loss="icepop")))[1] == pytest.approx(-1.99)
    assert gradient(rl.masked, 2.01, 1, *rl.band(Args(loss="icepop")))[1] == 0


EXERCISES = {  # ratio, advantage -> gradient with respect to logp at low 0.8, high 1.3
    "cispo": [(1.0, 2, -2.0), (1.5, 1, -1.3), (0.5, 1, -0.8), (0.9, -1, 0.9)],
    "tis": [(1.0, 2, -2.0), (1.5, 1, -1.3), (0.5, 1, -0.5), (0.9, -1, 0.9)]}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_losses(name):
    if not hasattr(rl, name):
        pytest.skip(f"rl.{name} is not written yet: exercise 2 of rl.py")
    for ratio, advantage, slope in EXERCISES[name]:
        _, got = gradient(getattr(rl, name), ratio, advantage, 0.8, 1.3)
        assert got == pytest.approx(slope, rel=1e-5)


def test_exercise_gspo():
    """Two replies of 2 and 1 tokens; the ratio of a reply is the geometric mean of its tokens'."""
    if not hasattr(rl, "gspo"):
        pytest.skip("rl.gspo is not written yet: exercise 2 of rl.py")
    old = torch.tensor([-1.0, -1.0, -1.0])
    logp = (old + torch.tensor([1.2, 0.9, 2.0]).log()).requires_grad_()
    loss = rl.gspo(logp, old, torch.tensor([1.0, 1.0, 1.0]), 0.8, 1.3, lengths=[2, 1])
    ratio = (1.2 * 0.9) ** 0.5
    assert loss.tolist() == pytest.approx([-ratio, -ratio, -1.3], rel=1e-5)
    slopes = torch.autograd.grad(loss.sum(), logp)[0].tolist()
    assert slopes == pytest.approx([-ratio, -ratio, 0.0], rel=1e-5)


def right_gspo(logp, old, advantage, low, high, lengths):
    """A solution of the exercise."""
    means = [part.mean().expand(len(part)) for part in (logp - old).split(lengths)]
    ratio = torch.cat(means).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def test_a_right_gspo_passes_its_test_and_trains(tmp_path, begin, monkeypatch):
    """The trainer hands a loss the number of sampled tokens of each document in a row."""
    some_reward(monkeypatch)
    monkeypatch.setattr(rl, "gspo", right_gspo, raising=False)
    test_exercise_gspo()
    monkeypatch.setitem(rl.LOSSES, "double", right_gspo)
    assert go(tmp_path, begin, steps=1, rehearse=0.25)[0]["norm"] > 0


def test_a_loss_is_given_the_lengths_of_the_documents(tiny, monkeypatch):
    seen = []
    monkeypatch.setitem(rl.LOSSES, "double", lambda logp, *rest: seen.append(rest[-1]) or -logp)
    documents = [d for e in (episode(1, 6), episode(0, 9, 1), episode(1, 3, 2))
                 for d in rl.to_sample(e.documents, 0.5)]
    documents[1].weights[:] = 0         # nothing of it is learned
    rl.row_loss(tiny, collate(documents, tiny.config, 64), Args(mtp=0.0))
    assert seen == [[4, 1]]


def test_every_episode_counts_the_same():
    """However long it is and however many Documents it has; errors do not count."""
    group = [episode(1, 6), episode(0, 20, 1), episode(None, 6, 2), episode(0.5, 9, 3)]
    group[3].documents *= 3
    made = rl.to_samples([group])
    assert [len(sample) for sample in made] == [1, 1, 3]
    for sample, advantage in zip(made, (0.5, -0.5, 0.0)):
        assert sum(d.weights.sum() for d in sample) == pytest.approx(1)
        assert all((d.weights[:2] == 0).all() for d in sample)
        assert all((d.extras["advantage"] == advantage).all() for d in sample)


def test_equal_episodes_are_learned_once_and_count_as_many(tiny, monkeypatch):
    group = [episode(reward, 6 + index, index) for reward, index in ((1, 0), (0, 1), (0, 2))]
    group += [copy.deepcopy(group[0]), copy.deepcopy(group[1]), episode(None, 6, 0)]
    other = copy.deepcopy(group[0])         # the same tokens, but of older weights
    other.documents[0].extras["version"] -= 1
    made = rl.to_samples([[*group, other]])
    assert [sample[0].extras["copies"][0] for sample in made] == [2, 2, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(rl, "distinct", lambda group, advantages: [
            (e, advantage, 1) for e, advantage in zip(group, advantages) if not e.score.error])
        plain = rl.to_samples([[*group, other]])
    assert len(plain) == 6
    moved, told = [], []
    for samples in (made, plain):
        model = copy.deepcopy(tiny)
        optimizer = Optimizer(model.named_parameters(), OptimConfig(1e-4))
        told.append(rl.update(model, optimizer, samples, Args(row_tokens=64), 1.0))
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*moved, atol=1e-5) and told[0] == pytest.approx(told[1], rel=1e-4)


def test_pages_are_compared_with_each_other():
    def of(name, rewards):
        return rl.rewards_of([Episode(Task(name, 0), 0, i, score=Score(
            math.nan if r is None else r, {}, "gone" if r is None else None))
            for i, r in enumerate(rewards)])
    assert of("counting", [0.5, 0.2, 1.0]) == [0.5, 0.2, 1.0]
    assert of("ui_to_code", [0.5, 0.0, 0.9, 0.5]) == [2.5, -1, 4, 2.5]
    found = of("ui_to_code", [0.5, None, 0.9])
    assert found[0] == 1 and math.isnan(found[1]) and found[2] == 2
    assert of("ui_polish", [0.0, 0.4, 0.4])[0] == 0


@pytest.mark.parametrize("chunk", [0, 3])
def test_linear_logp(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(10, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    targets, factors = torch.randint(40, (10,)), torch.randn(10)
    logp, entropy = linear_logp(hidden, weight, targets, chunk)
    plain = (hidden @ weight.T).log_softmax(-1)
    want = plain.gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logp, want, atol=1e-5) and not entropy.requires_grad
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5)
    got = torch.autograd.grad((logp * factors).sum(), (hidden, weight))
    for a, b in zip(got, torch.autograd.grad((want * factors).sum(), (hidden, weight))):
        assert torch.allclose(a, b, atol=1e-5)
    empty, _ = linear_logp(hidden[:0], weight, targets[:0])
    assert empty.shape == (0,)


def test_the_reference_model_pulls_the_policy_back(tiny):
    """The KL term is 0 where both agree, and positive elsewhere."""
    batch = collate([d for sample in rl.to_samples([[episode(1), episode(0, index=1)]])
                     for d in sample], tiny.config)
    _, _, logp, _ = rl.logps_of(tiny, batch)
    args = Args(kl=1.0, mtp=0.0)
    plain, _ = rl.row_loss(tiny, batch, args)
    same, _ = rl.row_loss(tiny, batch, args, logp.detach())
    other, _ = rl.row_loss(tiny, batch, args, logp.detach() + 0.5)
    assert same.item() == pytest.approx(plain.item(), abs=1e-6)
    # exp(d) - d - 1 at d = 0.5, a mean over two Episodes' tokens
    assert (other - plain).item() == pytest.approx(2 * (math.exp(0.5) - 1.5), rel=1e-4)


# ---- playing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("drafts", [0, 3])
def test_on_policy_all_ratios_are_one(tiny, drafts):
    """On every token: one turn, both multi-turn layouts, with pictures and speculation."""
    args = Args(slots=5, context=256, drafts=drafts)
    settings = settings_of(tiny, max_new=12, think=6, context=256)
    tasks = [Task(name, i) for i, name in enumerate(
        ["counting", "point", "gui_form", "text_tools", "visual_tools"])]
    orders = [Episode(task, i, j) for i, task in enumerate(tasks) for j in range(2)]
    played = rl.rollout(rl.make_engine(tiny, args), orders, settings, Rewards())
    documents = [d for e in played for d in e.documents]
    batch = collate(documents, tiny.config)
    with torch.no_grad():
        _, at, logp, _ = rl.logps_of(tiny, batch)
    assert (logp - batch.extras["logp"][at + 1]).abs().max() < 1e-4
    assert len(at) > 250 and len(documents) > len(played) and len(batch.grids) >= 3
    assert {e.status for e in played} <= {"done", "truncated", "error"}
    assert all(e.score is not None for e in played)


class Parrot:
    """An engine whose replies are those of a function: say(request) -> ids."""
    def __init__(self, say):
        self.say, self.asked, self.count, self.version = say, {}, 0, 0

    @property
    def busy(self):
        return bool(self.asked)

    def submit(self, request):
        self.count += 1
        self.asked[self.count] = request
        return self.count

    def abort(self, id):
        self.asked.pop(id, None)

    def load(self, weights, version):
        self.version = version

    def step(self):
        asked, self.asked = self.asked, {}
        results = []
        for id, request in asked.items():
            ids = list(self.say(request))
            finish = "stop" if ids[-1] in (*TOKENS.stops, TOKENS.image) else "length"
            results.append(Result(id, ids, finish, [-0.5] * len(ids), [self.version] * len(ids)))
        return results


@pytest.mark.parametrize("name", ["counting", "gui_form", "text_tools", "visual_tools"])
def test_rollouts_make_the_documents_that_sft_would_train(tiny, name):
    """If the model samples the oracle's replies, ids, weights and pictures are those of SFT."""
    task = Task(name, 5)
    script, append = gym.play_out(task)[1], gym.make(task).layout == "append"
    drive, talks = gym.drive(gym.make(task)), []
    messages = next(drive)
    for reply in script:
        talks.append([*messages, Message("assistant", reply)])
        with contextlib.suppress(StopIteration):
            messages = drive.send(reply)
    shown = [document(talk, TOKENS, tiny.config) for talk in talks[-1 if append else 0:]]
    stops = ["<|observation|>"] * (len(script) - 1) if append else ["<|user|>"] * (len(script) - 1)
    lines = iter([TOKENS.encode_reply(reply) + [TOKENS.special[stop]]
                  for reply, stop in zip(script, stops + ["<|user|>"])])
    settings = settings_of(tiny, context=4096)
    [e] = rl.rollout(Parrot(lambda _: next(lines)), [Episode(task, 0, 0)], settings, Rewards())
    assert e.score.reward == pytest.approx(1) and e.status == "done"
    assert [TOKENS.encode_reply(reply) for reply in script] == list(map(
        TOKENS.encode_reply, e.replies(TOKENS)))
    assert len(e.documents) == len(shown)
    for got, want in zip(e.documents, shown):
        assert got.ids.tolist() == want.ids.tolist()
        assert got.weights.tolist() == want.weights.tolist()
        assert all((a == b).all() for a, b in zip(got.images, want.images, strict=True))
        assert ((got.extras["logp"] != 0) == (got.weights > 0)).all()


def test_a_blank_picture_is_grey(tiny):
    said = Parrot(lambda _: [65, TOKENS.special["<|user|>"]])
    [e] = rl.rollout(said, [Episode(Task("counting", 5), 0, 0)], settings_of(tiny, blank=True),
                     Rewards())
    [image] = e.documents[0].images
    assert image.shape == (64, 64, 3) and (image == 128).all()


def test_a_thought_is_ended_at_its_budget(tiny):
    said = []

    def say(request):
        said.append(request)
        return [65] * request.max_new if len(said) == 1 else [66, TOKENS.special["<|user|>"]]
    settings = settings_of(tiny, think=5, max_new=7)
    [e] = rl.rollout(Parrot(say), [Episode(Task("counting", 1), 0, 0)], settings, Rewards())
    [d] = e.documents
    think, close = TOKENS.special["<think>"], TOKENS.special["</think>"]
    newline = TOKENS.encode("\n")
    assert d.ids.tolist()[-9 - len(newline):] == [
        think, *[65] * 5, close, *newline, 66, TOKENS.special["<|user|>"]]
    assert d.weights.tolist()[-9 - len(newline):] == [0, *[1] * 5, 0, *[0] * len(newline), 1, 1]
    assert [r.max_new for r in said] == [5, 7] and e.status == "done"


def test_an_answer_within_the_thinking_budget_is_not_cut_off(tiny):
    """The budget is used up in the middle of the answer: nothing is inserted, it continues."""
    close, stop = TOKENS.special["</think>"], TOKENS.special["<|user|>"]
    parts = iter([[65, 65, close, 66], [67, stop]])
    settings = settings_of(tiny, think=4)
    [e] = rl.rollout(Parrot(lambda _: next(parts)), [Episode(Task("counting", 1), 0, 0)], settings,
                     Rewards())
    assert e.documents[0].ids.tolist()[-6:] == [65, 65, close, 66, 67, stop]
    assert e.documents[0].weights[-6:].all() and e.status == "done"


def test_garbage_replies_are_zeros_and_train(tiny):
    """Any token may be sampled: special ones, unused ones, <|image|>."""
    rng = np.random.default_rng(0)
    size = tiny.config.text.vocab_size

    def say(request):
        ids = [i for i in rng.integers(0, size, 9).tolist() if i not in TOKENS.stops]
        return ids[:ids.index(TOKENS.image) + 1] if TOKENS.image in ids else ids
    names = ["counting", "gui_form", "text_tools", "visual_tools"]
    orders = [Episode(Task(name, j), i, j) for i, name in enumerate(names) for j in range(8)]
    played = rl.rollout(Parrot(say), orders, settings_of(tiny, context=2048), Rewards())
    assert all(e.score.error is None and e.score.reward < 1 for e in played)
    for e in played:
        e.score = Score(float(e.index % 2))     # so that groups have a signal
    model = copy.deepcopy(tiny)
    optimizer = Optimizer(model.named_parameters(), OptimConfig(1e-4))
    groups = [played[i:i + 8] for i in range(0, len(played), 8)]
    figures = rl.update(model, optimizer, rl.to_samples(groups), Args(loss="grpo"), 1.0)
    assert figures["tokens"] > 200 and 0 < figures["norm"] < math.inf
    assert all(torch.isfinite(p).all() for p in model.parameters())
    order = [Episode(Task("point", 1), 0, 0)]
    [e] = rl.rollout(Parrot(lambda _: [65, TOKENS.image]), order, settings_of(tiny), Rewards())
    assert e.documents[0].weights.sum() == 1    # <|image|> itself is not learned


def test_a_history_of_own_replies_that_outgrows_the_context_is_no_error(tiny):
    """A prompt of segments repeats the earlier replies: the model has filled it, not the task."""
    reply = [*TOKENS.encode('remember("wait wait wait wait")'), TOKENS.stops[0]]
    order = [Episode(Task("gui_multi_app", 3, pixels=128), 0, 0)]
    first = rl.rollout(Parrot(lambda _: reply), order, settings_of(tiny, context=4096), Rewards())
    room = len(first[0].documents[0].ids) + len(reply)      # enough for the first turn
    assert len(first[0].documents) > 3 and len(first[0].documents[3].ids) > room
    order = [Episode(Task("gui_multi_app", 3, pixels=128), 0, 0)]
    [e] = rl.rollout(Parrot(lambda _: reply), order, settings_of(tiny, context=room), Rewards())
    assert e.score.error is None and e.score.reward == 0 and e.status == "truncated"
    order = [Episode(Task("gui_multi_app", 3, pixels=128), 0, 0)]
    [e] = rl.rollout(Parrot(lambda _: reply), order, settings_of(tiny, context=20), Rewards())
    assert "outgrew the context" in e.score.error           # the task alone is longer


# ---- whole runs ---------------------------------------------------------------------------------

def go(out, begin, **changes) -> list[dict]:
    rl.run(Args(**{**SMALL, "out": str(out), "init": str(begin), **changes}))
    return log_of(out)


@pytest.mark.parametrize("more", [{}, dict(rehearse=0.25, levels=2, drafts=2, kl=0.1)])
def test_four_steps_are_two_and_resume_and_two(tmp_path, begin, monkeypatch, more):
    some_reward(monkeypatch)
    whole = go(tmp_path / "whole", begin, steps=4, eval_every=2, eval_count=2, **more)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "parts", begin, steps=4, eval_every=2, eval_count=2, **more)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["step_000002"]
    parts = go(tmp_path / "parts", begin, steps=4, eval_every=2, eval_count=2, resume=True, **more)
    for key in ("pg_loss", "reward", "mismatch", "entropy", "samples"):
        assert [x[key] for x in parts] == [x[key] for x in whole] and len(whole) == 4
    a, b = tmp_path / "whole/step_000004", tmp_path / "parts/step_000004"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    a, b = state_of(a), state_of(b)
    assert all(alike(a[key], b[key]) for key in ("step", "optimizer", "collector", "exams"))
    assert max(x["mismatch_max"] for x in whole) < 1e-4 and any(x["pg_loss"] for x in whole)


@pytest.mark.slow
def test_it_learns(tmp_path, begin, monkeypatch):
    """The reward of noise is about a third; 30 steps raise it by 0.2."""
    some_reward(monkeypatch)
    log = go(tmp_path, begin, steps=30, lr=4e-3, prompts=4, group=8, slots=32)
    first, last = (np.mean([x["reward"] for x in part]) for part in (log[:5], log[-5:]))
    assert last > first + 0.2


def test_both_trainers_give_the_same_losses_at_staleness_0(tmp_path, begin, monkeypatch):
    some_reward(monkeypatch)
    plain = go(tmp_path / "plain", begin, steps=3, mix="counting")
    threads = go(tmp_path / "threads", begin, steps=3, mix="counting", workers=2)
    for a, b in zip(plain, threads, strict=True):
        assert b["pg_loss"] == pytest.approx(a["pg_loss"], abs=1e-5)
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-6) and b["stale"] == 0


def test_a_stale_run_keeps_its_bound_and_resumes(tmp_path, begin, monkeypatch):
    some_reward(monkeypatch)
    log = go(tmp_path, begin, steps=4, max_staleness=2, save_every=2)
    assert len(log) == 4 and all(0 <= x["stale_max"] <= 2 for x in log)
    saved = state_of(tmp_path / "step_000002")["collector"]
    assert saved["ready"] or saved["books"]["kept"]     # groups in play are not lost
    for group in saved["ready"]:
        assert len(from_bytes(group.numpy().tobytes())) == 4
    assert len(go(tmp_path, begin, steps=6, max_staleness=2, resume=True)) == 6
    saved = state_of(tmp_path / "step_000006")["collector"]
    assert len(go(tmp_path, begin, steps=7, resume=True)) == 7     # by the synchronous trainer
    assert state_of(tmp_path / "step_000007")["collector"]["count"] > saved["count"]
    assert len(go(tmp_path, begin, steps=8, max_staleness=1, resume=True)) == 8


def test_the_synchronous_trainer_plays_the_groups_again_that_were_ready(tiny, monkeypatch):
    """Their samples are of older weights; their tasks come before new ones."""
    collector = make_collector(tiny, monkeypatch, *range(100, 120), prompts=3, staleness=2)
    while not collector.ready:
        collector.turn()
    tasks = [group[0].task for group in collector.ready]
    tasks += [group.task for group in collector.open.values()]
    again = Curriculum((("counting", 1.0),), 0, 1)
    again.resume(collector.state())
    assert {again.next_task() for _ in tasks} == set(tasks) and not again.replay
    assert {e.group for e in again.next_group(2)} == {collector.curriculum.count}


@pytest.mark.slow
@pytest.mark.parametrize("staleness,ranks,players", [(0, 2, 1), (2, 2, 1), (0, 3, 1), (2, 3, 2)])
def test_trainers_and_players(tmp_path, staleness, ranks, players):
    """On gloo, the last ranks play; at staleness 0 the losses are those of one process. From the
    demo's model, which is sometimes right."""
    settings = dict(mix="counting,gui_form", prompts=4, steps=3, init=ROOT / "ckpt/demo")
    options = [f"--{k}={v}" for k, v in {
        **SMALL, **settings, "max_staleness": staleness, "rollout_ranks": players}.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         "rl.py", *options, f"--out={tmp_path / 'two'}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200)
    assert done.returncode == 0, done.stderr
    two = log_of(tmp_path / "two")
    assert len(two) == 3 and all(x.get("stale_max", 0) <= staleness for x in two)
    assert sum(x["groups"] for x in two) >= 6
    if not staleness:
        one = go(tmp_path / "one", settings.pop("init"), **settings)
        for a, b in zip(one, two, strict=True):
            assert b["pg_loss"] == pytest.approx(a["pg_loss"], abs=1e-5)


def test_the_report_shows_a_run(tmp_path, begin, monkeypatch):
    from lab import report
    some_reward(monkeypatch)
    go(tmp_path, begin, steps=2, eval_every=1, eval_count=2)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    for shown in ("data:image/png;base64", "held-out accuracy", "before", "pass@1", "truncated",
                  "outside the band", "waiting for rollouts", "pass4, last"):
        assert shown in page


@pytest.mark.parametrize("rising", [0.1, 0.0])
def test_an_alarm_when_reward_rises_and_accuracy_falls(tmp_path, begin, monkeypatch, capsys,
                                                       rising):
    right, step = iter([0.5, 0.6, 0.5]), iter([0, 1])
    monkeypatch.setattr(rl, "accuracy", lambda episodes: {"mean": next(right)})
    monkeypatch.setattr(rl, "figures_of",
                        lambda groups, has_signal: {"reward": rising * next(step)})
    go(tmp_path, begin, steps=2, eval_every=1, eval_count=1)
    assert ("ALARM" in capsys.readouterr().out) == (rising > 0)


def test_an_evaluation_that_cant_be_written_ends_no_run(tmp_path, begin, monkeypatch, capsys):
    """A full disk, which has room again when the run is saved."""
    def full(*_, **more):
        raise OSError(28, "No space left on device")
    some_reward(monkeypatch)
    monkeypatch.setattr("PIL.Image.Image.save", full)
    log = go(tmp_path, begin, steps=2, eval_every=1, eval_count=1)
    assert len(log) == 2 and [p.name for p in checkpoints(tmp_path)] == ["step_000002"]
    said = capsys.readouterr().err
    assert f"step 1: {tmp_path}/report.json and its pictures are not written (No space" in said


@pytest.mark.parametrize("change,message", [
    (dict(mix="countin"), "not 'countin'"), (dict(group=1), "--group takes 2 to"),
    (dict(loss="ppo"), "--loss takes grpo"), (dict(init="nowhere"), "no checkpoint"),
    (dict(levels=9), "--levels takes 1 to 5"), (dict(mix="counting:0"), "--mix takes"),
    (dict(max_staleness=-1), "--max_staleness takes 0"), (dict(mix="point:inf"), "--mix takes"),
    (dict(context=10 ** 9), "--context takes 1 to"), (dict(rehearse=1e9), "--rehearse takes 0 to"),
    (dict(slots=10 ** 9), "--slots takes 1 to"), (dict(drafts=10 ** 9), "--drafts takes 0 to")])
def test_bad_options_are_one_clear_line(tmp_path, begin, change, message):
    (tmp_path / "run" / "step_000007").mkdir(parents=True)      # an earlier run: it stays
    with pytest.raises(UserError, match=message):
        go(tmp_path / "run", begin, **{"steps": 1, **change})
    assert checkpoints(tmp_path / "run")


def test_the_picture_of_a_group_is_encoded_once(tiny):
    orders = [Episode(Task("counting", 7), 0, i) for i in range(4)]
    engine = rl.make_engine(tiny, Args(context=128))
    played = rl.rollout(engine, orders, settings_of(tiny), Rewards())
    again = [e for one in played for e in from_bytes(to_bytes([one]))]
    for episodes in (played, again, played + again):
        batch = collate([d for e in episodes for d in e.documents], tiny.config)
        assert len(batch.grids) == 1 and len(batch.visual) == 16 * len(episodes)


# ---- faults, at fixed points --------------------------------------------------------------------

class Stage(OneShot):
    """An environment that fails in the way that the seed of its task names."""
    FAULTS = ("fine", "make", "reset", "step", "evidence", "hang")

    def __init__(self, task):
        self.task, self.fault = task, self.FAULTS[task.seed] if task.seed < 6 else "fine"
        self.fail("make")

    def fail(self, where):
        if self.fault == where:
            raise OSError(f"{where} fails")

    def reset(self):
        self.fail("reset")
        if self.fault == "hang":
            threading.Event().wait()
        self.obs = Obs("How many?")
        return self.obs

    def step(self, text):
        self.fail("step")
        self.said = text
        return super().step(text)

    def evidence(self):
        self.fail("evidence")
        return {"reply": self.said}


class Even:
    """Rewards of 1 for replies of even length."""
    def score(self, task, evidence):
        return Score(float(len(evidence["reply"]) % 2 == 0))


class Given(Curriculum):
    """First the tasks of the given seeds, then tasks that do not fail."""
    def __init__(self, *seeds):
        super().__init__((("counting", 1.0),), 0, 1, lambda line: self.said.append(line))
        self.seeds, self.said = list(seeds), []

    def next_task(self):
        if self.replay or not self.seeds:
            return super().next_task()
        return Task("counting", self.seeds.pop(0))


def make_collector(tiny, monkeypatch, *seeds, actor=Actor, **more) -> Collector:
    """A Collector of groups of 4 rollouts of Stage; replies are one or two letters, in turn."""
    monkeypatch.setattr(driver, "make", Stage)
    turns = iter(range(10 ** 6))
    parrot = Parrot(lambda _: [65] * (1 + next(turns) % 2) + [TOKENS.special["<|user|>"]])
    player = actor(parrot, Even(), settings_of(tiny))
    return Collector(player, Given(*seeds), has_signal=rl.has_signal,
                     **{"prompts": 2, "size": 4, "staleness": 0, "patience": 1e9, **more})


def test_an_environment_that_raises_gives_an_error_and_not_a_zero(tiny, monkeypatch):
    faults = [Stage.FAULTS.index(name) for name in ("make", "reset", "step", "evidence")]
    collector = make_collector(tiny, monkeypatch, *faults, 0)
    groups = collector.collect(0)
    assert len(groups) == 2 and all(group[0].task.seed not in faults for group in groups)
    ended = [e for group in collector.seen for e in group]
    broken = [e for e in ended if e.task.seed in faults]
    assert len(broken) >= 8 and all(e.status == "error" for e in broken)
    assert all("fails" in e.score.error and math.isnan(e.score.reward) for e in broken)
    assert all(e.score.error is None for e in ended if e not in broken)
    assert figures_of(collector.seen, rl.has_signal)["errors"] == pytest.approx(
        len(broken) / len(ended))


@pytest.fixture
def clock(monkeypatch):
    """The Collector's clock, set by hand."""
    now = [0.0]
    monkeypatch.setattr(async_rl.time, "monotonic", lambda: now[0])
    return now


HANG = Stage.FAULTS.index("hang")


def test_a_rollout_that_hangs_is_given_up_and_played_again(tiny, monkeypatch, clock):
    """After `patience` the task is played again; the second time it is an error. A minute without
    a turn, as during an evaluation, counts as one second."""
    collector = make_collector(tiny, monkeypatch, HANG, patience=10.0, staleness=1)

    def turns(seconds):
        for _ in range(seconds):
            clock[0] += 1.0
            collector.turn()

    def others_done():
        collector.turn()
        while any(group.task.seed != HANG for group in collector.open.values()):
            collector.turn()
    others_done()
    assert [group.task.seed for group in collector.open.values()] == [HANG]
    clock[0] += 60.0
    collector.turn()
    assert collector.open and not collector.aborted
    turns(10)
    assert collector.aborted == 1
    assert [task[1] for task in collector.curriculum.replay] == [HANG]
    collector.ready.clear()
    others_done()           # the task that was given up comes first
    assert [group.task.seed for group in collector.open.values()] == [HANG]
    turns(11)
    errors = [e for group in collector.seen for e in group if e.score.error]
    assert len(errors) == 4 and all("played again" in e.score.error for e in errors)
    assert not collector.actor.environment and not collector.given_up


def test_groups_that_are_not_needed_are_given_up_and_played_again(tiny, monkeypatch, clock):
    """Abort by count: groups still in play are given up, played again first, and then waited for:
    slow tasks are not put off for ever, and a rollout that hangs is an error."""
    collector = make_collector(tiny, monkeypatch, HANG, patience=10.0)
    collector.curriculum.no_signal = 0.34      # three groups are begun for two
    assert len(collector.collect(0)) == 2
    assert not collector.open and collector.aborted == 1
    assert collector.curriculum.replay == [("counting", HANG, 0, "train", 0)]
    step = collector.actor.step

    def later(*rest):
        clock[0] += 0.5 * all(g.task.seed == HANG for g in collector.open.values())
        return step(*rest)
    collector.actor.step = later
    assert len(collector.collect(0)) >= 2 and clock[0] > 10
    assert collector.aborted == 1 and not collector.open and not collector.curriculum.replay
    errors = [e for group in collector.seen for e in group if e.score.error]
    assert len(errors) == 4 and all(e.task.seed == HANG for e in errors)


def test_rollouts_of_an_aborted_group_are_not_scored(tiny, monkeypatch):
    """Nine rollouts wait for the only verifier, which is busy; their group is aborted."""
    monkeypatch.setattr(driver, "make", Stage)
    asked, go_on = [], threading.Event()

    class Busy:
        def score(self, task, evidence):
            asked.append(task.seed)
            go_on.wait(20)
            return Score(1.0)
    actor = Actor(Parrot(lambda _: [65, TOKENS.special["<|user|>"]]), Busy(),
                  settings_of(tiny))
    actor.start([Episode(Task("counting", 9), group, 0) for group in (1, *[2] * 9)])
    while len(actor.scoring) < 10 or not asked:
        assert not actor.step()
    first = next(play.episode.group for play, f in actor.scoring.items() if f.running())
    actor.abort(3 - first)
    left = len(actor.scoring)
    go_on.set()
    while actor.scoring:
        actor.step()
    assert len(asked) == left


def test_odd_rewards_and_dying_verifiers_are_errors(tiny, monkeypatch):
    golds = ["nan", "inf", "string", "none", "raise", "kill", "hang", "int", "float"]
    monkeypatch.setattr(driver, "make", Stage)
    monkeypatch.setattr(Stage, "evidence", lambda self: {"gold": golds[self.task.pixels]})
    rewards = Rewards({"counting": Category(None, {"answer": faulty})}, workers=2, deadline=1.0)
    actor = Actor(Parrot(lambda _: [65, TOKENS.special["<|user|>"]]), rewards,
                  settings_of(tiny), verifiers=2)
    actor.start([Episode(Task("counting", 9, pixels=i), 0, i) for i in range(len(golds))])
    ended = []
    while len(ended) < len(golds):
        ended += actor.step()
    rewards.close()
    by = {golds[e.index]: e.score for e in ended}
    assert by.pop("int").reward == 1 and by.pop("float").reward == 0.5
    assert all(score.error and math.isnan(score.reward) for score in by.values())
    group = sorted(ended, key=lambda e: e.index)
    assert [a for a in rl.advantages(rl.rewards_of(group)) if a] == [0.25, -0.25]


def test_a_reward_system_that_raises_is_an_error(tiny, monkeypatch):
    collector = make_collector(tiny, monkeypatch)

    def gone(task, evidence):
        raise RuntimeError("a reward worker does not start")
    collector.actor.rewards.score = gone
    with pytest.raises(UserError, match="100% of all rollouts end in errors.*does not start"):
        for step in range(3):
            assert not collector.collect(step)


def test_what_is_delivered_twice_counts_once(tiny, monkeypatch):
    class Twice(Actor):
        def step(self, *how):
            return [e for one in super().step(*how) for e in (one, *from_bytes(to_bytes([one])))]
    collector = make_collector(tiny, monkeypatch, actor=Twice)
    groups = collector.collect(0)
    assert [[e.index for e in group] for group in groups] == [[0, 1, 2, 3]] * 2
    assert collector.twice == 4 * len(collector.seen)


def test_each_token_is_marked_with_the_version_of_its_weights(tiny):
    actor = Actor(Engine(tiny, 4, 128), Even(), settings_of(tiny, max_new=6))
    actor.start([Episode(Task("counting", i), 0, i) for i in range(3)])
    while not any(len(r.ids) == 3 for r in actor.engine.running):
        assert not actor.step()
    actor.load(dict(tiny.named_parameters()), 1)
    ended = []
    while len(ended) < 3:
        ended += actor.step()
    versions = [e.documents[0].extras["version"][e.documents[0].weights > 0] for e in ended]
    assert all((np.diff(v) >= 0).all() for v in versions)
    assert any(set(v) == {0, 1} for v in versions)
    for staleness, late in ((0, True), (1, False)):
        collector = Collector(actor, Given(), 1, 3, staleness, 1e9, rl.has_signal)
        assert collector._is_stale(ended, 1) == late and len(collector.curriculum.replay) == late


def test_tasks_are_drawn_at_a_size_that_suits_the_patches(tmp_path, monkeypatch):
    """With patches of 14 pixels a picture of 64 would be four visual tokens."""
    config = sized("tiny")
    config.vision.patch_size, config.max_tokens = 14, 64
    save_model(GLMV(config), tmp_path / "begin")
    asked, played = SMALL | {"init": str(tmp_path / "begin"), "eval_count": 1}, []
    monkeypatch.setattr(rl, "report_evaluation", lambda *_: None)
    monkeypatch.setattr(rl, "accuracy", lambda _: {"mean": 0.0})
    monkeypatch.setattr(rl, "rollout", lambda engine, episodes, *_: played.extend(episodes))
    for pixels, side in ((0, 112), (140, 140)):
        args = Args(**asked, pixels=pixels, out=str(tmp_path / f"out{pixels}"))
        model, _, _, settings, stream, curriculum, progress = rl.prepare(args, setup("cpu"))
        rl.evaluate(model, settings, None, args, progress)
        played += curriculum.next_group(2)
        assert {e.task.pixels for e in played} == {side}
        assert {image.shape[:2] for d in stream(0) for image in d.images} == {(side, side)}
        played.clear()
    with pytest.raises(UserError, match="--pixels=10000 is more than this model can see"):
        rl.prepare(Args(**asked, pixels=10_000, out=str(tmp_path / "out")), setup("cpu"))


def test_a_category_that_fails_is_paused_and_a_run_that_fails_ends():
    said = []
    curriculum = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 1, said.append)
    for i in range(20):     # one in eight, of one category
        curriculum.record([episode(1), *[episode(0)] * 6, episode(None)], True)
        point = [replace_task(episode(i % 2), "point") for i in range(8)]
        curriculum.record(point, True)
    assert len(said) == 1 and "counting is paused: 12% of its rollouts" in said[0]
    assert {curriculum.next_task().category for _ in range(30)} == {"point"}
    with pytest.raises(UserError, match="of all rollouts end in errors, the last in: gone"):
        for _ in range(60):
            curriculum.record([episode(None)] * 8, False)


def test_an_error_long_ago_may_pause_a_category_in_a_fine_group():
    said = []
    curriculum = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 3, said.append)
    curriculum.record([episode(None)] * 8, False)
    for _ in range(4):
        curriculum.record([episode(1)] * 8, False)
    assert len(said) == 1 and said[0].startswith("counting is paused") and "gone" in said[0]
    curriculum.top = {"counting": 2, "point": 1}
    again = Curriculum((("counting", 1.0), ("text_code", 1.0)), 0, 2, said.append)
    again.restore(curriculum.state())        # its verifier may have been repaired
    assert "counting was paused for its errors and is tried again" in said
    assert not again.paused("counting") and again.top == {"counting": 1, "text_code": 0}


def test_errors_do_not_count_as_stale():
    old = episode(None, version=0)
    assert staleness_of([[old, episode(1, index=1, version=3)]], 4) == {
        "stale": 1.0, "stale_max": 1.0}


def test_flight_limits_the_rollouts_and_a_group_may_begin_in_part(tiny, monkeypatch):
    """Three groups of four, of which six rollouts may be in play; the first group hangs."""
    collector = make_collector(tiny, monkeypatch, HANG, prompts=3, staleness=1, flight=6)
    begun, start = [], collector.actor.start
    monkeypatch.setattr(collector.actor, "start", lambda orders: (
        begun.append([(e.group, e.index) for e in orders]), start(orders)))
    collector.turn()
    assert begun == [[(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]] and len(collector.open) == 2
    groups = collector.collect(0)       # the rest follows, one by one
    assert len(groups) == 3 and all(len(group) == 4 for group in groups)
    assert all(group[0].group > 0 for group in groups)
    collector._give_up(0)
    assert not any(order.group == 0 for order in collector.orders)


@pytest.mark.parametrize("more", [{}, dict(workers=2)])
def test_a_run_that_ends_for_its_errors_is_saved(tmp_path, begin, monkeypatch, more):
    """Step 3 fails, in either driver; once that is repaired, the run continues as if it had not."""
    some_reward(monkeypatch)
    whole, broken = Curriculum.record, []

    def record(self, group, has_signal):
        if broken:
            raise UserError("60% of all rollouts end in errors")
        whole(self, group, has_signal)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and broken.append(step))
        patch.setattr(Curriculum, "record", record)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(UserError, match="60% of all"):
            go(tmp_path / "parts", begin, steps=4, **more)
        assert signal.getsignal(signal.SIGINT) is before      # Ctrl-C ends what comes next
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["step_000002"]
    parts = go(tmp_path / "parts", begin, steps=4, resume=True, **more)
    assert [x["step"] for x in parts] == [1, 2, 3, 4]
    if not more:
        whole = go(tmp_path / "whole", begin, steps=4)
        assert [x["pg_loss"] for x in parts] == [x["pg_loss"] for x in whole]


def test_the_error_that_ends_a_run_is_named():
    curriculum = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 1, lambda line: None)
    curriculum.faults = {"counting": [60.0, 60.0, "gone"], "point": [0.0, 8.0, ""]}
    with pytest.raises(UserError, match="errors, the last in: gone; the run stops"):
        curriculum.record([replace_task(episode(1), "point")], True)


def test_a_mix_without_any_signal_says_so():
    said = []
    curriculum = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 1, said.append, silence=6)
    for reward in (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0):
        curriculum.record([episode(reward)] * 8, reward == 1)   # the sixth group has a signal
    with pytest.raises(UserError, match="none of the last 6 groups had a signal.* 0.00 on average"):
        curriculum.record([episode(0)] * 8, False)
    for _ in range(6):
        curriculum.record([episode(1)] * 8, False)      # solved: no reason to end
    assert len(said) == 1 and "These tasks are solved" in said[0]
    curriculum.silence = 0
    for _ in range(99):
        curriculum.record([episode(0)] * 8, False)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, dict(workers=2)])
def test_a_silent_run_ends_within_20_steps(tmp_path, begin, monkeypatch, more):
    monkeypatch.setattr(gym.Rewards, "score_of", lambda *rest: gym.Score(0.0))
    with pytest.raises(UserError, match="nothing is learned. Begin with a model that solves"):
        go(tmp_path, begin, steps=21, **more)
    assert 0 < len((tmp_path / "log.jsonl").read_text().splitlines()) < 20


def replace_task(e: Episode, name: str) -> Episode:
    e.task = Task(name, e.task.seed)
    return e


@pytest.mark.parametrize("more", [{}, dict(max_staleness=1)])
def test_steps_that_are_not_finite_end_the_run(tmp_path, begin, monkeypatch, capsys, more):
    """In either driver; the steps are named by the numbers that they have in the log."""
    some_reward(monkeypatch)
    monkeypatch.setattr(rl, "update", lambda *rest: {
        "pg_loss": 0.0, "norm": math.nan, "tokens": 1})
    with pytest.raises(UserError, match="five steps in a row were not finite"):
        go(tmp_path, begin, steps=9, **more)
    said = re.findall(r"step (\d+): loss 0.0, gradient norm nan", capsys.readouterr().out)
    assert said == ["1", "2", "3", "4", "5"]


FATAL = f"""
import functools, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import gym, rl
from lib import async_rl
from lib.async_rl import Actor
from lib.cli import cli, main
from lib.curriculum import Curriculum

def score(self, task, evidence):
    said = str(evidence["reply"]).encode()
    return gym.Score(sum(b % 2 == 0 for b in said) / max(1, len(said)))

def dies(where, name, when):
    whole = getattr(where, name)
    def fatal(*args):
        if when(*args) and not os.path.exists(trace + "/died"):
            open(trace + "/died", "w").close()
            os.kill(os.getppid(), signal.SIGTERM) if how == "agent" else os._exit(1)
            if who == "player":     # waits until its agent ends it
                signal.pause()
        return whole(*args)
    setattr(where, name, fatal)

def records(where, name, event):    # what rank 0 does, over all restarts
    whole = getattr(where, name)
    def recording(*args):
        result = whole(*args)
        with open(trace + "/events", "a") as file:
            print(*event(result, *args), file=file)
        return result
    setattr(where, name, recording)

trace, who, how = (sys.argv.pop(1) for _ in range(3))
if os.environ["RANK"] == "0":
    records(Curriculum, "next_task", lambda task, *_: ("drawn", task.seed))
    records(Curriculum, "record", lambda _, self, group, signal: ("ended", group[0].task.seed))
    records(rl, "to_samples", lambda _, groups, *rest: (
        "learned", *(group[0].task.seed for group in groups)))
    records(rl, "save_state", lambda *_: ("saved",))
    with open(trace + "/events", "a") as file:
        print("started", file=file)
if os.path.exists(trace + "/died"):
    open(trace + "/again", "a").close()
gym.Rewards.score = score
async_rl.Remote = functools.partial(async_rl.Remote, silence=10.0)
if who == "player":
    dies(Actor, "load", lambda self, weights, version: version == 2)
else:
    dies(rl, "update", lambda *rest: os.path.exists(trace + "/run/step_000002"))
main(lambda: rl.run(cli(rl.Args)))
"""


def nothing_lost_nor_counted_twice(trace, staleness=0):
    """Of everything up to the checkpoint from which the next attempt resumed: each task that was
    drawn has ended or is in the last checkpoint to be played, and none was learned from twice."""
    attempts: list[list] = []
    for event in (trace / "events").read_text().splitlines():
        if event == "started":
            while attempts and attempts[-1] and attempts[-1][-1] != "saved":
                attempts[-1].pop()      # lost with the attempt
            attempts.append([])
        else:
            attempts[-1].append(event)
    events = [event.split() for attempt in attempts for event in attempt]
    drawn, ended, learned = ([int(seed) for kind, *rest in events if kind == name for seed in rest]
                            for name in ("drawn", "ended", "learned"))
    kept = state_of(checkpoints(trace / "run")[-1])["collector"]["books"]["kept"]
    assert len(attempts) > 1 and len(ended) >= 8 and len(learned) == len(set(learned)) > 0
    assert set(drawn) == set(ended) | {task[1] for task in kept}
    if not staleness:       # else what ended too late is played again
        assert len(ended) == len(set(ended))


def torchrun(*words, steps=4, **options) -> subprocess.Popen:
    """Start `torchrun words fatal.py ... --options` and do not wait for it."""
    options = {**SMALL, "mix": "ocr_line", "save_every": 1, "steps": steps, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words),
         *(f"--{k}={v}" for k, v in options.items())], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def two_agents(way: str, restarts: int, *words, **options) -> list[tuple[int, str, str]]:
    """One run under two torchrun agents, as on two machines: [(exit code, stdout, stderr), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"static": ["--master_addr=127.0.0.1", f"--master_port={port}"],
             "c10d": ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1",
                      "--local_addr=127.0.0.1"]}[way]
    both = [torchrun("--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", *where,
                     f"--max-restarts={restarts}", *words, **options) for i in range(2)]
    try:
        said = [agent.communicate(timeout=400) for agent in both]
    finally:
        for agent in both:
            agent.terminate()
    return [(agent.returncode, *output) for agent, output in zip(both, said)]


def test_a_reply_that_fills_the_context_is_scored_and_no_error(tiny):
    task = next(task for task in (Task("text_tools", i) for i in range(9))
                if len(gym.play_out(task)[1]) > 1)
    room = 200 + len(Rollout(Episode(task, 0, 0), settings_of(tiny)).advance().prompt.ids)
    play = Rollout(Episode(task, 0, 0), settings_of(tiny, context=room))
    play.advance()
    assert play.advance(Result(0, [65] * 199, "length", [0.0] * 199, [0] * 199)) is None
    score = Rewards().score(task, play.evidence)
    assert score.error is None and play.finish(score).status == "truncated"


@pytest.mark.parametrize("slack", [0, 1])
def test_an_order_waits_for_its_weights(slack):
    """Orders arrive before the weights; at staleness 0 the player must not begin yet."""
    store, seen = dist.HashStore(), []

    class Slow:
        work, weights, asked = [], {}, 0

        def begin(self, weights=None, should_leave=None):
            self.work = ["under way"]

        def arrived(self):
            self.asked += bool(self.work)
            return self.asked > 5

        def wait(self):
            self.work, self.asked = [], 0

    class Player:
        def delays(self):
            return 0.0, 0.0

        def start(self, orders):
            seen.extend(order.group for order in orders)

        def abort(self, group):
            seen.append(-group)

        def load(self, weights, version):
            seen.append("weights")

        def step(self):
            if len(seen) == 4:
                store.set("over", b"yes")
            return []

    remote = Remote(store, [1], Slow(), 0, slack)
    remote.load({}, 1)
    remote.start([Episode(Task("point", 0), group, 0) for group in (3, 4, 5)])
    remote.abort(4)
    serve(Player(), Slow(), store, 1, 0)
    assert seen == ([-4, "weights", 3, 5] if slack == 0 else [-4, 3, 5, "weights"])


def test_a_rank_that_never_comes_is_one_clear_line(monkeypatch):
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 1, 2)]))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 1 waited too long for 2 ranks"):
        setup("cpu")


def test_an_attempt_knows_nothing_of_the_one_before():
    """Ranks meet in the same store once more, in whatever order they come."""
    store = dist.HashStore()
    for first in (0, 2, 1):
        met = {}
        ranks = [threading.Thread(target=lambda rank=rank: met.update(
            {rank: store_of_this_attempt(store, rank, 3)}))
            for rank in (first, *{0, 1, 2} - {first})]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(20)
        assert len(met) == 3 and not met[1].check(["mark"])
        met[0].set("mark", "")
        assert met[2].check(["mark"])


def test_if_torchrun_is_killed_its_store_is_gone_which_is_one_clear_line():
    class Gone(dist.HashStore):
        def gone(self, *_):
            raise dist.DistNetworkError("Broken pipe\nframe #0: 0x72")
        set = get = add = check = gone

    class Idle:
        def wait(self, should_leave):
            return True
    remote = Remote(Gone(), [1], Idle(), 0, 0)
    order = Episode(Task("point", 0), 0, 0)
    for call in (remote.delays, remote.step, remote.close, lambda: remote.abort(0),
                 lambda: remote.load({}, 1), lambda: remote.start([order])):
        with pytest.raises(UserError, match="torchrun has ended"):
            call()


@pytest.mark.parametrize("where", ["collecting", "learning", "sending", "counting"])
def test_if_a_player_is_gone_what_was_learned_is_saved(tmp_path, begin, monkeypatch, where):
    """Four steps are done; the error comes while step 5 is played or learned from, while weights
    are sent, or when the figures of a step are asked for."""
    some_reward(monkeypatch)
    turn, load = Collector.turn, Actor.load

    def gone(self, collecting=False):
        if self.step == 4 and where == ("collecting" if collecting else "learning"):
            monkeypatch.setattr(Collector, "turn", none_left)
            none_left()
        return turn(self, collecting)

    def none_left(*_, **more):
        raise UserError("rank 1, which plays, has not been heard from")
    monkeypatch.setattr(Collector, "turn", gone)
    monkeypatch.setattr(Actor, "load", lambda self, weights, version: none_left() if (
        where == "sending" and version == 4) else load(self, weights, version))
    figures = Collector.figures
    monkeypatch.setattr(Collector, "figures", lambda self: none_left() if (
        where == "counting" and self.step == 3) else figures(self))
    with pytest.raises(UserError, match="not been heard from"):
        go(tmp_path, begin, steps=9, max_staleness=2, save_every=9)
    done = 5 if where == "learning" else 4
    assert [p.name for p in checkpoints(tmp_path)] == [f"step_{done:06d}"]


def test_a_rank_that_plays_has_no_optimizer(tmp_path, begin):
    """No masters, momenta and gradients; its weights are those of the newest checkpoint."""
    go(tmp_path, begin, steps=1)
    args = Args(**{**SMALL, "out": str(tmp_path), "init": str(begin)}, resume=True)
    model, optimizer, *_, progress = rl.prepare(args, setup("cpu", "float32"), trains=False)
    assert optimizer is None and progress.step == 1
    saved = load_tensors(tmp_path / "step_000001")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_slow_reader_finds_everything_once():
    """Two players have finished all orders before the trainer looks."""
    store = dist.HashStore()

    class Still:
        work, weights = [], {}

        def arrived(self):
            return False

        def wait(self, should_leave):
            return not should_leave()

    class Quick:
        def __init__(self):
            self.orders = []

        def delays(self):
            return 1.0, 2.0

        def start(self, orders):
            self.orders += orders

        def step(self):
            ended, self.orders = self.orders, []
            return [replace(e, score=Score(1.0)) for e in ended]
    players = {rank: threading.Thread(target=serve, args=(Quick(), Still(), store, rank, 0))
               for rank in (1, 2)}
    for player in players.values():
        player.start()
    remote = Remote(store, [1, 2], Still(), 0, 0)
    asked = [Episode(Task("point", group), group, i) for group in range(50) for i in range(4)]
    remote.start(asked)
    for rank in players:        # the last of each rank's own
        store.wait([f"episode/{rank}/99"], timedelta(seconds=30))
    found = []
    while len(found) < len(asked):
        found += remote.step()
    assert remote.delays() == (1.0, 2.0)
    remote.close()
    for player in players.values():
        player.join(20)
    assert not remote.step() and not any(player.is_alive() for player in players.values())
    assert sorted((e.group, e.index) for e in found) == [(e.group, e.index) for e in asked]
    assert all(e.score.reward == 1 for e in found)


def test_a_player_without_a_sign_of_life_ends_the_run():
    """But not if it is the trainer that has not looked for a long time."""
    store = dist.HashStore()
    remote = Remote(store, [1], None, 0, 0, silence=5.0)
    remote._check_alive(remote.alive[1][1] + 5)
    store.add("alive/1", 7)
    remote._check_alive(now := remote.alive[1][1] + 100)
    remote._check_alive(now + 5)
    with pytest.raises(UserError, match="rank 1, .* has not been heard from for 5 seconds"):
        remote._check_alive(now + 5.1)


def test_a_transfer_that_never_ends_ends_the_run():
    """The player is dead, or has stopped by the same signal."""
    transfer = Transfer(GLMV(sized("tiny")), None)
    transfer.work = [type("Work", (), {"is_completed": lambda self: False})()]
    dead = Remote(dist.HashStore(), [1], transfer, 0, 0, silence=0.01)
    with pytest.raises(UserError, match="rank 1, which plays, has not been heard from"):
        dead.load({}, 1)
    with pytest.raises(UserError, match="rank 1, which plays, has not been heard from"):
        dead.close()
    assert dead.store.check(["over"])
    broken = type("Work", (), {"is_completed": lambda self: True, "wait": lambda self: 1 / 0})
    transfer.work = [broken()]          # the other side has left, by the same signal
    left = Remote(dist.HashStore(), [1], transfer, 0, 0, lambda: True)
    left.load({}, 1)
    left.close()


def test_stopping_while_collecting_loses_no_task_and_counts_none_twice(tiny, monkeypatch):
    """The state holds groups that are ready, in play, and to be played again."""
    def tasks_of(groups):
        return [group[0].task.seed for group in groups]
    monkeypatch.setattr(Given, "next_task", lambda self: Task("counting", self.replay.pop(0)[1])
                        if self.replay else Task("counting", self.seeds.pop(0)))
    first = make_collector(tiny, monkeypatch, *range(100, 200), prompts=9, flight=8,
                   should_leave=lambda: first.ready and first.open)
    assert first.collect(0) is None and first.ready and first.open
    second = make_collector(tiny, monkeypatch, *first.curriculum.seeds, prompts=9, flight=8)
    second.restore(first.state())
    learned = tasks_of(second.collect(0))
    assert set(tasks_of(first.ready)) <= set(learned) and len(learned) == len(set(learned)) >= 9
    left = [task[1] for task in second.curriculum.replay] + second.curriculum.seeds
    no_signal = tasks_of(g for g in first.seen + second.seen if not rl.has_signal(g))
    assert sorted(learned + left + no_signal) == list(range(100, 200))


@pytest.mark.slow
@pytest.mark.parametrize("who,staleness", [("player", 0), ("trainer", 0), ("trainer", 2)])
def test_a_dead_rank_restarts_all_from_the_last_checkpoint(tmp_path, begin, who, staleness):
    """It dies in the first attempt after the second step. No other rank has to be killed, and steps
    1 and 2 are not lost."""
    (tmp_path / "fatal.py").write_text(FATAL)
    agent = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=1",
                     tmp_path / "fatal.py", tmp_path, who, "exit", "--resume", init=begin,
                     out=tmp_path / "run", max_staleness=staleness)
    said, wrong = agent.communicate(timeout=400)
    assert agent.returncode == 0, wrong
    assert "steps 2..4" in said and "SIGKILL" not in wrong
    nothing_lost_nor_counted_twice(tmp_path, staleness)
    assert [x["step"] for x in log_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("way,who", [("static", "player"), ("static", "trainer"),
                                     ("c10d", "player")])
def test_if_one_of_two_machines_stops_the_other_ends(tmp_path, begin, way, who):
    """Over loopback. One agent is stopped after the second step; then both are started again and do
    the remaining steps."""
    (tmp_path / "fatal.py").write_text(FATAL)
    words = tmp_path / "fatal.py", tmp_path, who, "agent", "--resume"
    first = two_agents(way, 0, *words, init=begin, out=tmp_path / "run")
    assert (tmp_path / "died").exists() and any(code for code, *_ in first)
    assert len(log_of(tmp_path / "run")) < 4
    assert not any("SIGKILL" in wrong for *_, wrong in first)
    second = two_agents(way, 0, *words, init=begin, out=tmp_path / "run")
    assert [code for code, *_ in second] == [0, 0], second
    begun = 2 if who == "player" else 3     # a trainer finishes the step that it is at
    assert any(f"steps {begun}..4" in said for _, said, _ in second)
    assert [x["step"] for x in log_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_if_one_of_two_machines_restarts_the_other_follows(tmp_path, begin):
    """Only one of the agents counts that as a restart."""
    (tmp_path / "fatal.py").write_text(FATAL)
    both = two_agents("c10d", 1, tmp_path / "fatal.py", tmp_path, "player", "exit", "--resume",
                      init=begin, out=tmp_path / "run")
    assert [code for code, *_ in both] == [0, 0], both
    assert any("steps 2..4" in said for _, said, _ in both)
    nothing_lost_nor_counted_twice(tmp_path)
    assert [x["step"] for x in log_of(tmp_path / "run")] == [1, 2, 3, 4]


# ---- the curriculum and bytes --------------------------------------------------------------------

def test_the_curriculum_prefers_half_solved_tasks_and_opens_levels():
    said = []
    curriculum = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 2, said.append)
    for _ in range(30):
        curriculum.record([episode(1), episode(1, index=1)], False)    # counting is solved
        curriculum.record([replace_task(episode(i), "point") for i in range(2)], True)
    assert said == ["counting: level 1 opens"] and curriculum.top == {"counting": 1, "point": 0}
    names = [curriculum.next_task().category for _ in range(400)]
    assert 0.55 < names.count("point") / 400 < 0.75
    assert curriculum.expansion == pytest.approx(1 / (1 - curriculum.no_signal))
    assert 1.2 < curriculum.expansion < 2
    other = Curriculum((("counting", 1.0), ("point", 1.0)), 0, 2)
    other.restore(curriculum.state())
    assert [other.next_task() for _ in range(5)] == [curriculum.next_task() for _ in range(5)]


def test_episodes_travel_as_bytes(tiny):
    orders = [Episode(Task("gui_form", 1), 3, i) for i in range(2)]
    orders[1].task = Task("counting", 0, split="test")
    played = rl.rollout(rl.make_engine(tiny, Args()), orders, settings_of(tiny), Rewards())
    back = from_bytes(to_bytes(played + [Episode(Task("point", 2), 1, 0)]))
    assert back[2] == Episode(Task("point", 2), 1, 0)
    for a, b in zip(played, back):
        assert (a.task, a.group, a.index, a.score, a.status) == (
            b.task, b.group, b.index, b.score, b.status)
        for c, d in zip(a.documents, b.documents, strict=True):
            assert (c.ids == d.ids).all() and (c.weights == d.weights).all()
            assert c.extras.keys() == d.extras.keys() and all(
                (c.extras[k] == d.extras[k]).all() for k in c.extras)
            assert all((x == y).all() for x, y in zip(c.images, d.images, strict=True))
    whole = to_bytes(played)
    for broken in (b"", b"PK", whole[:100], whole[:-30]):
        with pytest.raises(ValueError, match="no episodes"):
            from_bytes(broken)
