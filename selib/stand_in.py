"""Stored maps in place of the modules that made them, so that a model can run on many maps of one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.dstack)


class Beside(TorchFunctionMode):
    """Lets one sample's tensors stand beside the maps of many: they are repeated where both are joined."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _JOINS and args:
            count = max(len(part) for part in args[0])
            args = ([repeated(part, count) for part in args[0]], *args[1:])
        return func(*args, **(kwargs or {}))


def repeated(x: Tensor, count: int) -> Tensor:
    return x.expand(count, *x.shape[1:]) if x.ndim and len(x) == 1 else x


class Stored(nn.Module):
    """Stands in for a module, and returns a stored map whatever it is given."""

    def __init__(self, module: nn.Module, output: Tensor) -> None:
        super().__init__()
        vars(self)["module"] = module  # not registered as a part of this one
        self.output, self.calls = output, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.output.clone()  # what follows may work in place

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["module"], name)


@contextmanager
def standing_in(model: nn.Module, stand_ins: Iterable[Stored]) -> Iterator[None]:
    """Put the stand-ins in the places of their modules within the ``with`` block."""
    instead = {vars(one)["module"]: one for one in stand_ins}
    with ExitStack() as stack:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in instead:
                parent, _, own = name.rpartition(".")
                holder = model.get_submodule(parent)
                setattr(holder, own, instead[module])
                stack.callback(setattr, holder, own, module)
        yield
