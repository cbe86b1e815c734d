"""The explorer, driven as plain Python: its callbacks need no kernel. For the browser see test_browser.py."""

from __future__ import annotations

import base64
import html
import importlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import selib
from selib import attach_se, explain, plot, views, widgets
from selib.pixels import normalize
from selib.select import Channels, TopFraction, TopK
from studies import baselines

CLASSES = ["one", "two <b>", "three"]


class Eyes(nn.Module):
    """A small classifier that counts how often its convolution runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.runs = nn.Conv2d(3, 16, 3, 4, 1), 0
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.fc(self.body(x).relu().mean((2, 3)))


@dataclass
class Images:
    """The least that a set of images has to have."""

    images: Tensor
    targets: Tensor
    name: str = "noise"
    classes: tuple[str, ...] = tuple(CLASSES)
    multilabel: bool = False
    synthetic: bool = True

    def batch(self, indices: Any) -> Tensor:
        return normalize(self.images[indices])


@pytest.fixture
def model() -> Eyes:
    torch.manual_seed(0)
    model = Eyes().eval()
    block = attach_se(model, torch.randn(2, 3, 32, 32), start="paper")
    nn.init.normal_(block.fc2.weight, std=3)
    return model


@pytest.fixture(scope="module")
def images() -> Images:
    torch.manual_seed(1)
    return Images(torch.randint(0, 256, (4, 3, 32, 24), dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))


def pixels(view: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.value)).convert("RGB"), dtype=int)


def test_every_knob_changes_what_it_should(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    knob = ex.knobs
    other = next(k for k in range(3) if k != knob["target"].value)
    parts = {
        "view": lambda: ex.view.value,
        "gates": lambda: ex.gates.value,
        "answers": lambda: ex.answers.value,
        "lines": lambda: ex.lines.value,
    }
    everything = {"view", "gates", "answers", "lines"}
    for name, value, changes in (
        ("share", 0.5, everything - {"view"}),
        ("method", "gate", everything),
        ("rule", "k channels", {"gates", "answers", "lines"}),
        ("k", 3, everything),
        ("rule", "weight above", {"gates", "answers", "lines"}),
        ("rule", "paper's rule", {"gates", "answers", "lines"}),
        ("rule", "top share", {"gates", "answers", "lines"}),
        ("method", "influence", everything),
        ("target", other, everything),
        ("opacity", 0.2, {"view"}),
        ("colours", "viridis", {"view"}),
        ("smooth", False, {"view"}),
        ("compare", "Grad-CAM", {"view"}),
        ("item", 2, everything - {"lines"}),
    ):
        before = {part: read() for part, read in parts.items()}
        knob[name].value = value
        changed = {part for part, read in parts.items() if read() != before[part]}
        assert changes <= changed, (name, value, changed)
        if name in ("opacity", "colours", "smooth", "compare"):
            assert changed == changes, name
    ex.knobs["item"].value = 3
    assert knob["target"].value == int(
        explain(model, images.batch([3])).predicted
    )  # a new image starts at its own prediction


def test_the_heatmap_is_that_of_the_explanation(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    ex.knobs["item"].value, ex.knobs["share"].value, ex.knobs["opacity"].value = 1, 0.25, 1.0
    ex.knobs["target"].value = 2
    want = explain(model, images.batch([1])).heatmap(
        "influence", 2, select=TopFraction(0.25), size=(224, 168)
    )[0]
    table = plot.overlay(torch.zeros(3, 224, 168, dtype=torch.uint8), want, opacity=1.0)
    seen = pixels(ex.view)[20:, 168 + 8 :]
    assert seen.shape == (224, 168, 3) and np.abs(seen - table).max() <= 1


def test_squares_are_the_cells_of_the_map(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    ex.knobs["smooth"].value, ex.knobs["opacity"].value = False, 1.0
    seen = pixels(ex.view)[20:, 168 + 8 :]  # a map of 8 x 6
    blocks = seen.reshape(8, 28, 6, 28, 3)
    assert (blocks.max((1, 3)) == blocks.min((1, 3))).all() and len(
        np.unique(seen.reshape(-1, 3), axis=0)
    ) > 5


def test_the_answer_under_the_selection_is_that_of_the_manipulated_vector(
    model: Eyes, images: Images
) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["rule"].value, widget.knobs["k"].value = "k channels", 4
    ex = explain(model, images.batch([0]))
    target = int(ex.predicted)
    chosen = TopK(4).mask(ex.influence(target))
    after = ex.with_gates(lambda s: s * chosen)[0]
    assert f"{float(ex.logits[0, target]):.2f} → {float(after[target]):.2f}" in widget.answers.value
    assert (
        f"{float(ex.logits.softmax(1)[0, target]):.0%} → {float(after.softmax(0)[target]):.0%}"
        in widget.answers.value
    )
    assert "4 of 16 channels selected" in widget.gates.value
    assert "two &lt;b&gt;" in widget.answers.value and "<b>" not in widget.answers.value
    assert [text.split("  ")[0] for text, _ in widget.knobs["target"].options] == [
        CLASSES[k] for k in ex.logits[0].argsort(descending=True)
    ]


def test_attributes_are_read_one_by_one(model: Eyes, images: Images) -> None:
    attributes = Images(images.images, torch.zeros(4, 3, dtype=torch.long), multilabel=True)
    widget = widgets.explorer(model, attributes)
    assert widget.knobs["item"].options[0] == ("image 0", 0)
    yes = float(explain(model, images.batch([0])).logits[0].sigmoid()[widget.knobs["target"].value])
    assert f"{yes:.0%} → {yes:.0%} with the selected channels only" in widget.answers.value


def test_a_click_picks_and_drops_a_channel(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["share"].value = 0.25
    strip = list(widget._strip)
    assert [pick.value for pick in widget.picks] == [True] * 4 + [False] * 4
    before = widget.view.value
    widget.picks[0].value = False
    assert widget.knobs["rule"].value == "picked by hand" and widget.rule == Channels(
        tuple(sorted(strip[1:4]))
    )
    assert (
        widget.view.value != before
        and [pick.value for pick in widget.picks] == [False] + [True] * 3 + [False] * 4
    )
    widget.picks[0].value = True
    assert widget.view.value == before and widget.rule == Channels(tuple(sorted(strip[:4])))
    assert f"select=selib.Channels({tuple(sorted(strip[:4]))})" in widget.lines.value.replace("&#x27;", "'")
    for pick in widget.picks:
        pick.value = False  # to the last: nothing is left, and nothing breaks
    assert "0 of 16 channels selected" in widget.gates.value


def test_knobs_do_not_run_the_network_again(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["item"].value = 1
    widget.knobs["item"].value = 0
    runs = model.runs
    for name, value in (
        ("share", 0.1),
        ("method", "gate"),
        ("method", "top-gate"),
        ("rule", "paper's rule"),
        ("target", 2),
        ("smooth", False),
        ("item", 1),
        ("item", 0),
    ):
        widget.knobs[name].value = value
    widget.picks[0].value = not widget.picks[0].value
    assert model.runs == runs
    widget.knobs["compare"].value = "Grad-CAM"  # needs a backward pass, once for an image and a target
    ran = model.runs
    widget.knobs["opacity"].value = 0.3
    widget.knobs["share"].value = 0.7
    assert ran > runs and model.runs == ran


def test_next_and_previous_go_round(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["previous"].click()
    assert widget.knobs["item"].value == 3
    widget.knobs["next"].click()
    widget.knobs["next"].click()
    assert widget.knobs["item"].value == 1


def code(widget: widgets.Explorer) -> str:
    return html.unescape(widget.lines.value.split("<pre")[1].split(">", 1)[1].split("</pre>")[0])


def test_the_two_lines_reproduce_the_view(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["item"].value, widget.knobs["rule"].value, widget.knobs["k"].value = 2, "k channels", 5
    assert len(code(widget).splitlines()) == 2
    names: dict[str, Any] = {"selib": selib, "model": model, "images": images}
    exec(code(widget), names)  # noqa: S102 (our own two lines)
    want = widget.subject.explanation("image").heatmap(
        "influence", widget.knobs["target"].value, select=TopK(5)
    )
    assert torch.equal(names["heatmap"], want)
    mine, as_floats = (
        images.images,
        lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255,
    )
    for transform in (None, as_floats):
        given = widgets.explorer(model, mine, classes=CLASSES, transform=transform)
        assert "(model, mine[0:1]" in code(given)  # what the caller calls them
        want = normalize(mine[:1]) if transform is None else mine[:1] / 255
        names |= {"mine": mine, "transform": transform}
        exec(code(given), names)  # noqa: S102 (our own two lines)
        assert torch.equal(names["heatmap"], explain(model, want).heatmap())


@pytest.mark.slow
def test_a_picture_of_the_last_state_stands_where_no_widget_can() -> None:
    """In a kernel: a knob moves after the widget was displayed, and the notebook's second output follows."""
    import nbformat
    from nbclient import NotebookClient

    folder = Path(__file__).parent
    cells = [
        f"import sys, asyncio\nsys.path[:0] = [{str(folder)!r}, {str(folder.parents[1])!r}]",
        (
            "import torch\nfrom test_explorer import CLASSES, Eyes, attach_se, widgets\n"
            "model = Eyes().eval()\nattach_se(model, torch.randn(2, 3, 32, 32))\n"
            "images = torch.zeros(2, 3, 32, 24, dtype=torch.uint8)\n"
            "ex = widgets.explorer(model, images, classes=CLASSES)"
        ),
        "ex",
        "ex.knobs['opacity'].value = 0.2\nfor share in (0.7, 0.4, 0.1):\n    ex.knobs['share'].value = share",
        "await asyncio.sleep(1.5)",
        "print(ex.caption)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120).execute()
    widget, still = notebook.cells[2].outputs
    kind = "application/vnd.jupyter.widget-view+json"
    assert set(widget.data) == {kind} and set(still.data) == {"text/html", "image/png", "text/plain"}
    assert still.data["image/png"].strip() in still.data["text/html"]
    assert still.data["text/plain"] == notebook.cells[5].outputs[0].text.strip()
    assert "TopFraction(0.1)" in still.data["text/plain"]
    assert Image.open(io.BytesIO(base64.b64decode(still.data["image/png"]))).width > 168 * 2


@pytest.mark.slow
def test_a_picture_is_saved_under_the_name_of_what_it_shows(
    model: Eyes, images: Images, tmp_path: Any
) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model), seed=7)
    target = CLASSES[widget.knobs["target"].value]
    widget.knobs["share"].value = 0.1
    assert (
        widget.caption
        == f"noise (synthetic), Eyes, seed 7: image 0, one; influence for {target}, channels TopFraction(0.1)"
    )
    path = widget.save(tmp_path)
    assert path.read_bytes() == widget.still() and str(path) in widget.saved.value
    plain = target.replace(" <b>", "-b-")
    assert path.name == f"explorer-image-0-one-influence-for-{plain}-channels-TopFraction-0.1.png".replace(
        "--", "-"
    )
    widget.knobs["compare"].value = "Grad-CAM"
    assert widget.save(tmp_path) != path and len(list(tmp_path.iterdir())) == 2


