"""Where an attribute of CelebA is to be looked for, given the five landmarks of a face."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.twins import faces as synth

# The attributes of a place, and its edges on both halves of a face: from, to, top, bottom. Across, 1 is the
# distance of the eyes, counted from the middle between them to either side; down, 1 is the way from there to
# the middle of the mouth. The edges were set by hand round the parts of rendered faces, with a margin;
# tests/studies/test_celeba.py measures how much of each part they hold.
PLACES: dict[str, tuple[list[str], list[tuple[float, float, float, float]]]] = {
    "eyes": (["Narrow_Eyes"], [(0.15, 0.85, -0.3, 0.2)]),
    "under the eyes": (["Bags_Under_Eyes"], [(0.2, 0.8, 0.12, 0.45)]),
    "brows": (["Arched_Eyebrows", "Bushy_Eyebrows"], [(0.1, 0.95, -0.7, -0.25)]),
    "glasses": (["Eyeglasses"], [(0.0, 1.15, -0.35, 0.4)]),
    "nose": (["Big_Nose", "Pointy_Nose"], [(0.0, 0.42, -0.1, 0.85)]),
    "mouth": (["Big_Lips", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"], [(0.0, 0.58, 0.82, 1.55)]),
    "upper lip": (["Mustache"], [(0.0, 0.55, 0.65, 1.05)]),
    "chin": (["Double_Chin", "Goatee"], [(0.0, 0.6, 1.2, 2.1)]),
    "jaw": (["5_o_Clock_Shadow"], [(0.0, 1.15, 0.65, 1.9)]),
    "cheeks": (["High_Cheekbones", "Rosy_Cheeks"], [(0.45, 1.05, 0.3, 0.9)]),
    "sides of the face": (["Sideburns"], [(0.6, 1.25, -0.35, 1.6)]),
    "forehead": (["Receding_Hairline"], [(0.0, 0.95, -1.45, -0.45)]),
    "top of the head": (["Bald"], [(0.0, 1.2, -2.05, -0.5)]),
    "fringe": (["Bangs"], [(0.0, 1.0, -1.65, -0.5)]),
    "hair": (
        ["Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Straight_Hair", "Wavy_Hair"],
        [(0.0, 1.65, -2.15, -1.0), (1.0, 1.65, -1.0, 2.0)],
    ),
    "hat": (["Wearing_Hat"], [(0.0, 1.6, -2.7, -0.6)]),
    "earlobes": (["Wearing_Earrings"], [(0.95, 1.55, 0.45, 1.2)]),
    "neck": (["Wearing_Necklace"], [(0.0, 0.9, 1.85, 2.95)]),
    "collar": (["Wearing_Necktie"], [(0.0, 0.55, 2.05, 3.2)]),
}
_PLACE_OF = {attribute: place for place, (attributes, _) in PLACES.items() for attribute in attributes}
WHERE = {attribute: _PLACE_OF[attribute] for attribute in synth.REGIONS}  # in CelebA's order


def landmark_region(attribute: str, landmarks: Tensor, size: tuple[int, int]) -> Tensor:
    """Where an attribute is looked for, given the five landmarks alone: bool (B, H, W).

    landmarks float (B, 5, 2) as in `FaceSet`; size: H, W. The region is one or two boxes of `PLACES`,
    turned, scaled and sheared with the face: a pixel belongs to it when its centre does. It says where the
    part would be, not that it is there. Raises ValueError for an attribute of the whole face.
    """
    check_localised(attribute)
    points = landmarks.double()
    middle = (points[:, 0] + points[:, 1]) / 2
    across, down = points[:, 1] - points[:, 0], (points[:, 3] + points[:, 4]) / 2 - middle
    ys, xs = torch.meshgrid(torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij")
    x, y = xs - middle[:, 0, None, None], ys - middle[:, 1, None, None]
    # (x, y) = a * across + b * down, solved by Cramer's rule
    (ax, ay), (dx, dy) = (axis[:, :, None, None].unbind(1) for axis in (across, down))
    area = ax * dy - ay * dx
    a, b = ((x * dy - y * dx) / area).abs(), (ax * y - ay * x) / area
    region = torch.zeros(a.shape, dtype=torch.bool)
    for start, stop, top, bottom in PLACES[WHERE[attribute]][1]:
        region |= (a >= start) & (a <= stop) & (b >= top) & (b <= bottom)
    return region


def check_localised(attribute: str) -> None:
    """Raise ValueError for an attribute that CelebA does not have, or that belongs to the whole face."""
    if attribute not in synth.ATTRIBUTES:
        raise ValueError(f"CelebA has no attribute {attribute!r}; it has {', '.join(synth.ATTRIBUTES)}")
    if attribute not in synth.REGIONS:
        those = ", ".join(synth.REGIONS)
        raise ValueError(f"{attribute} belongs to the whole face, not to a region; these have one: {those}")
