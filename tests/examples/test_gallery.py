"""The gallery's page is what the script writes."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
gallery = importlib.import_module("gallery")


def test_pieces_are_the_text(capsys, monkeypatch):
    monkeypatch.setattr(gallery, "PROMPTS", gallery.PROMPTS[:1])
    gallery.main(["--new-bytes", "40"])
    page = capsys.readouterr().out
    kept = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert page.startswith(gallery.HEAD) and kept.startswith(gallery.HEAD)
    for prompt in gallery.PROMPTS:
        texts = [block.split("\n```")[0] for block in page.split("```text\n")[1:]]
        assert len(texts) == len(gallery.SETTINGS)
        assert all(text.replace("|", "").startswith(prompt) for text in texts)
        assert all(len(text.replace("|", "").encode()) == len(prompt) + 40 for text in texts)
