"""The features of a rendered face and what it wears; `face_hair` draws what grows on it.

Shapes are in pixels of the face's own frame, x to the right and y down from the middle between the eyes;
many are given by their right half (see `shapes`). The number after a shape is its depth (`face_canvas.pose`).
"""

import cv2
import numpy as np

from studies.twins.face_canvas import Face, among, rgb, sixteenths
from studies.twins.face_params import Params
from studies.twins.shapes import Points, across, between_arcs, both, curve, ellipse, points, smooth, symmetric

SIDES = (-1, 1)  # left and right in the image

_TONES = [[246, 214, 190], [232, 190, 158], [208, 158, 120], [166, 114, 78], [118, 78, 52]]


def skin_tone(p: Params) -> np.ndarray:
    """The skin's colour, float32 (3, 1, 1) in 0..255."""
    if p["Pale_Skin"]:
        return rgb([246, 230, 224])
    place = p["tone"] * (len(_TONES) - 1)
    low = min(int(place), len(_TONES) - 2)
    lighter, darker = rgb(_TONES[low]), rgb(_TONES[low + 1])
    return lighter + np.float32(place - low) * (darker - lighter)


def proportions(p: Params) -> tuple[float, float]:
    """How much wider than the average the face is, and where its chin ends."""
    wide = 2.0 * p["shape"][0] + (7 if p["Chubby"] else 0) - (2.5 if p["Oval_Face"] else 0)
    return wide, 69 + 1.5 * p["shape"][2] + (6 if p["Oval_Face"] else -1) + 0.5 * p.get("gap", 0.0)


def smile(p: Params) -> tuple[float, float]:
    """Half the mouth's width, and how far its corners are drawn up."""
    return (20.5, 5.5) if p["Smiling"] else (14.5 + p["shape"][4], -1.0)


def draw_body(face: Face) -> None:
    """Shoulders, neck, collar, and what is worn there."""
    p, skin, cloth = face.p, face.skin, rgb(face.p["cloth"])
    width = (27 if p["Male"] else 22) + (3 if p["Chubby"] else 0)  # half the neck's
    shoulders = symmetric([(0, 84), (width + 1, 82), (56, 92), (88, 106), (98, 150), (0, 160)])
    face.fill(shoulders, -6, cloth, part="cloth")
    face.fill(shoulders + (0, 9), -6, cloth * 0.8, opacity=0.5, soft=5, only="cloth")
    low = 88 if p["collar"] else 104
    throat = [(width - 2, 74), (width + 2, 84), (width * 0.7, low - 4), (0, low)]
    face.fill(symmetric([(0, 40), (width - 1, 46), *throat]), -4, skin * 0.88, part="neck")
    jaw_shadow = symmetric("0,52 38,44 30,66 12,80 0,82")
    face.fill(jaw_shadow, -2, skin * 0.55, opacity=0.6, soft=4, only="neck")
    if p["collar"]:
        shirt = rgb("#f2f2ee") * (0.86 + 0.14 * p["jewel"])
        edge = [(-width - 12, 90), (-width - 3, 80), (0, 97), (width + 3, 80), (width + 12, 90)]
        face.fill(points([*edge[1:], (26, 150), (-26, 150), edge[0]]), -5, shirt, part="cloth")
        for lapel in both([(width + 3, 80), (12, 92), (3, 98)]):
            face.line(lapel, -5, shirt * 0.7, 1.5)
    elif p["jewel"] < 0.5:
        face.line(curve(across([(0, 103), (width * 0.6, 97), (width + 2, 82)])), -4, cloth * 0.6, 2)
    if p["Wearing_Necktie"]:
        tie = rgb(p["accent"])
        face.fill("-6.5,87 6.5,87 4,97 9,112 12,150 -12,150 -9,112 -4,97", -4, tie, part="necktie")
        for y in range(98, 140, 7):
            stripe = points("-10,5 10,-3 10,0 -10,8") + (0, y)
            face.fill(stripe, -4, tie * 0.55 + 90, only="necktie")
        face.fill("-6.5,87 6.5,87 4,97 -4,97", -4, tie * 0.7)  # the knot
    if p["Wearing_Necklace"]:
        _draw_necklace(face, curve(across([(0, 97), (width * 0.62, 91), (width - 1, 79)])))


