"""Put an SE block before the classifier of any model, in place, and take it out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from selib.forward import (
    Inputs,
    Linear,
    agrees,
    attached,
    bare,
    call,
    evaluating,
    hooked,
    logits_of,
    reads_mean,
    tensors,
)
from selib.layout import MapLayout, Space
from selib.se import (
    BLOCK,
    Form,
    HeadSEBlock,
    Layout,
    SEBlock,
    Start,
    TargetSEBlock,
    apply_block,
    apply_target_gates,
)
from selib.site import Site, a_copy, candidates, find_site, named_site

ATTRIBUTE = "selib_se"  # the name of the block in the model, and so the prefix of its parameters
PER_TARGET = "global average pooling + linear, with gates for each output: closed form"
WIDEST = 256  # units of a bottleneck, unless the reduction is said: wider ones cost seconds and gain nothing
HANDLE = "_selib_se_hook"  # a module whose output is gated carries its hook under this name


@dataclass(frozen=True)
class BlockOptions:
    """How an SE block is made; see :func:`attach_se`."""

    reduction: int | None = 16  # None: a bottleneck of 256 units at most, and r = 4 where there are many
    start: Start = "identity"
    layout: Layout | None = None
    grid: Space | None = None
    per_target: bool = False
    form: Form | None = "bottleneck"  # None: "head" where the head allows it


@overload
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: str | None = ...,
    reduction: int = ...,
    start: Start = ...,
    layout: Layout | None = ...,
    grid: Space | None = ...,
    per_target: bool = ...,
    form: Form = ...,
) -> SEBlock: ...
@overload
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: Mapping[str, str],
    reduction: int = ...,
    start: Start = ...,
    layout: Layout | None = ...,
    grid: Space | None = ...,
    per_target: bool = ...,
    form: Form = ...,
) -> dict[str, SEBlock]: ...
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: str | Mapping[str, str] | None = None,
    reduction: int = 16,
    start: Start = "identity",
    layout: Layout | None = None,
    grid: Space | None = None,
    per_target: bool = False,
    form: Form = "bottleneck",
) -> SEBlock | dict[str, SEBlock]:
    """Attach an SE block before the classification layer, in place (Roxo et al., 2024, section 3).

    No output changes (``start="identity"``), no parameter is renamed, and a checkpoint of the bare model
    still loads. :func:`describe` says where the block goes.

    Args:
        model: returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip. Bare
            or wrapped; evaluation mode is used and put back.
        example: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        at: the module whose output is the feature map, when the automatic choice is wrong; or {stream
            name: module} for several.
        reduction: r of the block's bottleneck.
        start: ``"identity"``, or ``"paper"`` for the usual initialisation with F' = s·F.
        layout: ``"BC*"`` or ``"B*C"`` when the shape of the map can be read both ways.
        grid: the spatial shape of a map of tokens (B, N, C), when it cannot be told.
        per_target: one SE vector for each of the K outputs (:class:`TargetSEBlock`), before a head that is
            global average pooling and one linear layer: gates (B, K, C), and so a map for each output.
        form: ``"head"``: gates through the classifier (:class:`HeadSEBlock`), before the same kind of head.

    Returns:
        The block, or {stream name: block}.

    Raises:
        ValueError: no spatial map, several side by side, an unknown module, an example that does not fit,
            blocks attached before, ``per_target`` or ``form="head"`` with another head or several streams, or
            an argument that is unknown.
    """
    options = BlockOptions(reduction, start, layout, grid, per_target, form)
    check_form(form, per_target)
    if not isinstance(at, Mapping):
        return attach_blocks(model, example, {"": at}, {"": options})[""]
    wrong = [name for name in at if not name or "." in name or hasattr(nn.ModuleDict, name)]
    if wrong or not at:
        raise ValueError(
            f"at={dict(at)}: it needs stream names without dots that are no methods of nn.ModuleDict"
        )
    if len(set(at.values())) < len(at):
        raise ValueError(f"at={dict(at)}: every stream needs a module of its own")
    if per_target or form == "head":
        said = "per_target=True" if per_target else 'form="head"'
        raise ValueError(f"{said} with the streams at={dict(at)}: it needs one module, whose map is averaged")
    return attach_blocks(model, example, at, dict.fromkeys(at, options))


def check_form(form: Form, per_target: bool) -> None:
    """Raise ValueError for a form that is unknown, or does not go with gates for each output."""
    if form not in ("bottleneck", "head"):
        raise ValueError(f'form={form!r} is unknown: use "bottleneck" or "head"')
    if per_target and form == "head":
        raise ValueError('per_target=True has bottlenecks of its own: leave form="head" out')


def attach_blocks(
    model: nn.Module, example: Inputs, at: Mapping[str, str | None], options: Mapping[str, BlockOptions]
) -> dict[str, SEBlock]:
    """:func:`attach_se` for streams that differ in their options.

    Args:
        at: {stream: module}; {"": module, or None to find it} for a single block without a stream.
        options: of each stream.
    """
    model = bare(model)
    if attached(model):
        raise ValueError("the model has an SE block already: call selib.detach_se(model) first")
    blocks: dict[str, SEBlock] = {}
    with torch.random.fork_rng(devices=[]):  # attaching must not shift the user's random numbers
        sites = {
            stream: named_site(model, example, where) if where is not None else find_site(model, example)
            for stream, where in at.items()
        }
        averaged = None
        for stream, site in sites.items():
            blocks[stream], averaged = _block(model, example, site, options[stream])
            blocks[stream].stream = stream
    for block in blocks.values():
        _hang(model, block)
    if averaged is not None and isinstance(blocks[""], TargetSEBlock):
        _hook(averaged, blocks[""], apply_target_gates)
    _home(model).add_module(ATTRIBUTE, blocks[""] if "" in blocks else nn.ModuleDict(blocks))
    _forget_compiled()
    return blocks


def _block(
    model: nn.Module, example: Inputs, site: Site, chosen: BlockOptions
) -> tuple[SEBlock, nn.Linear | None]:
    """The block for a site, and the linear layer of the head where the block is made for it."""
    found = _as_told(site, chosen)
    shared: dict[str, Any] = {"start": chosen.start, "layout": found.layout, "grid": found.grid}
    head: tuple[nn.Linear, bool] | None = None
    if chosen.per_target or chosen.form != "bottleneck":
        try:
            head = _linear_head(model, example, site, found)
        except ValueError:
            if chosen.per_target or chosen.form == "head":
                raise
    block: SEBlock
    if head is None or (chosen.form is None and head[0].out_features < 2):
        reduction = max(1, found.channels // WIDEST) if chosen.reduction is None else chosen.reduction
        block = SEBlock(found.channels, reduction, prefix=found.prefix, **shared)
    elif chosen.per_target:
        reduction = 4 if chosen.reduction is None else chosen.reduction
        outputs = head[0].out_features
        block = TargetSEBlock(found.channels, outputs, reduction, rectifies=head[1], **shared)
    else:
        block = HeadSEBlock(head[0], rectifies=head[1], **shared)
    block.site, block.frames, block.grid_from = site.name, site.frames, site.grid_from
    return block, head and head[0]


def _as_told(site: Site, options: BlockOptions) -> MapLayout:
    """The layout of a site, but for what the user said."""
    found = site.layout
    if options.layout and options.layout != found.layout:
        found = MapLayout(options.layout, site.shape[1 if options.layout == "BC*" else -1])
    if options.grid is None:
        return found
    count = site.shape[1 if found.layout == "B*C" else -1]
    prefix = count - torch.Size(options.grid).numel()
    if len(site.shape) != 3 or prefix < 0 or (prefix and found.layout == "BC*"):
        raise ValueError(f"grid={options.grid} does not fit the map {site.shape} of {site.name!r}")
    return MapLayout(found.layout, found.channels, prefix, tuple(options.grid))


def _linear_head(model: nn.Module, example: Inputs, site: Site, layout: MapLayout) -> tuple[nn.Linear, bool]:
    """The one linear layer between the mean of a map and the logits, and whether a ReLU precedes the mean.

    Raises:
        ValueError: if the head is anything else.
    """
    maps: list[Tensor] = []
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    # A copy of the map: an in-place ReLU may follow it.
    watch = [(model.get_submodule(site.name), lambda m, args, output: maps.append(output.clone()))]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    watch += [(m, lambda m, args, output: calls.append((m, args[0], output))) for m in layers]
    with evaluating(model), hooked(*watch):
        output = call(model, example)
        logits = logits_of(output)
        if calls and not layout.prefix and maps[0].ndim > 2:
            layer, into, made = calls[-1]
            rectifies = reads_mean(maps[0], layout.layout, into) if made is logits or made is output else None
            # A subclass may do more than its weights say.
            if rectifies is not None and agrees(Linear(layer)(into.float()), logits):
                return layer, rectifies
    raise ValueError(
        f"what follows {site.name!r} is not global average pooling and linear: leave per_target=True or "
        'form="head" out, or name the averaged map with at='
    )


def _hang(model: nn.Module, block: SEBlock) -> None:
    """Let the block act on the output of its module."""
    module = model.get_submodule(block.site)
    reference = next(iter(module.parameters()), next(iter(model.parameters()), torch.empty(0)))
    block.to(reference.device)
    block.train(model.training)
    _hook(module, block, apply_block)


def _hook(module: nn.Module, block: SEBlock, hook: Callable[..., Tensor]) -> None:
    # Past Module.__setattr__: the block is registered once, at home.
    vars(module)[BLOCK], vars(module)[HANDLE] = block, module.register_forward_hook(hook)


def _home(model: nn.Module) -> nn.Module:
    """The module that owns the block: the model, unless it is a Sequential, which would run it as a layer."""
    while isinstance(model, nn.Sequential):
        model = model[-1]
    return model


def detach_se(model: nn.Module) -> None:
    """Take every attached SE block out: the model is as it was before ``attach_se``, bit for bit.

    Raises:
        ValueError: if the model has no attached block.
    """
    model = bare(model)
    if not attached(model):
        raise ValueError("the model has no attached SE block")
    for module in list(model.modules()):
        if ATTRIBUTE in dict(module.named_children()):
            delattr(module, ATTRIBUTE)
        if BLOCK in vars(module):
            vars(module).pop(HANDLE).remove()
            del vars(module)[BLOCK]
    _forget_compiled()


def _forget_compiled() -> None:
    # Code that torch.compile made before does not notice that hooks come or go.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def describe(model: nn.Module, example: Inputs) -> None:
    """Print where the SE block of a model stands, or would go: site, layout, channels, grid, head,
    alternatives.

    Raises:
        ValueError: as :func:`attach_se`.
    """
    model = bare(model)
    blocks = attached(model)
    sites = {name: named_site(model, example, block.site) for name, block in blocks.items()}
    sites = sites or {"": find_site(model, example)}
    for name, site in sites.items():
        found, block = site.layout, blocks.get(name)
        if block is not None:
            found = MapLayout(block.layout, block.channels, block.prefix, block.grid)
        print(f"site      {site.name}" + (f"  (stream {name})" if name else ""))
        print(
            f"output    {site.shape}, channels {'first' if found.layout == 'BC*' else 'last'}: {found.layout}"
        )
        print(f"channels  {found.channels}")
        space = found.grid or (site.shape[2:] if found.layout == "BC*" else site.shape[1:-1])
        leading = f", after {found.prefix} tokens that are no positions" if found.prefix else ""
        print(f"grid      {' x '.join(map(str, space)) or 'none: a vector'}{leading}")
        per_target = isinstance(block, TargetSEBlock)
        print(f"head      {PER_TARGET if per_target else _head_of(model, example, site)}")
    with evaluating(probe := a_copy(model)):
        others, unread = candidates(probe, example, example)
    taken = [site.name for site in sites.values()]
    names = [site.name for site in others]
    inner = [name for name in names if any(name.startswith(f"{outer}.") for outer in (*names, *taken))]
    names = [str(s) for s in reversed(others) if s.name not in (*taken, *inner) and ATTRIBUTE not in s.name]
    print(f"others    {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else ""))
    if unread:
        print(f"unread    {', '.join(unread[-4:])}: name one with at=, layout= and grid=")


def _head_of(model: nn.Module, example: Inputs, site: Site) -> str:
    if site.frames:
        return "answers once a frame; its influence is measured by running the head"
    if len(tensors(example)) == 1:
        try:
            layer, rectifies = _linear_head(model, example, site, site.layout)
        except ValueError:
            return "not global average pooling + linear: its influence is measured by running the head"
        first = "ReLU, " if rectifies else ""
        return f"{first}global average pooling + linear to {layer.out_features} logits: closed form"
    return "its influence is measured by running the head"
