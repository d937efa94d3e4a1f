"""Converts images to pixels and PNG files."""

import re
import urllib.parse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainer.errors import ArgumentError, ArgumentTypeError, warn
from trainer.loggers.base import needed
from trainer.metrics.whole_files import named_when_whole


def as_pixels(image: Any, name: str) -> np.ndarray[Any, Any]:
    """Returns an image as uint8, of shape (height, width) or (height, width, 3 or 4).

    Args:
        image: As for `Logger.log_image`.
        name: Its name, for messages.

    Raises:
        ArgumentTypeError: The entries are not numbers.
        ArgumentError: The shape is not that of an image.
    """
    array = np.asarray(image)
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = " Channels come last: np.moveaxis(image, 0, -1)."
        elif len(shape) == 4:
            hint = " Log one image at a time."
        raise ArgumentError(
            f"the image `{name}` has shape {shape}; it must be (height, width), or (height, width, channels) with 1, 3 "
            f"or 4 channels.{hint}"
        )
    array = array[:, :, 0] if shape[2:] == (1,) else array
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    is_float = jnp.issubdtype(array.dtype, np.floating)
    if not is_float and not jnp.issubdtype(array.dtype, np.integer):
        raise ArgumentTypeError(
            f"the image `{name}` has dtype {array.dtype}; it must be a float from 0 to 1, or an integer from 0 to 255."
        )
    top = 1.0 if is_float else 255.0
    given = array.astype(np.float64)
    shown = np.clip(np.nan_to_num(given, nan=0.0, posinf=top, neginf=0.0), 0.0, top)
    if not np.allclose(shown, given, rtol=0, atol=top / 255):  # less than one gray level is rounding
        warn(
            f"the image `{name}` has values outside of 0 to {top:g} ({array.dtype}), which are cut off, or NaN, which "
            f"is shown as 0; scale it, or pass integers from 0 to 255."
        )
    return np.rint(shown * (255 / top)).astype(np.uint8)


def write_png(folder: Path, name: str, step: int | None, image: Any, by: str) -> Path:
    """Writes an image to ``folder/<name>/<step>.png``, or ``folder/<name>.png`` without a step, atomically.

    Args:
        folder: Where images go; created if missing.
        name: The name; ``/`` makes subdirectories, and characters invalid in paths are URL-escaped.
        step: The number of updates finished. Replaces an image of the same step.
        image: As for `Logger.log_image`.
        by: The name of the writer, for messages.

    Raises:
        ArgumentError: The image is invalid, or pillow is missing.
        OSError: The file cannot be written; no partial file is left.
    """
    pixels = as_pixels(image, name)
    with needed(f"an image of {by}", "pillow", extra="images"):
        import PIL.Image  # lazy, since it is optional
    parts = [re.sub(r"^\.", "%2E", urllib.parse.quote(part, safe=" @+=,")) or "_" for part in name.split("/")]
    parts[-1] = f"{parts[-1]}.png" if step is None else f"{parts[-1]}/{step:08d}.png"
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_when_whole(path) as temporary:
        PIL.Image.fromarray(pixels).save(temporary, format="PNG")
    return path
