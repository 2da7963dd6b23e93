"""Multibyte decoding: draft trees of bytes, verify them in one forward, commit the path the model itself takes.

At each node of a tree the next byte is taken from the processed distribution there exactly as `generate` takes it, by
argmax or by one multinomial draw. If a child carries that byte the walk steps to it; if none does, the byte is emitted
and the walk ends. What is emitted never depends on what was drafted, so decoding is lossless for every sampler: greedy
output equals `generate`'s, sampled output has its distribution, and at batch size 1 the same seed draws the same bytes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .byte_tree import ROOT, DraftTrees, walk_tree
from .drafters import Drafter, choose_drafter, make_drafter, tree_bounds
from .eva_cache import KeptPaths
from .eva_static_cache import reserve_nodes
from .multibyte_output import MultibyteGenerateOutput, Step, by_step
from .next_byte import PREFIX_FREE, GrowingRows, NextByte, NodeDraws, TypicalAcceptance
from .prepared_call import PreparedCall, prepared_call
from .tree_verifier import Frontier, TreeVerifier

# The most probable byte is taken more often than its probability says, so drafts may bet on it. Chosen between 0.5 and
# 0.7, which brought more bytes per forward than 1.0 at 8, 16 and 64 nodes with the bundled model on the texts of
# examples/benchmarks/heldout.
GREEDY_DRAFT_TEMPERATURE = 0.6
TREE_CACHES = (None, "dynamic", "dynamic_full", "offloaded", "static")  # of `cache_implementation`
SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
OWN_ARGUMENTS = ("draft", "draft_nodes", "medusa_choices", "typical", "return_acc_lengths", "return_trace")


def multibyte_decoding(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    tokenizer: Any = None,
    draft: str | Drafter | None = None,
    draft_nodes: int | None = None,
    medusa_choices: Sequence[Sequence[int]] | None = None,
    typical: TypicalAcceptance | None = None,
    return_acc_lengths: bool = False,
    return_trace: bool = False,
    **model_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor] | MultibyteGenerateOutput:
    """The decoding method behind `multi_byte_generate`, for `generate(custom_generate=multibyte_decoding)`.

    Called by `generate`, which prepares its arguments; `multi_byte_generate` documents the others.
    """
    if not model_kwargs.get("use_cache", True):
        raise ValueError("Multibyte decoding verifies drafts against a cache: leave `use_cache` at True.")
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError("`streamer` takes one sequence; rows of a batch advance at different speed.")
    next_byte = NextByte(logits_processor, bool(generation_config.do_sample))
    if typical is not None and not next_byte.prefix_free:
        others = ", ".join(type(p).__name__ for p in logits_processor if type(p) not in PREFIX_FREE)
        raise ValueError(
            "`sampling='typical'` judges all drafted bytes at once, which processors that look at the text so far do "
            f"not allow: leave out {others}."
        )
    drafter = choose_drafter(model, input_ids.shape[0], draft, draft_nodes, medusa_choices)
    users_cache = getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False)
    cache_leaves = users_cache or bool(generation_config.return_dict_in_generate)
    run = _Run(
        model, GrowingRows(input_ids, stopping_criteria), next_byte, generation_config, drafter, typical, streamer
    )
    run.cache_leaves = cache_leaves
    run.trace = [[] for _ in input_ids] if return_trace else None
    model_kwargs["past_key_values"] = model._reserve_for_trees(model_kwargs.get("past_key_values"), drafter)
    run.prefill(input_ids, model_kwargs)
    while model._has_unfinished_sequences(not run.rows.active, synced_gpus, device=input_ids.device):
        run.step()
        if not cache_leaves and not synced_gpus:
            run.drop_finished_rows()
    return run.result(return_acc_lengths)


class _Run:
    """One call of `multibyte_decoding`."""

    def __init__(
        self,
        model: Any,
        rows: GrowingRows,
        next_byte: NextByte,
        generation_config: GenerationConfig,
        drafter: Drafter,
        typical: TypicalAcceptance | None,
        streamer: BaseStreamer | None,
    ) -> None:
        self.model = model
        self.generation_config = generation_config
        self.drafter = drafter
        self.typical = typical
        self.streamer = streamer
        self.rows = rows
        self.next_byte = next_byte
        self.in_batch = list(range(len(rows.texts)))  # numbers of the rows that the model still carries
        self.cache_leaves = True  # the caller has it or gets it
        self.trace: list[list[Step]] | None = None
        self.logits: Tensor  # [B, T, heads, vocab] at the nodes of the last trees
        self.last_nodes: list[int]  # per row in the batch, where the last walk ended
        self.steps_of_row: list[list[int]] = []  # per forward, bytes per row
        self.scores: list[list[Tensor]] | None = None
        self.raw_logits: list[list[Tensor]] | None = None
        if generation_config.return_dict_in_generate and generation_config.output_scores:
            self.scores = [[] for _ in self.in_batch]
        if generation_config.return_dict_in_generate and generation_config.output_logits:
            self.raw_logits = [[] for _ in self.in_batch]

    # -- the loop's steps ----------------------------------------------------------------------------------------------

    def prefill(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Read the prompts and emit one byte: the prompt's last byte is the root of a tree without other nodes."""
        outputs = self.model._prefill(
            input_ids, self.generation_config, {**model_kwargs, "return_all_pred_logits": True}
        )
        cache = self.model._cache_for_trees(outputs.past_key_values, model_kwargs.get("attention_mask"))
        self.verifier: TreeVerifier = self.model._tree_verifier(cache, self.drafter, self.generation_config)
        device = outputs.logits.device
        lone_roots = DraftTrees(
            torch.zeros(len(self.in_batch), 1, dtype=torch.int64, device=device),
            torch.full((1, 1), ROOT, device=device),
            0,
        )
        self._walk(lone_roots, outputs.logits[:, -1:].to(torch.float32, copy=True))

    def step(self) -> None:
        """Draft, verify, commit."""
        trees, logits = self.verifier.step(self._frontier())
        self.verifier.commit(KeptPaths(self._walk(trees, logits)))

    def _frontier(self) -> Frontier:
        temperature = GREEDY_DRAFT_TEMPERATURE
        if self.next_byte.do_sample:
            temperature = float(self.generation_config.temperature or 1.0)
        texts = [self.rows.texts[row] for row in self.in_batch]
        return Frontier(self.logits, self.last_nodes, texts, self.in_batch, temperature)

    def drop_finished_rows(self) -> None:
        """Let rows that have ended leave the batch, once they are a quarter of it: each goes on costing a forward."""
        staying = [place for place, row in enumerate(self.in_batch) if not self.rows.finished[row]]
        if not self.verifier.rows_may_leave or not staying or 4 * len(staying) > 3 * len(self.in_batch):
            return
        self.verifier.select_rows(staying)
        self.logits = self.logits[staying]
        self.last_nodes = [self.last_nodes[place] for place in staying]
        self.in_batch = [self.in_batch[place] for place in staying]

    # -- the walk ------------------------------------------------------------------------------------------------------

    def _walk(self, trees: DraftTrees, logits: Tensor) -> list[list[int]]:
        """Emit bytes along the path the model takes through each row's tree.

        Args:
            logits: float32 [B, T, heads, vocab] at the nodes.

        Returns:
            per row in the batch the nodes at which a byte was emitted, root first; empty for a row that had ended.
        """
        if self.next_byte.prefix_free and self.scores is None and self.raw_logits is None:
            paths = self._walk_at_once(trees, logits[:, :, 0])
        else:
            paths = self._walk_byte_by_byte(trees, logits[:, :, 0])
        self.logits, self.last_nodes = logits, [path[-1] if path else 0 for path in paths]
        self._note(trees, paths)
        return paths

    def _walk_at_once(self, trees: DraftTrees, logits: Tensor) -> list[list[int]]:
        """Take the next byte at all nodes in one go, then walk on the host: one synchronisation a step."""
        batch, nodes = trees.ids.shape
        scores = self.next_byte.process_nodes(logits)
        accepted = None
        if self.typical is not None:
            probs = scores.softmax(-1)
            accepted = self.typical.accepts(probs, trees.ids, trees.parents).tolist()
        draws = None
        if self.next_byte.do_sample:
            draws = NodeDraws(scores, trees)
            chosen = draws.chosen
        else:
            chosen = scores.argmax(-1)
        on_host = torch.cat((trees.ids, trees.parents.expand(batch, -1), chosen), dim=1).tolist()
        paths: list[list[int]] = []
        for place, row in enumerate(self.in_batch):
            values, path = on_host[place], []
            if not self.rows.finished[row]:
                ids, parents, picks = values[:nodes], values[nodes : 2 * nodes], values[2 * nodes :]
                path = self._walk_row(row, ids, parents, picks, accepted[place] if accepted else None)
            paths.append(path)
        if draws is not None and batch == 1:
            draws.rewind(len(paths[0]))
        return paths

    def _walk_row(
        self, row: int, ids: list[int], parents: list[int], picks: list[int], accepted: list[float] | None
    ) -> list[int]:
        def pick(node: int) -> int:
            if accepted is not None:  # lossy: the most probable accepted child, if there is one
                mine = (n for n, parent in enumerate(parents) if parent == node)
                best = max(mine, key=accepted.__getitem__, default=0)
                return ids[best] if best and accepted[best] > 0 else picks[node]
            return picks[node]

        return walk_tree(ids, parents, pick, partial(self.rows.append, row))

    def _walk_byte_by_byte(self, trees: DraftTrees, logits: Tensor) -> list[list[int]]:
        """Process the scores of one node of every row after the other, since processors look at the text so far."""
        ids = trees.ids.tolist()
        parents = trees.parents.expand_as(trees.ids).tolist()
        children = [
            {(parent, byte): node for node, (parent, byte) in enumerate(zip(*row, strict=True))}
            for row in zip(parents, ids, strict=True)
        ]
        paths: list[list[int]] = [[] for _ in self.in_batch]
        at = {place: 0 for place, row in enumerate(self.in_batch) if not self.rows.finished[row]}
        while at:
            places, numbers = list(at), [self.in_batch[place] for place in at]
            here = logits[places, list(at.values())]
            scores = self.next_byte.process_rows(here, self.rows, numbers)
            chosen = self.next_byte.choose(scores).tolist()
            onward = {}
            for n, (place, row, byte) in enumerate(zip(places, numbers, chosen, strict=True)):
                if self.scores is not None:
                    self.scores[row].append(scores[n])
                if self.raw_logits is not None:
                    self.raw_logits[row].append(here[n])
                paths[place].append(at[place])
                self.rows.append(row, byte)
                child = children[place].get((at[place], byte))
                if child is not None and not self.rows.finished[row]:
                    onward[place] = child
            at = onward
        return paths

    # -- what comes out ------------------------------------------------------------------------------------------------

    def _note(self, trees: DraftTrees, paths: list[list[int]]) -> None:
        """Write down what the forward brought, and stream it."""
        counts = [0] * len(self.rows.texts)
        for row, path in zip(self.in_batch, paths, strict=True):
            counts[row] = len(path)
        self.steps_of_row.append(counts)
        if self.trace is not None:
            self._trace_step(self.trace, trees, paths)
        if self.streamer is not None and counts[0]:
            self.streamer.put(torch.tensor(self.rows.texts[0][len(self.rows.texts[0]) - counts[0] :]))

    def _trace_step(self, trace: list[list[Step]], trees: DraftTrees, paths: list[list[int]]) -> None:
        sources = None if trees.sources is None else trees.sources.expand_as(trees.ids).tolist()
        drafted = (trees.parents >= 0).sum(-1).expand(len(paths)).tolist()
        for place, (row, path) in enumerate(zip(self.in_batch, paths, strict=True)):
            if path:
                by_whom = [sources[place][node] if sources else 0 for node in path[1:]]
                trace[row].append(Step(self.rows.texts[row][-len(path) :], by_whom, drafted[place]))

    def result(self, return_acc_lengths: bool) -> Tensor | tuple[Tensor, Tensor] | MultibyteGenerateOutput:
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.rows.padded(self.generation_config._pad_token_tensor)
        cache = self.verifier.finish() if self.cache_leaves else None
        lengths = torch.tensor(self.steps_of_row).T
        if self.generation_config.return_dict_in_generate:
            return MultibyteGenerateOutput(
                sequences=sequences,
                scores=by_step(self.scores),
                logits=by_step(self.raw_logits),
                past_key_values=cache,
                acc_lengths=lengths,
                trace=self.trace,
            )
        return (sequences, lengths) if return_acc_lengths else sequences


