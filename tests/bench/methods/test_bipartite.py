"""Matching and merging on padded batches against a slow reference that knows neither batches nor padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.backbones.encoder import EncoderLayer, Seen, Tokens
from bench.backbones.write_out import write_out, written_encoder
from bench.methods.bipartite import MergedFFN, MergeStep, group, match, merge, pool, protected
from bench.methods.merging import merged_by
from tests.bench.methods.merging_reference import cluster, merged_groups, pairs
from tests.checkpoints import FAMILIES, Family, tiny_model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def pairs_of(into: Tensor) -> set[tuple[int, int]]:
    return {(a, b) for a, b in enumerate(into.tolist()) if a != b}


@pytest.mark.parametrize("seed", range(8))
def test_every_example_is_matched_as_if_alone(seed: int) -> None:
    lengths = [17, 2, 9, 12, 5, 17]
    metric, mask = draw(6, 20, 7, seed=seed), ragged(lengths, 20)
    apart = mask & (draw(6, 20, seed=seed + 100) > 0.9)
    free = (mask & ~apart).sum(1)
    merges = (free.double() * 0.5 * draw(6, seed=seed).sigmoid().round(decimals=1)).floor().long()
    merges[0] = free[0] // 2  # as many as can be
    into = match(metric, mask, apart, merges)
    for i, n in enumerate(lengths):
        expected = pairs(metric[i, :n].double().numpy(), (mask & ~apart)[i, :n].tolist(), int(merges[i]))
        assert pairs_of(into[i]) == set(expected)


def test_padding_anywhere_plays_no_part() -> None:
    metric, mask = draw(1, 30, 5), torch.zeros(1, 30, dtype=torch.bool)
    places = torch.tensor([1, 4, 5, 9, 13, 14, 20, 22, 29])
    mask[0, places] = True
    none = torch.zeros_like(mask)
    spread = match(metric, mask, none, torch.tensor([4]))
    dense = match(metric[:, places], mask[:, places], none[:, places], torch.tensor([4]))
    assert pairs_of(spread[0]) == {(int(places[a]), int(places[b])) for a, b in pairs_of(dense[0])}


def test_identical_vectors_merge_first() -> None:
    metric = draw(1, 12, 6)
    metric[0, 7] = 3.0 * metric[0, 2]  # of A and B; the cosine knows no length
    metric[0, 9] = metric[0, 4]
    mask = torch.ones(1, 12, dtype=torch.bool)
    into = match(metric, mask, torch.zeros_like(mask), torch.tensor([2]))
    assert pairs_of(into[0]) == {(2, 7), (4, 9)}


@pytest.mark.parametrize("noise", [0.0, 3e-8])
def test_of_equals_the_first_in_the_text_wins(noise: float) -> None:
    """Rounding differs from batch to batch, and must not choose among equals."""
    metric = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).repeat(8, 1)[None]
    metric[0, 1::2] = torch.tensor([0.6, 0.8])
    for seed in range(20):
        shaken = metric + noise * draw(1, 16, 2, seed=seed)
        mask = torch.ones(1, 16, dtype=torch.bool)
        into = match(shaken, mask, torch.zeros_like(mask), torch.tensor([3]))
        assert pairs_of(into[0]) == {(0, 1), (2, 1), (4, 1)}


def test_low_precision_around_it_plays_no_part() -> None:
    metric, mask = draw(2, 40, 16), ragged([40, 31], 40)
    args = metric, mask, torch.zeros_like(mask), torch.tensor([15, 9])
    with torch.autocast("cpu", torch.bfloat16):
        low = match(*args)
    assert torch.equal(low, match(*args))


def sequence(lengths: list[int], width: int, d: int = 4, seed: int = 0) -> Tokens:
    return Tokens(draw(len(lengths), width, d, seed=seed), ragged(lengths, width))


def test_merging_again_and_again_keeps_every_sum() -> None:
    """Against groups of input positions that are joined one by one."""
    lengths = [14, 6, 9]
    start = sequence(lengths, 16, seed=3)
    special = torch.zeros(3, 16, dtype=torch.bool)
    special[:, 0] = special[0, 13] = special[1, 5] = True
    tokens = start.replace(special=special)
    groups = [[[i] for i in range(n)] for n in lengths]
    for step, merges in enumerate(([4, 2, 0], [3, 0, 2], [1, 1, 1])):
        keys = draw(3, tokens.x.shape[1], 5, seed=50 + step)
        into = match(keys, tokens.mask, protected(tokens.mask, tokens.special), torch.tensor(merges))
        for i, r in enumerate(merges):
            n = len(groups[i])
            free = [not flag for flag in tokens.special[i, :n].tolist()] if tokens.special is not None else []
            groups[i] = merged_groups(groups[i], pairs(keys[i, :n].double().numpy(), free, r))
        tokens = merge(tokens, into)
        assert tokens.size is not None and tokens.index is not None and tokens.positions is not None
        assert tokens.x.shape[1] == max(map(len, groups)) and tokens.bias is None
        for i, n in enumerate(lengths):
            left = len(groups[i])
            assert tokens.mask[i].sum() == left and tokens.mask[i, :left].all()
            assert tokens.size[i, :left].tolist() == [len(g) for g in groups[i]] and tokens.size[i, :left].sum() == n
            expected = torch.stack([start.x[i, g].mean(0) for g in groups[i]])
            torch.testing.assert_close(tokens.x[i, :left], expected)
            torch.testing.assert_close((tokens.x[i] * tokens.size[i, :, None])[:left].sum(0), start.x[i, :n].sum(0))
            assert [tokens.index[i, p].item() for g in groups[i] for p in g] == [
                k for k, g in enumerate(groups[i]) for _ in g
            ]
            full = tokens.full_length()
            assert full.shape == start.x.shape
            for k, g in enumerate(groups[i]):
                assert tokens.positions[i, k].item() in g
                torch.testing.assert_close(full[i, g], expected[k].expand(len(g), -1))
            places = tokens.positions[i, :left].tolist()
            assert places == sorted(places), "the order of the text is kept"
            assert [groups[i].index([p]) for p in special[i].nonzero().flatten().tolist()], "alone to the end"


def test_means_are_weighted_by_size() -> None:
    x, size = torch.tensor([[[1.0], [4.0], [10.0], [99.0]]]), torch.tensor([[2.0, 1.0, 5.0, 7.0]])
    means, sizes = pool(x, size, torch.tensor([[0, 0, 1, -1]]), 3)
    assert means.flatten().tolist() == [2.0, 10.0, 0.0] and sizes.tolist() == [[3.0, 5.0, 1.0]]


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_the_reference(seed: int) -> None:
    lengths, rows = [21, 13, 4, 1, 9, 21, 16], [3, 2, 4, 1, 1, 15, 4]
    metric, mask = draw(7, 24, 6, seed=seed), ragged(lengths, 24)
    special = torch.zeros_like(mask)
    for i, n in enumerate(lengths):
        special[i, 0] = special[i, n - 1] = special[i, n // 2] = True
    where = group(metric, mask, special, torch.tensor(rows))
    for i, n in enumerate(lengths):
        expected = cluster(metric[i, :n].double().numpy(), special[i, :n].tolist(), rows[i])
        assert len(expected) == rows[i]
        assert [where[i, g].tolist() for g in expected] == [[k] * len(g) for k, g in enumerate(expected)]
        assert (where[i, n:] == -1).all()


def test_special_tokens_have_a_row_of_their_own_while_there_is_one() -> None:
    metric, mask = torch.ones(1, 12, 3), torch.ones(1, 12, dtype=torch.bool)
    special = torch.zeros_like(mask)
    special[0, [0, 5, 11]] = True
    for rows, alone in ((1, 0), (2, 1), (3, 2), (4, 3), (7, 3)):
        where = group(metric, mask, special, torch.tensor([rows]))[0]
        assert where.unique().tolist() == list(range(rows))
        assert sum((where == where[p]).sum().item() == 1 for p in (0, 5, 11)) >= alone
        assert rows == 1 or (where == where[0]).sum() == 1, "the first is that which BERT's head reads"


def test_only_so_many_special_tokens_stay_apart() -> None:
    """Text may spell out special tokens, and an input's cost must depend on its length alone."""
    mask = ragged([8, 4], 8)
    special = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1, 1, 1]]).bool()
    assert protected(mask, special).tolist() == [
        [True, True, False, True] + [False] * 4,
        [False] * 2 + [True] + [False] * 5,
    ]
    assert not protected(mask, None).any()
    step = MergeStep(0, lambda n: [n - (n - 3) // 2])
    seen = Seen(draw(2, 3, 8, 5), None)
    for given in (special, special & False, mask, None):
        tokens = step(Tokens(draw(2, 8, 4), mask, given), seen)
        assert tokens.mask.sum(1).tolist() == [6, 4], "as many whatever the text says"


def test_a_rising_share_takes_one_vector_at_a_time() -> None:
    """Or budgets of inputs that all have one length could not be met."""
    for n in (19, 20, 64):
        totals = [sum(merged_by(step / 50_000, n, layers) for layers in range(1, 13)) for step in range(25_000)]
        assert totals[0] == 0 and max(b - a for a, b in pairwise(totals)) == 1
        last = [merged_by(1.0, n, layers) for layers in range(13)]
        assert last == [n * layers for layers in range(13)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_of_size_two_attends_as_two_do(family: Family) -> None:
    """Proportional attention: the layer behind a merging does what it would do on copies of the merged vector."""
    encoder = written_encoder(write_out(tiny_model(family)))
    layer = cast(EncoderLayer, encoder.layers[1])
    x, mask = draw(1, 5, 32), ragged([5], 5)
    copies = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 4]])
    positions = torch.tensor([[0, 2, 3, 6, 7]])
    sizes = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0]])
    with torch.no_grad():
        once = encoder.run(layer, Tokens(x, mask, positions=positions, size=sizes))
        twice = encoder.run(layer, Tokens(x[:, copies[0]], ragged([8], 8), positions=positions[:, copies[0]]))
        alike = encoder.run(layer, Tokens(x, mask, positions=positions))
    torch.testing.assert_close(once.x[:, copies[0]], twice.x, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(once.x, alike.x, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_copies_changes_nothing(family: Family) -> None:
    """An input in which every vector comes twice, with half of them merged away, is what it was."""
    encoder = written_encoder(write_out(tiny_model(family)))
    layer = cast(EncoderLayer, encoder.layers[0])
    x = draw(1, 6, 32).repeat_interleave(2, 1)
    # a copy stands at the place of its original
    start = Tokens(x, ragged([12], 12), positions=torch.arange(6).repeat_interleave(2)[None])
    with torch.no_grad():
        expected = encoder.run(layer, encoder.run(layer, start).replace(bias=None))
        mask, none = start.mask, torch.zeros_like(start.mask)
        merged = merge(start, match(x, mask, none, torch.tensor([6])))
        assert merged.x.shape[1] == 6 and merged.size is not None and (merged.size == 2).all()
        torch.testing.assert_close(merged.full_length(), x)
        short = encoder.run(layer, encoder.run(layer, merged))
    torch.testing.assert_close(short.full_length(), expected.x, atol=1e-5, rtol=1e-5)


class _Ffn(nn.Module):
    """Notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(4, 4), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[1])
        out: Tensor = self.linear(x).tanh()
        return out


def test_an_ffn_on_copies_is_exact() -> None:
    """Where groups hold nothing but equal vectors, all that was left out was to compute the same twice."""
    ffn = _Ffn()
    u = draw(1, 3, 4).repeat_interleave(4, 1)
    merged = MergedFFN(ffn, 0, lambda n: [n // 4])
    with torch.no_grad():
        out = merged(u, Tokens(u, ragged([12], 12)), None)
        torch.testing.assert_close(out, ffn(u))
    assert ffn.rows == [3, 12]


def test_what_an_ffn_saves() -> None:
    """Rows by each example's own length, packed to the longest; nothing at all where nothing is merged."""
    u, mask = draw(3, 20, 4), ragged([20, 8, 1], 20)
    tokens, keys = Tokens(u, mask), Seen(draw(3, 2, 20, 5), None)
    ffn = _Ffn()
    with torch.no_grad():
        for layer in (0, 1):
            MergedFFN(ffn, layer, lambda n: [-(-n // 2), max(1, n // 5)])(u, tokens, keys)
        assert ffn.rows == [10, 4]
        assert torch.equal(MergedFFN(ffn, 0, lambda n: [n])(u, tokens, keys), ffn(u)) and ffn.rows[-1] == 20


def test_an_ffn_follows_the_keys_and_without_them_its_input() -> None:
    u, mask = draw(1, 9, 4), ragged([9], 9)
    keys = draw(1, 2, 9, 5, seed=7)
    ffn = _Ffn()
    for seen, metric in ((Seen(keys, None), keys.mean(1)), (None, u)):
        groups = cluster(metric[0].double().numpy(), [False] * 9, 4)
        with torch.no_grad():
            out = MergedFFN(ffn, 0, lambda n: [4])(u, Tokens(u, mask), seen)
            for g in groups:
                expected = ffn(u[:, g].mean(1, keepdim=True))
                torch.testing.assert_close(out[:, g], expected.expand(-1, len(g), -1))


def test_gradients_pass_through_a_merging() -> None:
    """Each vector is given its part of what its group is given: all of it to the group's size, shared alike."""
    tokens = sequence([6], 8)
    x: Any = tokens.x.requires_grad_()
    into = match(draw(1, 8, 3), tokens.mask, torch.zeros_like(tokens.mask), torch.tensor([2]))
    merged = merge(tokens.replace(x=x), into)
    merged.x.sum().backward()
    assert merged.size is not None and merged.index is not None
    expected = 1 / merged.size.gather(1, merged.index.clamp_min(0))
    np.testing.assert_allclose(x.grad[0, :6, 0], expected[0, :6], rtol=1e-6)
    assert not x.grad[0, 6:].any()
