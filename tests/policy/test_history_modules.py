"""Histories: stateless, each from its own features alone."""

import pytest
import torch

from rvlm.policy.history_modules import HISTORIES


@pytest.mark.parametrize("name", HISTORIES)
def test_the_history_is_stateless(name):
    torch.manual_seed(0)
    history, features = HISTORIES[name](8), torch.randn(2, 4, 8)
    before = history(features)
    history.train()(torch.randn(2, 4, 8)).sum().backward()
    assert torch.equal(history.eval()(features), before)
