"""Joint RL over the gym: the model plays, verifiers judge, and what did better than its like
becomes more likely.

    python rl.py --mix=counting,gui_click --steps=100     from the demo's checkpoint, any machine
    python rl.py --init=out/sft --mix=gym --levels=3 --rehearse=0.1
    python rl.py --max_staleness=2 --workers=4            asynchronous, in one process
    torchrun --nproc_per_node=2 rl.py --max_staleness=2   the last rank plays, the others train

From `advantages` to `train` this is a whole synchronous trainer. Episodes, tasks that the model has
played and verifiers judged, come in groups that share a task (play.py); `rewards_of`, `advantages`
and `lessons` turn a group into Documents with a coefficient for each token, `row_loss` and `update`
learn from them, and `train` goes round. The asynchronous trainer is the same: only its groups come
in another way (collect.py, ranks.py). What is left out, and why:
- A critic. The mean of the other replies to the same task is the baseline.
- Dividing advantages by the group's deviation: it favours tasks that nearly all replies solve, or
  nearly none; --std brings it back.
- A reference model that holds the policy back; --kl brings it back. An entropy bonus: it ends in
  garble [R: GLM-4.5V].
- Several updates from one batch. So without staleness all ratios are 1 and nothing is clipped.
- Forgetting the optimizer's state whenever new weights are sent out, as GLM-5 does [R].
- Sharded weights (FSDP2): several trainers hold a copy each.

Letters: T tokens of a packed row, W width, V vocabulary.
"""
import lib  # first of all, before torch: see lib/__init__.py

import contextlib
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import gym
from data import collate, Document, pack_rows, parse_mix, sight, Stream
from engine import Engine
from kernels import linear_logp
from lib.async_rl import Actor, Collector, Here, Remote, serve, shared, Transfer
from lib.checkpoint import load_model, save_model
from lib.cli import cli, main, UserError
from lib.common import (check_same_start, Checkpointer, checkpoints, find_checkpoint,
                        first_sentence, GROUP_TIMEOUT, Log, move_earlier_run, print_plan, ROOT,
                        save_state, setup, write_json)
from lib.curriculum import Curriculum
from lib.episodes import accuracy, ages_of, samples
from lib.rollout import Episode, Play, Policy, rollout
from lib.tensors import load_tensors
from mmtp import head_of, losses as mtp_losses, prefix
from model import GLMV
from optim import OptimConfig, Optimizer, schedule
from tasks.base import Task
from tasks.webdev import relative_rewards
from tokenizer import Tokenizer


BEGIN = ROOT / "ckpt" / "demo"    # the model that runs begin from, without --init


@dataclass
class Args:
    steps: int = 200              # optimizer updates
    prompts: int = 16             # tasks a step that have something to teach
    group: int = 8                # rollouts of each
    row_tokens: int = 2048        # tokens a packed row
    mix: str = "shape_attr,counting,ocr_line,point,gui_click,gui_form"  # categories and weights
    levels: int = 1               # levels of difficulty; each opens when the one below is learnt
    max_new: int = 48             # tokens a reply may have
    think: int = 0                # tokens of thought before it; then </think> is put in by force
    context: int = 512            # tokens of a whole conversation
    loss: str = "double"          # double (two-sided importance sampling), icepop or grpo
    clip_low: float = 0.2         # ratios under 1 - this are clipped, or masked
    clip_high: float = 0.28       # ratios over 1 + this: higher, so that rare tokens can rise
    std: bool = False             # divide advantages by the group's deviation
    kl: float = 0.0               # weight of the divergence from --init; 0: no reference model
    rehearse: float = 0.0         # demonstrations beside the episodes, as a share of them
    mtp: float = 0.1              # weight of the MTP head's own loss, if there is a head
    lr: float = 8e-4              # peak learning rate; Muon and AdamW alike
    weight_decay: float = 0.0     # on matrices
    warmup: int = 10              # steps
    schedule: str = "linear"      # constant, linear (over the last part) or cosine
    decay: float = 0.4            # that last part, as a share of the steps
    max_staleness: int = 0        # updates that a sample may lag behind; 0: synchronous
    slots: int = 128              # conversations generated side by side
    flight: int = 0               # rollouts under way at most; 0: as many as staleness allows
    drafts: int = 0               # tokens that the MTP head drafts ahead in generation
    workers: int = 1              # verifying processes, killed if they hang; 0, synchronous: none
    patience: float = 60.0        # asynchronous: seconds until a group, or its rest, is given up
    rollout_ranks: int = 1        # of torchrun's processes, how many play
    init: str = ""                # folder whose weights to start from; default: the demo's
    resume: bool = False          # go on with the newest checkpoint in --out
    out: str = "out/rl"           # run folder: log.jsonl, config.json, checkpoints, pictures
    save_every: int = 50          # steps between checkpoints
    eval_every: int = 50          # steps between examinations on held-out tasks; 0 = never
    eval_count: int = 50          # held-out tasks a category
    log_every: int = 5            # steps between printed lines
    seed: int = 0                 # of tasks and sampling
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16; masters are fp32 in any case
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop


