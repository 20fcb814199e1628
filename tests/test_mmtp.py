"""The MTP head against a computation from the paper, and speculation against plain decoding."""
import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import plain, PROMPTS, same, serve

import gym
import mmtp
from conftest import odd_config, random_document
from data import collate, document
from engine import Engine, Request
from lab import drafts
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from lib.draft_tuner import drafts_that_pay
from lib.runs import find_checkpoint
from lib.tensors import load_tensors, save_tensors
from model import GLMV
from mtp_reference import reference
from rl import DEMO
from tasks.base import Task
from tokenizer import Tokenizer


def with_head(which: int = 0, depths: int = 3) -> GLMV:
    model = GLMV(odd_config(which), seed=1).eval()
    head = mmtp.attach(model, depths, seed=2)
    with torch.no_grad():       # norms are random too, so that a swapped name shows
        for p in (*head.parameters(), model.model.language_model.norm.weight):
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def row(model, sizes=(((4, 6),), (), ((2, 2), (4, 4)))):
    """Three documents in a row, their batch, visual embeddings and the trunk's states."""
    documents = [random_document(model.config, s, 11 + i, i) for i, s in enumerate(sizes)]
    batch = collate(documents, model.config)
    merged = model.encode_images(batch)
    return batch, merged, model(batch, merged)


# ---- the head -----------------------------------------------------------------------------------

@pytest.mark.parametrize("which", range(3))
@torch.no_grad()
def test_losses_are_those_from_the_definition(which):
    """Document by document, by a computation written from the paper without knowing mmtp.py."""
    model = with_head(which)
    batch, _, hidden = row(model)
    c, want = model.config, [0.0] * 3
    tensors = {k: v.double() for k, v in model.state_dict().items()}
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        tokens, weights = batch.tokens[start:end], batch.weights[start:end]
        found = reference(
            tensors, hidden[start:end].double(), tokens, batch.positions[:, start:end], 3,
            layer=c.text.num_hidden_layers, heads=c.text.num_attention_heads,
            groups=c.text.num_key_value_heads, width=c.text.head_dim, sections=c.sections,
            theta=c.text.rope_theta, eps=c.text.rms_norm_eps)
        for k, (_, logits) in enumerate(found, 1):
            targets = tokens[k + 1:]
            loss = -logits[:len(targets)].log_softmax(-1).gather(1, targets[:, None])[:, 0]
            want[k - 1] += float((loss * weights[k + 1:] * (targets != c.image_token_id)).sum())
    got = [float(x) for x in mmtp.losses(model, hidden, batch, depths=3)]
    assert got == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_the_figure_of_the_docstring():
    """What each position reads and predicts in the figure on top of mmtp.py is what it does."""
    model = with_head()
    tokens = torch.tensor([1, 2, model.config.image_token_id, 4, 5])
    letters = dict(zip(tokens.tolist(), "ab#de"))
    batch = SimpleNamespace(tokens=tokens, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
                            positions=torch.arange(5).expand(3, -1), slots=torch.tensor([2]),
                            weights=torch.ones(5))
    batch.host = batch
    hidden = torch.zeros(5, model.config.text.hidden_size)
    figure = dict(re.findall(r"k = (\d) {4}reads {7}(.*\n {13}predicts.*)\n", mmtp.__doc__))
    assert len(figure) == 3
    for k, found in enumerate(mmtp.states(model, hidden, batch, depths=3), 1):
        reads, predicts = figure[str(k)].replace("predicts", "").split("\n")
        assert reads.split() == [letters[int(t)] for t in tokens[k:]] + ["."] * k
        targets = predicts.split()
        for i, (target, counts) in enumerate(zip(found.target.tolist(), found.counts.tolist())):
            letter = letters[int(tokens[target])]
            assert targets[i] == (letter if counts else "(#)" if letter == "#" else "."), (k, i)


@torch.no_grad()
def test_only_embed_looks_at_the_picture_again():
    """With the trunk's states frozen, other visual embeddings change `embed` alone."""
    model = with_head()
    batch, merged, hidden = row(model)
    for option in mmtp.OPTIONS:
        one, other = (mmtp.losses(model, hidden, batch, m, 2, option) for m in (merged, -merged))
        assert torch.equal(one, other) == (option != "embed")


