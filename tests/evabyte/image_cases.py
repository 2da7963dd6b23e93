"""What the tests of images share: the reference's pictures and streams, and pictures to try."""

import io

import numpy as np
import PIL.Image
from goldens_io import load_golden

from evabyte import EvaByteImageProcessor, EvaByteProcessor, EvaByteTokenizer

GOLDEN = load_golden("image")
IMAGES = [GOLDEN[f"in.image_{index}"].numpy() for index in range(3)]
STREAMS = [GOLDEN[f"out.jpeg_{index}"].numpy().tobytes() for index in range(3)]
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": IMAGES[2]}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "Déjà vu."},
]

image_processor = EvaByteImageProcessor()
processor = EvaByteProcessor(image_processor, EvaByteTokenizer())


def noise(width, height, mode="RGB", seed=0):
    """An image with soft shapes in it, the same for the same arguments."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 4), dtype=np.uint8)
    return PIL.Image.fromarray(small, "RGBA").resize((width, height)).convert(mode)


def file_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


# Goldens
