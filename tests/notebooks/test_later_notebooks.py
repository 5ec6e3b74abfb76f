"""The later notebooks, from few shots on, from end to end at smoke size; two files, so that two workers share the time."""

import pytest
from notebook_runs import STEMS, run_and_find


@pytest.mark.parametrize("stem", STEMS[7:])
def test_notebook_runs_and_finds_something(stem, artifacts, tmp_path):
    run_and_find(stem, artifacts, tmp_path)
