"""Every built-in recipe resolves, and the exercise's rows are the exercise's."""

import pytest

from cartilha.cli import recipe_settings
from cartilha.pipeline.recipes import recipe_names

# Sequence length, batch (blocks a step) and epochs of the exercise's results table.
ROWS = {1: (256, 4, 1), 2: (512, 4, 1), 3: (512, 8, 1), 4: (512, 8, 2), 5: (512, 8, 2), 6: (1024, 16, 1)}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves(name):
    config = recipe_settings(name)
    assert config.description and config.output and config.prepare.input
    assert config.train.batch_tokens % config.train.block_size == 0


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_of_the_exercise(row):
    config = recipe_settings(f"exercise-row-{row}")
    block_size, batch, epochs = ROWS[row]
    assert config.model == "facebook/opt-125m"
    assert (config.train.block_size, config.train.batch_tokens // block_size, config.train.epochs) == ROWS[row]
    assert (block_size, batch, epochs) == ROWS[row]
    assert config.prepare.limit_documents == 250_000 and config.prepare.validation_fraction == 0.2


@pytest.mark.parametrize("name", recipe_names())
def test_text_of_the_web_is_cleaned_but_for_the_rows_of_the_exercise(name):
    """Those repeat what was done there."""
    prepare = recipe_settings(name).prepare
    is_web = any(ref.startswith("hf:") for ref in prepare.input) and not name.startswith("exercise-row-")
    assert ("web" in prepare.clean) == prepare.near_duplicates == is_web
