"""Ten exercises. Write a function, then see whether its test passes:

    pytest data/lecture/exercises.py                 # all; an unwritten one fails
    pytest data/lecture/exercises.py -k half_life    # one of them

They follow the notebook, from the moving average to a head of your own. solutions.py has an answer
to each; open it once you have tried.
"""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

import mega
from data.lecture.variants import NoEMA
from mega import MegaBase, MegaConfig, MegaForCausalLM, ema_direct, ema_recurrent


def half_life(p: float, delta: float) -> float:
    """Return the number of steps after which half of what a damped EMA has read remains.

    p and delta are the paper's alpha and damping factor, between 0 and 1; steps may be fractional.
    """
    raise NotImplementedError("write half_life")


def recurrence(x: Tensor, u: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Return the EMA of one channel, by a loop over the steps: x (L,), u, q, g (N,) -> y (L,)."""
    raise NotImplementedError("write recurrence")


def kernel(ema, length: int) -> Tensor:
    """Return the kernel (length,) of any linear, time-invariant function `ema` from x to y (L,).

    You can't look inside it, but you may call it once, with an x of your choice.
    """
    raise NotImplementedError("write kernel")


def join(first: tuple, second: tuple) -> tuple:
    """Combine two segments of a recurrence into one.

    A segment (decay, new) maps a state h to decay * h + new; a single step is (q, u x).
    With this associative operation `scan` needs log2(K) rounds for K segments, instead of K.
    """
    raise NotImplementedError("write join")


def complex_kernel(u: Tensor, q: Tensor, theta: Tensor, g: Tensor, length: int) -> Tensor:
    """Return the kernel (length,) of a channel whose states also rotate, as in S4D and Megalodon.

    u, q, theta, g (N,) are real; h_t = q e^{i theta} h_{t-1} + u x_t, and y_t is the real part of
    the sum of g h_t. At theta = 0 that is MEGA's kernel.
    """
    raise NotImplementedError("write complex_kernel")


def cached_numbers(config: MegaConfig, length: int) -> int:
    """Return how many numbers a decoder's cache holds after `length` tokens of one sequence.

    The config may use chunking or not; there is no padding and no cross-attention.
    """
    raise NotImplementedError("write cached_numbers")


def first_seen(position: int, chunk: int, layers: int) -> int:
    """Return the first position that can affect the output at `position` of a decoder without EMA.

    `chunk` is its chunk size in tokens, `layers` its number of layers.
    """
    raise NotImplementedError("write first_seen")


def beam_search(model: MegaForCausalLM, ids: Tensor, new: int, beams: int) -> Tensor:
    """Return the likeliest continuation of ids (1, L) that beam search finds, (1, L + new).

    At each step keep the `beams` prefixes with the highest sum of log-probabilities. The model
    must read each token only once: continue from its cache. All tensors of a cache have the batch
    dimension first, and a cache is never modified, so prefixes that extend the same one can share
    its part of the cache.
    """
    raise NotImplementedError("write beam_search")


class DynamicTanh(torch.nn.Module):
    """A norm without statistics (Zhu et al. 2025): gain * tanh(alpha x) + shift.

    alpha is one learned number, initially 0.5. With `affine`, gain (size) and shift (size) are
    learned too, initially 1 and 0; without it they are left out. `eps` is not used here.
    """

    def __init__(self, size: int, eps: float, affine: bool):
        raise NotImplementedError("write DynamicTanh")


class SequenceRegression(MegaBase):
    """One number for each sequence: a linear `classifier` on the mean of its last hidden states.

    Logits are (B, 1), and with labels (B,) the loss is the mean absolute error.
    """

    def __init__(self, config: MegaConfig):
        raise NotImplementedError("write SequenceRegression")


# ------------------------------------------------------------------------------------------- tests


def coefficients(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make random u, q, g (D = 3, N = 4) in fp64."""
    torch.manual_seed(seed)
    u, g = torch.randn(2, 3, 4, dtype=torch.float64)
    return u, torch.rand(3, 4, dtype=torch.float64), g


@pytest.mark.parametrize(("p", "delta"), [(0.5, 0.5), (0.5, 1 - 1e-9), (0.9, 0.01), (0.02, 0.3)])
def test_half_life(p, delta):
    steps = half_life(p, delta)
    for whole in (math.floor(steps), math.ceil(steps)):  # read once, then left alone
        left = 1.0
        for _ in range(whole):
            left = (1 - p * delta) * left
        assert left >= 0.5 - 1e-9 if whole <= steps else left <= 0.5
    assert (1 - p * delta) ** steps == pytest.approx(0.5)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_recurrence(length):
    u, q, g = coefficients(length)
    x = torch.randn(1, length, 3, dtype=torch.float64)
    expected = ema_direct(x, u, q, g)
    for d in range(3):
        torch.testing.assert_close(recurrence(x[0, :, d], u[d], q[d], g[d]), expected[0, :, d])


def test_kernel():
    u, q, g = coefficients(0)
    for d in range(3):

        def ema(x, d=d):
            assert x.shape == (7,)
            return ema_direct(x.view(1, -1, 1).double(), *(t[d : d + 1] for t in (u, q, g))).view(
                -1
            )

        expected = mega.ema_kernel(u, q, g, 7)[d]
        torch.testing.assert_close(kernel(ema, 7), expected)


def test_join():
    u, q, g = (t[:1] for t in coefficients(1))
    x = torch.randn(1, 6, 1, dtype=torch.float64)
    steps = [(q, u * x[0, t]) for t in range(6)]
    left = right = steps[0]
    for step in steps[1:]:
        left = join(left, step)
    right = join(join(steps[0], steps[1]), join(join(steps[2], steps[3]), join(steps[4], steps[5])))
    h = torch.randn(1, 1, 4, dtype=torch.float64)
    expected = ema_recurrent(x, u, q, g, h)[1]
    for decay, new in (left, right):
        torch.testing.assert_close(decay * h + new, expected)


@pytest.mark.parametrize("length", [1, 6])
def test_complex_kernel(length):
    u, q, g = (t[0] for t in coefficients(2))
    theta = torch.tensor([0.0, 0.5, 2.0, math.pi], dtype=torch.float64)
    h = torch.zeros(4, dtype=torch.complex128)
    expected = []
    for x in [1.0] + [0.0] * (length - 1):
        h = torch.polar(q, theta) * h + u * x
        expected.append((g * h).sum().real)
    found = complex_kernel(u, q, theta, g, length)
    torch.testing.assert_close(found, torch.stack(expected))


def decoder(**changes) -> MegaConfig:
    values = {
        "vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "nffn_hidden_size": 8,
        "ema_projection_size": 3, "shared_representation_size": 4, "num_hidden_layers": 3,
        "is_decoder": True, "bidirectional": False,
    }  # fmt: skip
    return MegaConfig(**values | changes)


@pytest.mark.parametrize("chunk", [None, 1, 4, 7])
def test_cached_numbers(chunk):
    for sizes in ({}, {"hidden_size": 5, "ema_projection_size": 2, "num_hidden_layers": 1}):
        config = decoder(use_chunking=chunk is not None, chunk_size=chunk or -1, **sizes)
        model = MegaForCausalLM(config).eval()
        for length in (1, 3, 4, 7, 13):
            found = model.mega(torch.zeros(1, length, dtype=torch.long), use_cache=True).cache
            numbers = sum(t.numel() for layer in found.layers for t in layer[:3])
            assert cached_numbers(config, length) == numbers


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("chunk", [2, 5])
def test_first_seen(layers, chunk):
    config = decoder(use_chunking=True, chunk_size=chunk, num_hidden_layers=layers)
    model = MegaForCausalLM(config).double().eval()
    for block in model.mega.layers:
        block.mega_layer.ema_gate = NoEMA(config).double()
    for position in range(12):
        x = torch.randn(1, 12, 6, dtype=torch.float64, requires_grad=True)
        model(inputs_embeds=x).logits[0, position].sum().backward()
        seen = x.grad[0].abs().sum(-1).nonzero().flatten()
        assert first_seen(position, chunk, layers) == seen.min()


@torch.no_grad()
def likeliest(model: MegaForCausalLM, ids: Tensor, new: int, beams: int) -> Tensor:
    """Beam search that reads every prefix again at each step."""
    found = [(0.0, ids)]
    for _ in range(new):
        longer = []
        for score, prefix in found:
            log_p = model(prefix).logits[0, -1].log_softmax(-1)
            for token, more in enumerate(log_p.tolist()):
                longer.append((score + more, torch.cat([prefix, torch.tensor([[token]])], dim=1)))
        found = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return found[0][1]


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_beam_search(beams):
    torch.manual_seed(beams)
    model = MegaForCausalLM(decoder(use_chunking=True, chunk_size=3)).double().eval()
    for p in model.parameters():
        p.data += torch.randn(p.shape)
    read = []
    model.mega.register_forward_hook(lambda _, inputs, out: read.append(inputs[0].shape[1]))
    for start in range(4):
        ids = torch.randint(11, (1, 4 + start))
        expected = likeliest(model, ids, 6, beams)
        read.clear()
        assert torch.equal(beam_search(model, ids, 6, beams), expected)
        assert sum(read) <= ids.shape[1] + 6, "the model read some tokens more than once"


@mock.patch.dict(mega.NORMS)  # restores it afterwards
def test_dynamic_tanh():
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    norm = DynamicTanh(6, 1e-5, True).double()
    torch.testing.assert_close(norm(x), torch.tanh(0.5 * x))
    assert sorted(p.numel() for p in norm.parameters()) == [1, 6, 6]
    assert [p.numel() for p in DynamicTanh(6, 1e-5, False).parameters()] == [1]
    mega.NORMS["dyt"] = DynamicTanh
    model = MegaForCausalLM(decoder(normalization_type="dyt", final_norm=True)).double().eval()
    ids = torch.randint(11, (1, 9))
    out = model(ids[:, :5], use_cache=True)
    torch.testing.assert_close(model(ids[:, 5:], cache=out.cache).logits, model(ids).logits[:, 5:])


def test_sequence_regression():
    config = MegaConfig(vocab_size=11, hidden_size=6, num_hidden_layers=1)
    model = SequenceRegression(config).double().eval()
    ids, labels = torch.randint(2, 11, (3, 5)), torch.tensor([1.0, -2.0, 30.0])
    out = model(ids, labels=labels)
    hidden = model.mega(ids).last_hidden_state.mean(1)
    logits = hidden @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(out.logits, logits)
    expected = (logits.squeeze(-1) - labels).abs().mean()
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
