"""Label-free gates for a network with several SE blocks, of streams side by side: they learn together.

    loss = mean over samples or frames of the divergence + λ · mean over blocks of mean(s)

The maps that one block reads depend on the gates of others, so the frozen network runs in every pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    decisions,
    evaluating,
    hooked,
    logits_of,
    tensors,
    to_device,
)
from selib.gates import check_fit, divergence, gradients_of, learning, refuse_trained, unless_it_fails


@dataclass(frozen=True)
class StreamGateReport:
    """What :func:`fit_stream_gates` reached on batches held out from the fit.

    ``agreement`` and ``agreement_positive`` are those of :class:`selib.GateReport`, over frames where there
    are any; ``open_gates`` is, for each stream, the share of gates above ½; ``held_out`` counts images or
    clips, ``epochs`` the passes, ``seconds`` those of the whole.
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
    """Train the SE blocks that ``attach_se(model, example, at={stream: module})`` attached; see
    :func:`selib.fit_gates`.

    Args:
        loader: can be iterated again and gives the same batches; one in ten of them is held out. Clips may
            differ in length from batch to batch.
        sparsity: λ.
        epochs: passes over the loader, by default enough for about 300 steps.

    Raises:
        ValueError: an argument out of range, no blocks or some that were trained with labels, fewer than two
            batches, or a loader that gives its batches only once.
    """
    check_fit(task, sparsity, epochs)
    once = isinstance(loader, Iterator)
    if once:
        raise ValueError(
            "the loader is an iterator, which gives its batches once, but several SE blocks take several "
            "passes: give a DataLoader or a list"
        )
    fit = _Fit(bare(model), loader, task)
    epochs = epochs or max(1, round(300 / (len(fit.teachers) - len(fit.held))))
    with unless_it_fails(list(fit.blocks.values())):
        fit.learn(sparsity, epochs, lr, seed, progress)
        report = fit.report(sparsity, epochs)
    return report


class _Fit:
    """A fit of all blocks of a model to its own logits, which are computed before the blocks start anew."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], task: Task) -> None:
        self.started = time.perf_counter()
        self.model, self.loader, self.task = model, loader, task
        self.blocks = attached(model)
        if not self.blocks:
            how = 'selib.attach_se(model, example, at={"stream": "module"})'
            raise ValueError(f"the model has no SE blocks: call {how}")
        self.teachers: list[Tensor] = []
        self.marks: list[list[float]] = []  # by which a batch is known again
        with evaluating(model), self.watched() as gates:
            for batch in loader:
                self.teachers.append(self.answers(batch))
                for name, s in gates.items():
                    if self.blocks[name].acts:
                        refuse_trained(self.blocks[name].gain * s)
                self.marks.append(_mark(batch))
        count = len(self.teachers)
        if count < 2:
            raise ValueError(
                f"batches in the loader: {count}, but fit_stream_gates needs at least two: one is held out"
            )
        self.held = {index for index in range(count) if index % 10 == 9} or {count - 1}

    def answers(self, batch: Any) -> Tensor:
        device = next(iter(self.model.parameters()), torch.empty(0)).device
        inputs = to_device(inputs_of(batch)[0], device)
        return logits_of(call(self.model, inputs), inputs).float()

    def batches(self) -> Iterator[tuple[int, Any]]:
        for index, batch in enumerate(self.loader):
            if index >= len(self.marks) or _mark(batch) != self.marks[index]:
                raise ValueError("the loader gives other batches in every pass: turn off its shuffling")
            yield index, batch

    @contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """The gates of the last pass, by stream."""
        gates: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: gates.__setitem__(name, output)

        with hooked(*((block.vector, keep(name)) for name, block in self.blocks.items())):
            yield gates

    def learn(self, sparsity: float, epochs: int, lr: float, seed: int, progress: bool) -> None:
        weights = [p for block in self.blocks.values() for p in block.parameters()]
        mine = {id(p) for p in weights}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]
        steps = epochs * (len(self.teachers) - len(self.held))
        with torch.random.fork_rng(devices=[]), learning(self.model, weights), self.watched() as gates:
            try:
                for p in frozen:
                    p.requires_grad_(False)
                torch.manual_seed(seed)
                for block in self.blocks.values():
                    block.restart("paper")
                    block.task = self.task
                optimizer = torch.optim.AdamW(weights, lr)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
                for _ in tqdm(range(epochs), desc=f"gates λ={sparsity:g}", disable=not progress, leave=False):
                    for index, batch in self.batches():
                        if index not in self.held:
                            student = self.answers(batch)
                            opened = torch.stack([s.mean() for s in gates.values()]).mean()
                            loss = divergence(self.teachers[index], student, self.task) + sparsity * opened
                            gradients_of(loss, weights)
                            optimizer.step()
                            schedule.step()
            finally:
                for p in frozen:
                    p.requires_grad_(True)

    def report(self, sparsity: float, epochs: int) -> StreamGateReport:
        agree, yes, samples = [], [], 0
        opened: dict[str, list[Tensor]] = {name: [] for name in self.blocks}
        with evaluating(self.model), self.watched() as gates:
            for index, batch in self.batches():
                if index in self.held:
                    wanted = decisions(self.teachers[index], self.task)
                    agree.append((decisions(self.answers(batch), self.task) == wanted).flatten().double())
                    yes.append((wanted if self.task == "multilabel" else wanted >= 0).flatten())
                    samples += len(wanted)
                    for name, s in gates.items():
                        opened[name].append((s > 0.5).double().flatten())
        positive = torch.cat(agree)[torch.cat(yes)]
        return StreamGateReport(
            sparsity=sparsity,
            agreement=float(torch.cat(agree).mean()),
            agreement_positive=float(positive.mean()) if len(positive) else 1.0,
            open_gates={name: float(torch.cat(shares).mean()) for name, shares in opened.items()},
            held_out=samples,
            epochs=epochs,
            seconds=time.perf_counter() - self.started,
        )


def _mark(batch: Any) -> list[float]:
    return [float(x.double().sum()) for x in tensors(inputs_of(batch)[0])]
