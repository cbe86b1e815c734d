"""Attaching: the right place in every architecture, no trace on the model, and none left after detaching."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import tiny_models as zoo
import torch
import torch.nn.functional as F
import torchvision
from tiny_models import K, hooks, image, open_and_close, random, run, same, snapshot
from torch import Tensor, nn

import selib
from selib.attach import attach_se, detach_se
from selib.forward import attached, bare, call, logits_of
from selib.layout import map_layout
from selib.site import find_site

# ---- the site ----------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_attaching_is_invisible_and_detaching_leaves_nothing(name: str) -> None:
    model, example = zoo.build(name)
    _, _, site, shape = zoo.ZOO[name]
    bare_state, before_hooks = copy.deepcopy(model.state_dict()), hooks(model)
    outputs = run(model, example)
    first = next(model.parameters())
    first.requires_grad_(False)
    model.train()
    model.get_submodule(site).eval()  # modes may differ between modules
    list(model.parameters())[-1].grad = torch.ones_like(list(model.parameters())[-1])
    before, attributes = snapshot(model), {n: set(vars(m)) for n, m in model.named_modules()}
    torch.manual_seed(5)
    rng = torch.get_rng_state()

    block = attach_se(model, example)
    assert torch.equal(torch.get_rng_state(), rng)
    assert block.site == site and model.selib_se is block if name != "sequential" else block.site == site
    assert attached(model) == {"": block} and block.channels in shape and block.training
    assert same(snapshot(model), before)
    model.eval()
    assert torch.equal(run(model, example), outputs)
    open_and_close(block)
    assert not torch.equal(run(model, example), outputs)
    assert [k for k in model.state_dict() if "selib_se" not in k] == list(bare_state)
    weights = block.fc2.weight.clone()
    model.load_state_dict(bare_state)  # strict
    assert torch.equal(block.fc2.weight, weights)

    detach_se(model)
    assert list(model.state_dict()) == list(bare_state) and same(dict(model.state_dict()), dict(bare_state))
    assert torch.equal(run(model, example), outputs)
    assert hooks(model) == before_hooks and attached(model) == {}
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_site_is_found_whatever_the_batch_and_the_mode(name: str) -> None:
    model, example = zoo.build(name)
    _, _, site, shape = zoo.ZOO[name]
    found = find_site(model.train(), example)
    assert (found.name, found.shape[1:]) == (site, shape)
    assert find_site(model, tuple(t[:1] for t in example) if isinstance(example, tuple) else example) == found


def test_a_vgg_on_small_images_is_read_where_there_still_is_a_map() -> None:
    model, _ = zoo.build("vgg")  # at 8x8 the last map is 1x1, and pooling repeats it 7x7 times
    site = find_site(model, image(8))
    assert site.name == "features.13" and site.shape == (1, 12, 2, 2)


def test_an_example_without_contrast_is_enough() -> None:
    model, _ = zoo.build("sequential")
    assert find_site(model, torch.zeros(1, 3, 32, 32)).name == "0"


class Bypass(nn.Module):
    """The last map is bypassed by an earlier one, which therefore is no bottleneck either."""

    def __init__(self, bypassed: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.fc, self.bypassed = nn.Linear(12 if bypassed else 6, K), bypassed

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one.relu()).mean((2, 3))
        return self.fc(torch.cat([two, one.mean((2, 3))], 1) if self.bypassed else two)


@pytest.mark.parametrize("zero", ["weight", "all"])
def test_a_classifier_that_starts_at_zero_hides_nothing(zero: str) -> None:
    model, example = zoo.build("vit")
    nn.init.zeros_(model.heads.head.weight)
    if zero == "all":
        nn.init.zeros_(model.heads.head.bias)
    before = snapshot(model)
    assert find_site(model, example).name == "encoder.layers.encoder_layer_0"
    assert same(snapshot(model), before)


def test_probing_leaves_no_trace_in_buffers_and_attributes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = zoo.convolutions(), nn.Linear(6, K)
            self.register_buffer("calls", torch.zeros(()))
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(len(x))
            self.last = self.body(x)
            if not self.last.isfinite().all():
                raise FloatingPointError("features are not finite")
            return self.fc(self.last.mean((2, 3)))

    torch.manual_seed(0)
    model = Counting().eval()
    assert attach_se(model, image(32)).site == "body"
    assert model.calls == 0 and model.seen == [] and not hasattr(model, "last")
    detach_se(model)
    model(image(32))  # leaves a tensor with a history, which deepcopy alone would refuse
    attach_se(model, image(32))
    assert model.calls == 1 and model.seen == [3]


def test_a_model_that_cannot_be_copied_is_asked_for_the_site() -> None:
    model, example = zoo.build("functional")
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied .* name the module .* with at="):
        attach_se(model, example)
    assert attach_se(model, example, at="conv2").channels == 6


@pytest.mark.parametrize("part", ["model", "child"])
def test_a_forward_that_was_replaced_by_a_function(part: str) -> None:
    model, example = zoo.build("functional")
    model.train()
    module = model if part == "model" else model.conv2
    original = module.forward
    module.forward = lambda x: original(x)
    before = snapshot(model)
    assert attach_se(model, example).site == "conv2"
    assert same(snapshot(model), before)


class Answers(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


def test_answers_in_a_named_tuple() -> None:
    class Named(zoo.Functional):
        def forward(self, x: Tensor) -> Answers:
            return Answers(super().forward(x), x)

    torch.manual_seed(0)
    model = Named().eval()
    assert attach_se(model, image(32)).site == "conv2"
    assert selib.explain(model, image(32)).heatmap().shape == (3, 32, 32)


def test_what_a_copy_must_not_stumble_over() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = zoo.convolutions(), nn.LazyLinear(K)
            self.lstm = nn.LSTM(2, 3, batch_first=True)
            self.register_buffer("prototypes", torch.ones(2, requires_grad=True) * 2)
            self.kept = [torch.ones(2, requires_grad=True) * 3]

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x[:, 0, :4, :2], [4] * len(x), batch_first=True)
            self.lstm(packed)
            return self.fc(self.body(x).mean((2, 3)))

    assert attach_se(Odd().eval(), image(32)).site == "body"


def test_describe_says_where_the_block_stands_or_would_go(capsys: pytest.CaptureFixture[str]) -> None:
    selib.describe(*zoo.build("vit"))
    said = capsys.readouterr().out
    assert "site      encoder.layers.encoder_layer_0" in said and "channels last" in said
    assert "grid      4 x 4, after 1 tokens" in said and "by running the head" in said

    model, example = zoo.build("resnet")
    attach_se(model, example, per_target=True)
    open_and_close(attached(model)[""])
    selib.describe(model, example)
    said = capsys.readouterr().out
    assert "site      layer4" in said and "gates for each output: closed form" in said
    assert "grid      2 x 2" in said and "'layer3'" in said.split("others")[1]


def test_a_map_that_is_bypassed_is_passed_over() -> None:
    torch.manual_seed(0)
    assert find_site(Bypass(False), image(32)).name == "two"
    assert find_site(Bypass(True), image(32)).name == "one"  # everything the image says passes through it


class ClassMaps(nn.Module):
    """As many channels as classes. Either each is averaged to its own logit, or a classifier mixes them."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.body, self.maps = zoo.convolutions(), nn.Conv2d(6, K, 1)
        self.fc = nn.Linear(K, K) if mixed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(self.body(x)).mean((2, 3)))


