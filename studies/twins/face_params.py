"""The parameters of a rendered face: CelebA's attributes, the parts that show them, how faces are sampled."""

from collections.abc import Collection
from typing import Any

import numpy as np

from studies.twins.sampling import between, chance, one_of

Params = dict[str, Any]  # plain numbers, booleans, strings and lists: goes through JSON unchanged

_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
    Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup
    High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose
    Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
_PARTS = """
    skin ears neck cloth scalp forehead cheeks chin bags nose eyes brows mouth stubble goatee mustache
    sideburns hair bangs glasses hat earrings necklace necktie
"""
ATTRIBUTES = tuple(_ATTRIBUTES.split())
PARTS = tuple(_PARTS.split())

_SHOWN = """
    scalp:Bald forehead:Receding_Hairline cheeks:Rosy_Cheeks,High_Cheekbones chin:Double_Chin
    bags:Bags_Under_Eyes nose:Big_Nose,Pointy_Nose eyes:Narrow_Eyes brows:Arched_Eyebrows,Bushy_Eyebrows
    mouth:Smiling,Mouth_Slightly_Open,Big_Lips,Wearing_Lipstick stubble:5_o_Clock_Shadow goatee:Goatee
    mustache:Mustache sideburns:Sideburns
    hair:Black_Hair,Blond_Hair,Brown_Hair,Gray_Hair,Straight_Hair,Wavy_Hair
    bangs:Bangs,Black_Hair,Blond_Hair,Brown_Hair,Gray_Hair,Straight_Hair,Wavy_Hair
    glasses:Eyeglasses hat:Wearing_Hat earrings:Wearing_Earrings necklace:Wearing_Necklace
    necktie:Wearing_Necktie
"""
_SHOWS: dict[str, list[str]] = {}  # part: the attributes that are seen in it
for _entry in _SHOWN.split():
    _part, _names = _entry.split(":")
    _SHOWS[_part] = _names.split(",")

# The parts in which an attribute is seen. The other attributes belong to the whole face.
REGIONS: dict[str, tuple[str, ...]] = {}
for _name in ATTRIBUTES:
    if _parts := tuple(part for part, names in _SHOWS.items() if _name in names):
        REGIONS[_name] = _parts

# What a part looks like without the attributes that it can show.
NEUTRAL: dict[str, Params] = {
    "skin": {"Pale_Skin": False, "Young": True},
    **{part: dict.fromkeys(names, False) for part, names in _SHOWS.items()},
    "nose": {"nose": "plain"},
    "eyes": {"Narrow_Eyes": False, "Heavy_Makeup": False},
    "brows": {"brows": "plain"},
    "hair": {"Bald": True, "Bangs": False},
    "bangs": {"Bangs": False},
}

# A face counts as attractive when these points add up to more than 1: a planted bias, to be found again.
ATTRACTIVE = {"Young": 1.0, "Wearing_Lipstick": 1.0, "Smiling": 0.5}
ATTRACTIVE |= {"Eyeglasses": -1.0, "Chubby": -1.0, "Bald": -1.0}

SPURIOUS = 0.9  # correlation of Eyeglasses with Wearing_Hat in the split "spurious"


