"""Reinforcement learning on the gym: the model plays tasks, verifiers score it, and replies that
beat the mean of their group become more likely (GRPO).

    python rl.py --steps=20                               from the included checkpoint, any machine
    python rl.py --init=out/sft --mix=gym --levels=3      other weights, all categories
    python rl.py --max_staleness=2 --workers=4            asynchronous, in one process
    torchrun --nproc_per_node=2 rl.py --max_staleness=2   the last rank plays, the others train

One step of `train`, the synchronous loop at the end of this file:

    1. draw tasks     mostly those that the model solves about half of the time (lib/curriculum.py)
    2. rollout        the model plays each task --group times; these are a group (lib/rollout.py)
    3. rewards        of the verifiers, in [0, 1]; a group of equal rewards has no signal: dropped
    4. advantages     reward minus the group's mean, the same for all tokens of a rollout
    5. update         one optimizer step on the tokens that the model sampled
    6. evaluate       greedy replies to held-out tasks, every --eval_every steps
    7. save           a checkpoint, every --save_every steps

`run` hands the same functions to lib/async_rl.py where rollouts should overlap with updates.

Left out, and why:
- A critic. The mean reward of the other replies to the same task is the baseline.
- Division by the group's std, which favours very easy and very hard tasks; --std brings it back.
- A reference model that keeps the policy near its start (--kl brings it back), and an entropy
  bonus, which ends in garbled text [R: GLM-4.5V].
- Several updates from one batch. So in the synchronous loop all ratios are 1: nothing is clipped.
- GLM-5's reset of the optimizer's state after each update [R]; sharded weights (FSDP2).

Shapes: T tokens of a packed row, W width, N tokens that have a weight.
"""
import lib  # first of all, before torch: see lib/__init__.py

import functools
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist

import gym
from data import collate, Document, pack_rows, parse_mix, sight, Stream, task_pixels
from engine import Engine, Request
from kernels import linear_logp
from lib import async_rl
from lib.checkpoint import load_config, load_model, restore, save_model, start_from
from lib.cli import (check_options, cli, Count, Device, Drafts, Dtype, Levels, main, Natural,
                     NonNegative, Positive, Range, Schedule, Seed, Share, UserError)
from lib.common import (check_same_start, Log, Part, print_plan, print_plan_on, ROOT, setup,
                        write_json)
from lib.curriculum import Curriculum
from lib.episodes import (accuracy, distinct, Episode, figures_of, report_evaluation,
                          rewards_of)
from lib.lora import check_train, count_learning, learns, set_learning, unmerged
from lib.memory import parse_memory
from lib.rollout import rollout, RolloutSettings
from lib.prefetch import lent, pin_weights
from lib.roofline import check_machine, find_machine, Machine, Trace
from lib.runs import Checkpointer, checkpoints, find_checkpoint, move_earlier_run, save_state
from mmtp import attach, head_of, losses as mtp_losses
from model import GLMV, sized
from optim import OptimConfig, Optimizer, schedule
from tasks.base import Task
from tokenizer import tokenizer_of


DEMO = ROOT / "ckpt" / "demo"     # the model that runs start from, without --init


