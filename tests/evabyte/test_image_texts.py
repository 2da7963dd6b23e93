"""Texts with images in them: answers, batches, chats, and the folder of a processor."""

import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_cases import GOLDEN, IMAGES, MESSAGES, STREAMS, image_processor, noise, pixels, processor
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evabyte import EvaByteImageProcessor, EvaByteProcessor, EvaByteTokenizer


def test_an_answer_with_text_around_pictures():
    picture = [7, *(64 + byte for byte in STREAMS[0]), 8]
    text = processor.tokenizer.encode("A café: ", add_special_tokens=False)
    cut = [7, *(64 + byte for byte in STREAMS[1][:2000]), 11, 0, 0]  # the turn ended before the picture
    whole, broken = [*text, *picture, *text, 11], [*text, *picture, *cut]
    answer = processor.post_process(whole)
    assert answer.text == "A café: <image_placeholder>A café: "
    assert np.array_equal(pixels(answer.images[0]), pixels(image_processor.decode(STREAMS[0])))
    with pytest.raises(ValueError, match="allow_partial=True"):
        processor.post_process(broken)
    partial = processor.post_process(torch.tensor(broken), allow_partial=True)
    assert partial.text == "A café: <image_placeholder><image_placeholder>"
    assert [image.size for image in partial.images] == [(40, 24), (384, 182)]
    # In a batch, and of pictures without a header there is nothing to show.
    batch = processor.post_process([whole, [7, 8, 65]], allow_partial=True)
    assert [len(row.images) for row in batch] == [1, 1]
    assert batch[1] == ("<image_placeholder>\x01", [None])
    assert processor.decode([whole, [7]]) == ["A café: <image_placeholder>A café: <|eot_id|>", "<image_placeholder>"]
    assert processor.post_process_multimodal_output([whole], generation_mode="image")[0][0].size == (40, 24)
    assert processor.post_process_multimodal_output([whole]) == [answer.text]


def test_image_tokens_to_bytes():
    ids = [64 + byte for byte in STREAMS[0]]
    whole = processor.image_tokens_to_bytes(ids)
    assert (
        whole == processor.image_tokens_to_bytes(torch.tensor([7, *ids, 8])) == image_processor.add_tables(STREAMS[0])
    )
    assert np.array_equal(pixels(PIL.Image.open(io.BytesIO(whole))), pixels(image_processor.decode(STREAMS[0])))
    assert processor.image_tokens_to_bytes(ids, jpeg_quality=90) != whole
    with pytest.raises(ValueError, match="but 11 is among them"):
        processor.image_tokens_to_bytes([*ids, 11])


# Batches and chats


texts_with_images = st.lists(
    st.lists(st.one_of(st.sampled_from([0, 2]), st.text(max_size=5)), max_size=4), min_size=1, max_size=4
)


@given(texts_with_images, st.sampled_from(["left", "right"]), st.booleans(), st.booleans())
def test_a_batch_holds_what_each_text_gives_alone(parts, side, nested, add_special_tokens):
    texts = ["x" + "".join("<image_placeholder>" if isinstance(part, int) else part for part in row) for row in parts]
    images = [[IMAGES[part] for part in row if isinstance(part, int)] for row in parts]
    given_images = images if nested else [image for row in images for image in row]
    batch = processor(
        text=texts,
        images=given_images,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        add_special_tokens=add_special_tokens,
    )
    assert batch.input_ids.dtype == torch.int64
    for row, mask, text, alone in zip(batch.input_ids, batch.attention_mask, texts, images, strict=True):
        expected = [1] if add_special_tokens else []
        for number, piece in enumerate(text.split("<image_placeholder>")):
            if number:
                expected += [7, *(64 + byte for byte in image_processor.encode(alone[number - 1])), 8]
            expected += processor.tokenizer.encode(piece, add_special_tokens=False)
        assert row[mask.bool()].tolist() == expected
        padding = mask.sort(descending=side == "right").values
        assert torch.equal(mask, padding) and not row[~mask.bool()].any()


def test_placeholders_and_images_have_to_match():
    with pytest.raises(ValueError, match="2 <image_placeholder>, but there are 1 images"):
        processor(text="<image_placeholder><image_placeholder>", images=IMAGES[0])
    with pytest.raises(ValueError, match="text 0 has 1 <image_placeholder>, but 0 images"):
        processor(text="<image_placeholder>")
    with pytest.raises(ValueError, match="text 1 has 0 <image_placeholder>, but 1 images"):
        processor(text=["<image_placeholder>", ""], images=[[IMAGES[0]], [IMAGES[0]]])
    with pytest.raises(TypeError, match="by name"):
        processor("some text", [IMAGES[0]])
    with pytest.raises(TypeError, match="videos"):
        processor(text="", videos=[IMAGES])
    assert processor(text="only text").input_ids == [processor.tokenizer("only text")["input_ids"]]


