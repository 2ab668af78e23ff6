"""The encoder of either family, written out: a method can change what each layer is and how long its sequence is.

`bench.backbones.write_out` puts it in the place of the transformers encoder; unchanged, the two compute the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BackboneError


class Overhead(nn.Module):
    """A module whose work is the method's own and not the backbone's; `bench.costing` puts its FLOPs down apart."""

    def backbone_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules inside that are the backbone's own, whose work is no overhead."""
        return ()


@dataclass(frozen=True)
class Tokens:
    """What flows from layer to layer, with B examples, now n vectors long, of N that went in.

    Attributes
    ----------
    x
        Hidden vectors, (B, n, d).
    mask
        True at real vectors, (B, n).
    special
        True at special tokens, such as the one that the head reads, (B, n); ``None`` without `Encoder.protect`.
    positions
        Place in the input of each vector, (B, n); ``None`` while all N are there.
    index
        Where each input position is now, (B, N), or -1 if it was removed; ``None`` while all N are there.
    aside
        Last state of each removed position, (B, N, d); ``None`` if none was removed.
    size
        How many input positions a vector stands for, (B, n), below 1 where it is partly removed; ``None`` while each
        stands for itself. Its logarithm is added to the attention's logits (Bolya et al., Token Merging, ICLR 2023,
        section 3).
    gate
        Share of what a sublayer changes that each vector takes on, (B, n): at 0 it stays as it is, like one that was
        removed. ``None`` where all take on everything.
    bias
        What the attention adds to its logits, (B or 1, heads or 1, n or 1, n); ``None`` where it adds nothing.
    length
        Real vectors of each example that went in, (B,); ``None`` while all N are there.
    """

    x: Tensor
    mask: Tensor
    special: Tensor | None = None
    positions: Tensor | None = None
    index: Tensor | None = None
    aside: Tensor | None = None
    size: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None
    length: Tensor | None = None

    def replace(self, **changes: Any) -> Tokens:
        """Return a copy with other fields."""
        return dataclasses.replace(self, **changes)

    def real_length(self) -> Tensor:
        """Return how many of the N input positions are real, (B,), wherever their vectors are now."""
        return self.mask.sum(1) if self.length is None else self.length

    def full_length(self) -> Tensor:
        """Return a state for each of the N input positions, (B, N, d).

        A merged position takes the vector that it was merged into, a removed one the state that it was removed with.
        """
        if self.index is None:
            return self.x
        here = self.index.clamp_min(0).unsqueeze(-1)
        full = self.x.gather(1, here.expand(-1, -1, self.x.shape[-1]))
        if self.aside is None:
            return full
        return torch.where((self.index < 0).unsqueeze(-1), self.aside.to(full.dtype), full)

    def keep(self, kept: Tensor) -> Tokens:
        """Remove vectors for good: gather the kept ones, padded at the end to the longest example.

        Parameters
        ----------
        kept
            True at the vectors to keep, (B, n), of which none is padding and at least one an example is real.
        """
        batch, n, d = self.x.shape
        longest = int(kept.sum(1).max())
        # a stable sort keeps the order of the text
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        where = torch.arange(n, device=kept.device).expand(batch, n) if self.positions is None else self.positions
        rank = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        if self.index is None:
            index, aside = rank, self.x
        else:
            index = torch.where(self.index < 0, -1, rank.gather(1, self.index.clamp_min(0)))
            aside = self.full_length()
        return self.replace(
            x=self.x.gather(1, order.unsqueeze(-1).expand(-1, -1, d)),
            mask=kept.gather(1, order),
            special=None if self.special is None else self.special.gather(1, order),
            positions=where.gather(1, order),
            index=index,
            aside=aside,
            size=None if self.size is None else self.size.gather(1, order),
            gate=None if self.gate is None else self.gate.gather(1, order),
            bias=None,
            length=self.real_length(),
        )

    def changed_to(self, x: Tensor) -> Tokens:
        """Return a copy whose vectors have become ``x``, (B, n, d), as far as the gate lets them."""
        if self.gate is not None:
            x = self.x + self.gate.unsqueeze(-1).to(x.dtype) * (x - self.x)
        return self.replace(x=x)


class Seen(NamedTuple):
    """What an attention computed on its way.

    Attributes
    ----------
    keys
        Keys, (B, heads, n, head width).
    probabilities
        Attention of each query to each key, (B, heads, n, n); ``None`` unless the layer's step needs it.
    """

    keys: Tensor
    probabilities: Tensor | None