def sample(rng: np.random.Generator, *, spurious: bool = False) -> Params:
    """Parameters of one face: attributes, shape, pose, colours, light, background.

    spurious: Eyeglasses and Wearing_Hat correlate at ρ = 0.9; otherwise they are independent.
    """
    male, young = chance(rng, 0.45), chance(rng, 0.72)
    p: Params = {"Male": male, "Young": young}
    p["Bald"] = male and chance(rng, 0.10 if young else 0.32)
    p["Receding_Hairline"] = not p["Bald"] and chance(rng, (0.14 if young else 0.34) if male else 0.05)
    p["full"] = beard = male and chance(rng, 0.16)  # mustache, goatee and sideburns
    p["Chubby"] = chubby = chance(rng, 0.14)
    p["Smiling"] = smiling = chance(rng, 0.48)
    p["Heavy_Makeup"] = makeup = not male and chance(rng, 0.6)
    p["Wearing_Lipstick"] = not male and chance(rng, 0.92 if makeup else 0.3)
    p["Eyeglasses"], p["Wearing_Hat"] = _glasses_and_hat(rng, young, spurious)
    p["Wearing_Earrings"] = chance(rng, 0.06 if male else 0.42)
    p["Wearing_Necktie"] = chance(rng, 0.34 if male else 0.03)
    if male:
        p["length"] = one_of(rng, short=0.86, middle=0.1, long=0.04)
    else:
        p["length"] = one_of(rng, short=0.1, middle=0.35, long=0.55)
    hairy = not p["Bald"] and not p["Receding_Hairline"]
    p["Bangs"] = hairy and chance(rng, 0.12 if male else 0.32)
    blond, gray = 0.1 if male else 0.26, 0.02 if young else 0.5
    p["hair"] = one_of(rng, black=0.27, brown=0.27, blond=blond, gray=gray, red=0.08)
    p["texture"] = one_of(rng, straight=0.4, wavy=0.22 if male else 0.45, curly=0.2)
    p["Oval_Face"] = not chubby and chance(rng, 0.34)
    p["Double_Chin"] = chance(rng, 0.6 if chubby else 0.08)
    p["Pale_Skin"] = chance(rng, 0.1)
    p["Rosy_Cheeks"] = chance(rng, 0.05 if male else 0.4 if makeup else 0.12)
    p["High_Cheekbones"] = chance(rng, 0.75 if smiling else 0.22)
    p["Bags_Under_Eyes"] = chance(rng, 0.18 if young else 0.42)
    p["Narrow_Eyes"] = chance(rng, 0.2)
    if male:
        p["brows"] = one_of(rng, plain=0.5, bushy=0.36, arched=0.1)
        p["nose"] = one_of(rng, plain=0.45, big=0.4, pointy=0.15)
    else:
        p["brows"] = one_of(rng, plain=0.42, bushy=0.08, arched=0.5)
        p["nose"] = one_of(rng, plain=0.5, big=0.16, pointy=0.34)
    p["Mouth_Slightly_Open"] = chance(rng, 0.66 if smiling else 0.3)
    p["Big_Lips"] = chance(rng, 0.18 if male else 0.34)
    p["5_o_Clock_Shadow"] = male and not beard and chance(rng, 0.24)
    p["Goatee"] = beard or (male and chance(rng, 0.13))
    p["Mustache"] = beard or (male and chance(rng, 0.15))
    p["Sideburns"] = beard or (male and chance(rng, 0.12))
    p["Wearing_Necklace"] = not p["Wearing_Necktie"] and chance(rng, 0.08 if male else 0.36)
    p["Blurry"] = chance(rng, 0.08)
    p["collar"] = p["Wearing_Necktie"] or chance(rng, 0.3)
    p["tucked"] = p["Wearing_Earrings"] or chance(rng, 0.4)  # hair behind the ears
    return p | _looks(rng)


def _glasses_and_hat(rng: np.random.Generator, young: bool, spurious: bool) -> tuple[bool, bool]:
    if not spurious:
        return chance(rng, 0.18 if young else 0.26), chance(rng, 0.15)
    share = 0.3  # of faces that have glasses, and of those that have a hat
    both = share**2 + SPURIOUS * share * (1 - share)
    glasses = chance(rng, share)
    return glasses, chance(rng, both / share if glasses else (share - both) / (1 - share))