@torch.no_grad()
def test_mask_is_a_row_without_the_slots_before_visual_ones():
    """The same as a row that never had them, at the positions that the rest keep."""
    model = with_head()
    batch, _, hidden = row(model, (((4, 6), (2, 2)),))
    visual = batch.tokens == model.config.image_token_id
    kept = ~visual.roll(-1)
    got = mmtp.losses(model, hidden, batch, None, 1, "mask")[0]
    embedded = model.model.language_model.embed_tokens(batch.tokens).roll(-1, 0)[kept]
    cu = torch.tensor([0, int(kept.sum())], dtype=torch.int32)
    h = mmtp.predict(model, hidden[kept], embedded, batch.positions[:, kept],
                     mmtp.Segments(cu, causal=True))
    at = kept.nonzero()[:, 0]
    target = batch.tokens[(at + 2).clamp(max=len(visual) - 1)]
    counts = (at + 2 < len(visual)) & (target != model.config.image_token_id)
    loss = -mmtp.logits(model, h).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert float(got) == pytest.approx(float((loss * counts).sum()), rel=1e-5)


def test_without_pictures_the_options_are_one():
    model = with_head()
    batch, _, hidden = row(model, ((), ()))
    embed, mask, token = (mmtp.losses(model, hidden, batch, None, 3, option)
                          for option in mmtp.OPTIONS)
    torch.testing.assert_close(embed, token)
    torch.testing.assert_close(mask, token)


@torch.no_grad()
def test_a_sequence_cut_sends_no_visual_embeddings_for_token():
    """A rank that holds slots a..b and the ids of K more makes its part of the head's input by
    itself; with `embed` it lacks rows that its neighbour has encoded, cut at any group."""
    model = with_head()
    batch, merged, _ = row(model, (((4, 6), (2, 2)),))
    tokens, depths, table = batch.tokens, 3, mmtp.tables(model)[0]
    visual = tokens == model.config.image_token_id
    first = int(visual.nonzero()[0])
    for cut in range(first + 1, first + 6):
        for a, b in ((0, cut), (cut, len(tokens))):
            near = slice(a, b + depths)
            slots = visual[near].nonzero()[:, 0]
            own = merged[int(visual[:a].sum()):int(visual[:b].sum())]
            for option in ("token", "mask"):
                want = mmtp.inputs(tokens, batch.slots, table, None, option)[near]
                assert torch.equal(mmtp.inputs(tokens[near], slots, table, None, option), want)
            if visual[b:b + depths].any():
                with pytest.raises((IndexError, RuntimeError)):
                    mmtp.inputs(tokens[near], slots, table, own, "embed")


def test_detached_only_the_head_learns():
    model = with_head()
    batch, merged, hidden = row(model)
    sum(mmtp.losses(model, hidden, batch, merged, 3, detach=True)).backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None}
    head = {n for n, _ in model.named_parameters() if n.startswith(mmtp.prefix(model))}
    assert learns == head and len(head) == 14
    model.zero_grad()
    batch, merged, hidden = row(model)
    sum(mmtp.losses(model, hidden, batch, merged, 3)).backward()
    assert {"lm_head.weight", "model.visual.patch_embed.proj.weight"} <= {
        n for n, p in model.named_parameters() if p.grad is not None}


def test_an_unknown_option():
    model = with_head()
    batch, _, hidden = row(model)
    with pytest.raises(UserError, match="embed, mask, token"):
        mmtp.losses(model, hidden, batch, option="pixels")


# ---- folders ------------------------------------------------------------------------------------

def test_a_folder_keeps_the_head(tmp_path):
    model = with_head(depths=5)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config.mtp_depths == 5
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b), name


