"""The exported module gives what explain gives: in PyTorch, torch.export, torch.compile, int8 and ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import K, TwoStreams, build, liven, random
from torch import Tensor, nn

import selib
from selib import Explanation, HeadSEBlock, TopFraction, attach_se, explain, export, native_se, save_onnx

# Architecture, and what can be exported of it.
BOTH, GATES = ("influence", "top-gate"), ("top-gate",)
MODELS = {
    "resnet": BOTH,
    "efficientnet": BOTH,
    "densenet": BOTH,
    "convnext": GATES,
    "vit": GATES,
    "swin": BOTH,
    "mobilenet_v3": GATES,  # its own SE block
    "r3d": BOTH,
    "conv1d": BOTH,
}


def model_of(name: str, form: str = "bottleneck") -> tuple[nn.Module, Tensor]:
    """A small network in evaluation mode with an SE block whose gates differ, and a batch for it."""
    if name == "conv1d":
        torch.manual_seed(0)
        pooled = [nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, K)]
        model, x = nn.Sequential(nn.Conv1d(2, 16, 5, padding=2), *pooled).eval(), random(2, 2, 50)
    else:
        model, x = build(name)
    liven(model)
    if native_se(model, x) and name == "mobilenet_v3":
        return model, x
    block = attach_se(model, x, start="paper", form=form)
    block.transparent = form == "head"
    if isinstance(block, HeadSEBlock):
        block.sharpness.fill_(4.0)
    return model, x


def expected(
    ex: Explanation, method: Any, target: Any = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return ex.logits, ex.gates_of(target), ex.heatmap(method, target, **options)


def same(found: Any, want: Any) -> None:
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_explain_says(name: str) -> None:
    model, x = model_of(name)
    for method in MODELS[name]:
        for options in (
            ({}, {"contrast": True}) if method == "influence" else ({}, {"select": TopFraction(0.3)})
        ):
            made = export(model, x, method, **options)
            for batch in (x, x[:1]):
                same(made(batch), expected(explain(model, batch), method, **options))
                asked = torch.arange(len(batch)) % K
                same(made(batch, target=asked), expected(explain(model, batch), method, asked, **options))
                some = asked.where(asked < 1, torch.tensor(-1))  # -1: the predicted one
                mixed = asked.where(asked < 1, explain(model, batch).predicted)
                same(made(batch, target=some), expected(explain(model, batch), method, mixed, **options))


@pytest.mark.parametrize("name", ["resnet", "densenet", "conv1d"])
def test_gates_through_the_classifier_are_those_of_the_target(name: str) -> None:
    model, x = model_of(name, "head")
    made = export(model, x, "top-gate")
    ex = explain(model, x)
    same(made(x), expected(ex, "top-gate"))
    same(made(x, target=torch.full((len(x),), 2)), expected(ex, "top-gate", 2))
    assert (made(x, target=torch.full((len(x),), -1))[1] == made(x)[1]).all()
    assert not torch.allclose(made(x)[1], made(x, target=torch.full((len(x),), 2))[1])


def test_gates_for_each_output_act_in_the_copy_as_in_the_model() -> None:
    model, x = build("resnet")
    liven(model)
    attach_se(model, x, start="paper", per_target=True)
    for method in BOTH:
        for contrast in (False, True) if method == "influence" else (False,):
            made = export(model, x, method, contrast=contrast)
            for target in (None, 1):
                asked = None if target is None else torch.full((len(x),), target)
                want = expected(explain(model, x), method, target, contrast=contrast)
                same(made(x, target=asked), want)


def test_the_model_stays_as_it_is_and_the_copy_has_no_hooks() -> None:
    model, x = model_of("resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(x)
    made = export(model, x)
    assert not any(module._forward_hooks for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), logits)
    nn.init.zeros_(model.fc.weight)
    assert torch.equal(made(x)[0], logits)  # a copy: its weights are its own


def test_torch_export_compile_and_int8_take_it() -> None:
    model, x = model_of("resnet", "head")
    made = export(model, x, "influence", contrast=True)
    want = made(x)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(made, (x,), dynamic_shapes={"inputs": ({0: batch},)}).module()
    same(program(x), want)
    same(program(x[:1]), made(x[:1]))
    same(torch.compile(made, backend="aot_eager")(x), want)
    small = torch.ao.quantization.quantize_dynamic(made, {nn.Linear}, dtype=torch.qint8)
    found = small(x)
    assert not torch.equal(found[0], want[0])  # it is another network, a little
    assert (found[0] - want[0]).abs().max() < 0.1 * want[0].abs().max()
    assert (found[2] - want[2]).abs().mean() < 0.05


ALONE = """
import json, sys
import numpy as np, onnxruntime
folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
    given = np.load(f"{folder}/{name}.npz")
    for number in range(int(given["runs"])):
        inputs = {"x": given[f"x{number}"], "target": given[f"target{number}"]}
        found = session.run(["logits", "gates", "heatmap"], inputs)
        np.savez(f"{folder}/{name}-{number}.npz", *found)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_onnxruntime_gives_the_same_in_a_process_without_torch(tmp_path: Path) -> None:
    """Seven architectures, batches of one and of five, the predicted class and one that is asked for."""
    cases, wants = [], {}
    for name, methods in {**MODELS, "densenet": (), "swin": ()}.items():
        for form in ("bottleneck", "head") if name == "conv1d" else ("bottleneck",):
            model, x = model_of(name, form)
            for method in methods:
                options = {"contrast": True} if method == "influence" else {}
                case = f"{name}-{form}-{method}"
                save_onnx(export(model, x, method, **options), tmp_path / f"{case}.onnx")
                given: dict[str, Any] = {"runs": 4}
                for number, (count, target) in enumerate([(1, None), (5, None), (1, 2), (5, 3)]):
                    batch = random(count, *x.shape[1:], seed=number)
                    given[f"x{number}"] = batch.numpy()
                    given[f"target{number}"] = np.full(count, -1 if target is None else target)
                    wants[case, number] = expected(explain(model, batch), method, target, **options)
                np.savez(tmp_path / f"{case}.npz", **given)
                cases.append(case)
    subprocess.run([sys.executable, "-c", ALONE, tmp_path, *cases], check=True)
    for (case, number), want in wants.items():
        found = list(np.load(tmp_path / f"{case}-{number}.npz").values())
        worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, want, strict=True))
        assert worst <= 1e-4, (case, number, worst)


