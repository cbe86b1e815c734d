"""What `import selib` gives, for type checkers; `__init__.py` loads it on first use."""

from selib import files as files
from selib import heatmap as heatmap
from selib import images as images
from selib import pixels as pixels
from selib import plot as plot
from selib import video as video
from selib import widgets as widgets
from selib.attach import attach_se as attach_se
from selib.attach import describe as describe
from selib.attach import detach_se as detach_se
from selib.checkpoint import load_checkpoint as load_checkpoint
from selib.checkpoint import load_weights as load_weights
from selib.checkpoint import save_checkpoint as save_checkpoint
from selib.explainer import SEExplainer as SEExplainer
from selib.explainer import explain as explain
from selib.explanation import Explanation as Explanation
from selib.features import FeatureCache as FeatureCache
from selib.features import cache_features as cache_features
from selib.features import channel_test as channel_test
from selib.gates import GateReport as GateReport
from selib.gates import fit_gates as fit_gates
from selib.modalities import Modalities as Modalities
from selib.native import native_se as native_se
from selib.portable import Portable as Portable
from selib.portable import export as export
from selib.portable import save_onnx as save_onnx
from selib.scores import attribute_scores as attribute_scores
from selib.se import HeadSEBlock as HeadSEBlock
from selib.se import SEBlock as SEBlock
from selib.se import TargetSEBlock as TargetSEBlock
from selib.select import All as All
from selib.select import Channels as Channels
from selib.select import NormalQuantile as NormalQuantile
from selib.select import Threshold as Threshold
from selib.select import TopFraction as TopFraction
from selib.select import TopK as TopK
from selib.stream_gates import StreamGateReport as StreamGateReport
from selib.stream_gates import fit_stream_gates as fit_stream_gates
from selib.train import evaluate as evaluate
from selib.train import fit as fit
from selib.train import predict as predict

__version__: str