def test_the_classifiers_own_output_is_not_what_feeds_it() -> None:
    assert find_site(ClassMaps(False), image(32)).name == "body"
    assert find_site(ClassMaps(True), image(32)).name == "maps"


@pytest.mark.parametrize(
    ("shape", "inputs", "expected"),
    [
        ((2, 512, 7, 7), [(2, 3, 224, 224)], ("BC*", 512, 0, None)),
        ((2, 7, 7, 768), [(2, 3, 224, 224)], ("B*C", 768, 0, None)),
        ((2, 4, 8, 16), [(2, 3, 64, 128)], ("BC*", 4, 0, None)),
        ((2, 64, 4, 7, 7), [(2, 3, 8, 112, 112)], ("BC*", 64, 0, None)),
        ((2, 4, 7, 7, 64), [(2, 3, 8, 112, 112)], ("B*C", 64, 0, None)),
        ((2, 196, 768), [(2, 3, 224, 224)], ("B*C", 768, 0, (14, 14))),
        ((2, 197, 768), [(2, 3, 224, 224)], ("B*C", 768, 1, (14, 14))),
        ((2, 201, 768), [(2, 3, 224, 224)], ("B*C", 768, 5, (14, 14))),
        ((2, 1 + 8 * 4, 32), [(2, 3, 64, 32)], ("B*C", 32, 1, (8, 4))),
        ((2, 768, 196), [(2, 3, 224, 224)], ("BC*", 768, 0, (14, 14))),
        ((2, 64, 100), [(2, 1, 16000)], ("BC*", 64, 0, None)),
        ((2, 50, 13), [(2, 50, 40)], ("BC*", 50, 0, None)),
        ((2, 50, 13), [(2, 50)], ("B*C", 13, 0, None)),  # a row of tokens
        ((2, 10), [(2, 3, 32, 32)], None),
        ((2, 21, 32), [(2, 3, 32, 32)], ("B*C", 32, 5, (4, 4))),  # not one and 4x5
        ((2, 1, 7), [(2, 3, 224, 99)], None),
        ((2, 3, 4, 5, 6, 7), [(2, 3, 224, 224)], None),
    ],
)
def test_reading_shapes(shape: tuple[int, ...], inputs: list[tuple[int, ...]], expected: Any) -> None:
    found = map_layout(shape, inputs)
    assert (None if found is None else (found.layout, found.channels, found.prefix, found.grid)) == expected