@dataclass
class Args:
    steps: Positive = 200         # optimizer updates
    prompts: Annotated[int, Range(1, 100_000)] = 16  # groups a step that have a signal
    group: Annotated[int, Range(2, 10_000)] = 8  # rollouts of a task
    row_tokens: Positive = 2048   # tokens a packed row
    mix: str = "shape_attr,counting,ocr_line,point,gui_click,gui_form"  # categories and weights
    levels: Levels = 1            # levels of difficulty; each opens when the one below is learned
    pixels: Natural = 0           # side of the pictures; 0: the least that suits the patches
    max_new: Positive = 48        # tokens a reply may have
    think: Natural = 0            # tokens of thought before it; then </think> is inserted
    context: Annotated[int, Range(1, 131_072)] = 512  # tokens of a whole conversation
    loss: Literal["grpo", "double", "icepop"] = "double"  # double: two-sided importance sampling
    clip_low: Share = 0.2         # ratios under 1 - this are clipped, or masked
    clip_high: NonNegative = 0.28  # ratios over 1 + this
    std: bool = False             # divide advantages by the group's std
    kl: NonNegative = 0.0         # weight of the divergence from --init; 0: no reference model
    rehearse: Annotated[float, Range(0, 10)] = 0.0  # demonstrations, as a share of the rollouts
    mtp: NonNegative = 0.1        # weight of the MTP head's own loss, if there is a head
    lr: NonNegative = 8e-4        # peak learning rate; Muon and AdamW alike
    train: str = "all"            # what learns: all, decoder (and adapter), adapter, or lora:16
    vision_scale: NonNegative = 1.0  # factor on lr for the vision tower and the adapter
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10          # steps
    schedule: Schedule = "linear"  # constant, linear (over the last part) or cosine
    decay: Share = 0.4            # that last part, as a share of the steps
    max_staleness: Annotated[int, Range(0, 100)] = 0  # steps a sample may lag; 0: synchronous
    slots: Annotated[int, Range(1, 100_000)] = 128  # conversations generated side by side
    flight: Natural = 0           # asynchronous: rollouts at once; 0: as staleness allows
    drafts: Drafts = 0            # tokens that the MTP head drafts ahead in generation
    workers: Annotated[int, Range(0, 1000)] = 1  # verifying processes; from 2 on: asynchronous
    patience: NonNegative = 60.0  # asynchronous: seconds until a group, or its rest, is given up
    rollout_ranks: Positive = 1   # of torchrun's processes, how many play
    memory: str = "none"          # or recompute, offload; by part: vit:offload,decoder:recompute
    chunk_patches: Natural = 0    # patches encoded at a time, so that memory stays flat; 0: all
    init: str = ""                # folder whose weights to start from; default: the demo's
    resume: bool = False          # continue from the newest checkpoint in --out
    max_hours: NonNegative = 0.0  # hours until the run saves and ends, for --resume; 0: no limit
    out: str = "out/rl"           # run folder: log.jsonl, config.json, checkpoints, pictures
    save_every: Positive = 50     # steps between checkpoints
    eval_every: Natural = 50      # steps between evaluations on held-out tasks; 0: never
    eval_count: Count = 50        # held-out tasks a category
    log_every: Positive = 5       # steps between printed lines
    seed: Seed = 0                # of tasks and sampling
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16; masters are fp32 in any case
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop
    on: str = ""                  # with --plan: on this machine, e.g. H100 or 8xH100; default: here
    size: Literal["auto", "tiny", "mini", "small", "base"] = "auto"     # with --plan, of no --init


# ---- advantages ---------------------------------------------------------------------------------

def advantages(rewards: list[float], std: bool = False) -> list[float]:
    """Reward minus the group's mean; std: divided by its std plus 1e-6. An error, which is not
    finite, is left out and gets 0, and so does the only valid reward. [1, NaN, 3] -> [-1, 0, 1]"""
    r = np.array(rewards, float)
    valid = np.isfinite(r)
    if valid.sum() < 2:
        return [0.0] * len(r)
    centred = np.where(valid, r - r[valid].mean(), 0.0)
    return (centred / (r[valid].std() + 1e-6) if std else centred).tolist()


def has_signal(group: list[Episode]) -> bool:
    """Whether some rollouts of the group did better than others."""
    return max(map(abs, advantages(rewards_of(group)))) > 1e-6


def to_samples(groups: list[list[Episode]], std: bool = False) -> list[list[Document]]:
    """Each episode of `groups` as Documents whose tokens carry its advantage and whose weights add
    up to 1: long or short, each counts the same [R: GLM-4.5V]. n equal episodes become one sample
    of weight n. Groups end in an order that differs from run to run. They are sorted by number,
    since packed in another order all sums would differ a little."""
    return [to_sample(episode.documents, advantage, copies=copies)
            for group in sorted(groups, key=lambda group: group[0].group)
            for episode, advantage, copies in distinct(group, advantages(rewards_of(group), std))]


