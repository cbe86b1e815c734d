"""The look of every figure, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

STYLE: Any = {  # seaborn's "whitegrid", with small letters
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": ".8",
    "axes.labelcolor": ".15",
    "text.color": ".15",
    "xtick.color": ".15",
    "ytick.color": ".15",
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": ".8",
    "grid.linestyle": "-",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw in :data:`STYLE`, whatever style the notebook has set."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


HEAVY = 150_000  # bytes of a figure in a notebook: more are too many


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A Figure of this size in inches, and its axes (rows, columns)."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def hide_frame(ax: Axes) -> None:
    """Take away ticks, grid and frame, but leave the labels."""
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def screen(fig: Figure) -> bytes:
    """A figure as PNG bytes at the size of a screen, in 256 colours of its own: they keep notebooks small.

    A heavy one, of many photographs, is a third smaller.
    """
    large = BytesIO()
    fig.savefig(large, format="png", dpi=192, bbox_inches="tight", metadata={"Software": None})
    with Image.open(large) as drawn:
        whole = drawn.convert("RGB")
    for divisor in (2, 3):
        size = whole.width // divisor, whole.height // divisor
        small, shown = whole.resize(size, Image.Resampling.LANCZOS), BytesIO()
        palette = small.quantize(256, dither=Image.Dither.NONE)
        # Dithered: photographs show no bands.
        small.quantize(palette=palette).save(shown, "PNG", optimize=True)
        if shown.tell() <= HEAVY:
            break
    return shown.getvalue()