def test_a_text_with_images_is_never_cut():
    with pytest.raises(ValueError, match="has 197 ids, more than max_length=100"):
        processor(text=GOLDEN.facts["texts"][0]["text"], images=IMAGES[0], truncation=True, max_length=100)
    batch = processor(
        text=["<image_placeholder>", "a" * 300], images=[[IMAGES[2]], []], truncation=True, max_length=100
    )
    assert [len(row) for row in batch.input_ids] == [80, 100]


def test_offsets_lead_back_to_the_text():
    text = "Ä<image_placeholder>b"
    batch = processor(
        text=[text, ""], images=[IMAGES[2]], padding=True, padding_side="left", return_offsets_mapping=True
    )
    spans = [text[start:end] for start, end in batch.offset_mapping[0]]
    assert spans == ["", "Ä", "Ä", *["<image_placeholder>"] * 79, "b"]
    assert [len(row) for row in batch.offset_mapping] == [len(row) for row in batch.input_ids]


def test_chats_with_images():
    text = processor.apply_chat_template(MESSAGES)
    expected = processor(text=text, images=IMAGES[2], add_special_tokens=False).input_ids
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    chat = processor.apply_chat_template(MESSAGES, **kwargs)
    assert chat["input_ids"] == expected == [processor.encode_chat(MESSAGES)]
    learned = [token for token, mask in zip(chat["input_ids"][0], chat["assistant_masks"][0], strict=True) if mask]
    assert processor.decode(learned) == "Déjà vu.<|eot_id|>"


def test_nothing_in_a_safe_chat_is_read_as_special_or_as_a_placeholder():
    hostile = "<image_placeholder><|eot_id|><t2v_token>"
    content = [{"type": "text", "text": hostile}, {"type": "image", "image": IMAGES[2]}]
    ids = processor.encode_chat([{"role": "user", "content": content}], add_generation_prompt=True)
    assert (ids.count(11), ids.count(7), ids.count(8)) == (2, 1, 1)
    assert processor.decode(ids).count("<image_placeholder>") == 2
    assert processor.post_process(ids).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="needs its image"):
        processor.encode_chat([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="encode_chat"):
        processor.apply_chat_template(MESSAGES, tokenize=True, processor_kwargs={"sanitize_control_tokens": True})


# Folders


def test_saved_settings_come_back(tmp_path):
    EvaByteProcessor(EvaByteImageProcessor(jpeg_quality=60), EvaByteTokenizer()).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is EvaByteProcessor
    assert loaded.image_processor.jpeg_quality == 60
    alone = AutoImageProcessor.from_pretrained(tmp_path, jpeg_quality=70)
    assert type(alone) is EvaByteImageProcessor and alone.jpeg_quality == 70
    assert loaded.apply_chat_template(MESSAGES) == processor.apply_chat_template(MESSAGES)


def test_the_published_preprocessor_config_loads(tmp_path):
    """The form of the published folder: its settings in preprocessor_config.json, its classes by auto_map."""
    EvaByteTokenizer().save_pretrained(tmp_path)
    auto_map = {
        "AutoImageProcessor": "image_processing_evabyte.EvaByteImageProcessor",
        "AutoProcessor": "processing_evabyte.EvaByteProcessor",
    }
    classes = {"image_processor_type": "EvaByteImageProcessor", "processor_class": "EvaByteProcessor"}
    published = {"auto_map": auto_map, **classes, **GOLDEN.facts["processor_defaults"]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    loaded = AutoProcessor.from_pretrained(tmp_path)
    case = GOLDEN.facts["texts"][0]
    assert type(loaded) is EvaByteProcessor
    assert loaded(text=case["text"], images=IMAGES[0]).input_ids == [GOLDEN[case["ids"]].tolist()]


LOAD = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, again = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
image = f"{folder}/image.png"
inputs = processor(text="<image_placeholder>?", images=image)
assert processor.post_process(inputs["input_ids"][0]).images[0].size == (40, 30)
assert len(image_processor(image).image_bytes) == 1
processor.save_pretrained(again)
AutoProcessor.from_pretrained(again, trust_remote_code=True)
print(json.dumps([type(processor).__module__.split(".")[0], type(image_processor).__module__.split(".")[0]]))
print(json.dumps(inputs["input_ids"]))
"""


@pytest.mark.slow
def test_self_contained_folder(tmp_path):
    folder = tmp_path / "processor"
    processor.save_pretrained(folder)
    noise(40, 30).save(folder / "image.png")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    origin, ids = map(json.loads, run.stdout.splitlines()[-2:])
    assert origin == ["transformers_modules"] * 2
    assert ids == processor(text="<image_placeholder>?", images=noise(40, 30)).input_ids