def to_sample(documents: list[Document], advantage: float, demonstration=False, copies: int = 1):
    """The documents of an episode with what `row_loss` needs per token. copies: how many equal
    episodes they stand for; their weights add up to it."""
    total, sample = sum(float(d.weights.sum()) for d in documents) / copies, []
    for d in documents:
        ones = np.ones(len(d.ids), np.float32)
        extras = {"logp": 0 * ones, **d.extras, "advantage": advantage * ones,  # logp 0: not used
                  "demonstration": demonstration * ones, "copies": copies * ones}
        sample.append(replace(d, weights=d.weights / total, extras=extras))
    return sample


def demonstrations(stream: Stream, first: int, count: int) -> list[list[Document]]:
    """`count` samples of the gym's own replies from number `first` on, to rehearse during RL."""
    return [to_sample(stream(first + i), 1.0, demonstration=True) for i in range(count)]


# ---- the loss and the update --------------------------------------------------------------------

# Every entry of LOSSES takes these arguments. lengths: how many of the N tokens each document has,
# for a loss that looks at whole replies (exercise 2).

def clipped(logp, old, advantage, low: float, high: float, lengths: list[int]):
    """GRPO: -min(r A, clip(r) A) with the ratio r = exp(logp - old); all (N,). A token whose ratio
    has moved as far as low or high allow gets no further gradient."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def masked(logp, old, advantage, low: float, high: float, lengths: list[int]):
    """Two-sided importance sampling: -f(r) A logp, with f(r) = r inside (low, high), else 0, and
    no gradient through f [R: GLM-5; IcePop with 1/2 and 2]. All (N,)."""
    ratio = (logp.detach() - old).exp()
    inside = (ratio > low) & (ratio < high)
    return -torch.where(inside, ratio, 0.0) * advantage * logp


LOSSES = {"grpo": clipped, "double": masked, "icepop": masked}


def band(args: Args) -> tuple[float, float]:
    """The ratios that are neither clipped nor masked."""
    return (0.5, 2.0) if args.loss == "icepop" else (1 - args.clip_low, 1 + args.clip_high)


def logps_of(model: GLMV, batch):
    """Hidden states of a row (T, W); positions (N,) that predict a token which has a weight; of
    these tokens, log-probability and entropy (N,)."""
    hidden = model(batch, model.encode_images(batch))
    at = batch.learnt           # token t is predicted from position t-1
    logp, entropy = linear_logp(hidden[at], model.lm_head.weight, batch.tokens[at + 1])
    return hidden, at, logp, entropy


def row_loss(model: GLMV, batch, args: Args, reference=None):
    """The loss of one row, summed over its episodes, and its statistics (6,): sums of loss, tokens,
    entropy, |log ratio| and tokens outside the band; last, the largest |log ratio|.

    reference (N,): log-probabilities of the reference model, with --kl."""
    hidden, at, logp, entropy = logps_of(model, batch)
    old, advantage = batch.extras["logp"][at + 1], batch.extras["advantage"][at + 1]
    own = batch.extras["demonstration"][at + 1] == 0    # sampled by the model itself
    weight, (low, high) = batch.weights[at + 1], band(args)
    document = torch.bucketize(batch.host.learnt, batch.host.cu_seqlens, right=True)
    lengths = document.unique_consecutive(return_counts=True)[1].tolist()   # known on the CPU
    losses = LOSSES[args.loss](logp, old, advantage, low, high, lengths)
    # A demonstration is learned by plain cross-entropy: there is nothing to compare it with.
    losses = torch.where(own, losses, -logp)
    if reference is not None:   # an estimate of KL(policy || reference) that is never negative
        gap = torch.where(own, reference - logp, 0.0)
        losses = losses + args.kl * (gap.exp() - gap - 1)
    loss = (losses * weight).sum()
    with torch.no_grad():
        log_ratio = torch.where(own, logp - old, 0.0)
        ratio, drift = log_ratio.exp(), log_ratio.abs()
        outside, count = (ratio <= low) | (ratio >= high), own * batch.extras["copies"][at + 1]
        sums = [(x * count).sum() for x in (torch.ones_like(drift), entropy, drift, outside)]
        largest = drift.max() if len(drift) else drift.sum()    # 0 for a row without a token
        statistics = torch.stack([loss.detach(), *sums, largest])
    if args.mtp and learns(head_of(model)):     # it follows the policy and does not change it
        depths = model.config.mtp_depths or 1
        further = mtp_losses(model, hidden, batch, depths=depths, detach=True)
        loss = loss + args.mtp * sum(further) / depths
    return loss, statistics


def update(model: GLMV, optimizer: Optimizer, samples: list[list[Document]], args: Args,
           rate: float, reference: GLMV | None = None, rank: int = 0, world: int = 1,
           process_group=None, after_row=None) -> dict:
    """One optimizer step on `samples`, averaged over them; returns figures for the log.

    rate: the schedule's factor on the learning rate. The asynchronous trainer shares the rows over
    `world` ranks of `process_group`, and calls `after_row()` after each row.
    """
    if not samples:
        return {"pg_loss": 0.0, "tokens": 0}
    device = model.lm_head.weight.device
    rows = pack_rows([d for sample in samples for d in sample], args.row_tokens, world)
    count = sum(float(sample[0].extras["copies"][0]) for sample in samples)     # episodes
    batches = [collate(row, model.config).to(device) for row in rows[rank::world]]
    reference_logps = [None] * len(batches)
    if reference is not None:   # it lives in CPU memory, and on the device only for its forward [C]
        with torch.no_grad(), lent(reference, device):
            reference_logps = [logps_of(reference, batch)[2] for batch in batches]
    sums, largest = torch.zeros(5, device=device), torch.zeros((), device=device)
    for batch, logps in zip(batches, reference_logps):
        loss, statistics = row_loss(model, batch, args, logps)
        # Divided by all episodes, not by this row's: the update does not depend on the packing.
        if loss.requires_grad:      # not where only the adapter learns and there is no picture
            (loss / count).backward()
        sums, largest = sums + statistics[:5], torch.maximum(largest, statistics[5])
        if after_row:
            after_row()
    sums = torch.cat([sums, optimizer.reduce()[None]])
    if world > 1:
        dist.all_reduce(sums, group=process_group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    *sums, largest = torch.cat([sums, largest[None]]).tolist()      # the only wait for the device
    loss, tokens, entropy, log_ratio, outside, squares = sums
    norm = math.sqrt(squares)
    optimizer.step(rate, norm, apply=math.isfinite(loss))
    tokens = max(1, tokens)
    return {"pg_loss": loss / count, "norm": norm, "tokens": int(tokens),
            "entropy": entropy / tokens, "clipped": outside / tokens,
            "mismatch": log_ratio / tokens, "mismatch_max": largest}


def freeze_unused_head(model: GLMV, args: Args):
    """Without --mtp the MTP head has no gradient; the optimizer skips what is frozen."""
    if head_of(model) and not args.mtp:
        head_of(model).requires_grad_(False)


# ---- the parts of a run -------------------------------------------------------------------------

@dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides the weights and the optimizer's state."""
    step: int = 0                                           # optimizer steps done
    collector: dict = field(default_factory=dict)           # Curriculum.checkpoint
    evaluations: list[dict] = field(default_factory=list)   # step, reward, accuracy
    rewards: list[float] = field(default_factory=list)      # of each step since the last evaluation


