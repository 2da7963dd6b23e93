"""`generate` decodes by multibyte decoding where the call or the generation config asks for it."""

import pytest
import torch
from tiny import fresh_model, pad_left, random_ids, tiny_model
from transformers import GenerationConfig, StoppingCriteria

from evabyte import EvaByteForCausalLM, multibyte_generation

HOW = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def runs(monkeypatch):
    """Grows by one at every run of multibyte decoding."""
    seen = []
    init = multibyte_generation._Run.__init__
    monkeypatch.setattr(multibyte_generation._Run, "__init__", lambda *args: seen.append(init(*args)))
    return seen


def test_a_call_asks_for_it(runs):
    model, ids = tiny_model(), random_ids(2, 9)
    expected = model.generate(ids, **HOW)
    assert not runs
    assert torch.equal(model.generate(ids, multibyte=True, draft="lookup", **HOW), expected)
    assert len(runs) == 1
    with pytest.raises(ValueError, match="Multibyte decoding replaces greedy"):
        model.generate(ids, multibyte=True, num_beams=2, **HOW)


def test_a_saved_generation_config_asks_for_it(tmp_path, runs):
    model, ids = fresh_model(), random_ids(1, 9)
    expected = model.generate(ids, **HOW)
    beams = model.generate(ids, num_beams=2, **HOW)
    model.generation_config = GenerationConfig(multibyte=True, pad_token_id=0)
    model.save_pretrained(tmp_path)
    model = EvaByteForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.generate(ids, **HOW), expected) and len(runs) == 1
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(**HOW)), expected) and len(runs) == 2
    # What it does not stand in for, and a call that says no, are plain `generate`.
    assert torch.equal(model.generate(ids, num_beams=2, **HOW), beams)
    assert torch.equal(model.generate(ids, use_cache=False, **HOW), expected)
    assert torch.equal(model.generate(ids, assistant_model=model, **HOW), expected)
    assert torch.equal(model.generate(ids, multibyte=False, **HOW), expected)
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(multibyte=False, **HOW)), expected)
    assert len(runs) == 2


class AfterByte(StoppingCriteria):
    """Ends each row at a byte of its own."""

    def __init__(self, ends):
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.ends


def test_criteria_see_every_row_at_its_place():
    model, places = tiny_model(), (20, 12, 16)
    ids, mask = pad_left([random_ids(n, seed=n) for n in (5, 9, 7)])
    free = model.generate(ids, attention_mask=mask, **HOW)
    ends = [row[place].item() for row, place in zip(free, places, strict=True)]
    assert all(end not in row[9:place] for end, row, place in zip(ends, free.tolist(), places, strict=True))
    how = {**HOW, "attention_mask": mask, "stopping_criteria": [AfterByte(ends)], "pad_token_id": 0}
    output = model.generate(ids, multibyte=True, **how)
    for row, (alone, place) in enumerate(zip(free, places, strict=True)):
        assert torch.equal(output[row, : place + 1], alone[: place + 1]) and not output[row, place + 1 :].any()
