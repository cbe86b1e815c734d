"""Data sets: images and targets as tensors, strictly checked, decoded once."""

from selib.data.celeba import FaceSet, landmark_region, load_faces, rendered, with_masks
from selib.data.imageset import MEAN, STD, ImageSet, denormalize, normalize
from selib.data.objects import FACES, NAMES, available, data_root, load, load_folder

__all__ = [
    "FACES",
    "MEAN",
    "NAMES",
    "STD",
    "FaceSet",
    "ImageSet",
    "available",
    "data_root",
    "denormalize",
    "landmark_region",
    "load",
    "load_faces",
    "load_folder",
    "normalize",
    "rendered",
    "with_masks",
]
