"""Layers that differ from MEGA's in one part, for the experiments and the exercises."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from mega import (
    DampedEMA,
    MegaConfig,
    MegaForCausalLM,
    MovingAverageGatedAttention,
    attention_weights,
    bias_matrix,
    split_into_chunks,
)


class NoEMA(nn.Module):
    """No moving average: only SiLU(omega x) remains of the layer's smoothed input."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.residual_weight = nn.Parameter(torch.randn(config.hidden_size))

    def coefficients(self) -> tuple:
        return ()

    def forward(self, x: Tensor, mask=None, state=None, **_):
        return F.silu(x * self.residual_weight), x.new_zeros(len(x), 0)


class Undamped(DampedEMA):
    """The classical EMA, delta = 1 and q = 1 - p, with the initial u, q and g of a damped one.

    p starts as the damped one's p delta, and beta as its beta / delta.
    """

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        p = self.damping_factor.data.sigmoid()
        delta = self.decay_factor.data.sigmoid()
        self.damping_factor.data = torch.logit(p * delta)
        self.ema_expansion_matrix.data /= delta

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        u, _, g = super().coefficients()
        return u, 1 - self.damping_factor.sigmoid().squeeze(-1), g


class ComplexEMA(DampedEMA):
    """An EMA whose states also rotate, as in S4D and Megalodon: q e^{i theta} in place of q.

    Only the real part of the output counts. With the complex gamma g - i g' that gives the kernel
    k[l] = sum_n u q^l (g cos(theta l) + g' sin(theta l)), which can oscillate. A sequence must be
    read whole: there is no state to continue from.
    """

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        D = config.hidden_size
        N = config.ema_projection_size
        self.theta = nn.Parameter(math.pi / N * torch.arange(N).repeat(D, 1))  # as in S4D-Lin
        self.gamma_imaginary = nn.Parameter(torch.zeros(D, N))

    def kernel(self, length: int) -> Tensor:
        u, q, g = self.coefficients()
        lags = torch.arange(length, dtype=q.dtype)
        angle = self.theta.unsqueeze(-1) * lags  # (D, N, L)
        imaginary = self.gamma_imaginary / math.sqrt(g.shape[1])
        wave = g.unsqueeze(-1) * angle.cos() + imaginary.unsqueeze(-1) * angle.sin()
        return torch.einsum("dn,dnl,dnl->dl", u, q.unsqueeze(-1) ** lags, wave)

    def forward(self, x: Tensor, mask=None, state=None, **_):
        length = x.shape[1]
        wide = x.to(self.theta.dtype).mT
        spectrum = torch.fft.rfft(wide, 2 * length) * torch.fft.rfft(
            self.kernel(length), 2 * length
        )
        y = torch.fft.irfft(spectrum, 2 * length)[..., :length].mT
        return F.silu(y + self.residual_weight * x).to(x.dtype), None


class SlidingLayer(MovingAverageGatedAttention):
    """A query also sees the chunk before its own, as in Gecko. For whole, unpadded sequences."""

    def attend(self, queries, keys, values, mask) -> tuple[Tensor, Tensor]:
        B, L, _ = queries.shape
        C = self.config.chunk_size
        queries = split_into_chunks(queries, C)  # (B K, C, Z)
        keys = self.with_chunk_before(keys)  # (B K, 2C, Z)
        values = self.with_chunk_before(values)
        visible = torch.ones(C, 2 * C, dtype=torch.bool).tril(C)  # up to the query itself
        visible = visible.repeat(B, len(queries) // B, 1, 1)  # (B, K, C, 2C)
        visible[:, 0, :, :C] = False  # before the first chunk there is nothing
        bias = bias_matrix(self.rel_pos_bias(2 * C), C, 2 * C, 2 * C)  # (C, 2C)
        kind = self.config.attention_activation
        weights = attention_weights(queries, keys, bias, visible.flatten(0, 1), kind)
        outputs = self.weight_dropout(weights).to(values.dtype) @ values  # (B K, C, V)
        return outputs.view(B, -1, values.shape[-1])[:, :L], weights.unflatten(0, (B, -1))

    def with_chunk_before(self, x: Tensor) -> Tensor:
        """Cut x (B, L, ...) into chunks, each after the previous one or zeros: (B K, 2C, ...)."""
        C = self.config.chunk_size
        chunks = split_into_chunks(x, C).unflatten(0, (len(x), -1))  # (B, K, C, ...)
        before = F.pad(chunks[:, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat([before, chunks], dim=2).flatten(0, 1)


def new_model_with(s, tokenizer, ema=None, layer=None) -> MegaForCausalLM:
    """Make train.py's new model, with other classes for its moving averages or whole layers."""
    model = train.new_model(s, tokenizer)
    for block in model.mega.layers:
        if layer is not None:
            block.mega_layer = layer(model.config)
        if ema is not None:
            block.mega_layer.ema_gate = ema(model.config)
    return model