def _draw_necklace(face: Face, way: Points) -> None:
    metal = rgb(face.p["metal"])
    if face.p["jewel"] < 0.5:
        beads = way[:: max(1, len(way) // 11)]
        face.fill([ellipse(x, y + 0.8, 3.4, 3.4, 10) for x, y in beads], -3, metal * 0.35, part="necklace")
        face.fill([ellipse(x, y, 2.9, 2.9, 10) for x, y in beads], -3, metal)
        face.fill([ellipse(x - 0.8, y - 0.9, 0.9, 0.9, 8) for x, y in beads], -3, metal * 0.2 + 204)
    else:  # a chain and a pendant
        face.line(way + (0, 0.8), -3, metal * 0.35, 4.2, part="necklace")
        face.line(way, -3, metal, 2.6)
        face.fill("0,94 5.5,100 0,107 -5.5,100", -3, metal * 0.5, part="necklace")
        face.fill("0,96 3.5,100 0,105 -3.5,100", -3, rgb(face.p["accent"]) * 0.5 + 110)


def draw_skin(face: Face) -> None:
    """Ears, the face's contour, and what lies under its features: forehead, scalp, cheeks, chin."""
    p, skin = face.p, face.skin
    ear = 45.5 + p["shape"][0]
    face.fill([ellipse(side * ear, 7, 6.5, 12) for side in SIDES], -3, skin * 0.9, part="ears")
    face.fill([ellipse(side * (ear + 1), 7, 3, 7) for side in SIDES], -3, skin * 0.7, soft=1.2)
    contour = _contour(p)
    face.fill(contour, 0, skin * 0.82, part="skin")
    face.fill(contour * (0.86, 0.9) + (0, -1), 2, skin, soft=7, only="skin")
    face.fill(ellipse(0, -34, 22, 12), 6, skin * 0.4 + 153, opacity=0.22, soft=7, only="skin")
    for side in SIDES:  # eye sockets, and the hollow below the cheekbones
        face.fill(ellipse(side * 19.5, -2, 14, 9), 3, skin * 0.68, opacity=0.38, soft=3.5)
        face.fill(ellipse(side * 33, 36, 7, 14), 1, skin * 0.7, opacity=0.3, soft=5, only="skin")
    top = -57 if p["Receding_Hairline"] else -46
    forehead = symmetric([(0, top), (22, top + 2), (34, -36), (36, -22), (20, -19), (0, -19)])
    face.fill(forehead, 0, part="forehead", only="skin")
    if p["Bald"]:
        skull = symmetric("0,-72 26,-67 41,-47 46,-20 40,-14 33,-36 18,-47 0,-49")
        face.fill(skull, 0, skin * 0.9, part="scalp")
        face.fill(skull * (0.9, 0.95), 0, skin, opacity=0.8, soft=4, only="scalp")
        shine = ellipse(-10 * np.sign(p["light"][0]), -60, 15, 5)
        face.fill(shine, 0, rgb("#ffffff"), opacity=0.45, soft=3, only="scalp")
    cheeks = [smooth(ellipse(side * 29, 22, 12, 11, 12)) for side in SIDES]
    face.fill(cheeks, 3, part="cheeks", only="skin")
    if p["Rosy_Cheeks"]:
        # on dark skin a blush darkens, so it is drawn stronger there
        face.fill(cheeks, 3, rgb("#dd2f4c"), opacity=0.5 + 0.12 * p["tone"], soft=3.0)
    if p["High_Cheekbones"]:
        for bone in map(curve, both("18,19 28,16 39,8")):
            face.line(bone, 4, np.minimum(skin * 1.12 + 26, 255), 8, opacity=0.75, soft=2.0)
            face.line(bone + (0, 11), 3, skin * 0.5, 7, opacity=0.6, soft=2.0)
    low = 1 + proportions(p)[1]
    face.fill(ellipse(0, low - 9, 17, 11), 5, part="chin", only="skin")
    face.fill(ellipse(0, low - 11, 8, 4), 6, skin * 0.5 + 128, opacity=0.16, soft=3)
    if p["Double_Chin"]:
        fold = symmetric([(0, low - 1), (20, low - 8), (31, low - 6), (21, low + 8), (0, low + 12)])
        face.fill(fold, 3, skin * 0.94, part="chin")
        upper = curve(across([(0, low + 1), (12, low - 1), (22, low - 8)]))
        face.line(upper, 4, skin * 0.42, 3.2, opacity=0.9, soft=0.8)
        lower = curve(across([(0, low + 13), (12, low + 11), (24, low + 4)]))
        face.line(lower, 2, skin * 0.45, 3, opacity=0.8, soft=1)


def _contour(p: Params) -> Points:
    wide, chin = proportions(p)
    jaw = (37 if p["Male"] else 33) + wide + 1.2 * p["shape"][1]
    jaw += (3 if p["Chubby"] else 0) - (2.0 if p["Oval_Face"] else 0)
    tip = 19 if p["Male"] else 14
    upper = [(0, -68), (24, -63), (39, -44), (44.5 + 0.4 * wide, -14), (43.5 + 0.8 * wide, 14)]
    return symmetric([*upper, (jaw + 2, 40), (tip + 8 + 0.4 * wide, 58), (tip - 4, chin - 3), (0, chin)])


def draw_age(face: Face) -> None:
    """The lines of an older face, and bags under the eyes."""
    dark = face.skin * 0.55
    if not face.p["Young"]:
        for y in (-40, -34, -28):  # on the forehead
            frown = curve([(-24, y + 1), (-10, y - 1.5), (4, y), (24, y + 1)])
            face.line(frown, 5, dark, 1.7, opacity=0.75, soft=0.4)
        for tilt in (-5, 0, 5):
            for crows_foot in both([(32, 1 + tilt * 0.3), (36, 1 + tilt * 0.7), (40, 1 + tilt)]):
                face.line(crows_foot, 0, dark, 1.4, opacity=0.8)
        for beside_nose in both("10,25 17,32 21,43"):
            face.line(curve(beside_nose), 5, dark, 2, opacity=0.75, soft=0.4)
        for beside_mouth in both("21,50 23,56 22,61"):
            face.line(curve(beside_mouth), 4, dark, 1.6, opacity=0.6, soft=0.4)
    if face.p["Bags_Under_Eyes"]:
        for bag in map(smooth, both("9,6.5 19,8.5 29.5,6 27,12 19,14.5 12,12")):
            face.fill(bag, 4, face.skin * 0.5 + rgb("#3c2350") * 0.3, opacity=0.62, soft=1.1)
            face.fill(bag, 4, part="bags")
        for rim in both("11,12 19,15 28,12"):
            face.line(curve(rim), 4, dark * 0.8, 1.6, opacity=0.9)


def draw_eyes(face: Face) -> None:
    """For each eye: shadow on the lid, white, iris, glint, the lid's rim and crease, lashes."""
    p, makeup = face.p, face.p["Heavy_Makeup"]
    tall = 2.1 if p["Narrow_Eyes"] else 5.2 + 0.5 * p["shape"][3]
    inner, top, outer = -0.72 * tall, -tall, -0.66 * tall  # heights of the upper lid
    for side in SIDES:
        x = side * 19.5
        if makeup:
            shadow = smooth(points("-12,0 -6,-10 5,-10.5 13,-3 6,-1 -6,-1") + (x, 0))
            face.fill(shadow, 4, rgb(p["accent"]) * 0.5 + rgb("#5a2f6e") * 0.5, opacity=0.7, soft=1.1)
        socket = smooth(points("-13,1 -6,-9.5 4,-10.5 13,-2 9,5.5 -7,5.5") + (x, 0))
        face.fill(socket, 4, part="eyes")
        upper = [(-10.5, 0.8), (-5, inner), (1, top), (6, outer), (10.5, 0.2)]
        white = smooth(points([*upper, (5, 0.6 * tall), (-4, 0.72 * tall)]) + (x, 0))
        lid = [(-11.5, 1.2), (-5, inner - 0.3), (1, top - 0.4), (6, outer - 0.3), (11.2, 0.2)]
        rim = curve(points(lid) + (x, 0))
        if side < 0:
            white, rim = (shape * (-1, 1) + (2 * x, 0) for shape in (white, rim))
        face.fill(white, 4, rgb("#f3efe9") * 0.97, part="eyes")
        _draw_iris(face, x, white)
        if not p["Narrow_Eyes"]:
            face.fill(ellipse(x + 1.5, -2, 1.1, 1.1, 10), 4, rgb("#fafafa"))
        width = 3.4 if makeup else 1.8 if p["Male"] else 2.2
        face.line(rim, 4, rgb("#1a1210"), width, opacity=0.95)
        face.line(rim + (0, -3.6), 4, face.skin * 0.5, 1.3, opacity=0.6)
        if makeup:
            roots = rim[::5]
            for root, slant in zip(roots, np.linspace(-3, 3, len(roots)), strict=True):
                tip = root + (slant, -4.2)
                face.line(np.vstack([root, (root + tip) / 2, tip]), 4, rgb("#120c0a"), 1.1)


def _draw_iris(face: Face, x: float, white: Points) -> None:
    """Iris and pupil, where the lids leave them free."""
    window, alpha = face.mask([face.at(white, 4)])
    for radius, colour in ((5.2, face.p["iris"]), (2.4, "#0c0a09")):
        disc = face.at(ellipse(x + 1.2 * face.p["yaw"], -0.3, radius, radius), 4)
        covered = np.zeros_like(face.parts)
        cv2.fillPoly(covered, [sixteenths(disc)], 255, cv2.LINE_AA, 4)
        face.blend(window, alpha * covered[window] / np.float32(255), rgb(colour))


def draw_nose(face: Face) -> None:
    """Flanks, wings and nostrils, the light on its ridge, its tip."""
    kind, skin = face.p["nose"], face.skin
    wide = {"plain": 8.5, "big": 14.5, "pointy": 6.0}[kind]
    tip = {"plain": 26.0, "big": 28.5, "pointy": 30.5}[kind]
    shadow = skin * 0.6
    base = [(wide + 3, tip - 9), (wide + 3, tip), (0, tip + 3.5)]
    face.fill(symmetric([(0, -8), (4.5, -6), (5.5, 8), *base]), 8, part="nose")
    low = [(wide - 1, tip - 8), (wide + 1.5, tip - 2), (wide - 3, tip - 6)]
    flanks = both([(5, -8), (3.6, 6), *low, (2, 4)])
    wings = both([(wide - 2.5, tip - 9), (wide + 1, tip - 5), (wide - 0.5, tip - 0.5)])
    for side, flank, wing in zip(SIDES, flanks, wings, strict=True):
        away = side * float(np.sign(face.p["light"][0]))  # the flank away from the light is darker
        face.fill(smooth(flank), 9, shadow, opacity=0.34 + 0.14 * away, soft=1.6)
        face.line(curve(wing), 10, shadow * 0.85, 2.4, opacity=0.75, soft=0.5)
        nostril = ellipse(side * wide * 0.48, tip - 1.2, wide * 0.27, 1.7, 12)
        face.fill(nostril, 11, skin * 0.28, opacity=0.9, soft=0.4)
    face.fill(ellipse(0, 6, 2.2, 12), 12, skin * 0.4 + 153, opacity=0.4, soft=1.5)
    if kind == "pointy":
        below = points([(-5, tip - 7), (5, tip - 7), (0, tip + 3)])
        face.fill(below, 13, skin * 0.5, opacity=0.8, soft=0.7)
        ridge = points([(-1.6, -2), (1.6, -2), (2.4, tip - 6), (-2.4, tip - 6)])
        face.fill(ridge, 13, skin * 0.2 + 204, opacity=0.6, soft=0.7)
    else:
        ball = ellipse(0, tip - 7.5, wide * 0.42, wide * 0.36)
        face.fill(ball, 13, skin * 0.4 + 153, opacity=0.5, soft=1.6)
        below = curve(across([(0, tip + 1.6), (wide * 0.6, tip - 0.4)]))
        face.line(below, 11, shadow, 2, opacity=0.6, soft=0.6)
    if kind == "big":
        for wing in both([(wide, tip - 8), (wide + 1.6, tip - 3), (wide - 2, tip + 1)]):
            face.line(curve(wing), 10, shadow * 0.6, 2.6, opacity=0.9)


def draw_mouth(face: Face) -> None:
    """Lips, between them a line or, in an open mouth, teeth, and the folds beside a smile."""
    p, skin = face.p, face.skin
    wide, lift = smile(p)
    upper, lower = (6.2, 7.8) if p["Big_Lips"] else (3.0, 4.0)  # how thick the lips are
    gap = (7.0 if p["Smiling"] else 8.5) if p["Mouth_Slightly_Open"] else 0.0
    gap = p.get("gap", gap)
    y, sag = 41.0, 0.9 * max(lift, 0.0)  # a smile lifts the corners and lets the middle sag
    corner, edge = y - lift, (wide + 1.5) * 0.55
    lower_edge = y + gap + lower

    # every curve is given by its right half, from the middle outwards
    bow = [(0, y - upper + sag * 0.3), (3.2, y - upper - 1.6 + sag * 0.3)]
    top = [*bow, (edge, y - upper - 1 - 0.35 * lift + 0.2 * sag), (wide + 1, corner)]
    lips = between_arcs(top, [(0, lower_edge + sag), (edge, y + gap + lower * 0.72 + sag * 0.35)])
    inside = [(0, y + sag * 0.55), (edge, y - 0.3 * lift + 0.4 * sag), (wide - 1.2, corner + 0.3)]

    colour = skin * 0.74 + rgb("#a0524d") * 0.16
    if p["Wearing_Lipstick"]:
        colour = rgb(("#b3122d", "#c22a63", "#8e1f3f", "#d0333a")[int(p["lips"] * 3.99)])
    shadow = ellipse(0, lower_edge + sag + 3.5, wide * 0.5, 2.2)
    face.fill(shadow, 7, skin * 0.6, opacity=0.45, soft=1.6)
    face.fill(lips * (1.08, 1), 7, part="mouth")
    face.fill(lips, 7, colour, part="mouth")
    shine = ellipse(0, y + gap + lower * 0.55 + sag, wide * 0.34, lower * 0.22)
    face.fill(shine, 8, colour * 0.4 + 153, opacity=0.42, soft=0.9)
    if gap:
        hole = between_arcs(inside, [(0, y + gap + 0.8 * sag), (edge, y + gap * 0.75 + 0.5 * sag)])
        face.fill(hole, 7, rgb("#3a0f12"))
        middle = y + gap * (0.62 if p["Smiling"] else 0.4) + 0.7 * sag
        teeth = between_arcs(inside, [(0, middle), (edge * 0.85, y + gap * 0.42 + 0.45 * sag)])
        face.fill(teeth, 7, rgb("#f4f0e8"))
    else:
        face.line(curve(across(inside)), 7, colour * 0.35, 1.7)
    if p["Smiling"]:
        for fold in both("12,24 22,30 26.5,40"):
            face.line(curve(fold), 5, skin * 0.55, 2.2, opacity=0.7, soft=0.7)
        for side in SIDES:
            dimple = ellipse(side * (wide + 1.5), corner, 1.6, 2.6, 12)
            face.fill(dimple, 6, skin * 0.45, opacity=0.6, soft=0.7)


def draw_earrings(face: Face) -> None:
    p, metal = face.p, rgb(face.p["metal"])
    size = 1 + 0.35 * p["jewel"]
    for side in SIDES:
        x, y = side * (47.5 + p["shape"][0]), 20.0
        middle, low = (x, y + 8 * size), y + 9 * size
        if p["frame_kind"] == "round":  # hoops
            ring = ellipse(*middle, 6.5 * size, 8 * size)
            face.fill(ring, -2, metal * 0.55, part="earrings")
            face.fill((ring - middle) * 0.82 + middle, -2, metal)
            face.fill((ring - middle) * 0.55 + middle, -2, metal * 0.28)
        else:  # drops
            drop = points([(x, y), (x + 3.6 * size, low), (x, y + 17 * size), (x - 3.6 * size, low)])
            face.fill(smooth(drop), -2, metal * 0.45, part="earrings")
            face.fill(smooth((drop - middle) * 0.74 + middle), -2, metal)
            face.fill(ellipse(x, y + 10 * size, 1.9, 2.4, 10), -2, rgb(p["accent"]) * 0.6 + 90)


def draw_hat(face: Face) -> None:
    """A beanie with ribs and a fold, a cap with a visor, or a hat with a band and a brim; and its shadow."""
    colour, band, kind = rgb(face.p["hat_colour"]), rgb(face.p["accent"]), face.p["hat_kind"]
    if kind == "beanie":
        face.fill(symmetric("0,-98 30,-90 51,-62 55,-36 0,-42"), 1, colour, part="hat")
        for x in range(-44, 45, 11):
            face.line(curve([(x * 0.5, -94), (x * 0.9, -66), (x, -38)]), 1, colour * 0.65, 2.6, opacity=0.8)
        fold = symmetric("0,-48 40,-46 56,-42 55,-27 38,-31 0,-33")
        face.fill(fold, 2, colour * 0.75 + 24, part="hat")
    elif kind == "cap":
        face.fill(symmetric("0,-94 30,-86 50,-58 51,-34 0,-38"), 1, colour, part="hat")
        face.line(curve([(0, -93), (4 * face.p["yaw"], -66), (0, -40)]), 2, colour * 0.6, 2)
        face.fill(symmetric("0,-40 30,-40 47,-33 33,-22 0,-17"), 9, colour * 0.62, part="hat")  # the visor
        face.line(curve(across("0,-18 28,-22 46,-33")), 9, colour * 0.4 + 60, 1.8)
        face.fill(ellipse(0, -60, 8, 8), 4, band)
    else:
        face.fill(symmetric("0,-96 26,-98 37,-82 42,-44 0,-40"), 1, colour, part="hat")
        face.fill("-41.5,-54 41.5,-54 42.5,-43 -42.5,-43", 1, band, part="hat")
        brim = symmetric("0,-47 42,-47 72,-41 60,-31 28,-27 0,-25")
        face.fill(brim, 6, colour * 0.8, part="hat")
        face.line(curve(across("0,-25 58,-31 71,-41")), 6, colour * 0.5, 2)
    shadow, below = ellipse(0, -24, 40, 8), "forehead skin bangs"
    face.fill(shadow, 3, rgb("#141414"), opacity=0.35, soft=3, only=below)
    woven = among("hat")[face.parts]
    face.image[:, woven] *= np.clip(1 + 0.06 * face.grain[woven], 0.8, 1.2)


def draw_glasses(face: Face) -> None:
    colour, kind = rgb(face.p["frame_colour"]), face.p["frame_kind"]
    before = face.parts.copy()
    for side in SIDES:
        x = side * 19.8
        rim = ellipse(x, 1.5, 15.8, 14.2)
        if kind != "round":
            rim = smooth(points("-15,-9.5 0,-11.5 15,-9.5 16.5,0 12,12 0,13.5 -12,12 -16.5,0") + (x, 0))
        lens = (rim - (x, 1)) * (0.84, 0.8) + (x, 1)
        window, alpha = face.mask([face.at(lens, 9)])
        behind = face.image[:, window[0], window[1]].copy()
        face.fill(rim, 9, colour, part="glasses")
        if kind == "dark":
            behind = behind * 0.12 + 14
        face.blend(window, alpha, behind * 0.96 + 8)
        glint = points([(x - 8, 6), (x - 3, 0), (x + 3, -7)])
        face.line(glint, 9, rgb("#ffffff"), 2.2, opacity=0.5, soft=0.5)
    face.line(curve("-6,-1 0,-4 6,-1"), 11, colour, 3.4, part="glasses")  # the bridge
    for temple in both("34,-4 40,-3.4 46,-2"):
        face.line(temple, 1, colour, 3.2, part="glasses")
    if kind != "dark":  # what is seen through a clear lens is an eye or a brow still
        frame = np.abs(face.image - colour).sum(0) < 60
        through = among("eyes brows")[before] & ~frame
        face.parts[through] = before[through]
