"""Pictures as EvaByte reads and writes them: small JPEG streams without tables."""

import io
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .hub import SelfContainedMixin
from .image_loading import check_pixels, load_image, pillow
from .jpeg_streams import END, START, add_tables, find_damage, read_header

_LANCZOS = 1
_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_SHORTEST_EDGE = 16  # one block of 4:2:0
_LONGEST_JPEG_EDGE = 65500  # what libjpeg writes at most


class EvaByteImageSettings(TypedDict, total=False):
    """What [`EvaByteImageProcessor`] can be set to, when it is made, loaded or called."""

    do_resize: bool
    size: dict[str, int]
    resample: int
    do_convert_rgb: bool
    jpeg_quality: int
    jpeg_subsampling: str
    jpeg_streamtype: int
    jpeg_restart_marker_blocks: int
    max_pixels: int


def fitted_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """The (width, height) of a picture made to fit `longest_edge`, each at least 16; smaller ones are not enlarged.

    The other edge of a picture that is made smaller is rounded down, then up to an even number.
    """
    if max(width, height) > longest_edge:
        # In floating point as here, not as longest_edge * height // width: the two differ by one for some sizes.
        aspect_ratio = width / height
        if width >= height:
            width, height = longest_edge, int(longest_edge / aspect_ratio)
            height += height % 2
        else:
            width, height = int(longest_edge * aspect_ratio), longest_edge
            width += width % 2
    return max(width, _SHORTEST_EDGE), max(height, _SHORTEST_EDGE)


