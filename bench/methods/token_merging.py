"""Token merging: similar vectors become one in every encoder layer, and stay one from there on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import layer_macs
from bench.methods.merging import PROTECTED, Counts, Merging, matching_macs, merged_by

if TYPE_CHECKING:
    from bench.backbones.encoder import Encoder


@dataclass(frozen=True)
class TokenMerging(Merging):
    """Bipartite soft matching between attention and FFN of every encoder layer, and attention weighted by size.

    As in the paper every layer merges the same number of vectors, here a share of each input's own length. What reads
    the encoder's output finds the merged vector at the place of each that went into it.
    """

    name = "token_merging"
    paper = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023"
    version = 1
    summary = "merge the most similar vectors between attention and FFN of every encoder layer, for good"
    trains = "nothing; with finetune, all weights"
    saves = "vectors: every encoder layer runs on fewer than the one before"
    knob = "share of an input's vectors that each encoder layer merges away"
    limit = "a layer can merge away no more than every other vector"

    def counts(self, spec: BackboneSpec, n: int, share: float) -> list[int]:
        """Return how many of ``n`` vectors there are behind the attention of each layer."""
        left, counts = n, []
        for layer in range(1, spec.encoder_layers + 1):
            most = max(0, left - PROTECTED) // 2
            left = max(n - merged_by(share, n, layer), left - most)
            counts.append(left)
        return counts

    def macs(self, spec: BackboneSpec, n: int, share: float) -> int:
        """MACs of the encoder, the matching included, on one unpadded input of ``n`` tokens."""
        return sum(
            layer_macs(spec, before, before, after) + (matching_macs(spec, before) if after < before else 0)
            for before, after in pairwise([n, *self.counts(spec, n, share)])
        )

    def attach(self, encoder: Encoder, counts: Counts) -> None:
        """Put a merging step into every layer."""
        from bench.backbones.encoder import EncoderLayer
        from bench.methods.bipartite import MergeStep

        for i, layer in enumerate(encoder.layers):
            assert isinstance(layer, EncoderLayer)
            layer.step = MergeStep(i, counts)
