"""What did the network look at? Squeeze-and-excitation explanations (Roxo et al., arXiv 2412.05134), tested.

selib.attach_se(model, example)        # an SE block before the classifier; no output changes
selib.fit_gates(model, loader)         # a trained network: sparse gates without labels, in seconds
ex = selib.explain(model, images)      # one forward pass, no gradients
ex.heatmap()                           # (B, H, W) in [0, 1]
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Loaded on first use: `import selib` and `selib --help` need not wait for PyTorch. Types are in
# `__init__.pyi`.
_WHERE = {
    "attach": ("attach_se", "describe", "detach_se"),
    "checkpoint": ("load_checkpoint", "load_weights", "save_checkpoint"),
    "explainer": ("SEExplainer", "explain"),
    "explanation": ("Explanation",),
    "features": ("FeatureCache", "cache_features", "channel_test"),
    "gates": ("GateReport", "fit_gates"),
    "modalities": ("Modalities",),
    "native": ("native_se",),
    "portable": ("Portable", "export", "save_onnx"),
    "se": ("HeadSEBlock", "SEBlock", "TargetSEBlock"),
    "select": ("All", "Channels", "NormalQuantile", "Threshold", "TopFraction", "TopK"),
    "stream_gates": ("StreamGateReport", "fit_stream_gates"),
    "scores": ("attribute_scores",),
    "train": ("evaluate", "fit", "predict"),
}
_MODULES = ("files", "heatmap", "images", "pixels", "plot", "video", "widgets")
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"selib.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"selib.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'selib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_MODULE_OF])