# ---- learning -----------------------------------------------------------------------------------

def advantages(rewards: list[float], std: bool = False) -> list[float]:
    """Reward minus the mean of the group. NaN, an error, is no part of the mean and gets 0, and so
    does one who is alone. [1, NaN, 3] -> [-1, 0, 1]"""
    r = np.array(rewards, float)
    valid = np.isfinite(r)
    if valid.sum() < 2:
        return [0.0] * len(r)
    centred = np.where(valid, r - r[valid].mean(), 0.0)
    return (centred / (r[valid].std() + 1e-6) if std else centred).tolist()


# In these categories a group's pages are compared with each other: RVPO [R: UI2Code^N]. A reward
# of 0 is a page that shows nothing, or, where a draft is mended, one no better than the draft.
PAGES = {"ui_to_code": None, "ui_polish": 1e-9}


def rewards_of(group: list[Episode]) -> list[float]:
    """The rewards that a group learns from; NaN for errors."""
    valid = [e for e in group if not e.score.error]
    values, name = [e.score.reward for e in valid], group[0].task.category
    if name in PAGES:
        shown = [value if value or PAGES[name] else None for value in values]
        values = relative_rewards(shown, PAGES[name])
    found = {e.index: value for e, value in zip(valid, values)}
    return [found.get(e.index, math.nan) for e in group]


def has_signal(group: list[Episode]) -> bool:
    """Whether some did better than others."""
    return max(map(abs, advantages(rewards_of(group)))) > 1e-6


def lessons(group: list[Episode], std: bool = False) -> list[list[Document]]:
    """One list of Documents an Episode, its advantage on each token; weights add up to 1, so that
    every Episode counts the same, long or short [R: GLM-4.5V]."""
    made = []
    for episode, advantage in zip(group, advantages(rewards_of(group), std)):
        learnt = sum(float(d.weights.sum()) for d in episode.documents)
        if episode.score.error or not learnt:
            continue
        made.append([replace(d, weights=d.weights / learnt, extras={
            **d.extras, "advantage": np.full(len(d.ids), advantage, np.float32),
            "taught": np.zeros(len(d.ids), np.float32)}) for d in episode.documents])
    return made