class TokenStep(Overhead):
    """Changes the sequence between the attention and the FFN of one layer.

    ``input_dependent`` says that its cost differs between inputs of one length, so that each example is counted.
    """

    needs_probabilities = False
    input_dependent = False

    def forward(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Return the changed sequence; ``tokens.x`` is the stream behind the attention's residual addition."""
        raise NotImplementedError


class AroundFFN(Overhead):
    """Stands in for one FFN and runs it on fewer rows.

    Parameters
    ----------
    inner
        The backbone's FFN, (B, rows, d) -> (B, rows, d).
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def backbone_modules(self) -> tuple[nn.Module, ...]:
        """Return the FFN."""
        return (self.inner,)

    def forward(self, u: Tensor, tokens: Tokens, seen: Seen | None) -> Tensor:
        """Map the FFN's input u, (B, n, d), to its output, (B, n, d)."""
        raise NotImplementedError


class Attention(nn.Module):
    """Self-attention of one layer, between its norm and its residual addition.

    Parameters
    ----------
    q, k, v, o
        Its projections.
    n_heads
        Heads of the backbone.
    scale
        Factor of the logits.
    dropout
        Share of the probabilities that is dropped in training.
    """

    heads: Tensor

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, n_heads: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = q, k, v, o
        self.n_heads, self.d_head = n_heads, q.out_features // n_heads
        self.scale, self.dropout = scale, dropout
        self.register_buffer("heads", torch.arange(n_heads, device=q.weight.device), persistent=False)

    def forward(
        self, x: Tensor, bias: Tensor | None, probabilities: bool = False, keys: Tensor | None = None
    ) -> tuple[Tensor, Seen | None]:
        """Attend.

        Parameters
        ----------
        x
            Vectors, (B, n, d).
        bias
            As in `Tokens`, over the heads of the backbone.
        probabilities
            Whether `Seen` is to hold the probabilities, which a fused kernel does not give.
        keys
            Vectors that keys and values are made of, (B, m, d), with a bias for m of them; ``x`` by default.

        Returns
        -------
        tuple
            What is added to the residual stream, (B, n, d), and what was seen; ``None`` where no head is left.
        """
        if not len(self.heads):
            return cast(Tensor, self.o(x.new_zeros(*x.shape[:2], 0))), None
        keys = x if keys is None else keys
        q, k, v = self._split(self.q(x)), self._split(self.k(keys)), self._split(self.v(keys))
        if bias is not None:
            bias = bias if bias.shape[1] in (1, len(self.heads)) else bias[:, self.heads]
            bias = bias.to(q.dtype)
        p = self.dropout if self.training else 0.0
        weights = None
        if probabilities:
            logits = torch.matmul(q * self.scale, k.transpose(2, 3))
            weights = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32).to(q.dtype)
            mixed = torch.matmul(F.dropout(weights, p), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=self.scale)
        return cast(Tensor, self.o(mixed.transpose(1, 2).flatten(2))), Seen(k, weights)

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.view(*x.shape[:2], len(self.heads), self.d_head)
        return split.transpose(1, 2)


