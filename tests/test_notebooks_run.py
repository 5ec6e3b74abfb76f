"""The first notebooks, to the evaluation, from end to end at smoke size; two files, so that two workers share the time."""

import pytest
from notebook_runs import STEMS, run_and_find


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Shared, so that what one notebook collects or trains the next one finds, as in a real run."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize("stem", STEMS[:7])
def test_notebook_runs_and_finds_something(stem, artifacts, tmp_path):
    run_and_find(stem, artifacts, tmp_path)