def clipped(logp, old, advantage, low: float, high: float):
    """GRPO: -min(r A, clip(r) A) with r = exp(logp - old); all (T,). No gradient from a token that
    has gone as far as low or high allow. `high` farther from 1 than `low` is clip-higher [R]."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def masked(logp, old, advantage, low: float, high: float):
    """Two-sided importance sampling: -f(r) A logp, with f(r) = r inside (low, high), else 0, and
    no gradient through f [R: GLM-5; IcePop with 1/2 and 2]."""
    ratio = (logp.detach() - old).exp()
    inside = (ratio > low) & (ratio < high)
    return -torch.where(inside, ratio, 0.0) * advantage * logp


LOSSES = {"grpo": clipped, "double": masked, "icepop": masked}


def band(args: Args) -> tuple[float, float]:
    """The ratios that count in full."""
    return (0.5, 2.0) if args.loss == "icepop" else (1 - args.clip_low, 1 + args.clip_high)


def logps_of(model: GLMV, batch):
    """Hidden states of a row (T, W), the places that predict a token with weight, and of those
    tokens log-probability and entropy."""
    hidden = model(batch, model.encode_images(batch))
    at = batch.weights[1:].nonzero()[:, 0]  # token t is predicted from position t-1
    logp, entropy = linear_logp(hidden[at], model.lm_head.weight, batch.tokens[at + 1])
    return hidden, at, logp, entropy


def row_loss(model: GLMV, batch, args: Args, reference=None):
    """The loss of one row, summed over its Episodes; and what is seen on the way, as sums (6,):
    loss, tokens, entropy, |log ratio|, outside the band; last, the largest |log ratio|."""
    hidden, at, logp, entropy = logps_of(model, batch)
    old, advantage, taught = (batch.extras[k][at + 1] for k in ("logp", "advantage", "taught"))
    weight, own, (low, high) = batch.weights[at + 1], taught == 0, band(args)
    each = torch.where(own, LOSSES[args.loss](logp, old, advantage, low, high), -logp)
    if reference is not None:   # an estimate of KL(policy || reference) that is never negative
        apart = torch.where(own, reference - logp, 0.0)
        each = each + args.kl * (apart.exp() - apart - 1)
    loss = (each * weight).sum()
    with torch.no_grad():
        gap = (logp - old)[own]
        ratio = gap.exp()
        seen = torch.stack([loss.detach(), own.sum(), entropy[own].sum(), gap.abs().sum(),
                            ((ratio <= low) | (ratio >= high)).sum(),
                            gap.abs().max() if len(gap) else gap.sum()])
    if args.mtp and head_of(model):         # it learns to guess this policy, and can't move it
        depths = model.config.mtp_depths or 1
        further = mtp_losses(model, hidden, batch, depths=depths, detach=True)
        loss = loss + args.mtp * sum(further) / depths
    return loss, seen


@dataclass
class Share:
    """This rank's part in an update: of the rows that `world` trainers deal out, those of `rank`.
    between: called after each row."""
    rank: int = 0
    world: int = 1
    group: object = None
    between: object = None


def update(model: GLMV, optimizer: Optimizer, groups: list, taught: list, args: Args, rate: float,
           share: Share = Share(), reference: GLMV | None = None) -> dict:
    """One optimizer step on the groups and on demonstrations `taught`, averaged over Episodes.

    The order in which groups arrived changes nothing. The reference model lives in CPU memory, is
    fetched for its forward and released again [C].
    """
    device = model.lm_head.weight.device
    groups = sorted(groups, key=lambda group: group[0].group)
    episodes = [lesson for group in groups for lesson in lessons(group, args.std)] + taught
    if not episodes:
        return {"pg_loss": 0.0, "tokens": 0}
    rows = pack_rows([d for lesson in episodes for d in lesson], args.row_tokens)
    batches = [collate(row, model.config).to(device) for row in rows[share.rank::share.world]]
    told_by = [None] * len(batches)
    if reference is not None:
        with torch.no_grad():
            told_by = [logps_of(reference.to(device), batch)[2] for batch in batches]
        reference.to("cpu")
    total, most = torch.zeros(5, device=device), torch.zeros((), device=device)
    for batch, logp in zip(batches, told_by):
        loss, seen = row_loss(model, batch, args, logp)
        (loss / len(episodes)).backward()
        optimizer.accumulate()
        total, most = total + seen[:5], torch.maximum(most, seen[5])
        if share.between:
            share.between()
    if share.world > 1:
        dist.all_reduce(total, group=share.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=share.group)
    loss, tokens, entropy, gap, outside = total.tolist()
    skip_prefix = "" if args.mtp else prefix(model)
    norm = optimizer.step(rate, math.isfinite(loss), skip_prefix, share.group)
    tokens = max(1, tokens)
    return {"pg_loss": loss / len(episodes), "norm": norm, "tokens": int(tokens),
            "entropy": entropy / tokens, "clipped": outside / tokens, "mismatch": gap / tokens,
            "mismatch_max": most.item()}


def train(model: GLMV, optimizer: Optimizer, collect, args: Args, start: int = 0,
          share: Share = Share(), reference: GLMV | None = None):
    """The loop. collect(step) -> (groups, demonstrations): in the plain case tasks are drawn,
    played to their end by `rollout`, and those kept that have a signal. Yields (steps done, groups,
    figures)."""
    for step in range(start, args.steps):
        groups, taught = collect(step)
        if groups is None:      # told to leave while it waited
            return
        began = time.perf_counter()
        rate = schedule(step, args.steps, args.warmup, args.schedule, args.decay)
        figures = update(model, optimizer, groups, taught, args, rate, share, reference)
        yield step + 1, groups, figures | {"lr": args.lr * rate,
                                           "learning": time.perf_counter() - began}


# ---- what is seen -------------------------------------------------------------------------------


class Exams:
    """Greedy replies to held-out tasks, the same every time, and an alarm where their accuracy
    falls while reward rises. recent: mean rewards of the steps since the last one."""

    def __init__(self, args: Args, policy: Policy, rewards, say):
        self.args, self.policy = args, replace(policy, temperature=0.0)
        self.rewards, self.say, self.held, self.recent = rewards, say, [], []

    def hold(self, model: GLMV, step: int) -> float:
        """Examine, say, and write report.json; the mean accuracy."""
        args, held, out = self.args, self.held, Path(self.args.out)
        reward, self.recent = float(np.mean(self.recent or [0.0])), []
        names = [name for name, _ in parse_mix(args.mix, sight(model.config))]
        episodes = rollout(player(model, args), [
            Episode(Task(name, 1_000_000 + i, i % args.levels, "test"), i, 0)
            for name in names for i in range(args.eval_count)], self.policy, self.rewards)
        held.append({"step": step, "reward": reward, "accuracy": accuracy(episodes)})
        first, last = held[0]["accuracy"], held[-1]["accuracy"]
        self.say(f"held out, greedy, step {step}: "
                 + ", ".join(f"{name} {value:.1%}" for name, value in last.items()))
        if len(held) > 2 and reward > held[1]["reward"] + 0.02 and (
                last["mean"] < held[1]["accuracy"]["mean"] - 0.02):
            self.say("ALARM: reward rises and held-out accuracy falls: what is it that pays? See "
                     f"{out}/pictures")
        write_json(out / "report.json", {
            "title": f"RL, {out.name}",
            "samples": samples(episodes, self.policy.tokens, out / "pictures"),
            "figures": {name: {"before": first[name], f"after {step} steps": value}
                        for name, value in last.items()}})
        return last["mean"]


# ---- the run ------------------------------------------------------------------------------------

def player(model: GLMV, args: Args, say=print) -> Engine:
    """The engine that plays. A picture's mark in a reply ends it: there are no pixels for it."""
    engine = Engine(model, args.slots, args.context, args.drafts, args.max_staleness > 0, say)
    engine.stops.add(model.config.image_token_id)
    return engine


