"""examples/image.py end to end: a tiny random model that answers, and one that writes a stream of the reference."""

import importlib
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from goldens_io import load_golden
from tiny import fresh_model

from evabyte import EvaByteForCausalLM, EvaByteImageProcessor, EvaByteProcessor, EvaByteTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
example = importlib.import_module("image")
GOLDEN = load_golden("image")
STREAM = GOLDEN["out.jpeg_0"].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    fresh_model(eos_token_id=11).save_pretrained(path)
    EvaByteProcessor(EvaByteImageProcessor(), EvaByteTokenizer(eos_token="<|eot_id|>")).save_pretrained(path)
    PIL.Image.fromarray(GOLDEN["in.image_2"].numpy()).save(path / "image.png")
    return path


@pytest.fixture
def writes(monkeypatch):
    """Makes the model write the given ids, whatever its weights."""

    def write(ids):
        real = EvaByteForCausalLM.multi_byte_generate

        def scripted(self, prompt, **options):
            real(self, prompt, **{**options, "max_new_tokens": 1})  # the arguments and the prompt are good
            return torch.cat([prompt, torch.tensor([ids])], dim=1)

        monkeypatch.setattr(EvaByteForCausalLM, "multi_byte_generate", scripted)

    return write


def test_ask(folder, capsys):
    question = ["ask", "--model", str(folder), str(folder / "image.png"), "What is this?", "--max-new-tokens", "12"]
    example.main(question)
    first = capsys.readouterr().out
    example.main(question)
    assert capsys.readouterr().out == first
    # The picture is part of the prompt: these are the bytes that the model adds to it.
    model, processor = example.load(str(folder))
    content = [{"type": "image", "image": GOLDEN["in.image_2"].numpy()}, {"type": "text", "text": "What is this?"}]
    prompt = torch.tensor([processor.encode_chat([{"role": "user", "content": content}], add_generation_prompt=True)])
    output = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=11, pad_token_id=0)
    assert first == processor.decode(output[0, prompt.shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(("kept", "said"), [(len(STREAM), "40 x 24\n"), (150, "40 x 24, not finished by the model\n")])
def test_draw(folder, tmp_path, capsys, writes, kept, said):
    writes([64 + byte for byte in STREAM[:kept]] + [8])
    example.main(["draw", "--model", str(folder), "A picture", "--output", str(tmp_path / "out.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}: {said}"
    saved = np.asarray(PIL.Image.open(tmp_path / "out.png")).astype(int)
    whole = np.asarray(EvaByteImageProcessor().decode(bytes(STREAM))).astype(int)
    assert np.array_equal(saved[:15, :15], whole[:15, :15])
    assert np.array_equal(saved, whole) == (kept == len(STREAM))


def test_what_is_no_picture_is_said(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main(
            ["draw", "--model", str(folder), "x", "--max-new-tokens", "9", "--output", str(tmp_path / "a.jpg")]
        )
    assert "no picture" in capsys.readouterr().err
    assert not (tmp_path / "a.jpg").exists()


def test_a_folder_without_a_processor(tmp_path):
    fresh_model().save_pretrained(tmp_path)
    EvaByteTokenizer().save_pretrained(tmp_path)
    _, processor = example.load(str(tmp_path))
    assert processor.image_processor.jpeg_quality == 25
