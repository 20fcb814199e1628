"""The vision tower from scratch: two teachers, masked distillation, contrastive alignment.

    python train_vit.py                                all stages, small, any machine, no network
    python train_vit.py --stage=distill --mask=random  one stage; what it needs from --out
    python train_vit.py --stage=distill --semantic_teacher=SIGLIP2 --texture_teacher=DINOV3
    python train_vit.py --stage=align --pairs=FOLDER --batch=65536 --micro=256
    torchrun --nproc_per_node=8 train_vit.py --size=small    data parallel; same batch, same result
    python pretrain.py --vit=out/vit/align             goes on from the tower

teachers  stand-ins for SigLIP2 and DINOv3, as small as the student and trained here on drawings:
          `semantic` contrastively on captions, `texture` from there on by self-distillation. They
          are no substitute; folders of the real ones replace them.
distill   stage 1 [C]: 35% of the patches hidden, the student says what two frozen teachers see.
align     stage 2 [C]: images of any size against captions in two languages, SigLIP's loss over a
          global batch of any size on any hardware.

Letters: P patches, N images, W width, E width of the common space, K prototypes, B global batch.
"""
import lib  # first of all, before torch: see lib/__init__.py

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn, Tensor

import gym
from data import RankShard, SampleLoader
from kernels import sigmoid_loss
from lib.captions import Captions, collate_pairs, draw_pair, find_pairs, Pairs, TextTower
from lib.checkpoint import export_tower, load_tower
from lib.cli import cli, main, UserError
from lib.common import (check_same_start, Checkpointer, checkpoints, cores, find_checkpoint,
                        first_sentence, Log, move_earlier_run, print_plan, save_state, setup,
                        sum_over_ranks, write_json)
from lib.images import pack
from lib.probes import Exam, examine, probe_towers, read_report, salient
from lib.teachers import load_teacher
from lib.tensors import load_tensors, save_tensors
from model import Config, init, sized
from optim import OptimConfig, Optimizer, schedule
from tasks.base import Task
from vit import AttentionPool, CogViT


@dataclass
class Args:
    size: str = "tiny"            # tiny (2 cores), small (one GPU) or base (CogViT-L)
    stage: str = "all"            # teachers, distill, align or all
    steps: int = 600              # optimizer updates of each stage
    batch: int = 0                # images a step, over all ranks; 0: 64, or a few more
    micro: int = 0                # images at a time on a rank; 0: its whole share
    side: int = 0                 # pixels of scenes and of stage 1's squares; 0: 64 at tiny, or 224
    mask: str = "block"           # which patches are hidden: block or random
    masked: float = 0.35          # the share of them
    supervise: str = "all"        # where the student is held to the teachers: masked or all [O]
    cosine: float = 0.9           # weight of 1 - cosine; the rest is smooth-L1
    qk_norm: bool = True          # RMSNorm on queries and keys
    teachers: str = "both"        # both, semantic or texture: whom to learn from
    semantic_teacher: str = ""    # Hugging Face folder of SigLIP2; default: the stand-in of --out
    texture_teacher: str = ""     # Hugging Face folder of DINOv3 or DINOv2; default: the stand-in
    ema: float = 0.99             # how slowly the texture stand-in's own teacher follows
    texture_part: float = 0.2     # the share of --steps it takes: with more it forgets [O]
    budgets: str = ""             # align: patches an image, drawn for each batch; default: by size
    pairs: str = ""               # folder of x.png (jpg, webp) beside x.txt; default: drawings
    clips: float = 0.0            # share of those drawings in which something moves, in two frames
    lr: float = 4e-3              # peak; the tower's, Muon and AdamW alike; in `texture` a quarter
    text_scale: float = 1.0       # align: factor on it for the text tower
    proj_scale: float = 1.0       # align: factor on it for pools and projections
    weight_decay: float = 0.05    # on the vision tower's matrices
    text_decay: float = 0.05      # on the text tower's
    proj_decay: float = 0.0       # on the pools' and projections'
    warmup: int = 20              # steps
    schedule: str = "cosine"      # constant, linear or cosine
    init: str = ""                # folder whose tower distill starts from, or align alone
    resume: bool = False          # go on with the newest checkpoints in --out
    out: str = "out/vit"          # run folder: one folder a stage, report.json
    keep: str = ""                # also write each stage's tower here, alone and in bf16
    save_every: int = 200         # steps between checkpoints
    eval_every: int = 200         # steps between probes; 0 = at the end only
    log_every: int = 20           # steps between printed lines
    seed: int = 0                 # of weights and samples
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16; masters are fp32 in any case
    workers: int = -1             # processes that load samples; -1: one a core, at most 8; 0: none
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop


