"""Folders that load without this package: what is saved brings the code that runs it, and a card that says how.

Transformers copies the modules that a class's own imports by `from .name import`. Modules of another package come into
the same flat folder here, and what named that package is made to name the folder.

Models, tokenizers, image processors and processors take part by naming the mixin before transformers' class:

    class EvaByteProcessor(SelfContainedMixin, ProcessorMixin):
        _auto_class = "AutoProcessor"

and by importing what they need with `from .name import` (their own package) or `from evabyte.name import` (this one).
"""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from transformers.dynamic_module_utils import get_relative_import_files

from .model_card import CARD, write_card

_IMPORT = re.compile(r"^(\s*)from evabyte\.(\w+) import", re.MULTILINE)
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def make_self_contained(folder: str | Path) -> list[str]:
    """Copy the modules of this package that the code in a folder imports, and turn these imports into relative ones.

    Args:
        folder: where something was saved with its code.

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
    """`save_pretrained` and `push_to_hub` of a class whose code is spread over packages; before transformers' class."""

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers; the folder loads with `trust_remote_code=True` where nothing of ours is installed.

        A model's folder gets a card, README.md, unless it has one.
        """
        folder = Path(save_directory)
        to_hub = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.resolve().name)
        before = _modification_times(folder)

        given_class: Any = type(self)
        # `fully_shard` gives a model a class of PyTorch's making, and with it another module that would be copied.
        self.__class__ = next(base for base in given_class.__mro__ if not base.__module__.startswith("torch."))
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.__class__ = given_class
        if not kwargs.get("is_main_process", True):
            return saved

        make_self_contained(folder)
        changed = {name for name, time in _modification_times(folder).items() if before.get(name) != time}
        if "config.json" in changed and not (folder / CARD).exists():
            write_card(folder, folder.resolve().name, _loaded_from(self))
            changed.add(CARD)
        if push_to_hub:
            _upload(self, folder, changed, repo_id, **to_hub)
        return saved

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> CommitInfo:
        """As in transformers. A model's repository gets a card that says how to load it, unless it has one.

        Args:
            repo_id: `"owner/name"`, or a name in one's own namespace; created if it is not there.
            max_shard_size: largest weight file.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags`.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return _upload(self, folder, set(_modification_times(folder)), repo_id, **kwargs)


def _loaded_from(saved: Any) -> str:
    return str(getattr(saved, "name_or_path", ""))


def _modification_times(folder: Path) -> dict[str, int]:
    """Of the files in a folder and the folders in it, by their paths within it."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def _upload(
    saved: SelfContainedMixin,
    folder: Path,
    files: set[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    tags: list[str] | str | None = None,
    **options: Any,
) -> CommitInfo:
    """Upload files of a folder in one commit; a card that the repository has stays, but for the tags it lacks."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    tags = [*(getattr(saved, "model_tags", None) or []), *([tags] if isinstance(tags, str) else tags or [])]
    if api.file_exists(repo_id, CARD, revision=revision):
        files = files - {CARD}
        card = ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=revision))
        missing = [tag for tag in tags if tag not in (card.data.tags or [])]
        if missing:
            card.data.tags = [*(card.data.tags or []), *missing]
            card.save(folder / CARD)
            files = files | {CARD}
    elif CARD in files:  # written by the save that this upload belongs to, when the repository had no name yet
        write_card(folder, repo_id, _loaded_from(saved), tags)
    elif (folder / CARD).exists():
        files = files | {CARD}
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(files)],
        commit_message=commit_message or f"Upload {type(saved).__name__}",
        revision=revision,
        **options,
    )


__all__ = ["SelfContainedMixin", "make_self_contained"]
