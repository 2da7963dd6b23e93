"""Reading the goldens: reference inputs, weights and outputs (see tests/goldens/evabyte/README.md)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from evabyte import EvaByteConfig, EvaByteForCausalLM

GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Golden:
    """One case: `facts` is its json, `tensors` its tensors by full name ("in.x", "out.y", "weights.z")."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def model(self, **overrides: Any) -> EvaByteForCausalLM:
        """The reference's model, with the golden's weights, in eval mode; `overrides` change its config or backend."""
        attn_implementation = overrides.pop("attn_implementation", "sdpa")
        config = EvaByteConfig(**{**self.facts["config"], **overrides})
        config._attn_implementation = attn_implementation
        weights = {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}
        model = EvaByteForCausalLM(config).to(next(iter(weights.values())).dtype)
        model.load_state_dict(weights, strict=True)
        return model.eval()


@cache
def load_golden(case: str, folder: str = "evabyte") -> Golden:
    facts = json.loads((GOLDENS / folder / f"{case}.json").read_text())
    return Golden(facts, load_file(GOLDENS / folder / f"{case}.safetensors"))


def assert_close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=rtol)
