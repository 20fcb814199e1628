"""Pictures for the vision tower alone: what train_vit.py learns from, and is examined on.

Stage 1 sees pictures of three sources, some patches hidden; stage 2 sees pictures with captions in
English and Chinese, of drawn scenes or of a folder of files. As in data.py, sample i of a stream is
a pure function of (seed, i). Below them stand the probes: small questions that a frozen tower's
features must answer.

Letters: P patches, N images, T caption tokens, W width, p patch side.
"""
import copy
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from lib.captions import Captions, clip, find_pairs, pack_texts, read_pair, scene
from lib.cli import UserError
from lib.common import checkpoints, read_json, write_json
from lib.images import budgeted, pack
from model import Config, init
from tasks.draw import COLORS, PAIRS, SHAPES
from tasks.scenes import caption, Item, MOVES, moving

# ---- stage 1: pictures of three sources, some patches hidden ------------------------------------


def salient(features: Tensor, k: int = 4) -> Tensor:
    """The mean of the k patches of each picture that differ most from all the others: the thing
    before its ground. A mean over all patches asks about the ground. (N, P, W) -> (N, W) [O]"""
    apart = (features - features.mean(1, keepdim=True)).square().sum(-1)
    chosen = apart.topk(k, dim=1).indices
    return features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1])).mean(1)


# ---- stage 2: pictures and captions -------------------------------------------------------------


# ---- the probes: what do frozen features know? --------------------------------------------------

