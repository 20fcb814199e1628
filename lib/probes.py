"""What does a frozen vision tower know? Probes that train_vit.py evaluates its towers with.

A `ProbeSet` holds drawn pictures: some to fit a linear probe on, and held-out ones to score it.
`probe` asks the tower alone, `probe_towers` also its text tower (zero-shot naming, retrieval);
`evaluate_tower` keeps the figures in the run folder for lab.report.

Letters: P patches of a picture, N pictures (M held-out ones), W width of the tower, E of the common
space of pictures and texts.
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

from lib.captions import Captions, clip, LANGUAGES, pack_texts, patch_labels, scene
from lib.cli import UserError
from lib.common import read_json, write_json
from lib.images import BadRecord, budgeted, pack
from lib.pairs import PairSource
from lib.prefetch import send
from lib.runs import checkpoints
from model import Config, init
from tasks.draw import COLORS, PAIRS, SHAPES
from tasks.scenes import caption, Item, MOVES, moving


# ---- pictures and features ----------------------------------------------------------------------

@dataclass
class ProbeSet:
    """The pictures of the probes, drawn once: `single` shapes and `scenes` of one to three, each
    {"train": [(picture, items)], "test": [...]}. The test pictures have held-out seeds and shades,
    and show all pairs of colour and shape, six of which training never shows."""
    config: Config
    side: int                 # pixels of the square pictures
    count: int = 1024         # training pictures of each kind; half as many test pictures

    def __post_init__(self):
        # Seeds from 3,000,000 on: streams draw theirs from 2 ** 31, so that they hardly meet.
        self.single = self._draw(3_000_000, single=True)
        self.scenes = self._draw(4_000_000, single=False)

    def _draw(self, first: int, single: bool) -> dict[str, list]:
        counts = {"train": self.count, "test": self.count // 2}
        return {split: [scene(first + i, split, single, self.side) for i in range(count)]
                for split, count in counts.items()}


@torch.no_grad()
def extract_features(visual, images: list, chunk: int = 64) -> Tensor:
    """Pictures of one size -> features (N, P, W), fp32 on the CPU."""
    device, parts = visual.post_layernorm.weight.device, []
    for i in range(0, len(images), chunk):
        patches, grids = pack([np.asarray(x) for x in images[i:i + chunk]], visual.config)
        features = visual(send(patches, device), grids).float().cpu()
        parts.append(rearrange(features, "(n p) w -> n p w", n=len(grids)))
    return torch.cat(parts)


def salient(features: Tensor, k: int = 4) -> Tensor:
    """The mean of the k patches of each picture that differ most from the picture's mean: those of
    the shape. A mean over all patches would describe the ground. (N, P, W) -> (N, W) [O]"""
    distance = (features - features.mean(1, keepdim=True)).square().sum(-1)
    chosen = distance.topk(k, dim=1).indices
    return features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1])).mean(1)


# ---- probes of the vision tower -----------------------------------------------------------------

def linear_probe(x: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Predicted classes (M,) of test (M, W), by ridge regression from x (N, W) onto labels (N,). It
    is solved in closed form, so that no learning rate has to be chosen. [O]"""
    mean, std = x.mean(0), x.std(0) + 1e-6
    # Standardise the columns and append a 1 for the bias.
    x, test = (F.pad((y - mean) / std, (0, 1), value=1.0).double() for y in (x, test))
    ridge = 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ F.one_hot(labels).double())
    return (test @ weights).argmax(1)


def knn_probe(x: Tensor, labels: Tensor, test: Tensor, k: int = 10) -> Tensor:
    """Predicted classes (M,) of test (M, W): the majority of the k nearest of x (N, W) by cosine
    similarity. [O]"""
    nearest = (F.normalize(test, dim=1) @ F.normalize(x, dim=1).T).topk(k).indices
    return F.one_hot(labels)[nearest].sum(1).argmax(1)


