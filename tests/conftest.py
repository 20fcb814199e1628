"""Fixtures: small models with random weights, and batches over them. One thread, no network."""
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lib  # before torch: it sets how OpenMP waits

import numpy as np
import pytest
import torch

from data import Document
from model import Config, GLMV, TextConfig
from vit import MEAN, STD, VitConfig

torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, and every process that
# they start as well; but then no run saves for it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def odd_config(which: int = 0) -> Config:
    """Three configurations with nothing in common and no round numbers."""
    text, vision = [
        (dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
              num_key_value_heads=1, head_dim=16),
         dict(depth=2, hidden_size=48, num_heads=3, intermediate_size=56, patch_size=6)),
        (dict(hidden_size=72, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
              num_key_value_heads=2, head_dim=24),
         dict(depth=1, hidden_size=64, num_heads=2, intermediate_size=100, patch_size=14)),
        (dict(hidden_size=40, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=2, head_dim=32),
         dict(depth=3, hidden_size=40, num_heads=5, intermediate_size=24, patch_size=8)),
    ][which]
    return Config(TextConfig(vocab_size=544, **text),
                  VitConfig(out_hidden_size=text["hidden_size"], **vision),
                  image_token_id=532, min_tokens=1, max_tokens=64, n_ranks=512)


def random_document(config: Config, sizes=((4, 6),), length: int = 12, seed: int = 0) -> Document:
    """Text around images whose sizes are given in patches."""
    rng = np.random.default_rng(seed)
    p = config.vision.patch_size
    ids, images = rng.integers(0, 500, length).tolist(), []
    for h, w in sizes:
        images.append(rng.integers(0, 256, (h * p, w * p, 3)).astype(np.uint8))
        ids += [522] + [config.image_token_id] * (h * w // 4) + [523]
        ids += rng.integers(0, 500, length // 2).tolist()
    return Document(np.array(ids, np.int32), np.ones(len(ids), np.float32), images)


def shaken(which):
    """A model whose norms and biases are random too, so that a swapped name shows."""
    model = GLMV(odd_config(which), seed=which).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                generator = torch.Generator().manual_seed(p.numel())
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def their_pixels(patches):
    """Our uint8 patches of stills as transformers wants them: normalised, each frame doubled."""
    area = patches.shape[-1] // 3
    mean, std = (torch.tensor(x).repeat_interleave(area) for x in (MEAN, STD))
    pixels = (patches[:, 0] / 255 - mean) / std
    pixels = pixels.view(len(pixels), 3, 1, area).expand(-1, -1, 2, -1)
    return pixels.reshape(len(pixels), -1)


def on_ranks(world: int, work, *args):
    """work(rank, world, *args) on each of `world` ranks, all at once, as forked processes."""
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(rank, world, *args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world


@pytest.fixture(autouse=True)
def same_signals():
    """A run that a test breaks off keeps its handlers, and its thread that ends the process at the
    second signal: put back what was there before, or a later test may end all of pytest."""
    which = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    held, pipe = [signal.getsignal(number) for number in which], signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(pipe)
    yield
    for number, handler in zip(which, held):
        signal.signal(number, handler)
    signal.set_wakeup_fd(pipe)


@pytest.fixture
def config():
    return odd_config()


@pytest.fixture
def model(config):
    return GLMV(config, seed=1).eval()
