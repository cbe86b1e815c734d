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
from sklearn.metrics import average_precision_score
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


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=int)


def pointer(pictures: Any, kind: str, index: int, x: float = 0.5, y: float = 0.5) -> None:
    """What the page sends."""
    heard = pictures.heard
    pictures._hear(None, {"kind": kind, "index": index, "x": x, "y": y}, [])
    assert pictures.heard == heard + 1  # the page waits for it


def test_every_knob_changes_what_it_should(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    knob = ex.knobs
    other = next(k for k in range(3) if k != knob["target"].value)
    parts = {
        "view": lambda: ex.view.images,
        "gates": lambda: ex.charts.images[0],
        "answers": lambda: ex.charts.images[1],
        "lines": lambda: ex.lines.value,
    }
    everything = {"view", "gates", "answers", "lines"}
    assert knob["share"].value == 0.1 and ex.rule == TopFraction(0.1)
    for name, value, changes in (
        ("share", 0.5, everything),
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
        ("compare", "log-odds influence", {"view"}),
        ("method", "log-odds influence", everything),
        ("item", 2, everything - {"lines"}),
    ):
        before = {part: read() for part, read in parts.items()}
        knob[name].value = value
        changed = {part for part, read in parts.items() if read() != before[part]}
        assert changes <= changed, (name, value, changed)
        if name in ("opacity", "colours", "smooth", "compare"):
            assert changed == changes, name
    knob["reset"].click()
    start = widgets.explorer(model, images, rivals=baselines.rivals(model))
    start.knobs["item"].value = 2
    assert ex.view.images == start.view.images and ex.lines.value == start.lines.value


def test_the_target_stays_once_it_is_chosen(model: Eyes, images: Images) -> None:
    """Until then each image is explained for its own prediction; a switch brings that back."""
    ex = widgets.explorer(model, images)
    own = [int(explain(model, images.batch([i])).predicted) for i in range(4)]
    target, item = ex.knobs["target"], ex.knobs["item"]
    assert [(item.set_trait("value", i), target.value)[1] for i in range(4)] == own
    chosen = next(k for k in range(3) if k != own[3])
    target.value = chosen
    assert not ex.knobs["follow"].value
    assert [(item.set_trait("value", i), target.value)[1] for i in range(4)] == [chosen] * 4
    ex.knobs["follow"].value = True
    assert target.value == own[3]


def test_the_heatmap_is_that_of_the_explanation(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    ex.knobs["item"].value, ex.knobs["share"].value, ex.knobs["opacity"].value = 1, 0.25, 1.0
    ex.knobs["target"].value = 2
    black = torch.zeros(3, 224, 168, dtype=torch.uint8)
    for name, contrast in (("influence", False), ("log-odds influence", True)):
        ex.knobs["method"].value = name
        own = explain(model, images.batch([1]))
        want = own.heatmap("influence", 2, contrast=contrast, select=TopFraction(0.25), size=(224, 168))[0]
        seen = pixels(ex.view.images[1])
        assert np.abs(seen - plot.overlay(black, want, opacity=1.0)).max() <= 1
        pointer(ex.view, "move", 1, 0.5, 0.25)
        assert ex.view.tip["text"] == f"{float(want[56, 84]):.2f}"
    pointer(ex.view, "move", 0)  # the image has no values
    assert not ex.view.tip["text"]
    ex.knobs["compare"].value = "gate"  # in the image's place, as large as the first
    want = own.heatmap("gate", 2, select=TopFraction(0.25), size=(224, 168))[0]
    assert np.abs(pixels(ex.view.images[1]) - plot.overlay(black, want, opacity=1.0)).max() <= 1
    assert np.array_equal(pixels(ex.view.images[0]), seen)


def test_squares_are_the_cells_of_the_map(model: Eyes, images: Images) -> None:
    ex = widgets.explorer(model, images, rivals=baselines.rivals(model))
    ex.knobs["share"].value = 1.0
    ex.knobs["smooth"].value, ex.knobs["opacity"].value = False, 1.0
    seen = pixels(ex.view.images[1])  # a map of 8 x 6
    blocks = seen.reshape(8, 28, 6, 28, 3)
    same = blocks.max((1, 3)) == blocks.min((1, 3))
    assert same.all() and len(np.unique(seen.reshape(-1, 3), axis=0)) > 5


def test_the_answer_under_the_selection_is_that_of_the_manipulated_vector(
    model: Eyes, images: Images
) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["rule"].value, widget.knobs["k"].value = "k channels", 4
    ex = explain(model, images.batch([0]))
    target = int(ex.predicted)
    after = ex.with_gates(lambda s: s * TopK(4).mask(ex.influence(target)))[0]
    share = f"{float(ex.logits.softmax(1)[0, target]):.0%} → {float(after.softmax(0)[target]):.0%}"
    assert widget.charts.said == [
        "influence on the logit: 4 of 16 selected",
        f"{CLASSES[target]}: {share} with the selected channels only",
    ]
    drawn, rows, _ = views.answers(widget.subject, ex.logits[0], after, target)
    assert np.array_equal(pixels(widget.charts.images[1]), drawn)
    assert rows == ex.logits[0].argsort(descending=True).tolist()
    assert widget.knobs["target"].options == tuple(zip(CLASSES, range(3), strict=True))  # in fixed order


def test_a_click_on_an_answer_asks_for_it(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images)
    second = int(explain(model, images.batch([0])).logits[0].argsort(descending=True)[1])
    high = len(pixels(widget.charts.images[1])) / views.SCALE
    pointer(widget.charts, "click", 1, y=(views.HEAD + 1.5 * views.ROW) / high)
    assert widget.knobs["target"].value == second and not widget.knobs["follow"].value
    before = widget.lines.value
    for y in (0.0, 0.99):  # the title, and the empty place below the last
        pointer(widget.charts, "click", 1, y=y)
    assert widget.lines.value == before


def test_classes_are_searched_for(images: Images) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 40)).eval()
    attach_se(model, torch.randn(2, 3, 32, 32))
    names = [f"class {k}" for k in range(40)]
    widget = widgets.explorer(model, images.images, classes=names)
    search, target = widget.knobs["search"], widget.knobs["target"]
    search.value = "CLASS 3"
    assert [k for _, k in target.options] == [3, *range(30, 40)] and target.value in [3, *range(30, 40)]
    search.value = "39"
    assert target.options == (("class 39", 39),) and "target=39" in widget.lines.value
    search.value = "zebra"
    assert target.value == 39 and "no class has &#x27;zebra&#x27; in its name" in widget.message.value
    search.value = ""
    assert len(target.options) == 40 and target.value == 39