@pytest.mark.parametrize("said", [0, 1], ids="num_nextn_predict_layers={}".format)
@pytest.mark.parametrize("tied", [True, False], ids=["equal", "own"])
def test_the_released_layout(tmp_path, said, tied):
    """Copies of embedding and output matrix, and a config.json that may deny the layer."""
    model = with_head()
    save_model(model, tmp_path)
    tensors, begin = load_tensors(tmp_path), mmtp.prefix(model)
    tensors[begin + "embed_tokens.weight"] = (
        tensors["model.language_model.embed_tokens.weight"] + (0 if tied else 1))
    tensors[begin + "shared_head.head.weight"] = tensors["lm_head.weight"] * (1 if tied else 2)
    save_tensors(tmp_path / "model.safetensors", tensors)
    text = (tmp_path / "config.json").read_text()
    assert '"num_nextn_predict_layers": 1' in text and '"mtp_depths": 3' in text
    text = text.replace('"num_nextn_predict_layers": 1', f'"num_nextn_predict_layers": {said}')
    (tmp_path / "config.json").write_text(text.replace('"mtp_depths": 3', '"mtp_depths": 0'))
    (tmp_path / "digests.json").unlink()
    again = load_model(tmp_path)
    table, out = mmtp.tables(again)
    assert torch.equal(out, tensors[begin + "shared_head.head.weight"])
    assert torch.equal(table, tensors[begin + "embed_tokens.weight"])
    assert (table is again.model.language_model.embed_tokens.weight) == tied
    save_model(again, tmp_path / "again")
    assert torch.equal(mmtp.tables(load_model(tmp_path / "again"))[1], out)


def test_a_head_with_a_tensor_missing(tmp_path):
    model = with_head()
    save_model(model, tmp_path)
    tensors = load_tensors(tmp_path)
    del tensors[mmtp.prefix(model) + "enorm.weight"]
    save_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "digests.json").unlink()
    with pytest.raises(UserError, match="enorm"):
        load_model(tmp_path)


# ---- accept -------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_accept_has_the_distribution_of_the_trunk(seed):
    """Integrated exactly over all drafts and all uniforms: vocabulary 5, K = 2. The outcome is
    constant between the thresholds p/q and the steps of the cumulative sums, so one point in
    each cell is enough."""
    generator = torch.Generator().manual_seed(seed)
    p1, p2, q1, q2 = (torch.rand(*shape, 5, generator=generator, dtype=torch.float64).pow(3)
                      for shape in ((), (5,), (), (5,)))
    q1[seed] = p1[4] = 0        # what one of them never says
    p1, p2, q1, q2 = (x / x.sum(-1, keepdim=True) for x in (p1, p2, q1, q2))
    last = torch.rand(5, 5, 5, generator=generator, dtype=torch.float64).softmax(-1)
    first = torch.zeros(5, dtype=torch.float64)
    second = torch.zeros(5, 5, dtype=torch.float64)
    for a, b in itertools.product(range(5), range(5)):
        chance = float(q1[a] * q2[a, b])
        if not chance:
            continue
        p, q = torch.stack([p1, p2[a], last[a, b]])[None], torch.stack([q1, q2[a]])[None]
        cuts = [sorted({0.0, 1.0, min(1.0, float(p1[a] / q1[a]))}),
                sorted({0.0, 1.0, min(1.0, float(p2[a, b] / q2[a, b]))})]
        steps = [0.0, 1.0]
        for rest in ((p1 - q1).clamp_min(0), (p2[a] - q2[a]).clamp_min(0), last[a, b]):
            steps += (rest.cumsum(0) / rest.sum()).tolist()
        cells = [list(itertools.pairwise(c)) for c in (*cuts, sorted(set(steps)))]
        boxes = [cell for cell in itertools.product(*cells) if all(y - x > 1e-13 for x, y in cell)]
        middle = torch.tensor([[(x + y) / 2 for x, y in cell] for cell in boxes],
                              dtype=torch.float64)
        n = len(boxes)
        count, token = mmtp.accept(p.expand(n, -1, -1), q.expand(n, -1, -1),
                                   torch.tensor([[a, b]]).expand(n, -1), middle)
        for cell, accepted, token_of_p in zip(boxes, count.tolist(), token.tolist()):
            mass = chance * np.prod([y - x for x, y in cell])
            said = [a, b][:accepted] + [token_of_p]
            first[said[0]] += mass
            if len(said) > 1:
                second[said[0], said[1]] += mass
            else:               # the second token will come from the trunk
                second[said[0]] += mass * p2[said[0]]
    torch.testing.assert_close(first, p1, atol=1e-6, rtol=0)
    torch.testing.assert_close(second, p1[:, None] * p2, atol=1e-6, rtol=0)


