"""A checkpoint folder on disk: its configuration, and its safetensors files without reading them whole."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"


def check_output(output: Path) -> None:
    """Raise a `FileExistsError` unless `output` is free to become a checkpoint: an empty folder, or not there."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"`output` {output} is a file: name a folder.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"`output` {output} is not empty: name another folder.")


class Checkpoint:
    """The weights of a folder, open for reading, and its configuration.

    Attributes:
        files: header of each safetensors file, by file name.
        sharded: whether there is an index that lists the files.
        tensors: dtype and shape of each tensor, by tensor name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is not a checkpoint: there is no config.json. Name a folder as `save_pretrained` writes it; "
                "download one from the Hub first, and merge an adapter into its model."
            )
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        try:
            metadata = get_local_safetensors_metadata(folder)
            self.files, self.sharded = metadata.files_metadata, metadata.sharded
            readers = {file: safe_open(folder / file, "pt") for file in self.files}
        except NotASafetensorsRepoError as error:
            raise FileNotFoundError(
                f"{folder} has no safetensors weights: load it with `from_pretrained`, and save it again with "
                "`save_pretrained`."
            ) from error
        except (SafetensorsParsingError, SafetensorError) as error:
            raise OSError(
                f"A safetensors file of {folder} is damaged or cut short ({error}): copy or download it again."
            ) from error
        held = {name: file for file, header in self.files.items() for name in header.tensors}
        if held != metadata.weight_map or any(Path(file).name != file for file in self.files):
            raise ValueError(f"{folder / INDEX} does not fit the files beside it: copy or download the folder again.")
        self.tensors = {name: self.files[file].tensors[name] for name, file in held.items()}
        self._readers = {name: readers[file] for name, file in held.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, flattened; mapped from the file, so that only what is looked at is read."""
        return self._readers[name].get_tensor(name).flatten()


__all__ = ["INDEX", "Checkpoint", "check_output"]
