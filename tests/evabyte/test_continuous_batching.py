"""Continuous batching is refused before any work, by every way into it."""

import pytest
from tiny import random_ids, tiny_model

MESSAGE = r"Continuous batching .* holds full and sliding attention only, and EVA .* Use `generate` or `multi_byte_gen"


@pytest.mark.compatibility(
    "Continuous batching (generate_batch)", "EvaByte", refused="Continuous batching (`generate_batch`): its paged cache"
)
def test_generate_batch_is_refused():
    model = tiny_model()
    given = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=MESSAGE):
        model.generate_batch(random_ids(2, 20).tolist())
    with pytest.raises(NotImplementedError, match=MESSAGE):
        model.init_continuous_batching()
    with pytest.raises(NotImplementedError, match=MESSAGE), model.continuous_batching_context_manager():
        pass
    assert model.config._attn_implementation == given
