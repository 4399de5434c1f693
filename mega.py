"""MEGA: Moving Average Equipped Gated Attention (Ma et al. 2022, arXiv 2209.10655) in one file.

A layer smooths its input with a learned, damped exponential moving average (EMA), takes queries and
keys from the smoothed signal and values from the raw one, attends with a single head inside chunks,
and gates the result into its input. The EMA is the only way between chunks.

    1 config | 2 moving average | 3 attention | 4 block | 5 model | 6 heads | 7 generation | 8 files

Shapes, everything batch-first:

    B  batch rows                          D  hidden_size
    L  positions in this call              V  intermediate_size, width of the values
    C  chunk_size                          Z  shared_representation_size, width of queries and keys
    K  chunks or blocks in a row           N  ema_projection_size, EMA dimensions of a channel
    R  cached positions of an open chunk   E  EMA channels: D, or 2D when bidirectional

Parameters have Hugging Face's names, so that checkpoints fit. Two are swapped against the paper:
`damping_factor` holds its alpha (the weight p of the incoming value), `decay_factor` its delta.
"""

import functools
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------- 1 config
# Every setting of a model. Names and defaults are Hugging Face's, so that its config.json files
# mean here what they meant there; `final_norm` and `scale_embedding` are the original code's.


@dataclass
class MegaConfig:
    """Settings of a model; an impossible value or combination is a ValueError of one sentence."""

    vocab_size: int = 30522
    hidden_size: int = 128  # D
    num_hidden_layers: int = 4
    intermediate_size: int = 256  # V
    ema_projection_size: int = 16  # N
    bidirectional: bool = True  # the EMA also runs from right to left
    shared_representation_size: int = 64  # Z
    use_chunking: bool = False
    chunk_size: int = -1  # C, read only with use_chunking
    truncation: int | None = None  # only the EMA kernel's first taps count
    normalize_before_mega: bool = True
    normalization_type: str = "scalenorm"
    norm_affine: bool = True
    activation: str = "silu"
    attention_activation: str = "softmax"
    dropout_prob: float = 0.1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    use_feature_dropout: bool = False  # dropout drops whole features of a row
    use_normalized_ffn: bool = True
    nffn_hidden_size: int = 256  # F
    normalize_before_ffn: bool = True
    nffn_activation_dropout_prob: float = 0.1
    max_positions: int = 2048  # P, a limit for the simple bias only
    add_token_type_embeddings: bool = False
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    ema_delta_alpha_range: float = 0.2
    ema_beta_range: float = 0.02
    ema_gamma_omega_range: float = 1.0
    relative_positional_bias: str = "rotary"
    is_decoder: bool = False  # causal attention, and a cache
    add_cross_attention: bool = False
    classifier_dropout: float | None = None
    add_lm_hidden_dense_layer: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    num_labels: int = 2
    problem_type: str | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True  # a decoder in eval mode returns its cache unless told otherwise
    final_norm: bool = False  # a norm without affine after the last pre-norm layer
    scale_embedding: bool = False  # embeddings times sqrt(D)
    extra: dict = field(default_factory=dict, repr=False)  # a config.json's unknown keys

    def __post_init__(self):
        words = {"normalization_type": NORMS, "activation": ACTIVATIONS}
        words |= {"attention_activation": ATTENTION_WEIGHTS, "problem_type": PROBLEM_TYPES}
        words |= {"relative_positional_bias": POSITION_BIASES}
        for f in fields(self):
            value, kind = getattr(self, f.name), type(getattr(self, f.name))
            rule, valid = "", True
            if f.name in words:
                rule = f"one of {', '.join(words[f.name])}"
                valid = kind is str and value in words[f.name]
            elif f.type is bool:
                rule, valid = "True or False", kind is bool
            elif "float" in str(f.type):
                top = math.inf if f.name.endswith("_range") else 1
                rule, valid = f"from 0 to below {top}", kind in (int, float) and 0 <= value < top
            elif f.name.endswith("_id"):
                rule, valid = "an integer from 0 on", kind is int and value >= 0
            elif f.name != "extra" and (f.name != "chunk_size" or self.use_chunking):
                when = " with use_chunking=True" if f.name == "chunk_size" else ""
                rule, valid = f"a positive integer{when}", kind is int and value > 0
            if not (valid or (value is None and "None" in str(f.type))):
                raise ValueError(f"{f.name} must be {rule}, got {value!r}")
        Z, vocab_size = self.shared_representation_size, self.vocab_size
        if self.pad_token_id is not None and self.pad_token_id >= vocab_size:
            raise ValueError(
                f"pad_token_id {self.pad_token_id} is not below vocab_size {vocab_size}"
            )
        if self.relative_positional_bias == "rotary" and Z % 2:
            raise ValueError(f"shared_representation_size must be even for rotary, got {Z}")
        if self.is_decoder and self.bidirectional:
            raise ValueError("is_decoder=True needs bidirectional=False: the future is not known")
        if self.add_cross_attention or self.add_token_type_embeddings:
            raise ValueError("add_cross_attention and add_token_type_embeddings must be False here")
        if self.final_norm and not (self.normalize_before_mega and self.normalize_before_ffn):
            raise ValueError("final_norm=True needs normalize_before_mega and _ffn to be True")
        if self.use_chunking:
            self.check_length("chunk_size", self.chunk_size)

    @property
    def attention_limit(self) -> int | None:
        """C when chunking, None when attention sees the whole row."""
        return self.chunk_size if self.use_chunking else None

    def check_length(self, what: str, length: int):
        """ValueError if the simple bias has no number for distances within `length` positions."""
        if self.relative_positional_bias == "simple" and length > self.max_positions:
            limit = f"max_positions {self.max_positions}, the simple bias's limit"
            raise ValueError(f"{what} {length} is above {limit}; shorten, chunk, or use rotary")

    @classmethod
    def from_dict(cls, values: dict) -> "MegaConfig":
        """From the content of a config.json; unknown keys are kept in `extra`."""
        known = {f.name for f in fields(cls)} & values.keys()
        extra = {k: v for k, v in values.items() if k not in known}
        return cls(**{k: values[k] for k in known}, extra=extra)

    def to_dict(self) -> dict:
        """The content of a config.json, unknown keys included."""
        values = asdict(self)
        return {**values.pop("extra"), **values, "model_type": "mega"}


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# ----------------------------------------------------------------------------- 2 moving average
# The multi-dimensional damped EMA (section 3.1). Each channel of x is written to N hidden numbers,
# every one of them decays at its own rate, and their weighted sum is read out (equation 5):
#
#     h_t = q h_{t-1} + u x_t,    y_t = sum_n g h_t
#     u = p beta,    q = 1 - p decay,    g = gamma / sqrt(N)
#
# with p = alpha, decay = delta and gamma = eta in the paper, which has no 1/sqrt(N); its code has.
# Unrolled, this is a convolution with the kernel k[l] = sum_n g u q^l (appendix A). Four functions
# compute the same y: from the definition, by FFT, step by step, and block by block.
# Shapes: x, y (B, L, D); u, q, g (D, N); state h (B, D, N).


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_fp32(ema):
    """Let an EMA function compute in fp32, or fp64 if given it, under any autocast; y as x's dtype.

    Powers of a q near 1 mean nothing in half precision. Also checks shapes.
    """

    @functools.wraps(ema)
    def wrapped(x, u, q, g, *args, **kwargs):
        if not (x.dim() == 3 and u.shape == q.shape == g.shape == (x.shape[-1], u.shape[-1])):
            shapes = [tuple(t.shape) for t in (x, u, q, g)]
            raise ValueError("x (B, L, D) needs u, q, g (D, N), got {}, {}, {}, {}".format(*shapes))
        if x.shape[1] == 0:
            raise ValueError("the moving average needs at least one step, got L = 0")
        dtype = functools.reduce(torch.promote_types, (x.dtype, u.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            y = ema(x.to(dtype), u.to(dtype), q.to(dtype), g.to(dtype), *args, **kwargs)
        return (y[0].to(x.dtype), y[1]) if isinstance(y, tuple) else y.to(x.dtype)

    return wrapped


def initial_state(x: Tensor, u: Tensor, state: Tensor | None) -> Tensor:
    shape = (len(x), *u.shape)
    if state is not None and state.shape != shape:
        raise ValueError(f"state must be {shape}, got {tuple(state.shape)}")
    return x.new_zeros(shape) if state is None else state.to(x.dtype)


def powers(q: Tensor, count: int) -> Tensor:
    """q^0 ... q^(count-1) on a new last axis; exact, with finite gradients, at q = 0 and 1 too."""
    return q.unsqueeze(-1) ** torch.arange(count, dtype=q.dtype, device=q.device)


def ema_kernel(u: Tensor, q: Tensor, g: Tensor, length: int, truncation=None) -> Tensor:
    """k[l] = sum_n g u q^l (appendix A), (D, length); with `truncation`, 0 from that tap on."""
    taps = length if truncation is None else min(truncation, length)
    u, q, g = (at_least_fp32(coefficient) for coefficient in (u, q, g))
    return F.pad(((g * u).unsqueeze(-1) * powers(q, taps)).sum(-2), (0, length - taps))


def toeplitz(kernel: Tensor) -> Tensor:
    """(D, length) -> (D, length, length), convolving rows: T[d, j, i] = kernel[d, i - j] or 0."""
    length = kernel.shape[-1]
    return F.pad(kernel, (length - 1, 0)).unfold(-1, length, 1).flip(-2)


@in_fp32
def ema_direct(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """The definition, y_t = sum_l k[l] x_{t-l}: O(L^2 D) time and memory. x, y (B, L, D)."""
    return torch.einsum("bjd,dji->bid", x, toeplitz(ema_kernel(u, q, g, x.shape[1], truncation)))


@in_fp32
def ema_fft(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """The convolution by FFT (appendix A): O(L (N + log L) D) time. x, y (B, L, D)."""
    length = x.shape[1]
    kernel = ema_kernel(u, q, g, length, truncation)
    # Padded to 2 L, so that the FFT's circular convolution does not wrap around.
    spectrum = torch.fft.rfft(x.mT, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT


@in_fp32
def ema_recurrent(x: Tensor, u: Tensor, q: Tensor, g: Tensor, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence, step by step (equation 5): O(L D N) time.

    x (B, L, D), state (B, D, N) or None -> y (B, L, D), the state after the last step.
    """
    h, ys = initial_state(x, u, state), []
    for x_t in x.unbind(1):
        h = q * h + u * x_t.unsqueeze(-1)  # (B, D, N)
        ys.append((g * h).sum(-1))
    return torch.stack(ys, 1), h


@in_fp32
def ema_blockwise(x: Tensor, u: Tensor, q: Tensor, g: Tensor, state=None, block=None):
    """Convolution inside blocks, recurrence between them: O(L D (block + N)) time, any L.

    x (B, L, D), state (B, D, N) or None -> y (B, L, D), the state after the last step.
    The past of a step has two parts: earlier steps of its block, which the kernel's first taps
    weigh, and all before the block, which the state at its start sums up. `block` is the number
    of steps in one; None takes the fastest measured.
    """
    if block is not None and (type(block) is not int or block < 1):
        raise ValueError(f"block must be a positive integer or None, got {block!r}")
    block = min(block or (32 if x.shape[1] <= 8192 else 64), x.shape[1])
    q_powers = powers(q, block)
    inside = toeplitz(((g * u).unsqueeze(-1) * q_powers).sum(-2))  # x to y, (D, block, block)
    write = (u.unsqueeze(-1) * q_powers).flip(-1).mT  # x to state after the block, (D, block, N)
    read = (g * q).unsqueeze(-1) * q_powers  # state before the block to y, (D, N, block)
    h = initial_state(x, u, state).permute(1, 2, 0)  # (D, N, B)
    ys, rest = [], x.shape[1] % block
    for piece in x.split([x.shape[1] - rest, rest], 1) if rest else [x]:
        c = min(block, piece.shape[1])  # a last, short block uses a corner of the same matrices
        q_block = q * q_powers[..., c - 1]
        y, h = Blocks.apply(piece, inside[:, :c, :c], write[:, -c:], read[..., :c], q_block, h)
        ys.append(y)
    return torch.cat(ys, 1) if rest else y, h.permute(2, 0, 1)


class Blocks(torch.autograd.Function):
    """The work of `ema_blockwise` on x (B, K c, D), forward and backward.

    The backward pass by hand is twice as fast as autograd's. It is the same algorithm from right
    to left: `read` and `write` change places, and the gradient of the state is what is carried.
    """

    @staticmethod
    def forward(ctx, x, inside, write, read, q_block, h):
        blocks = to_blocks(x, inside.shape[1])  # (D, B (K + 1), c), an empty one ends each row
        new = (write.mT @ blocks.mT).unflatten(-1, (len(x), -1))  # (D, N, B, K + 1)
        before = scan(torch.cat([h.unsqueeze(-1), new[..., :-1]], -1), q_block)
        y = torch.bmm(blocks, inside).baddbmm_(before.flatten(2).mT, read)
        ctx.save_for_backward(blocks, inside, write, read, q_block, before)
        return from_blocks(y, len(x)), before[..., -1].clone()  # not a view, which keeps all alive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        blocks, inside, write, read, q_block, before = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dblocks = to_blocks(dy, inside.shape[1])
            dbefore = (read @ dblocks.mT).unflatten(-1, (len(dy), -1))
            dbefore[..., -1] = dh
            dstate = scan(dbefore, q_block, reverse=True)
            dnew = F.pad(dstate[..., 1:], (0, 1))
            dq_block = (dnew * before).sum((-2, -1))
            dnew, before = dnew.flatten(2), before.flatten(2)
            dx = torch.bmm(dblocks, inside.mT).baddbmm_(dnew.mT, write.mT)
            dmatrices = blocks.mT @ dblocks, blocks.mT @ dnew.mT, before @ dblocks
        return from_blocks(dx, len(dy)), *dmatrices, dq_block, dstate[..., 0]


def to_blocks(x: Tensor, c: int) -> Tensor:
    """(B, K c, D) -> (D, B (K + 1), c), where the last block of each row is zero."""
    B, L, D = x.shape
    # Numbers a power of two apart evict each other from the processor's cache, which makes this
    # copy and the products after it up to 3x slower: hence an odd number of channels.
    blocks = x.new_empty(B, L // c + 1, D | 1, c)
    blocks[:, :-1, :D], blocks[:, -1] = x.unflatten(1, (-1, c)).mT, 0
    return blocks.flatten(0, 1)[:, :D].transpose(0, 1)


def from_blocks(y: Tensor, rows: int) -> Tensor:
    """(D, B (K + 1), c) -> (B, K c, D)."""
    return y.unflatten(1, (rows, -1))[:, :, :-1].permute(1, 2, 3, 0).flatten(1, 2).contiguous()


def scan(h: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """h_k + decay h_{k-1} + decay^2 h_{k-2} + ... for each k; with `reverse`, over later k.

    h (D, N, B, K), decay (D, N). In log2(K) rounds: each adds what stands `step` places back,
    itself a sum of `step` terms by then.
    """
    decay, step = decay[..., None, None], 1
    while step < h.shape[-1]:
        later, earlier = slice(step, None), slice(None, -step)
        to, source = (earlier, later) if reverse else (later, earlier)
        h, old = h.clone(), h
        h[..., to].addcmul_(decay, old[..., source])
        decay, step = decay * decay, 2 * step
    return h


EMA_MODES = {"direct": ema_direct, "fft": ema_fft}  # these can truncate their kernel
EMA_MODES |= {"recurrent": ema_recurrent, "blockwise": ema_blockwise}  # these carry a state


class DampedEMA(nn.Module):
    """The EMA's parameters, and SiLU(EMA(x) + omega x) from them (equation 5, the paper's code).

    `mode` names the algorithm, for all calls or for one; None takes the fastest that will do.
    """

    def __init__(self, config: MegaConfig, mode: str | None = None):
        super().__init__()
        D, N = config.hidden_size, config.ema_projection_size
        E, logit_std = 2 * D if config.bidirectional else D, config.ema_delta_alpha_range
        self.config, self.mode = config, mode
        self.damping_factor = normal(E, N, 1, std=logit_std)  # logit of p, the paper's alpha
        self.decay_factor = normal(E, N, 1, std=logit_std)  # logit of the paper's delta
        self.ema_expansion_matrix = normal(E, N, 1, std=config.ema_beta_range)  # beta
        self.ema_expansion_matrix.data[:, ::2] += 1  # near +1, -1, +1, ...
        self.ema_expansion_matrix.data[:, 1::2] -= 1
        self.kernel_projection_matrix = normal(E, N, std=config.ema_gamma_omega_range)  # gamma
        self.residual_weight = normal(D, std=config.ema_gamma_omega_range)  # omega

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """u = p beta, q = 1 - p decay, g = gamma / sqrt(N), each (E, N), at least fp32."""
        p = at_least_fp32(self.damping_factor).sigmoid().squeeze(-1)
        decay = at_least_fp32(self.decay_factor).sigmoid().squeeze(-1)
        g = at_least_fp32(self.kernel_projection_matrix) / math.sqrt(p.shape[-1])
        return p * self.ema_expansion_matrix.squeeze(-1), 1 - p * decay, g

    def forward(self, x: Tensor, mask=None, state=None, mode=None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D), mask (B, L), False at pads, which enter as 0, state (B, D, N) -> y, state.

        The returned state is None in the modes and directions that have none.
        """
        truncation, bidirectional = self.config.truncation, self.config.bidirectional
        steps = "recurrent" if x.shape[1] <= 16 else "blockwise"  # by measurement
        mode = mode or self.mode or (steps if truncation is None else "fft")
        if mode not in EMA_MODES:
            raise ValueError(f"EMA mode must be one of {', '.join(EMA_MODES)}, got {mode!r}")
        carries = mode in ("recurrent", "blockwise")
        if carries and truncation is not None:
            raise ValueError(f"EMA mode {mode!r} cannot truncate its kernel; use direct or fft")
        if state is not None and (bidirectional or not carries):
            raise ValueError(f"EMA mode {mode!r} with {bidirectional=} cannot go on from a state")
        inputs = x if mask is None else x * mask.unsqueeze(-1)
        if bidirectional:  # the second D channels read from right to left
            inputs = torch.cat([inputs, inputs.flip(1)], -1)
        y = EMA_MODES[mode](inputs, *self.coefficients(), state if carries else truncation)
        y, state = y if carries else (y, None)
        if bidirectional:
            y, state = y[..., : x.shape[-1]] + y[..., x.shape[-1] :].flip(1), None
        return F.silu(y + x * self.residual_weight), state


def normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)


# ---------------------------------------------------------------------------------- 3 attention
# Single-head attention with a reset gate (section 3.2, equations 6 to 15) in chunks (section 3.4):
# queries and keys from the EMA's output, values from its input. A row is cut at chunk borders, and
# every run of whole chunks, or the shorter piece at either end, is attended to by the same lines.
# Shapes: q (B, K, c, Z), k (B, K, w, Z), bias (c, w), visible (.., c, w) or None for all, weights
# (B, K, c, w), where the c queries stand at the last c of their w keys.


def softmax_weights(q: Tensor, k: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax of scaled scores; a query that sees nothing gets zeros."""
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT) + bias
    if visible is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0)


def elementwise_weights(q: Tensor, k: Tensor, bias: Tensor, visible: Tensor | None, function):
    """`function` of the scores divided by the number of visible keys."""
    count = k.shape[-2] if visible is None else visible.sum(-1, keepdim=True).clamp(min=1)
    weights = function(at_least_fp32((q / count) @ k.mT) + bias)
    # laplace(0) is 0.006, not 0: what is masked is multiplied out.
    return weights if visible is None else weights.masked_fill(~visible, 0)


def relu2(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021)."""
    return F.relu(x).square()


def laplace(x: Tensor) -> Tensor:
    """A bounded stand-in for relu2 (equation 16), equal in value and slope at x = sqrt(1/2).

    mu = sqrt(1/2) and sigma = sqrt(1 / (4 pi)) are rounded as in the paper's code.
    """
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ATTENTION_WEIGHTS = {
    "softmax": softmax_weights,
    "laplace": functools.partial(elementwise_weights, function=laplace),
    "relu2": functools.partial(elementwise_weights, function=relu2),
}


class SimpleBias(nn.Module):
    """One learned number for each distance: bias[i, j] = w[centre + j - i]."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.rel_pos_bias = normal(2 * config.max_positions - 1, std=config.initializer_range)

    def forward(self, first: int, stop: int) -> Tensor:
        """For queries first ... stop-1 and keys 0 ... stop-1: (stop - first, stop)."""
        self.config.check_length("length", stop)
        centre = (self.config.attention_limit or self.config.max_positions) - 1
        place = torch.arange(stop, device=self.rel_pos_bias.device)
        return self.rel_pos_bias[centre + place - place[first:].unsqueeze(1)]


class RotaryBias(nn.Module):
    """Two learned vectors, turned by their places' angles and multiplied; not RoPE on q and k.

    bias[i, j] = (R_i alpha) . (R_j b), which depends on j - i alone and has no limit of length.
    """

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.alpha = normal(1, config.shared_representation_size, std=config.initializer_range)
        self.b_param = normal(1, config.shared_representation_size, std=config.initializer_range)

    def forward(self, first: int, stop: int) -> Tensor:
        """For queries first ... stop-1 and keys 0 ... stop-1: (stop - first, stop)."""
        half, device = self.alpha.shape[-1] // 2, self.alpha.device
        places, pairs = (torch.arange(n, dtype=torch.float32, device=device) for n in (stop, half))
        angle = places.unsqueeze(1) * torch.exp(pairs * (-math.log(10000) / half))  # (stop, Z / 2)
        sin, cos = angle.sin(), angle.cos()
        (a1, a2), (b1, b2) = (at_least_fp32(p).chunk(2, -1) for p in (self.alpha, self.b_param))
        turned_a = torch.cat([a1 * cos - a2 * sin, a2 * cos + a1 * sin], -1)
        turned_b = torch.cat([b1 * cos - b2 * sin, b2 * cos + b1 * sin], -1)
        with torch.autocast(device.type, enabled=False):
            return turned_a[first:] @ turned_b.mT


POSITION_BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


class ScaleNorm(nn.Module):
    """x / rms(x) times one learned number (Nguyen & Salazar 2019)."""

    def __init__(self, size: int, eps: float, affine: bool):
        super().__init__()
        self.eps, self.scalar = eps, nn.Parameter(torch.ones(1)) if affine else 1

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.scalar


NORMS = {  # over the features of each position, or (batchnorm) each feature over all positions
    "layernorm": nn.LayerNorm,
    "scalenorm": ScaleNorm,
    # Hugging Face 4.40.2 computes this norm and then returns its input: models trained there with
    # rmsnorm give other numbers here.
    "rmsnorm": nn.RMSNorm,
    "batchnorm": lambda size, eps, affine: nn.BatchNorm1d(size, eps, affine=affine),
    "syncbatchnorm": lambda size, eps, affine: nn.SyncBatchNorm(size, eps, affine=affine),
}


class SequenceNorm(nn.Module):
    """The config's norm over (B, L, D); checkpoints know it as `norm.norm`."""

    def __init__(self, config: MegaConfig, affine: bool):
        super().__init__()
        self.norm = NORMS[config.normalization_type](config.hidden_size, 1e-5, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


def dropout(x: Tensor, p: float, module: nn.Module) -> Tensor:
    """Of single numbers of x (B, L, D) or, with use_feature_dropout, of whole features of a row."""
    if module.config.use_feature_dropout:
        return x * F.dropout(torch.ones_like(x[:, :1]), p, module.training)
    return F.dropout(x, p, module.training)


ACTIVATIONS = {name: getattr(F, name) for name in ("silu", "relu", "relu6", "leaky_relu", "mish")}
ACTIVATIONS |= {"gelu": F.gelu, "gelu_python": F.gelu, "sigmoid": F.sigmoid, "tanh": F.tanh}
ACTIVATIONS |= {"swish": F.silu, "linear": nn.Identity(), "relu2": relu2, "laplace": laplace}
ACTIVATIONS["gelu_10"] = lambda x: F.gelu(x).clamp(-10, 10)
ACTIVATIONS["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)
for name in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"):  # one formula
    ACTIVATIONS[name] = functools.partial(F.gelu, approximate="tanh")


def linear(config: MegaConfig, inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=config.initializer_range)
    nn.init.zeros_(layer.bias)
    return layer


class MovingAverageGatedAttention(nn.Module):
    """Mega's layer: EMA, single-head attention in chunks, gates (section 3.3, figure 2)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        D, V, Z = config.hidden_size, config.intermediate_size, config.shared_representation_size
        self.config, self.sizes = config, (D, V, Z)
        self.norm = SequenceNorm(config, config.norm_affine)
        self.ema_gate = DampedEMA(config)
        self.v_proj = linear(config, D, V)
        self.mx_proj = linear(config, D, Z + V + 2 * D)
        self.h_proj = linear(config, V, D)
        self.qk_weight = normal(2, Z, std=config.initializer_range)
        self.qk_bias = nn.Parameter(torch.zeros(2, Z))
        self.rel_pos_bias = POSITION_BIASES[config.relative_positional_bias](config)

    def forward(self, x: Tensor, mask=None, past: tuple | None = None, use_cache: bool = False):
        """x (B, L, D), mask (B, R + L) bool, False at pads -> y (B, L, D), the past after x.

        A past is the EMA's state (B, D, N), and keys (B, R, Z) and values (B, R, V) of the R < C
        positions of an open chunk; without chunking, of all so far.
        """
        config, (D, V, Z), activation = self.config, self.sizes, ACTIVATIONS[self.config.activation]
        state, old_k, old_v = past or (None, None, None)
        n = self.norm(x) if config.normalize_before_mega else x
        v = dropout(activation(self.v_proj(n)), config.hidden_dropout_prob, self)
        m, state = self.ema_gate(n, None if mask is None else mask[:, -x.shape[1] :], state)
        m = dropout(m, config.dropout_prob, self)
        update, zr, hx = self.mx_proj(m).split([D, Z + V, D], -1)
        z, reset = F.silu(zr).split([Z, V], -1)
        q, k = (z.unsqueeze(-2) * self.qk_weight + self.qk_bias).unbind(-2)  # (B, L, Z)
        if past is not None:
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)  # (B, R + L, ..)
        candidate = activation(hx + self.h_proj(self.attend(q, k, v, mask) * reset))
        candidate = dropout(candidate, config.dropout_prob, self)
        y = x + torch.sigmoid(update) * (candidate - x)
        y = y if config.normalize_before_mega else self.norm(y)
        if not use_cache:
            return y, None
        if state is None:
            raise ValueError("this EMA mode has no state to cache; unset it, or use_cache=False")
        start = k.shape[1] - k.shape[1] % config.chunk_size if config.use_chunking else 0
        # Clones, or R positions would keep the memory of all alive.
        return y, (state, *(t[:, start:].clone() for t in (k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, L, Z), k (B, R + L, Z), v (B, R + L, V), mask (B, R + L) -> (B, L, V)."""
        config, past, end = self.config, k.shape[1] - q.shape[1], k.shape[1]
        chunk = config.attention_limit or end
        # Three pieces at most: the rest of an open chunk, whole chunks, the start of a last one.
        border = min(chunk, end) if past else 0
        last = max(end // chunk * chunk, border)
        outputs = []
        for start, stop in ((past, border), (border, last), (last, end)):
            if start == stop:
                continue
            first = start % chunk  # the first query's place in its chunk
            width = min(chunk, first + stop - start)
            queries = q[:, start - past : stop - past].unflatten(1, (-1, width - first))
            keys, values = (t[:, start - first : stop].unflatten(1, (-1, width)) for t in (k, v))
            visible = None
            if mask is not None:
                visible = mask[:, start - first : stop].unflatten(1, (-1, width)).unsqueeze(2)
            if config.is_decoder:
                causal = q.new_ones(width - first, width, dtype=torch.bool).tril(first)
                visible = causal if visible is None else visible & causal
            attention = ATTENTION_WEIGHTS[config.attention_activation]
            weights = attention(queries, keys, self.rel_pos_bias(first, width), visible)
            weights = F.dropout(weights, config.attention_probs_dropout_prob, self.training)
            outputs.append((weights.to(values.dtype) @ values).flatten(1, 2))
        return torch.cat(outputs, 1)


# -------------------------------------------------------------------------------------- 4 block
# A block is the layer above and a feed-forward network (section 3.3), each with norm and residual.


class NormalizedFeedForward(nn.Module):
    """x + fc2(act(fc1(norm(x)))), or with the norm after the sum."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.norm = SequenceNorm(config, config.norm_affine)
        self.fc1 = linear(config, config.hidden_size, config.nffn_hidden_size)
        self.fc2 = linear(config, config.nffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        config = self.config
        hidden = self.fc1(self.norm(x) if config.normalize_before_ffn else x)
        hidden = ACTIVATIONS[config.activation](hidden)
        hidden = dropout(hidden, config.nffn_activation_dropout_prob, self)
        y = x + dropout(self.fc2(hidden), config.dropout_prob, self)
        return y if config.normalize_before_ffn else self.norm(y)


class MegaBlock(nn.Module):
    """A layer and its feed-forward network; called as MovingAverageGatedAttention."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.mega_layer = MovingAverageGatedAttention(config)
        self.nffn = NormalizedFeedForward(config) if config.use_normalized_ffn else nn.Identity()

    def forward(self, x: Tensor, mask=None, past: tuple | None = None, use_cache: bool = False):
        y, past = self.mega_layer(x, mask, past, use_cache)
        return self.nffn(y), past


# -------------------------------------------------------------------------------------- 5 model
# Embeddings, blocks, and the cache that lets a decoder go on where it stopped.


@dataclass
class MegaCache:
    """A decoder's memory of `length` positions; made with gradients on, it keeps their graph."""

    layers: list[tuple[Tensor, Tensor, Tensor]]  # the past of MovingAverageGatedAttention.forward
    mask: Tensor | None  # (B, R), False at pads; None: no pads
    length: int


@dataclass
class MegaOutput:
    """What a model returns; None stands for what was not asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, L, vocab_size)
    last_hidden_state: Tensor | None = None  # (B, L, D)
    cache: MegaCache | None = None


def check_ids(ids: Tensor, limit: int):
    """ValueError unless `ids` is a non-empty (B, L) of integers from 0 to limit - 1."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        found = f"{ids.dtype} {tuple(ids.shape)}"
        raise ValueError(f"input_ids must be a non-empty integer tensor (B, L), got {found}")
    # Only on a CPU: a look at the numbers would wait for a GPU.
    for extreme in (ids.min(), ids.max()) if ids.device.type == "cpu" else ():
        if not 0 <= extreme < limit:
            raise ValueError(f"input_ids must be from 0 to {limit - 1}, got {extreme}")


class MegaModel(nn.Module):
    """Embeddings and blocks: token ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        words = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        words.weight.data.normal_(std=config.initializer_range)
        if config.pad_token_id is not None:
            words.weight.data[config.pad_token_id] = 0
        self.embedding_layer = nn.ModuleDict({"word_embeddings": words})
        self.layers = nn.ModuleList(MegaBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = SequenceNorm(config, False) if config.final_norm else nn.Identity()

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None) -> MegaOutput:
        """input_ids (B, L), attention_mask (B, L) of any dtype, 0 at pads -> last_hidden_state.

        A MegaCache given is always used: input_ids, one or many, go on where it ends, and the mask
        is theirs or that of all ids since the start. `use_cache` asks for the cache after them;
        None means config.use_cache for a decoder in eval mode.
        """
        config = self.config
        can_cache = config.is_decoder and config.truncation is None
        if use_cache is None:
            use_cache = config.use_cache and can_cache and not self.training
        if (use_cache or cache is not None) and not can_cache:
            settings = f"is_decoder={config.is_decoder} and truncation={config.truncation}"
            raise ValueError(f"a cache needs is_decoder=True and truncation=None, got {settings}")
        check_ids(input_ids, config.vocab_size)
        x = self.embedding_layer["word_embeddings"](input_ids)
        x = x * math.sqrt(x.shape[-1]) if config.scale_embedding else x
        mask, layers = key_mask(x, attention_mask, cache), []
        pasts = [None] * len(self.layers) if cache is None else cache.layers
        for layer, past in zip(self.layers, pasts, strict=True):
            x, past = layer(x, mask, past, use_cache)
            layers.append(past)
        out = MegaOutput(last_hidden_state=self.final_norm(x))
        if use_cache:
            kept = None if mask is None else mask[:, mask.shape[1] - layers[0][1].shape[1] :]
            length = x.shape[1] + (0 if cache is None else cache.length)
            out.cache = MegaCache(layers, kept, length)
        return out


def key_mask(x: Tensor, mask: Tensor | None, cache: MegaCache | None) -> Tensor | None:
    """The mask (B, R + L) of what is remembered and x (B, L, D), True if visible; None: all is."""
    (B, L, _), old, length, R = x.shape, None, 0, 0
    if cache is not None:
        old, length, (rows, R, _) = cache.mask, cache.length, cache.layers[0][1].shape
        if rows != B:
            raise ValueError(f"the cache has {rows} rows and input_ids {B}; they must be the same")
    if mask is None and old is None:
        return None
    if mask is None or mask.shape == (B, L):  # the mask of x alone
        old = x.new_ones(B, R, dtype=torch.bool) if old is None else old
        new = x.new_ones(B, L, dtype=torch.bool) if mask is None else mask != 0
        return torch.cat([old, new], 1)
    if mask.shape == (B, length + L):  # of all since the start
        return mask[:, length - R :] != 0
    shapes = " or ".join(dict.fromkeys((f"({B}, {L})", f"({B}, {length + L})")))
    raise ValueError(f"attention_mask must have the shape {shapes}, got {tuple(mask.shape)}")


# -------------------------------------------------------------------------------------- 6 heads
# A head is its layers and its loss on top of the model.


class MegaForCausalLM(nn.Module):
    """Predicts the next token."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        if not config.is_decoder:
            mend = "for a model from left to right set is_decoder=True and bidirectional=False"
            warnings.warn(f"is_decoder=False lets each token see its future; {mend}", stacklevel=2)
        self.config, D = config, config.hidden_size
        self.mega = MegaModel(config)
        self.dense = linear(config, D, D) if config.add_lm_hidden_dense_layer else None
        self.lm_head = linear(config, D, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.mega.embedding_layer["word_embeddings"].weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size)."""
        return self.lm_head(hidden if self.dense is None else torch.tanh(self.dense(hidden)))

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        cache=None,
        use_cache=None,
        shift_labels=True,
    ) -> MegaOutput:
        """Arguments as MegaModel's; with labels (B, L), -100 ignored, also the mean loss in nats.

        labels[t] is the token at t, predicted from those before it; with shift_labels=False it is
        the token after t, so that L inputs train L predictions. Pads count unless labelled -100.
        """
        out = self.mega(input_ids, attention_mask, cache, use_cache)
        out.logits = self.logits(out.last_hidden_state)
        if labels is not None:
            logits = at_least_fp32(out.logits[:, :-1] if shift_labels else out.logits)
            labels = labels[:, 1:] if shift_labels else labels
            out.loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long())
        return out

    # --------------------------------------------------------------------------- 7 generation
    # One pass over the prompt fills the cache; from there each token costs one step.

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
        eos_token_id=None, attention_mask=None, seed=None, stream=None,
    ) -> Tensor:  # fmt: skip
        """Continue input_ids (B, L): returns (B, L + new), new <= max_new_tokens.

        Temperature 0 takes the likeliest token; top_k and top_p limit the draw to the likeliest.
        After its eos_token_id (None: there is none) a row is filled with pads, or eos where the
        config has no pad, and the call ends when all rows are.
        Pads in front (attention_mask 0) change nothing for a row. `seed` makes draws repeatable,
        all rows sharing one stream; `stream` is called with each new token (B,).
        """
        valid = top_k is None or top_k >= 1, top_p is None or 0 < top_p <= 1
        if not (max_new_tokens >= 0 and 0 <= temperature < math.inf and all(valid)):
            got = f"{max_new_tokens}, {temperature}, {top_k} and {top_p}"
            rules = "max_new_tokens >= 0, temperature >= 0, top_k >= 1 and top_p in (0, 1]"
            raise ValueError(f"generate needs {rules}, got {got}")
        check_ids(input_ids, self.config.vocab_size)
        (B, L), chunk, pad = input_ids.shape, self.config.attention_limit, self.config.pad_token_id
        if chunk is None:
            self.config.check_length("prompt and new tokens:", L + max(max_new_tokens - 1, 0))
        if attention_mask is not None:
            check_left_padding(attention_mask != 0, input_ids, chunk)
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        ids, start, end, cache = F.pad(input_ids, (0, max_new_tokens)), 0, L, None
        training = {module: module.training for module in self.modules()}
        self.eval()
        try:
            while end < ids.shape[1] and not done.all():
                out = self.mega(ids[:, start:end], attention_mask, cache=cache, use_cache=True)
                cache, attention_mask = out.cache, None
                logits = at_least_fp32(self.logits(out.last_hidden_state[:, -1]))
                token = draw(logits, temperature, top_k, top_p, generator)
                if eos_token_id is not None:
                    token = token.masked_fill(done, eos_token_id if pad is None else pad)
                    done = done | (token == eos_token_id)
                ids[:, end] = token
                start, end = end, end + 1
                if stream is not None:
                    stream(token)
        finally:
            for module, was_training in training.items():
                module.training = was_training
        return ids[:, :end]

    # -------------------------------------------------------------------------------- 8 files
    # A folder in Hugging Face's layout: config.json and model.safetensors.

    def save_pretrained(self, folder: str):
        """Write the folder: all files under other names first, so that old ones stay till then."""
        from safetensors.torch import save

        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        config = {**self.config.to_dict(), "architectures": [type(self).__name__]}
        files = {"config.json": json.dumps(config, indent=2).encode()}
        files["model.safetensors"] = save(weights, metadata={"format": "pt"})
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            with open(os.path.join(folder, name + ".part"), "wb") as file:
                file.write(content)
        for name in files:
            os.replace(os.path.join(folder, name + ".part"), os.path.join(folder, name))

    @classmethod
    def from_pretrained(cls, folder: str) -> "MegaForCausalLM":
        """The model of a folder, in eval mode.

        OSError, ValueError or safetensors' SafetensorError say what is wrong with it.
        """
        from safetensors.torch import load_file

        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            model = cls(MegaConfig.from_dict(json.load(file)))
        weights, own = load_file(os.path.join(folder, "model.safetensors")), model.state_dict()
        if model.config.tie_word_embeddings:
            embedding = "mega.embedding_layer.word_embeddings.weight"
            weights[embedding] = weights.setdefault("lm_head.weight", weights.get(embedding))
        for name, tensor in own.items():
            found = tuple(weights[name].shape) if weights.get(name) is not None else "missing"
            if found != tuple(tensor.shape):
                asked = f"its config.json asks for {tuple(tensor.shape)}"
                raise ValueError(f"{folder}: tensor {name} is {found}, but {asked}")
        model.load_state_dict({name: weights[name] for name in own})
        return model.eval()


def check_left_padding(visible: Tensor, ids: Tensor, chunk: int | None):
    """ValueError unless each row (B, L) is pads, then tokens, and cut into chunks as if alone."""
    if visible.shape != ids.shape:
        shapes = f"{tuple(ids.shape)}, got {tuple(visible.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    pads = (~visible).sum(1)
    if (visible.cumsum(1) > 0).ne(visible).any() or not visible[:, -1].all():
        raise ValueError("generate needs the pads in front of each row's tokens")
    if chunk is not None and (pads % chunk).any():
        mend = "give a chunked model rows of one length, or one row at a time"
        raise ValueError(f"pads {pads.tolist()} move the borders of chunks of {chunk}; {mend}")


def draw(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token of each row of logits (B, vocab_size): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # finite at any of them
    if top_k is not None:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if top_p is not None:
        p, index = logits.softmax(-1).sort(descending=True)
        late = p.cumsum(-1) - p >= top_p  # those before it hold top_p already; never the likeliest
        logits = logits.masked_fill(late.scatter(-1, index, late), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
