"""A frozen backbone that lies in parts on several devices: each holds a share of every matrix, and no more.

Each frozen matrix is a unit of its own of torch's FSDP (``fully_shard``): it is put together where its forward or
backward pass needs it, and let go. So small a unit is never taken apart by what methods do to a model (`write_out`,
plugins, token steps), and the matrices of the models that need this are large enough for a sum each. What is trained,
and embeddings and norms, every process holds whole.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from torch import nn

from bench.backbones.model import TaskModel
from bench.training.parallel import Ranks


def shard(model: TaskModel, ranks: Ranks) -> TaskModel:
    """Leave each process its parts of the frozen matrices of ``model``, and move the rest to its device.

    What is shared between modules stays whole: T5's output matrix, where it is the embedding too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, share_comm_ctx

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    units: list[Any] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if type(module) is nn.Linear and all(holders[id(p)] == 1 and not p.requires_grad for p in own):
            units.append(cast(Any, fully_shard(module, mesh=mesh, reshard_after_forward=True)))
    for unit in units:
        # a model that shares weights (`share_weights`) shares them with all that keeps them in parts
        unit.__deepcopy__ = lambda memo, unit=unit: unit
    share_comm_ctx(units)
    return model.to(ranks.device)