def generated_mask(inputs: Tensor | None, config: GenerationConfig, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that `generate` goes by: the caller's, or what the padding id says of the ids."""
    ids = kwargs.get("input_ids") if inputs is None else inputs
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is not None or ids is None or config.pad_token_id is None:
        return mask
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return None if config.pad_token_id in ends else (ids != config.pad_token_id).long()


class MultibyteGenerationMixin:
    """Gives a model with prediction heads `multi_byte_generate`; comes before transformers' classes among the bases."""

    def multi_byte_generate(
        self,
        inputs: Tensor | None = None,
        draft: str | Drafter | None = None,
        draft_nodes: int | None = None,
        medusa_choices: Sequence[Sequence[int]] | None = None,
        sampling: str | None = None,
        posterior_threshold: float = 0.09,
        posterior_alpha: float = 0.3,
        fast: bool | None = None,
        return_acc_lengths: bool = False,
        return_trace: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor] | MultibyteGenerateOutput:
        """`generate` by multibyte decoding: the same arguments, the same bytes, fewer forwards.

        Args:
            inputs: int64 [B, N], or `input_ids` / `inputs_embeds` by name; rows may be padded on the left, with an
                `attention_mask`.
            draft: "dynamic" (the default: the most probable nodes by the heads' probabilities), "chain" (the best byte
                of each head), "tree31" or "tree95" (the published trees), "lookup" (what followed the same bytes
                earlier in the text), a tree and lookup together as in "dynamic+lookup", or a drafter of one's own.
            draft_nodes: size of the dynamic tree; by default it goes by device and batch size.
            medusa_choices: a tree of one's own: a list of paths, each the rank chosen at every depth, such as (0, 1).
            sampling: None for what the generation config says; "nucleus" to sample from the `top_p` (0.8) nucleus;
                "typical" for Medusa's typical acceptance, with `posterior_threshold` and `posterior_alpha`, which is
                lossy: its output does not have the model's distribution.
            temperature: as in `generate`; 0 means greedy.
            fast: taken and ignored, for callers of the published code.
            return_acc_lengths: return `(ids, lengths)`; `lengths`, int64 [B, forwards], counts the bytes that each
                forward brought, the prefill's single byte first.
            return_trace: with `return_dict_in_generate`, also what was drafted and accepted at every forward.
            **kwargs: everything `generate` takes for greedy decoding and sampling.

        Returns:
            int64 [B, L], prompt and new bytes, or as the arguments above say.

        Raises:
            ValueError: for a decoding mode that is neither greedy nor sampling (beams, assistants), a tree deeper than
                the heads reach, and whatever `generate` refuses.
        """
        if kwargs.get("temperature") == 0:
            del kwargs["temperature"]
            kwargs["do_sample"] = False
        elif sampling is not None:
            kwargs["do_sample"] = True
        if sampling not in (None, "typical", "nucleus"):
            raise ValueError(f"`sampling` must be None, 'nucleus' or 'typical' (lossy), got {sampling!r}.")
        if sampling == "nucleus" and kwargs["do_sample"]:
            kwargs.setdefault("top_p", 0.8)
        typical = sampling == "typical" and kwargs["do_sample"]
        if return_trace and not kwargs.get("return_dict_in_generate"):
            raise ValueError("`return_trace` comes with `return_dict_in_generate=True`.")
        return self.generate(
            inputs,
            custom_generate=multibyte_decoding,
            draft=draft,
            draft_nodes=draft_nodes,
            medusa_choices=medusa_choices,
            typical=TypicalAcceptance(posterior_threshold, posterior_alpha) if typical else None,
            return_acc_lengths=return_acc_lengths,
            return_trace=return_trace,
            **kwargs,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        multibyte: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` of transformers, by multibyte decoding where that is asked for.

        Args:
            multibyte: decode as `multi_byte_generate` does. By default, what the generation config's own `multibyte`
                says (saved in generation_config.json, it reaches servers and evaluation harnesses); what multibyte
                decoding does not do (beams, assistants, no cache) is then left to `generate`.
            **kwargs: as in `generate`; with `multibyte=True` also those of `multi_byte_generate`.

        Raises:
            ValueError: `multibyte=True` for what multibyte decoding does not do; the generation config's is no bool.
        """
        if kwargs.get("custom_generate") is None and (
            multibyte or (multibyte is None and self._goes_by_multibyte(inputs, generation_config, kwargs))
        ):
            kwargs["custom_generate"] = multibyte_decoding
        if hasattr(kwargs.get("tokenizer"), "tokenizer"):  # a processor, which servers pass; stop strings ask for more
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _goes_by_multibyte(
        self, inputs: Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> bool:
        """Whether the generation config asks for multibyte decoding, of a call that it can stand in for."""
        own = self.generation_config  # type: ignore[attr-defined]
        asked = getattr(generation_config, "multibyte", getattr(own, "multibyte", False))
        if not isinstance(asked, bool):
            raise ValueError(f"`multibyte` in the generation config must be true or false, got {asked!r}.")
        if not asked:
            return False
        config, _ = self._prepare_generation_config(generation_config, **kwargs)  # type: ignore[attr-defined]
        return (
            config.get_generation_mode(kwargs.get("assistant_model")) in SUPPORTED_MODES
            and config.guidance_scale in (None, 1)
            and config.use_cache is not False
            and config.cache_implementation in TREE_CACHES
            and not getattr(config, "is_assistant", False)
            and self._trees_follow(generated_mask(inputs, config, kwargs))
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `generation_config.multibyte` is kept."""
        config = self.generation_config  # type: ignore[attr-defined]
        if hasattr(config, "multibyte"):
            config._from_model_config = False  # else transformers, when it reads the file, drops fields not its own
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _trees_follow(self, attention_mask: Tensor | None) -> bool:
        """Whether trees can follow prompts of this mask, int64 [B, N], zero at padding; None for no padding."""
        return True

    def _prepared_call(self, input_ids: Tensor, **options: Any) -> PreparedCall:
        """What `multi_byte_generate(input_ids, **options)` would decode by."""
        call: PreparedCall = self.generate(input_ids, custom_generate=prepared_call, **options)
        return call

    # -- what the loop asks of a model ---------------------------------------------------------------------------------

    def make_drafter(self, name: str | None, batch: int, nodes: int | None = None) -> Drafter:
        """The drafter that `multi_byte_generate(draft=name)` uses; None for the default."""
        depth = self.config.num_pred_heads - 1  # type: ignore[attr-defined]
        return make_drafter(name or "dynamic", depth, self.device, batch, nodes)  # type: ignore[attr-defined]

    def _reserve_for_trees(self, cache: Cache | None, drafter: Drafter) -> Cache | None:
        """The cache that the prompts are to be read into; one of fixed size with room for a drafter's trees."""
        reserve_nodes(cache, tree_bounds(drafter).nodes)
        return cache

    def _tree_verifier(self, cache: Cache, drafter: Drafter, generation_config: GenerationConfig) -> TreeVerifier:
        """What drafts and verifies trees against `_cache_for_trees`'s cache."""
        return TreeVerifier(self, cache, drafter)

    def _cache_for_trees(self, cache: Cache, attention_mask: Tensor | None) -> Cache:
        """The cache that trees are verified against, made of the one that holds the prompts."""
        return cache

    def _commit_paths(self, cache: Cache, kept: KeptPaths) -> None:
        """Keep one path of each tree written last, and forget the other nodes."""
        for layer in cache.layers:
            layer.commit(kept)

    def _append_rows(self, cache: Cache, others: Sequence[Cache]) -> None:
        """Let the rows of other caches that `_cache_for_trees` made follow a cache's rows."""
        for layer, *joining in zip(cache.layers, *(other.layers for other in others), strict=True):
            layer.append_rows(joining)

    def _cache_after_trees(self, cache: Cache) -> Cache | None:
        """The cache to return, for further calls of the model or `generate`, made of `_cache_for_trees`'s."""
        return cache

    # -- what `generate` asks of a model with a decoding method of its own ---------------------------------------------

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Hand a streamer to our decoding method too; transformers keeps it from callables."""
        if custom_generate not in (multibyte_decoding, prepared_call):
            return super()._extract_generation_mode_kwargs(  # type: ignore[misc]
                custom_generate, kwargs, synced_gpus, assistant_model, streamer
            )
        own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if name in kwargs}
        general = super()._extract_generation_mode_kwargs(  # type: ignore[misc]
            None, kwargs, synced_gpus, assistant_model, streamer
        )
        return {"draft": None, **general, **own}

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        """Refuse modes that multibyte decoding cannot stand in for."""
        multibyte = "draft" in generation_mode_kwargs
        if multibyte and generation_mode not in SUPPORTED_MODES:
            raise ValueError(
                f"Multibyte decoding replaces greedy decoding and sampling, not {generation_mode.value}: leave out the "
                "beams, penalties or assistants that ask for it, or call `generate`."
            )
        if multibyte and generation_config.guidance_scale not in (None, 1):
            raise ValueError("`guidance_scale` runs the model at every byte; leave it out, or call `generate`.")
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )
