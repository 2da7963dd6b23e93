"""The rows that an engine decodes together: each stands at its own length, and comes and goes between steps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .byte_tree import DraftTrees
from .drafters import Drafter, default_nodes, resized
from .engine_request import RUNNING, Request
from .eva_cache import KeptPaths
from .multibyte_generation import GREEDY_DRAFT_TEMPERATURE
from .tree_verifier import Frontier, TreeVerifier


class Prefill:
    """A prompt that is being read, piece by piece, into a cache of its own."""

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request = model, request
        self.cache: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.read = 0
        self.logits: Tensor  # [1, 1, heads, vocab] behind what has been read

    @property
    def complete(self) -> bool:
        return self.read == len(self.request.text)

    def advance(self, most: int) -> int:
        """Read up to `most` ids more; -> how many."""
        piece = self.request.text[self.read : self.read + most]
        outputs = self.model(
            input_ids=torch.tensor([piece], device=self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_all_pred_logits=True,
        )
        self.cache, self.logits = outputs.past_key_values, outputs.logits[:, -1:].float()
        self.read += len(piece)
        return len(piece)


class RunningRows:
    """Requests whose prompts have been read.

    Args:
        drafter: drafts for all of them.
        nodes_per_step: None, or about how many drafted nodes a step verifies in all rows together.

    Attributes:
        requests: by row.
    """

    def __init__(self, model: Any, drafter: Drafter, nodes_per_step: int | None) -> None:
        self.model, self.drafter, self.nodes_per_step = model, drafter, nodes_per_step
        self.requests: list[Request] = []
        self.verifier: TreeVerifier
        self.logits: Tensor  # [B, 1, heads, vocab] at each row's last byte, over its drafting temperature

    def join(self, arrivals: list[Prefill]) -> None:
        """Let requests whose first byte has been emitted take part in the next step."""
        if not arrivals:
            return
        caches = [self.model._cache_for_trees(arrival.cache, None) for arrival in arrivals]
        logits = [arrival.logits / _draft_temperature(arrival.request) for arrival in arrivals]
        if self.requests:
            self.verifier.append_rows(caches)
            logits = [self.logits, *logits]
        else:
            self.verifier = self.model._tree_verifier(caches[0], self.drafter, arrivals[0].request.config)
            self.verifier.append_rows(caches[1:])  # if there are none, too: what only going back needs is let go
        self.logits = torch.cat(logits)
        for arrival in arrivals:
            arrival.request.status = RUNNING
            self.requests.append(arrival.request)

    def step(self) -> None:
        """Draft a tree for every row, verify all in one forward, and emit the bytes of the paths taken."""
        rows = len(self.requests)
        nodes = default_nodes(self.model.device, rows)
        if self.nodes_per_step is not None:
            nodes = max(1, self.nodes_per_step // rows)
        self.verifier.drafter = resized(self.drafter, nodes)
        texts, numbers = [each.text for each in self.requests], [each.number for each in self.requests]
        trees, logits = self.verifier.step(Frontier(self.logits, [0] * rows, texts, numbers, 1.0))
        paths = self._walk(trees, logits[:, :, 0])
        self.verifier.commit(KeptPaths(paths))
        last = torch.tensor([path[-1] if path else 0 for path in paths], device=logits.device)
        temperatures = torch.tensor([_draft_temperature(each) for each in self.requests], device=logits.device)
        here = logits[torch.arange(rows, device=logits.device), last]
        self.logits = (here / temperatures[:, None, None])[:, None]

    def _walk(self, trees: DraftTrees, logits: Tensor) -> list[list[int]]:
        """Emit bytes in every row; logits float32 [B, T, vocab] -> per row the nodes of its path, root first."""
        chosen = self._choose(trees, logits)
        batch, nodes = trees.ids.shape
        table = torch.cat((trees.ids, trees.parents.expand(batch, -1), chosen), dim=1).tolist()
        paths = []
        for row, (request, values) in enumerate(zip(self.requests, table, strict=True)):
            ids, parents, picks = values[:nodes], values[nodes : 2 * nodes], values[2 * nodes :]
            if request.sampler is None:
                paths.append(request.walk_byte_by_byte(ids, parents, logits[row]))
            else:
                paths.append(request.walk(ids, parents, picks.__getitem__))
        return paths

    def _choose(self, trees: DraftTrees, logits: Tensor) -> Tensor:
        """int64 [B, T], the byte to take at each node; rows whose processors look at the text are left at 0."""
        chosen = torch.zeros_like(trees.ids)
        alike: dict[Any, list[int]] = defaultdict(list)
        for row, request in enumerate(self.requests):
            if request.sampler is not None:
                alike[request.sampler].append(row)
        for rows in alike.values():
            # Most often all rows are alike, and then nothing is copied.
            places = slice(None) if len(rows) == len(self.requests) else rows
            first = self.requests[rows[0]]
            scores = first.process_nodes(logits[places])
            if first.config.do_sample:
                noise = torch.stack([self.requests[row].noise(trees.max_depth + 1) for row in rows])
                depth = trees.mask.sum(-1).sub(1).clamp(min=0).expand(trees.ids.shape)[places]
                scores = scores.softmax(-1) / noise[torch.arange(len(rows), device=noise.device)[:, None], depth]
            chosen[places] = scores.argmax(-1)
        return chosen

    def drop_ended(self) -> None:
        """Let the rows that have ended leave."""
        staying = [row for row, request in enumerate(self.requests) if not request.ended]
        if len(staying) == len(self.requests):
            return
        forget = getattr(self.drafter, "forget", None)
        for request in self.requests:
            if request.ended and forget is not None:
                forget(request.number)
        self.requests = [self.requests[row] for row in staying]
        if staying:
            self.verifier.select_rows(staying)
            self.logits = self.logits[staying]
        else:
            del self.verifier, self.logits  # the cache's memory


def _draft_temperature(request: Request) -> float:
    return float(request.config.temperature or 1.0) if request.config.do_sample else GREEDY_DRAFT_TEMPERATURE
