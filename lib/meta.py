"""Code that runs on meta tensors as it would on a GPU: what PyTorch has to be told for that.

A tensor on `meta` has a shape and a type, but no memory, so a step of any size runs in seconds. Two
things are missing then, and are provided here:

    values      Shapes can depend on small integers: tokens, the borders of documents, sizes of
                pictures. Where all values that an operation takes are known, it runs on the CPU as
                well, and the values of its results are known.
    lines       Of each operation, the line of this repository that it comes from. No line runs in
                a backward pass, so a node of the graph remembers that of its forward.

Two of PyTorch's modes tell what is called: `Functions` each function of torch, before autograd, and
`Operations` each operation that reaches the device, also those of the backward pass.
"""
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lib.common import ROOT

# These operations give memory as it is, or nothing: there are no values to know.
VALUELESS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "sym_size",
             "resize_", "set_", "_record_function_enter_new", "_record_function_exit"}
SMALL = 2 ** 22         # elements of the largest tensor whose values are computed


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def name_of(operation) -> str:
    """'mm' of torch.ops.aten.mm.default."""
    return operation._schema.name.split("::")[1]


class Operations(TorchDispatchMode):
    """Runs each operation, on meta tensors and on their values where all of them are known.

    ran: called after each on meta tensors, as ran(operation, args, kwargs, given, made): its
    arguments, the tensors among them, and the tensors that it has returned.
    """

    def __init__(self, ran: Callable):
        super().__init__()
        self.ran = ran
        self.values = WeakIdKeyDictionary()     # {meta tensor: its values, on the CPU}

    def value(self, x):
        """The values of a meta tensor, None where they are not known; anything else as it is."""
        return self.values.get(x) if isinstance(x, Tensor) and x.is_meta else x

    def put(self, x: Tensor) -> Tensor:
        """A tensor of the CPU on meta, with known values."""
        moved = x.to("meta")
        self.values[moved] = x
        return moved

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, to = name_of(operation), str(kwargs.get("device", ""))
        given = tensors((args, kwargs))
        known = [self.value(t) for t in given]
        if name == "_local_scalar_dense":       # what the host reads: float(x), x.item()
            return known[0].item() if known[0] is not None else 1
        if to.startswith("cpu") and given:      # x.cpu(): a large tensor stays on meta
            kwargs = {**kwargs, "device": "cpu" if args[0].numel() <= SMALL else "meta"}
            return operation(known[0] if known[0] is not None
                             else torch.zeros_like(args[0], device=kwargs["device"]), **kwargs)
        if to != "meta" and not any(t.is_meta for t in given):
            return operation(*args, **kwargs)

        if not all(t.is_meta or t.dim() == 0 for t in given):
            args, kwargs = tree_map(self._on_meta, (args, kwargs))
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._indices(args[1]), *args[2:])
        values = None
        if (given and all(v is not None and v.numel() <= SMALL for v in known)
                and name not in VALUELESS):
            values = operation(*tree_map(self.value, args), **tree_map(self.value, kwargs)
                               | ({"device": "cpu"} if to else {}))
        changes = operation._schema.is_mutable
        if values is not None and not changes and not operation.is_view:
            out = tree_map(lambda x: torch.empty_like(x, device="meta")
                           if isinstance(x, Tensor) else x, values)
        else:
            out = operation(*args, **kwargs)
            if changes and values is None:
                for t in tensors(args[0]):      # its values are no longer known
                    self.values.pop(t, None)
            if not given and not out.is_floating_point() and out.numel() <= SMALL:
                values = operation(*args, **kwargs | {"device": "cpu"})     # torch.arange
        made = tensors(out)
        if values is not None and not changes:
            self.values.update(zip(made, tensors(values)))
        self.ran(operation, args, kwargs, given, made)
        return out

    def _on_meta(self, x):
        return self.put(x) if isinstance(x, Tensor) and x.dim() and not x.is_meta else x

    def _indices(self, indices: list) -> list:
        """The indices of x[indices], with masks as the numbers of the elements that they choose."""
        found = []
        for x in indices:
            if x is not None and x.dtype == torch.bool and self.value(x) is not None:
                found += [self.put(chosen) for chosen in self.value(x).nonzero(as_tuple=True)]
            else:
                found.append(x)
        return found


class Functions(TorchFunctionMode):
    """Sees each call of a function of torch, but for those that the backward makes."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = kwargs or {}, args[0] if args else None
        if func == torch.Tensor.is_cuda.__get__:    # take the ways of a GPU
            return first.is_meta
        if func is torch.tensor and str(kwargs.get("device")) == "meta":
            return self.operations.put(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        if func is torch.Tensor.tolist and first.is_meta:
            known = self.operations.value(first)
            return (torch.ones(first.shape, dtype=first.dtype) if known is None else known).tolist()
        out = func(*args, **kwargs)
        for t in tensors(out) if torch.is_grad_enabled() else ():
            remember_line(t.grad_fn)
        return out


# ---- lines of ours ------------------------------------------------------------------------------

@functools.cache
def short_name(path: str) -> str:
    """A file's path in the repository; empty if it isn't ours, or one that only watches."""
    name = path.removeprefix(f"{ROOT}/")
    ours = name != path and "site-packages" not in path
    watches = name in ("lib/meta.py", "lib/roofline.py", "lib/dispatch.py")
    return name if ours and not watches else ""


def line_of_ours() -> str:
    """The line of this repository that runs now, as "model.py:210". In the backward pass no line
    runs: the one that the operation's forward came from."""
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_name == "_engine_run_backward":
            node = torch._C._current_autograd_node()
            return node.metadata.get("line", "backward") if node else "backward"
        if name := short_name(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def remember_line(node):
    """Write the line that runs now on this node of the graph, and on those before it that have
    none: one function of torch can make several."""
    todo, line = [node], ""
    while todo:
        node = todo.pop()
        if node is not None and "line" not in node.metadata:
            line = line or line_of_ours()
            node.metadata["line"] = line
            todo += [before for before, _ in node.next_functions]
