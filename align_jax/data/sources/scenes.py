"""Procedural image-text pairs: coloured shapes on textured backgrounds with web-like captions.

They let everything run, and be measured, with no data at all. Item i depends on the arguments and
(seed, i) only, not on what was read before; training and evaluation sets differ by their seed, and
then share no random number. Captions say left and right, so mirroring must be off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from align_jax.data.sources.record import LabelledImage, Record
from align_jax.data.sources.scene_captions import pick, write_captions
from align_jax.storage.problems import Problems

COLOURS = {
    "red": (222, 30, 38),
    "orange": (255, 138, 0),
    "yellow": (255, 228, 30),
    "green": (24, 160, 62),
    "cyan": (40, 216, 232),
    "blue": (30, 76, 230),
    "purple": (132, 36, 184),
    "pink": (255, 128, 196),
    "white": (250, 250, 250),
    "black": (10, 10, 12),
}
SHAPES = (
    "circle",
    "hourglass",
    "triangle",
    "star",
    "ring",
    "crescent",
    "rectangle",
)
# Radius over image side of a lone object; two share the space. Large, so that the shape is still
# seen where a small trunk has few pixels left.
SIZES = {"small": 0.26, "medium": 0.32, "large": 0.39}
_PAIR_SCALE = 0.58
# Words that no object colour shares, so that "red" always means the object.
TONES = {
    "gray": (128, 128, 128),
    "beige": (226, 203, 160),
    "navy": (24, 34, 88),
}
# Few backgrounds and places on purpose: where those alone tell a batch apart, nothing makes a model
# learn shapes.
PATTERNS = ("plain", "gradient")
# Columns and rows of the places, as fractions of the image side. A lone object is in the centre.
POSITIONS = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.26),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}

_T = TypeVar("_T")
_SINGLE = 0.5  # share of scenes with one object
_MIN_IMAGE_SIZE_PX = 16
_MIN_CONTRAST = 110  # Euclidean distance in RGB between an object and its background
_SUPERSAMPLING = 4
_PAIRS = (  # places of two objects, and how the first lies to the second
    ("left", "right", "left of"),
    ("right", "left", "right of"),
    ("top", "bottom", "above"),
    ("bottom", "top", "below"),
    ("top left", "bottom right", "above and left of"),
    ("bottom right", "top left", "below and right of"),
    ("top right", "bottom left", "above and right of"),
    ("bottom left", "top right", "below and left of"),
)


@dataclass(frozen=True)
class _Object:
    """One object of a scene, in the words of the tables above."""

    shape: str
    colour: str
    size: str
    position: str


@dataclass(frozen=True)
class _Scene:
    """What a scene shows: one or two objects on a background; `relation` is "" for one object."""

    objects: tuple[_Object, ...]
    relation: str
    tone: str
    pattern: str


class Scenes:
    """A source of `Record`s: uint8 RGB [S, S, 3] images with two or three captions each.

    The first caption is nearly complete; later ones leave attributes out, carry junk such as file
    names, and once in a while belong to no scene at all.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        image_size_px: int = 64,
        max_objects: int = 2,
        noise: float = 0.2,
    ):
        """Makes `size` scenes.

        Args:
          size: number of scenes.
          seed: at least 0; use another one for evaluation than for training.
          image_size_px: side S, at least 16.
          max_objects: 1 or 2.
          noise: in [0, 1]; 0 makes all captions complete and clean.

        Raises:
          ValueError: for a value outside these ranges.
        """
        _check(size, seed, image_size_px)
        if max_objects not in (1, 2):
            raise ValueError(f"max_objects={max_objects} of scenes must be 1 or 2.")
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise} of scenes must lie in [0, 1].")
        self.size = size
        self.seed = seed
        self.image_size_px = image_size_px
        self.max_objects = max_objects
        self.noise = noise
        self.problems = Problems()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        scene, captions, rng = self._write(index)
        image = _paint(scene, rng, self.image_size_px)
        return Record(f"scene_{self.seed}_{index}", image, captions)

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a scene without painting it."""
        return self._write(index)[1]

    def where(self, index: int) -> str:
        """Returns the name of a scene."""
        return f"scene_{self.seed}_{index}"

    def describe(self) -> str:
        """Returns one line that names the source and its size."""
        side = self.image_size_px
        return f"scenes: {self.size} procedural pairs, {side}x{side} px, seed {self.seed}"

    def _write(self, index: int) -> tuple[_Scene, tuple[str, ...], np.random.Generator]:
        rng = _rng(self.seed, index, self.size)
        scene = _draw_scene(rng, 1 if rng.random() < _SINGLE else self.max_objects)
        return scene, write_captions(scene, rng, self.noise), rng


class LabelledScenes:
    """A source of `LabelledImage`s: scenes of one object, labelled by its shape or its colour.

    Classes are balanced: label of item i is i modulo the number of `classes`.
    """

    def __init__(self, size: int, seed: int, attribute: str, image_size_px: int = 64):
        """Makes `size` scenes with labels of `attribute`, "shape" or "colour"; rest as in Scenes.

        Raises:
          ValueError: for a value out of range.
        """
        _check(size, seed, image_size_px)
        if attribute not in ("shape", "colour"):
            raise ValueError(f"label={attribute} of scenes is unknown; use shape or colour.")
        self.size = size
        self.seed = seed
        self.attribute = attribute
        self.problems = Problems()
        self.image_size_px = image_size_px
        self.classes = SHAPES if attribute == "shape" else tuple(COLOURS)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> LabelledImage:
        rng = _rng(self.seed, index, self.size)
        label = index % len(self.classes)
        scene = _draw_scene(rng, 1, **{self.attribute: self.classes[label]})
        image = _paint(scene, rng, self.image_size_px)
        return LabelledImage(f"scene_{self.seed}_{index}", image, label)

    def describe(self) -> str:
        """Returns one line that names the source and its size."""
        kinds = f"{len(self.classes)} {self.attribute}s"
        side = self.image_size_px
        return f"scenes: {self.size} images of {kinds}, {side}x{side} px, seed {self.seed}"


def paint_object(
    seed: Sequence[int], shape: str, colour: str, image_size_px: int = 64
) -> np.ndarray:
    """Returns a scene of one object, uint8 [S, S, 3], the same for the same arguments.

    Args:
      seed: integers of at least 0.
      shape: one of SHAPES.
      colour: one of COLOURS.
      image_size_px: side S, at least 16.
    """
    rng = np.random.default_rng(list(seed))
    return _paint(_draw_scene(rng, 1, shape, colour), rng, image_size_px)


def _check(size: int, seed: int, image_size_px: int) -> None:
    if size < 0 or seed < 0:
        raise ValueError(f"size={size} and seed={seed} of scenes must not be negative.")
    if image_size_px < _MIN_IMAGE_SIZE_PX:
        raise ValueError(
            f"image_size_px={image_size_px} of scenes must be at least {_MIN_IMAGE_SIZE_PX}."
        )


def _rng(seed: int, index: int, size: int) -> np.random.Generator:
    if not 0 <= index < size:
        raise IndexError(f"Scene {index} of {size}.")
    return np.random.default_rng([seed, index])


def _draw_scene(
    rng: np.random.Generator, num_objects: int, shape: str | None = None, colour: str | None = None
) -> _Scene:
    if num_objects == 1:
        places, relation = ["center"], ""
    else:
        *places, relation = pick(rng, _PAIRS)
    objects = []
    for place in places:
        # Two objects never share shape or colour: "the red one" then means one of them.
        shapes = [s for s in SHAPES if all(s != o.shape for o in objects)]
        colours = [c for c in COLOURS if all(c != o.colour for o in objects)]
        objects.append(
            _Object(
                shape or pick(rng, shapes),
                colour or pick(rng, colours),
                pick(rng, tuple(SIZES)),
                place,
            )
        )
    tones = [tone for tone in TONES if all(tone in _TONES_FOR[o.colour] for o in objects)]
    return _Scene(tuple(objects), relation, pick(rng, tones), pick(rng, PATTERNS))


def _tones_by_colour() -> dict[str, set[str]]:
    return {
        colour: {
            tone for tone, tone_rgb in TONES.items() if math.dist(rgb, tone_rgb) >= _MIN_CONTRAST
        }
        for colour, rgb in COLOURS.items()
    }


_TONES_FOR = _tones_by_colour()


def _paint(scene: _Scene, rng: np.random.Generator, side: int) -> np.ndarray:
    """uint8 [S, S, 3]."""
    image = _paint_background(scene, rng, side)
    for item in scene.objects:
        colour = np.array(COLOURS[item.colour], np.float32) + rng.integers(-10, 11, size=3)
        scale = 1.0 if len(scene.objects) == 1 else _PAIR_SCALE
        image += (colour - image) * _object_mask(item, scale, rng, side)
    brightness = rng.uniform(0.9, 1.08)
    noise = rng.integers(-6, 7, size=image.shape, dtype=np.int8)
    return (image * np.float32(brightness) + noise).clip(0, 255).astype(np.uint8)


def _paint_background(scene: _Scene, rng: np.random.Generator, side: int) -> np.ndarray:
    """float32 [S, S, 3]: the tone, made lighter and darker by a pattern in [-1, 1]."""
    tone = np.array(TONES[scene.tone], np.float32) + rng.integers(-8, 9, size=3)
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    x, y = axis[None, :], axis[:, None]
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    field = along * 1.6 if scene.pattern == "gradient" else np.zeros((side, side), np.float32)
    return tone + 60 * field.clip(-1, 1)[:, :, None]


def _object_mask(item: _Object, scale: float, rng: np.random.Generator, side: int) -> np.ndarray:
    """float32 [S, S, 1]: the share of each pixel that the object covers."""
    canvas = side * _SUPERSAMPLING
    radius = scale * SIZES[item.size] * rng.uniform(0.95, 1.05)
    centre = np.array(POSITIONS[item.position]) + rng.uniform(-0.02, 0.02, size=2)
    centre = centre.clip(radius, 1 - radius)
    angle = rng.uniform(-0.15, 0.15)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = radius * np.array([[cos, sin], [-sin, cos]])
    mask = Image.new("L", (canvas, canvas))
    draw = ImageDraw.Draw(mask)
    for outline, fill in zip(_OUTLINES[item.shape], (255, 0), strict=False):
        points = (outline @ turn + centre) * canvas
        draw.polygon(points.ravel().tolist(), fill=fill)
    mask = np.asarray(mask.reduce(_SUPERSAMPLING))
    return mask[:, :, None] * np.float32(1 / 255)


def _make_outlines() -> dict[str, tuple[np.ndarray, ...]]:
    """For each shape its outline, and of ring and crescent the hole, as [N, 2] points (x, y).

    They fill the square from -1 to 1; y points down.
    """
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    fifths = np.arange(10) * np.pi / 5
    tips = np.where(np.arange(10) % 2, 0.34, 1)
    star = np.stack([np.sin(fifths) * tips, -np.cos(fifths) * tips], axis=1)
    hourglass = np.array([[-0.85, -1], [0.85, -1], [0.15, 0], [0.85, 1], [-0.85, 1], [-0.15, 0]])
    return {
        "circle": (0.92 * circle,),
        "hourglass": (hourglass,),
        "triangle": (np.array([[0, -1], [0.95, 0.75], [-0.95, 0.75]]),),
        "star": (star,),
        "ring": (circle, 0.62 * circle),
        "crescent": (circle, 0.82 * circle + np.array([0.54, -0.1])),
        "rectangle": (corners * np.array([1, 0.42]),),
    }


_OUTLINES = _make_outlines()
