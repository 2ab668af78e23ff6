"""The compression layers: merge k neighbouring vectors into one, run the frozen FFN on them, expand again.

Source: Xiao et al., "Variator", Findings of EMNLP 2023, section 3, and the authors' released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CompressionPair(nn.Module):
    """The hidden compression and hidden decompression layers of one encoder FFN.

    For u of length n and width d, in groups of k consecutive positions::

        s_g  = W_s [u_gk+1; ...; u_gk+k] + b_s          a_g = softmax(s_g)          c_g = sum_j a_gj u_gk+j
        y_g  = FFN(c_g)                                  (frozen, on n/k rows)
        z_i  = y_g(i) + W_2 tanh(W_1 [y_g(i); u_i] + b_1) + b_2

    ``W_1`` is stored as its two halves: the y half then runs on the short sequence, and neither a concatenation nor a
    repeated tensor is made.

    Parameters
    ----------
    d_model
        Width d of the hidden vectors.
    k
        How many neighbouring vectors are merged into one, at least 2.
    bottleneck
        Width of the decompression adapter (64 in the released code).
    mask_padding
        Whether padding is left out of scores, softmax and mean. The released code has no mask.
    """

    def __init__(self, d_model: int, k: int, bottleneck: int = 64, mask_padding: bool = True) -> None:
        super().__init__()
        if k < 2:
            raise ValueError(f"k must be at least 2, got {k}")
        self.d_model, self.k, self.mask_padding = d_model, k, mask_padding
        self.score = nn.Linear(k * d_model, k)
        self.w1_y = nn.Linear(d_model, bottleneck, bias=False)
        self.w1_u = nn.Linear(d_model, bottleneck)
        self.w2 = nn.Linear(bottleneck, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does: scores std sqrt(2/(d k)), adapter std 0.01, biases 0."""
        nn.init.normal_(self.score.weight, std=math.sqrt(2.0 / (self.d_model * self.k)))
        for linear in (self.w1_y, self.w1_u, self.w2):
            nn.init.normal_(linear.weight, std=0.01)
        for linear in (self.score, self.w1_u, self.w2):
            nn.init.zeros_(linear.bias)

    def compress(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """Merge groups of k.

        Parameters
        ----------
        u
            Hidden vectors, (batch, n, d) with n a multiple of k.
        mask
            True where a position holds a token, (batch, n); ``None`` for no padding.

        Returns
        -------
        Tensor
            Merged vectors, (batch, n/k, d); a group without a token gives zeros.
        """
        batch, n, d = u.shape
        groups = u.reshape(batch, n // self.k, self.k, d)
        if mask is None or not self.mask_padding:
            weights = self.score(groups.flatten(2)).softmax(-1)
        else:
            real = mask.reshape(batch, n // self.k, self.k)
            groups = groups * real.unsqueeze(-1).to(u.dtype)
            scores = self.score(groups.flatten(2))
            weights = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(-1)
        return torch.matmul(weights.unsqueeze(2), groups.to(weights.dtype)).squeeze(2)

    def decompress(self, y: Tensor, u: Tensor) -> Tensor:
        """Expand the FFN's output to the full length.

        Parameters
        ----------
        y
            FFN output of the merged vectors, (batch, n/k, d).
        u
            FFN input of every position, (batch, n, d).

        Returns
        -------
        Tensor
            One vector a position, (batch, n, d).
        """
        batch, n, d = u.shape
        inner = self.w1_u(u).reshape(batch, n // self.k, self.k, -1) + self.w1_y(y).unsqueeze(2)
        z: Tensor = self.w2(torch.tanh(inner)) + y.unsqueeze(2)
        return z.reshape(batch, n, d)
