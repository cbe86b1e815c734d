"""What did the network look at? Squeeze-and-excitation explanations (Roxo et al., arXiv 2412.05134), tested.

selib.attach_se(model, example)        # an SE block before the classifier; no output changes
selib.fit_gates(model, loader)         # a trained network: sparse gates without labels, in seconds
ex = selib.explain(model, images)      # one forward pass, no gradients
ex.heatmap()                           # (B, H, W) in [0, 1]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selib import baselines, heatmap, metrics, plot, widgets
    from selib.attach import attach_se, detach_se
    from selib.explanation import Explanation, Modalities, SEExplainer, Streams, explain, native_se
    from selib.gates import (
        FeatureCache,
        GateReport,
        StreamsGateReport,
        cache_features,
        channel_test,
        fit_gates,
    )
    from selib.se import SEBlock, TargetSEBlock
    from selib.select import All, Channels, NormalQuantile, Threshold, TopFraction, TopK
    from selib.train import (
        attribute_scores,
        evaluate,
        fit,
        load_checkpoint,
        load_weights,
        predict,
        save_checkpoint,
    )
    from studies import data

# Loaded on first use: `selib --help` need not wait for PyTorch.
_WHERE = {
    "attach": ("attach_se", "detach_se"),
    "explanation": ("Explanation", "Modalities", "SEExplainer", "Streams", "explain", "native_se"),
    "gates": (
        "FeatureCache",
        "GateReport",
        "StreamsGateReport",
        "cache_features",
        "channel_test",
        "fit_gates",
    ),
    "se": ("SEBlock", "TargetSEBlock"),
    "select": ("All", "Channels", "NormalQuantile", "Threshold", "TopFraction", "TopK"),
    "train": (
        "attribute_scores",
        "evaluate",
        "fit",
        "load_checkpoint",
        "load_weights",
        "predict",
        "save_checkpoint",
    ),
}
_MODULES = ("baselines", "data", "heatmap", "metrics", "plot", "widgets")
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "All",
    "Channels",
    "Explanation",
    "FeatureCache",
    "GateReport",
    "Modalities",
    "NormalQuantile",
    "SEBlock",
    "SEExplainer",
    "Streams",
    "StreamsGateReport",
    "TargetSEBlock",
    "Threshold",
    "TopFraction",
    "TopK",
    "attach_se",
    "attribute_scores",
    "baselines",
    "cache_features",
    "channel_test",
    "data",
    "detach_se",
    "evaluate",
    "explain",
    "fit",
    "fit_gates",
    "heatmap",
    "load_checkpoint",
    "load_weights",
    "metrics",
    "native_se",
    "plot",
    "predict",
    "save_checkpoint",
    "widgets",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"selib.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"selib.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'selib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