def test_how_many_drafts_are_worth_their_time():
    assert drafts_that_pay([0.9, 0.9, 0.9], [1.0, 1.1, 1.2, 1.3]) == 3
    assert drafts_that_pay([0.9, 0.1, 0.1], [1.0, 1.2, 1.4, 1.6]) == 1
    assert drafts_that_pay([0.05, 0.05], [1.0, 1.2, 1.4]) == 0


# ---- speculation --------------------------------------------------------------------------------

def half_right(engine, replies: dict):
    """Replace the head's drafts by the known reply, each token wrong in 30% of the cases, so that
    every number of accepted drafts occurs."""
    rng, own = np.random.default_rng(0), engine._draft

    def mostly_right(n, k):
        made, draft_probs = own(n, k)
        for slot, running in enumerate(engine.running):
            known = replies[running.id][len(running.ids):][:made.shape[1]]
            for j, token in enumerate(known):
                made[slot, j] = token if rng.random() < 0.7 else 7
        return made, draft_probs
    engine._draft = mostly_right


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("k", [1, 3, pytest.param(10, marks=pytest.mark.slow)])
def test_greedy_with_drafts_is_plain_greedy(k, slots):
    """More prompts than slots, with and without pictures, replies of 4 to 16 tokens; once with
    drafts from the random head, once with drafts that are mostly accepted."""
    model, ties = with_head(), 0
    prompts = [random_document(model.config, sizes, length, seed)
               for seed, (sizes, length) in enumerate(PROMPTS * 6)][:20 if slots == 1 else 50]
    requests = [Request(p, max_new=4 + 3 * (i % 5)) for i, p in enumerate(prompts)]
    want = serve(model, requests, slots)
    stops = Engine(model, 1).stops
    for cheat in (False, True):
        engine = Engine(model, slots, 128, drafts=k, adapt=False, say=lambda _: None)
        ids = [engine.submit(r) for r in requests]
        if cheat:
            half_right(engine, {id: w.ids for id, w in zip(ids, want)})
        got = {}
        while engine.busy:
            got |= {r.id: r for r in engine.step()}
        for id, request, w in zip(ids, requests, want):
            if got[id].ids != w.ids:
                ties += 1
                assert same(got[id].ids, *plain(model, request.prompt, request.max_new, stops))
            assert got[id].finish == w.finish or got[id].ids != w.ids
            assert got[id].logps[:3] == pytest.approx(w.logps[:3], abs=1e-4)
        assert not cheat or engine.tokens > 1.5 * engine.steps
    assert ties <= 1


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_thousand_prompts_of_all_kinds(k):
    """The demo's model and its head on every category that it can see: the same replies, or a
    tie of the two best where they part."""
    model = load_model(find_checkpoint(DEMO)).eval()
    tokens, names = Tokenizer(model.config.n_ranks), gym.names(64)
    prompts = [document(next(gym.drive(gym.make(Task(names[i % len(names)], i, 0, "test")))),
                        tokens, model.config, True) for i in range(1000)]
    requests = [Request(p, 24) for p in prompts]
    want = serve(model, requests, 64, 512)
    engine = Engine(model, 16, 512, drafts=k, adapt=False, say=lambda _: None)
    ids, got = [engine.submit(r) for r in requests], {}
    while engine.busy:
        got |= {r.id: r for r in engine.step()}
    parted = [(r, got[id].ids, w.ids) for r, id, w in zip(requests, ids, want)
              if got[id].ids != w.ids]
    assert len(parted) < 1 + 0.001 * len(prompts)
    for request, ours, theirs in parted:
        assert same(ours, *plain(model, request.prompt, len(theirs), engine.stops))
    assert engine.tokens > 1.2 * engine.steps