def prepare(args: Args, hw, trains: bool = True, process_group=None):
    """Start or resume a run. trains: whether this rank is one of those that learn, which are
    `process_group`. Returns model, optimizer (None without `trains`), reference model (None without
    --kl), settings, stream of demonstrations, Curriculum and Progress."""
    resumed = args.resume and bool(checkpoints(args.out))
    folder = find_checkpoint(args.out if resumed else args.init or DEMO)
    model = load_model(folder, hw.device, hw.dtype)
    set_learning(model, args.train, args.seed)
    parse_memory(args.memory, args.chunk_patches).use_in(model)
    tokens = tokenizer_of(model.config)
    if args.think:              # a released vocabulary may lack these
        tokens.mark("<think>")
        tokens.mark("</think>")
    mix = parse_mix(args.mix, sight(model.config))
    unknown = [name for name, _ in mix if name not in gym.names()]
    if unknown:
        raise UserError(f"--mix takes categories of the gym, not '{unknown[0]}'")
    optimizer = None
    if trains:
        config = OptimConfig(args.lr, args.weight_decay,
                             scales=(("model.visual", args.vision_scale),))
        optimizer = Optimizer(model.named_parameters(), config, process_group)
    freeze_unused_head(model, args)
    first, progress = args.init, Progress()
    if resumed:
        state = restore(folder, model, optimizer, args.train)
        progress = Progress(state["step"], state["collector"], state["exams"], state["recent"])
        first = state["args"]["init"]
    elif trains:
        start_from(folder, optimizer)
    check_same_start(progress.step, args.out)
    reference = None
    if args.kl and trains:      # the weights that the first step started from
        reference = load_model(find_checkpoint(first or DEMO), "cpu", hw.dtype)
        pin_weights(reference, hw.device)
    say = print if hw.rank == 0 else (lambda *_: None)
    move_earlier_run(Path(args.out), args.resume, hw, say)
    settings = RolloutSettings(tokens, model.config, args.context, args.max_new, args.think,
                               args.seed)
    say(f"{model.counts()['total'] / 1e6:.2f}M parameters, of which "
        f"{count_learning(model) / 1e6:.2f}M learn, {args.prompts}x{args.group} rollouts a step, "
        f"steps {progress.step}..{args.steps}, staleness {args.max_staleness}, run folder "
        f"{args.out}")
    say("pg_loss stays near 0, since the advantages of a group add up to 0: it does not measure "
        "progress; watch reward and held-out accuracy")
    stream = Stream(model.config, mix, args.seed, "train", args.levels, pixels=args.pixels)
    sides = {name: task_pixels(name, model.config, args.pixels) for name, _ in mix}
    # 15 steps without any signal, 4 * prompts groups each, end the run [O], unless it rehearses.
    curriculum = Curriculum(mix, args.seed, args.levels, say, sides,
                            0 if args.rehearse else 60 * args.prompts)
    return model, optimizer, reference, settings, stream, curriculum, progress