def test_attributes_are_read_one_by_one(model: Eyes, images: Images) -> None:
    attributes = Images(images.images, torch.zeros(4, 3, dtype=torch.long), multilabel=True)
    widget = widgets.explorer(model, attributes)
    assert widget.knobs["item"].options[0] == ("image 0", 0)
    widget.knobs["share"].value = 1.0
    yes = float(explain(model, images.batch([0])).logits[0].sigmoid()[widget.knobs["target"].value])
    assert f"{yes:.0%} → {yes:.0%} with the selected channels only" in widget.charts.said[1]


def test_a_click_picks_and_drops_a_channel(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["share"].value = 0.25
    strip = list(widget.strip.channels)
    assert widget.strip.maps.marks == [True] * 4 + [False] * 4
    before = widget.view.images
    pointer(widget.strip.maps, "click", 0)
    assert widget.knobs["rule"].value == "picked by hand"
    assert widget.rule == Channels(tuple(sorted(strip[1:4])))
    assert widget.view.images != before and widget.strip.maps.marks == [False] + [True] * 3 + [False] * 4
    pointer(widget.strip.maps, "click", 0)
    assert widget.view.images == before and widget.rule == Channels(tuple(sorted(strip[:4])))
    assert f"select=selib.Channels({tuple(sorted(strip[:4]))})" in code(widget)
    for place in range(4):
        pointer(widget.strip.maps, "click", place)  # to the last: nothing is left, and nothing breaks
    assert "0 of 16 selected" in widget.charts.said[0]


def test_all_channels_can_be_seen(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images)
    ex = explain(model, images.batch([0]))
    target = widget.knobs["target"].value
    for by, weights in (("influence", ex.influence(target)[0]), ("gate", ex.gates[0])):
        widget.knobs["sort"].value = by
        seen = list(widget.strip.channels)
        widget.knobs["forward"].click()
        seen += widget.strip.channels
        assert seen == weights.argsort(descending=True, stable=True).tolist()
        widget.knobs["forward"].click()  # round to the first
        assert widget.strip.channels == seen[:8] and "1–8 of 16" in widget.strip.place.value
    pointer(widget.strip.maps, "move", 2)
    assert widget.strip.maps.tip["text"].startswith(
        f"channel {seen[2]}: gate {float(ex.gates[0, seen[2]]):.2f}"
    )


def test_the_cut_is_dragged(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images)
    ranked = explain(model, images.batch([0])).influence(widget.knobs["target"].value)[0]
    ranked = ranked.argsort(descending=True).tolist()

    def place(k: float) -> float:
        return (views.LEFT + views.ACROSS * views.edge(k, 16)) / views.WIDTH

    pointer(widget.charts, "move", 0, place(2.5))  # over the third bar
    assert widget.charts.tip["text"].startswith(f"channel {ranked[2]}:") and widget.charts.tip["image"]
    for rule, k in (("top share", 5), ("k channels", 3), ("weight above", 7), ("paper's rule", 2)):
        widget.knobs["rule"].value = rule
        pointer(widget.charts, "drag", 0, place(k + 0.3))
        assert widget._selected == set(ranked[:k]), rule
        kept = rule if rule != "paper's rule" else "k channels"
        assert widget.knobs["rule"].value == kept and widget.charts.tip == {"text": f"{k} of 16"}
    for x, k in ((-3.0, 1), (7.0, 16)):  # pulled beyond the ends
        pointer(widget.charts, "drop", 0, x)
        assert len(widget._selected) == k


def test_as_many_channels_at_random(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images)
    widget.knobs["share"].value = 0.25
    draws = set()
    for _ in range(5):
        widget.knobs["random"].click()
        assert widget.knobs["rule"].value == "picked by hand" and len(widget._selected) == 4
        draws.add(frozenset(widget._selected))
    assert len(draws) > 1


def test_only_the_wrong_ones(model: Eyes, images: Images) -> None:
    own = [int(explain(model, images.batch([i])).predicted) for i in range(4)]
    labels = [own[0], (own[1] + 1) % 3, own[2], (own[3] + 1) % 3]
    some = Images(images.images, torch.tensor(labels))
    widget = widgets.explorer(model, some)
    item = widget.knobs["item"]
    widget.knobs["wrong"].value = True
    assert [i for _, i in item.options] == [1, 3] and item.value == 1
    assert len(widget.thumbnails.images) == 2 and widget.thumbnails.marks == [True, False]
    pointer(widget.thumbnails, "click", 1)
    assert item.value == 3
    widget.knobs["next"].click()
    assert item.value == 1  # round, among those that are left
    widget.knobs["wrong"].value = False
    widget.knobs["only"].value = labels[2]
    assert [i for _, i in item.options] == [i for i in range(4) if labels[i] == labels[2]]
    widget.knobs["only"].value = -1
    right = widgets.explorer(model, Images(images.images, torch.tensor(own)))
    right.knobs["wrong"].value = True
    assert not right.knobs["wrong"].value and "no image is left" in right.message.value
    plain = widgets.explorer(model, images.images, classes=CLASSES, labels=labels)
    plain.knobs["wrong"].value = True
    assert [i for _, i in plain.knobs["item"].options] == [1, 3]


def test_the_truth_is_outlined_and_counted(model: Eyes, images: Images) -> None:
    masks = torch.zeros(4, 32, 24, dtype=torch.bool)
    masks[:, 8:16, 6:18] = True
    widget = widgets.explorer(model, images.images, classes=CLASSES, truth=list(masks))
    target = widget.knobs["target"].value
    heat = explain(model, images.batch([0])).heatmap(
        "influence", target, select=TopFraction(0.1), size=(224, 168)
    )[0]
    large = torch.zeros(224, 168, dtype=torch.bool)
    large[56:112, 42:126] = True
    energy = float(heat[large].sum() / heat.sum())
    precision = average_precision_score(large.flatten(), heat.flatten())
    assert widget.view.labels[1].endswith(f"energy inside {energy:.2f}, AP {precision:.2f}")
    drawn = pixels(widget.view.images[0])
    plain = views.enlarged(plot.rgb(images.images[0]), 224)
    assert (drawn[55, 42:126] == 255).all() and (drawn[54, 42:126] == 0).all()
    assert np.array_equal(drawn[56:112, 42:126], plain[56:112, 42:126])  # the inside is left alone
    widget.knobs["outline"].value = False
    assert np.array_equal(pixels(widget.view.images[0]), plain)
    with pytest.raises(ValueError, match="truth= has 3 entries for 4 images"):
        widgets.explorer(model, images.images, truth=list(masks[:3]))


def test_photographs_can_be_added(model: Eyes, images: Images, tmp_path: Path) -> None:
    widget = widgets.explorer(model, images.images, classes=CLASSES)
    own = Image.fromarray(plot.rgb(images.images[2]))
    own.save(tmp_path / "mine.png")
    file, item = widget.knobs["path"], widget.knobs["item"]
    file.value = str(tmp_path / "mine.png")
    assert item.options[-1] == ("mine.png", 4) and item.value == 4 and len(widget.thumbnails.images) == 5
    assert repr(file.value) in code(widget)
    content = (tmp_path / "mine.png").read_bytes()

    def upload(name: str, content: bytes) -> None:  # as the page sends it
        sent = {"name": name, "type": "image/png", "size": len(content), "last_modified": 0}
        widget.knobs["upload"].set_state({"value": [sent | {"content": memoryview(content)}]})

    upload("up.png", content)
    assert item.options[-1] == ("up.png", 5) and "'up.png'" in code(widget)
    assert widget.knobs["upload"].value == ()
    upload("bad.png", b"no image")
    assert "bad.png is not a readable image" in widget.message.value and len(item.options) == 6
    file.value = str(tmp_path / "none.png")
    assert "none.png" in widget.message.value and len(item.options) == 6
    of_set = widgets.explorer(model, images)
    assert of_set.knobs["upload"].layout.display == "none"  # a set prepares its own images


def test_knobs_do_not_run_the_network_again(model: Eyes, images: Images) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model))
    widget.knobs["item"].value = 1
    widget.knobs["item"].value = 0
    runs = model.runs
    for name, value in (
        ("share", 0.2),
        ("method", "gate"),
        ("method", "top-gate"),
        ("rule", "paper's rule"),
        ("target", 2),
        ("smooth", False),
        ("item", 1),
        ("item", 0),
    ):
        widget.knobs[name].value = value
    pointer(widget.strip.maps, "click", 0)
    pointer(widget.charts, "move", 0)
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
    widget.knobs["method"].value = "log-odds influence"
    assert len(code(widget).splitlines()) == 2
    names: dict[str, Any] = {"selib": selib, "model": model, "images": images}
    exec(code(widget), names)  # noqa: S102 (our own two lines)
    want = widget.subject.explanation("image").heatmap(
        "influence", widget.knobs["target"].value, contrast=True, select=TopK(5)
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
        assert torch.equal(names["heatmap"], explain(model, want).heatmap(select=TopFraction(0.1)))


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
        "ex.knobs['opacity'].value = 0.2\nfor share in (0.7, 0.4, 0.2):\n    ex.knobs['share'].value = share",
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
    assert "TopFraction(0.2)" in still.data["text/plain"]
    assert Image.open(io.BytesIO(base64.b64decode(still.data["image/png"]))).width > 168 * 2


@pytest.mark.slow
def test_a_picture_is_saved_under_the_name_of_what_it_shows(
    model: Eyes, images: Images, tmp_path: Any
) -> None:
    widget = widgets.explorer(model, images, rivals=baselines.rivals(model), seed=7)
    target = CLASSES[widget.knobs["target"].value]
    widget.knobs["share"].value = 0.2
    assert (
        widget.caption
        == f"noise (synthetic), Eyes, seed 7: image 0, one; influence for {target}, channels TopFraction(0.2)"
    )
    path = widget.save(tmp_path)
    assert path.read_bytes() == widget.still() and str(path) in widget.message.value
    plain = target.replace(" <b>", "-b-")
    assert path.name == f"explorer-image-0-one-influence-for-{plain}-channels-TopFraction-0.2.png".replace(
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
    assert f"{int(want.sum())} of 16 selected" in widget.charts.said[0] and knob["sort"].value == "gate"
    knob["method"].value = "influence"
    assert knob["rule"].value == "top share" and "2 of 16" in widget.charts.said[0]
    knob["rule"].value, knob["k"].value = "k channels", 3
    knob["rule"].value = "picked by hand"  # starts with what was selected
    assert "3 of 16" in widget.charts.said[0]
    assert widget.rule == Channels(tuple(sorted(widget.strip.channels[:3])))


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
    assert widget.knobs["compare"].options == ("nothing", *views.READINGS)


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
    assert widget.knobs["compare"].options == ("nothing", *views.READINGS)
    assert pixels(widget.view.images[1]).std() > 0


def test_it_is_found_where_the_readme_says() -> None:
    assert selib.__getattr__("widgets") is widgets  # after a plain `import selib`
    with pytest.raises(AttributeError, match="has no attribute 'widget'"):
        selib.__getattr__("widget")


@pytest.mark.parametrize(
    ("module", "missing"), [("widgets", "ipywidgets"), ("widgets", "anywidget"), ("plot", "PIL")]
)
def test_a_missing_package_is_named(module: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("widgets", "explorer", "knobs", "pictures", "strip", "stills", "views", "plot"):
        monkeypatch.delitem(sys.modules, f"selib.{name}", raising=False)
    with pytest.raises(
        ImportError, match=rf"^selib.{module} needs {missing}: pip install 'selib\[widgets\]'$"
    ):
        importlib.import_module(f"selib.{module}")


# ---- drawings ----------


def test_a_chart_has_a_bar_for_each_channel_and_a_line_at_the_cut() -> None:
    top, high = views.TOP * views.SCALE, views.DOWN * views.SCALE

    def column(page: np.ndarray, place: float, count: int) -> list[str]:
        x = round(views.SCALE * (views.LEFT + views.ACROSS * views.edge(place, count)))
        return ["#" + bytes(pixel).hex().upper() for pixel in page[top : top + high + 1, x]]

    weights, chosen = torch.tensor([0.2, 1.0, -0.5, 0.6]), torch.tensor([False, True, False, True])
    page = views.gates_chart(weights, chosen, "gate s")
    bars = [column(page, place + 0.4, 4) for place in range(4)]  # from 1 to -0.5
    assert [plot.OURS in bar for bar in bars] == [True, True, False, False]
    assert [plot.CONTROLS in bar for bar in bars] == [False, False, True, True]
    lengths = [sum(colour in (plot.OURS, plot.CONTROLS) for colour in bar) for bar in bars]
    assert np.allclose(lengths, [high * size / 1.5 for size in (1.0, 0.6, 0.2, 0.5)], atol=4)
    assert column(page, 2, 4).count(plot.OTHERS) > 0.9 * high  # after the second of them
    by_hand = views.gates_chart(weights, ~chosen, "s")
    assert not any(plot.OTHERS in column(by_hand, place, 4) for place in (1, 2, 3))
    many = views.gates_chart(torch.linspace(1, 0, 1000), torch.arange(1000) < 10, "s")  # logarithmic
    assert plot.OURS in column(many, 5, 1000) and plot.CONTROLS in column(many, 50, 1000)
    for count in (4, 1000):
        for k in (0.5, 1.5, 3.5):
            x = (views.LEFT + views.ACROSS * views.edge(k, count)) / views.WIDTH
            assert views.rank_at(x, count) == pytest.approx(k)


def test_long_names_lose_their_middle() -> None:
    name = "a very long name of a photograph.jpeg"
    short = plot.elided(name, 100)
    assert short.startswith("a ve") and short.endswith("peg") and "…" in short
    assert plot.font(12).getlength(short) <= 100 and plot.elided("short", 100) == "short"


def test_a_picture_is_encoded_without_loss() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(views.encoded(picture)))), picture)