KINDS = {  # stage 1's mixture [C], and the categories that stand for each source here [O]
    "natural": (0.8, ("shape_attr", "counting", "point")),
    "instruction": (0.1, ("gui_click", "gui_form", "widget_state")),
    "scientific": (0.1, ("chart_read", "geometry", "table_read")),
}


def quality(image: np.ndarray) -> float:
    """Bits of detail: the entropy of the steps in brightness from pixel to pixel. Little for what
    is flat or blurred, more for what is sharp and busy. [O]"""
    grey = image.mean(-1)
    steps = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (0, 1)])
    shares = np.bincount((steps.astype(int) + 255) // 8, minlength=64) / len(steps)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def draw_mask(rng, h: int, w: int, share: float, kind: str) -> np.ndarray:
    """Which patches of an (h, w) grid to hide: (h*w,) bool in stored order, exactly that share.

    kind: `random`, or `block`: rectangles of a quarter to half a side until there are enough."""
    n, order = round(share * h * w), rng.random((h, w))
    covered = np.zeros((h, w), bool)
    while kind == "block" and covered.sum() < n:
        high, wide = (int(rng.integers(side // 4, side // 2 + 1)) for side in (h, w))
        y, x = int(rng.integers(h - high + 1)), int(rng.integers(w - wide + 1))
        covered[y:y + high, x:x + wide] = True
    order += covered  # inside the blocks first; what is too much of them stays seen
    hidden = order >= np.sort(order, axis=None)[h * w - n]
    return rearrange(hidden, "(y b) (x d) -> (y x b d)", b=2, d=2)


@dataclass
class Picture:
    """One training image of stage 1: its views (h, w, 3) and the hidden patches (P,) of each."""
    views: list
    masks: list
    source: str


def hidden(pictures: list[Picture]) -> Tensor:
    """The masks of all views, one behind the other, (P,) bool."""
    return torch.from_numpy(np.concatenate([mask for p in pictures for mask in p.masks]))


@dataclass
class Pictures:
    """Stage 1's stream: three sources at 80/10/10, of two pictures drawn the one of better quality.

    side: pixels of the square; folder: take `natural` from the pictures of these pairs instead;
    views: this many random crops and reflections, or 0 for the picture as it is.
    """
    config: Config
    side: int
    seed: int = 0
    mask: str = "block"
    share: float = 0.35
    views: int = 0
    folder: str = ""

    def __call__(self, i: int) -> Picture:
        rng = np.random.default_rng([self.seed, i])
        at = np.cumsum([share for share, _ in KINDS.values()])
        source = list(KINDS)[min(int(np.searchsorted(at, rng.random(), "right")), len(KINDS) - 1)]
        drawn = [self._fit(self._draw(rng, source)) for _ in range(2)]
        image = max(drawn, key=lambda image: quality(np.asarray(image)))
        views = [self._view(rng, image) for _ in range(self.views)] or [np.asarray(image)]
        side = self.side // self.config.vision.patch_size
        masks = [draw_mask(rng, side, side, self.share, self.mask) for _ in views]
        return Picture(views, masks, source)

    def _draw(self, rng, source: str) -> Image.Image:
        if self.folder and source == "natural":
            return draw_pair(rng, self.folder, "train")[0]
        names = KINDS[source][1]
        name, level = names[int(rng.integers(len(names)))], int(rng.integers(2))
        pixels = max(self.side, gym.CATEGORIES[name].env.min_pixels)
        task = Task(name, int(rng.integers(2 ** 31)), level, pixels=pixels)
        return gym.make(task).reset().images[0]

    def _fit(self, image: Image.Image) -> Image.Image:
        square = (self.side, self.side)
        return image if image.size == square else image.resize(square, Image.Resampling.BICUBIC)

    def _view(self, rng, image: Image.Image) -> np.ndarray:
        """A crop of 60-100% of each side, perhaps reflected, brighter or darker by up to 20%."""
        part = self.side * rng.uniform(0.6, 1)
        x, y = rng.uniform(0, self.side - part, 2)
        view = image.resize(image.size, Image.Resampling.BICUBIC, (x, y, x + part, y + part))
        view = ImageOps.mirror(view) if rng.integers(2) else view
        return (np.asarray(view) * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)


def tower(args: Args, config: Config) -> CogViT:
    """A CogViT without the adapter, which belongs to the decoder."""
    visual = CogViT(config.vision)
    del visual.downsample, visual.merger
    for block in visual.blocks if not args.qk_norm else ():
        block.attn.q_norm = block.attn.k_norm = nn.Identity()
    return visual


class Job(nn.Module):
    """What a stage trains. `learn` leaves gradients and returns figures; the rest is optional."""
    RATE = 1.0  # factor on --lr

    def begin(self, stream):
        """Before the first step, from random or given weights."""

    def follow(self, masters: dict, args: Args):
        """After each step, from the optimizer's fp32 weights."""

    def figures(self, exam: Exam) -> dict[str, float]:
        """What is to be examined beside the tower."""
        return {}


def cut(samples: range, micro: int) -> list[range]:
    """Micro-batches."""
    return [samples[i:i + micro] for i in range(0, len(samples), micro)]


# ---- align, and the semantic stand-in: contrastive ----------------------------------------------

def swap(to_right: Tensor | None, to_left: Tensor | None) -> list:
    """Send one tensor to each neighbour in the ring of ranks; (from left, from right). None sends
    nothing, and nothing comes from the other side."""
    rank, world = dist.get_rank(), dist.get_world_size()
    work, got = [], []
    for tensor, there, back in ((to_right, rank + 1, rank - 1), (to_left, rank - 1, rank + 1)):
        got.append(None if tensor is None else torch.empty_like(tensor))
        if tensor is not None:
            work.append(dist.P2POp(dist.isend, tensor.contiguous(), there % world))
            work.append(dist.P2POp(dist.irecv, got[-1], back % world))
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return got


class Exchange(torch.autograd.Function):
    """`swap` with gradients: they travel back the way the tensors came."""

    @staticmethod
    def forward(ctx, to_right, to_left):
        return tuple(swap(to_right, to_left))

    @staticmethod
    def backward(ctx, from_left, from_right):
        return tuple(swap(from_right, from_left)[::-1])


def ring(texts: Tensor):
    """The texts of every other rank, two blocks a round: what came from the left goes on to the
    right, and the other way round. Of an even number of ranks the farthest comes by one one-way
    shift at the end. [C: bidirectional; R: open_clip's rounds]"""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rightward = leftward = texts
    for _ in range((world - 1) // 2):
        rightward, leftward = Exchange.apply(rightward, leftward)
        yield rightward
        yield leftward
    if world % 2 == 0:
        yield Exchange.apply(rightward, None)[0]


def ring_sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """This rank's part of the summed SigLIP loss of all ranks: own images x (N, E) against the
    texts y (N, E) of everyone. The parts add up to what one process computes, in gradients too."""
    loss = sigmoid_loss(x, y, scale, bias)
    for block in ring(y):
        loss = loss + sigmoid_loss(x, block, scale, bias, paired=False)
    return loss


class Contrast(Job):
    """Two towers, attention pooling on both [O], a common space; t' = log 10, b = -10 [R]."""

    def __init__(self, args: Args, config: Config):
        super().__init__()
        v, t = config.vision, config.text
        self.visual, self.text = tower(args, config), TextTower(t)
        self.pool, self.args = AttentionPool(v.hidden_size, v.num_heads), args
        self.image_proj = nn.Linear(v.hidden_size, v.hidden_size, bias=False)
        self.text_proj = nn.Linear(t.hidden_size, v.hidden_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def embed(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """Images (N, E) and texts (N, E), fp32 of length one."""
        return (self.embed_images(batch.patches, batch.grids),
                self.embed_texts(batch.ids, batch.cu_seqlens))

    def embed_images(self, patches: Tensor, grids: Tensor) -> Tensor:
        pooled = self.pool(self.visual(patches, grids), grids.prod(1))
        return F.normalize(self.image_proj(pooled).float(), dim=-1)

    def embed_texts(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return F.normalize(self.text_proj(self.text(ids, cu_seqlens)).float(), dim=-1)

    def learn(self, draw, mine: range, args: Args, collect) -> dict:
        """Gradients of this rank's samples `mine`, `micro` at a time, as if all were one batch.

        With several micro-batches the embeddings are made without a graph, the loss is taken over
        all of them, and each forward runs once more, its inputs drawn again from their seeds, to
        carry its part of the gradient home [R: GradCache]. Memory is that of one micro-batch.
        """
        device, chunks, skipped = self.logit_bias.device, cut(mine, args.micro), []

        def embed(chunk):
            pairs = [draw(i) for i in chunk]
            skipped.append(sum(pair.skipped for pair in pairs))
            return self.embed(collate_pairs(pairs, self.visual.config).to(device))

        replay = len(chunks) > 1
        # Whole from the start: thousands of small tensors kept would riddle the heap with holes.
        sides = torch.empty(2, len(mine), len(self.image_proj.weight), device=device)
        for chunk, part in zip(chunks, sides.split(args.micro, dim=1)):
            with torch.set_grad_enabled(not replay):
                made = embed(chunk)
            part.copy_(torch.stack(made).detach())
        x, y = (side.requires_grad_() for side in sides)
        loss = ring_sigmoid_loss(x, y, self.logit_scale.exp(), self.logit_bias) / args.batch
        loss.backward()
        values = {"loss": sum_over_ranks(loss.detach())}
        if args.pairs:  # corrupt pictures, others in their place
            values["skipped"] = sum_over_ranks(torch.tensor(float(sum(skipped)), device=device))
        for chunk, *parts in zip(chunks, x.grad.split(args.micro), y.grad.split(args.micro)):
            made = embed(chunk) if replay else made     # a lone one still has its graph
            torch.autograd.backward(made, parts)
            collect()
        return values

    def figures(self, exam: Exam) -> dict[str, float]:
        return probe_towers(self, exam, self.args.clips > 0, self.args.pairs)


# ---- the texture stand-in: self-distillation ----------------------------------------------------

class SelfDistil(Job):
    """DINO's loss on views and iBOT's on hidden patches: the student says what its own running mean
    says of the same picture, of another crop and behind the mask [R]. What is said of a view is
    said of its `foremost` patches: the mean of all is about the ground [O].

    Nothing but itself says what is right, so the cheapest answer would be always the same. Targets
    are centred, so that a prototype that all choose loses its lead, and sharp, so that not all are
    alike; as a fixed temperature let features grow equal and targets flat, sharpness is counted in
    each prototype's own deviation [O]. In the log, as shares of log K: `used`, the entropy of the
    mean target of hidden patches, near 1 where all prototypes are in use, and `sure`, that of each
    such target, near 0 where it is decided; `spread`: deviation of features between pictures.

    Random weights learn too little here in minutes, so it goes on from `semantic`, as SigLIP2 ends.
    """
    PROTOTYPES, SHARP, SOFT, RATE = 256, 0.25, 0.1, 0.25  # K; temperatures of target, student [O]

    def __init__(self, args: Args, config: Config):
        super().__init__()
        width, k = config.vision.hidden_size, self.PROTOTYPES
        self.visual, self.token = tower(args, config), nn.Parameter(torch.zeros(width))
        self.head = Prototypes(width, k)
        self.ema = nn.ModuleDict({"visual": tower(args, config), "head": Prototypes(width, k)})
        self.ema.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(2, k))  # of images, of patches
        self.register_buffer("deviation", torch.ones(2, k))

    def begin(self, stream):
        for mine, theirs in ((self.visual, self.ema.visual), (self.head, self.ema.head)):
            theirs.load_state_dict(mine.state_dict())
        logits = self.answers([stream(2 ** 40 + i) for i in range(32)])[0]
        self.centre.copy_(torch.stack([x.mean(0) for x in logits]))
        self.deviation.copy_(torch.stack([x.std(0) for x in logits]))

    @torch.no_grad()
    def answers(self, pictures: list):
        """What the running mean says of views and of hidden patches, logits (2N, K) and (M, K); its
        features of the views; what it was shown."""
        patches, grids = pack([v for p in pictures for v in p.views], self.visual.config)
        shown = [x.to(self.token.device) for x in (patches, grids, hidden(pictures))]
        features = self.ema.visual(*shown[:2])
        views = salient(features.unflatten(0, (len(grids), -1)))
        return (self.ema.head(views), self.ema.head(features[shown[2]])), views, shown

    def learn(self, draw, mine: range, args: Args, collect) -> dict:
        """Gradients of this rank's samples `mine`, `micro` at a time."""
        seen, sums = [], dict.fromkeys(("loss", "mean", "sure", "centre", "deviation"), 0.0)
        for chunk in cut(mine, args.micro):
            logits, views, shown = self.answers([draw(i) for i in chunk])
            apart = [x - centre for x, centre in zip(logits, self.centre)]
            image, patch = [(x / (self.SHARP * deviation)).softmax(-1)
                            for x, deviation in zip(apart, self.deviation)]
            other = rearrange(image, "(n v) k -> n v k", v=2).flip(1).flatten(0, 1)
            said = self.visual(*shown, self.token)
            thing = salient(said.unflatten(0, (len(other), -1)))
            losses = [-(target * (self.head(x) / self.SOFT).log_softmax(-1)).sum(-1).mean()
                      for target, x in ((other, thing), (patch, said[shown[2]]))]
            share = len(chunk) / args.batch
            (share * sum(losses)).backward()
            collect()
            seen.append(F.normalize(views, dim=-1))
            for name, value in (("loss", sum(losses).detach()), ("mean", patch.mean(0)),
                                ("sure", entropy(patch).mean()),
                                ("centre", torch.stack([x.mean(0) for x in logits])),
                                ("deviation", torch.stack([x.square().mean(0) for x in apart]))):
                sums[name] += share * value
        sums = {name: sum_over_ranks(value) for name, value in sums.items()}
        self.centre.lerp_(sums["centre"], 0.1)
        self.deviation.lerp_(sums["deviation"].sqrt(), 0.1)
        return {"loss": sums["loss"], "used": entropy(sums["mean"]), "sure": sums["sure"],
                "spread": torch.cat(seen).std(0).mean()}

    @torch.no_grad()
    def follow(self, masters: dict, args: Args):
        """The running mean of the student's fp32 weights becomes the next teacher."""
        for name, p in self.ema.named_parameters():
            p.lerp_(masters[name], 1 - args.ema)


class Prototypes(nn.Sequential):
    """(N, W) -> logits (N, K): an MLP onto the sphere, then its products with K directions."""

    def __init__(self, width: int, k: int):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, k, bias=False))

    def forward(self, x):
        return self[2](F.normalize(self[1](self[0](x)), dim=-1)).float()


def entropy(p: Tensor) -> Tensor:
    """Entropy over the last dim, as a share of the most that it can be."""
    return -(p * p.clamp_min(1e-9).log()).sum(-1) / math.log(p.shape[-1])


# ---- distill: two frozen teachers, hidden patches -----------------------------------------------

class Standin:
    """A tower trained here, behind the call of teachers.py: (images, grids) -> (P, width)."""

    def __init__(self, args: Args, config: Config, name: str, device):
        folder, self.visual = Path(args.out) / name, tower(args, config)
        if not checkpoints(folder):
            raise UserError(f"no {name} teacher in {folder}: --stage=teachers trains one, "
                            f"--{name}_teacher=FOLDER takes one")
        load_tower(self.visual, find_checkpoint(folder))
        self.visual.requires_grad_(False).to(device)
        self.width = config.vision.hidden_size

    @torch.no_grad()
    def __call__(self, images: list, grids: Tensor) -> Tensor:
        patches, _ = pack(images, self.visual.config)
        return self.visual(patches.to(grids.device), grids)


class Distil(Job):
    """The student of stage 1: a tower, a learnable mask token [O], a linear head a teacher."""

    def __init__(self, args: Args, config: Config, teachers: dict):
        super().__init__()
        width = config.vision.hidden_size
        self.visual, self.token = tower(args, config), nn.Parameter(torch.zeros(width))
        self.heads = nn.ModuleDict({n: nn.Linear(width, t.width) for n, t in teachers.items()})
        self.teachers = teachers  # a plain dict: frozen, and no part of the checkpoint
        for name, teacher in teachers.items():
            self.register_buffer(f"mean_{name}", torch.zeros(teacher.width))
            self.register_buffer(f"std_{name}", torch.ones(teacher.width))

    def begin(self, stream):
        """Each channel of each teacher gets mean 0 and deviation 1, so that neither drowns the
        other [O, after PHI-S]: measured once, on pictures that training does not see first."""
        pictures = [stream(2 ** 40 + i) for i in range(64)]
        for name, targets in self.ask([p.views[0] for p in pictures]).items():
            getattr(self, f"mean_{name}").copy_(targets.mean(0))
            getattr(self, f"std_{name}").copy_(targets.std(0) + 1e-6)

    def ask(self, images: list) -> dict[str, Tensor]:
        """{teacher: its features of all patches (P, width), fp32}"""
        _, grids = pack(images, self.visual.config)
        grids = grids.to(self.token.device)
        return {name: teacher(images, grids).float() for name, teacher in self.teachers.items()}

    def learn(self, draw, mine: range, args: Args, collect) -> dict:
        """Gradients of this rank's samples `mine`, `micro` at a time; the loss of each position is
        --cosine x (1 - cosine) + the rest x smooth-L1, the mean over teachers [O]."""
        device = self.token.device
        sums = dict.fromkeys(("loss", *(f"cos_{name}" for name in self.teachers)), 0.0)
        for chunk in cut(mine, args.micro):
            pictures = [draw(i) for i in chunk]
            images = [p.views[0] for p in pictures]
            patches, grids = pack(images, self.visual.config)
            mask = hidden(pictures).to(device)
            features = self.visual(patches.to(device), grids.to(device), mask, self.token)
            chosen = mask if args.supervise == "masked" else torch.ones_like(mask)
            share, loss = len(chunk) / args.batch, 0.0
            for name, target in self.ask(images).items():
                target = (target - getattr(self, f"mean_{name}")) / getattr(self, f"std_{name}")
                target, said = target[chosen], self.heads[name](features[chosen]).float()
                cosine = F.cosine_similarity(said, target, dim=-1).mean()
                near = F.smooth_l1_loss(said, target)
                loss += (args.cosine * (1 - cosine) + (1 - args.cosine) * near) / len(self.heads)
                sums[f"cos_{name}"] += share * cosine.detach()
            (share * loss).backward()
            collect()
            sums["loss"] += share * loss.detach()
        return {name: sum_over_ranks(value) for name, value in sums.items()}


# ---- the run ----------------------------------------------------------------------------------

STAGES = "semantic", "texture", "distill", "align"
BEFORE = {"texture": "semantic", "align": "distill"}  # from whose tower a stage goes on
PROJECTIONS = ("pool.", "text.pool.", "image_proj.", "text_proj.")


def check(args: Args) -> Args:
    """The arguments, defaults by size filled in; what would fail hours later is refused at once."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = replace(args, batch=args.batch or -(-64 // world) * world)
    least = {"steps": 1, "batch": 1, "save_every": 1, "log_every": 1, "seed": 0, "micro": 0}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name} takes {bound} or more, not {getattr(args, name)}")
    words = {"stage": "teachers distill align all", "mask": "block random",
             "supervise": "masked all", "teachers": "both semantic texture",
             "schedule": "constant linear cosine"}
    for name, known in words.items():
        if getattr(args, name) not in known.split():
            raise UserError(f"--{name} is one of: {known}; not '{getattr(args, name)}'")
    for name in ("masked", "cosine", "ema", "clips", "texture_part"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} takes a share from 0 to 1, not {getattr(args, name)}")
    if args.pairs and args.clips:
        raise UserError("--clips is a share of drawings, and --pairs takes their place")
    if args.batch % (world * max(1, args.micro)):
        raise UserError(f"--batch={args.batch} is no multiple of {world} ranks x "
                        f"--micro={max(1, args.micro)}")
    v, tiny = sized(args.size).vision, args.size == "tiny"
    args = replace(args, micro=args.micro or args.batch // world,
                   side=args.side or (64 if tiny else 224))
    own, unit = (args.side // v.patch_size) ** 2, v.patch_size * v.spatial_merge_size
    drawn = f"{own * 9 // 16},{own},{own},{own * 25 // 16}"     # half of the scenes stay whole
    args = replace(args, budgets=args.budgets or (drawn if tiny else "128,256,576,784,1024"))
    if args.side % unit or args.side < 64:
        raise UserError(f"--side takes a multiple of {unit}, two patches of {v.patch_size} pixels, "
                        f"and at least 64, not {args.side}")
    if round(args.masked * (args.side // v.patch_size) ** 2) < 1:
        raise UserError(f"--masked={args.masked} hides no patch at all")
    if not all(word.isdecimal() and int(word) >= 4 for word in args.budgets.split(",")):
        raise UserError(f"--budgets takes numbers of patches from 4 on, as 36,64: {args.budgets}")
    if not stages(args):
        raise UserError("the teachers are given as folders: --stage=teachers has nothing to train")
    if args.init and args.stage == "teachers":
        raise UserError("--init is where distill starts, or align alone: no teacher does")
    if args.init:
        load_tower(tower(args, sized(args.size)), find_checkpoint(args.init))
        first, moved = Path(args.init).resolve(), [Path(args.out, s).resolve() for s in STAGES]
        if args.stage == "all" and not args.resume and {first, *first.parents} & set(moved):
            raise UserError(f"--init={args.init} is part of what it replaces; choose another --out")
    for kind in ("semantic", "texture"):
        folder = getattr(args, f"{kind}_teacher")
        if folder and "distill" in stages(args) and load_teacher(folder).kind != kind:
            raise UserError(f"--{kind}_teacher={folder} holds a teacher of the other kind")
    return args


def stages(args: Args) -> list[str]:
    """The folders under --out that this run fills, in order."""
    wanted = ("semantic", "texture") if args.teachers == "both" else (args.teachers,)
    standins = [n for n in wanted if not getattr(args, f"{n}_teacher")]
    standins = ["semantic", "texture"] if "texture" in standins else standins   # see SelfDistil
    return {"teachers": standins, "distill": ["distill"], "align": ["align"],
            "all": [*standins, "distill", "align"]}[args.stage]


def steps_of(stage: str, args: Args) -> int:
    """How many of --steps a stage takes: the texture stand-in its part."""
    return max(1, round(args.texture_part * args.steps)) if stage == "texture" else args.steps


def budgets(stage: str, args: Args) -> tuple:
    """Patches that an image may have: only `align` varies them."""
    side = args.side // sized(args.size).vision.patch_size
    return tuple(map(int, args.budgets.split(","))) if stage == "align" else (side ** 2,)


def prepare(stage: str, args: Args, config: Config, hw):
    """(job, stream) of a stage: what is trained, and on which samples."""
    pictures = Pictures(config, args.side, args.seed, args.mask, args.masked,
                        2 if stage == "texture" else 0, args.pairs)
    if stage == "texture":
        return SelfDistil(args, config), pictures
    if stage == "distill":
        folders = {name: getattr(args, f"{name}_teacher") for name in ("semantic", "texture")
                   if args.teachers in (name, "both")}
        teachers = {name: (load_teacher(folder, hw.device, hw.dtype) if folder else
                           Standin(args, config, name, hw.device))
                    for name, folder in folders.items()}
        return Distil(args, config, teachers), pictures
    return Contrast(args, config), Captions(config, budgets(stage, args), args.batch, args.seed,
                                            "train", args.side, args.pairs, args.clips)


def build(stage: str, args: Args, config: Config, hw, say):
    """Job, its samples, optimizer and the step to go on from."""
    out, start = Path(args.out) / stage, 0
    folder = find_checkpoint(out) if args.resume and checkpoints(out) else None
    job, stream = prepare(stage, args, config, hw)
    init(job, args.seed)
    first = args.init if args.stage == stage or stage == "distill" else ""
    if stage in BEFORE and not first and checkpoints(out.with_name(BEFORE[stage])):
        first = out.with_name(BEFORE[stage])
    job.to(hw.device)
    if not folder:
        if first:
            load_tower(job.visual, find_checkpoint(first))
        say(f"{stage} goes on from {first}" if first else f"{stage} begins with a new tower")
        job.begin(stream)
    optimizer = Optimizer(job.named_parameters(), OptimConfig(
        job.RATE * args.lr, args.weight_decay,
        scales=(*((name, args.proj_scale) for name in PROJECTIONS), ("text.", args.text_scale),
                ("logit", 10.0)),  # two numbers with far to go [O]
        decays=(*((name, args.proj_decay) for name in PROJECTIONS), ("text.", args.text_decay))))
    if isinstance(job, Contrast) and hw.device.type == "cpu" and args.dtype == "auto":
        # A thousand bf16 kernels are kept: 1.5 GB, 0.37 s a step of 64; in fp32 0.7 and 0.30. [O]
        say("captions vary in length and a CPU compiles bf16 for each shape: in float32")
        hw = replace(hw, dtype=torch.float32)
    for p in job.parameters():
        if p.requires_grad and p.ndim:  # the temperature is too fine for bf16
            p.data = p.data.to(hw.dtype)
    if folder:
        weights = load_tensors(folder)
        try:
            state = torch.load(folder / "train.pt", map_location=hw.device, weights_only=True)
            start, before = state["step"], state["args"]
            optimizer.load_state_dict(state["optimizer"])
            job.load_state_dict(weights)
            optimizer.load_masters(weights)
        except Exception as error:  # torch.load answers damage with some ten kinds of them
            earlier = [f"remove it to go on from {p}" for p in checkpoints(out)[:-1]]
            way = [f"without --resume {stage} begins again", *earlier][-1]
            raise UserError(f"{folder} can't be resumed ({first_sentence(error)}); {way}") from None
        for name in ("batch", "seed") if start < args.steps else ():
            if before[name] != getattr(args, name):
                raise UserError(f"{out} was begun with --{name}={before[name]}: with another, "
                                "samples would be seen twice or never")
    return job, stream, optimizer, start


def train(stage: str, args: Args, hw):
    """One stage, from its newest checkpoint or from the start."""
    out, lead, config = Path(args.out) / stage, hw.rank == 0, sized(args.size)
    say = print if lead else (lambda *_: None)
    job, stream, optimizer, start = build(stage, args, config, hw, say)
    check_same_start(start, out)
    for name in STAGES[STAGES.index(stage):]:   # later ones too: --resume would take them for ours
        move_earlier_run(out.with_name(name), args.resume, hw, say)
    if start >= args.steps:
        if lead and read_report(out.parent)["figures"].get(stage, {}).get("step") != start:
            examine(job, Exam(config, args.side), out, start, args.seed)
        return say(f"{stage}: {start} steps are done, of {args.steps}")
    share = args.batch // hw.world
    workers = args.workers if args.workers >= 0 else min(8, max(1, cores() // hw.world))
    replays = isinstance(job, Contrast) and args.micro < share      # each sample is drawn twice
    ahead = args.micro if replays else max(args.micro, min(8 * share, 4096))
    loader = SampleLoader(RankShard(stream, hw.rank, hw.world, share), workers, ahead,
                    overlap=not replays and hw.device.type != "cpu")
    exam = Exam(config, args.side) if lead else None
    say(f"{stage}: {optimizer.flat.numel() / 1e6:.2f}M parameters, {args.batch} images a step, "
        f"{args.micro} at a time, steps {start}..{args.steps}, {workers} loading, in {out}")
    if lead:
        write_json(out / "config.json", asdict(args))
        write_json(out.parent / "report.json", read_report(out.parent))

    def write(folder):
        save_tensors(folder / "model.safetensors", {**job.state_dict(), **optimizer.masters})
        write_json(folder / "config.json", {"stage": stage, "size": args.size,
                                            "vision_config": asdict(config.vision)})
        save_state(folder / "train.pt", {"step": watch.done, "args": asdict(args),
                                         "optimizer": optimizer.state_dict()})

    watch = Checkpointer(out, hw, args.steps, args.save_every, start, write)
    log = Log(out, stage, args.steps, start, hw.rank)
    for step in range(start, args.steps):
        began, loading = time.perf_counter(), loader.seconds
        mine = range(step * share, (step + 1) * share)
        values = job.learn(loader, mine, args, optimizer.accumulate)
        values = {name: float(value) for name, value in values.items()}
        rate = schedule(step, args.steps, args.warmup, args.schedule)
        norm = optimizer.step(rate, apply=math.isfinite(values["loss"]))
        if watch.check_loss(values["loss"], norm):
            job.follow(optimizer.masters, args)
        done, took = step + 1, time.perf_counter() - began
        values |= {"lr": job.RATE * args.lr * rate, "norm": norm,
                   "dt": took, "img/s": args.batch / took}
        if loader.seconds - loading > 0.05 * took:
            values["loading"] = loader.seconds - loading
        last = done == args.steps
        if lead and (last or args.eval_every and done % args.eval_every == 0):
            values |= examine(job, exam, out, done, args.seed)
        log.step(done, last or done % args.log_every == 0, **values)
        if watch.after_step(done, log.reader_gone):
            break
    log.close()
    loader.close()
    watch.close()


def run(args: Args):
    args = check(args)
    hw = setup(args.device, args.dtype)
    if args.plan:
        return forecast(args, hw)
    say = print if hw.rank == 0 else (lambda *_: None)
    say(hw.description)
    if {"semantic", "texture"} & set(stages(args)):
        say(f"teachers without a folder are stand-ins, trained on {args.pairs or 'drawings'}")
    if args.pairs:
        paired, alone = find_pairs(args.pairs, "train")
        say(f"{len(paired)} pairs for training in {args.pairs}; {alone} files stand alone")
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)  # or fail before hours have passed
    for stage in stages(args):
        train(stage, replace(args, steps=steps_of(stage, args)), hw)
        if args.keep and hw.rank == 0:
            export_tower(find_checkpoint(Path(args.out) / stage), Path(args.keep) / stage)
        if hw.world > 1:
            dist.barrier()  # the next stage reads what rank 0 has saved


def forecast(args: Args, hw):
    """What each stage asked for would take (`--plan`), without captions, attention, and what
    teachers given as folders need beyond towers like ours."""
    config = sized(args.size)
    for stage in stages(args):
        with torch.device("meta"):
            counts = {"tower": sum(p.numel() for p in tower(args, config).parameters())}
            if stage in ("semantic", "align"):
                counts["text"] = sum(p.numel() for p in TextTower(config.text).parameters())
        replays = "text" in counts and args.micro * hw.world < args.batch
        # Frozen towers, views of a picture, and what these or the replay add to 6 FLOPs a weight.
        frozen, views = {"distill": (2, 1), "texture": (1, 2)}.get(stage, (0, 1))
        again = {"distill": 4, "texture": 10}.get(stage, 2 * replays)
        patches, steps = np.mean(budgets(stage, args)).item(), steps_of(stage, args)
        flops = (6 + again) * counts["tower"] * patches * args.batch * steps
        width, kept = config.vision.hidden_size, 16 * args.batch / hw.world * replays
        memory = sum(counts.values()) * (16 + hw.dtype.itemsize) + 4 * frozen * counts["tower"] + (
            width * (kept + args.micro * views * patches * config.vision.depth * 2 * 34))
        print(f"stage       {stage}, {steps} steps of {args.batch} images")
        print_plan(hw, counts, steps * args.batch * patches, flops, memory)


# Exercises. Delete the body, write it again, run the test.
# 1. Contrast.learn: 64 micro-batches as one. pytest tests/test_train_vit.py -k replay; 45 minutes.
# 2. Targets in SelfDistil.learn from the logits as they are, (x / 0.04).softmax(-1), without centre
#    and deviation: --stage=teachers --texture_part=1 --steps=150. The loss has never been better.
#    What has become of `used`? And of `sure`, with the centre alone? 60 minutes.


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
