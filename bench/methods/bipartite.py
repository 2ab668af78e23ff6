"""Bipartite soft matching on padded batches: who merges into whom, the merging, and the two modules that do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.encoder import AroundFFN, Seen, Tokens, TokenStep
from bench.methods.merging import PROTECTED, Counts

# T5's first layer knows no places, so that a word that comes twice has two partners of the same similarity. One of them
# must win whatever rounding does, which differs with the batch: each next one is this much less similar.
_TIE = 1e-6


@torch.no_grad()
def match(metric: Tensor, mask: Tensor, apart: Tensor, merges: Tensor) -> Tensor:
    """Choose vectors and the vectors that they merge into.

    The mergeable vectors of each example are dealt out in turn to A and B. Each of A has the most similar of B as its
    partner, and those of A that are the most similar to their partners merge into them.

    Parameters
    ----------
    metric
        What similarity, the cosine, is measured on, (B, n, c).
    mask, apart
        True at real vectors, and at those of them that do not merge, (B, n).
    merges
        How many merge away, (B,); at most half of the mergeable vectors of an example, and in one of them at least 1.

    Returns
    -------
    Tensor
        The vector that each merges into, (B, n); itself where it stays.

    Notes
    -----
    Bolya et al., "Token merging: your ViT but faster", ICLR 2023, section 3. What is multiplied depends on the longest
    example alone, and not on how many of its vectors are mergeable.
    """
    longest = int(mask.sum(1).max())
    mergeable = mask & ~apart
    odd = mergeable.cumsum(1) % 2 == 1
    in_a, in_b = mergeable & odd, mergeable & ~odd
    a, b = first(in_a, (longest + 1) // 2), first(in_b, longest // 2)
    unit = F.normalize(metric.float(), dim=2)
    with torch.autocast(metric.device.type, enabled=False):
        similarity = take(unit, a) @ take(unit, b).transpose(1, 2)
    similarity = similarity.masked_fill(~take(in_b, b).unsqueeze(1), -torch.inf)
    later_a, later_b = (_TIE * torch.arange(side.shape[1], device=metric.device) for side in (a, b))
    partner = (similarity - later_b).argmax(2)
    best = similarity.gather(2, partner.unsqueeze(2)).squeeze(2) - later_a
    best = best.masked_fill(~take(in_a, a), -torch.inf)
    place = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    into = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return into.scatter(1, a, torch.where(place < merges.unsqueeze(1), take(b, partner), a))


def first(chosen: Tensor, count: int) -> Tensor:
    """Return where the first ``count`` chosen vectors are, (B, count), filled up with places of others."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def take(x: Tensor, places: Tensor) -> Tensor:
    """Gather (B, n) or (B, n, d) along its vectors, at ``places``, (B, m)."""
    return x.gather(1, places if x.dim() == 2 else places.unsqueeze(2).expand(-1, -1, x.shape[2]))