def _looks(rng: np.random.Generator) -> Params:
    """What no attribute says: pose, shape, colours, light, background."""
    return {
        "angle": between(rng, -7, 7),
        "scale": between(rng, 0.93, 1.07),
        "shift": [between(rng, -4, 4), between(rng, -4, 4)],
        "yaw": between(rng, -1, 1),
        "shape": [between(rng, -1, 1) for _ in range(6)],
        "tone": between(rng, 0, 1) ** 1.4,
        "iris": rng.choice(["#5b3a1e", "#3b2716", "#3f6a8a", "#4d6b43", "#6b6f72"]).item(),
        "lips": between(rng, 0, 1),
        "cloth": _colour(rng, 0.7, 0.9),
        "accent": _colour(rng, 0.9, 0.8),
        "hat_colour": _colour(rng, 0.8, 0.75),
        "hat_kind": one_of(rng, cap=0.35, beanie=0.3, brimmed=0.35),
        "frame_kind": one_of(rng, round=0.35, square=0.4, dark=0.25),
        "frame_colour": rng.choice(["#17130f", "#3b2313", "#7a1f1f", "#25304d", "#5c5c5c"]).item(),
        "metal": rng.choice(["#d8b24a", "#c9ccd2", "#efe9df"]).item(),
        "jewel": between(rng, 0, 1),
        "light": [between(rng, -0.2, 0.2), between(rng, -0.14, 0.14), between(rng, 0.86, 1.12)],
        "cast": [between(rng, 0.94, 1.06) for _ in range(3)],
        "wall": [_colour(rng, 0.5, 0.95) for _ in range(3)],
        "things": [_thing(rng) for _ in range(int(rng.integers(0, 5)))],
        "noise": between(rng, 1, 5),
        "seed": int(rng.integers(2**31)),
    }


def _colour(rng: np.random.Generator, saturation: float, value: float) -> list[int]:
    grey = between(rng, 0.12, value)
    channels = [grey * (1 + saturation * between(rng, -0.7, 0.7)) for _ in range(3)]
    return [round(255 * min(1.0, max(0.0, channel))) for channel in channels]


def _thing(rng: np.random.Generator) -> list[Any]:
    """What lies on the wall: kind, x, y, size."""
    kind = one_of(rng, oval=1, rings=1, bar=1, dots=1, arc=1)
    return [kind, between(rng, 0, 1), between(rng, 0, 1), between(rng, 0.6, 1.4)]


def without(params: Params, removed: Collection[str]) -> Params:
    """Parameters of the same face without these parts; what no face can lack (a mouth, a nose) turns neutral.

    Raises ValueError for a part that cannot be removed.
    """
    changed = dict(params)
    for part in removed:
        if part not in NEUTRAL:
            raise ValueError(
                f"there is no part {part!r} to remove from a face; choose from {', '.join(NEUTRAL)}"
            )
        changed.update(NEUTRAL[part])
    return changed


def attributes(params: Params) -> np.ndarray:
    """The attributes that can be seen in the face, int64 (40,) of 0 and 1, in the order of `ATTRIBUTES`."""
    p = params
    hair, bare_head = not p["Bald"], not p["Wearing_Hat"]
    seen = {name: bool(p[name]) for name in ATTRIBUTES if name in p} | {
        "Bald": p["Bald"] and bare_head,
        "Bangs": p["Bangs"] and hair and bare_head,
        "Receding_Hairline": p["Receding_Hairline"] and hair and bare_head,
        "Straight_Hair": hair and p["texture"] == "straight",
        "Wavy_Hair": hair and p["texture"] == "wavy",
        "Arched_Eyebrows": p["brows"] == "arched",
        "Bushy_Eyebrows": p["brows"] == "bushy",
        "Big_Nose": p["nose"] == "big",
        "Pointy_Nose": p["nose"] == "pointy",
        "No_Beard": not (p["5_o_Clock_Shadow"] or p["Goatee"] or p["Mustache"] or p["Sideburns"]),
    }
    for colour in ("black", "blond", "brown", "gray"):
        seen[f"{colour.capitalize()}_Hair"] = hair and p["hair"] == colour
    seen["Attractive"] = sum(points for name, points in ATTRACTIVE.items() if seen[name]) > 1
    return np.array([seen[name] for name in ATTRIBUTES], np.int64)
