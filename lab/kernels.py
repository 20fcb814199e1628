"""Every Triton kernel of ours: is it right, what does its machine code say, how fast could it be?

    python -m lab.kernels                      all of them; minutes
    python -m lab.kernels --only=swiglu,gram   some of CASES
    python -m lab.kernels --part=compile       check, compile or time alone

1. check      the kernel beside the plain PyTorch that says what it computes, over odd shapes and
              types, forward and backward: on an NVIDIA GPU, or else in Triton's interpreter, which
              runs kernels on the CPU, slowly
2. compile    for the A100, H100 and B200 (sm_80, 90, 100), with or without a GPU: registers and
              shared memory of a program; spills, which are registers moved to memory and back, as
              they do not suffice: there must be none; and instructions of the tensor cores, which
              matrix products need. A kernel with far too few threads has to show spills: otherwise
              they are not counted at all
3. time       at the shapes of `base`, forward and backward: measured on a GPU, with the share of
              what lib/roofline.py allows, and peak memory; elsewhere what it allows on an H100,
              beside plain PyTorch

The interpreter has to be chosen before Triton is imported, and compiling needs it off: so parts 1
and 2 run in processes of their own.
"""
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import (
    add_norm, attention, gram, linear_cross_entropy, linear_logp, norm_add, norm_rotary, poly,
    rotary_qk, Segments, sigmoid_loss, swiglu)
from lib import attention as attention_module, dispatch, losses, rotary, sigmoid
from lib.cli import check_options, cli, main, UserError
from lib.common import ROOT
from lib.roofline import find_machine, KERNEL_FLOPS, MACHINES, Trace
from vit import RMSNorm

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}
ROUNDS = 20         # measurements of a case on a GPU


@dataclass
class Args:
    part: Literal["all", "check", "compile", "time"] = "all"
    only: str = ""                # names of CASES, with commas; default: all


# ---- the cases ----------------------------------------------------------------------------------