def compact(into: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return which vectors stay, (B, n), and where among those each one is now, (B, n), -1 at padding."""
    stays = mask & (into == torch.arange(into.shape[1], device=into.device))
    return stays, take(stays.cumsum(1) - 1, into).masked_fill(~mask, -1)


def follow(where: Tensor, onward: Tensor) -> Tensor:
    """Compose two maps of places, (B, N) and (B, n); -1 stays -1."""
    return torch.where(where < 0, where, take(onward, where.clamp_min(0)))


def pool(x: Tensor, size: Tensor, where: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Merge vectors by their mean, weighted by size.

    Parameters
    ----------
    x, size
        Vectors, (B, n, d), and how many each stands for, (B, n).
    where
        Row that each goes into, (B, n); -1 for none.
    rows
        How many rows there are.

    Returns
    -------
    tuple
        Means, (B, rows, d), and sizes, (B, rows); 0 and 1 in rows that nothing goes into.
    """
    where = where.masked_fill(where < 0, rows)
    weighted = x * size.unsqueeze(2)
    total = weighted.new_zeros(x.shape[0], rows + 1, x.shape[2])
    total = total.scatter_add(1, where.unsqueeze(2).expand_as(x), weighted)[:, :rows]
    sizes = size.new_zeros(x.shape[0], rows + 1).scatter_add(1, where, size)[:, :rows].clamp_min(1)
    return (total / sizes.unsqueeze(2)).to(x.dtype), sizes


def merge(tokens: Tokens, into: Tensor) -> Tokens:
    """Merge vectors for good, as `match` says; those that stay keep the order of the text and their positions."""
    stays, where = compact(into, tokens.mask)
    rows = int(stays.sum(1).max())
    kept = first(stays, rows)
    size = tokens.mask.float() if tokens.size is None else tokens.size
    positions = tokens.positions
    if positions is None:
        positions = torch.arange(into.shape[1], device=into.device).expand(into.shape)
    x, size = pool(tokens.x, size, where, rows)
    return tokens.replace(
        x=x,
        mask=take(stays, kept),
        special=None if tokens.special is None else take(tokens.special, kept),
        positions=take(positions, kept),
        index=where if tokens.index is None else follow(tokens.index, where),
        size=size,
        bias=None,
        length=tokens.real_length(),
    )


def group(metric: Tensor, mask: Tensor, special: Tensor | None, rows: Tensor) -> Tensor:
    """Match again and again until few enough groups are left.

    Parameters
    ----------
    metric, mask
        As for `match`.
    special
        True at special tokens, (B, n), which stay apart as long as another row is left for the rest; or ``None``.
    rows
        Groups of each example, (B,); at least 1 and at most its real vectors.

    Returns
    -------
    Tensor
        Group of each vector, (B, n), in the order of the text; -1 at padding.
    """
    spared = (rows - 1).clamp_max(PROTECTED)
    apart, size = protected(mask, special, spared), mask.float()
    where = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape).masked_fill(~mask, -1)
    while True:
        n = mask.sum(1)
        merges = torch.minimum(n - rows, (n - spared) // 2).clamp_min(0)
        if not merges.any():
            return where
        stays, onward = compact(match(metric, mask, apart, merges), mask)
        left = int((n - merges).max())
        metric, size = pool(metric, size, onward, left)
        kept = first(stays, left)
        mask, apart, where = take(stays, kept), take(apart, kept), follow(where, onward)


def protected(mask: Tensor, special: Tensor | None, count: int | Tensor = PROTECTED) -> Tensor:
    """Return the first ``count``, one number or (B,), special tokens of each example, (B, n)."""
    if special is None:
        return torch.zeros_like(mask)
    special = special & mask
    return special & (special.cumsum(1) <= torch.as_tensor(count, device=mask.device).reshape(-1, 1))


def counted(counts: Counts, layer: int, n: Tensor) -> Tensor:
    """Look up what a layer leaves of inputs of these lengths, (B,)."""
    return torch.tensor([counts(length)[layer] if length else 0 for length in n.tolist()], device=n.device)


class MergeStep(TokenStep):
    """Merges the most similar vectors of each example between attention and FFN.

    Parameters
    ----------
    layer
        Number of the layer, from 0.
    counts
        How many vectors each layer leaves.
    """

    def __init__(self, layer: int, counts: Counts) -> None:
        super().__init__()
        self.layer, self.counts = layer, counts

    def forward(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Merge as many as the length of each example asks for."""
        merges = tokens.mask.sum(1) - counted(self.counts, self.layer, tokens.real_length())
        if not merges.any():
            return tokens
        apart = protected(tokens.mask, tokens.special)
        return merge(tokens, match(seen.keys.mean(1), tokens.mask, apart, merges))


class MergedFFN(AroundFFN):
    """Runs the FFN on the mean of each group of similar vectors; every vector takes the output of its group.

    Parameters
    ----------
    inner
        The backbone's FFN.
    layer
        Number of the layer, from 0.
    counts
        How many rows each layer runs on.
    """

    def __init__(self, inner: nn.Module, layer: int, counts: Counts) -> None:
        super().__init__(inner)
        self.layer, self.counts = layer, counts

    def forward(self, u: Tensor, tokens: Tokens, seen: Seen | None) -> Tensor:
        """Map the FFN's input u, (B, n, d), to its output, (B, n, d)."""
        mask, n = tokens.mask, tokens.mask.sum(1)
        rows = counted(self.counts, self.layer, n)
        if torch.equal(rows, n):
            out: Tensor = self.inner(u)
            return out
        # a layer without heads has no keys
        metric = u if seen is None else seen.keys.mean(1)
        where = group(metric, mask, tokens.special, rows)
        means, _ = pool(u, mask.float(), where, int(rows.max()))
        return take(self.inner(means), where.clamp_min(0))
