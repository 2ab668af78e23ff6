"""Time the split decompression against the released concatenation, interleaved in one process.

    python benchmarks/split_form.py [--d-model 768] [--k 4]

Prints the median of the paired ratios split / concatenated, and the ratio of their FLOPs.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor, nn

from bench.measure.latency import interleaved, median_ratio
from bench.plugins.layers import CompressionPair


class Concatenated(nn.Module):
    """The released form: W1 [y; u] on a repeated y."""

    def __init__(self, pair: CompressionPair) -> None:
        super().__init__()
        self.pair = pair
        self.w1 = nn.Linear(2 * pair.d_model, pair.w2.in_features)
        with torch.no_grad():
            self.w1.weight.copy_(torch.cat((pair.w1_y.weight, pair.w1_u.weight), dim=1))
            self.w1.bias.copy_(pair.w1_u.bias)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """Map (batch, n/k, d) and (batch, n, d) -> (batch, n, d)."""
        y = y.repeat_interleave(self.pair.k, dim=1)
        expanded: Tensor = y + self.pair.w2(torch.tanh(self.w1(torch.cat((y, u), dim=-1))))
        return expanded


@click.command()
@click.option("--d-model", default=768, show_default=True)
@click.option("--k", default=4, show_default=True)
def main(d_model: int, k: int) -> None:
    """Print one line a shape."""
    torch.manual_seed(0)
    pair = CompressionPair(d_model, k)
    concatenated = Concatenated(pair)
    r = pair.w2.in_features
    for batch, n in ((1, 128), (32, 128), (8, 512)):
        u, y = torch.randn(batch, n, d_model), torch.randn(batch, n // k, d_model)
        with torch.inference_mode():
            torch.testing.assert_close(concatenated(y, u), pair.decompress(y, u), atol=1e-5, rtol=1e-5)
        shape = {"input_ids": torch.empty(batch, n)}
        latency = interleaved(
            lambda input_ids, y=y, u=u: concatenated(y, u),
            lambda input_ids, y=y, u=u: pair.decompress(y, u),
            shape,
            torch.device("cpu"),
            min_samples=30,
            max_samples=200,
        )
        macs = (d_model * r / k + 2 * d_model * r) / (3 * d_model * r)
        click.echo(f"batch {batch} x {n}: time {median_ratio(latency):.2f}, FLOPs {macs:.2f} of the concatenated form")


if __name__ == "__main__":
    main()
