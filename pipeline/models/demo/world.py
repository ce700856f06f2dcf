"""The drawn world of the demo model: cartoon faces whose every attribute, and every changed pixel, is known.

A `Scene` names what is to be seen, `draw` paints it, `caption` describes it in words of a small vocabulary. Everything
is flat polygons, given as shares of the image's side, so that a scene can be drawn at any size. All polygons of one
attribute lie on top of what the scene shows without it: changing an attribute redraws that attribute's pixels alone,
and the true outcome of an edit can be drawn and compared.

Each kind of object has colours of its own (no hat is yellow, no face red). A model this small would otherwise need far
more training before "a red hat" stopped reddening the face too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Polygon = list[tuple[float, float]]  # corners of a polygon, (x, y) as shares of the image's side

FaceShape = Literal["round", "square", "oval"]
Mouth = Literal["smile", "frown", "straight", "open"]
Attribute = Literal["background", "face_shape", "face_color", "mouth", "sunglasses", "hat", "beard"]

FACE_COLORS: dict[str, RGB] = {
    "yellow": (255, 205, 40),
    "orange": (250, 135, 40),
    "green": (95, 190, 70),
    "blue": (70, 145, 235),
    "pink": (250, 130, 175),
}
BACKGROUND_COLORS: dict[str, RGB] = {
    "white": (250, 248, 242),
    "gray": (165, 170, 178),
    "mint": (175, 232, 208),
    "lavender": (205, 190, 245),
    "navy": (38, 50, 95),
}
HAT_COLORS: dict[str, RGB] = {
    "red": (215, 40, 45),
    "purple": (125, 55, 175),
    "black": (45, 42, 50),
    "teal": (0, 130, 135),
}
BEARD_COLOR: RGB = (120, 72, 40)
INK: RGB = (40, 30, 45)  # eyes, lenses, mouth lines
GLINT: RGB = (255, 255, 255)
TONGUE: RGB = (235, 85, 95)

SUPERSAMPLING = 4  # each pixel is the mean of 4 x 4 drawn ones: 17 levels of coverage along an edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one image shows, and where. Positions and sizes are shares of the image's side."""

    face_shape: FaceShape = "round"
    face_color: str = "yellow"  # a key of FACE_COLORS
    background: str = "mint"  # a key of BACKGROUND_COLORS
    mouth: Mouth = "smile"
    sunglasses: bool = False
    hat: str | None = None  # a key of HAT_COLORS, None without a hat
    beard: bool = False
    center_x: float = 0.5
    center_y: float = 0.56
    radius: float = 0.32  # of the round face; the others have about its area

    @staticmethod
    def random(rng: np.random.Generator) -> Scene:
        """A scene whose attributes are drawn independently, whose position and size vary a little."""
        return Scene(
            face_shape=rng.choice(get_args(FaceShape)).item(),
            face_color=rng.choice(list(FACE_COLORS)).item(),
            background=rng.choice(list(BACKGROUND_COLORS)).item(),
            mouth=rng.choice(get_args(Mouth)).item(),
            sunglasses=bool(rng.random() < 0.5),
            hat=rng.choice(list(HAT_COLORS)).item() if rng.random() < 0.5 else None,
            beard=bool(rng.random() < 0.35),
            center_x=rng.uniform(0.46, 0.54),
            center_y=rng.uniform(0.54, 0.58),
            radius=rng.uniform(0.30, 0.345),
        )

    def attributes(self) -> dict[Attribute, str | bool | None]:
        """What can be named and edited: all fields but position and size."""
        return {name: getattr(self, name) for name in get_args(Attribute)}


@dataclass(frozen=True, slots=True)
class Patch:
    """A polygon of one colour, and the attribute whose pixels it makes."""

    attribute: Attribute
    color: RGB
    outline: Polygon


def edited(scene: Scene, **changes: str | bool | None) -> Scene:
    """The same scene with some attributes changed, the rest in place. `TypeError` for a name it does not have."""
    return dataclasses.replace(scene, **changes)  # type: ignore[arg-type]


