"""Opening images that people pass: PIL images, arrays, tensors, files, bytes, URLs. Nothing is trusted.

A file is opened by the formats below alone (others start programs, or are rarely met), its size is read from the header
before a pixel is decoded, and nothing is fetched from the network unless that is asked for.
"""

import base64
import binascii
import io
import os
import urllib.request
from typing import Any

import numpy as np
import torch

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
_MAX_DOWNLOAD = 64 * 2**20
_URL_TIMEOUT = 20.0


def pillow() -> Any:
    """The package `PIL`, with `Image` and `ImageOps` loaded.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'evabyte[image]' (or pip install pillow).") from error
    return PIL


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise a `ValueError` when an image has more than `max_pixels`."""
    if width * height > max_pixels:
        raise ValueError(
            f"the image has {width} x {height} pixels, more than max_pixels={max_pixels}: "
            "make it smaller, or raise max_pixels if you trust where it comes from."
        )


def load_image(image: Any, max_pixels: int, allow_urls: bool = False, input_data_format: str | None = None) -> Any:
    """Open one image.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `bytes`, `str` or `os.PathLike`): a PIL image; pixels
            [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, uint8 or integers from 0 to 255, booleans, or
            floats from 0 to 1; the bytes of an image file; its path; a `data:` URL; base64; an http(s) URL.
        max_pixels: the largest width times height; read from the header of a file before anything is decoded.
        allow_urls: fetch http and https URLs.
        input_data_format: `"channels_first"` or `"channels_last"`. By default the shape tells; where both ends could
            be the channels, they are the first axis of a tensor and the last of an array.

    Returns:
        `PIL.Image.Image`: decoded, its first frame, and turned the way a viewer shows it.

    Raises:
        ValueError: a URL without `allow_urls`; too many pixels; not an image, a damaged or a cut file; pixels of
            another shape or range.
        FileNotFoundError: no file has this name.
        TypeError: `image` is nothing of the above.
    """
    pil = pillow()
    if isinstance(image, pil.Image.Image):
        check_pixels(image.width, image.height, max_pixels)
        opened, name = image, "the image"
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_pixels(image, max_pixels, input_data_format)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        opened, name = _open(bytes(image), "the image bytes", max_pixels), "the image bytes"
    elif isinstance(image, (str, os.PathLike)):
        data, name = _read(os.fspath(image), allow_urls)
        opened = _open(data, name, max_pixels)
    else:
        raise TypeError(
            f"images must be PIL images, arrays, tensors, bytes, paths or URLs, but one is a {type(image).__name__}."
        )
    try:
        return pil.ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, EOFError, struct.error and others
        raise ValueError(f"{name} cannot be decoded, the file is damaged or cut: {error}") from error


def _open(data: bytes, name: str, max_pixels: int) -> Any:
    image_module = pillow().Image
    image_module.init()
    try:
        opened = image_module.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in image_module.OPEN])
    except image_module.DecompressionBombError as error:
        raise ValueError(f"{name} has more pixels than Pillow opens: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be opened: not an image in one of the formats {', '.join(_FORMATS)}."
        ) from error
    check_pixels(opened.width, opened.height, max_pixels)
    return opened


def _read(reference: str, allow_urls: bool) -> tuple[bytes, str]:
    """The bytes behind a path, a URL or base64, and how to call them in an error."""
    shown = repr(reference if len(reference) <= 80 else reference[:77] + "...")
    scheme = reference.split(":", 1)[0].lower()
    if scheme in ("http", "https"):
        if not allow_urls:
            raise ValueError(
                f"the image {shown} is a URL, and nothing is fetched unless asked for: pass allow_urls=True, "
                "or fetch it yourself and pass the bytes."
            )
        return _fetch(reference, shown), shown
    if scheme == "data":
        head, _, encoded = reference.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"the image {shown} is a data URL without base64: only data:...;base64,... is read.")
        return _from_base64(encoded, shown), shown
    try:
        with open(reference, "rb") as file:
            return file.read(), shown
    except (OSError, ValueError) as error:  # a long base64 string is no valid file name
        try:
            return _from_base64(reference, shown), shown
        except ValueError:
            raise FileNotFoundError(f"the image {shown} cannot be read: {error}") from error


def _from_base64(encoded: str, shown: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the image {shown} is not valid base64: {error}") from error


def _fetch(url: str, shown: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "evabyte"})
    try:
        with urllib.request.urlopen(request, timeout=_URL_TIMEOUT) as response:
            data = response.read(_MAX_DOWNLOAD + 1)
    except OSError as error:
        raise ValueError(f"the image {shown} cannot be fetched: {error}") from error
    if len(data) > _MAX_DOWNLOAD:
        raise ValueError(f"the image {shown} is larger than {_MAX_DOWNLOAD} bytes.")
    return data


def _from_pixels(pixels: Any, max_pixels: int, input_data_format: str | None) -> Any:
    """A PIL image of mode L, RGB or RGBA from an array or tensor."""
    channels_first_by_custom = isinstance(pixels, torch.Tensor)
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels  # numpy knows no bfloat16
    array = np.asarray(pixels)
    if array.ndim == 3:
        axes = [axis for axis in ((0, 2) if channels_first_by_custom else (2, 0)) if array.shape[axis] in (1, 3, 4)]
        if input_data_format is not None:
            axes = [0 if input_data_format == "channels_first" else 2]
        array = np.moveaxis(array, axes[0], 2) if axes else array
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ValueError(
            "an image of pixels must have shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, "
            f"but one has shape {list(pixels.shape)}."
        )
    check_pixels(array.shape[1], array.shape[0], max_pixels)
    top = 1 if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating) else 255
    if not (array.dtype.kind in "buif" and array.min() >= 0 and array.max() <= top):
        raise ValueError(
            f"pixels of dtype {array.dtype} must be integers from 0 to 255 or floats from 0 to 1: rescale the image."
        )
    array = np.round(array * 255.0 if top == 1 else array).astype(np.uint8)
    return pillow().Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


__all__ = ["check_pixels", "load_image", "pillow"]