# ---- several streams ----------


def two_streams() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return zoo.TwoStreams().eval(), (image(32), random(3, 1, 16, 16))


def test_streams_side_by_side_are_an_error_that_names_them() -> None:
    model, example = two_streams()
    with pytest.raises(ValueError, match="side by side") as error:
        attach_se(model, example)
    assert "'face_encoder' (1, 6, 8, 8)" in str(error.value) and "'body_encoder' (1, 4, 4, 4)" in str(
        error.value
    )
    assert "at={'stream0': " in str(error.value) and "\n" not in str(error.value)
    assert attached(model) == {}


def test_streams_by_name() -> None:
    model, example = two_streams()
    outputs, names = run(model, example), list(model.state_dict())
    at = {"face": "face_encoder", "body": "body_encoder", "fusion": "fuse"}
    blocks = attach_se(model, example, at=at, reduction=2)
    assert {n: (b.site, b.stream, b.channels) for n, b in blocks.items()} == {
        "face": ("face_encoder", "face", 6),
        "body": ("body_encoder", "body", 4),
        "fusion": ("fuse", "fusion", 8),
    }
    assert attached(model) == blocks
    assert torch.equal(run(model, example), outputs)
    with blocks["fusion"].override(torch.zeros(8)):
        assert torch.allclose(run(model, example), model.fc.bias.expand(3, K))
    assert "selib_se.body.fc1.weight" in model.state_dict()
    detach_se(model)
    assert list(model.state_dict()) == names and torch.equal(run(model, example), outputs)


@pytest.mark.parametrize(
    "at",
    [
        {},
        {"": "face_encoder"},
        {"a.b": "face_encoder"},
        {"keys": "face_encoder"},
        {"a": "fuse", "b": "fuse"},
        {"a": "fuse", "b": "nose"},
    ],
)
def test_bad_streams_leave_the_model_alone(at: dict[str, str]) -> None:
    model, example = two_streams()
    before, names = hooks(model), list(model.state_dict())
    with pytest.raises(ValueError, match="at="):
        attach_se(model, example, at=at)
    assert hooks(model) == before and list(model.state_dict()) == names
    attach_se(model, example, at="face_encoder")


# ---- options ----------


def test_options_reach_the_block() -> None:
    model, example = zoo.build("functional")
    outputs = run(model, example)
    block = attach_se(model, example, at="conv1", reduction=3, start="paper")
    assert (block.site, block.channels, block.fc1.out_features, block.gain) == ("conv1", 8, 2, 1)
    assert not torch.equal(run(model, example), outputs)


def test_the_layout_can_be_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, K)).eval()
    assert attach_se(model, image(32)).layout == "BC*"
    detach_se(model)
    block = attach_se(model, image(32), layout="B*C")
    assert (block.layout, block.channels) == ("B*C", 8)
    assert open_and_close(block)(random(2, 8, 8, 8)).shape == (2, 8, 8, 8)


def test_a_vector_can_be_named() -> None:
    model, example = zoo.build("two inputs")
    outputs = run(model, example)
    block = attach_se(model, example, at="meta")
    assert (block.layout, block.channels) == ("BC*", 6) and torch.equal(run(model, example), outputs)


def test_a_block_on_a_part_is_found_from_the_whole() -> None:
    backbone, example = zoo.build("resnet")
    wrapped = nn.Sequential(backbone, nn.Linear(K, 2)).eval()
    names, outputs = list(wrapped.state_dict()), run(wrapped, example)
    block = attach_se(backbone, example)
    assert attached(wrapped) == {"": block}
    detach_se(wrapped)
    assert list(wrapped.state_dict()) == names and torch.equal(run(wrapped, example), outputs)


