"""Folders that load without this package: a saved model brings the code that runs it.

Transformers copies the modules that a model's own imports by `from .name import`. Modules of another package come into
the same flat folder here, and what named that package is made to name the folder.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers.dynamic_module_utils import get_relative_import_files

_IMPORT = re.compile(r"^(\s*)from evabyte\.(\w+) import", re.MULTILINE)


def make_self_contained(folder: str | Path) -> list[str]:
    """Copy the modules of this package that the code in a folder imports, and turn these imports into relative ones.

    Args:
        folder: where a model was saved with its code.

    Returns:
        names of the files that were added.
    """
    folder, source = Path(folder), Path(__file__).parent
    added: list[str] = []
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        modules = {module for _, module in _IMPORT.findall(text)}
        if modules:
            file.write_text(_IMPORT.sub(r"\1from .\2 import", text), encoding="utf-8")
        for module in sorted(modules):
            wanted = source / f"{module}.py"
            for needed in [wanted, *map(Path, get_relative_import_files(wanted))]:
                shutil.copy(needed, folder / needed.name)
                added.append(needed.name)
    return sorted(set(added))


class SelfContainedMixin:
    """`save_pretrained` and `push_to_hub` of a model whose code is spread over packages; before the model's class."""

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; the folder loads with `trust_remote_code=True` where nothing of ours is installed."""
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "create_pr") if name in kwargs
        }
        given_class: Any = type(self)
        if isinstance(self, FSDPModule):  # `fully_shard` changes the class, and with it the module that is copied
            self.__class__ = next(base for base in given_class.__mro__ if not issubclass(base, FSDPModule))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.__class__ = given_class
        make_self_contained(save_directory)
        if push_to_hub:
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)  # type: ignore[attr-defined]
