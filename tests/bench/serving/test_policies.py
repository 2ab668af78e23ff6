"""What each policy chooses, by hand and by law, and the policies of other packages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import ConfigError
from bench.serving.policies import Deadline, Policy, QueueLength, Static, View, policies, registered_policies
from bench.serving.times import ServiceTimes
from bench.serving.words import read
from tests.bench.serving.calibrated import calibration

KS = (1, 2, 4, 8)


def view(
    arrived: Sequence[float],
    times: ServiceTimes | None = None,
    now: float = 0.5,
    last: int = 1,
    max_batch: int = 8,
    deadline: float = 1.0,
    replicas: int = 1,
    lengths: Sequence[int] | None = None,
    ks: tuple[int, ...] = KS,
) -> View:
    times = times or ServiceTimes(calibration(lambda k, size, n: [0.1], ks=ks, sizes=(1, max_batch)))
    lengths = [8] * len(arrived) if lengths is None else lengths
    return View(now, np.array(arrived), np.array(lengths), ks, last, max_batch, deadline, replicas, times)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("waiting", [1, 1000])
def test_static_never_changes(k: int, waiting: int) -> None:
    assert Static(k).choose(view([0.0] * waiting, last=8)) == k


def test_a_k_that_the_model_has_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"policy static:3: the model serves k = 1, 2, 4, 8"):
        Static(3).choose(view([0.0]))


def chosen_by_queue(waiting: int, last: int, replicas: int = 1, policy: QueueLength | None = None) -> int:
    return (policy or QueueLength()).choose(view([0.0] * waiting, last=last, replicas=replicas))


@pytest.mark.parametrize(
    ("replicas", "waiting", "step"),
    [
        # a full batch is 8: one of them makes it faster, a quarter slower
        (1, 1, -1), (1, 2, -1), (1, 3, 0), (1, 7, 0), (1, 8, 1), (1, 500, 1),
        (2, 4, -1), (2, 5, 0), (2, 15, 0), (2, 16, 1),
    ],
)  # fmt: skip
def test_a_long_queue_is_one_step_and_a_short_one_a_step_back(replicas: int, waiting: int, step: int) -> None:
    for at, last in enumerate(KS):
        expected = KS[min(max(at + step, 0), 3)]
        assert chosen_by_queue(waiting, last, replicas) == expected


def test_a_queue_that_sways_in_the_gap_changes_nothing() -> None:
    """Hysteresis: what was chosen when it filled stays until it is nearly empty."""
    k, seen = 1, []
    for waiting in (1, 8, 7, 3, 7, 8, 3, 5, 2, 3, 7, 1, 1):
        k = chosen_by_queue(waiting, k)
        seen.append(k)
    assert seen == [1, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 1, 1]


@given(
    st.integers(1, 200), st.integers(0, 200), st.sampled_from(KS), st.integers(1, 4),
    st.floats(0, 5), st.floats(0.01, 5),
)  # fmt: skip
def test_a_longer_queue_never_makes_it_slower(
    waiting: int, more: int, last: int, replicas: int, down: float, gap: float
) -> None:
    policy = QueueLength(down + gap, down)
    shorter, longer = (chosen_by_queue(n, last, replicas, policy) for n in (waiting, waiting + more))
    assert shorter <= longer
    assert abs(KS.index(shorter) - KS.index(last)) <= 1
    if down < waiting / (8 * replicas) < down + gap:
        assert shorter == last


def halves(k: int, size: int, length: int) -> list[float]:
    return [{1: 0.3, 2: 0.4}[size] / k]


@pytest.mark.parametrize(
    ("replicas", "margin", "expected"),
    [
        # allowed are 0.5, 0.7, 0.9 s. One after another at k = 1: 0.4, 0.8 > 0.7; at k = 2: 0.2, 0.4, 0.55
        (1, 0.0, 2),
        # two replicas share what is before, k = 1: 0.4, 0.2 + 0.4, 0.4 + 0.3
        (2, 0.0, 1),
        # allowed are 0.36, 0.56, 0.76: the first batch alone takes 0.4 at k = 1, however many replicas there are
        (2, 0.14, 2),
        (100, 0.14, 2),
        # allowed are 0.15, 0.35, 0.55: at k = 2 0.2 > 0.15; at k = 4 0.1, 0.2, 0.275
        (1, 0.35, 4),
        # allowed is nothing
        (1, 0.5, 8),
        (1, 0.99, 8),
    ],
)
def test_the_deadline_of_five_requests_in_batches_of_two(replicas: int, margin: float, expected: int) -> None:
    times = ServiceTimes(calibration(halves, ks=KS, sizes=(1, 2)))
    queue = view([0.0, 0.1, 0.2, 0.3, 0.4], times, max_batch=2, replicas=replicas)
    assert Deadline(margin).choose(queue) == expected


def test_a_batch_is_as_long_as_its_longest_request() -> None:
    times = ServiceTimes(calibration(lambda k, size, n: [n / 100 / k], ks=KS, sizes=(1, 2), lengths=(10, 80),
                                     examples=(10, 80)))  # fmt: skip
    queue = [0.45] * 4
    for lengths, expected in ([10, 10, 10, 10], 1), ([80, 80, 10, 10], 1), ([10, 80, 10, 80], 2), ([80] * 4, 2):
        assert Deadline(0).choose(view(queue, times, max_batch=2, lengths=lengths)) == expected, lengths


def test_one_k_is_all_that_can_be_chosen() -> None:
    assert Deadline().choose(view([-100.0], ks=(1,))) == QueueLength().choose(view([0.0] * 99, ks=(1,))) == 1


def meets(queue: View, k: int, margin: float) -> bool:
    """Whether all that waits is answered in time at k, counted batch by batch."""
    before = 0.0
    for first in range(0, len(queue.arrived), queue.max_batch):
        rows = slice(first, first + queue.max_batch)
        size, longest = len(queue.arrived[rows]), queue.lengths[rows].max()
        own = float(queue.seconds(k, np.array([size]), np.array([longest]))[0])
        if queue.now + before / queue.replicas + own > queue.arrived[first] + queue.deadline * (1 - margin):
            return False
        before += own
    return True


@st.composite
def queues(draw: st.DrawFn) -> View:
    """Queues before engines whose larger k need not be faster. All numbers are binary fractions: sums are exact."""
    samples = draw(st.lists(st.integers(1, 40), min_size=24, max_size=24))
    cells = {(k, s, n): samples.pop() / 64 for k in KS for s in (1, 3, 4) for n in (4, 20)}
    times = ServiceTimes(calibration(lambda k, s, n: [cells[k, s, n]], ks=KS, sizes=(1, 3, 4), lengths=(4, 20),
                                     examples=(4, 20)))  # fmt: skip
    waiting = draw(st.integers(1, 14))
    ago = sorted(draw(st.lists(st.integers(0, 100), min_size=waiting, max_size=waiting)), reverse=True)
    lengths = draw(st.lists(st.integers(1, 20), min_size=waiting, max_size=waiting))
    return view([7 - a / 64 for a in ago], times, now=7.0, max_batch=4, deadline=draw(st.integers(1, 400)) / 64,
                replicas=draw(st.sampled_from([1, 2, 4])), lengths=lengths)  # fmt: skip


@given(queues(), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_deadline_takes_the_smallest_k_that_meets_it(queue: View, margin: float) -> None:
    good = [k for k in KS if meets(queue, k, margin)]
    assert Deadline(margin).choose(queue) == (good[0] if good else 8)


@given(queues(), st.floats(0, 0.9), st.floats(0, 0.09))
def test_more_time_never_makes_it_faster(queue: View, margin: float, more: float) -> None:
    assert Deadline(margin).choose(queue) <= Deadline(margin + more).choose(queue)


Install = Callable[[str], None]
MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from bench.serving.policies import Policy

@dataclass(frozen=True)
class Alternating(Policy):
    name = "alternating"
    period: int = 2

    def choose(self, view):
        return view.ks[int(view.now) // self.period % 2]

class Undecided(Policy):
    name = "undecided"

def function(view):
    return 1
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with one policy, as pip would, and forget it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_policies.py").write_text(MODULE)

    def write(point: str) -> None:
        info = tmp_path / f"package_{len(list(tmp_path.glob('*.dist-info')))}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.partition('-')[0]}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[bench.policies]\n{point}\n")

    yield write
    sys.modules.pop("their_policies", None)


def found() -> dict[str, type[Policy]]:
    registered_policies.cache_clear()
    try:
        return policies()
    finally:
        registered_policies.cache_clear()  # nothing is remembered


def test_a_policy_of_another_package_is_one_like_ours(install: Install) -> None:
    install("alternating = their_policies:Alternating")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = found()
    assert list(known) == ["static", "queue", "deadline", "alternating"]
    policy = read("alternating:3", "policy", known)
    assert [policy.choose(view([0.0], now=now)) for now in (0.0, 2.9, 3.0, 6.0)] == [1, 1, 2, 1]
    with pytest.raises(ConfigError, match=r"unknown field 'perod'\. Did you mean 'period'\?"):
        read("alternating:perod=3", "policy", known)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("lost = no_such_module:It", "No module named 'no_such_module'"),
        ("lost = their_policies:Nothing", "Nothing"),
        ("lost = their_policies:function", r"is no subclass of bench\.serving\.policies\.Policy"),
        ("undecided = their_policies:Undecided", "has no method choose"),
        ("other = their_policies:Alternating", "its name is 'alternating'; give the entry point the same name"),
        ("deadline = their_policies:Alternating", "the name is taken by this library"),
    ],
)
def test_a_policy_that_cannot_be_used_is_left_out(install: Install, point: str, said: str) -> None:
    install(point)
    install("alternating = their_policies:Alternating")
    with pytest.warns(UserWarning, match=rf"policy '\w+' from package_0 1\.2 .*left out: .*{said}") as caught:
        known = found()
    assert len(caught) == 1 and list(known) == ["static", "queue", "deadline", "alternating"]
    assert known["deadline"] is Deadline
