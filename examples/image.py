"""Ask a model about a picture, or let it write one.

    python examples/image.py ask --model FOLDER photo.png "What is this?"
    python examples/image.py draw --model FOLDER "Draw a red circle." --output circle.jpg

The model is any EvaByte folder or Hub id that has learned pictures; the bundled one has not. A picture that the model
does not finish is saved as far as it goes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from evabyte import EvaByteForCausalLM, EvaByteImageProcessor, EvaByteProcessor


def load(folder: str) -> tuple[EvaByteForCausalLM, EvaByteProcessor]:
    """The model of a folder or Hub id, and its processor; with default settings where it has none for images."""
    model = EvaByteForCausalLM.from_pretrained(folder).eval()
    try:
        return model, EvaByteProcessor.from_pretrained(folder)
    except OSError:
        return model, EvaByteProcessor(EvaByteImageProcessor(), AutoTokenizer.from_pretrained(folder))


def answer(model: EvaByteForCausalLM, prompt: list[int], end: Sequence[int], **options: Any) -> list[int]:
    """The ids that the model writes after the ids of a prompt, up to and with the first of `end`."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.multi_byte_generate(ids, eos_token_id=list(end), pad_token_id=0, **options)
    return output[0, len(prompt) :].tolist()


def ask(
    model: EvaByteForCausalLM, processor: EvaByteProcessor, image: Any, question: str, max_new_tokens: int = 512
) -> str:
    """What the model says to a question about an image (a path, bytes, a PIL image or pixels)."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    prompt = processor.encode_chat([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = answer(model, prompt, [processor.tokenizer.eos_token_id], max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(ids, skip_special_tokens=True)


def draw(
    model: EvaByteForCausalLM,
    processor: EvaByteProcessor,
    request: str,
    max_new_tokens: int = 8192,
    temperature: float = 0.0,
) -> tuple[Any, bool]:
    """A picture (`PIL.Image.Image`) that the model writes, and whether it is whole.

    Raises:
        ValueError: what the model wrote does not even have the header of a picture.
    """
    prompt = processor.encode_chat([{"role": "user", "content": request}], add_generation_prompt=True)
    # The model has no choice but to begin a picture, and ends it, its turn or the text.
    prompt.append(processor.image_start_id)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    end = [processor.image_end_id, processor.tokenizer.eos_token_id]
    written = answer(model, prompt, end, max_new_tokens=max_new_tokens, **sampling)
    picture = [processor.image_start_id, *written]
    try:
        return processor.post_process(picture).images[0], True
    except ValueError as error:
        image = processor.post_process(picture, allow_partial=True).images[0]
        if image is None:
            raise ValueError(f"the model wrote {len(written)} ids that are no picture: {error}") from error
        return image, False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    asking = actions.add_parser("ask", help="ask about a picture")
    asking.add_argument("image", type=Path)
    asking.add_argument("question")
    asking.add_argument("--max-new-tokens", type=int, default=512)
    drawing = actions.add_parser("draw", help="let the model write a picture")
    drawing.add_argument("request")
    drawing.add_argument("--output", type=Path, default=Path("picture.jpg"))
    drawing.add_argument("--temperature", type=float, default=0.0)
    drawing.add_argument("--max-new-tokens", type=int, default=8192)
    for action in (asking, drawing):
        action.add_argument("--model", required=True, help="model folder or Hub id")
    options = parser.parse_args(arguments)

    model, processor = load(options.model)
    if options.action == "ask":
        print(ask(model, processor, options.image, options.question, options.max_new_tokens))
        return
    try:
        image, whole = draw(model, processor, options.request, options.max_new_tokens, options.temperature)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    image.save(options.output)
    print(f"{options.output}: {image.width} x {image.height}" + ("" if whole else ", not finished by the model"))


if __name__ == "__main__":
    main()