class EncoderLayer(nn.Module):
    """One layer: attention, an optional `TokenStep`, FFN.

    Parameters
    ----------
    attention, ffn
        The two sublayers.
    attention_norm, ffn_norm
        Their norms: before the sublayer (T5), or behind the residual addition (BERT).
    pre_norm
        Which of the two.
    dropout
        Share of each sublayer's output that is dropped in training.
    """

    def __init__(
        self,
        attention: Attention,
        attention_norm: nn.Module,
        ffn: nn.Module,
        ffn_norm: nn.Module,
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm, self.ffn, self.ffn_norm = attention, attention_norm, ffn, ffn_norm
        self.pre_norm, self.dropout = pre_norm, nn.Dropout(dropout)
        self.step: TokenStep | None = None

    def forward(self, tokens: Tokens) -> Tokens:
        """Run the layer; the sequence may come out shorter."""
        x = tokens.x
        probabilities = self.step is not None and self.step.needs_probabilities
        z, seen = self.attention(self.attention_norm(x) if self.pre_norm else x, tokens.bias, probabilities)
        x = x + self.dropout(z)
        tokens = tokens.changed_to(x if self.pre_norm else self.attention_norm(x))
        if self.step is not None and seen is not None:
            tokens = self.step(tokens, seen)
        x = tokens.x
        u = self.ffn_norm(x) if self.pre_norm else x
        z = self.ffn(u, tokens, seen) if isinstance(self.ffn, AroundFFN) else self.ffn(u)
        x = x + self.dropout(z)
        return tokens.changed_to(x if self.pre_norm else self.ffn_norm(x))


class RelativePosition(nn.Module):
    """T5's bias of the attention's logits by distance, which all layers share.

    Parameters
    ----------
    embedding
        Bias by bucket and head, (buckets, heads).
    max_distance
        Distance from which all share one bucket.

    Notes
    -----
    Raffel et al., "Exploring the limits of transfer learning", JMLR 2020, section 2.1: half of the buckets of each
    direction hold one distance each, the others grow with its logarithm.
    """

    def __init__(self, embedding: nn.Embedding, max_distance: int) -> None:
        super().__init__()
        self.embedding, self.max_distance = embedding, max_distance

    def forward(self, positions: Tensor) -> Tensor:
        """Map places in the input, (B, n), to a bias, (B, heads, n, n)."""
        distance = positions.unsqueeze(1) - positions.unsqueeze(2)
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        far = distance.abs().clamp_min(1).float() / exact
        grown = exact + (far.log() / math.log(self.max_distance / exact) * (half - exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), grown.clamp_max(half - 1))
        return cast(Tensor, self.embedding(bucket + half * (distance > 0))).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Encoder layers between the embeddings and the decoder or head.

    Parameters
    ----------
    layers
        The layers, bottom first.
    position
        Relative position bias (T5), or ``None``.
    final_norm
        Norm of the last layer's stream (T5), or ``None``.
    dropout
        Share of the final states that is dropped in training.

    Attributes
    ----------
    record
        Whether a forward pass leaves hidden states for `take_hidden`.
    special_ids
        Token ids that `protect` named, or ``None``.
    """

    special_ids: Tensor | None

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        position: RelativePosition | None = None,
        final_norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position, self.final_norm, self.dropout = position, final_norm, nn.Dropout(dropout)
        self.record = False
        self._hidden: tuple[Tensor, ...] = ()
        self.register_buffer("special_ids", None, persistent=False)

    def protect(self, ids: Sequence[int]) -> None:
        """Let `Tokens.special` be true wherever the input holds one of these token ids."""
        like = next(self.parameters())
        self.special_ids = torch.tensor(sorted(set(ids)), dtype=torch.long, device=like.device)

    def special(self, ids: Tensor | None) -> Tensor | None:
        """Return where ``ids``, (B, N), are protected; ``None`` unless `protect` was called.

        Raises
        ------
        BackboneError
            If ids are needed and the model was called with embeddings.
        """
        if self.special_ids is None:
            return None
        if ids is None:
            raise BackboneError("this model protects special tokens, so that it must be called with input_ids")
        return torch.isin(ids, self.special_ids)

    def forward(self, x: Tensor, mask: Tensor, special: Tensor | None = None) -> Tensor:
        """Return the final states, (B, N, d).

        Parameters
        ----------
        x
            Embeddings, (B, N, d).
        mask, special
            True at real and at special tokens, (B, N).
        """
        tokens = self.start(x, mask, special)
        hidden: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            tokens = self.run(layer, tokens)
            if self.record and i + 1 < len(self.layers):
                follower = cast(EncoderLayer, self.layers[i + 1])
                full = tokens.full_length()
                hidden.append(follower.attention_norm(full) if follower.pre_norm else full)
        out = self.finish(tokens)
        self._hidden = (*hidden, out) if self.record else ()
        return out

    def take_hidden(self) -> tuple[Tensor, ...]:
        """Return and forget what the last forward pass recorded.

        It is the output of every layer at full length as the next one reads it: behind that layer's norm where the norm
        comes first, and the last behind the final norm.
        """
        hidden, self._hidden = self._hidden, ()
        return hidden

    def start(self, x: Tensor, mask: Tensor, special: Tensor | None) -> Tokens:
        """Return what the first layer is given."""
        return Tokens(x, mask, special)

    def run(self, layer: nn.Module, tokens: Tokens) -> Tokens:
        """Run one layer, with the attention's bias made anew where the sequence has changed."""
        if tokens.bias is None:
            tokens = tokens.replace(bias=self._bias(tokens))
        return cast(Tokens, layer(tokens))

    def finish(self, tokens: Tokens) -> Tensor:
        """Return the final states at full length."""
        x = tokens.full_length()
        return cast(Tensor, self.dropout(x if self.final_norm is None else self.final_norm(x)))

    def _bias(self, tokens: Tokens) -> Tensor | None:
        bias: Tensor | None = None
        if self.position is not None:
            positions = tokens.positions
            if positions is None:
                positions = torch.arange(tokens.x.shape[1], device=tokens.x.device).unsqueeze(0)
            bias = self.position(positions)
        if tokens.size is not None:
            log_size = tokens.size.log()[:, None, None]
            bias = log_size if bias is None else bias + log_size
        if not tokens.mask.all():
            pad = torch.zeros_like(tokens.mask, dtype=torch.float32).masked_fill(~tokens.mask, torch.finfo().min)
            bias = pad[:, None, None] if bias is None else bias + pad[:, None, None]
        return bias
