"""FFN-only token merging: similar vectors share one row of each encoder FFN, and part again behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import layer_macs
from bench.methods.merging import PROTECTED, Counts, Merging, matching_macs, merged_by

if TYPE_CHECKING:
    from bench.backbones.encoder import Encoder


def rounds(n: int, rows: int) -> Iterator[int]:
    """Yield how many vectors each round of matching starts from, until ``rows`` of ``n`` are left."""
    apart = min(PROTECTED, rows - 1)
    while n > rows:
        yield n
        n -= min(n - rows, (n - apart) // 2)


@dataclass(frozen=True)
class FFNTokenMerging(Merging):
    """Variator without parameters: vectors are merged by similarity, not by place, around each encoder FFN alone.

    The matching is that of token merging (Bolya et al.), repeated until few enough rows are left, since one round can
    merge away no more than half of the vectors. Every layer starts anew, and the attention sees all vectors.
    """

    name = "ffn_token_merging"
    paper = "Variator's place for the matching of Bolya et al., Token Merging, ICLR 2023"
    version = 1
    summary = "run each encoder FFN once for every group of similar vectors"
    trains = "nothing; with finetune, all weights"
    saves = "FFN rows in every encoder layer"
    knob = "share of an input's vectors that get no FFN row of their own"
    limit = "the attention stays whole, and each FFN runs on at least one row"

    def counts(self, spec: BackboneSpec, n: int, share: float) -> list[int]:
        """Return on how many rows the FFN of each layer runs for ``n`` vectors."""
        merged = [merged_by(share, n, layers) for layers in range(spec.encoder_layers + 1)]
        return [max(1, n - (upper - lower)) for lower, upper in pairwise(merged)]

    def macs(self, spec: BackboneSpec, n: int, share: float) -> int:
        """MACs of the encoder, the matching included, on one unpadded input of ``n`` tokens."""
        return sum(
            layer_macs(spec, n, n, rows) + sum(matching_macs(spec, left) for left in rounds(n, rows))
            for rows in self.counts(spec, n, share)
        )

    def attach(self, encoder: Encoder, counts: Counts) -> None:
        """Put a merging and its undoing around every FFN."""
        from bench.backbones.encoder import EncoderLayer
        from bench.methods.bipartite import MergedFFN

        for i, layer in enumerate(encoder.layers):
            assert isinstance(layer, EncoderLayer)
            layer.ffn = MergedFFN(layer.ffn, i, counts)