def test_the_papers_reading_brings_the_papers_rule(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    knob = widget.knobs
    knob["method"].value = "top-gate"
    assert knob["rule"].value == "paper's rule"
    want = explain(model, images.batch([0])).selected("top-gate")
    assert f"{int(want.sum())} of 16 channels selected" in widget.gates.value
    knob["method"].value = "influence"
    assert knob["rule"].value == "top share" and "16 of 16" in widget.gates.value
    knob["rule"].value, knob["k"].value = "k channels", 3
    knob["rule"].value = "picked by hand"  # starts with what was selected
    assert "3 of 16" in widget.gates.value and widget.rule == Channels(tuple(sorted(widget._strip[:3])))


def test_maps_of_tokens_are_not_given_to_the_cams(images: Images) -> None:
    class Tokens(Eyes):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.tokens(self.body(x).flatten(2).mT).mean(1))

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Linear(16, 16)

    torch.manual_seed(0)
    model = Tokens().eval()
    attach_se(model, torch.randn(2, 3, 32, 32), at="tokens")
    widget = widgets.explorer(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), classes=CLASSES)
    assert widget.knobs["compare"].options == ("nothing",)


def test_what_does_not_fit_is_refused(model: Eyes, images: Images) -> None:
    with pytest.raises(ValueError, match="2 class names do not fit 3 logits"):
        widgets.explorer(model, images.images, classes=CLASSES[:2])
    assert widgets.explorer(model, images.images).subject.outputs == ["class 0", "class 1", "class 2"]
    for count in (0, 201):
        many = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"1 to 200 images or clips, not {count}"):
            widgets.explorer(model, many, classes=CLASSES)


