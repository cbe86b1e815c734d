"""An explanation that ships inside the model: one plain module, x -> (logits, gates, heatmap)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selib.atomic import replacing
from selib.attach import detach_se
from selib.explainer import explain
from selib.explanation import Explanation, Method, logit_weights, of_target, without
from selib.forward import Inputs, attached, bare, evaluating, logits_of, tensors
from selib.heatmap import interpolated, interpolation, unit, weighted_sum
from selib.images import are_images, prepared
from selib.native import find_native
from selib.se import BLOCK, HeadSEBlock, SEBlock, TargetSEBlock, channels_first
from selib.select import NormalQuantile, Select


class Slot:
    """Where a tensor lies until it is taken: no attribute of a module, which torch.export would put back."""

    value: Tensor | None = None

    def take(self) -> Tensor:
        value, self.value = self.value, None
        assert value is not None  # a pass of the model fills it
        return value


class Tap(nn.Module):
    """A module that keeps what it reads, or what it makes, in a slot."""

    def __init__(self, module: nn.Module, slot: Slot, *, reads: bool = False) -> None:
        super().__init__()
        self.module, self.slot, self.reads = module, slot, reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        self.slot.value = x if self.reads else y
        return y


class PerTarget(nn.Module):
    """A linear layer whose logits are each under the gates of its own target."""

    def __init__(self, layer: nn.Linear, block: TargetSEBlock) -> None:
        super().__init__()
        self.layer, self.block = layer, block

    def forward(self, z: Tensor) -> Tensor:
        return self.block.logits(self.layer, z, self.layer(z))


class Portable(nn.Module):
    """A network with its explanation, in tensors alone: no hooks, no gradients, no branches on values.

    Made by :func:`export`. ``torch.export``, ONNX, ``torch.compile`` and dynamic quantisation take it as they
    take any module. The batch may have any size, the input that of the example.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        ex: Explanation,
        method: Method,
        contrast: bool,
        select: Select | None,
        size: Sequence[int],
    ) -> None:
        super().__init__()
        head = ex._head
        self.method, self.select = method, select
        self.example = tuple(tensors(example))
        self.contrast = contrast and ex._shares_one()
        self.layout, self.prefix, self.rectifies, self.gain = (
            head.layout,
            head.prefix,
            head.rectifies,
            head.gain,
        )
        self.space = tuple(ex.features.shape[2:])
        self.map, self.vector = Slot(), Slot()
        self.block: SEBlock | None = None
        self.model = self._tapped(copy.deepcopy(bare(model)).eval(), example)
        self.acts = self.block is None or self.block.acts
        self.weight = None if head.linear is None else nn.Buffer(head.linear.weight.clone())
        self.matrices = nn.ParameterList(m.to(ex.logits.device) for m in interpolation(self.space, size))
        self.requires_grad_(False)

    def _tapped(self, model: nn.Module, example: Inputs) -> nn.Module:
        """The model with taps where F and the gates pass, and submodules in place of hooks."""
        block = self.block = attached(model).get("")
        if block is None:  # one that the model was born with
            found = find_native(model, example)
            assert found is not None  # it has been explained
            for name, slot, reads in ((found[1], self.vector, False), (found[0], self.map, True)):
                model.set_submodule(name, Tap(model.get_submodule(name), slot, reads=reads))
            return model
        gated = {name: m for name, m in model.named_modules() if BLOCK in vars(m)}
        detach_se(model)
        block.add_module("features", Tap(block.features, self.map))
        block.add_module("vector", Tap(block.vector, self.vector))
        for name, module in gated.items():
            if isinstance(module, nn.Linear) and isinstance(block, TargetSEBlock) and name != block.site:
                model.set_submodule(name, PerTarget(module, block))
            else:
                model.set_submodule(name, nn.Sequential(module, block))
        return model

    def forward(self, *inputs: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Explain a batch.

        Args:
            inputs: as the model takes them.
            target: classes (B,), int64; -1 stands for the predicted one, which is the default.

        Returns:
            Logits (B, K), gates (B, C), of the target where they depend on it, and the heatmap (B, *size) in
            [0, 1]; all float32.
        """
        logits = logits_of(self.model(*inputs)).float()
        raw, own = self.map.take(), self.vector.take().float()
        if not isinstance(self.block, TargetSEBlock):
            own = own.flatten(1)  # (B, C, 1, 1) of a block that the model was born with
        predicted = logits.argmax(1)
        targets = predicted if target is None else torch.where(target < 0, predicted, target)
        gates = of_target(own, targets)
        if target is not None and isinstance(self.block, HeadSEBlock):
            asked = self._asked(self.block, raw, targets, logits.shape[1])
            gates = torch.where(target[:, None] < 0, gates, asked)
        maps = channels_first(raw, self.layout, self.prefix).float().flatten(2).unflatten(2, self.space)
        maps = maps.relu() if self.rectifies else maps
        if self.method == "influence":
            drawn = weighted_sum(maps, self._influence_weights(maps, own, logits, targets)).relu()
        else:
            drawn = weighted_sum(maps, self._gate_weights(gates))
        flat = interpolated(drawn, list(self.matrices)).flatten(1)
        heatmap = unit(flat, flat.amin(1, keepdim=True), flat.amax(1, keepdim=True))
        return logits, gates, heatmap.unflatten(1, [len(m) for m in self.matrices])

    @staticmethod
    def _asked(block: HeadSEBlock, raw: Tensor, targets: Tensor, classes: int) -> Tensor:
        """The gates (B, C) of classes, in place of those of the network's own answer."""
        p = F.one_hot(targets, classes).to(block.offset)
        return block.opened(block.evidence(block.squeeze(raw), p))

    def _gate_weights(self, gates: Tensor) -> Tensor:
        mask = self._mask(gates)
        if self.method == "gate":
            return gates * mask
        return mask / mask.sum(1, keepdim=True).clamp_min(1)

    def _influence_weights(self, maps: Tensor, own: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        assert self.weight is not None
        means = maps.flatten(2).mean(2)
        scales = self.gain * own if self.acts else torch.ones_like(means)
        rest = without(logits, targets).softmax(1) if self.contrast else None
        weights = logit_weights(self.weight, targets, scales, rest)
        return weights * self._mask(weights * means)

    def _mask(self, ranking: Tensor) -> Tensor:
        """The channels that take part, bool (B, C): by ``select``, else the paper's rule or all."""
        rule = NormalQuantile() if self.select is None and self.method == "top-gate" else self.select
        if rule is None:
            return torch.ones_like(ranking, dtype=torch.bool)
        if not isinstance(rule, NormalQuantile):
            return rule.mask(ranking)
        above = rule.above(ranking)
        return above | (~above.any(1, keepdim=True) & rule.rest.mask(ranking))


def export(
    model: nn.Module,
    example: Any,
    method: Method = "influence",
    *,
    contrast: bool = False,
    select: Select | None = None,
    size: Sequence[int] | None = None,
) -> Portable:
    """The model and its explanation as one module, ``x -> (logits, gates, heatmap)``: see :class:`Portable`.

    It is a copy: the model stays as it is. What it gives is what :func:`selib.explain` gives.

    Args:
        model: with an SE block, attached or its own, that answers once for each sample.
        example: a batch that says the size of the input: a tensor, a tuple of them, or images as
            :func:`selib.explain` takes them.
        method, contrast, select, size: of the heatmap, see :meth:`selib.Explanation.heatmap`.

    Raises:
        ValueError: no SE block, several streams, an answer a frame, no spatial map, a method or contrast that
            does not fit; "influence" where the head is not global average pooling and one linear layer.
    """
    example = prepared(model, example).batch if are_images(example) else example
    ex = explain(model, example)
    if method not in ("influence", "gate", "top-gate"):
        raise ValueError(f'method={method!r}: "influence", "gate" and "top-gate" can be exported')
    if ex.streams or ex.logits.ndim == 3 or isinstance(example, Mapping):
        what = "SE blocks in several streams" if ex.streams else "an answer a frame"
        what = "keyword arguments" if isinstance(example, Mapping) else what
        raise ValueError(f"a model with {what} cannot be exported: wrap it so that it has none")
    if method == "influence" and ex._head.linear is None:
        raise ValueError(
            "influence needs a run of the head for each channel here, since the head is not global average "
            'pooling and one linear layer: export method="top-gate" or "gate"'
        )
    ex.heatmap(method, contrast=contrast, select=select, size=size)  # raises where there is none
    made = Portable(model, example, ex, method, contrast, select, size or ex.input_size or ())
    _check(made, ex, size)
    return made


def _check(made: Portable, ex: Explanation, size: Sequence[int] | None) -> None:
    """Run it once: a model that reaches into its modules may not bear taps."""
    remedy = "it reads the modules in another way than by calling them"
    try:
        with evaluating(made):
            logits, _, heatmap = made(*made.example)
    except Exception as error:
        raise ValueError(f"the model cannot be exported ({error}): {remedy}") from error
    expected = ex.heatmap(made.method, contrast=made.contrast, select=made.select, size=size)
    for got, want in ((logits, ex.logits), (heatmap, expected)):
        if not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the exported model answers differently: {remedy}")


def save_onnx(made: Portable, path: str | Path, **metadata: object) -> None:
    """Write an exported model to an ONNX file, whole or not at all.

    Its inputs are ``x`` (``x0``, ``x1``, … of several) and ``target`` (B,) int64, where -1 stands for the
    predicted class; its outputs ``logits``, ``gates`` and ``heatmap``. The batch may have any size.

    Args:
        metadata: what a reader of the file should know, such as ``classes``; each as JSON, by its name.

    Raises:
        ImportError: there is no onnx or onnxscript: ``pip install 'selib[onnx]'``.
    """
    given = tuple(x.expand(2, *x.shape[1:]) if len(x) == 1 else x for x in made.example)  # 1 would be fixed
    names = ["x"] if len(given) == 1 else [f"x{index}" for index in range(len(given))]
    batch = torch.export.Dim("batch", min=1)
    target = torch.full((len(given[0]),), -1, device=given[0].device)
    with evaluating(made, eager=False):
        program = torch.onnx.export(
            made,
            given,
            kwargs={"target": target},
            input_names=[*names, "target"],
            output_names=["logits", "gates", "heatmap"],
            dynamic_shapes={"inputs": tuple({0: batch} for _ in given), "target": {0: batch}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    metadata = {"method": made.method, "contrast": made.contrast, **metadata}
    for name, value in metadata.items():
        program.model.metadata_props[name] = json.dumps(value)
    with replacing(Path(path)) as part:
        program.save(part, external_data=False)