def probe(visual, probes: ProbeSet) -> dict[str, float]:
    """Accuracies on held-out pictures.

    linear, knn: colour and shape of a single shape, from the mean of its `salient` patches; the
    mean of the two. dense: the shape under each patch, by a linear probe on the patch's own
    feature; the mean over the seven classes.
    """
    # Single shapes: one vector a picture, one label for the colour and one for the shape.
    features, colors, shapes = {}, {}, {}
    for split, drawn in probes.single.items():
        features[split] = salient(extract_features(visual, [image for image, _ in drawn]))
        colors[split] = torch.tensor([list(COLORS).index(items[0].color) for _, items in drawn])
        shapes[split] = torch.tensor([SHAPES.index(items[0].shape) for _, items in drawn])
    figures = {}
    for name, predict in (("linear", linear_probe), ("knn", knn_probe)):
        accuracies = []
        for labels in (colors, shapes):
            predicted = predict(features["train"], labels["train"], features["test"])
            accuracies.append((predicted == labels["test"]).float().mean())
        figures[name] = float(np.mean(accuracies))

    # Scenes: one vector and one label a patch.
    patches, labels = {}, {}
    for split, drawn in probes.scenes.items():
        patches[split] = extract_features(visual, [image for image, _ in drawn]).flatten(0, 1)
        labels[split] = torch.cat([patch_labels(image, items, visual.config.patch_size)
                                   for image, items in drawn])
    predicted = linear_probe(patches["train"], labels["train"], patches["test"])
    right = predicted == labels["test"]
    # Most patches are ground, so each class counts the same.
    classes = labels["test"].unique()
    figures["dense"] = float(np.mean([right[labels["test"] == c].float().mean() for c in classes]))
    return figures


def probe_random_weights(visual, probes: ProbeSet, seed: int = 0) -> dict[str, float]:
    """The probes' figures for a tower of this architecture before any training."""
    untrained = copy.deepcopy(visual)
    init(untrained, seed)
    return probe(untrained, probes)


# ---- probes of vision and text tower together ---------------------------------------------------

def probe_language(embed_images, embed_texts, probes: ProbeSet) -> dict[str, float]:
    """In both languages: zero-shot naming of a single shape among 48 names, and retrieval at rank 1
    among the held-out scenes, image to text (i2t) and text to image (t2i).

    embed_images: list of pictures -> (N, E); embed_texts: list of str -> (N, E), of length one.
    """
    singles = embed_images([image for image, _ in probes.single["test"]])
    truth = torch.tensor([PAIRS.index((items[0].color, items[0].shape))
                          for _, items in probes.single["test"]])
    scenes = embed_images([image for image, _ in probes.scenes["test"]])
    figures = {}
    for language in LANGUAGES:
        names = [caption([Item(*pair, (0, 0, 0, 0))], language=language, parts=("color", "shape"))
                 for pair in PAIRS]
        predicted = (singles @ embed_texts(names).T).argmax(1)
        figures[f"zero_shot_{language}"] = float((predicted == truth).float().mean())
        lines = [caption(items, language=language) for _, items in probes.scenes["test"]]
        for name, value in retrieval(scenes, embed_texts(lines), lines).items():
            figures[f"{name}_{language}"] = value
    return figures


def retrieval(images: Tensor, texts: Tensor, lines: list[str]) -> dict[str, float]:
    """R@1 in both directions between images (N, E) and the texts (N, E) of their captions `lines`.
    Another picture's caption with the same words is right too. `chance`: of a blind guess."""
    def recall(similarity):
        return float(np.mean([lines[i] == line for i, line in zip(similarity.argmax(1), lines)]))

    return {"i2t": recall(images @ texts.T), "t2i": recall(texts @ images.T),
            "chance": sum(n * n for n in Counter(lines).values()) / len(lines) ** 2}