def test_training_goes_through_the_block() -> None:
    model, example = zoo.build("vgg")
    torch.manual_seed(3)
    bare_loss = F.cross_entropy(model.train()(example), torch.tensor([0, 1, 2]))
    bare_loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(zoo.build("vgg")[0].state_dict())
    block = attach_se(model, example, reduction=2)
    torch.manual_seed(3)
    loss = F.cross_entropy(model(example), torch.tensor([0, 1, 2]))  # the same dropout
    assert loss == bare_loss
    loss.backward()
    assert all(torch.allclose(grads[n], p.grad, atol=1e-6) for n, p in model.named_parameters() if n in grads)
    assert block.fc2.weight.grad is not None and block.fc2.weight.grad.abs().max() > 0


# ---- copies, files, wrappers ----------


@pytest.mark.parametrize("name", ["resnet", "vit", "sequential"])
def test_deepcopy_and_pickle_carry_the_block(name: str) -> None:
    model, example = zoo.build(name)
    open_and_close(attach_se(model, example))
    outputs = run(model, example)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = attached(twin)[""]
        assert other is not attached(model)[""] and torch.equal(run(twin, example), outputs)
        nn.init.zeros_(other.fc2.bias)
        assert not torch.equal(run(twin, example), outputs) and torch.equal(run(model, example), outputs)
        detach_se(twin)
        assert attached(twin) == {} and attached(model) and torch.equal(run(model, example), outputs)


def test_the_state_dict_goes_to_a_file_and_back() -> None:
    model, example = zoo.build("resnet")
    open_and_close(attach_se(model, example))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = zoo.build("resnet", seed=1)
    attach_se(other, example)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, example), run(model, example))
    half = {k: v for k, v in model.state_dict().items() if k != "selib_se.fc2.bias"}
    with pytest.raises(RuntimeError, match=r"selib_se\.fc2\.bias"):
        other.load_state_dict(half)


def test_the_block_moves_with_the_model() -> None:
    model, example = zoo.build("functional")
    block = attach_se(model, example)
    model.double()
    assert block.fc1.weight.dtype == torch.float64 and run(model, example.double()).dtype == torch.float64
    assert next(iter(attached(model.to("meta")).values())).fc1.weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions_are_left_alone_too(dtype: torch.dtype) -> None:
    model, example = zoo.build("sequential")
    model, example = model.to(dtype), example.to(dtype)
    outputs = run(model, example)
    attach_se(model, example)
    assert torch.equal(run(model, example), outputs) and outputs.dtype == dtype


@pytest.mark.parametrize("name", ["resnet", "vit", "mobilenet_v3"])
def test_bf16_autocast(name: str) -> None:
    model, example = zoo.build(name)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, example)
        block = attach_se(model, example)
        assert torch.equal(run(model, example), outputs) and outputs.dtype == torch.bfloat16
        logits = logits_of(call(model, example))
    logits.float().sum().backward()
    assert block.fc2.weight.grad is not None and block.fc2.weight.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequential", "vit"])
def test_compiled(name: str) -> None:
    model, example = zoo.build(name)
    block = attach_se(model, example)
    open_and_close(block)
    expected = run(model, example)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(run(compiled, example), expected, atol=1e-6)
    assert bare(compiled) is model and attached(compiled) == {"": block}
    torch.compiler.reset()


@pytest.mark.slow
def test_attaching_and_detaching_through_a_compiled_model_that_has_run() -> None:
    model, example = zoo.build("sequential")
    compiled = torch.compile(model, backend="eager")
    outputs = run(compiled, example)
    open_and_close(attach_se(compiled, example))
    assert not torch.allclose(run(compiled, example), outputs, atol=1e-3)
    assert torch.allclose(run(compiled, example), run(model, example), atol=1e-6)
    detach_se(compiled)
    assert torch.allclose(run(compiled, example), outputs, atol=1e-6)
    torch.compiler.reset()


def test_distributed_data_parallel(tmp_path: Any) -> None:
    model, example = zoo.build("dict output")
    attach_se(model, example)
    reference = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for net in (parallel, reference):
            net.train()
            for _ in range(2):
                net.zero_grad()
                net(**example)["logits"].square().sum().backward()
        assert bare(parallel) is model and attached(parallel) == attached(model)
        ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
        assert all(torch.allclose(ours[n].grad, theirs[n].grad, atol=1e-5) for n in theirs)
        assert model.selib_se.fc2.weight.grad.abs().max() > 0
        detach_se(parallel)
        assert not attached(model)
    finally:
        torch.distributed.destroy_process_group()


