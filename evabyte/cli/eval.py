"""`evabyte eval`: scores of a model on tasks of lm-evaluation-harness."""

import json
from argparse import Namespace

from .model import CommandError, load_causal_lm, told_in_one_line


def run(options: Namespace) -> int:
    """Print the scores as a Markdown table to standard output."""
    try:
        from ..evaluation import CARD, evaluate, find_tasks, score_table
    except ImportError as error:
        raise CommandError(f"needs lm-evaluation-harness: pip install 'evabyte[eval]' ({error})") from error
    tasks = [task for names in options.tasks for task in (CARD if names == "card" else names.split(","))]
    with told_in_one_line("cannot evaluate"):
        find_tasks(tasks, options.include_path)  # before a large model is loaded
        model, tokenizer = load_causal_lm(options.model, options.device, options.dtype, options.trust_remote_code)
        results = evaluate(
            model,
            tokenizer,
            tasks,
            options.include_path,
            options.batch_size,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            chat=options.chat,
            multibyte=False if options.byte_by_byte else None,
        )
    if options.json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version", "transformers_version")
        facts = {name: results[name] for name in kept if name in results}
        print(json.dumps({"model": options.model, "dtype": str(model.dtype).removeprefix("torch."), **facts}))
    else:
        print(score_table(results, tasks))
    return 0


__all__ = ["run"]
