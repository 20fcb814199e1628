"""The engine against a plain loop without a cache, and what must not change a request's reply."""
import dataclasses
import math
import random

import numpy as np
import pytest
import torch

import engine as engine_py
import mmtp
from conftest import random_document
from data import collate, Document
from engine import Engine, probabilities, Request
from lib.cli import UserError
from model import GLMV

# (images, in patches; characters of text): nine prompts of 12 to 60 tokens
PROMPTS = [((), 12), (((4, 6),), 9), (((2, 2), (6, 4)), 7), ((), 31), (((4, 4),), 30),
           ((), 13), (((8, 8),), 12), (((2, 8), (2, 2), (4, 6)), 8), ((), 60)]


@pytest.fixture
def prompts(config):
    return [random_document(config, sizes, length, seed)
            for seed, (sizes, length) in enumerate(PROMPTS)]


@torch.no_grad()
def plain(model, prompt: Document, max_new: int, stops) -> tuple[list, list]:
    """Greedy generation from the definition: a forward over everything for every token. Returns the
    ids and, for each, the lead of its logit over the second best."""
    ids, leads = [], []
    while len(ids) < max_new and not (ids and ids[-1] in stops):
        whole = dataclasses.replace(prompt, ids=np.append(prompt.ids, ids).astype(np.int32),
                                    weights=np.zeros(len(prompt.ids) + len(ids), np.float32))
        batch = collate([whole], model.config)
        merged = model.encode_images(batch)
        best = model.lm_head(model(batch, merged)[-1]).topk(2)
        ids.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return ids, leads


def same(got, want, leads) -> bool:
    """Whether the replies are equal up to a tie of the two best logits in fp32."""
    first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
    return got == want if first is None else leads[first] < 1e-4


def serve(model, requests, slots=4, context=128) -> list:
    """All results, in the order of `requests`."""
    engine = Engine(model, slots, context)
    order = [engine.submit(r) for r in requests]
    results = {}
    while engine.busy:
        results |= {result.id: result for result in engine.step()}
        assert len(engine.running) <= slots
    return [results[id] for id in order]


@pytest.mark.parametrize("slots", [1, 4])
def test_greedy_is_the_plain_loop(model, prompts, slots):
    """Nine requests, more than there are slots, with replies of different lengths."""
    requests = [Request(p, max_new=4 + 3 * (i % 4)) for i, p in enumerate(prompts)]
    stops = Engine(model, 1).stops
    for request, result in zip(requests, serve(model, requests, slots), strict=True):
        want, leads = plain(model, request.prompt, request.max_new, stops)
        assert same(result.ids, want, leads)
        assert result.finish == ("stop" if result.ids[-1] in stops else "length")


def test_the_reply_depends_on_the_picture(model, prompts):
    seen = prompts[1]
    other = dataclasses.replace(seen, images=[255 - image for image in seen.images])
    a, b = serve(model, [Request(seen, 16, temperature=1.0), Request(other, 16, temperature=1.0)])
    assert a.ids != b.ids


def test_a_sampled_reply_depends_on_its_own_seed_only(model, prompts):
    """Not the order of submission, nor the number of slots, nor the neighbours."""
    requests = [Request(p, 12, temperature=1.0, top_p=0.9, seed=7 + i)
                for i, p in enumerate(prompts)]
    want = [r.ids for r in serve(model, requests, slots=9)]
    assert [r.ids for r in serve(model, requests, slots=2)] == want
    order = random.Random(0).sample(range(9), 9)
    mixed = serve(model, [requests[i] for i in order], slots=4)
    assert [r.ids for r in mixed] == [want[i] for i in order]
    greedy = [Request(p, 5) for p in prompts]
    assert [r.ids for r in serve(model, greedy[:3] + requests + greedy[3:])[3:12]] == want
    others = [dataclasses.replace(r, seed=r.seed + 100) for r in requests]
    assert sum(a.ids == b for a, b in zip(serve(model, others), want)) == 0


def test_a_small_top_p_is_greedy(model, prompts):
    greedy = serve(model, [Request(p, 8) for p in prompts])
    narrow = serve(model, [Request(p, 8, temperature=1.0, top_p=1e-6) for p in prompts])
    assert [r.ids for r in greedy] == [r.ids for r in narrow]


def test_the_best_token_always_stays_and_nothing_overflows():
    logits = torch.tensor([[-1e30, 2.0, 3e38, 1.0]])
    for temperature in (1e-30, 1e-4, 1.0, 1e9):
        for top_p in (0.0, 1e-9, 0.5, 1.0):
            shares = probabilities(logits, torch.tensor([temperature]), torch.tensor([top_p]))
            assert shares.tolist() == [[0, 0, 1, 0]]
    even = torch.zeros(1, 4)
    assert probabilities(even, torch.ones(1), torch.zeros(1)).count_nonzero() == 1


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": -0.5},
    {"top_p": 1.5}, {"top_p": math.nan}, {"max_new": 0}], ids=str)
def test_requests_that_cant_be_served(model, prompts, wrong):
    with pytest.raises(UserError, match="a reply needs"):
        Engine(model, 1, 128).submit(Request(prompts[0], **wrong))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_refused(config, prompts, temperature, value):
    broken = GLMV(config, seed=0)
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = value
    with pytest.raises(UserError, match="the model computes numbers that are not finite"):
        serve(broken, [Request(prompts[0], 5, temperature)])


