"""A method: the upper layers of the encoder are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods.base import Count, Method, Setting
from bench.methods.budget import off_budget, refusal
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


@dataclass(frozen=True)
class LowerLayers(Method):
    """The lowest layers of the encoder, as many as the ratio pays for, and perhaps its last ones.

    Attributes
    ----------
    last
        How many of the kept layers are the encoder's last instead.
    """

    name = "lower_layers"
    paper = "Sajjad et al., On the Effect of Dropping Layers of Pre-trained Transformer Models, CSL 2023"
    version = 1
    summary = "leave out the upper encoder layers"
    trains = "nothing"
    saves = "encoder layers"
    knob = "encoder layers that are kept"
    frozen = True
    uses = frozenset({"ratio"})

    last: Count = 0

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return how many layers cost no more than the plugin at k; all layers cost the same."""
        layers, budget = backbone.encoder_layers, remaining(backbone, int(ratio or 0), lengths)
        kept = min(layers, int(budget * layers + 1e-9))
        if kept < 1:
            raise Unreachable(f"one of {layers} layers costs more than the {budget:.1%} asked for")
        share = kept / layers
        return Setting({"layers": kept}, share, added=0, note=off_budget(f"{kept} of {layers} layers", share, budget))

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Return a model that shares the teacher's weights and runs fewer of its layers."""
        # torch is imported here, and not above: a plan must not wait for it
        from bench.backbones.surgery import Structure, cut
        from bench.backbones.write_out import write_out, written_encoder

        model = write_out(teacher.model)
        whole = Structure.whole(written_encoder(model))
        layers, kept = len(whole.layers), ctx.setting.knob["layers"]
        last = min(self.last, kept)
        chosen = (*range(kept - last), *range(layers - last, layers))
        heads, neurons = (tuple(each[i] for i in chosen) for each in (whole.heads, whole.neurons))
        cut(written_encoder(model), Structure(chosen, heads, neurons))
        return model
