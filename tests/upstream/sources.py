"""transformers' own tests, in the release that is installed: fetched once, kept out of the repository.

PyPI's source distribution has the common tests but lacks the folders they import (`tests/generation`,
`tests/exporters`, ...), so the tagged archive of the repository is taken. Where GitHub cannot be reached, the source
distribution is laid over a checkout of a release near by, which the user names.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

PLACEHOLDER = """\
import unittest


def __getattr__(name):
    def absent(*args, **kwargs):
        raise unittest.SkipTest(f"{__name__}.{name} is neither in the source distribution nor in the checkout")

    return absent
"""
CACHE = Path(__file__).resolve().parents[2] / ".upstream"
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{version}.tar.gz"
WANTED = ("tests/", "utils/")  # the tests, and what they import from the repository's tools


def tests_of(version: str, checkout: Path | None) -> Path:
    """The folder to put on `sys.path` so that `tests` is transformers' package of that name.

    Args:
        version: of transformers.
        checkout: a clone of transformers, for where GitHub cannot be reached; None reads the tagged archive.

    Raises:
        SystemExit: saying what to do, when the tests cannot be had.
    """
    folder = CACHE / version
    if checkout is not None and not (checkout / "tests/causal_lm_tester.py").is_file():
        sys.exit(f"--checkout {checkout}: no clone of transformers, it lacks tests/causal_lm_tester.py")
    if not folder.is_dir() or checkout is not None:
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            incomplete = Path(scratch, "sources")
            incomplete.mkdir()
            if checkout is None:
                from_archive(version, incomplete)
            else:
                over_checkout(version, checkout, incomplete)
            shutil.rmtree(folder, ignore_errors=True)
            incomplete.rename(folder)
    link_installed(folder)
    return folder


def link_installed(folder: Path) -> None:
    """The tests reload transformers from `src` beside them: let that be the installed one, not a second copy."""
    installed = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    link = folder / "src/transformers"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(installed, target_is_directory=True)


def provenance(folder: Path) -> str:
    """Where the tests in a folder of `tests_of` come from."""
    return (folder / "provenance.txt").read_text().strip()


def from_archive(version: str, folder: Path) -> None:
    """The tests of the tagged archive on GitHub."""
    url = ARCHIVE.format(version=version)
    try:
        download, _ = urllib.request.urlretrieve(url, folder / "archive.tar.gz")
    except OSError as error:
        sys.exit(
            f"{url}: {error}\nThe source distribution on PyPI lacks a part of the tests. Where GitHub cannot be "
            "reached, pass `--checkout FOLDER`, a clone of transformers of a release near by."
        )
    unpack_tests(Path(download), folder)
    Path(download).unlink()
    (folder / "provenance.txt").write_text(f"transformers v{version}")


def over_checkout(version: str, checkout: Path, folder: Path) -> None:
    """The source distribution's common tests, and what it lacks from a checkout.

    Tests that need a module which the checkout lacks too are skipped.
    """
    skipped = shutil.ignore_patterns("models", "fixtures", "__pycache__")
    for part in WANTED:
        shutil.copytree(checkout / part, folder / part, ignore=skipped)
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--quiet"]
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        subprocess.run([*command, "--dest", downloads, f"transformers=={version}"], check=True)
        unpack_tests(next(Path(downloads).glob("*.tar.gz")), folder)
    wanted = {name for path in (folder / "tests").glob("test_*.py") for name in sibling_modules(path)}
    absent = sorted(name for name in wanted if not (folder / "tests" / name).with_suffix(".py").exists())
    for name in absent:
        (folder / "tests" / name).with_suffix(".py").write_text(PLACEHOLDER)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    lacking = f", without {', '.join(absent)}" if absent else ""
    origin = f"transformers {version} sdist over commit {commit} of the repository{lacking}"
    (folder / "provenance.txt").write_text(origin)


def sibling_modules(path: Path) -> list[str]:
    return re.findall(r"^from \.(\w+) import", path.read_text(), flags=re.MULTILINE)


def unpack_tests(archive: Path, folder: Path) -> None:
    """What is wanted of a source archive, without its top folder; models' own tests and their data stay behind."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name.startswith(WANTED) and not name.startswith(("tests/models/", "tests/fixtures/")):
                member.name = name
                tar.extract(member, folder, filter="data")
