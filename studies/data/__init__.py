"""Data sets: images or clips and their targets as tensors, strictly checked, decoded once."""

from selib.pixels import MEAN, STD, denormalize, normalize
from studies.data.faces import FaceSet, landmark_region, load_faces, rendered, with_masks
from studies.data.imageset import ImageSet
from studies.data.objects import FACES, NAMES, SPEAKERS, available, data_root, load, load_folder
from studies.data.speakers import ClipInfo, SpeakerSet, draw_clips, load_speakers

__all__ = [
    "FACES",
    "MEAN",
    "NAMES",
    "SPEAKERS",
    "STD",
    "ClipInfo",
    "FaceSet",
    "ImageSet",
    "SpeakerSet",
    "available",
    "data_root",
    "denormalize",
    "draw_clips",
    "landmark_region",
    "load",
    "load_faces",
    "load_folder",
    "load_speakers",
    "normalize",
    "rendered",
    "with_masks",
]