def probe_pairs(embed_images, embed_texts, probes: ProbeSet, pairs: PairSource,
                count: int = 256) -> dict:
    """Retrieval among at most `count` held-out pairs, each with its first caption; empty if fewer
    than two are held out. Embedding functions as in `probe_language`."""
    images, lines, vision = [], [], probes.config.vision
    numbers = pairs.numbers("test")
    for n in numbers[::math.ceil(len(numbers) / count) or 1]:   # often sorted by kind: some of each
        try:
            image, captions = pairs.read(int(n))
        except BadRecord:       # training reports those that can't be used
            continue
        images.append(budgeted(image, vision, (probes.side // vision.patch_size) ** 2))
        lines.append(captions[0])
    if len(lines) < 2:
        return {}
    found = retrieval(embed_images(images), embed_texts(lines), lines)
    return {f"pairs_{name}": value for name, value in found.items()} | {"pairs": len(lines)}


def probe_moves(embed_images, embed_texts, side: int, count: int = 256) -> dict[str, float]:
    """Share of held-out clips, two frames each, whose caption with the right direction of movement
    scores highest of four (chance: a quarter), in both languages. Functions as above."""
    clips = [clip(5_000_000 + i, "test", side) for i in range(count)]
    truth = torch.tensor([list(MOVES).index(move) for _, _, move in clips])
    videos = embed_images([np.stack([np.asarray(f) for f in frames]) for frames, _, _ in clips])
    figures = {}
    for language in LANGUAGES:
        lines = [moving(item, move, language) for _, item, _ in clips for move in MOVES]
        texts = embed_texts(lines).view(count, len(MOVES), -1)
        predicted = torch.einsum("n e, n m e -> n m", videos, texts).argmax(1)
        figures[f"moves_{language}"] = float((predicted == truth).float().mean())
    return figures


@torch.no_grad()
def probe_towers(towers, probes: ProbeSet, clips: bool,
                 pairs: PairSource | None = None) -> dict[str, float]:
    """All probes that need both towers. `towers` embeds packed batches: embed_images(patches,
    grids) and embed_texts(ids, cu_seqlens). clips: also ask about movement; pairs: also about those
    of them that are held out."""
    encode, device = Captions(probes.config, (), 1).encode, next(towers.parameters()).device

    def in_chunks(embed, pack_chunk, things) -> Tensor:     # so that memory stays small
        parts = []
        for i in range(0, len(things), 64):
            packed, sizes = pack_chunk(things[i:i + 64])
            parts.append(embed(send(packed, device), sizes).cpu())
        return torch.cat(parts)

    def embed_images(images):
        return in_chunks(towers.embed_images, lambda chunk: pack(
            [np.asarray(image) for image in chunk], probes.config.vision), images)

    def embed_texts(lines):
        return in_chunks(towers.embed_texts, lambda chunk: pack_texts(
            [encode(line) for line in chunk]), lines)

    figures = probe_language(embed_images, embed_texts, probes)
    if clips:
        figures |= probe_moves(embed_images, embed_texts, probes.side)
    if pairs:
        figures |= probe_pairs(embed_images, embed_texts, probes, pairs)
    return figures


# ---- the report of a run folder -----------------------------------------------------------------

def pca_picture(visual, images: list, path: Path):
    """Save the pictures, and below them the three principal components of their patch features as
    red, green and blue: patches of similar colour have similar features."""
    features = extract_features(visual, images)
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


NOTE = (f"Accuracy on held-out pictures. linear, knn: colour ({len(COLORS)}) and shape "
        f"({len(SHAPES)}) of a single shape. dense: what each patch shows, {1 + len(SHAPES)} "
        f"classes. zero_shot: the name of a single shape, by chance 1 in {len(PAIRS)}. i2t, t2i: "
        "the caption of a scene, the scene of a caption, among all test scenes; chance: of a blind "
        "guess. pairs: the same among held-out pairs. moves: the direction of movement, of four. "
        "Random weights are the baseline: what they reach is not the result of training.")
RANDOM = "random weights"


def read_report(run: Path) -> dict:
    """What `evaluate_tower` has written about the stages of a run folder, without stages whose
    folders no longer exist. Raises UserError if report.json is damaged."""
    facts, path = {"title": "the vision tower", "figures": {}, "pictures": []}, run / "report.json"
    try:
        if path.exists():
            facts |= read_json(path)
        rows = {k: row for k, row in facts["figures"].items()
                if k == RANDOM or checkpoints(run / k)}
        pictures = [(name, title) for name, title in facts["pictures"] if (run / name).exists()]
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: remove it to go on") from None
    return facts | {"note": NOTE, "figures": rows if len(rows) > 1 else {}, "pictures": pictures}


def evaluate_tower(model, probes: ProbeSet, out: Path, step: int, seed: int = 0,
                   clips: bool = False, pairs: PairSource | None = None) -> dict[str, float]:
    """All figures of a stage's model: `probe` of model.visual, and `probe_towers` if it has a text
    tower.

    Writes them to report.json of the run folder, the parent of the stage's folder `out`, with a
    picture of the features, and once the figures of random weights to compare with.
    """
    visual, stage = model.visual, out.name
    figures = probe(visual, probes)
    if hasattr(model, "embed_texts"):
        figures |= probe_towers(model, probes, clips, pairs)
    picture = f"{stage}/features-{step:06d}.png"
    try:
        facts = read_report(out.parent)
        pca_picture(visual, [image for image, _ in probes.scenes["test"][:6]], out.parent / picture)
        if RANDOM not in facts["figures"]:
            random = probe_random_weights(visual, probes, seed)
            facts["figures"] = {RANDOM: random, **facts["figures"]}
        facts["figures"][stage] = {"step": step, **figures}
        others = [(name, title) for name, title in facts["pictures"] if name != picture]
        title = f"{stage}, step {step}: pictures, the tower's features"
        facts["pictures"] = [*others, (picture, title)]
        write_json(out.parent / "report.json", facts)
    except (OSError, UserError) as error:       # a full disk is no reason to lose the run
        print(f"{stage}, step {step}: figures and picture are not kept ({error})")
    return figures


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade linear_probe`.
# 1. linear_probe: with a hundred steps of gradient descent instead of the closed form. How close do
#    the figures come? pytest tests/test_train_vit.py -k probes_find; 20 minutes.
