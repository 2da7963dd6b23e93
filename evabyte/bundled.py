"""The small trained checkpoint that ships with the package."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def bundled_checkpoint(checkpoints: Path = CHECKPOINTS) -> Path:
    """The model folder of the bundled checkpoint, ready for `from_pretrained`.

    Args:
        checkpoints: the folder that holds it.

    Raises:
        FileNotFoundError: this copy of the package came without it, or has several.
    """
    found = sorted(config.parent for config in checkpoints.glob("*/config.json"))
    if len(found) != 1:
        have = f"{len(found)} bundled models" if found else "no bundled model"
        raise FileNotFoundError(f"{have} in {checkpoints}: name a model folder or a Hub id instead")
    return found[0]


__all__ = ["bundled_checkpoint"]
