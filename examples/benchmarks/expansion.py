"""Subword expansion: the table lookup beside a plain Python scan, and its share of a decoding step.

    python examples/benchmarks/expansion.py --tokenizer FOLDER --threads 1 --save expansion-cpu

FOLDER holds the tokenizer of the subword model (Llama-3's, say); its vocabulary makes the table. First comes a check:
the lookup must give what the scan gives at every position of the texts, whole and byte by byte behind a history, or no
speed is measured. Then alternatives run in turn, each `--block` times in a row, since single calls in turn would empty
the processor's caches for each other:

- prompt: all positions of a prompt at once, beside the scan, which tries the suffixes at each position, longest first,
  in a dictionary of tuples.
- step: one new byte behind a context of that length, everything that expansion adds to a model's step included: reading
  the history, the lookup, the subword's embedding and its addition, and writing the history. Beside it the scan of the
  whole context, as a model does it that keeps no history, and the scan of the last position alone.
- share: that step's part of a whole decoding step of a decoder of Llama-3.2-3B's shape. Decoders with `--layers` and
  with twice as many are timed; the difference gives the time of a layer, and from it that of 28 (`--total-layers`).

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import HELDOUT, between, finish, interleave, provenance, speedup, spread
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from byte_llama.byte_history import ByteHistory
from byte_llama.subword_expansion import SubwordExpansion
from byte_llama.subword_table import SubwordEntries, build_table, entries_from_tokens
from byte_llama.token_bytes import token_bytes

Paths = Mapping[tuple[int, ...], int]


def scan(ids: Sequence[int], subword_of: Paths, maxlen: int, last: int | None = None) -> list[int]:
    """Subword ids of the last positions (default: of all), by trying the suffixes there one by one, longest first."""
    found = []
    for end in range(1 if last is None else len(ids) + 1 - last, len(ids) + 1):
        subword = 0
        for length in range(min(maxlen, end), 0, -1):
            match = subword_of.get(tuple(ids[end - length : end]))
            if match is not None:
                subword = match
                break
        found.append(subword)
    return found


def as_paths(entries: SubwordEntries) -> Paths:
    """Entries as a dictionary, keys in the order of the text."""
    rows = zip(entries.symbols.tolist(), entries.subwords.tolist(), strict=True)
    return {tuple(symbol - 1 for symbol in reversed(symbols) if symbol): subword for symbols, subword in rows}


def in_blocks(run: Callable[[], Any], block: int) -> Callable[[int], None]:
    """What `interleave` times: so many runs in a row."""

    def run_block(repeat: int) -> None:
        for _ in range(block):
            run()

    return run_block


def time_in_turn(
    alternatives: Mapping[str, Callable[[], Any]], repeats: int, block: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one run of each alternative, round by round."""
    blocks = {name: in_blocks(run, block) for name, run in alternatives.items()}
    for run_block in blocks.values():
        run_block(0)  # warm-up
    return {name: [each / block for each in times] for name, times in interleave(blocks, repeats, device).items()}


class Step:
    """One new byte behind a context: what expansion adds to a model's decoding step."""

    def __init__(
        self, expansion: SubwordExpansion, rows: int, hidden_size: int, dtype: torch.dtype, context: Tensor
    ) -> None:
        device = context.device
        self.expansion = expansion
        self.embedding = nn.Embedding.from_pretrained(torch.zeros(rows, hidden_size, device=device, dtype=dtype))
        self.byte_embedding = torch.zeros(1, 1, hidden_size, device=device, dtype=dtype)
        self.history = ByteHistory([], expansion.maxlen)
        self.history.append(expansion.as_symbols(context[:, :-1]))
        self.new, self.position = context[:, -1:], torch.tensor([[context.shape[1] - 1]], device=device)

    @torch.no_grad()
    def run(self) -> Tensor:
        symbols = self.expansion.as_symbols(self.new, self.position)
        embedding = self.byte_embedding + self.embedding(self.expansion(symbols, self.history.tail()))
        self.history.append(symbols)
        self.history.crop(-1)  # ready to be run again
        return embedding


