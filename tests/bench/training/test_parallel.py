"""Two processes that train together: the sums, what all agree on, and a training that is cut short and goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.training.parallel import Ranks, average, of_all
from tests.bench.training.two_ranks import rank, trained
from tests.workers import finish, start


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    assert finish(*[start(rank, number, folder) for number in range(2)]) == [0, 0]
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_two_train_as_one(both: list[dict[str, Any]], count: int) -> None:
    """Also a batch of fewer examples than processes; a parameter without a gradient does not decay."""
    weights, history = trained(count)
    for found in both:
        own, own_history = found[f"of {count}"]
        torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6)
        assert own[-3:].tolist() == [1.0, 1.0, 1.0]
        assert [record["loss"] for record in own_history] == pytest.approx([r["loss"] for r in history], rel=1e-5)
        assert [record["part"] for record in own_history] == pytest.approx([r["part"] for r in history], rel=1e-5)
    assert torch.equal(both[0][f"of {count}"][0], both[1][f"of {count}"][0])


def test_what_is_no_number_for_one_ends_all(both: list[dict[str, Any]]) -> None:
    assert [found["diverged"] for found in both] == ["the loss became nan at step 3 of 5 (lr 0.1)"] * 2


def test_dropout_is_each_ranks_own_and_weights_are_not(both: list[dict[str, Any]]) -> None:
    assert torch.equal(both[0]["whole"][0], both[1]["whole"][0])


def test_a_training_that_was_cut_short_ends_as_if_it_had_not_been(both: list[dict[str, Any]]) -> None:
    """To the bit, with the dropout of each process."""
    for found in both:
        (weights, history), (again, history_again) = found["whole"], found["resumed"]
        assert torch.equal(weights, again)
        assert history[:-1] == history_again[:-1]
        assert (history[-1]["steps"], history_again[-1]["steps"]) == (12, 6)


def test_processes_that_differ_are_told_so(both: list[dict[str, Any]]) -> None:
    assert all("do not agree on their number" in found["differ"] for found in both)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (2, 4), (16, 4), (1, 3)])
def test_parts_make_up_the_batch(count: int, size: int) -> None:
    parts = [Ranks(rank, size, torch.device("cpu")).part(count) for rank in range(size)]
    taken = [index for rows, share in parts if share for index in range(count)[rows]]
    assert taken == list(range(count))
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    assert all(len(range(count)[rows]) >= 1 for rows, _ in parts)


def test_alone_nothing_is_computed() -> None:
    values = torch.ones(2)
    assert average(values, values) is values and of_all(values, values) is values
