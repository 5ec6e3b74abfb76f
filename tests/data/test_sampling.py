"""A budget of samples: an order that depends on the sample position alone."""

from rvlm.data.sampling import FixedBudgetDataset


def test_a_budget_sees_every_item_once_an_epoch_in_a_new_order():
    budget = FixedBudgetDataset(7, 20, seed=3, transform=lambda i, rng: (i, rng.random()))
    order = [budget.index_at(i) for i in range(20)]
    assert len(budget) == 20
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and len(set(order[14:])) == 6


def test_a_sample_depends_on_its_position_alone():
    transform = lambda i, rng: (i, rng.random())  # noqa: E731
    whole, again = FixedBudgetDataset(7, 20, 3, transform), FixedBudgetDataset(7, 20, 3, transform)
    forwards = [whole[i] for i in range(20)]
    assert [again[i] for i in reversed(range(20))] == forwards[::-1]
    assert len({value for _, value in forwards}) == 20
    assert [FixedBudgetDataset(7, 20, 4, transform)[i] for i in range(20)] != forwards