def demonstrations(stream: Stream, first: int, count: int) -> list[list[Document]]:
    """`count` samples of the gym's own replies, as lessons: rehearsal in the midst of RL."""
    def lesson(sample):
        learnt = sum(float(d.weights.sum()) for d in sample)
        return [replace(d, weights=d.weights / learnt, extras={
            name: np.full(len(d.ids), value, np.float32) for name, value in
            (("logp", 0), ("advantage", 1), ("taught", 1))}) for d in sample]
    return [lesson(stream(first + i)) for i in range(count)]


def check(args: Args):
    """Refuse at once what would fail, or do nothing, hours later."""
    ones = "steps prompts row_tokens max_new context slots save_every eval_count log_every"
    zeros = "flight seed max_staleness workers think drafts kl rehearse mtp eval_every"
    least = {**dict.fromkeys(ones.split(), 1), **dict.fromkeys(zeros.split(), 0), "group": 2}
    for name, value in least.items():   # a group of one has nobody to be better than
        if getattr(args, name) < value:
            raise UserError(f"--{name} takes {value} or more, not {getattr(args, name)}")
    if not 1 <= args.levels <= 5:
        raise UserError(f"--levels takes 1 to 5, not {args.levels}")
    if args.loss not in LOSSES:
        raise UserError(f"--loss takes {', '.join(LOSSES)}, not '{args.loss}'")
    if args.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"--schedule takes constant, linear or cosine, not '{args.schedule}'")


