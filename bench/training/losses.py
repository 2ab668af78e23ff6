"""Distillation losses as named parts, whose mix is configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.backbones.model import TaskOutput
from bench.tasks.features import IGNORED
from bench.tasks.spec import Kind
from bench.training.parallel import average, of_all


def distillation_losses(
    weights: Mapping[str, float],
    kind: Kind | None,
    student: TaskOutput,
    teacher: TaskOutput,
    mask: Tensor,
    labels: Mapping[str, Tensor],
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Compute each part that has a weight.

    Parts
    -----
    last_hidden
        Mean squared error of the last encoder hidden states over real tokens, in units of the teacher's variance; plus
        that of the last decoder hidden states where there is a decoder.
    all_hidden
        The same with the encoder's share averaged over all its layers.
    released_hidden
        As in the released code: MSE of the last encoder plus the last decoder hidden state, padding multiplied by
        zero and the mean taken over every position.
    logits
        KL(teacher || student) at ``temperature``, times its square; mean squared error for regression.
    task
        The task's own loss on the labels.

    Parameters
    ----------
    weights
        Part -> weight, as ``bench.training.mix.parse_mix`` returns.
    kind
        Kind of the task; ``None`` in pre-training, where ``logits`` and ``task`` have no meaning.
    student, teacher
        Outputs on the same batch, with hidden states.
    mask
        True at real tokens, (batch, n).
    labels
        Label tensors of the batch.

    Returns
    -------
    dict
        Part -> scalar loss, unweighted.
    """
    losses: dict[str, Tensor] = {}
    for part in weights:
        if part == "last_hidden":
            losses[part] = _hidden(student, teacher, mask, labels, slice(-1, None))
        elif part == "all_hidden":
            losses[part] = _hidden(student, teacher, mask, labels, slice(None))
        elif part == "released_hidden":
            losses[part] = _released(student, teacher, mask)
        elif kind is None:
            continue
        elif part == "logits":
            losses[part] = _logits(kind, student.logits, teacher.logits, mask, labels, temperature)
        elif part == "task":
            losses[part] = task_loss(kind, student.logits, labels)
    return losses


def _relative_mse(students: Sequence[Tensor], teachers: Sequence[Tensor], keep: Tensor) -> Tensor:
    """Return the error of each pair of states, (pairs,), in units of the teacher's variance."""
    pairs = [(s[keep].float(), t[keep].float()) for s, t in zip(students, teachers, strict=True)]
    means = average(torch.stack([t.mean(0) for _, t in pairs]), keep)
    spread = [(t - mean).square().mean() for (_, t), mean in zip(pairs, means, strict=True)]
    variances = average(torch.stack(spread), keep)
    errors = [F.mse_loss(s, t) / variance.clamp_min(1e-12) for (s, t), variance in zip(pairs, variances, strict=True)]
    return of_all(torch.stack(errors), keep)


def _hidden(
    student: TaskOutput, teacher: TaskOutput, mask: Tensor, labels: Mapping[str, Tensor], which: slice
) -> Tensor:
    loss = _relative_mse(student.encoder_hidden[which], teacher.encoder_hidden[which], mask).mean()
    if student.decoder_hidden is not None and teacher.decoder_hidden is not None:
        targets = labels.get("labels")
        # target ids are padded with -100; a cloze has two decoder positions, both real, and one label an example
        real = torch.ones_like(student.decoder_hidden[..., 0], dtype=torch.bool)
        real = targets != IGNORED if targets is not None and targets.dim() == 2 else real
        loss = loss + _relative_mse([student.decoder_hidden], [teacher.decoder_hidden], real).squeeze(0)
    return loss


def _released(student: TaskOutput, teacher: TaskOutput, mask: Tensor) -> Tensor:
    real = mask.unsqueeze(-1).float()
    loss = F.mse_loss(student.encoder_hidden[-1].float() * real, teacher.encoder_hidden[-1].float() * real)
    if student.decoder_hidden is not None and teacher.decoder_hidden is not None:
        loss = loss + F.mse_loss(student.decoder_hidden.float(), teacher.decoder_hidden.float())
    return loss


def _logits(
    kind: Kind, student: Tensor, teacher: Tensor, mask: Tensor, labels: Mapping[str, Tensor], temperature: float
) -> Tensor:
    s, t = student.float(), teacher.float()
    if kind == "regression":
        return F.mse_loss(s, t)
    keep = labels["labels"] != IGNORED if kind == "qa" and "labels" in labels else None
    if keep is not None:
        s, t = s[keep], t[keep]
    elif kind == "qa":
        s, t = (x.masked_fill(~mask.unsqueeze(-1), -1e4).transpose(1, 2).flatten(0, 1) for x in (s, t))
    log_s, log_t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    loss = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
    return loss if keep is None else of_all(loss, keep)


def task_loss(kind: Kind, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
    """Return the task's own loss on its labels.

    Parameters
    ----------
    kind
        Kind of the task.
    logits
        As in ``TaskOutput``.
    labels
        ``labels``, or for span QA ``start_positions`` and ``end_positions``.
    """
    logits = logits.float()
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels["labels"].float())
    if kind == "qa" and "start_positions" in labels:
        start = F.cross_entropy(logits[..., 0], labels["start_positions"])
        return (start + F.cross_entropy(logits[..., 1], labels["end_positions"])) / 2
    target = labels["labels"]
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED)
    return of_all(loss, target != IGNORED) if target.dim() == 2 else loss
