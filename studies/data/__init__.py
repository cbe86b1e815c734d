"""Data sets: images or clips and their targets as tensors, strictly checked, decoded once."""

from selib.pixels import normalize
from studies.data.faces import FaceSet, load_faces, rendered
from studies.data.hqmasks import also_masked, masked_faces, with_masks
from studies.data.imageset import ImageSet
from studies.data.objects import available, data_root, load
from studies.data.photos import enlarged, imagenet_sample, pets, shipped, tiny_at, tiny_wnids
from studies.data.regions import landmark_region
from studies.data.speaker_twin import draw_clips
from studies.data.speakers import SpeakerSet, load_speakers

__all__ = [
    "FaceSet",
    "ImageSet",
    "SpeakerSet",
    "also_masked",
    "available",
    "data_root",
    "draw_clips",
    "enlarged",
    "imagenet_sample",
    "landmark_region",
    "load",
    "load_faces",
    "load_speakers",
    "masked_faces",
    "normalize",
    "pets",
    "rendered",
    "shipped",
    "tiny_at",
    "tiny_wnids",
    "with_masks",
]
