"""Answers to exercises.py; open them once you have tried. The project's tests check them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tasks import rows_of
from mega import MegaBase, MegaConfig, MegaForCausalLM, MegaModel


def half_life(p: float, delta: float) -> float:
    """A step leaves the fraction q = 1 - p delta; q^l = 1/2 at l = ln(1/2) / ln q."""
    return math.log(0.5) / math.log(1 - p * delta)


def recurrence(x: Tensor, u: Tensor, q: Tensor, g: Tensor) -> Tensor:
    h = torch.zeros_like(u)
    ys = []
    for x_t in x:
        h = q * h + u * x_t
        ys.append((g * h).sum())
    return torch.stack(ys)


def kernel(ema, length: int) -> Tensor:
    """The response to 1, 0, 0, ... is the kernel."""
    impulse = torch.zeros(length, dtype=torch.float64)
    impulse[0] = 1
    return ema(impulse)


def join(first: tuple, second: tuple) -> tuple:
    """q2 (q1 h + s1) + s2 = (q1 q2) h + (q2 s1 + s2)."""
    q1, s1 = first
    q2, s2 = second
    return q1 * q2, q2 * s1 + s2


def complex_kernel(u: Tensor, q: Tensor, theta: Tensor, g: Tensor, length: int) -> Tensor:
    """(q e^{i theta})^l has the real part q^l cos(theta l)."""
    lags = torch.arange(length).unsqueeze(1)  # (length, 1)
    return (g * u * q**lags * torch.cos(theta * lags)).sum(dim=1)


def cached_numbers(config: MegaConfig, length: int) -> int:
    """EMA states, and keys and values of the unfinished chunk; those of a full one are dropped."""
    states = config.hidden_size * config.ema_projection_size
    positions = length % config.chunk_size if config.use_chunking else length
    each = config.shared_representation_size + config.intermediate_size
    return config.num_hidden_layers * (states + positions * each)


def first_seen(position: int, chunk: int, layers: int) -> int:
    """The start of its chunk: all layers share the same boundaries, so more layers do not help."""
    return position // chunk * chunk


@torch.no_grad()
def beam_search(model: MegaForCausalLM, ids: Tensor, new: int, beams: int) -> Tensor:
    out = model(ids, use_cache=True)
    scores = torch.zeros(1)  # of the prefixes; at first there is one
    prefixes = ids
    for step in range(new):
        log_p = out.logits[:, -1].log_softmax(-1)  # (prefixes, vocabulary)
        longer = (scores.unsqueeze(1) + log_p).flatten()
        scores, best = longer.topk(min(beams, len(longer)))
        parent = best // log_p.shape[1]
        token = (best % log_p.shape[1]).unsqueeze(1)
        prefixes = torch.cat([prefixes[parent], token], dim=1)
        if step + 1 < new:
            out = model(token, cache=rows_of(out.cache, parent), use_cache=True)
    return prefixes[:1]


class DynamicTanh(torch.nn.Module):
    def __init__(self, size: int, eps: float, affine: bool):
        super().__init__()
        self.affine = affine
        self.alpha = torch.nn.Parameter(torch.tensor(0.5))
        if affine:
            self.gain = torch.nn.Parameter(torch.ones(size))
            self.shift = torch.nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x)
        return self.gain * y + self.shift if self.affine else y


class SequenceRegression(MegaBase):
    def __init__(self, config: MegaConfig):
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids, attention_mask=None, labels=None):
        out = self.mega(input_ids, attention_mask)
        logits = self.classifier(out.last_hidden_state.mean(dim=1))
        loss = None if labels is None else F.l1_loss(logits.squeeze(-1), labels)
        return out._replace(logits=logits, loss=loss)
