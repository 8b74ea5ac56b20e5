"""Commands that run in this process silence transformers for good; each test gives it its voice back."""

import pytest
import transformers


@pytest.fixture(autouse=True)
def _transformers_speaks_again():
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