def check(expansion: SubwordExpansion, subword_of: Paths, texts: Mapping[str, bytes], device: torch.device) -> None:
    """The check that comes before every timing.

    Raises:
        SystemExit: when the lookup differs from the scan anywhere in the texts.
    """
    for name, text in texts.items():
        symbols = expansion.as_symbols(torch.tensor([list(text)], device=device))
        history = ByteHistory([], expansion.maxlen)
        one_by_one = []
        for symbol in symbols.split(1, dim=1):
            one_by_one.append(expansion(symbol, history.tail()))
            history.append(symbol)
        expected = scan(text, subword_of, expansion.maxlen)
        for how, subwords in (("at once", expansion(symbols)), ("byte by byte", torch.cat(one_by_one, dim=1))):
            found = subwords[0].tolist()
            if found != expected:
                place = next(at for at, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
                raise SystemExit(
                    f"No speed is measured: {how}, position {place} of {name} is subword {found[place]}, but the scan "
                    f"finds {expected[place]}."
                )


def measure_prompt(
    expansion: SubwordExpansion, subword_of: Paths, ids: Tensor, repeats: int, block: int
) -> dict[str, Any]:
    """Milliseconds for all positions of a prompt, int64 [1, N]."""
    alternatives = {
        "scan": lambda: scan(ids[0].tolist(), subword_of, expansion.maxlen),
        "lookup": lambda: expansion(expansion.as_symbols(ids)),
    }
    seconds = time_in_turn(alternatives, repeats, block, ids.device)
    return {
        "bytes": ids.shape[1],
        "milliseconds": {name: spread([1e3 * each for each in times]) for name, times in seconds.items()},
        "speedup": speedup(seconds["scan"], seconds["lookup"]),
    }


def measure_step(step: Step, subword_of: Paths, ids: Tensor, repeats: int, block: int) -> dict[str, Any]:
    """Milliseconds for one byte behind the others, int64 [1, N]."""
    maxlen = step.expansion.maxlen
    alternatives = {
        "scan of the context": lambda: scan(ids[0].tolist(), subword_of, maxlen),
        "scan of the last position": lambda: scan(ids[0, -maxlen:].tolist(), subword_of, maxlen, last=1),
        "lookup": step.run,
    }
    seconds = time_in_turn(alternatives, repeats, block, ids.device)
    return {
        "context": ids.shape[1],
        "milliseconds": {name: spread([1e3 * each for each in times]) for name, times in seconds.items()},
        "speedup_over": {name: speedup(seconds[name], seconds["lookup"]) for name in alternatives if name != "lookup"},
    }


class Decoder:
    """A decoder of Llama-3.2-3B's shape but for its depth, one byte behind a context; its weights are all alike."""

    def __init__(self, layers: int, width: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        config = LlamaConfig(
            vocab_size=265,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=width // 24,
            max_position_embeddings=131072,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(dtype)
        self.model = model.to_empty(device=device).eval()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data.fill_(0.01)
        self.new = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.cache = DynamicCache(config=config)
        states = torch.full((1, 8, context, config.head_dim), 0.01, dtype=dtype, device=device)
        for layer in range(layers):
            self.cache.update(states, states, layer)

    @torch.no_grad()
    def run(self) -> None:
        self.model(self.new, past_key_values=self.cache)
        self.cache.crop(-1)


def measure_share(
    step: Step, shallow: Decoder, deep: Decoder, layers: int, total_layers: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """The expansion's part of a decoding step with `total_layers`, made up from two depths.

    One run of each in turn: within a step, too, the expansion finds the caches full of weights.
    """
    seconds = time_in_turn({"expansion": step.run, "shallow": shallow.run, "deep": deep.run}, repeats, 1, device)
    layer = [(deep - shallow) / layers for shallow, deep in zip(seconds["shallow"], seconds["deep"], strict=True)]
    whole = [one + (total_layers - layers) * each for one, each in zip(seconds["shallow"], layer, strict=True)]
    expansion = seconds["expansion"]
    return {
        "layers_measured": [layers, 2 * layers],
        "layers": total_layers,
        "layer_milliseconds": spread([1e3 * each for each in layer]),
        "step_milliseconds": spread([1e3 * each for each in whole]),
        "expansion_milliseconds": spread([1e3 * each for each in expansion]),
        "share": spread([part / (part + rest) for part, rest in zip(expansion, whole, strict=True)]),
    }


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the subword tokenizer")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the decoder")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--bytes", type=int, default=2048, help="length of the prompt and of the context")
    parser.add_argument("--width", type=int, default=3072, help="hidden size of the decoder, a multiple of 48")
    parser.add_argument("--layers", type=int, default=2, help="layers of the smaller decoder that is timed")
    parser.add_argument("--total-layers", type=int, default=28, help="layers of the step that is made up from them")
    parser.add_argument("--repeats", type=int, default=50, help="rounds of each part")
    parser.add_argument("--block", type=int, default=8, help="runs in a row, for prompt and step")
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.width % 48:
        parser.error(f"--width must be a multiple of 48, 24 heads of an even size; got {options.width}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # A result names the model, not where it lay on some machine.
    shown = ["FOLDER" if word == str(options.tokenizer) else word for word in arguments]
    result: dict[str, Any] = {
        "benchmark": "expansion",
        "provenance": provenance("expansion.py", shown, options.device),
        "settings": {**vars(options), "tokenizer": options.tokenizer.name},
    }
    tokens = token_bytes(AutoTokenizer.from_pretrained(options.tokenizer))
    entries = entries_from_tokens(tokens, {})
    expansion = SubwordExpansion.from_table(build_table(entries)).to(options.device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in expansion.buffers())
    result["vocabulary"] = {"subwords": len(tokens), "entries": len(entries.subwords), "table_bytes": size}
    subword_of = as_paths(entries)
    texts = {path.name: path.read_bytes()[: options.bytes] for path in sorted(HELDOUT.glob("*.txt"))}
    check(expansion, subword_of, texts, options.device)
    result["equal_to_the_scan"] = True
    print(f"Checked: the lookup finds what the scan finds ({', '.join(texts)}).", flush=True)

    ids = {name: torch.tensor([list(text)], device=options.device) for name, text in texts.items()}
    rounds = options.repeats, options.block
    result["prompt"] = {name: measure_prompt(expansion, subword_of, each, *rounds) for name, each in ids.items()}
    for name, row in result["prompt"].items():
        median = {how: each["median"] for how, each in row["milliseconds"].items()}
        print(
            f"prompt  {row['bytes']} bytes of {name}: scan {median['scan']:.2f} ms, lookup {median['lookup']:.3f} ms; "
            f"speed-up {between(row['speedup'])}"
        )
    dtype = getattr(torch, options.dtype)
    context = next(iter(ids.values()))
    step = Step(expansion, len(tokens), options.width, dtype, context)
    result["step"] = measure_step(step, subword_of, context, *rounds)
    print(
        f"step    behind {context.shape[1]} bytes: lookup {result['step']['milliseconds']['lookup']['median']:.3f} ms"
    )
    for name, each in result["step"]["speedup_over"].items():
        print(f"        {name} {result['step']['milliseconds'][name]['median']:.3f} ms; speed-up {between(each)}")

    decoder = partial(Decoder, width=options.width, context=options.bytes, dtype=dtype, device=options.device)
    decoders = decoder(options.layers), decoder(2 * options.layers)
    result["share"] = measure_share(
        step, *decoders, options.layers, options.total_layers, options.repeats, options.device
    )
    share = result["share"]
    print(
        f"share   {share['share']['median']:.3%} ({share['share']['min']:.3%} to {share['share']['max']:.3%}) of a "
        f"step of {share['layers']} layers, {share['step_milliseconds']['median']:.1f} ms",
        flush=True,
    )
    finish(result, options.save)


if __name__ == "__main__":
    main()
