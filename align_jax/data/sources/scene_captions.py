"""Noisy web-like captions of procedural scenes; what a scene is and looks like is in scenes.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from align_jax.data.sources import scenes

_T = TypeVar("_T")

# How web authors write the names above; the name itself stands first and is used most.
_SYNONYMS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-size"),
    "large": ("large", "big", "huge"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "circle": ("circle", "disc"),
    "hourglass": ("hourglass", "egg timer"),
    "ring": ("ring", "donut"),
    "crescent": ("crescent", "moon"),
    "rectangle": ("rectangle", "bar"),
    "plain": ("plain {} background", "{} background", "solid {} background"),
    "gradient": ("{} gradient background", "background fading in {}"),
}
_LEADS = ("photo of ", "picture of ", "image of ", "image: ", "IMG_{}.jpg ", "DSC{} ", "{}. ")
_TAILS = (
    " - stock photo",
    " | free download",
    ", royalty free",
    " clipart",
    " vector illustration",
    " ({})",
    " IMG_{}.jpg",
    " #{}",
    " - buy online",
)
_UNRELATED = (
    "click to enlarge",
    "image not available",
    "untitled",
    "thumbnail",
    "my holiday pictures, day 3",
    "page 7 of 12",
    "share this post",
    "best offers of the week",
)


def write_captions(
    scene: "scenes._Scene", rng: np.random.Generator, noise: float
) -> tuple[str, ...]:
    """Returns two or three captions of a scene, the first one nearly complete.

    Args:
      scene: what to describe.
      rng: decides wording, omissions and junk.
      noise: in [0, 1]. The first caption leaves out each of size, place and background with
        probability noise / 4, the others with 2 * noise; a tenth of `noise` of the others belongs
        to no scene. Colour and shape of an object are never parted.
    """
    captions = [_write_caption(scene, rng, drop_rate=noise / 4, noise=noise)]
    for _ in range(1 + int(rng.integers(2))):
        if rng.random() < noise / 10:
            captions.append(pick(rng, _UNRELATED))
        else:
            captions.append(_write_caption(scene, rng, min(1.0, 2 * noise), noise))
    return tuple(captions)


def _write_caption(
    scene: "scenes._Scene", rng: np.random.Generator, drop_rate: float, noise: float
) -> str:
    """One caption; size, place and background are each left out at `drop_rate`."""

    def kept() -> bool:
        return rng.random() >= drop_rate

    objects = list(scene.objects)
    nouns = []
    for item in objects:
        words = [item.size] * kept() + [item.colour, item.shape]
        nouns.append(" ".join(_say(rng, word) for word in words))
    places = [_say_place(rng, item.position) if kept() else "" for item in objects]
    background = _say(rng, scene.pattern).format(scene.tone) if kept() else ""
    if len(objects) == 2 and rng.random() < drop_rate / 2:
        one = int(rng.integers(2))
        nouns, places = [nouns[one]], [places[one]]
    style = rng.integers(4)
    if len(nouns) == 2 and style == 0:
        subject = f"{_a(nouns[0])} {_say_relation(rng, scene.relation)} {_a(nouns[1])}"
        tags = [subject]
    else:
        tags = [f"{noun} {place}".strip() for noun, place in zip(nouns, places, strict=True)]
        rng.shuffle(tags)
        subject = " and ".join(_a(tag) for tag in tags)
    if style == 1:
        tags += [background] * bool(background)
        rng.shuffle(tags)
        caption = ", ".join(tags)
    elif not background:
        caption = subject
    elif style == 2:
        caption = f"{background} with {subject}"
    else:
        caption = f"{subject} on {_a(background)}"
    return _add_junk(caption, rng, noise)


def _say(rng: np.random.Generator, name: str) -> str:
    names = _SYNONYMS.get(name, (name,))
    return names[0] if rng.random() < 0.7 else pick(rng, names)


def _say_place(rng: np.random.Generator, position: str) -> str:
    if position == "center":
        return pick(rng, ("in the center", "in the middle", "center", "centered"))
    if position in ("left", "right"):
        return pick(rng, (f"on the {position}", f"{position} side", f"on the {position} side"))
    if position in ("top", "bottom"):
        return pick(rng, (f"at the {position}", position, f"at {position} center"))
    corner = position.replace("top", "upper").replace("bottom", "lower")
    return pick(rng, (position, f"at the {position}", f"in the {position} corner", corner))


def _say_relation(rng: np.random.Generator, relation: str) -> str:
    if relation in ("left of", "right of"):
        return pick(rng, (relation, f"to the {relation}"))
    return relation.replace("and ", "and to the ") if rng.random() < 0.5 else relation


def pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    """Returns one of the items, each as often."""
    return items[int(rng.integers(len(items)))]


def _a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _add_junk(caption: str, rng: np.random.Generator, noise: float) -> str:
    if rng.random() < noise:
        caption = pick(rng, _LEADS).format(rng.integers(1000, 10000)) + caption
    if rng.random() < noise:
        caption += pick(rng, _TAILS).format(rng.integers(2, 10000))
    if rng.random() < noise / 4:
        caption = caption.replace(", ", "-").replace(" ", "-") + ".jpg"
    if rng.random() < 2 * noise:
        caption = pick(rng, (str.capitalize, str.capitalize, str.title, str.upper))(caption)
    return caption
