"""The trained checkpoint in the box: small, loadable, and a real model of text."""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evabyte.bundled import bundled_checkpoint

HELDOUT = Path(__file__).parents[2] / "examples" / "benchmarks" / "heldout"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_checkpoint(), padding_side="left")


def test_folder_is_complete_and_small():
    folder = bundled_checkpoint()
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 16 * 2**20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---") and "license" in card and "bits per byte" in card
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    assert log["provenance"]["data"]["sources"] and log["curve"] and log["final"]


def test_predicts_held_out_prose_better_than_xz_compresses_it(model, tokenizer):
    text = (HELDOUT / "prose.txt").read_bytes()[:20_000]
    ids = torch.tensor([tokenizer.encode_bytes(text)])
    with torch.no_grad():
        loss = model(ids, labels=ids).head_losses[0].item()
    xz = 8 * len(lzma.compress((HELDOUT / "prose.txt").read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    assert loss / math.log(2) < xz / (HELDOUT / "prose.txt").stat().st_size


def test_every_head_has_learnt_and_later_ones_know_less(model, tokenizer):
    ids = torch.tensor([tokenizer.encode_bytes((HELDOUT / "prose.txt").read_bytes()[:4000])])
    with torch.no_grad():
        losses = model(ids, labels=ids).head_losses.tolist()
    assert losses == sorted(losses)
    assert losses[-1] < 3.5  # bytes of English by frequency alone cost about 3.1 nats


def test_multibyte_decoding_on_real_text(model, tokenizer):
    texts = [(HELDOUT / name).read_text(encoding="utf-8")[:n] for name, n in (("prose.txt", 600), ("code.py.txt", 333))]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    how = {"max_new_tokens": 120, "do_sample": False}
    expected = model.generate(**inputs, **how)
    ids, lengths = model.multi_byte_generate(**inputs, **how, return_acc_lengths=True)
    assert torch.equal(ids, expected)
    assert lengths.shape[1] < 100  # a forward brings more than a byte
