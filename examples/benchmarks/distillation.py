"""What distillation costs beside plain next-byte training of the same student: bytes per second, peak memory, and the
share of a step spent outside the teacher's forward, the student's forward and the backward pass; in one run.

    python examples/benchmarks/distillation.py --recipe recipe.yaml --steps 8 --save distillation-cost-cpu

Each kind of training runs in processes of its own, since a process tells its peak memory only; they take turns.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import torch
from measure import finish, provenance, spread

from byte_llama.distillation import Recipe, make_trainer

PARTS = ("time_teacher", "time_student", "time_backward", "time_other")


def train(recipe: Recipe, kind: str, steps: int, skipped: int) -> dict[str, Any]:
    """Run `skipped` steps and `steps` more, by the recipe's losses or for "sft" alone; what the latter took."""
    with tempfile.TemporaryDirectory() as folder:
        training = {
            **recipe.training,
            **{"max_steps": skipped + steps, "logging_steps": 1, "disable_tqdm": True},
            **{"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False},
        }
        own = {"losses": ("sft",), "weights": {"sft": 1.0}} if kind == "sft" else {}
        fields = {**asdict(recipe), **own, "output": folder, "sample_prompts": (), "training": training}
        trainer = make_trainer(Recipe(**fields))
        if trainer.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(trainer.args.device)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "bytes_per_second" in entry][skipped:]
    return {
        "device": str(trainer.args.device),
        "bytes_per_second": [entry["bytes_per_second"] for entry in history],
        **{part: [entry.get(part, 0.0) for entry in history] for part in PARTS},
        "loaded_bytes": before,
        "peak_bytes": peak_memory(trainer.args.device),
    }


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a distillation recipe")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, in each process")
    parser.add_argument("--skipped", type=int, default=2, help="steps before them")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each kind")
    parser.add_argument("--save", help="name of the result file")
    parser.add_argument("--kind", choices=("sft", "distillation"), help="train so in this process, and print")
    options = parser.parse_args()
    recipe = Recipe.from_file(options.recipe)
    if options.kind is not None:
        print(json.dumps(train(recipe, options.kind, options.steps, options.skipped)), flush=True)
        return

    runs: dict[str, list[dict[str, Any]]] = {"sft": [], "distillation": []}
    for _ in range(options.repeats):
        for kind, found in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    kinds = {
        kind: {
            "bytes_per_second": spread([value for run in found for value in run["bytes_per_second"]]),
            "shares": {
                part: spread([value for run in found for value in run[part]])
                for part in PARTS
                if part != "time_teacher" or kind != "sft"
            },
            "peak_bytes": max(run["peak_bytes"] for run in found),
            "loaded_bytes": max(run["loaded_bytes"] for run in found),
        }
        for kind, found in runs.items()
    }
    device = torch.device(runs["sft"][0]["device"])
    times = kinds["sft"]["bytes_per_second"]["median"] / kinds["distillation"]["bytes_per_second"]["median"]
    result = {
        **provenance("distillation.py", sys.argv[1:], device),
        "recipe": asdict(recipe),
        **kinds,
        "times_as_slow_as_sft": round(times, 3),
        "peak_over_sft": round(kinds["distillation"]["peak_bytes"] / kinds["sft"]["peak_bytes"], 3),
    }
    finish(result, options.save)


if __name__ == "__main__":
    main()
