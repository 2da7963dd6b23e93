"""Draw how far drafts are accepted: by depth, by temperature and by size of the tree.

    python examples/plot_acceptance.py --text examples/benchmarks/heldout/prose.txt --output acceptance.png

Prompts are cut from the text and continued by multibyte decoding with dynamic trees; the traces of these runs say how
many bytes every forward brought. The left panel gives, for each temperature, the share of forwards that accepted at
least d drafted bytes; the right one the mean number of bytes per forward by number of drafted nodes.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint


def accepted_per_forward(
    model: EvaByteForCausalLM, prompts: torch.Tensor, nodes: int, temperature: float, new_bytes: int
) -> torch.Tensor:
    """int64 [forwards], drafted bytes that each forward accepted, over all prompts [B, n]."""
    torch.manual_seed(0)
    output = model.multi_byte_generate(
        prompts,
        draft="dynamic",
        draft_nodes=nodes,
        temperature=temperature,
        do_sample=temperature > 0,
        max_new_tokens=new_bytes,
        eos_token_id=None,
        return_dict_in_generate=True,
        return_trace=True,
    )
    return torch.tensor([len(step.sources) for row in output.trace for step in row[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the bundled model)")
    parser.add_argument("--text", type=Path, required=True, help="text file to cut prompts from")
    parser.add_argument("--output", type=Path, default=Path("acceptance.png"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    options = parser.parse_args()

    model = EvaByteForCausalLM.from_pretrained(options.model or bundled_checkpoint(), dtype=torch.float32).eval()
    text = options.text.read_bytes()
    if len(text) < options.prompts * options.prompt_bytes:
        parser.error(
            f"--text: {options.text} is shorter than {options.prompts} prompts of {options.prompt_bytes} bytes"
        )
    distance = len(text) // options.prompts
    begins = [number * distance for number in range(options.prompts)]
    prompts = torch.tensor([EvaByteTokenizer().encode_bytes(text[b : b + options.prompt_bytes]) for b in begins])

    accepted = {
        (temperature, nodes): accepted_per_forward(model, prompts, nodes, temperature, options.new_bytes)
        for temperature in options.temperature
        for nodes in options.nodes
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_depth, by_nodes = figure.subplots(1, 2)
    depths = range(1, model.config.num_pred_heads)
    for temperature in options.temperature:
        counts = accepted[temperature, max(options.nodes)]
        label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        by_depth.plot(depths, [(counts >= d).float().mean() for d in depths], marker="o", label=label)
        means = [1 + accepted[temperature, nodes].float().mean() for nodes in options.nodes]
        by_nodes.plot(options.nodes, means, marker="o", label=label)
    by_depth.set(
        xlabel="drafted bytes accepted, at least",
        ylabel=f"share of forwards ({max(options.nodes)} nodes)",
        ylim=(0, 1),
        xticks=list(depths),
    )
    by_nodes.set(xlabel="drafted nodes", ylabel="bytes per forward", xscale="log", xticks=options.nodes)
    by_nodes.set_xticks(options.nodes, labels=list(map(str, options.nodes)))
    by_nodes.minorticks_off()
    by_nodes.set_ylim(bottom=1)
    for axes in (by_depth, by_nodes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Multibyte decoding on {options.text.name}")
    figure.savefig(options.output, dpi=130)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
