"""Find the SE blocks that a model was born with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selib.forward import Inputs, bare, call, evaluating, hooked


def native_se(model: nn.Module, inputs: Inputs) -> str | None:
    """The name of the last SE block that the model itself has (MobileNetV3, EfficientNet, SENet …), or None.

    It is known by what it does: its output is its input times the (B, C, 1, …) output of one of its
    submodules.
    """
    found = find_native(bare(model), inputs)
    return found[0] if found else None


def find_native(model: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
    vectors: list[tuple[str, Tensor]] = []
    found: list[tuple[str, str]] = []

    def look(name: str, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim < 4 or not args or not isinstance(args[0], Tensor):
            return
        if output.shape[2:].numel() == 1:
            vectors.append((name, output))
        elif args[0].shape == output.shape:
            for inner, gates in reversed(vectors):
                inside = inner.startswith(f"{name}.") and gates.shape[:2] == output.shape[:2]
                if inside and torch.equal(args[0] * gates, output):
                    found.append((name, inner))
                    break

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: look(name, args, output)

    with evaluating(model), hooked(*((m, hook(name)) for name, m in model.named_modules() if name)):
        call(model, inputs)
    return found[-1] if found else None