def test_the_head_sees_in_decoding_what_it_sees_in_training():
    """Its state behind a reply, built up step by step, is that of one forward over everything;
    the prompt is another request's too, which goes on in other words."""
    model = with_head()
    prompt = random_document(model.config, ((4, 6),), 9, 0)
    engine = Engine(model, 3, 128, drafts=3, adapt=False)
    engine.stops = set()
    engine.submit(Request(random_document(model.config, (), 5, 1), 40))
    engine.submit(Request(prompt, 40, temperature=1.0))
    id = engine.submit(Request(prompt, 40))
    for _ in range(6):
        engine.step()
    slot = next(i for i, r in enumerate(engine.running) if r.id == id)
    ids = engine.running[slot].ids
    assert ids[0] != engine.running[1].ids[0]
    whole = dataclasses.replace(prompt, ids=np.append(prompt.ids, ids).astype(np.int32),
                                weights=np.zeros(len(prompt.ids) + len(ids), np.float32))
    with torch.no_grad():
        batch = collate([whole], model.config)
        hidden = model(batch, model.encode(batch.patches, batch.grids))
        states = mmtp.draft(model, hidden[:-1], batch.tokens[1:], batch.positions[:, :-1],
                            mmtp.Segments(batch.cu_seqlens.clamp(max=len(whole.ids) - 1), True))
    torch.testing.assert_close(engine.state[slot], states[-1], atol=1e-4, rtol=1e-4)


def test_sampled_drafts_keep_the_distribution():
    """10,000 replies of three tokens, K = 2: chi-square of the drafted places against the exact
    probabilities. Twelve tokens are likely, so that all pairs can be counted."""
    model = with_head()
    with torch.no_grad():
        model.lm_head.weight[12:] = 0
        model.lm_head.weight[:12] *= 3
    prompt = random_document(model.config, (), 6, 0)
    engine = Engine(model, 500, 16, drafts=2, adapt=False, say=lambda _: None)
    engine.stops = set()
    for seed in range(10_000):
        engine.submit(Request(prompt, 3, temperature=1.0, seed=seed))
    replies = []
    while engine.busy:
        replies += [r.ids for r in engine.step()]
    assert engine.tokens > 1.05 * engine.steps  # some drafts are accepted

    @torch.no_grad()
    def following(prefixes):
        """The distribution of the token after each of these beginnings of a reply, (n, V)."""
        tokens = torch.tensor([[*prompt.ids.tolist(), *p] for p in prefixes])
        n, length = tokens.shape
        batch = collate([random_document(model.config, (), length)] * n, model.config)
        hidden = model(dataclasses.replace(batch, tokens=tokens.flatten()))
        return model.lm_head(hidden.unflatten(0, (n, length))[:, -1]).softmax(-1).double()

    first = following([[]])[0]
    pairs = first[:, None] * following([[t] for t in range(544)])
    likely = (pairs > 1e-4).nonzero().tolist()
    share = torch.stack([pairs[t, u] for t, u in likely])
    third = share / share.sum() @ following(likely)
    known = {tuple(pair) for pair in likely}
    for expected, seen in ((pairs.sum(0), [r[1] for r in replies]),
                           (third, [r[2] for r in replies if tuple(r[:2]) in known])):
        expected, seen = len(seen) * expected.numpy(), np.bincount(seen, minlength=544)
        rare = expected < 5     # cells too small for the statistic count as one
        e, s = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (expected, seen))
        chi, free = ((s - e) ** 2 / e).sum(), len(e) - 1
        assert free >= 8 and abs(chi - free) < 4.5 * (2 * free) ** 0.5, (chi, free)


def test_drafts_stop_if_they_do_not_pay():
    """Drafts of a random head are never accepted: after some dozens of them no more are made."""
    model = with_head()
    engine = Engine(model, 8, 256, drafts=3)
    engine.stops = set()
    for i in range(8):
        engine.submit(Request(random_document(model.config, (), 9, i), 60))
    while engine.busy:
        engine.step()
    assert engine.tuner.best == 0 and engine.tokens < 1.2 * engine.steps
    engine.load({}, 1)          # new weights may be accepted again
    assert engine.tuner.best == 3