def test_a_broken_mtp_head_is_refused(config, prompts):
    """Where replies are sampled; greedy ones do not depend on the drafts."""
    broken = GLMV(config, seed=0)
    mmtp.attach(broken, 1)
    with torch.no_grad():
        for p in mmtp.head_of(broken).parameters():
            p.fill_(math.nan)
    engine = Engine(broken, 1, 128, drafts=2, adapt=False)
    engine.submit(Request(prompts[0], 5, temperature=1.0))
    with pytest.raises(UserError, match="the MTP head computes numbers that are not finite"):
        while engine.busy:
            engine.step()


def test_a_stop_token_ends_a_reply(model, prompts):
    """One of the first tokens of the reply is made a stop token."""
    [free] = serve(model, [Request(prompts[0], 10)])
    engine = Engine(model, 2, 128)
    third = next(i for i in range(2, 10) if free.ids[i] not in free.ids[:i])
    engine.stops = {free.ids[third]}
    engine.submit(Request(prompts[0], 10))
    results = []
    while engine.busy:
        results += engine.step()
    assert (results[0].ids, results[0].finish) == (free.ids[:third + 1], "stop")


def test_limits_end_a_reply(model, prompts):
    engine = Engine(model, 2, 128)
    engine.stops = set()

    def reply(prompt, max_new):
        engine.submit(Request(prompt, max_new))
        results = []
        while engine.busy:
            results += engine.step()
        return results[0]

    one, ten = reply(prompts[8], 1), reply(prompts[8], 10)
    assert (len(one.ids), one.finish) == (1, "length") and len(ten.ids) == 10
    full = reply(prompts[8], 1000)
    assert full.finish == "context" and len(prompts[8].ids) + len(full.ids) == 128
    assert full.ids[:10] == ten.ids


def test_the_largest_prompt_gets_one_token(model, prompts):
    longest = prompts[8]
    [result] = serve(model, [Request(longest, 10)], context=len(longest.ids) + 1)
    assert len(result.ids) == 1 and result.finish in ("context", "stop")


@pytest.mark.parametrize("gone", [0, 1, 2, 3, 7], ids=lambda i: f"request{i}")
def test_abort_does_not_change_the_other_replies(model, prompts, gone):
    """Requests 0..3 run, 7 still waits."""
    requests = [Request(p, 10, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    want = [r.ids for r in serve(model, requests)]
    engine = Engine(model, 4, 128)
    ids = [engine.submit(r) for r in requests]
    results = {r.id: r.ids for _ in range(3) for r in engine.step()}
    engine.abort(ids[gone])
    engine.abort(12345)
    while engine.busy:
        results |= {r.id: r.ids for r in engine.step()}
    assert results == {id: reply for id, reply in zip(ids, want) if id != ids[gone]}


def test_requests_may_come_while_others_run(model, prompts):
    requests = [Request(p, 9, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    want = [r.ids for r in serve(model, requests)]
    engine, results, left = Engine(model, 3, 128), {}, list(requests)
    while engine.busy or left:
        if left:
            engine.submit(left.pop(0))
        results |= {r.id: r.ids for r in engine.step()}
    assert [results[i + 1] for i in range(9)] == want


@pytest.fixture
def readings(monkeypatch) -> list:
    """The number of prompts in each forward that reads prompts."""
    sizes = []
    monkeypatch.setattr(engine_py, "collate", lambda documents, config: (
        sizes.append(len(documents)) or collate(documents, config)))
    return sizes


def test_a_prompt_that_several_requests_share_is_read_once(model, prompts, readings):
    """And each request gets the reply that it gets alone. The same words about another picture,
    or about a copy of it, are another prompt."""
    other = dataclasses.replace(prompts[2], images=[255 - image for image in prompts[2].images])
    copy = dataclasses.replace(prompts[2], images=[image.copy() for image in prompts[2].images])
    requests = [Request(prompt, 9, temperature=1.0, seed=seed) for seed in range(3)
                for prompt in (prompts[2], prompts[8], other, copy)]
    want = [serve(model, [r])[0] for r in requests]
    assert len({tuple(r.ids) for r in want}) == 9
    readings.clear()
    got = serve(model, requests, slots=12)
    assert readings == [4]
    for a, b in zip(got, want):
        assert a.ids == b.ids and a.logps == pytest.approx(b.logps, abs=1e-4)


def test_admission_waits_only_if_not_all_requests_fit(model, prompts, readings):
    """Then several prompts are read at a time; requests that all fit are admitted at once."""
    engine = Engine(model, 4, 128)
    engine.stops = set()
    for i in range(36):
        engine.submit(Request(prompts[i % 9], 3 + i % 7))
    while engine.busy:
        engine.step()
        assert engine.running or not engine.waiting
    assert sum(readings) == 36 and readings[0] == 4 and len(readings) < 18
    for n in range(1, 5):       # all fit: no one waits
        engine.submit(Request(prompts[n], 100))
        engine.step()
        assert len(engine.running) == n


@pytest.mark.parametrize("length,words", [(0, "empty"), (64, "64 tokens"), (99, "99 tokens")])
def test_prompts_that_cant_be_served(model, length, words):
    engine = Engine(model, 2, 64)
    prompt = Document(np.ones(length, np.int32), np.ones(length, np.float32))
    with pytest.raises(UserError, match=words) as error:
        engine.submit(Request(prompt))
    assert "\n" not in str(error.value) and not engine.busy