class EvaByteImageProcessor(SelfContainedMixin, BaseImageProcessor):
    r"""Turns images into the JPEG streams that EvaByte reads, and streams into images again.

    An image becomes RGB, is made to fit `size`, and is written as a JPEG from which the tables are left out. What is
    lost: transparency, size, and what JPEG drops at this quality. The stream does not say its quality, so it can be
    decoded by a processor of the same `jpeg_quality` only; with another one, contrast and colours are wrong.

    Args:
        do_resize (`bool`): Make the image fit `size`.
        size (`dict`, *optional*): `{"longest_edge": n}` (default, 384) makes larger images smaller and keeps their
            proportions; `{"width": w, "height": h}` is exact.
        resample (`int`): The `PIL.Image.Resampling` to resize with. 1 is Lanczos.
        do_convert_rgb (`bool`): Convert to RGB. Otherwise gray stays gray, and other modes than L and RGB are refused.
        jpeg_quality (`int`): 1 to 100, on the scale of libjpeg.
        jpeg_subsampling (`str`): `"4:4:4"`, `"4:2:2"` or `"4:2:0"`: how colours are stored.
        jpeg_streamtype (`int`): 2 leaves the tables out, 0 keeps them.
        jpeg_restart_marker_blocks (`int`): Blocks between restart markers, which keep an error from spreading; 0 writes
            none.
        max_pixels (`int`): Refuse larger images, before they are decoded.
        kwargs: Passed on to [`BaseImageProcessor`].

    Raises:
        ValueError: a setting is out of its range.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = EvaByteImageSettings
    model_input_names = ["image_bytes"]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = _LANCZOS,
        do_convert_rgb: bool = True,
        jpeg_quality: int = 25,
        jpeg_subsampling: str = "4:2:0",
        jpeg_streamtype: int = 2,
        jpeg_restart_marker_blocks: int = 1,
        max_pixels: int = 50_000_000,
        **kwargs: Any,
    ):
        size = dict(size) if size is not None else {"longest_edge": 384}
        longest_edge = size.get("longest_edge", _SHORTEST_EDGE)
        if set(size) not in ({"longest_edge"}, {"width", "height"}) or longest_edge < _SHORTEST_EDGE:
            raise ValueError(
                f'size must be {{"longest_edge": n}} with n of at least {_SHORTEST_EDGE}, '
                f'or {{"width": w, "height": h}}, but is {size}.'
            )
        if not all(1 <= edge <= _LONGEST_JPEG_EDGE for edge in size.values()):
            raise ValueError(f"the edges in size must be from 1 to {_LONGEST_JPEG_EDGE}, but size is {size}.")
        if not (isinstance(jpeg_quality, int) and 1 <= jpeg_quality <= 100):
            raise ValueError(f"jpeg_quality must be a whole number from 1 to 100, but is {jpeg_quality!r}.")
        if jpeg_subsampling not in _SUBSAMPLINGS:
            raise ValueError(f"jpeg_subsampling must be one of {_SUBSAMPLINGS}, but is {jpeg_subsampling!r}.")
        if jpeg_streamtype not in (0, 2):
            raise ValueError(f"jpeg_streamtype must be 2 (no tables) or 0 (with tables), but is {jpeg_streamtype!r}.")
        if not 0 <= jpeg_restart_marker_blocks <= 65535:
            raise ValueError(
                f"jpeg_restart_marker_blocks must be from 0 to 65535, but is {jpeg_restart_marker_blocks!r}."
            )
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = size
        self.resample = int(resample)
        self.do_convert_rgb = do_convert_rgb
        self.jpeg_quality = jpeg_quality
        self.jpeg_subsampling = jpeg_subsampling
        self.jpeg_streamtype = jpeg_streamtype
        self.jpeg_restart_marker_blocks = jpeg_restart_marker_blocks
        self.max_pixels = max_pixels

    def with_settings(self, **settings: Any) -> "EvaByteImageProcessor":
        """This processor with some settings changed, as a new one.

        Raises:
            TypeError: there is no such setting.
            ValueError: a setting is out of its range.
        """
        names = EvaByteImageSettings.__annotations__
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {unknown}: there are {list(names)}.")
        if not settings:
            return self
        return type(self)(**{name: getattr(self, name) for name in names} | settings)

    def preprocess(
        self,
        images: Any,
        allow_urls: bool = False,
        input_data_format: str | None = None,
        return_tensors: None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Turn images into JPEG streams.

        Args:
            images: One image, a list of images, or lists of them. An image is a PIL image, an array or tensor of
                pixels, the bytes of a file, a path, a `data:` URL, or, with `allow_urls`, an http(s) URL. Bytes that
                already are a stream without tables pass unchanged.
            allow_urls (`bool`): Fetch http(s) URLs. Leave this off for text from strangers.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays and tensors.
            return_tensors: Must be None: streams differ in length. [`EvaByteProcessor`] gives padded ids.
            settings: What to change for this call ([`EvaByteImageSettings`]).

        Returns:
            `BatchFeature`: `image_bytes`, a flat list of `bytes`, one stream an image.

        Raises:
            ValueError, FileNotFoundError, TypeError: an image cannot be opened, is too large or damaged
                (see `load_image`); a setting is out of its range.
        """
        if return_tensors is not None:
            raise ValueError("streams differ in length: leave return_tensors out, or use EvaByteProcessor for ids.")
        processor = self.with_settings(**settings)
        streams = [processor.encode(image, allow_urls, input_data_format) for image in flat_images(images)]
        return BatchFeature({"image_bytes": streams})

    def encode(self, image: Any, allow_urls: bool = False, input_data_format: str | None = None) -> bytes:
        """Turn one image into a JPEG stream; arguments and errors as in [`preprocess`]."""
        input_data_format = getattr(input_data_format, "value", input_data_format)
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(
                f'input_data_format must be "channels_first" or "channels_last", but is {input_data_format!r}.'
            )
        if isinstance(image, (bytes, bytearray, memoryview)) and bytes(image[:2]) == START:
            stream = bytes(image)
            header = read_header(stream)
            if not header.has_quantization_tables:
                self._check(stream)
                return stream
        opened = load_image(image, self.max_pixels, allow_urls, input_data_format)
        return self._write(self._resized(self._in_jpeg_mode(opened)))

    def decode(self, stream: bytes, allow_partial: bool = False) -> Any:
        """Turn a JPEG stream, with or without tables, into an image.

        Args:
            stream (`bytes`): A stream of this processor's `jpeg_quality`.
            allow_partial (`bool`): Decode what is there of a stream that breaks off or is damaged. The header has to be
                whole; what is missing becomes gray or a smear.

        Returns:
            `PIL.Image.Image`: of mode RGB, or L for a gray stream.

        Raises:
            ValueError: `stream` is no JPEG stream, names too many pixels, breaks off, or is damaged.
        """
        damage = self._check(stream, allow_partial)
        whole = add_tables(stream, self.jpeg_quality)
        if damage:
            whole = whole.rstrip(b"\xff") + END  # the decoder fills up what is missing once it meets the end
        try:
            image = pillow().Image.open(io.BytesIO(whole), formats=["JPEG"])
            image.load()
        except Exception as error:  # OSError, SyntaxError, and what else a decoder makes of nonsense
            raise ValueError(f"the JPEG stream cannot be decoded: {error}") from error
        return image.copy()

    def add_tables(self, stream: bytes, huffman_tables: bool = True) -> bytes:
        """The stream as a JPEG file: with the tables it leaves out, those of this processor's `jpeg_quality`.

        Args:
            stream (`bytes`): A JPEG stream, with or without tables.
            huffman_tables (`bool`): Add those too, which not every viewer knows by heart.

        Raises:
            ValueError: `stream` is no JPEG stream, or breaks off in its header.
        """
        return add_tables(stream, self.jpeg_quality, huffman_tables)

    def post_process(self, streams: list[bytes], allow_partial: bool = False) -> list[Any]:
        """[`decode`] for each stream."""
        return [self.decode(stream, allow_partial) for stream in streams]

    def _check(self, stream: bytes, allow_partial: bool = False) -> str | None:
        header = read_header(stream)
        check_pixels(header.width, header.height, self.max_pixels)
        damage = find_damage(stream, header)
        if damage and not allow_partial:
            raise ValueError(
                f"the JPEG stream is damaged or cut: {damage}. To see what there is of it, decode with "
                "allow_partial=True."
            )
        return damage

    def _in_jpeg_mode(self, image: Any) -> Any:
        if image.mode.startswith("I;16"):
            array = np.frombuffer(image.tobytes(), ">u2" if image.mode.endswith("B") else "<u2")
            image = pillow().Image.fromarray((array >> 8).astype(np.uint8).reshape(image.size[::-1]))
        elif image.mode in ("I", "F"):
            raise ValueError(
                f"an image of mode {image.mode!r} has pixels of unknown range: scale it to 0..255 and convert it to "
                'mode "L" first.'
            )
        if self.do_convert_rgb:
            return image.convert("RGB")
        if image.mode not in ("L", "RGB"):
            raise ValueError(
                f"an image of mode {image.mode!r} cannot be written as it is: leave do_convert_rgb on, "
                'or convert it to "L" or "RGB".'
            )
        return image.copy()

    def _resized(self, image: Any) -> Any:
        if not self.do_resize:
            return image
        if "longest_edge" in self.size:
            size = fitted_size(image.width, image.height, self.size["longest_edge"])
        else:
            size = self.size["width"], self.size["height"]
        return image if size == image.size else image.resize(size, self.resample)

    def _write(self, image: Any) -> bytes:
        if max(image.size) > _LONGEST_JPEG_EDGE:
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels, but a JPEG edge has at most "
                f"{_LONGEST_JPEG_EDGE}: leave do_resize on."
            )
        image.info = {}  # comments and the like of the file it came from are no part of the picture
        buffer = io.BytesIO()
        image.save(
            buffer,
            "JPEG",
            quality=self.jpeg_quality,
            subsampling=self.jpeg_subsampling,
            streamtype=self.jpeg_streamtype,
            restart_marker_blocks=self.jpeg_restart_marker_blocks,
        )
        return buffer.getvalue()


def flat_images(images: Any) -> list[Any]:
    """The images of nested lists, or of a batch [B, ., ., .] of pixels, in order."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_images(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


__all__ = ["EvaByteImageProcessor"]