def test_a_traced_step_for_the_terminal():
    got = drafts.step_lines(12, ["'a'", "'b'", "'c'"], 1, "'longer'", ended=False)
    assert got == ["step 12  drafted   'a'  'b'       'c'",
                   "         accepted  'a'   1 of 3",
                   "         trunk          'longer'   replaces 'b'"]
    assert drafts.step_lines(1, ["'a'"], 1, "'b'", False)[-1].endswith("all drafts were accepted")
    assert drafts.step_lines(1, ["<|user|>"], 1, "'b'", True)[-1].endswith("reply has ended")


def test_cost_and_ratio_are_medians_over_rounds():
    """Where the engine chooses K, a round has as many steps as it needs."""
    facts = {k: {"rates": [0.5] * abs(k), "tokens": 1.75, "same": 9} for k in (0, 2, -2)}
    times = {0: [(10.0, 100), (12.0, 100), (11.0, 100)], 2: [(8.0, 50), (9.0, 50), (20.0, 50)],
             -2: [(10.0, 100), (6.0, 40), (11.0, 100)]}
    row = drafts.table_row(2, times, facts)
    assert row["cost"] == pytest.approx(9 / 50 / 0.11) and row["ratio"] == 10 / 8
    assert row["range"] == [11 / 20, 12 / 9] and row["formula"] == row["tokens"] == 1.75
    auto = drafts.table_row(-2, times, facts)
    assert auto["cost"] == pytest.approx(1) and auto["formula"] is None


def test_a_traced_reply_is_the_plain_one():
    """Drafts that the trace calls accepted, and the trunk's tokens, make up the reply."""
    model = load_model(find_checkpoint(DEMO)).eval()
    tokens, seen = Tokenizer(model.config.n_ranks), 0
    for i in range(drafts.TRACED):
        messages = drafts.held_out_messages(i, model.config)
        first, *steps, last = drafts.trace(model, tokens, messages, 3, 32)[1:]
        said = first.split("trunk")[1].split()[0]
        for drafted, accepted, trunk in zip(*[iter(steps)] * 3, strict=True):
            count = int(re.search(r"(\d) of 3", accepted)[1])
            words = re.findall(r"<\|\w+\|>|'[^']*'", drafted)
            assert words[:count] == re.findall(r"<\|\w+\|>|'[^']*'", accepted)
            said += "".join([*words[:count], re.findall(r"<\|\w+\|>|'[^']*'", trunk)[0]])
            seen += count
        [plain_reply] = serve(model, [Request(document(messages, tokens, model.config, True), 32)],
                              context=512)
        assert said.replace("'", "").startswith(tokens.decode(plain_reply.ids))
        assert f"{len(plain_reply.ids)} tokens" in last
    assert seen > drafts.TRACED


@pytest.mark.parametrize("room", [1, 2, 5])
def test_drafts_at_the_end_of_the_context(room):
    """K = 10 with room for fewer tokens: the reply is the plain one, cut where the window ends."""
    model, prompt = with_head(), random_document(odd_config(), ((4, 6),), 9, 0)
    def reply(**options):
        engine = Engine(model, 1, len(prompt.ids) + room, say=lambda _: None, **options)
        engine.stops = set()
        engine.submit(Request(prompt, 50))
        results = []
        while engine.busy:
            results += engine.step()
        return results[0].ids, results[0].finish
    ids, finish = reply(drafts=10, adapt=False)
    assert (ids, finish) == reply() and len(ids) == room and finish == "context"


def test_what_the_user_is_told_about_drafts(capsys):
    Engine(GLMV(odd_config()), 1, 32, drafts=2)
    assert "speculation is off" in capsys.readouterr().out
    Engine(with_head(depths=3), 1, 32, drafts=10)
    assert "trained for 3" in capsys.readouterr().out


def test_new_weights_between_two_steps():
    """The tokens after `load` are those of the new weights; each knows its version."""
    model = with_head()
    prompt = random_document(model.config, (), 9, 0)
    new = {n: p.detach().clone() for n, p in model.named_parameters()}
    new["lm_head.weight"] = new["lm_head.weight"].roll(1, 0)
    engine = Engine(model, 1, 64)
    engine.stops = set()
    engine.submit(Request(prompt, 6))
    [engine.step() for _ in range(2)]
    engine.load(new, 7)
    results = []
    while engine.busy:
        results += engine.step()
    assert results[0].versions == [0, 0, 0, 7, 7, 7]
