"""Dynamic int8 quantisation: no FLOP less, but smaller and faster; a reference beside the methods that save FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import MachineError
from bench.methods.base import Method, Setting

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


@dataclass(frozen=True)
class Quantization(Method):
    """Every matrix of the encoder, and of T5's decoder, in int8; embeddings, norms, biases and the head stay in fp32.

    Weights have a step size for each row and inputs one for each token, found as they come: no data are needed. (In
    ZeroQuant's words, group-wise weights whose groups are rows, and token-wise activations, without its distillation.)
    T5's head is its embedding matrix, which has to stay in fp32 for the embeddings.

    Each token's step size is its own, so that padding and other examples are no part of an answer. But where they make
    float sums come out otherwise in the last bit, a value between two whole numbers may be rounded to the other one,
    which shows in the third digit of a logit. That is why the method does not call itself ``batch_invariant``.
    """

    name = "quantization"
    paper = "Yao et al., ZeroQuant, NeurIPS 2022"
    version = 1
    summary = "multiply in int8: weights are rounded once, activations token by token as they come"
    trains = "nothing"
    saves = "bytes and time, no FLOPs"
    batch_invariant = False
    uses = frozenset()

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the number of bits; all FLOPs remain."""
        return Setting({"bits": 8}, added=0)

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Round the matrices of a copy that shares all else with the teacher.

        Raises
        ------
        MachineError
            On a GPU, whose int8 products refuse the short batches that a decoder has.
        """
        from bench.backbones.model import share_weights
        from bench.backbones.sites import EncoderView
        from bench.methods.int8_linear import to_int8
        from bench.training.student import get_student

        if ctx.device.type != "cpu":
            raise MachineError(f"{self.name} runs on the CPU alone; use --device cpu")

        def build(_: Any) -> TaskModel:
            model = share_weights(teacher.model)
            decoder = [model.model.decoder] if ctx.spec.family == "t5" else []
            for part in (*EncoderView(model).modules, *decoder):
                to_int8(part)
            return model

        def make(_: Path) -> tuple[TaskModel, dict[str, Any]]:
            return build({}), {"stages": []}

        return get_student(teacher, ctx, build, make)
