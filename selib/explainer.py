"""The forward pass that an explanation is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from selib.explanation import Explanation
from selib.forward import (
    Gated,
    Head,
    Inputs,
    attached,
    bare,
    call,
    evaluating,
    hooked,
    logits_of,
    tensors,
    to_device,
)
from selib.heatmap import input_space
from selib.images import Transform, are_images, prepared
from selib.layout import Space, grid_of, input_spaces
from selib.native import find_native
from selib.se import HeadSEBlock, SEBlock, TargetSEBlock

_OTHER_HEAD = (
    "the head is no longer the linear layer that the gates were attached to: call "
    "selib.detach_se(model), then attach them again"
)


def explain(model: nn.Module, inputs: Any, *, transform: Transform | None = None) -> Explanation:
    """Explain a batch with one forward pass and no gradients.

    Args:
        model: with an SE block attached by ``attach_se`` or ``fit_gates``, or with SE blocks of its own, of
            which the last one is read.
        inputs: a batch as the model takes it: a float tensor, a tuple of arguments or a dict of keyword
            arguments. Or images: uint8 (N, 3, H, W), NumPy (N, H, W, 3), PIL images, file names, a folder, or
            a list of any of these.
        transform: what turns a PIL image into what the model takes, such as ``weights.transforms()`` of
            torchvision. By default a timm network's own configuration, and that of ImageNet's classifiers for
            others: the shorter side to 256 pixels and the central 224 x 224. Arrays keep their size.

    Raises:
        TypeError: inputs of another kind.
        ValueError: the model has no SE block, does not return logits (B, K) or (B, T, K), or has another head
            than its block was attached to; an image cannot be read.
    """
    images = prepared(model, inputs, transform) if are_images(inputs) else None
    with SEExplainer(model) as explainer:
        ex = explainer(inputs if images is None else images.batch)
    if images is not None:
        ex._pixels = images.pixels
    return ex


class SEExplainer:
    """Explain many batches: ``with selib.SEExplainer(model) as explain: ex = explain(images)``.

    The hooks live as long as the ``with`` block. Model mode, gradients, buffers and outputs are untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self._hooks = ExitStack()
        self._places: dict[str, Gated] = {}
        self._maps: dict[str, Tensor] = {}  # in the order in which the blocks run
        self._gates: dict[str, Tensor] = {}
        self._grids: dict[str, Space] = {}
        self._last: tuple[nn.Linear, Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._places = {}

    def __call__(self, inputs: Inputs) -> Explanation:
        """One forward pass -> Explanation.

        Raises:
            ValueError: no SE block, or logits that are not (B, K) or (B, T, K).
        """
        place = next((p.device for p in self.model.parameters()), None)
        if place is not None and place.type != "meta" and any(t.device != place for t in tensors(inputs)):
            inputs = to_device(inputs, place)
        with evaluating(self.model):
            if not self._places:
                self._watch(inputs)
            self._last = None
            self._maps.clear()
            self._gates.clear()
            output = call(self.model, inputs)
            logits = logits_of(output, inputs)
            last = self._last if logits.ndim == 2 else None
            final = (last[0], last[1]) if last and (last[2] is logits or last[2] is output) else None
            for name in self._places.keys() - self._maps.keys():
                said = name or "of this model"
                raise ValueError(f"the SE block {said} was not run: forward took another path than before")
            found: dict[str, Explanation] = {}
            for name in self._maps:  # in the order in which the blocks ran
                before = [ex._head for ex in found.values()]
                found[name] = self._explanation(name, inputs, logits, final, before)
            self._maps.clear()
            self._gates.clear()
            self._last = None
        ex = found[list(found)[-1]]
        if list(found) != [""]:
            ex.streams = {name: found[name] for name in self._places}
        return ex

    def _watch(self, inputs: Inputs) -> None:
        """Set the hooks that read F and s off every block, and the last linear layer."""
        blocks = attached(self.model)
        for name, block in blocks.items():
            site = self.model.get_submodule(block.site)
            self._places[name] = Gated(block, block.vector, site, block.layout, block.prefix, block.gain)
        if not blocks:
            native = find_native(self.model, inputs)
            if native is None:
                raise ValueError(
                    "the model has no SE block: call selib.attach_se(model, example) and train it, or "
                    "selib.fit_gates(model, loader)"
                )
            module, gate = (self.model.get_submodule(name) for name in native)
            self._places = {"": Gated(module, gate, module)}

        def keep(store: dict[str, Any], name: str, read: Callable[..., Any]) -> Callable[..., None]:
            return lambda module, args, output: store.__setitem__(name, read(args, output))

        def linear(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
            self._last = module, args[0], output

        watched: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, place in self._places.items():
            watched.append((place.module, keep(self._maps, name, lambda args, output: args[0])))
            watched.append((place.gate, keep(self._gates, name, lambda args, output: output)))
        for name, block in blocks.items():
            if block.grid_from:
                shape = keep(self._grids, name, lambda args, output: tuple(output.shape[2:]))
                watched.append((self.model.get_submodule(block.grid_from), shape))
        watched += [(m, linear) for m in self.model.modules() if isinstance(m, nn.Linear)]
        self._hooks.enter_context(hooked(*watched))

    def _explanation(
        self,
        name: str,
        inputs: Inputs,
        logits: Tensor,
        last: tuple[nn.Linear, Tensor] | None,
        before: Sequence[Head],
    ) -> Explanation:
        place, raw = self._places[name], self._maps[name]
        if name not in self._gates:  # those of each target are computed where the linear layer stood
            raise ValueError(_OTHER_HEAD)
        block, gates = place.module, self._gates[name]
        scales = place.gain * gates
        if not isinstance(block, SEBlock):  # one that the model was born with
            gates, scales = gates.flatten(1), scales.flatten(1)
        elif not block.acts:
            scales = torch.ones(len(raw), block.channels, device=gates.device)
        head = Head(self.model, place, inputs, raw, logits, scales, last=last, before=before)
        # The gates of a block through the classifier are another layer's, if that is another one now.
        stale = isinstance(block, HeadSEBlock) and (last is None or last[0] is not block.layer)
        if stale or (isinstance(block, TargetSEBlock) and head.linear is None):
            raise ValueError(_OTHER_HEAD)
        grid = self._grid(name, raw, inputs)
        axes = len(grid) if grid else raw.ndim - 2
        own = inputs.get(name) if isinstance(inputs, Mapping) else None
        for given in (own, inputs):  # the input that the stream is named after goes before the others
            shown = [input_space(t.shape, axes, head.frames, head.time) for t in tensors(given)]
            sizes = {space for space in shown if space}
            if sizes:
                break
        return Explanation(logits, gates, raw, head, grid, sizes.pop() if len(sizes) == 1 else None)

    def _grid(self, name: str, raw: Tensor, inputs: Inputs) -> Space | None:
        """How the tokens of this input lie, which may differ from the example's."""
        block = self._places[name].module
        if not isinstance(block, SEBlock) or block.grid is None:
            return None
        if name in self._grids:
            return self._grids[name]
        count = raw.shape[2] if block.layout == "BC*" else raw.shape[1] - block.prefix
        return grid_of(count, block.grid, input_spaces(t.shape for t in tensors(inputs)))