@dataclass
class Inputs:
    """Makes random tensors, or on meta tensors without values."""
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape, dtype=None) -> Tensor:
        """One that gets a gradient."""
        x = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return x.requires_grad_()

    def rows(self, *shape) -> Tensor:
        """Rows of length 1, in fp32."""
        return F.normalize(torch.randn(shape, device=self.device), dim=-1).requires_grad_()

    def below(self, end: int, *shape) -> Tensor:
        return torch.randint(end, shape, device=self.device)

    def weights(self, *shape) -> Tensor:
        return torch.rand(shape, device=self.device)

    def rotations(self, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        x = 3 * torch.randn(tokens, channels // 2, device=self.device)
        return x.cos(), x.sin()

    def norm(self, channels: int) -> RMSNorm:
        return RMSNorm(channels, 1e-5).to(self.device, self.dtype)

    def documents(self, *lengths: int, causal: bool) -> Segments:
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        return Segments(borders.to(self.device), causal, host=borders)


@dataclass
class Case:
    """A public function: how to call it at some shape, odd shapes to check, that of `base`."""
    name: str
    call: Callable          # call(inputs, *shape) -> (function, the tensors that it takes)
    odd: list[tuple]
    base: tuple
    types: tuple = (torch.float32, torch.bfloat16)


def symmetric(make: Inputs, count: int, rows: int) -> Tensor:
    x = make.normal(count, rows, rows).detach()
    return (x + x.mT) / rows


def cross_entropy(make: Inputs, rows: int, width: int, words: int):
    targets, weights = make.below(words, rows), make.weights(rows)
    used = torch.arange(rows, device=make.device)
    return (lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, weights,
                                                        used=used),
            [make.normal(rows, width), make.normal(words, width)])


def log_probabilities(make: Inputs, rows: int, width: int, words: int):
    targets = make.below(words, rows)
    return (lambda hidden, weight: linear_logp(hidden, weight, targets)[0],
            [make.normal(rows, width), make.normal(words, width)])


def with_norms(make: Inputs, tokens: int, heads: int, channels: int):
    norms, (cos, sin) = [make.norm(channels)] * 2, make.rotations(tokens, channels)
    return (lambda qkv: norm_rotary(qkv, *norms, cos, sin),
            [make.normal(tokens, 3, heads, channels)])


def with_rotations(make: Inputs, tokens: int, heads: int, groups: int, channels: int):
    cos, sin = make.rotations(tokens, channels)
    return (lambda q, k: rotary_qk(q, k, cos, sin),
            [make.normal(tokens, heads, channels), make.normal(tokens, groups, channels)])


def in_documents(make: Inputs, causal: bool, heads: int, groups: int, channels: int, *lengths):
    segments = make.documents(*lengths, causal=causal)
    return (lambda q, k, v: attention(q, k, v, segments),
            [make.normal(sum(lengths), n, channels) for n in (heads, groups, groups)])


ODD = [(0, 31), (1, 3), (5, 97)]                    # rows, width
CASES = [
    Case("swiglu", lambda make, rows, width: (
        swiglu, [make.normal(rows, width), make.normal(rows, width)]), ODD, (20_480, 4096)),
    Case("swiglu_of_both", lambda make, rows, width: (
        swiglu, [make.normal(rows, 2 * width)]), ODD, (16_384, 4608)),
    Case("add_norm", lambda make, rows, width: (
        add_norm, [make.normal(rows, width), make.normal(rows, width), make.normal(width)]),
        ODD, (20_480, 1024)),
    Case("add_norm_of_norm", lambda make, rows, width: (
        lambda x, residual, weight, inner: add_norm(x, residual, weight, inner=inner),
        [make.normal(rows, width), make.normal(rows, width), make.normal(width),
         make.normal(width)]), ODD, (16_384, 1536)),
    Case("norm_add", lambda make, rows, width: (
        norm_add, [make.normal(rows, width), make.normal(rows, width), make.normal(width)]),
        ODD, (16_384, 1536)),
    Case("gram", lambda make, count, rows, width: (
        gram, [make.normal(count, rows, width).detach()]), [(2, 5, 97), (1, 130, 3)],
        (16, 1536, 4608)),
    Case("poly", lambda make, count, rows: (
        poly, [symmetric(make, count, rows)]), [(2, 5), (1, 130)], (16, 1536)),
    Case("linear_cross_entropy", cross_entropy, [(1, 8, 1), (5, 16, 97)],
         (3072, 1536, 59_392)),
    Case("linear_logp", log_probabilities, [(1, 8, 1), (5, 16, 97)], (3072, 1536, 59_392)),
    Case("norm_rotary", with_norms, [(0, 1, 8), (5, 3, 10), (17, 2, 130)], (20_480, 16, 64)),
    Case("rotary_qk", with_rotations, [(1, 1, 1, 2), (5, 6, 3, 10)], (16_384, 16, 8, 128)),
    Case("attention", in_documents, [(True, 4, 2, 8, 5, 0, 17, 1, 17), (False, 2, 1, 5, 3, 1, 70)],
         (True, 16, 8, 128, *[128] * 128)),
    Case("sigmoid_loss", lambda make, images, texts, width: (
        sigmoid_loss, [make.rows(images, width), make.rows(texts, width),
                       make.normal(dtype=torch.float32), make.normal(dtype=torch.float32)]),
        [(1, 1, 1), (3, 130, 5), (129, 65, 70)], (8192, 8192, 1024), (torch.float32,))]


def chosen(args: Args) -> list[Case]:
    """The cases that --only names. Raises UserError where there is no such case."""
    names = [case.name for case in CASES]
    wanted = args.only.split(",") if args.only else names
    for name in wanted:
        if name not in names:
            raise UserError(f"--only takes names among {', '.join(names)}, not '{name}'")
    return [case for case in CASES if case.name in wanted]


def kernel_or_twin(kernel: bool):
    """Let the functions launch their kernels, or not; for attention ours, not the library's."""
    attention_module.CHOICE, dispatch.FORCED = "triton", "1" if kernel else "0"


def results(case: Case, shape: tuple, dtype: torch.dtype, device, kernel: bool) -> list[Tensor]:
    """What a case returns, and the gradients of all that it takes, from random numbers that are the
    same in each call."""
    kernel_or_twin(kernel)
    torch.manual_seed(0)
    function, given = case.call(Inputs(device, dtype), *shape)
    outs = function(*given)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    if outs[0].requires_grad:
        torch.autograd.backward(outs, [torch.randn_like(x) for x in outs])
    return [x.detach() for x in outs] + [x.grad for x in given if x.grad is not None]


# ---- 1. check -----------------------------------------------------------------------------------

def check(args: Args, device: torch.device) -> bool:
    """Compare each kernel with its twin; returns whether all agree. Errors are shares of the
    largest value: fp32 keeps 7 digits, bf16 2 to 3, and the interpreter cuts where a GPU rounds."""
    fine = True
    for case in chosen(args):
        found = {}
        for dtype in case.types:
            for shape in case.odd:
                got, want = (results(case, shape, dtype, device, kernel)
                             for kernel in (True, False))
                errors = map(distance, got, want) if len(got) == len(want) else [float("inf")]
                found[dtype] = max(found.get(dtype, 0.0), *errors)
        agrees = all(error <= (1e-4 if dtype == torch.float32 else 0.03)
                     for dtype, error in found.items())
        fine &= agrees
        print(f"{case.name:<22}{'agrees' if agrees else 'DIFFERS':<9}"
              f"{len(case.odd)} shapes; largest error "
              + ", ".join(f"{error:.1e} in {str(dtype)[6:]}" for dtype, error in found.items()),
              flush=True)
    return fine


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where the shape or type is
    another one."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max() / (want.double().abs().max() + 1e-2)
    return float(error) if error == error else float("inf")


# ---- 2. compile ---------------------------------------------------------------------------------

def compile_for(kernel, arch: int, types: dict, constants: dict) -> dict[str, int]:
    """Compile a kernel for a GPU that need not be here, by the ptxas that Triton brings, and read
    the machine code. types: {argument: "*bf16", "i32", ...}; constants: the others, and num_warps
    and num_stages. Triton compiles another code where an argument is a multiple of 16, as all those
    of `base` are but the number of key heads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    names = kernel.jit.arg_names
    source = ASTSource(
        kernel.jit, {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
         if name not in constants and types[name] != "fp32" and name not in (
             "groups", "repeat", "pair")})
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tool, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ("-res-usage", "-sass"))
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "shared": made.metadata.shared,
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),     # loads and stores of registers
            "tensor_core": len(re.findall(r"\b\w*(?:HMMA|HGMMA|UTC\w*MMA)\b", code))}


def compile_all(args: Args) -> bool:
    """Compile the kernels that the cases launch, at their configurations; returns whether they are
    as they should be."""
    fine, h100 = True, find_machine("H100")
    launched = {name for case in chosen(args) for _, name in allowed(case, h100, True).costs}
    entries = [entry for module in (kernels, losses, rotary, attention_module, sigmoid)
               for entry in module.KERNELS]
    print(f"{'kernel':<24}{'GPU':<7}{'registers':>9}{'shared kB':>11}{'spills':>8}"
          f"{'tensor cores':>14}")
    for kernel, types, constants in entries:
        for arch, gpu in ARCHITECTURES.items() if kernel.name in launched else ():
            found = compile_for(kernel, arch, types, constants)
            slow = kernel.name in KERNEL_FLOPS and not found["tensor_core"]
            wrong = found["spills"] > 0 or slow
            fine &= not wrong
            print(f"{kernel.name:<24}{gpu:<7}{found['registers']:>9}{found['shared'] / 1024:>11.1f}"
                  f"{found['spills']:>8}{found['tensor_core']:>14}{'   WRONG' if wrong else ''}",
                  flush=True)
    kernel, types, constants = next(e for e in entries if e[0].name == "symmetric")
    spills = compile_for(kernel, 90, types, constants | {"num_warps": 1})["spills"]
    print(f"control: symmetric with 1 warp instead of {constants['num_warps']} has {spills} spills"
          + ("" if spills else ": WRONG, spills are not seen"))
    return fine and spills > 0


# ---- 3. time ------------------------------------------------------------------------------------

def allowed(case: Case, machine, kernel: bool) -> Trace:
    """What the roofline allows at the shape of `base`, forward and backward."""
    trace = Trace(machine)
    kernel_or_twin(kernel)
    with trace:
        function, given = case.call(Inputs(torch.device("meta"), case.types[-1]), *case.base)
        trace.begin("forward")
        outs = function(*given)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if outs[0].requires_grad:
            trace.begin("backward")
            torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])
        trace.begin("")
    return trace


def measure(case: Case, device: torch.device, kernel: bool):
    """Seconds of a forward and backward on a GPU, and the peak of its memory in bytes. Random
    numbers are made in them too, which takes some of the time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(ROUNDS + 3):
        if i == 3:                      # compiled, and caches are warm
            torch.cuda.reset_peak_memory_stats(device)
            start.record()
        results(case, case.base, case.types[-1], device, kernel)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / ROUNDS, torch.cuda.max_memory_allocated(device)


def time_all(args: Args, device: torch.device):
    """Print time and memory of each case beside its twin's: measured, or what an H100 allows."""
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    machine = find_machine(next((name for name in MACHINES if name in here), "H100"))
    print(f"at the shapes of base, forward and backward; the roofline is that of an {machine}, "
          "computed" + (f"; measured on {here}" if here else ""))
    print(f"{'case':<22}{'roofline ms':>12}{'plain ms':>10}{'GB':>7}{'TFLOP':>7}"
          + f"{'measured ms':>13}{'plain ms':>10}{'share':>7}{'peak GB':>9}" * bool(here))
    for case in chosen(args):
        fused, plain = (allowed(case, machine, kernel).total() for kernel in (True, False))
        line = (f"{case.name:<22}{1000 * fused.seconds:>12.3f}{1000 * plain.seconds:>10.3f}"
                f"{fused.bytes / 1e9:>7.2f}{fused.flops / 1e12:>7.2f}")
        if here:
            (seconds, memory), (other, _) = (measure(case, device, k) for k in (True, False))
            line += (f"{1000 * seconds:>13.3f}{1000 * other:>10.3f}{fused.seconds / seconds:>7.0%}"
                     f"{memory / 1e9:>9.2f}")
        print(line, flush=True)


# ---- which of them here -------------------------------------------------------------------------

def in_a_process(part: str, args: Args, interpreted: bool) -> bool:
    """Run one part in a process of its own; returns whether it found nothing wrong."""
    environment = os.environ | {"NANOGLMV_KERNELS": "1", "TRITON_INTERPRET": str(int(interpreted))}
    words = [sys.executable, "-m", "lab.kernels", f"--part={part}", f"--only={args.only}"]
    return subprocess.run(words, env=environment, cwd=ROOT).returncode == 0


def run(args: Args):
    check_options(args)
    chosen(args)
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device = torch.device("cuda" if gpu else "cpu")
    inside = gpu or dispatch.triton is not None and dispatch.INTERPRETED
    fine = True
    if args.part in ("all", "check"):
        where = "on this GPU" if gpu else "in Triton's interpreter, on the CPU"
        if inside:
            print(f"1. checked {where}")
            fine &= check(args, device)
        else:
            fine &= in_a_process("check", args, interpreted=True)
    if args.part in ("all", "compile"):
        if args.part == "compile" and dispatch.triton and not dispatch.INTERPRETED:
            print("2. compiled for GPUs that need not be here")
            fine &= compile_all(args)
        else:
            fine &= in_a_process("compile", args, interpreted=False)
    if args.part in ("all", "time"):
        print("3. " + ("measured" if gpu else "computed, not measured: there is no GPU here"))
        time_all(args, device)
    if not fine and args.part == "all":
        raise UserError("a kernel is not as it should be: see above")
    if not fine:                                    # said by the process that has started this one
        sys.exit(1)


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
