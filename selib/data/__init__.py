"""Data sets: images and targets as tensors, strictly checked, decoded once."""

from selib.data.imageset import MEAN, STD, ImageSet, denormalize, normalize
from selib.data.objects import NAMES, available, data_root, load, load_folder

__all__ = [
    "MEAN",
    "NAMES",
    "STD",
    "ImageSet",
    "available",
    "data_root",
    "denormalize",
    "load",
    "load_folder",
    "normalize",
]
