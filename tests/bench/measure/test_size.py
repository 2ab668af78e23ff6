"""Sizes: ties and links count once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.backbones.model import TaskModel, share_weights
from bench.errors import BenchError
from bench.measure.size import bytes_on_disk, count_bytes, count_parameters


def test_tied_weights_count_once() -> None:
    a, b = nn.Linear(4, 6), nn.Linear(4, 6)
    model = nn.ModuleList([a, b])
    assert count_parameters(model.parameters()) == 60
    b.weight = a.weight
    assert count_parameters(model.parameters()) == 36
    b.bias.data = a.bias.data  # another tensor on the same memory
    assert count_parameters(model.parameters()) == 30


def test_parts_of_one_storage_are_different_parameters() -> None:
    whole = torch.zeros(10)
    assert count_parameters([nn.Parameter(whole[:4]), nn.Parameter(whole[4:])]) == 10


def test_a_shared_copy_adds_nothing() -> None:
    model = TaskModel(nn.Linear(3, 3))
    assert count_parameters([*model.parameters(), *share_weights(model).parameters()]) == 12


def test_trained_ones_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    assert count_parameters(p for p in model.parameters() if p.requires_grad) == 14


def test_bytes_of_weights_in_their_own_types() -> None:
    whole = torch.zeros(10, dtype=torch.int8)
    tied = nn.Parameter(torch.zeros(3, 4))
    assert count_bytes([tied, tied.data, whole[:4], whole[4:], torch.zeros(2, dtype=torch.float64)]) == 48 + 10 + 16


def test_meta_parameters_have_a_number_but_no_address() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    assert count_parameters(model.parameters()) == 60


def test_bytes_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "er" / "config").write_bytes(b"x" * 23)
    assert bytes_on_disk(tmp_path / "weights") == 1000
    assert bytes_on_disk(tmp_path) == 1023


def test_links_are_followed_and_a_file_counts_once(tmp_path: Path) -> None:
    """As in the Hugging Face cache, whose snapshots are links into a store of blobs."""
    blob, snapshot = tmp_path / "blob", tmp_path / "snapshot"
    blob.write_bytes(b"x" * 77)
    snapshot.mkdir()
    (snapshot / "model").symlink_to(blob)
    os.link(blob, snapshot / "again")
    assert bytes_on_disk(snapshot) == 77
    assert bytes_on_disk(tmp_path) == 77


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such file or folder"):
        bytes_on_disk(tmp_path / "gone")