# ---- errors ----------


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_without_a_map() -> None:
    with pytest.raises(ValueError, match="no spatial feature map feeds the output") as error:
        attach_se(zoo.mlp(), image(32))
    assert "at=" in one_line(error)


def test_a_map_that_is_not_read_does_not_count() -> None:
    class Ignored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(3, K)

        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            return self.fc(x.mean((2, 3)))

    with pytest.raises(ValueError, match="no spatial feature map"):
        attach_se(Ignored(), image(32))


def test_an_unknown_module_and_what_comes_close() -> None:
    model, example = zoo.build("resnet")
    with pytest.raises(ValueError, match=r"at='layr4': the model has no such module; close: layer4"):
        attach_se(model, example, at="layr4")
    with pytest.raises(ValueError, match="at=''"):
        attach_se(model, example, at="")


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("functional", "act", "'act' is called 2 times"),
        ("gru head", "gru", "'gru' returns tuple"),
        ("mobilenet_v3", "classifier", None),
    ],
)
def test_a_module_that_cannot_hold_a_block(name: str, at: str, message: str | None) -> None:
    model, example = zoo.build(name)
    if message is None:
        assert attach_se(model, example, at=at).channels == K  # a vector: gates without a heatmap
        return
    with pytest.raises(ValueError, match=f"at={message}") as error:
        attach_se(model, example, at=at)
    one_line(error)


class Frames(nn.Module):
    """A clip whose frames go through the encoder as one large batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = zoo.convolutions(), nn.Linear(6, K)

    def forward(self, clip: Tensor) -> Tensor:
        return self.fc(self.body(clip.flatten(0, 1)).mean((2, 3)).unflatten(0, clip.shape[:2]).mean(1))


def test_a_map_without_an_axis_for_the_samples() -> None:
    model, clip = Frames().eval(), random(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match="no spatial feature map"):
        attach_se(model, clip)
    with pytest.raises(ValueError, match=r"at='body' returns \(8, 6, 8, 8\) for a batch of 2: ") as error:
        attach_se(model, clip, at="body")
    one_line(error)


@pytest.mark.parametrize("at", [None, "layer4"])
@pytest.mark.parametrize(
    "example", [random(3, 1, 64, 64), random(3, 64), (image(64), image(64)), {"image": image(64)}]
)
def test_an_example_that_does_not_fit(example: Any, at: str | None) -> None:
    model, good = zoo.build("resnet")
    before = hooks(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"the model cannot run on the example \(3, ") as error:
        attach_se(model, example, at=at)
    one_line(error)
    assert (hooks(model), list(model.state_dict())) == before
    attach_se(model, good)


def test_an_example_of_another_size_is_refused_when_it_comes() -> None:
    model, example = zoo.build("functional")
    attach_se(model, example)
    with pytest.raises(ValueError, match=r"6 channels, but the feature map \(2, 7, 3, 3\)"):
        model.selib_se(random(2, 7, 3, 3))


def test_a_model_that_returns_no_logits() -> None:
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"returned a tensor of shape \(1, 4, 30, 30\), but class logits \(B, K\)"
    ):
        attach_se(segmenter, image(32))


def test_twice_and_without() -> None:
    model, example = zoo.build("functional")
    with pytest.raises(ValueError, match="no attached SE block"):
        detach_se(model)
    attach_se(model, example)
    with pytest.raises(ValueError, match="has an SE block already: call selib.detach_se"):
        attach_se(model, example)
    detach_se(model)
    attach_se(model, example)


@pytest.mark.parametrize(
    ("options", "message"), [({"start": "zero"}, "start='zero'"), ({"reduction": 0}, "reduction=0")]
)
def test_a_bad_option_leaves_the_model_alone(options: dict[str, Any], message: str) -> None:
    model, example = zoo.build("functional")
    before = hooks(model)
    with pytest.raises(ValueError, match=message):
        attach_se(model, example, **options)
    assert hooks(model) == before and attached(model) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("shufflenet_v2_x0_5", "conv5"),
        ("mnasnet0_5", "layers"),
        ("regnet_y_400mf", "trunk_output"),
        ("googlenet", "inception5b"),
    ],
)
def test_more_of_torchvision_at_full_size(name: str, site: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=K, **options).eval()
    example = image(64, batch=1)
    outputs = run(model, example)
    assert attach_se(model, example).site == site
    assert torch.equal(run(model, example), outputs)
