"""`byte-llama distill`: train a converted model by a recipe file."""

import argparse
from pathlib import Path
from typing import Any

from evabyte.cli.model import CommandError


def run(options: argparse.Namespace) -> int:
    """Train; one line tells where the result is."""
    import yaml

    from ..distillation import Recipe, distill

    overrides: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for assignment in options.overrides:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise CommandError(f"--set takes NAME=VALUE, got {assignment!r}.")
        part, _, of_training = name.partition("training.")
        (training if not part and of_training else overrides)[of_training or name] = yaml.safe_load(value)
    try:
        recipe = Recipe.from_file(options.config, **overrides)
        if training:
            recipe = Recipe.from_file(options.config, **overrides, training={**recipe.training, **training})
        distill(recipe, resume=options.resume)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    print(f"The trained model is in {Path(recipe.output) / 'final'}.")
    return 0
