"""Token merging written slowly: one example, one vector after another, from the paper's description alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Vectors = Sequence[np.ndarray]


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    return float(u @ v / (math.sqrt(u @ u) * math.sqrt(v @ v)))


def pairs(keys: Vectors, mergeable: Sequence[bool], r: int) -> list[tuple[int, int]]:
    """Return the r pairs (a, b) in which a merges into b; of equals the first, by 1e-6 a place among its side."""
    left = [i for i, free in enumerate(mergeable) if free]
    a_side, b_side = left[0::2], left[1::2]
    edges = []
    for i, a in enumerate(a_side):
        if b_side:
            similar = [cosine(keys[a], keys[b]) for b in b_side]
            j = max(range(len(b_side)), key=lambda j: similar[j] - 1e-6 * j)
            edges.append((similar[j] - 1e-6 * i, a, b_side[j]))
    edges.sort(reverse=True)
    assert r <= len(edges)
    return [(a, b) for _, a, b in edges[:r]]


def merged_groups(groups: list[list[int]], chosen: list[tuple[int, int]]) -> list[list[int]]:
    """Join the groups, lists of input positions; a group stays where its b was."""
    gone = {a for a, _ in chosen}
    joined = {b: list(groups[b]) for b in range(len(groups))}
    for a, b in chosen:
        joined[b] += groups[a]
    return [sorted(joined[b]) for b in range(len(groups)) if b not in gone]


def mean(vectors: Vectors, sizes: Sequence[int]) -> np.ndarray:
    total = sum(size * vector for size, vector in zip(sizes, vectors, strict=True))
    return np.asarray(total) / sum(sizes)


def cluster(keys: Vectors, apart: Sequence[bool], rows: int) -> list[list[int]]:
    """Match in rounds until ``rows`` groups are left; at most ``min(3, rows - 1)`` vectors stay apart."""
    spared, budget = [], min(3, rows - 1)
    for special in apart:
        spared.append(special and budget > sum(spared))
    groups = [[i] for i in range(len(keys))]
    own = [bool(s) for s in spared]
    metric = list(keys)
    while len(groups) > rows:
        r = min(len(groups) - rows, (len(groups) - budget) // 2)
        chosen = pairs(metric, [not s for s in own], r)
        into: dict[int, list[int]] = {b: [b] for b in range(len(groups))}
        for a, b in chosen:
            into[b].append(a)
        gone = {a for a, _ in chosen}
        stay = [b for b in range(len(groups)) if b not in gone]
        metric = [mean([metric[i] for i in into[b]], [len(groups[i]) for i in into[b]]) for b in stay]
        own = [own[b] for b in stay]
        groups = merged_groups(groups, chosen)
    return groups


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def attend(attention: Any, x: np.ndarray, sizes: Sequence[int], bias: np.ndarray | None) -> tuple[np.ndarray, Vectors]:
    """Attend in float64, head after head; return what is added to the stream, and the keys averaged over heads."""

    def project(linear: Any, value: np.ndarray) -> np.ndarray:
        out = value @ linear.weight.detach().double().numpy().T
        return np.asarray(out if linear.bias is None else out + linear.bias.detach().double().numpy())

    q, k, v = (project(linear, x) for linear in (attention.q, attention.k, attention.v))
    width, mixed, keys = attention.d_head, [], []
    for head in range(attention.n_heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[:, part] @ k[:, part].T * attention.scale + np.log(np.array(sizes, dtype=float))
        mixed.append(softmax(logits if bias is None else logits + bias[head]) @ v[:, part])
        keys.append(k[:, part])
    return project(attention.o, np.concatenate(mixed, axis=1)), list(np.mean(keys, axis=0))


def apply(module: Any, x: np.ndarray) -> np.ndarray:
    """Run a module of float64 weights."""
    with torch.no_grad():
        out: Tensor = module(torch.from_numpy(x)[None])
    return out[0].numpy()