@pytest.mark.slow
def test_a_network_with_blocks_of_its_own_has_no_rivals(images: Images) -> None:
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    model = mobilenet_v3_small(num_classes=3).eval()
    assert baselines.rivals(model) == {}
    widget = widgets.explorer(model, images.images[:1], classes=CLASSES)
    assert widget.knobs["compare"].options == ("nothing",) and pixels(widget.view).std() > 0


def test_it_is_found_where_the_readme_says() -> None:
    assert selib.__getattr__("widgets") is widgets  # after a plain `import selib`
    with pytest.raises(AttributeError, match="has no attribute 'widget'"):
        selib.__getattr__("widget")


@pytest.mark.parametrize(("module", "missing"), [("widgets", "ipywidgets"), ("plot", "PIL")])
def test_a_missing_package_is_named(module: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"selib.{module}")
    with pytest.raises(
        ImportError, match=rf"^selib.{module} needs {missing}: pip install 'selib\[widgets\]'$"
    ):
        importlib.import_module(f"selib.{module}")


# ---- drawings ----------


def test_a_chart_has_a_bar_for_each_channel_and_a_line_at_the_cut() -> None:
    def column(page: np.ndarray, x: int) -> list[str]:
        return ["#" + bytes(pixel).hex().upper() for pixel in page[22:153, x]]

    weights, chosen = torch.tensor([0.2, 1.0, -0.5, 0.6]), torch.tensor([False, True, False, True])
    page = views.gates_chart(weights, chosen, "gate s")
    bars = [column(page, 46 + 36 + 90 * place) for place in range(4)]  # from 1 to -0.5 in 130 pixels
    assert [plot.OURS in bar for bar in bars] == [True, True, False, False]
    assert [plot.CONTROLS in bar for bar in bars] == [False, False, True, True]
    lengths = [sum(colour in (plot.OURS, plot.CONTROLS) for colour in bar) for bar in bars]
    assert np.allclose(lengths, [130 * size / 1.5 for size in (1.0, 0.6, 0.2, 0.5)], atol=3)
    assert all(plot.OTHERS in bar[33:37] for bar in bars)  # at 0.6
    nothing = views.gates_chart(torch.zeros(4), torch.zeros(4, dtype=torch.bool), "s")
    assert plot.OTHERS not in column(nothing, 200)


def test_a_picture_on_the_page_says_what_it_shows() -> None:
    said = views.shown(np.zeros((5, 7, 3), np.uint8), "gate <s>")
    assert 'aria-label="gate &lt;s&gt;"' in said and 'width="7" height="5"' in said


def test_a_picture_is_encoded_without_loss() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(views.encoded(picture)))), picture)