def make_engine(model: GLMV, args: Args) -> Engine:
    """An engine that generates with `model` itself. Drafts adapt to measured times only in the
    asynchronous trainer: which tokens are sampled would differ from run to run."""
    engine = Engine(model, args.slots, args.context, args.drafts, args.max_staleness > 0)
    engine.stops.add(model.config.image_token_id)   # a sampled <|image|> has no pixels
    return engine


def evaluate(model: GLMV, settings: RolloutSettings, rewards, args: Args,
             progress: Progress) -> float:
    """Play held-out tasks greedily, the same ones every time. Adds the accuracies to `progress`,
    prints them, writes report.json and returns their mean."""
    names = [name for name, _ in parse_mix(args.mix, sight(model.config))]
    episodes = []
    for name in names:
        side = task_pixels(name, model.config, args.pixels)
        episodes += [Episode(Task(name, 1_000_000 + i, i % args.levels, "test", side), i, 0)
                     for i in range(args.eval_count)]
    rollout(make_engine(model, args), episodes, replace(settings, temperature=0.0), rewards)
    shares, reward = accuracy(episodes), float(np.mean(progress.rewards or [0.0]))
    progress.rewards = []
    progress.evaluations.append({"step": progress.step, "reward": reward, "accuracy": shares})
    report_evaluation(progress.evaluations, episodes, settings.tokens, Path(args.out))
    return shares["mean"]