@dataclass
class Exam:
    """Questions to a tower, drawn once: lone things and small scenes, of training to learn the
    answers from; of held-out seeds and shades, and of all pairs of colour and shape, six of which
    training never shows, to answer."""
    config: Config
    side: int                 # pixels of the square pictures
    count: int = 1024         # pictures of each kind to learn from; to answer, half as many

    def __post_init__(self):
        # Seeds from 3,000,000 on: no stream is likely to draw these.
        self.lone, self.scenes = ({split: [scene(first + i, split, lone, self.side)
                                           for i in range(self.count // (1 + (split == "test")))]
                                   for split in ("train", "test")}
                                  for first, lone in ((3_000_000, True), (4_000_000, False)))


@torch.no_grad()
def look(visual, images: list, chunk: int = 64) -> Tensor:
    """Pictures of one size -> features (N, P, W), fp32 on the CPU."""
    device, parts = visual.post_layernorm.weight.device, []
    for i in range(0, len(images), chunk):
        patches, grids = pack([np.asarray(x) for x in images[i:i + chunk]], visual.config)
        features = visual(patches.to(device), grids.to(device)).float().cpu()
        parts.append(rearrange(features, "(n p) w -> n p w", n=len(grids)))
    return torch.cat(parts)


def linear_probe(x: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Classes (M,) of test (M, W) by ridge regression from x (N, W) onto labels (N,): in closed
    form, so that there is no learning rate to argue about. [O]"""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, test = (F.pad((y - mean) / deviation, (0, 1), value=1.0).double() for y in (x, test))
    shrink = 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return (test @ torch.linalg.solve(x.T @ x + shrink, x.T @ F.one_hot(labels).double())).argmax(1)


def knn_probe(x: Tensor, labels: Tensor, test: Tensor, k: int = 10) -> Tensor:
    """Classes (M,) of test (M, W) by a vote of the k nearest of x (N, W) in cosine. [O]"""
    near = (F.normalize(test, dim=1) @ F.normalize(x, dim=1).T).topk(k).indices
    return F.one_hot(labels)[near].sum(1).argmax(1)


def patch_labels(image: Image.Image, items: list[Item], patch: int) -> Tensor:
    """What each patch shows, in stored order (P,): 1 + the number of the shape that covers half of
    it or more, else 0, the ground. A small star may have no patch of its own."""
    pixels = np.asarray(image).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    drawn = np.abs(pixels - ground).sum(-1) > 60
    share = rearrange(drawn, "(y i) (x j) -> y x (i j)", i=patch, j=patch).mean(-1)
    kinds = np.zeros(share.shape, int)
    for item in items:
        x0, y0, x1, y1 = (round(c * len(share) / 999) for c in item.area)
        kinds[y0:y1, x0:x1] = 1 + SHAPES.index(item.shape)
    kinds[share < 0.5] = 0
    return torch.from_numpy(rearrange(kinds, "(y b) (x d) -> (y x b d)", b=2, d=2))


def probe(visual, exam: Exam) -> dict[str, float]:
    """Shares of right answers on held-out pictures.

    linear, knn: colour and shape of a lone thing from its `foremost` patches, mean of the two;
    dense: the shape under each patch, linearly from its own feature, the mean over seven classes.
    """
    means, marks = {}, {}
    for split, drawn in exam.lone.items():
        means[split] = salient(look(visual, [image for image, _ in drawn]))
        things = [items[0] for _, items in drawn]
        marks[split] = [torch.tensor([list(COLORS).index(t.color) for t in things]),
                        torch.tensor([SHAPES.index(t.shape) for t in things])]
    figures = {name: float(np.mean([
        (ask(means["train"], known, means["test"]) == truth).float().mean()
        for known, truth in zip(marks["train"], marks["test"])]))
        for name, ask in (("linear", linear_probe), ("knn", knn_probe))}
    patches, kinds = {}, {}
    for split, drawn in exam.scenes.items():
        patches[split] = look(visual, [image for image, _ in drawn]).flatten(0, 1)
        kinds[split] = torch.cat([patch_labels(*pair, visual.config.patch_size) for pair in drawn])
    right = linear_probe(patches["train"], kinds["train"], patches["test"]) == kinds["test"]
    figures["dense"] = float(np.mean([right[kinds["test"] == kind].float().mean()
                                      for kind in kinds["test"].unique()]))
    return figures


def probe_language(embed_images, embed_texts, exam: Exam) -> dict[str, float]:
    """In both languages: zero-shot naming of a lone thing among 48, and retrieval at rank 1 among
    the held-out scenes, image to text (i2t) and back (t2i); an equal caption is as good as its own.

    embed_images: list of pictures -> (N, E); embed_texts: list of str -> (N, E), of length one.
    """
    lone = embed_images([image for image, _ in exam.lone["test"]])
    named = torch.tensor([PAIRS.index((items[0].color, items[0].shape))
                          for _, items in exam.lone["test"]])
    scenes, figures = embed_images([image for image, _ in exam.scenes["test"]]), {}
    for language in ("en", "zh"):
        kinds = embed_texts([caption([Item(*pair, (0, 0, 0, 0))], language=language,
                                     parts=("color", "shape")) for pair in PAIRS])
        said = (lone @ kinds.T).argmax(1)
        figures[f"zero_shot_{language}"] = float((said == named).float().mean())
        lines = [caption(items, language=language) for _, items in exam.scenes["test"]]
        found = retrieval(scenes, embed_texts(lines), lines)
        figures |= {f"{name}_{language}": value for name, value in found.items()}
    return figures


def retrieval(images: Tensor, texts: Tensor, lines: list[str]) -> dict[str, float]:
    """Shares of images (N, E) whose nearest text (N, E) is their line, or one that reads the same,
    and the other way round; `chance` is that of picking blindly."""
    def right(table):
        return float(np.mean([lines[i] == line for i, line in zip(table.argmax(1), lines)]))

    return {"i2t": right(images @ texts.T), "t2i": right(texts @ images.T),
            "chance": sum(n * n for n in Counter(lines).values()) / len(lines) ** 2}


def probe_pairs(embed_images, embed_texts, exam: Exam, folder: str, count: int = 256) -> dict:
    """Retrieval among held-out pairs of a folder, each with the first of what may be said of it;
    nothing where fewer than two are held out. Embedding as in `probe_language`."""
    images, lines, vision = [], [], exam.config.vision
    try:
        paths, _ = find_pairs(folder, "test")
    except UserError:
        return {}
    for path in paths[::math.ceil(len(paths) / count)]:     # sorted, often by kind: some of each
        try:
            image, said = read_pair(path, folder)
        except (UserError, OSError):        # corrupt ones are told of in training
            continue
        images.append(budgeted(image, vision, (exam.side // vision.patch_size) ** 2))
        lines.append(said[0])
    if len(lines) < 2:
        return {}
    found = retrieval(embed_images(images), embed_texts(lines), lines)
    return {f"pairs_{name}": value for name, value in found.items()} | {"pairs": len(lines)}


def probe_moves(embed_images, embed_texts, side: int, count: int = 256) -> dict[str, float]:
    """Share of held-out clips, two frames each, of which it is rightly said where the thing goes,
    of four ways; by chance a quarter. In both languages, embedded as in `probe_language`."""
    clips = [clip(5_000_000 + i, "test", side) for i in range(count)]
    truth = torch.tensor([list(MOVES).index(move) for _, _, move in clips])
    seen = embed_images([np.stack([np.asarray(f) for f in frames]) for frames, _, _ in clips])
    figures = {}
    for language in ("en", "zh"):
        said = embed_texts([moving(item, move, language) for _, item, _ in clips for move in MOVES])
        scores = torch.einsum("n e, n k e -> n k", seen, said.view(count, len(MOVES), -1))
        figures[f"moves_{language}"] = float((scores.argmax(1) == truth).float().mean())
    return figures


@torch.no_grad()
def probe_towers(job, exam: Exam, clips: bool, folder: str) -> dict[str, float]:
    """All probes that need both towers of a job, which embeds packed batches: embed_images(patches,
    grids) and embed_texts(ids, cu_seqlens)."""
    encode, device = Captions(exam.config, (), 1).encode, next(job.parameters()).device

    def by_chunks(embed, packed):       # so that it takes no more memory than a small batch
        return lambda things: torch.cat([
            embed(*(x.to(device) for x in packed(things[i:i + 64]))).cpu()
            for i in range(0, len(things), 64)])

    ask = (by_chunks(job.embed_images, lambda some: pack(list(map(np.asarray, some)),
                                                         exam.config.vision)),
           by_chunks(job.embed_texts, lambda some: pack_texts(list(map(encode, some)))))
    return {**probe_language(*ask, exam), **(probe_moves(*ask, exam.side) if clips else {}),
            **(probe_pairs(*ask, exam, folder) if folder else {})}


def pca_picture(visual, images: list, path: Path):
    """Pictures above, below them the three main directions of their patch features as red, green
    and blue: neighbours of like colour are alike to the tower."""
    features = look(visual, images)
    flat = features.flatten(0, 1)
    flat = flat - flat.mean(0)
    shades = flat @ torch.linalg.svd(flat, full_matrices=False)[2][:3].T
    low, high = shades.quantile(0.02, dim=0), shades.quantile(0.98, dim=0)
    shades = ((shades - low) / (high - low)).clamp(0, 1).mul(255).byte().numpy()
    side = images[0].width // visual.config.patch_size // 2
    grids = rearrange(shades, "(n y x b d) c -> n (y b) (x d) c", n=len(images), y=side, x=side,
                      b=2, d=2)
    size, page = 96, Image.new("RGB", (98 * len(images), 194), "white")
    for i, (image, grid) in enumerate(zip(images, grids)):
        page.paste(image.resize((size, size)), (98 * i, 0))
        page.paste(Image.fromarray(grid).resize((size, size), Image.Resampling.NEAREST),
                   (98 * i, 98))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


NOTE = (f"Shares of right answers on held-out pictures. linear, knn: colour ({len(COLORS)}) and "
        f"shape ({len(SHAPES)}) of a lone thing. dense: what each patch shows, {1 + len(SHAPES)} "
        f"kinds. zero_shot: the name of a lone thing, by chance 1 in {len(PAIRS)}. i2t, t2i: which "
        "caption belongs to a scene, which scene to a caption, of 512; chance: of picking blindly. "
        "pairs: the same among held-out pairs. moves: which of four ways a thing goes. "
        "Random weights have learnt nothing: what they can do is no tower's merit.")
RANDOM = "random weights"


def read_report(run: Path) -> dict:
    """What `examine` has noted of the stages in a run folder, without those that are there no
    longer. Raises UserError where its file is damaged."""
    facts, path = {"title": "the vision tower", "figures": {}, "pictures": []}, run / "report.json"
    if path.exists():
        facts |= read_json(path)
    facts["note"] = NOTE
    rows = {k: row for k, row in facts["figures"].items() if k == RANDOM or checkpoints(run / k)}
    facts["figures"] = rows if len(rows) > 1 else {}
    facts["pictures"] = [(k, told) for k, told in facts["pictures"] if (run / k).exists()]
    return facts


def probe_random_weights(visual, exam: Exam, seed: int = 0) -> dict[str, float]:
    """What the probes say of a tower like this one before it has learnt anything."""
    blank = copy.deepcopy(visual)
    init(blank, seed)
    return probe(blank, exam)


def examine(job, exam: Exam, out: Path, step: int, seed: int = 0) -> dict[str, float]:
    """What the probes say of a stage's tower as it stands (of its running mean, where it has one)
    and of what else the job asks for; noted beside the stage's folder `out` for lab.report, with
    its features as a picture."""
    visual, stage = getattr(job, "ema", job).visual, out.name
    figures, name = {**probe(visual, exam), **job.figures(exam)}, f"{stage}/features-{step:06d}.png"
    try:
        facts = read_report(out.parent)
        pca_picture(visual, [image for image, _ in exam.scenes["test"][:6]], out.parent / name)
        if RANDOM not in facts["figures"]:
            random = probe_random_weights(visual, exam, seed)
            facts["figures"] = {RANDOM: random, **facts["figures"]}
        facts["figures"][stage] = {"step": step, **figures}
        facts["pictures"] = [*((k, told) for k, told in facts["pictures"] if k != name),
                             (name, f"{stage}, step {step}: pictures, the tower's features")]
        write_json(out.parent / "report.json", facts)
    except (OSError, UserError) as error:       # a full disk is no reason to lose the run
        print(f"{stage}, step {step}: figures and picture are not kept ({error})")
    return figures


# Exercises. Delete the body, write it again, run the test.
# 1. draw_mask: blocks, but exactly the share. pytest tests/test_train_vit.py -k mask; 20 minutes.
# 2. linear_probe, with a hundred steps of gradient descent instead of the closed form: how close
#    do the figures come? pytest tests/test_train_vit.py -k probes; 20 minutes.
