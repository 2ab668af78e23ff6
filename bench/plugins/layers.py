"""The compression layers: merge k neighbouring vectors into one, run the frozen FFN on them, expand again.

Source: Xiao et al., "Variator", Findings of EMNLP 2023, section 3, and the authors' released code; how the other ways
to compress and to expand are computed is our choice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.closed_form import Compression, Decompression


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
    compression
        ``attention`` as above. ``mean``: c_g = sum_j u_gk+j / k, without a parameter. ``conv``, a depthwise convolution
        of stride k: c_g = sum_j w_j * u_gk+j, with a weight for each place in the group and each of the d channels.
        Where only m of the k are tokens, both are k/m times the sum over these.
    decompression
        ``adapter`` as above. ``copy``: z_i = y_g(i), without a parameter.
    """

    def __init__(
        self,
        d_model: int,
        k: int,
        bottleneck: int = 64,
        mask_padding: bool = True,
        compression: Compression = "attention",
        decompression: Decompression = "adapter",
    ) -> None:
        super().__init__()
        if k < 2:
            raise ValueError(f"k must be at least 2, got {k}")
        self.d_model, self.k, self.mask_padding = d_model, k, mask_padding
        self.compression, self.decompression = compression, decompression
        if compression == "attention":
            self.score = nn.Linear(k * d_model, k)
        elif compression == "conv":
            self.weight = nn.Parameter(torch.empty(k, d_model))
        if decompression == "adapter":
            self.w1_y = nn.Linear(d_model, bottleneck, bias=False)
            self.w1_u = nn.Linear(d_model, bottleneck)
            self.w2 = nn.Linear(bottleneck, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does: scores std sqrt(2/(d k)), adapter std 0.01, biases 0.

        A convolution, which that code does not have, starts as a mean.
        """
        self.reset_to_mean()
        if self.compression == "attention":
            nn.init.normal_(self.score.weight, std=math.sqrt(2.0 / (self.d_model * self.k)))
        if self.decompression == "adapter":
            for linear in (self.w1_y, self.w1_u, self.w2):
                nn.init.normal_(linear.weight, std=0.01)
            for linear in (self.w1_u, self.w2):
                nn.init.zeros_(linear.bias)

    def reset_to_mean(self) -> None:
        """Let ``compress`` be the mean of the tokens of a group."""
        if self.compression == "attention":
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)
        elif self.compression == "conv":
            nn.init.constant_(self.weight, 1 / self.k)

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
        real = mask.reshape(batch, n // self.k, self.k) if mask is not None and self.mask_padding else None
        if real is not None:
            groups = groups * real.unsqueeze(-1).to(u.dtype)
        if self.compression == "attention":
            scores = self.score(groups.flatten(2))
            if real is not None:
                scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1)
            return torch.matmul(weights.unsqueeze(2), groups.to(weights.dtype)).squeeze(2)
        merged = groups.mean(2) if self.compression == "mean" else self._convolve(groups)
        if real is None:
            return merged
        return merged * (self.k / real.sum(-1, keepdim=True).clamp_min(1)).to(merged.dtype)

    def _convolve(self, groups: Tensor) -> Tensor:
        # channels come last in memory, which a convolution over two axes can read as it is and one over one axis cannot
        image = groups.flatten(1, 2).unsqueeze(2).permute(0, 3, 1, 2)
        merged = F.conv2d(image, self.weight.t()[:, None, :, None], stride=(self.k, 1), groups=self.d_model)
        return merged.squeeze(3).transpose(1, 2)

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
        if self.decompression == "copy":
            return y.repeat_interleave(self.k, dim=1)
        inner = self.w1_u(u).reshape(batch, n // self.k, self.k, -1) + self.w1_y(y).unsqueeze(2)
        z: Tensor = self.w2(torch.tanh(inner)) + y.unsqueeze(2)
        return z.reshape(batch, n, d)
