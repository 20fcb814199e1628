"""lab.kernels: its cases cover all kernels, its checks can fail, and what it says of one case."""
import os
import subprocess
import sys

import pytest
import torch

import kernels
from lab import kernels as lab
from lib import attention as attention_module, dispatch, losses, rotary, sigmoid
from lib.cli import UserError
from lib.common import ROOT
from lib.roofline import find_machine

H100 = find_machine("H100")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", dispatch.FORCED)
    monkeypatch.setattr(attention_module, "CHOICE", attention_module.CHOICE)


def test_the_cases_launch_every_kernel_and_the_kernel_takes_less():
    every = {entry[0].name for module in (kernels, attention_module, losses, rotary, sigmoid)
             for entry in module.KERNELS}
    launched = set()
    for case in lab.CASES:
        fused, plain = (lab.allowed(case, H100, kernel) for kernel in (True, False))
        launched |= {name for _, name in fused.costs} & every
        assert not {name for _, name in plain.costs} & every
        assert 0 < fused.total().seconds < plain.total().seconds, case.name
    assert launched == every


def test_a_kernel_that_differs_is_seen(capsys, monkeypatch):
    """Here both are plain: they agree, until one of them is changed."""
    args = lab.Args(only="swiglu")
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: False)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    assert lab.check(args, torch.device("cpu"))
    plain = kernels.plain_swiglu
    monkeypatch.setattr(kernels, "plain_swiglu", lambda *x: plain(*x) * (
        1.01 if dispatch.FORCED == "1" else 1.0))
    assert not lab.check(args, torch.device("cpu"))
    out = capsys.readouterr().out.splitlines()
    assert "agrees" in out[0] and "DIFFERS" in out[1]
    one, none = torch.ones(2), torch.full((2,), float("nan"))
    assert lab.distance(one, one) == 0 and lab.distance(none, one) == float("inf")
    assert lab.distance(one, one[:1]) == lab.distance(one, one.double()) == float("inf")


def test_a_case_that_there_is_not():
    with pytest.raises(UserError, match="^--only takes names among swiglu, .*, not 'softmax'$"):
        lab.run(lab.Args(only="softmax"))


@pytest.mark.slow
def test_a_case_in_the_interpreter_and_compiled():
    """In one process each, which the script starts by itself. It says what it did."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "NANOGLMV_"))}
    done = subprocess.run([sys.executable, "-m", "lab.kernels", "--only=rotary_qk"], cwd=ROOT,
                          env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for words in ("rotary_qk agrees", "rotary_qk A100", "rotary_qk H100", "rotary_qk B200",
                  "control: symmetric", "3. computed, not measured"):
        assert any(" ".join(line.split()).startswith(words) for line in lines), words
    assert "in Triton's interpreter" in done.stdout