def test_the_file_says_what_it_is_and_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = model_of("conv1d")
    made = export(model, x)
    path = tmp_path / "deep" / "m.onnx"
    save_onnx(made, path, classes=["a", "b"])
    found = onnx.load(path)
    said = {entry.key: json.loads(entry.value) for entry in found.metadata_props}
    assert said["method"] == "influence" and said["classes"] == ["a", "b"] and said["contrast"] is False
    assert [x.name for x in found.graph.input] == ["x", "target"]
    assert [x.name for x in found.graph.output] == ["logits", "gates", "heatmap"]
    before = path.read_bytes()

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(RuntimeError, match="no"):
        save_onnx(made, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["m.onnx"]


class Peeks(nn.Module):
    """A network that reads more of its feature module than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3))) + self.body.weight.mean()


def test_what_cannot_be_exported_is_refused_with_the_reason() -> None:
    model, x = model_of("convnext")
    with pytest.raises(ValueError, match="influence needs a run of the head for each channel here"):
        export(model, x)
    model, x = model_of("resnet")
    with pytest.raises(ValueError, match=r'"influence", "gate" and "top-gate" can be exported'):
        export(model, x, "gated-influence")
    with pytest.raises(ValueError, match='contrast=True belongs to "influence"'):
        export(model, x, "gate", contrast=True)
    with pytest.raises(ValueError, match="does not fit"):
        export(model, x, size=(3,))
    with pytest.raises(ValueError, match="no SE block"):
        export(build("resnet")[0], x)
    streams, inputs = TwoStreams().eval(), (random(2, 3, 16, 16), random(2, 1, 16, 16))
    attach_se(streams, inputs, at={"face": "face_encoder", "body": "body_encoder"})
    with pytest.raises(ValueError, match="several streams"):
        export(streams, inputs)
    peeking = Peeks().eval()
    attach_se(peeking, torch.zeros(1, 3, 16, 16), at="body")
    with pytest.raises(ValueError, match="it reads the modules in another way than by calling them"):
        export(peeking, torch.zeros(1, 3, 16, 16), "gate")


def test_several_inputs_are_named_in_their_order(tmp_path: Path) -> None:
    model, x = build("two inputs")
    attach_se(model, x, start="paper")
    made = export(model, x, "top-gate")
    same(made(*x), expected(explain(model, x), "top-gate"))
    save_onnx(made, tmp_path / "m.onnx")
    assert [x.name for x in onnx.load(tmp_path / "m.onnx").graph.input] == ["x0", "x1", "target"]


def test_a_size_of_ones_own() -> None:
    model, x = model_of("resnet")
    same(export(model, x, size=(20, 31))(x), expected(explain(model, x), "influence", size=(20, 31)))
    assert selib.export is export
