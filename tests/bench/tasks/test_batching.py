"""Laws of the training batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tasks.batching import LengthBatches

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=300)


def epoch(stream: LengthBatches, number: int) -> list[list[int]]:
    first = number * stream.batches_per_epoch
    return [stream.batch(step) for step in range(first, first + stream.batches_per_epoch)]


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_example_comes_once_an_epoch_in_batches_of_even_size(
    lengths: list[int], batch_size: int, seed: int, number: int
) -> None:
    batches = epoch(LengthBatches(lengths, batch_size, seed), number)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(lengths)))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_does_not_depend_on_the_steps_before(lengths: list[int], batch_size: int, steps: list[int]) -> None:
    stream = LengthBatches(lengths, batch_size, seed=3)
    assert [stream.batch(s) for s in steps] == [LengthBatches(lengths, batch_size, seed=3).batch(s) for s in steps]


def test_seeds_and_epochs_shuffle_anew() -> None:
    lengths = list(range(1, 101))
    a, b = LengthBatches(lengths, 10, seed=0), LengthBatches(lengths, 10, seed=1)
    assert epoch(a, 0) != epoch(b, 0)
    assert epoch(a, 0) != epoch(a, 1)
    members = [{frozenset(batch) for batch in epoch(LengthBatches([5] * 100, 10, 0), n)} for n in (0, 1)]
    assert not members[0] & members[1], "with equal lengths, which examples meet must be chance"


def test_padding_is_a_small_part_of_what_shuffling_alone_would_give() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.6, 5000).astype(int) + 1

    def padding(batches: list[list[int]]) -> float:
        return float(sum((lengths[b].max() - lengths[b]).sum() for b in map(np.asarray, batches)))

    shuffled = np.random.default_rng(1).permutation(5000).reshape(-1, 20)
    assert padding(epoch(LengthBatches(lengths, 20, 0), 0)) < 0.1 * padding([list(b) for b in shuffled])


def test_batches_do_not_come_in_order_of_length() -> None:
    lengths = np.arange(1, 1001)
    means = [float(np.mean(lengths[batch])) for batch in epoch(LengthBatches(lengths, 10, 0), 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


@pytest.mark.parametrize(("lengths", "batch_size"), [([], 4), ([1, 2], 0)])
def test_no_batches_can_be_made_of_nothing(lengths: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="cannot make batches"):
        LengthBatches(lengths, batch_size, 0)
