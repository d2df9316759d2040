"""Images into batches, through a model's image processor."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from hf_compress.calibration.media import Medium
from hf_compress.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image


def mode_read(config: Any) -> str:
    """What Pillow calls the images that a model reads, by its number of channels: grey ones, or in colours."""
    return "L" if getattr(config, "num_channels", 3) == 1 else "RGB"


def opened(medium: Medium, mode: str = "RGB") -> Image:
    """An image, upright, grey or in colours.

    Raises:
        CalibrationError: Pillow is missing, or the file cannot be read; it is named.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise CalibrationError("images are read by Pillow, which is not installed: pip install pillow") from None
    value = medium.value
    try:
        if isinstance(value, Mapping):
            value = value["path"] if value["bytes"] is None else BytesIO(value["bytes"])
        image = value if isinstance(value, Image.Image) else Image.open(value)
        return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{medium} cannot be read as an image: {one_line(error)}") from error


def pixels(mode: str, media: list[Medium], processor: Any) -> Mapping[str, Any]:
    """A batch of images as the processor gives it to a model that reads such ones."""
    images = [opened(medium, mode) for medium in media]
    try:
        return processor(images=images, return_tensors="pt")
    except (ValueError, TypeError) as error:
        raise CalibrationError(f"{type(processor).__name__} does not take the images: {one_line(error)}") from error
