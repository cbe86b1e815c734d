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
    from selib import baselines, files, heatmap, metrics, plot, video, widgets
    from selib.attach import attach_se, describe, detach_se
    from selib.checkpoint import load_checkpoint, load_weights, save_checkpoint
    from selib.explanation import Explanation, SEExplainer, explain
    from selib.features import FeatureCache, cache_features, channel_test
    from selib.gates import GateReport, fit_gates
    from selib.modalities import Modalities
    from selib.native import native_se
    from selib.se import SEBlock, TargetSEBlock
    from selib.select import All, Channels, NormalQuantile, Threshold, TopFraction, TopK
    from selib.stream_gates import StreamGateReport, fit_stream_gates
    from selib.train import attribute_scores, evaluate, fit, predict

# Loaded on first use: `import selib` and `selib --help` need not wait for PyTorch.
_WHERE = {
    "attach": ("attach_se", "describe", "detach_se"),
    "checkpoint": ("load_checkpoint", "load_weights", "save_checkpoint"),
    "explanation": ("Explanation", "SEExplainer", "explain"),
    "features": ("FeatureCache", "cache_features", "channel_test"),
    "gates": ("GateReport", "fit_gates"),
    "modalities": ("Modalities",),
    "native": ("native_se",),
    "se": ("SEBlock", "TargetSEBlock"),
    "select": ("All", "Channels", "NormalQuantile", "Threshold", "TopFraction", "TopK"),
    "stream_gates": ("StreamGateReport", "fit_stream_gates"),
    "train": ("attribute_scores", "evaluate", "fit", "predict"),
}
_MODULES = ("baselines", "files", "heatmap", "metrics", "plot", "video", "widgets")
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
    "StreamGateReport",
    "TargetSEBlock",
    "Threshold",
    "TopFraction",
    "TopK",
    "attach_se",
    "attribute_scores",
    "baselines",
    "cache_features",
    "channel_test",
    "describe",
    "detach_se",
    "evaluate",
    "explain",
    "files",
    "fit",
    "fit_gates",
    "fit_stream_gates",
    "heatmap",
    "load_checkpoint",
    "load_weights",
    "metrics",
    "native_se",
    "plot",
    "predict",
    "save_checkpoint",
    "video",
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
