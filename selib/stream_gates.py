"""Label-free gates for a network with several SE blocks, of streams side by side: they learn together.

    loss = mean over samples or frames of the divergence + λ · mean over blocks of mean(s)

The maps that one block reads depend on the gates of others, so the frozen network runs in every pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib.features import inputs_of
from selib.forward import (
    Task,
    attached,
    bare,
    call,
    check_task,
    decisions,
    evaluating,
    hooked,
    logits_of,
    to_device,
)
from selib.gates import divergence, learning, stepper


@dataclass(frozen=True)
class StreamGateReport:
    """What :func:`fit_stream_gates` reached on batches held out from the fit.

    ``agreement`` and ``agreement_positive`` are those of :class:`selib.GateReport`, over frames where there are any;
    ``open_gates`` is, for each stream, the share of gates above ½; ``held_out`` counts images or clips, ``epochs``
    the passes, ``seconds`` those of the whole.
    """

    sparsity: float
    agreement: float
    agreement_positive: float
    open_gates: dict[str, float]
    held_out: int
    epochs: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, for a results file."""
        return asdict(self)


def fit_stream_gates(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float = 1.0,
    *,
    task: Task = "multiclass",
    epochs: int | None = None,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = False,
) -> StreamGateReport:
    """Train the SE blocks that ``attach_se(model, example, at={stream: module})`` attached; see :func:`selib.fit_gates`.

    Args:
        loader: can be iterated again and gives the same batches; one in ten of them is held out. Clips may differ in
            length from batch to batch.
        sparsity: λ.
        epochs: passes over the loader, by default enough for about 300 steps.

    Raises:
        ValueError: an argument out of range, no blocks, fewer than two batches, or a loader that gives its batches
            only once.
    """
    check_task(task)
    model = bare(model)
    blocks = attached(model)
    if not blocks:
        raise ValueError(
            'the model has no SE blocks: call selib.attach_se(model, example, at={"stream": "module"})'
        )
    if isinstance(loader, Iterator):
        raise ValueError(
            "the loader is an iterator, which gives its batches once, but several SE blocks are fitted in several "
            "passes: give what can be iterated again, such as a DataLoader or a list"
        )
    if sparsity < 0:
        raise ValueError(f"sparsity={sparsity}: it must be 0 or more")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    started = time.perf_counter()
    device = next(iter(model.parameters()), torch.empty(0)).device
    weights = [p for block in blocks.values() for p in (*block.fc1.parameters(), *block.fc2.parameters())]
    frozen = [p for p in model.parameters() if p.requires_grad and all(p is not w for w in weights)]

    def answers(batch: Any) -> Tensor:
        inputs = to_device(inputs_of(batch)[0], device)
        return logits_of(call(model, inputs), inputs).float()

    with evaluating(model):
        teachers = [answers(batch) for batch in loader]
    if len(teachers) < 2:
        raise ValueError(
            f"batches in the loader: {len(teachers)}, but fit_stream_gates needs at least two: one is held out"
        )
    held = {index for index in range(len(teachers)) if index % 10 == 9} or {len(teachers) - 1}
    epochs = epochs or max(1, round(300 / (len(teachers) - len(held))))
    gates: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: gates.__setitem__(name, output)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for p in frozen:
            stack.callback(p.requires_grad_, True)
            p.requires_grad_(False)
        stack.enter_context(learning(model, weights))
        stack.enter_context(hooked(*((block.vector, keep(name)) for name, block in blocks.items())))
        torch.manual_seed(seed)
        for block in blocks.values():
            block.restart("paper")
        step = stepper(weights, lr, epochs * (len(teachers) - len(held)))
        total = epochs * len(teachers)
        bar = stack.enter_context(
            tqdm(total=total, desc=f"gates λ={sparsity:g}", disable=not progress, leave=False)
        )
        for _ in range(epochs):
            for index, batch in enumerate(loader):
                bar.update()
                if index not in held:
                    student = answers(batch)
                    open_share = torch.stack([s.mean() for s in gates.values()]).mean()
                    step(divergence(teachers[index], student, task) + sparsity * open_share)
        with torch.no_grad():
            tested = [
                (teachers[i], answers(batch), dict(gates)) for i, batch in enumerate(loader) if i in held
            ]
    return _report(tested, list(blocks), task, sparsity, epochs, time.perf_counter() - started)


def _report(
    tested: list[tuple[Tensor, Tensor, dict[str, Tensor]]],
    streams: list[str],
    task: Task,
    sparsity: float,
    epochs: int,
    seconds: float,
) -> StreamGateReport:
    """The report on held-out batches: logits of the network as it was, with the new gates, and the gates."""
    right, yes = [], []
    for teacher, student, _ in tested:
        wanted = decisions(teacher, task)
        right.append((decisions(student, task) == wanted).flatten())
        yes.append((wanted if task == "multilabel" else torch.ones_like(wanted)).flatten().bool())
    agree, positive = torch.cat(right).double(), torch.cat(yes)
    opened = {name: torch.cat([(gates[name] > 0.5).flatten() for _, _, gates in tested]) for name in streams}
    return StreamGateReport(
        sparsity=sparsity,
        agreement=float(agree.mean()),
        agreement_positive=float(agree[positive].mean()) if bool(positive.any()) else 1.0,
        open_gates={name: float(share.double().mean()) for name, share in opened.items()},
        held_out=sum(len(teacher) for teacher, _, _ in tested),
        epochs=epochs,
        seconds=seconds,
    )