def draw(scene: Scene, size: int = 128) -> UInt8[np.ndarray, "size size 3"]:
    """Paint the scene, anti-aliased, at `size` x `size` pixels."""
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2, BACKGROUND_COLORS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for patch in patches(scene):
        pen.polygon([(x * canvas.width, y * canvas.width) for x, y in patch.outline], fill=patch.color)
    return np.array(canvas.reduce(SUPERSAMPLING))


def region(scene: Scene, attribute: Attribute, size: int = 128) -> Bool[np.ndarray, "size size"]:
    """Where the attribute is to be seen, at least in part of a pixel. Empty for an object that the scene lacks.

    `sunglasses` and `hat` are the objects themselves, without the eyes or the hair line that they replace.
    """
    background = 255 if attribute == "background" else 0
    canvas = Image.new("L", (size * SUPERSAMPLING,) * 2, background)
    pen = ImageDraw.Draw(canvas)
    # The shape of a face shows where its colour shows.
    names = ("face_shape", "face_color") if attribute in ("face_shape", "face_color") else (attribute,)
    present = attribute != "sunglasses" or scene.sunglasses
    for patch in patches(scene):
        fill = 255 if present and patch.attribute in names else 0
        pen.polygon([(x * canvas.width, y * canvas.width) for x, y in patch.outline], fill=fill)
    return np.asarray(canvas.reduce(SUPERSAMPLING)) > 0


def changed_region(before: Scene, after: Scene, size: int = 128) -> Bool[np.ndarray, "size size"]:
    """The pixels in which two scenes differ: what a perfect edit from one to the other touches."""
    return (draw(before, size) != draw(after, size)).any(axis=-1)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe the scene in varied words, such as "a green face with a red hat and a smile on a mint background".

    Half of the captions name everything, the others leave attributes out, down to a single one ("sunglasses"): an
    edit's prompt is short, and a model that never saw short captions would not follow it.
    Absent objects are not named.
    """
    kind = rng.random()
    if kind < 0.5:
        return complete_caption(scene, rng)
    if kind < 0.8:
        return sentence(scene, rng, completeness=0.6)
    return single_attribute_caption(scene, rng)


def complete_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Name all that is to be seen."""
    return sentence(scene, rng, completeness=1.0)


def sentence(scene: Scene, rng: np.random.Generator, completeness: float) -> str:
    """A caption in which each attribute is named with the given probability."""

    def named() -> bool:
        return bool(rng.random() < completeness)

    adjectives = [word for word in (scene.face_shape, scene.face_color) if named()]
    face = with_article(" ".join([*adjectives, "face"]))
    extras = [phrase for phrase in object_phrases(scene, bare_hat=not named() and rng.random() < 0.4) if named()]
    rng.shuffle(extras)
    text = rng.choice(["", "a cartoon of ", "a picture of "]).item() + face
    if extras:
        text += rng.choice([" with ", " wearing "]).item() if is_worn(extras[0]) else " with "
        text += extras[0] if len(extras) == 1 else f"{' , '.join(extras[:-1])} and {extras[-1]}"
    if named():
        text += f" on a {scene.background} background"
    return text.replace(" ,", ",")


def single_attribute_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Name one attribute alone, in the words of an edit's prompt."""
    phrases = [
        *object_phrases(scene, bare_hat=bool(rng.random() < 0.2)),
        with_article(f"{scene.face_color} face"),
        f"a {scene.background} background",
        with_article(f"{scene.face_shape} face"),
    ]
    # Objects are what edits name most, so they take their turn more often than the face and the background.
    weights = np.array([2.0] * (len(phrases) - 3) + [1.0] * 3)
    phrase = rng.choice(phrases, p=weights / weights.sum()).item()
    if not phrase.endswith(("face", "background")) and rng.random() < 0.3:
        return f"a face with {phrase}"
    return phrase


def object_phrases(scene: Scene, bare_hat: bool) -> list[str]:
    """One phrase for each object and for the mouth. A bare hat goes without its colour."""
    phrases = [{"smile": "a smile", "frown": "a frown"}.get(scene.mouth, with_article(f"{scene.mouth} mouth"))]
    if scene.sunglasses:
        phrases.append("sunglasses")
    if scene.hat:
        phrases.append("a hat" if bare_hat else f"a {scene.hat} hat")
    if scene.beard:
        phrases.append("a beard")
    return phrases


def is_worn(phrase: str) -> bool:
    """Whether one wears what the phrase names."""
    return phrase.endswith(("hat", "sunglasses"))


def with_article(noun: str) -> str:
    """ "a" or "an" before the noun, by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# Each word of the captions, with the attribute in whose drawn region its attention belongs. An adjective shares its
# noun's place, so a word of two meanings ("face" of a shape or of a colour) has one region all the same.
WORD_ATTRIBUTES: dict[str, Attribute] = {
    "sunglasses": "sunglasses",
    "hat": "hat",
    "beard": "beard",
    "smile": "mouth",
    "frown": "mouth",
    "straight": "mouth",
    "open": "mouth",
    "mouth": "mouth",
    "face": "face_color",
    "background": "background",
    **dict.fromkeys(get_args(FaceShape), "face_shape"),
    **dict.fromkeys(FACE_COLORS, "face_color"),
    **dict.fromkeys(HAT_COLORS, "hat"),
    **dict.fromkeys(BACKGROUND_COLORS, "background"),
}
VOCABULARY: tuple[str, ...] = (
    *WORD_ATTRIBUTES,
    "a",
    "an",
    "cartoon",
    "picture",
    "of",
    "with",
    "wearing",
    "and",
    "on",
    ",",
)


def patches(scene: Scene) -> list[Patch]:
    """The polygons of a scene, from back to front."""
    x, y, r = scene.center_x, scene.center_y, scene.radius
    width, height, roundness = face_geometry(scene.face_shape)
    color = FACE_COLORS[scene.face_color]

    parts = [
        Patch("face_shape", shaded(color, 0.72), superellipse(x, y, width * r, height * r, roundness)),
        Patch("face_color", color, superellipse(x, y, (width - 0.08) * r, (height - 0.08) * r, roundness)),
    ]
    for side in (-1, 1):
        parts.append(
            Patch("face_color", shaded(color, 0.86), ellipse(x + side * 0.52 * r, y + 0.28 * r, 0.16 * r, 0.12 * r))
        )
    if scene.beard:
        parts += beard_patches(x, y, r, width, height, roundness)
    parts += mouth_patches(scene.mouth, x, y + 0.47 * r, r)
    parts += sunglasses_patches(x, y - 0.14 * r, r) if scene.sunglasses else eye_patches(x, y - 0.12 * r, r)
    if scene.hat:
        parts += hat_patches(HAT_COLORS[scene.hat], x, y - (height - 0.42) * r, r)
    return parts


def face_geometry(shape: FaceShape) -> tuple[float, float, float]:
    """Half width and half height in units of the radius, and the exponent of the superellipse."""
    return {"round": (1.0, 1.0, 2.0), "square": (0.93, 0.93, 7.0), "oval": (0.82, 1.1, 2.0)}[shape]


def eye_patches(x: float, y: float, r: float) -> list[Patch]:
    """Two eyes. They count as `sunglasses`: it is that attribute which hides or shows them."""
    parts = []
    for side in (-1, 1):
        parts.append(Patch("sunglasses", GLINT, ellipse(x + side * 0.36 * r, y, 0.19 * r, 0.23 * r)))
        parts.append(Patch("sunglasses", INK, ellipse(x + side * 0.34 * r, y + 0.03 * r, 0.11 * r, 0.15 * r)))
    return parts


def sunglasses_patches(x: float, y: float, r: float) -> list[Patch]:
    """Two dark lenses with a light streak, and the bar between and beside them."""
    parts = [Patch("sunglasses", INK, box(x - 0.84 * r, y - 0.22 * r, x + 0.84 * r, y - 0.08 * r))]
    for side in (-1, 1):
        lens = x + side * 0.40 * r
        parts.append(Patch("sunglasses", INK, superellipse(lens, y + 0.02 * r, 0.35 * r, 0.27 * r, 3.0)))
        streak = [(-0.20, 0.06), (-0.04, -0.14), (0.06, -0.14), (-0.10, 0.06)]
        parts.append(Patch("sunglasses", (150, 165, 195), [(lens + u * r, y + v * r) for u, v in streak]))
    return parts


def hat_patches(color: RGB, x: float, y: float, r: float) -> list[Patch]:
    """A top hat with a light band, its brim at height `y`."""
    crown = [(-0.50, 0.0), (-0.60, -0.78), (0.60, -0.78), (0.50, 0.0)]
    return [
        Patch("hat", color, [(x + u * r, y + v * r) for u, v in crown]),
        Patch("hat", (250, 225, 150), box(x - 0.53 * r, y - 0.26 * r, x + 0.53 * r, y - 0.06 * r)),
        Patch("hat", color, superellipse(x, y + 0.02 * r, 0.95 * r, 0.12 * r, 3.0)),
    ]


def beard_patches(x: float, y: float, r: float, width: float, height: float, roundness: float) -> list[Patch]:
    """A beard along the jaw: between the lower half of the face, a little widened, and an oval around the mouth."""
    angles = np.linspace(0.02 * np.pi, 0.98 * np.pi, 40)
    outer = superellipse_points(x, y, (width + 0.06) * r, (height + 0.08) * r, roundness, angles)
    inner = superellipse_points(x, y + 0.12 * r, (width - 0.30) * r, 0.58 * r, 2.5, angles[::-1])
    return [Patch("beard", BEARD_COLOR, outer + inner)]


def mouth_patches(mouth: Mouth, x: float, y: float, r: float) -> list[Patch]:
    """The mouth, centred at (x, y)."""
    if mouth == "straight":
        return [Patch("mouth", INK, superellipse(x, y, 0.32 * r, 0.065 * r, 4.0))]
    if mouth == "open":
        return [
            Patch("mouth", INK, ellipse(x, y, 0.24 * r, 0.22 * r)),
            Patch("mouth", TONGUE, ellipse(x, y + 0.09 * r, 0.14 * r, 0.10 * r)),
        ]
    # Both curves are crescents: a smile's lower lip is deeper than its upper one; a frown is a smile upside down.
    bend = 1 if mouth == "smile" else -1
    angles = np.linspace(0, np.pi, 24)
    top, bottom = 0.10, 0.30
    lower = [(x + 0.40 * r * np.cos(a), y + bend * r * (bottom * np.sin(a) - 0.14)) for a in angles]
    upper = [(x + 0.40 * r * np.cos(a), y + bend * r * (top * np.sin(a) - 0.14)) for a in angles[::-1]]
    return [Patch("mouth", INK, lower + upper)]


def ellipse(x: float, y: float, half_width: float, half_height: float) -> Polygon:
    """An ellipse around (x, y)."""
    return superellipse(x, y, half_width, half_height, 2.0)


def superellipse(x: float, y: float, half_width: float, half_height: float, roundness: float) -> Polygon:
    """The curve |u|^n + |v|^n = 1 around (x, y): an ellipse for n = 2, closer to a rectangle the larger n."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return superellipse_points(x, y, half_width, half_height, roundness, angles)


def superellipse_points(
    x: float, y: float, half_width: float, half_height: float, roundness: float, angles: np.ndarray
) -> Polygon:
    """The points of a superellipse at the given angles (downwards is positive, as in images)."""
    cos, sin = np.cos(angles), np.sin(angles)
    u = np.sign(cos) * np.abs(cos) ** (2 / roundness)
    v = np.sign(sin) * np.abs(sin) ** (2 / roundness)
    return list(zip((x + half_width * u).tolist(), (y + half_height * v).tolist(), strict=True))


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An upright rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def shaded(color: RGB, share: float) -> RGB:
    """The colour, darker: `share` 1 leaves it as it is, 0 is black."""
    red, green, blue = color
    return round(red * share), round(green * share), round(blue * share)
