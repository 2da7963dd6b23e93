"""The tests of transformers that fail on a model, each with the reason why they must."""

ROPE = "it looks into `inv_freq`, a buffer a cast would round: EvaByte's table is a function of its input and layout"
RETURN_DICT = "it wants `return_dict=False` kept, which published configurations say and their models never obeyed"
EMBEDDED = (
    "subwords are matched on ids, which `inputs_embeds` do not tell: these must hold the subword embeddings already, "
    "and the byte embeddings alone, as the test passes them, are another input"
)
NO_TABLE = (
    "a folder without any weight lacks the table of subwords, too; it cannot be drawn at random, so loading refuses "
    "instead of returning a model that matches nothing"
)

EXPORTED = "where a row's windows lie follows from the values of its mask, which a graph for all masks does not know"
EXPORTED_LOOP = "torch.export cannot flatten the cache that grows: it keeps the windows that closed in a queue per row"

EXPANDED = {
    "test_generate_continue_from_inputs_embeds": EMBEDDED,
    "test_generate_from_inputs_embeds_0_greedy": EMBEDDED,
    "test_inputs_embeds_matches_input_ids": EMBEDDED,
    "test_model_weights_reload_no_missing_tied_weights": NO_TABLE,
}
EXPECTED_FAILURES: dict[str, dict[str, str]] = {
    "evabyte": {
        "test_config": RETURN_DICT,
        "test_model_rope_scaling_frequencies": ROPE,
        # Slow: they run with RUN_SLOW=1.
        "test_torch_export_static": EXPORTED,
        "test_torch_export_dynamic": EXPORTED,
        "test_torch_export_generate_static": EXPORTED_LOOP,
        "test_torch_export_generate_dynamic": EXPORTED_LOOP,
    },
    "byte_llama": EXPANDED,
    "byte_gemma2": {**EXPANDED, "test_generate_from_inputs_embeds_1_beam_search": EMBEDDED},
}