def save_run(model: GLMV, args: Args, progress: Progress, folder: Path, masters: dict, state: dict):
    """Fill the folder of a checkpoint. The fp32 masters are saved, not the model's bf16 copy.
    masters, state: from Optimizer.gather."""
    save_model(model, folder, weights=masters)
    save_state(folder / "train.pt", {
        "step": progress.step, "optimizer": state, "args": asdict(args),
        "collector": progress.collector, "exams": progress.evaluations,
        "recent": progress.rewards, "unmerged": unmerged({**model.state_dict(), **masters})})


# ---- training -----------------------------------------------------------------------------------

def train(args: Args, hw):
    """The synchronous trainer, one process: play, then learn, then play with the new weights."""
    model, optimizer, reference, settings, stream, curriculum, progress = prepare(args, hw)
    out, engine = Path(args.out), make_engine(model, args)
    rewards = gym.Rewards(workers=args.workers)     # in processes, since a verifier may hang
    if progress.collector:
        curriculum.resume(progress.collector)
    rehearsed = round(args.rehearse * args.prompts * args.group)
    checkpointer = Checkpointer(out, hw, args.steps, args.save_every, progress.step,
                                functools.partial(save_run, model, args, progress),
                                optimizer.gather)
    write_json(out / "config.json", asdict(args) | {"hardware": hw.description})
    if args.eval_every and not progress.evaluations:    # the figures "before" of report.json
        evaluate(model, settings, rewards, args, progress)
    log = Log(out, "rl", args.steps, progress.step)
    for step in range(progress.step, args.steps):
        began = time.perf_counter()
        engine.load({}, step)   # the engine has this very model: only the version number is new
        progress.collector = curriculum.checkpoint()    # if the step fails, resume repeats it
        # Play until enough groups have a signal, or four times as many have ended: a model that
        # solves everything, or nothing, would never get them.
        groups, seen = [], []
        while len(groups) < args.prompts and len(seen) < 4 * args.prompts:
            # 1. Draw tasks. `expansion`: more than needed, by the share of groups that had no
            # signal lately [R: GLM-4.5V]. One large rollout is faster than several small ones.
            wanted = round(args.prompts * curriculum.expansion) - len(groups)
            wanted = min(wanted, 4 * args.prompts - len(seen))
            try:
                # 8 rollouts a group: at 25% to 75% of success, 90% of groups have a signal.
                played = [curriculum.next_group(args.group) for _ in range(wanted)]
                # 2. Rollout: all groups side by side. Temperature 1 and top-p 1, since the ratio
                # compares with the model's own distribution, not with a sharpened one.
                rollout(engine, [e for group in played for e in group], settings, rewards)
                # 3. Rewards: every rollout is scored. The curriculum counts all groups, the model
                # learns from those with a signal: in the others all advantages are 0, and they
                # would only make the mean over episodes smaller.
                for group in played:
                    signal = has_signal(group)
                    curriculum.record(group, signal)
                    seen.append(group)
                    if signal:
                        groups.append(group)
            except UserError:   # too many errors, or no signal at all: what was learned is saved
                checkpointer.close()
                raise
        waited = time.perf_counter() - began
        # 4. Advantages, and demonstrations of the same gym: abilities that get no reward decline
        # [C], which rehearsal can prevent. Each step takes the next demonstrations of the stream.
        samples = to_samples(groups, args.std)
        samples += demonstrations(stream, step * rehearsed, rehearsed)
        # 5. Update: once, so each ratio is 1 up to rounding (see `mismatch`), and the loss is near
        # 0, as advantages add up to 0. --lr: in a prototype Muon at 8e-4, a fifth of pretraining's
        # rate, did as well as AdamW at 7e-4 [O]. clip_high exceeds clip_low, so that rare tokens
        # can rise: clip-higher, 0.28 from DAPO [R]. No KL, no entropy bonus [R: GLM-4.5V].
        rate = schedule(step, args.steps, args.warmup, args.schedule, args.decay)
        values = update(model, optimizer, samples, args, rate, reference)
        took = time.perf_counter() - began
        # A loss that is not finite has changed nothing; the fifth in a row ends the run. A step
        # without samples has no norm, and says nothing about the weights.
        if "norm" in values:
            checkpointer.check_loss(values["pg_loss"], values["norm"])
        progress.step = checkpointer.done = done = step + 1
        values = figures_of(seen, has_signal) | values | {
            "lr": args.lr * rate, "groups": len(groups), "waited": waited,
            "learning": took - waited, "dt": took, "tok/s": values["tokens"] / took}
        # 6. Evaluate. Sampled rewards are of tasks that the curriculum prefers, which change: only
        # the same held-out tasks tell whether the model has become better.
        if "reward" in values:      # at least one rollout ended without an error
            progress.rewards.append(values["reward"])
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            values["accuracy"] = evaluate(model, settings, rewards, args, progress)
        log.step(done, done % args.log_every == 0 or done == args.steps, **values)
        # 7. Save, when it is due or a signal asks to stop.
        progress.collector = curriculum.checkpoint()
        if checkpointer.after_step(done, log.reader_gone):
            break
    log.close()
    rewards.close()
    checkpointer.close()


# ---- the plan -----------------------------------------------------------------------------------

def plan(args: Args, hw):
    """Print what the run would need (`--plan`), as if each group had a signal and the model's
    replies were half as long as they may be. Prompts are those of some demonstrations."""
    config = (sized(args.size) if args.size != "auto"
              else load_config(find_checkpoint(args.init or DEMO)))
    with torch.device("meta"):          # shapes without memory
        model = GLMV(config)
        if args.size != "auto" or config.mtp_depths:
            attach(model, config.mtp_depths or 3)
    stream = Stream(config, parse_mix(args.mix, sight(config)), args.seed, "train", args.levels,
                    pixels=args.pixels)
    began, samples = time.perf_counter(), demonstrations(stream, 10 ** 9, 64)
    seconds = (time.perf_counter() - began) / 64            # to draw one
    documents = [with_reply(sample[0], args.max_new // 2) for sample in samples]
    rollouts = args.prompts * args.group
    length = sum(len(d.ids) for d in documents) / len(documents)
    patches = sum(i.size // 3 // config.vision.patch_size ** 2
                  for d in documents for i in d.images) / len(documents)
    learnt, depths = args.max_new // 2, (config.mtp_depths or 1) * (args.mtp > 0)
    # A rollout is a forward: a third of a forward and backward in which all learns. A prompt is
    # read once a group.
    playing = rollouts / 3 * (model.flops(learnt, 0, learnt) + model.flops(
        length - learnt, patches, 0) / args.group)
    set_learning(model, args.train)
    learning = rollouts * model.flops(length, patches, learnt, depths)
    tokens = args.steps * rollouts * length
    counts = model.counts() | {"learning": count_learning(model)}
    if not args.on:
        memory = 2 * counts["total"] * hw.dtype.itemsize + counts["learning"] * (4 + 12 / hw.world)
        return print_plan(hw, counts, tokens, args.steps * (learning + playing), memory)

    # On several GPUs the last ones play while the others train.
    machine = find_machine(args.on)
    players = min(args.rollout_ranks, machine.count - 1)
    trainers = replace(machine, count=machine.count - players)
    parse_memory(args.memory, args.chunk_patches).use_in(model)
    update_trace = trace_update(trainers, model.bfloat16(), documents, args, rollouts)
    play = trace_rollouts(replace(machine, count=1), model, documents, args,
                          rollouts / max(1, players))
    print_plan_on(machine, counts, tokens, [
        Part("updates", args.steps, update_trace, learning),
        Part("times of playing", args.steps, play, playing / max(1, players), players > 0)],
        args.steps * args.prompts * seconds / 3600,
        f"{1000 * seconds:.2f} ms a task, measured here, by one process", beside=players > 0)


def with_reply(d: Document, length: int) -> Document:
    """A demonstration whose last reply is replaced by one of `length` tokens with a weight each."""
    learnt = np.flatnonzero(d.weights > 0)
    # The last reply is the last run of learnt tokens; all pictures are before it.
    start = int(learnt[np.diff(learnt, prepend=-2) > 1][-1])
    extras = {name: np.resize(values, start + length) for name, values in d.extras.items()}
    weights = np.append(np.zeros(start), np.full(length, 1 / max(1, length))).astype(np.float32)
    return replace(d, ids=np.append(d.ids[:start], np.resize(d.ids[start:], length)),
                   weights=weights, extras=extras)


def trace_update(machine: Machine, model: GLMV, documents, args: Args, rollouts: int) -> Trace:
    """One update of rank 0 on meta tensors: see lib/roofline.py. One row stands for all."""
    trace = Trace(machine)
    row = pack_rows(documents, args.row_tokens)[0]
    rows = -(-rollouts // (len(row) * machine.count))
    with trace:
        optimizer = Optimizer(model.named_parameters(), OptimConfig())
        freeze_unused_head(model, args)
        trace.hold_training(model, optimizer)
        batch = collate(row, model.config).to("meta")
        if args.kl:
            trace.begin("reference", rows)
            with torch.no_grad():
                logps_of(model, batch)
        trace.learn(lambda: row_loss(model, batch, args)[0], rows)
        trace.update(optimizer)
    return trace


def trace_rollouts(machine: Machine, model: GLMV, documents, args: Args, rollouts: float) -> Trace:
    """All rollouts of a step on one GPU: its slots are filled once, and decode one token each; both
    are repeated as often as the rollouts need."""
    trace, length = Trace(machine), args.max_new // 2
    with trace:
        engine = make_engine(model, replace(args, drafts=0))
        trace.hold("weights", [*model.parameters(), *model.buffers()])
        trace.hold("cache", [engine.cache.keys, engine.cache.values])
        for i in range(args.slots):
            d = documents[i // args.group % len(documents)]
            prompt = Document(d.ids[:-length or None], d.weights[:-length or None], d.images)
            engine.submit(Request(prompt, args.max_new, temperature=1.0))
        trace.begin("prompts", rollouts / args.slots)
        engine._admit()
        trace.begin("decode", rollouts / args.slots * length)
        engine.step()
        trace.begin("")
    return trace


# ---- the run ------------------------------------------------------------------------------------

def run(args: Args):
    """Train in this process, or, where rollouts should overlap with updates or processes share the
    work, by lib/async_rl.py."""
    check_options(args)
    check_machine(args)
    if args.size != "auto" and not args.plan:
        raise UserError("--size is for --plan; a run has the size of --init")
    parse_memory(args.memory)
    check_train(args)
    hw = setup(args.device, args.dtype, args.max_hours)
    if args.plan:
        return plan(args, hw) if hw.rank == 0 else None
    if hw.rank == 0:
        print(hw.description)
    if hw.world > 1 or args.max_staleness or args.flight or args.workers > 1:
        async_rl.run(args, hw, async_rl.Functions(
            prepare, make_engine, has_signal, to_samples, demonstrations, update, evaluate,
            save_run))
    else:
        train(args, hw)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade advantages`.
# 1. advantages: of the rollouts of one group. pytest tests/test_rl.py -k advantages; 15 minutes.
# 2. cispo, another entry of LOSSES: the clipped ratio, without gradient, times A logp. Then tis:
#    A logp times the ratio, cut off at `high`. And gspo, one ratio for a whole reply. Their tests
#    wait: pytest tests/test_rl.py -k exercise; 45 minutes. To train with one, name it in Args.loss.
# 3. Write a verifier that likes long replies, and train. After how many steps comes the alarm?


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)),
         less="a smaller --row_tokens, --slots or --context, or --memory=recompute")
