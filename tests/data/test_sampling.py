"""A budget of samples: an order that depends on the sample position alone."""

from rvlm.data.sampling import FixedBudgetDataset, Mixture


def test_a_budget_sees_every_item_once_an_epoch_in_a_new_order():
    budget = FixedBudgetDataset(range(7), 20, seed=3, transform=lambda i, rng: (i, rng.random()))
    order = [budget.index_at(i) for i in range(20)]
    assert len(budget) == 20
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and len(set(order[14:])) == 6


def test_a_sample_depends_on_its_position_alone():
    transform = lambda i, rng: (i, rng.random())  # noqa: E731
    whole, again = FixedBudgetDataset(range(7), 20, 3, transform), FixedBudgetDataset(range(7), 20, 3, transform)
    forwards = [whole[i] for i in range(20)]
    assert [again[i] for i in reversed(range(20))] == forwards[::-1]
    assert len({value for _, value in forwards}) == 20
    assert [FixedBudgetDataset(range(7), 20, 4, transform)[i] for i in range(20)] != forwards


class Recorded(list):
    """Items that notice how they are read."""

    def __getitems__(self, indices):
        self.batches = [*getattr(self, "batches", []), indices]
        return [self[i] for i in indices]


def test_a_batch_is_read_at_once_with_the_samples_of_one_by_one():
    items = [Recorded(range(100 * part, 100 * part + n)) for part, n in enumerate((7, 3))]
    parts = [FixedBudgetDataset(part, 60, seed, lambda item, rng: (item, rng.random())) for seed, part in enumerate(items)]
    mixed = Mixture(parts, (1, 2), 60, seed=4)
    one_by_one = [mixed[i] for i in range(60)]
    for part in items:
        part.batches = []
    assert mixed.__getitems__(range(20, 52)) == one_by_one[20:52] and mixed.__getitems__([9, 9, 0]) == [
        one_by_one[i] for i in (9, 9, 0)
    ]
    assert [len(part.batches) for part in items] in ([2, 2], [2, 1], [1, 2]), "one read a part and batch"
