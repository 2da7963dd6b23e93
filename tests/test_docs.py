"""Every Python snippet in the README and the docs runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_IN_DEV = {"lm_eval"}  # optional packages that the tests do without
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, capsys):
    namespace = {"__name__": page.stem}
    missing = set()
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        try:
            exec(compile(snippet, str(page), "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name not in NOT_IN_DEV:
                raise
            missing.add(error.name)
    if missing:
        pytest.skip(f"some snippets need {', '.join(missing)}")


def test_a_drafter_from_the_docs_changes_no_byte():
    from tiny import random_ids, tiny_model

    page = (ROOT / "docs" / "multibyte_decoding.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {"__name__": "multibyte_decoding"}
    exec(compile(snippet[1], "multibyte_decoding.md", "exec"), namespace)
    model, ids = tiny_model(), random_ids(2, 9)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    output = model.multi_byte_generate(ids, draft=namespace["Spaces"](), **how)
    assert output.tolist() == model.generate(ids, **how).tolist()