def mix_of(args: Args, model: GLMV) -> tuple:
    """--mix as ((category, weight), ...)"""
    mix = parse_mix(args.mix, sight(model.config))
    strange = [name for name, _ in mix if name not in gym.names()]
    if strange or not sum(weight for _, weight in mix) > 0:
        raise UserError(f"--mix takes categories of the gym, not '{(strange or [args.mix])[0]}'")
    return mix


def build(args: Args, hw):
    """Model, optimizer, and the state to go on from, if any."""
    resumed = args.resume and bool(checkpoints(args.out))
    folder = find_checkpoint(args.out if resumed else args.init or BEGIN)
    model = load_model(folder, hw.device, hw.dtype)
    if not model.config.n_ranks:
        raise UserError(f"{folder} comes with another tokenizer; RL can't speak it")
    optimizer = Optimizer(model.named_parameters(), OptimConfig(args.lr, args.weight_decay))
    stored = {k: v.to(hw.device, torch.float32) for k, v in load_tensors(folder).items()}
    optimizer.load_masters(optimizer.masters | stored)
    if not resumed:
        return model, optimizer, None
    try:
        state = torch.load(folder / "train.pt", map_location=hw.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch.load answers damage with some ten kinds of them
        raise UserError(f"{folder}/train.pt is damaged ({first_sentence(error)}); "
                        f"--init={folder} starts from its weights alone") from None
    return model, optimizer, state


def forecast(args: Args, hw, model: GLMV):
    """What the run would take (`--plan`): a rollout has about 64 tokens to read and half of what it
    may say."""
    counts = model.counts()
    tokens = args.steps * args.prompts * args.group * (64 + args.max_new / 2)
    memory = counts["total"] * (16 + 2 * hw.dtype.itemsize)
    print_plan(hw, counts, tokens, 8 * tokens * counts["total"], memory)


def seat(args: Args, hw, trainers: int, model: GLMV, policy: Policy, rewards, judges: int,
         start: int, leave):
    """(who plays for this rank, its part in the updates). A rank that does nothing but play does so
    in here, until all is over, and has nobody then."""
    share, store, route = Share(hw.rank, trainers), None, None
    if hw.world > 1:
        store = dist.PrefixStore("rl", hw.store)
        share.group = dist.new_group(list(range(trainers)), timeout=GROUP_TIMEOUT)
        route = dist.new_group([0, *range(trainers, hw.world)], timeout=GROUP_TIMEOUT)
        if hw.rank == 0:
            return Remote(store, list(range(trainers, hw.world)), Transfer(model, route), start,
                          args.max_staleness, leave), share
        if hw.rank < trainers:
            return Here(None, None), share      # rank 0 collects for it
    if hw.world > 1 or args.max_staleness or args.workers > 1:
        actor = Actor(player(model, args), rewards, lambda e: Play(e, policy), judges)
    else:
        actor = Here(player(model, args), lambda *now: rollout(*now, policy, rewards))
    actor.load({}, start)
    if hw.world == 1:
        return actor, share
    serve(actor, Transfer(model, route), store, hw.rank, start)
    return None, share


def run(args: Args):
    check(args)
    hw = setup(args.device, args.dtype)
    out, lead = Path(args.out), hw.rank == 0
    say = print if lead else (lambda *_: None)
    trainers = hw.world - args.rollout_ranks if hw.world > 1 else 1
    if not 1 <= trainers <= hw.world or hw.world > 1 and args.rollout_ranks < 1:
        raise UserError(f"--rollout_ranks takes 1 to {hw.world - 1} of {hw.world} processes")
    model, optimizer, state = build(args, hw)
    if args.plan:
        return forecast(args, hw, model)
    say(hw.description)
    start, mix = state["step"] if state else 0, mix_of(args, model)
    check_same_start(start, out)
    origin = (state["args"] if state else asdict(args))["init"] or BEGIN
    reference = (load_model(find_checkpoint(origin), "cpu", hw.dtype)
                 if args.kl and hw.rank < trainers else None)
    move_earlier_run(out, args.resume, hw, say)
    policy = Policy(Tokenizer(model.config.n_ranks), model.config, args.context, args.max_new,
                    args.think, args.seed)
    apart = args.max_staleness or hw.world > 1  # there a verifier that hangs would hold up others
    judges = max(args.workers, 2) if apart else args.workers
    rewards = gym.Rewards(workers=judges)

    def leave():            # who plays for others just goes, on a signal or when they say so
        return watch.stop_signal.received and not isinstance(actor, Here)

    actor, share = seat(args, hw, trainers, model, policy, rewards, judges, start, leave)
    if not actor:
        return
    stream = Stream(model.config, mix, args.seed, "train", args.levels)
    collector = Collector(actor, Curriculum(mix, args.seed, args.levels, say), args.prompts,
                          args.group, args.max_staleness, args.patience, has_signal, args.flight,
                          leave)
    exams = Exams(args, policy, rewards, say)
    if state:
        collector.restore(state["collector"])
        exams.held, exams.recent = state["exams"], state["recent"]
    trouble = []

    def between():
        try:
            if not trouble:
                collector.turn()
        except UserError as error:      # raised in `collect`, where no step is open
            trouble.append(error)

    if lead and args.max_staleness:
        share.between = between
    taught = round(args.rehearse * args.prompts * args.group)

    @contextlib.contextmanager
    def kept():             # too many errors, or no player left: what was learnt is not lost
        try:
            yield
        except UserError:
            watch.save()
            raise

    def collect(step):
        with kept():
            if trouble:
                raise trouble[0]
            groups = collector.collect(step) if lead else []
        groups = shared(groups, share.group) if trainers > 1 else groups
        watch.stopping = groups is None
        return groups, demonstrations(stream, step * taught, taught)

    def write(folder):
        save_model(model, folder, weights=optimizer.masters)
        save_state(folder / "train.pt", {
            "step": watch.done, "optimizer": optimizer.state_dict(), "args": asdict(args),
            "collector": collector.state(), "exams": exams.held, "recent": exams.recent})

    watch = Checkpointer(out, hw, args.steps, args.save_every, start, write, share.group)
    say(f"{model.counts()['total'] / 1e6:.2f}M parameters, {args.prompts}x{args.group} rollouts a "
        f"step, steps {start}..{args.steps}, staleness {args.max_staleness}, run folder {out}")
    say("the loss stands near 0 by construction, since a group's advantages add up to 0, and is no "
        "measure of anything: watch reward and held-out accuracy")
    if lead:
        write_json(out / "config.json", asdict(args))
        if args.eval_every and not exams.held:
            exams.hold(model, start)
    clock = time.perf_counter()
    log = Log(out, "rl", args.steps, start, hw.rank)
    for done, groups, values in train(model, optimizer, collect, args, start, share, reference):
        watch.done = done
        if lead and done < args.steps:
            with kept():
                actor.load(optimizer.masters, done)
        watch.check_loss(values["pg_loss"], values.get("norm", 0.0))
        now = time.perf_counter()
        values |= collector.figures() | ages_of(groups, done - 1)
        values |= {"groups": len(groups), "dt": now - clock,
                   "tok/s": values["tokens"] / (now - clock)}
        if "reward" in values:      # some group has ended
            exams.recent.append(values["reward"])
        if lead and args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            values["accuracy"] = exams.hold(model, done)
        log.step(done, done % args.log_every == 0 or done == args.steps, **values)
        if watch.after_step(done, log.reader_gone):
            break
        clock = time.perf_counter()
    log.close()
    rewards.close()
    try:
        watch.close()
    finally:
        if lead and hw.world > 1:
            actor.close()


# Exercises. Write it, run the test.
# 1. advantages. pytest tests/test_rl.py -k advantages; 15 minutes.
# 2. cispo(logp, old, advantage, low, high), another entry of LOSSES: the clipped ratio, without
#    gradient, times A logp. Then tis: the ratio cut off at `high`, likewise. And gspo, with one
#    ratio for a whole reply. Their tests wait: pytest tests/test_rl.py -k exercise; 45 minutes.
# 3. Give every group the reward 1, or a verifier that likes long replies, and train. After how many
#    steps does the alarm ring?


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
