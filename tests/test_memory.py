"""Every policy gives the same gradients and keeps less; torch.compile computes the same."""
import functools
import weakref

import pytest
import torch
from torch import nn

import mmtp
from conftest import odd_config, random_document
from data import collate
from lib import memory
from lib.cli import main, UserError
from lib.memory import chunks_of, HostCopy, Memory, parse_memory
from model import GLMV
from pretrain import loss_sum

ALL = [parse_memory(text) for text in
       ("none", "recompute", "offload", "vit:offload,decoder:recompute", "adapter:recompute")]


def models(depths: int = 0) -> tuple[GLMV, object]:
    config = odd_config()
    model = GLMV(config, seed=1)
    if depths:
        mmtp.attach(model, depths)
    documents = [random_document(config, ((4, 6), (2, 4)), seed=0),
                 random_document(config, ((8, 8),), 20, seed=1), random_document(config, (), 9)]
    return model, collate(documents, config, 160)


def gradients(model, batch, how: Memory, depths: int = 0, **options):
    """The losses of a row, and the gradient of every parameter."""
    how.use_in(model)
    model.zero_grad(set_to_none=True)
    loss, further = loss_sum(model, batch, depths, **options)
    (loss + sum(further)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return [loss.detach(), *(x.detach() for x in further)], found


def same(a, b) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a[0], b[0])) and \
        a[1].keys() == b[1].keys() and all(
            a[1][name] is g or torch.equal(a[1][name], g) for name, g in b[1].items())


@pytest.mark.parametrize("option", mmtp.OPTIONS)
def test_gradients_are_equal_under_every_policy(option):
    """Bit for bit, with a head whose one layer is run three times."""
    model, batch = models(depths=3)
    plain = gradients(model, batch, ALL[0], 3, option=option)
    for how in ALL[1:]:
        assert same(plain, gradients(model, batch, how, 3, option=option)), how
