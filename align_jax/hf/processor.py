"""What must happen to images and texts before a model sees them, read from Hugging Face folders.

Reads the layouts of transformers 4 (preprocessor_config.json, vocab.txt) and of transformers 5
(processor_config.json, tokenizer.json) and writes the files of both. Doing it is images.py's and
tokenizer.py's task; what those two cannot do is refused here.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from align_jax.data import tokenizer as tokenizer_lib
from align_jax.storage import writing

# What `write_processor` writes; vocab.txt of a WordPiece tokenizer.
FILES = (
    *("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)

_BILINEAR = 2  # Pillow's number
_RESIZE_KEY = "align_jax_resize"  # ours: the format has no word for a resize without antialias
_DEFAULT_MAX_TOKENS = 64  # AlignProcessor's, where the tokenizer does not say
_KEYS = {  # what transformers writes, and is read here
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "rescale_offset", "do_normalize", "image_mean", "image_std", "include_top"),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What must happen to an image or a text before the model sees it.

    Attributes:
      image_size: side of the crop, pixels.
      resize_size: side before the crop, pixels.
      resize: "pil" or "tf", see `data/images.resize`.
      max_tokens: length of a tokenised text.
      vocab_size: of the tokenizer.
      tokenizer_fingerprint: of the tokenizer.
    """

    image_size: int
    resize_size: int
    resize: str
    max_tokens: int
    vocab_size: int
    tokenizer_fingerprint: str


def read_processor(
    folder: str | os.PathLike,
) -> tuple[tokenizer_lib.Tokenizer, Preprocessing]:
    """Returns (tokenizer, preprocessing) of a Hugging Face ALIGN folder, of transformers 4 or 5.

    Differs from transformers: images become RGB, their EXIF orientation is honoured (hand over
    `np.asarray(image)` to have it ignored), and texts are truncated, to `model_max_length` tokens
    or to 64 where the tokenizer has no limit.

    Raises:
      ValueError: files are missing or damaged, or ask for anything but a bilinear resize to a
        square, a central crop and x / 127.5 - 1.
    """
    folder = Path(folder)
    path, config = _find_image_config(folder)
    if not _KEYS <= config.keys():  # the class, whose import is slow, says what is then assumed
        with tokenizer_lib.quiet_transformers() as transformers:
            assumed = transformers.EfficientNetImageProcessorPil().to_dict()
        # Except for the filter: it was nearest, then bicubic.
        config = assumed | {"resample": None} | config
    try:
        resize_size, image_size = _sizes(config)
        _check_scale(config)
        resize = config.get(_RESIZE_KEY, "pil")
        if resize not in ("pil", "tf"):
            raise ValueError(f"{_RESIZE_KEY} is {resize!r}; use 'pil' or 'tf'.")
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # another layout
        raise ValueError(f"{path} cannot be used: it has another layout ({error!r}).") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    max_tokens = _max_tokens(folder / "tokenizer_config.json")
    tokenizer = tokenizer_lib.load_tokenizer(folder)
    return tokenizer, Preprocessing(
        image_size=image_size,
        resize_size=resize_size,
        resize=resize,
        max_tokens=max_tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )


def write_processor(
    folder: str | os.PathLike,
    tokenizer: tokenizer_lib.Tokenizer,
    preprocessing: Preprocessing,
) -> None:
    """Writes the files that `AlignProcessor.from_pretrained` reads, those of transformers 4 and 5.

    The format cannot say `resize="tf"`: transformers will then resize as Pillow does, while
    `read_processor` finds our own key.

    Args:
      folder: made if missing.
      tokenizer: of the model.
      preprocessing: likewise.
    """
    folder = Path(folder)
    tokenizer.save(folder, preprocessing.max_tokens)
    config = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": dict.fromkeys(("height", "width"), preprocessing.resize_size),
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": dict.fromkeys(("height", "width"), preprocessing.image_size),
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "do_normalize": False,
        "include_top": False,
    }
    if preprocessing.resize != "pil":
        config[_RESIZE_KEY] = preprocessing.resize
    with tokenizer_lib.quiet_transformers() as transformers:
        image_processor = transformers.EfficientNetImageProcessorPil(**config)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        processor = transformers.AlignProcessor(image_processor, theirs)
    # The first one for transformers 4.
    writing.write_text(folder / "preprocessor_config.json", image_processor.to_json_string())
    writing.write_text(folder / "processor_config.json", processor.to_json_string())


def _find_image_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings, of transformers 5 before those of 4, as it does itself."""
    path = folder / "processor_config.json"
    if path.is_file():
        nested = _read_json(path).get("image_processor")
        if isinstance(nested, dict):
            return path, nested
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return path, _read_json(path)
    raise ValueError(
        f"{folder} does not say how images are prepared: it has neither preprocessor_config.json "
        "nor processor_config.json; download the whole model."
    )


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Sides before and after the crop, pixels."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    if kind is not None and not kind.startswith("EfficientNet"):
        raise ValueError(f"the image processor is {kind}; use EfficientNetImageProcessor.")
    if not config["do_resize"]:
        raise ValueError("do_resize is false; images of any size must be resized.")
    if config.get("resample") != _BILINEAR:
        raise ValueError(
            f"resample is {config.get('resample')}; only {_BILINEAR} (bilinear) can be done."
        )
    resize_size = image_size = _side("size", config["size"])
    if config["do_center_crop"]:
        image_size = _side("crop_size", config["crop_size"])
        if image_size > resize_size:
            raise ValueError(f"crop_size {image_size} exceeds size {resize_size}.")
    return resize_size, image_size


def _side(name: str, size: int | dict[str, int]) -> int:
    sides = (size, size) if isinstance(size, int) else (size.get("height"), size.get("width"))
    if sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ValueError(f"{name} is {json.dumps(size)}; it must have equal height and width.")
    return sides[0]


def _check_scale(config: dict[str, Any]) -> None:
    """All steps are affine, so two grey levels show what becomes of every one."""
    mean, std = (
        value if isinstance(value, list | tuple) else [value]
        for value in (config["image_mean"], config["image_std"])
    )
    for channel_mean, channel_std in zip(mean, std, strict=True):
        ends = []
        for x in (0.0, 255.0):
            if config["do_rescale"]:
                x = x * config["rescale_factor"] - bool(config["rescale_offset"])
            if config["do_normalize"]:
                x = (x - channel_mean) / channel_std
            if config["include_top"]:
                x = x / channel_std
            ends.append(x)
        if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(ends, (-1, 1), strict=True)):
            raise ValueError(
                f"grey levels 0 and 255 become {ends[0]:g} and {ends[1]:g} by rescale_factor, "
                "rescale_offset, do_normalize and include_top; only -1 and 1 can be done."
            )


def _max_tokens(path: Path) -> int:
    limit = _read_json(path).get("model_max_length") if path.is_file() else None
    if limit is None or (isinstance(limit, int | float) and limit > 2**20):  # 1e30: no limit
        return _DEFAULT_MAX_TOKENS
    if not isinstance(limit, int) or limit < 3:
        raise ValueError(f"{path} cannot be used: model_max_length is {limit!r}.")
    return limit


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be used: it holds no object.")
    return content
