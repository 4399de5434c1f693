"""MEGA: Moving Average Equipped Gated Attention (Ma et al. 2022, arXiv 2209.10655) in one file.

A layer smooths its input with a learned, damped exponential moving average (EMA), takes queries and
keys from the smoothed signal and values from the raw one, attends with a single head inside chunks,
and gates the result into its input. The EMA is the only way between chunks.

Shapes, everything batch-first:

    B  batch rows                          D  hidden_size
    L  positions in this call              V  intermediate_size, width of the values
    C  chunk_size                          Z  shared_representation_size, width of queries and keys
    K  chunks or blocks in a row           N  ema_projection_size, EMA dimensions of a channel
    R  cached positions of an open chunk   E  EMA channels: D, or 2D when bidirectional
    S  positions of an encoder             P  max_positions
    c  positions of a block, or queries    T  tokens with a label
    w  keys handed to these queries

Parameters have Hugging Face's names, so that checkpoints fit. Two are swapped against the paper:
`damping_factor` holds its alpha (the weight p of the incoming value), `decay_factor` its delta.
"""

import functools
import math
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def require(valid, message: str):
    """A ValueError with the message unless valid."""
    if not valid:
        raise ValueError(message)


def check_shape(name: str, x: Tensor, *shape: int | str):
    """A ValueError unless x has the shape, in which a letter stands for any size but 0."""
    pairs = zip(shape, x.shape, strict=False)
    if x.ndim != len(shape) or not all(b == a or (b and type(a) is str) for a, b in pairs):
        asked = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be non-empty ({asked}), got {tuple(x.shape)}")


# ------------------------------------------------------------------------------------- 1 config
# Hugging Face's names and defaults; final_norm and what follows it are the original code's.


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
    nffn_hidden_size: int = 256
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
    add_cross_attention: bool = False  # a decoder's layers also look at an encoder's states
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    add_lm_hidden_dense_layer: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    num_labels: int = 2
    id2label: dict | None = None  # the labels' names; None: LABEL_0, LABEL_1, ...
    problem_type: str | None = None  # of sequence classification; None: by num_labels and labels
    tie_word_embeddings: bool = True
    use_cache: bool = True  # a decoder in eval mode returns its cache unless told otherwise
    final_norm: bool = False  # a norm without affine after the last pre-norm layer
    scale_embedding: bool = False  # embeddings times sqrt(D)
    mean_pooling: bool = False  # a row's vector is its mean, not its first position
    gradient_checkpointing: bool = False  # backward computes each layer again: slower, far smaller
    extra: dict = field(default_factory=dict, repr=False)  # a config.json's unknown keys

    def __post_init__(self):
        words = {"normalization_type": NORMS, "activation": ACTIVATIONS}
        words |= {"attention_activation": ATTENTION_FUNCTIONS, "problem_type": PROBLEM_TYPES}
        words |= {"relative_positional_bias": POSITION_BIASES}
        for f in fields(self):
            value, kind = getattr(self, f.name), type(getattr(self, f.name))
            least = 0 if f.name.endswith("_id") else 1
            rule, valid = f"an integer from {least} on", kind is int and value >= least
            if f.name in words:
                rule, valid = f"one of {', '.join(words[f.name])}", value in list(words[f.name])
            elif f.type is bool:
                rule, valid = "True or False", kind is bool
            elif "float" in str(f.type):
                top = math.inf if f.name.endswith("_range") else 1
                rule, valid = f"from 0 to below {top}", kind in (int, float) and 0 <= value < top
            elif f.name == "chunk_size":
                rule, valid = f"{rule} with use_chunking=True", valid or not self.use_chunking
            elif f.name == "id2label":
                numbers = kind is dict and all(str(key).isdigit() for key in value)
                rule, valid = "a dict of numbers and names", numbers
            elif "dict" in str(f.type):
                rule, valid = "a dict", kind is dict
            valid = valid or (value is None and "None" in str(f.type))
            require(valid, f"{f.name} must be {rule}, got {value!r}")
        Z, pad, size = self.shared_representation_size, self.pad_token_id, self.vocab_size
        rotary, decoder = self.relative_positional_bias == "rotary", self.is_decoder
        pre = self.normalize_before_mega and self.normalize_before_ffn
        require(pad is None or pad < size, f"pad_token_id {pad} is not below vocab_size {size}")
        require(Z % 2 == 0 or not rotary, f"shared_representation_size must be even, got {Z}")
        require(not (decoder and self.bidirectional), "is_decoder=True needs bidirectional=False")
        require(decoder or not self.add_cross_attention, "add_cross_attention needs is_decoder")
        require(pre or not self.final_norm, "final_norm needs both normalize_before_ settings")
        twice = self.gradient_checkpointing and "batchnorm" in self.normalization_type
        require(not twice, f"gradient_checkpointing would feed {self.normalization_type} twice")
        self.check_length("chunk_size", self.attention_limit or 1)
        count = self.num_labels  # a 2 may be just the default
        names = self.id2label or {i: f"LABEL_{i}" for i in range(count)}
        require(count in (2, len(names)), f"num_labels {count} is not that of id2label {names}")
        self.num_labels, self.id2label = len(names), {int(i): name for i, name in names.items()}

    @property
    def attention_limit(self) -> int | None:  # C, or None: attention sees the whole row
        return self.chunk_size if self.use_chunking else None

    def check_length(self, what: str, length: int):
        """ValueError if the simple bias has no number for distances within `length` positions."""
        limit = f"max_positions {self.max_positions}, the simple bias's limit"
        fits = self.relative_positional_bias != "simple" or length <= self.max_positions
        require(fits, f"{what} {length} is above {limit}; shorten, chunk, or use rotary")

    @classmethod
    def from_dict(cls, values: dict, **settings) -> "MegaConfig":
        """From the content of a config.json, its unknown keys in `extra`, and changed settings."""
        extra, kind = dict(values), values.get("model_type", "mega")
        require(kind == "mega", f"the config is of a {kind!r} model, not of a mega")
        known = {f.name: extra.pop(f.name) for f in fields(cls) if f.name in extra}
        names = settings.get("id2label") or known.get("id2label") or {}
        names = names if settings.get("num_labels", len(names)) == len(names) else {}
        known |= {"id2label": names, "extra": extra} | ({"num_labels": len(names)} if names else {})
        return cls(**known | settings)

    def to_dict(self) -> dict:
        """The content of a config.json, unknown keys included."""
        values, label2id = asdict(self), {name: i for i, name in self.id2label.items()}
        return {**values.pop("extra"), **values, "label2id": label2id, "model_type": "mega"}


# ----------------------------------------------------------------------------- 2 moving average
# The multi-dimensional damped EMA (section 3.1). Each channel of x is written to N hidden numbers,
# every one of them decays at its own rate, and their weighted sum is read out (equation 5):
#
#     h_t = q h_{t-1} + u x_t,    y_t = sum_n g h_t
#     u = p beta,    q = 1 - p decay,    g = gamma / sqrt(N)
#
# with p = alpha, decay = delta and gamma = eta in the paper, which has no 1/sqrt(N); its code has.
# (In the paper u is beta x, equation 4, and gamma the reset gate, equation 12.)
# Unrolled, this is a convolution with the kernel k[l] = sum_n g u q^l (appendix A). Four functions
# compute the same y (B, L, D) of x (B, L, D), u, q, g (D, N) and, where it goes on, h (B, D, N);
# other shapes are a ValueError. A bidirectional layer calls them with E = 2D for D.


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in fp32 if it is of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_fp32(ema):
    """Let an EMA function compute in fp32 or fp64, as powers of a q near 1 need; y as x's dtype."""

    @functools.wraps(ema)
    def wrapped(x, u, q, g, *args, **kwargs):
        check_shape("x", x, "B", "L", len(u))
        for name, coefficient in (("u", u), ("q", q), ("g", g)):
            check_shape(name, coefficient, x.shape[-1], u.shape[-1])
        dtype = functools.reduce(torch.promote_types, (x.dtype, u.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            y = ema(x.to(dtype), u.to(dtype), q.to(dtype), g.to(dtype), *args, **kwargs)
        return (y[0].to(x.dtype), y[1]) if isinstance(y, tuple) else y.to(x.dtype)

    return wrapped


def initial_state(x: Tensor, u: Tensor, state: Tensor | None) -> Tensor:
    """The state (B, D, N) given, in x's dtype, or zeros."""
    state = x.new_zeros(len(x), *u.shape) if state is None else state.to(x.dtype)
    check_shape("state", state, len(x), *u.shape)
    return state


def ema_kernel(u: Tensor, q: Tensor, g: Tensor, length: int, truncation=None) -> Tensor:
    """k[l] = sum_n g u q^l (appendix A), (D, length); with `truncation`, 0 from that tap on."""
    taps = length if truncation is None else min(truncation, length)
    u, q, g = (at_least_fp32(coefficient).unsqueeze(-1) for coefficient in (u, q, g))
    kernel = (g * u * q ** torch.arange(taps, dtype=q.dtype, device=q.device)).sum(-2)
    return F.pad(kernel, (0, length - taps))


def toeplitz(kernel: Tensor) -> Tensor:
    """(D, length) -> (D, length, length), convolving rows: M[d, j, i] = kernel[d, i - j] or 0."""
    length = kernel.shape[-1]
    return F.pad(kernel, (length - 1, 0)).unfold(-1, length, 1).flip(-2)


@in_fp32
def ema_direct(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """The definition, y_t = sum_l k[l] x_{t-l}: O(L^2 D) time and memory."""
    return torch.einsum("bjd,dji->bid", x, toeplitz(ema_kernel(u, q, g, x.shape[1], truncation)))


@in_fp32
def ema_fft(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """The convolution by FFT (appendix A): O(L (N + log L) D) time."""
    length, n = x.shape[1], 2 * x.shape[1]  # padded to n, so that its circle does not wrap around
    spectrum = torch.fft.rfft(x.mT, n) * torch.fft.rfft(ema_kernel(u, q, g, length, truncation), n)
    return torch.fft.irfft(spectrum, n)[..., :length].mT


@in_fp32
def ema_recurrent(x: Tensor, u: Tensor, q: Tensor, g: Tensor, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence from `state`, step by step (equation 5): y, last state; O(L D N) time."""
    h, ys = initial_state(x, u, state), []
    for x_t in x.unbind(1):
        h = torch.addcmul(q * h, u, x_t.unsqueeze(-1))  # q h + u x, (B, D, N)
        ys.append((g * h).sum(-1))
    return torch.stack(ys, 1), h


@in_fp32
def ema_blockwise(x: Tensor, u: Tensor, q: Tensor, g: Tensor, state=None, block=None):
    """Convolution in blocks, recurrence between: y, last state; O(L D (block + N)) time. A step's
    past is earlier steps of its block, weighed by the first taps, and the state at its start.
    """
    require(block is None or block >= 1, f"block must be a positive integer or None, got {block}")
    length = x.shape[1]
    block = min(block or (16 if length <= 512 else 32 if length <= 8192 else 64), length)
    q_powers = F.pad(q.unsqueeze(-1).expand(-1, -1, block - 1), (1, 0), value=1.0).cumprod(-1)
    inside = toeplitz(((g * u).unsqueeze(-1) * q_powers).sum(-2))  # x to y, (D, block, block)
    write = (u.unsqueeze(-1) * q_powers).flip(-1).mT  # x to state after the block, (D, block, N)
    read = (g * q).unsqueeze(-1) * q_powers  # state before the block to y, (D, N, block)
    h = initial_state(x, u, state).permute(1, 2, 0)  # (D, N, B)
    ys, rest = [], length % block
    for piece in x.split(length - rest, 1):  # the rest is shorter
        c = min(block, piece.shape[1])  # a last, short block uses a corner of the same matrices
        q_block = q * q_powers[..., c - 1]
        y, h = Blocks.apply(piece, inside[:, :c, :c], write[:, -c:], read[..., :c], q_block, h)
        ys.append(y)
    return torch.cat(ys, 1) if rest else y, h.permute(2, 0, 1)


class Blocks(torch.autograd.Function):
    """The work of `ema_blockwise`; its backward pass, by hand, is the same from right to left."""

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
    # An odd number of channels, as numbers 2^n apart evict each other from the cache: up to 3x.
    blocks = x.new_empty(B, L // c + 1, D | 1, c)
    blocks[:, :-1, :D], blocks[:, -1] = x.unflatten(1, (-1, c)).mT, 0
    return blocks.flatten(0, 1)[:, :D].transpose(0, 1)


def from_blocks(y: Tensor, rows: int) -> Tensor:
    """(D, B (K + 1), c) -> (B, K c, D)."""
    return y.unflatten(1, (rows, -1))[:, :, :-1].permute(1, 2, 3, 0).flatten(1, 2).contiguous()


def scan(h: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """h_k + decay h_{k-1} + decay^2 h_{k-2} + ..., or of later k; h (D, N, B, K), decay (D, N)."""
    decay, step = decay[..., None, None], 1  # log2(K) rounds: h becomes a sum of 1, 2, 4, ... terms
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
    """SiLU(EMA(x) + omega x), the paper's code (equation 6 is EMA(x) alone), by the algorithm
    `mode`; None takes the fastest that will do.
    """

    def __init__(self, config: MegaConfig, mode: str | None = None):
        super().__init__()
        D, N = config.hidden_size, config.ema_projection_size
        E, logit_std = 2 * D if config.bidirectional else D, config.ema_delta_alpha_range
        self.config, self.mode = config, mode
        self.damping_factor = normal(E, N, 1, std=logit_std)  # logit of p, the paper's alpha
        self.decay_factor = normal(E, N, 1, std=logit_std)  # logit of the paper's delta
        self.ema_expansion_matrix = normal(E, N, 1, std=config.ema_beta_range)  # beta
        self.ema_expansion_matrix.data += (-1.0) ** torch.arange(N).view(N, 1)  # near 1, -1, ...
        self.kernel_projection_matrix = normal(E, N, std=config.ema_gamma_omega_range)  # gamma
        self.residual_weight = normal(D, std=config.ema_gamma_omega_range)  # omega

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """u = p beta, q = 1 - p decay, g = gamma / sqrt(N), each (E, N), at least fp32."""
        p = at_least_fp32(self.damping_factor).sigmoid().squeeze(-1)
        decay = at_least_fp32(self.decay_factor).sigmoid().squeeze(-1)
        g = at_least_fp32(self.kernel_projection_matrix) / math.sqrt(p.shape[-1])
        return p * self.ema_expansion_matrix.squeeze(-1), 1 - p * decay, g

    def forward(self, x: Tensor, mask=None, state=None, mode=None, coefficients=None):
        """x (B, L, D), mask (B, L), 0 at pads, state (B, D, N), coefficients if at hand -> y, last
        state or None.
        """
        truncation, bidirectional = self.config.truncation, self.config.bidirectional
        steps = "recurrent" if x.shape[1] <= 16 else "blockwise"  # by measurement
        mode = mode or self.mode or (steps if truncation is None else "fft")
        require(mode in EMA_MODES, f"EMA mode must be one of {', '.join(EMA_MODES)}, got {mode!r}")
        carries = mode in ("recurrent", "blockwise")
        fits = not (carries and truncation) and (state is None or (carries and not bidirectional))
        rule = "only direct and fft truncate, only recurrent and blockwise go on from a state"
        require(fits, f"EMA mode {mode!r} with {truncation=}, {bidirectional=}: {rule}, one way")
        inputs = x if mask is None else x * mask.unsqueeze(-1)
        if bidirectional:  # the second D channels read from right to left
            inputs = torch.cat([inputs, inputs.flip(1)], -1)
        u, q, g = coefficients or self.coefficients()
        y = EMA_MODES[mode](inputs, u, q, g, state if carries else truncation)
        y, state = y if carries else (y, None)
        if bidirectional:
            y, state = y[..., : x.shape[-1]] + y[..., x.shape[-1] :].flip(1), None
        return F.silu(torch.addcmul(y, x, self.residual_weight)), state


def normal(*shape: int, std: float) -> nn.Parameter:
    """From N(0, std^2)."""
    return nn.Parameter(torch.randn(shape) * std)


# ---------------------------------------------------------------------------------- 3 attention
# Single-head attention with a reset gate (section 3.2, equations 6 to 15) in chunks (section 3.4):
# queries and keys from the EMA's output, values from its input. Shapes: q (B K, c, Z), k (B K, C,
# Z), v (B K, C, V), where the c queries stand at the last c of a chunk's C positions.

QUERIES = 256  # that attend at once: the scores of all would be a long row's largest tensor


def laplace(x: Tensor) -> Tensor:
    """A bounded relu2 (equation 16): mu = sqrt(1/2), sigma = sqrt(1 / (4 pi)), rounded as there."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ATTENTION_FUNCTIONS = {"softmax": lambda x: x.softmax(-1)}
ATTENTION_FUNCTIONS |= {"laplace": laplace, "relu2": lambda x: F.relu(x).square()}  # score by score


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, where a single row x (.., 1, n) keeps all CPU threads busy; BLAS takes one for it."""
    one = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == torch.float32
    parts = torch.get_num_threads() if one else 1
    if parts == 1 or y.shape[-1] % parts:
        return x @ y
    columns = y.view(y.shape[-2], parts, -1).transpose(0, 1)  # (parts, n, m / parts)
    return torch.bmm(x.expand(parts, 1, -1), columns).view(*x.shape[:-1], -1)


def attention(layer: nn.Module, q, k, v, bias: Tensor, visible: Tensor | None):
    """q (.., c, Z), k (.., w, Z), v (.., w, V), bias (c, w), -inf where no key is seen, visible
    (.., c, w) or None: no pads -> output (.., c, V), weights (.., c, w). Softmax scales by
    1/sqrt(Z), the others by 1/visible keys.
    """
    kind, divisor = layer.config.attention_activation, math.sqrt(q.shape[-1])
    if kind != "softmax":
        seen = bias > -math.inf if visible is None else visible
        divisor = seen.sum(-1, keepdim=True).clamp(min=1)
    scores = at_least_fp32((q / divisor) @ k.mT).add_(bias)
    if visible is None:
        weights = ATTENTION_FUNCTIONS[kind](scores)
    else:  # filled again after the function: a query that sees nothing gets zeros
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = ATTENTION_FUNCTIONS[kind](scores).masked_fill(~visible, 0)
    dropped = F.dropout(weights, layer.config.attention_probs_dropout_prob, layer.training)
    return matmul(dropped.to(v.dtype), v), weights


class SimpleBias(nn.Module):
    """One learned number for each distance (b_rel of equation 11, as in T5, Raffel et al. 2020)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.rel_pos_bias = normal(2 * config.max_positions - 1, std=config.initializer_range)

    def forward(self, end: int) -> Tensor:
        """The bias of a key at each distance 1-end ... end-1 from its query: (2 end - 1)."""
        self.config.check_length("length", end)
        centre = (self.config.attention_limit or self.config.max_positions) - 1
        distance = torch.arange(1 - end, end, device=self.rel_pos_bias.device)
        # Keys far before a query have negative indices, from the end: unique there, too.
        return self.rel_pos_bias[centre + distance]


class RotaryBias(nn.Module):
    """bias[i, j] = (R_i alpha) . (R_j b), turned by their places' angles; not RoPE on q and k."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.alpha = normal(1, config.shared_representation_size, std=config.initializer_range)
        self.b_param = normal(1, config.shared_representation_size, std=config.initializer_range)

    def forward(self, end: int) -> Tensor:
        """The bias at distances 1-end ... end-1, (2 end - 1): of both turns, only that by the
        distance is left in the product.
        """
        half, device = self.alpha.shape[-1] // 2, self.alpha.device
        pairs = torch.arange(half, dtype=torch.float32, device=device)
        distance = torch.arange(1 - end, end, dtype=torch.float32, device=device).unsqueeze(1)
        angle = distance * torch.exp(pairs * (-math.log(10000) / half))  # (2 end - 1, Z / 2)
        (a1, a2), (b1, b2) = (at_least_fp32(p[0]).chunk(2) for p in (self.alpha, self.b_param))
        cos, sin = angle.cos().to(a1), angle.sin().to(a1)
        with torch.autocast(device.type, enabled=False):
            return cos @ (a1 * b1 + a2 * b2) + sin @ (a2 * b1 - a1 * b2)


def bias_matrix(by_distance: Tensor, first: int, stop: int, keys: int) -> Tensor:
    """What a bias's forward says, for queries first ... stop-1 and keys 0 ... keys-1."""
    end = (len(by_distance) + 1) // 2
    return by_distance.unfold(0, keys, 1)[end - stop : end - first].flip(0)


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
    "rmsnorm": nn.RMSNorm,  # Hugging Face 4.40.2 returns its input: models from there differ here
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
    if module.training and module.config.use_feature_dropout:
        return x * F.dropout(torch.ones_like(x[:, :1]), p)
    return F.dropout(x, p, module.training)


ACTIVATIONS = {name: getattr(F, name) for name in ("silu", "relu", "relu6", "leaky_relu", "mish")}
ACTIVATIONS |= {"gelu": F.gelu, "gelu_python": F.gelu, "sigmoid": F.sigmoid, "tanh": F.tanh}
ACTIVATIONS |= {"swish": F.silu, "linear": nn.Identity(), "laplace": laplace}
ACTIVATIONS["relu2"] = ATTENTION_FUNCTIONS["relu2"]
ACTIVATIONS["gelu_10"] = lambda x: F.gelu(x).clamp(-10, 10)
ACTIVATIONS["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)
for name in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"):  # one formula
    ACTIVATIONS[name] = functools.partial(F.gelu, approximate="tanh")


class Linear(nn.Linear):
    """nn.Linear, of a single position by `matmul`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features:
            return super().forward(x)
        return matmul(x, self.weight.mT) + self.bias


def linear(config: MegaConfig, inputs: int, outputs: int) -> Linear:
    """With weights from N(0, initializer_range^2) and no bias at first."""
    layer = Linear(inputs, outputs)
    layer.weight.data.normal_(std=config.initializer_range)
    layer.bias.data.zero_()
    return layer


class MovingAverageGatedAttention(nn.Module):
    """Mega's layer: EMA, single-head attention in chunks, gates (section 3.2, figure 2b)."""

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

    def prepare(self, past: tuple, end: int) -> tuple:
        """The past and what all steps up to position `end` need again: the EMA's coefficients, the
        bias by distance, and keys and values with room, which the steps fill, for those to come.
        """
        end = min(self.config.attention_limit or end, end)
        room = [F.pad(old, (0, 0, 0, end - old.shape[1])) for old in past[1:3]]
        return *past, (self.ema_gate.coefficients(), self.rel_pos_bias(end), room)

    def forward(self, x: Tensor, mask=None, past=(), use_cache=False, output_attentions=False):
        """x (B, L, D), mask (B, R + L), False at pads -> y (B, L, D), the next past, weights. Past:
        the EMA's state (B, D, N), keys (B, R, Z), values (B, R, V), of all if not chunking, and
        perhaps what `prepare` adds.
        """
        config, (D, V, Z), activation = self.config, self.sizes, ACTIVATIONS[self.config.activation]
        state, *old = past[:3] or [None]
        coefficients, by_distance, room = past[3] if past[3:] else (None, None, None)
        n = self.norm(x) if config.normalize_before_mega else x
        v = dropout(activation(self.v_proj(n)), config.hidden_dropout_prob, self)  # (10)
        seen = None if mask is None else mask[:, -x.shape[1] :]
        m, state = self.ema_gate(n, seen, state, coefficients=coefficients)  # (6)
        m = dropout(m, config.dropout_prob, self)
        update, zr, hx = self.mx_proj(m).split([D, Z + V, D], -1)  # before (13), (7, 12), (14)
        z, reset = F.silu(zr).split([Z, V], -1)  # (7), (12)
        q, k = (z.unsqueeze(-2) * self.qk_weight + self.qk_bias).unbind(-2)  # (8), (9): (B, L, Z)
        if room:
            start, end = old[0].shape[1], old[0].shape[1] + x.shape[1]
            room[0][:, start:end], room[1][:, start:end] = k, v
            k, v = (t[:, :end] for t in room)
        elif old:
            k, v = (torch.cat(pair, 1) for pair in zip(old, (k, v), strict=True))  # (B, R + L, ..)
        attended, weights = self.attend(q, k, v, mask, output_attentions, by_distance)  # (11)
        candidate = activation(hx + self.h_proj(attended * reset))  # (14)
        y = gate(x, update, candidate, self)  # (13), (15)
        if not use_cache:
            return y, None, weights
        require(state is not None, "this EMA mode has no state to cache; unset it, or use_cache")
        closed = k.shape[1] - k.shape[1] % config.chunk_size if config.use_chunking else 0
        k, v = k[:, closed:], v[:, closed:]
        if closed and not room:  # or R positions would keep the memory of all alive
            k, v = k.clone(), v.clone()
        return y, (state, k, v, *past[3:]), weights

    def attend(self, q, k, v, mask: Tensor | None, output_attentions=False, by_distance=None):
        """q (B, L, Z), k (B, R + L, Z), v (B, R + L, V), mask (B, R + L) -> (B, L, V), weights."""
        config, (rows, L, _), end, before = self.config, q.shape, k.shape[1], 0
        chunk = min(config.attention_limit or end, end)
        if end > chunk:  # pads make all chunks whole: queries for the past, and the last one's rest
            before, after = end - L, -end % chunk
            if after and mask is None and not config.is_decoder:
                mask = q.new_ones(rows, end, dtype=torch.bool)
            mask = None if mask is None else F.pad(mask, (0, after))
            q, k, v = (F.pad(t, (0, 0, b, after)) for t, b in ((q, before), (k, 0), (v, 0)))
        c = min(chunk, q.shape[1])
        q, k, v = (t.reshape(-1, n, t.shape[-1]) for t, n in ((q, c), (k, chunk), (v, chunk)))
        mask = None if mask is None else mask.reshape(-1, 1, chunk)
        by_distance = self.rel_pos_bias(chunk) if by_distance is None else by_distance
        if config.is_decoder and c > 1:  # no key is seen from before it
            n = (len(by_distance) - 1) // 2
            by_distance = F.pad(by_distance[: n + 1], (0, n), value=-math.inf)
        outputs, maps = [], []
        for q_part in q.split(QUERIES, 1):
            first = chunk - c + QUERIES * len(outputs)
            stop = first + q_part.shape[1]
            keys = stop if config.is_decoder else chunk  # those after it are not seen
            bias = bias_matrix(by_distance, first, stop, keys)
            visible = None if mask is None else mask[..., :keys]
            if mask is not None and config.is_decoder:
                visible = visible & (bias > -math.inf)
            output, weights = attention(self, q_part, k[:, :keys], v[:, :keys], bias, visible)
            outputs.append(output)
            maps += [F.pad(weights, (0, chunk - keys))] if output_attentions else []
        output = outputs[0] if c <= QUERIES else torch.cat(outputs, 1)
        weights = torch.cat(maps, 1).view(rows, -1, c, chunk) if output_attentions else None
        return output.view(rows, -1, v.shape[-1])[:, before : before + L], weights


class GatedCrossAttention(nn.Module):
    """A decoder's look at its encoder's states: they give keys and values (the paper's code)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        D, Z = config.hidden_size, config.shared_representation_size
        self.config, self.sizes = config, [D, D, Z]
        self.norm = SequenceNorm(config, config.norm_affine)
        self.k_proj, self.v_proj = linear(config, D, Z), linear(config, D, D)
        self.q_proj, self.h_proj = linear(config, D, 2 * D + Z), linear(config, D, D)
        self.rel_pos_bias = POSITION_BIASES[config.relative_positional_bias](config)

    def forward(self, x: Tensor, source, mask=None, start: int = 0, past: tuple = ()):
        """x (B, L, D) from `start` on, source (B, S, D), mask (B, S), 0 at pads -> y (B, L, D),
        keys (B, S, Z) and values (B, S, D), as `past` in the source's place, weights (B, L, S).
        """
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        k, v = past or (self.k_proj(source), activation(self.v_proj(source)))
        n = self.norm(x) if config.normalize_before_mega else x
        update, reset, q = self.q_proj(n).split(self.sizes, -1)
        end = start + x.shape[1]
        bias = bias_matrix(self.rel_pos_bias(max(end, k.shape[1])), start, end, k.shape[1])
        visible = None if mask is None else mask.unsqueeze(1) != 0
        values = dropout(v, config.hidden_dropout_prob, self)
        attended, weights = attention(self, q, k, values, bias, visible)
        candidate = activation(self.h_proj(attended * F.silu(reset)))
        return gate(x, update, candidate, self), (k, v), weights


def gate(x: Tensor, update: Tensor, candidate: Tensor, layer: nn.Module) -> Tensor:
    """x and candidate (B, L, D), mixed by sigmoid(update): equations 13 and 15, and a post-norm."""
    candidate = dropout(candidate, layer.config.dropout_prob, layer)
    y = x + torch.sigmoid(update) * (candidate - x)
    return y if layer.config.normalize_before_mega else layer.norm(y)


# -------------------------------------------------------------------------------------- 4 block
# The layer above, in some decoders a cross-attention, and a feed-forward network (section 3.3).


class NormalizedFeedForward(nn.Module):
    """x + fc2(act(fc1(norm(x)))) or, as in equation 17, with the norm after the sum."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.norm = SequenceNorm(config, config.norm_affine)
        D, size = config.hidden_size, config.nffn_hidden_size
        self.fc1, self.fc2 = linear(config, D, size), linear(config, size, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        config, pre = self.config, self.config.normalize_before_ffn
        hidden = ACTIVATIONS[config.activation](self.fc1(self.norm(x) if pre else x))
        hidden = dropout(hidden, config.nffn_activation_dropout_prob, self)
        y = x + dropout(self.fc2(hidden), config.dropout_prob, self)
        return y if pre else self.norm(y)


class MegaBlock(nn.Module):
    """One layer of the model, with everything that a position goes through in it."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.mega_layer = MovingAverageGatedAttention(config)
        self.cross_attn = GatedCrossAttention(config) if config.add_cross_attention else None
        self.nffn = NormalizedFeedForward(config) if config.use_normalized_ffn else nn.Identity()

    def forward(self, x, mask=None, past=(), use_cache=False, output_attentions=False, cross=()):
        """As its parts; `cross`: source, mask, start -> y, the next past or None, weights of each.
        Past: the layer's state, keys and values, then the cross-attention's keys and values.
        """
        n = 0 if self.cross_attn is None else 2  # of its keys and values, after the layer's own
        own, crossed = past[:3] + past[3 + n :], None
        x, new, weights = self.mega_layer(x, mask, own, use_cache, output_attentions)
        if n:
            x, keys_values, crossed = self.cross_attn(x, *cross, past=past[3 : 3 + n])
            new = (*new[:3], *keys_values, *new[3:]) if use_cache else None
        return self.nffn(x), new, weights, crossed


# -------------------------------------------------------------------------------------- 5 model
# Embeddings, blocks, and the cache that lets a decoder go on where it stopped.


@dataclass
class MegaCache:
    """A decoder's memory of `length` positions; made with gradients on, it keeps their graph."""

    layers: list[tuple]  # the past of each MegaBlock
    mask: Tensor | None  # (B, R), False at pads; None: no pads
    source_mask: Tensor | None  # (B, S), 0 at pads of the encoder's states
    length: int

    def key_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask (B, R + L) of what is cached and x (B, L, D), True if visible; None: all is."""
        (B, L, _), (rows, R) = x.shape, self.layers[0][1].shape[:2] if self.length else (len(x), 0)
        require(rows == B, f"the cache has {rows} rows and the input {B}; they must be the same")
        if mask is None and self.mask is None:
            return None
        mask = x.new_ones(B, L) if mask is None else mask
        if mask.shape != (B, self.length + L):  # not of all since the start
            check_shape("attention_mask", mask, B, L)
            old = x.new_ones(B, R) if self.mask is None else self.mask
            mask = torch.cat([old, mask], 1)
        return mask[:, -R - L :] != 0


@dataclass
class MegaOutput:
    """What a model returns; None stands for what was not asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # the head says which
    start_logits: Tensor | None = None  # (B, L), of question answering
    end_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None  # (B, L, D)
    pooler_output: Tensor | None = None  # (B, D)
    cache: MegaCache | None = None
    hidden_states: tuple | None = None  # (B, L, D) of the embedding and after each layer
    attentions: tuple | None = None  # (B, K, c, w) of each layer, with pads in chunks cut short
    cross_attentions: tuple | None = None  # (B, L, S) of each layer


class MegaBase(nn.Module):
    """What the bare model and the heads on it share: weights as a whole (data/checkpoint.py)."""

    output = ""  # the name of a head's last layer

    def resize_token_embeddings(self, size: int):
        """Keep the first `size` tokens, or add new ones; output layer and config follow."""
        import_module("data.checkpoint").resize(self, size)

    def save_pretrained(self, folder: str):
        """Write config.json and model.safetensors, which Hugging Face's library reads, too."""
        import_module("data.checkpoint").write(self, folder)

    @classmethod
    def from_pretrained(cls, source: str, ignore_mismatched_sizes: bool = False, **settings):
        """The model, in eval mode, of a folder or hub id `owner/name`, with settings changed; an
        OSError or ValueError if it can't be read or does not fit, a warning if it lacks a head.
        """
        files = import_module("data.checkpoint")
        config, weights = files.read(source)
        model = cls(MegaConfig.from_dict(config, **settings))
        files.fill(model, weights, ignore_mismatched_sizes, source)
        return model.eval()


class MegaModel(MegaBase):
    """Embeddings and blocks: token ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True):
        super().__init__()
        self.config, D = config, config.hidden_size
        tables = {"word_embeddings": nn.Embedding(config.vocab_size, D, config.pad_token_id)}
        if config.add_token_type_embeddings:
            tables["token_type_embeddings"] = nn.Embedding(config.type_vocab_size, D)
        for table in tables.values():
            table.weight.data *= config.initializer_range  # PyTorch's are from N(0, 1), pads 0
        self.embedding_layer = nn.ModuleDict(tables)
        self.layers = nn.ModuleList(MegaBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = SequenceNorm(config, False) if config.final_norm else nn.Identity()
        self.pooler = nn.ModuleDict({"dense": linear(config, D, D)}) if add_pooling_layer else None

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                encoder_hidden_states=None, encoder_attention_mask=None, cache=None, use_cache=None,
                output_attentions=False, output_hidden_states=False) -> MegaOutput:  # fmt: skip
        """input_ids (B, L) or inputs_embeds (B, L, D) -> last_hidden_state (B, L, D), and more.

        Masks (B, L) and (B, S) are 0 at pads; token types (B, L), 0 unless given, are read where
        the config has them; cross-attention needs encoder_hidden_states (B, S, D). A cache given is
        always used: the input goes on where it ends, with the encoder's states of its start, and
        the mask may be the input's or that of all since then. `use_cache` asks for the next one.
        """
        config, source, source_mask = self.config, encoder_hidden_states, encoder_attention_mask
        can_cache = config.is_decoder and config.truncation is None
        if use_cache is None:
            use_cache = config.use_cache and can_cache and not self.training
        said = f"a cache needs a decoder, got {config.is_decoder=} and {config.truncation=}"
        require(can_cache or not (use_cache or cache), said)
        x = self.embed(input_ids, inputs_embeds, token_type_ids)
        if cache is None:  # one of nothing
            fits = config.add_cross_attention == (source is not None)
            require(fits, "add_cross_attention=True and encoder_hidden_states need each other")
            if source is not None:
                check_shape("encoder_hidden_states", source, len(x), "S", x.shape[2])
            if source is not None and source_mask is not None:
                check_shape("encoder_attention_mask", source_mask, *source.shape[:2])
            cache = MegaCache([()] * len(self.layers), None, source_mask, 0)
        cross = source, cache.source_mask, cache.length
        mask, layers, hidden, maps = cache.key_mask(x, attention_mask), [], [x], []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            if config.gradient_checkpointing and torch.is_grad_enabled():
                layer = functools.partial(checkpoint, layer, use_reentrant=False)
            x, past, *weights = layer(x, mask, past, use_cache, output_attentions, cross)
            layers.append(past)
            hidden += [x] if output_hidden_states else []
            maps += [weights] if output_attentions else []
        out = MegaOutput(last_hidden_state=self.final_norm(x))
        out.hidden_states = tuple(hidden) if output_hidden_states else None
        out.attentions, crossed = zip(*maps, strict=True) if output_attentions else (None, None)
        out.cross_attentions = crossed if config.add_cross_attention else None
        if self.pooler is not None:
            pooled = self.pool(out.last_hidden_state, attention_mask)
            out.pooler_output = torch.tanh(self.pooler["dense"](pooled))
        if use_cache:
            kept = None if mask is None else mask[:, mask.shape[1] - layers[0][1].shape[1] :]
            out.cache = MegaCache(layers, kept, cache.source_mask, cache.length + x.shape[1])
        return out

    def embed(self, input_ids, x: Tensor | None, types) -> Tensor:
        """What the first layer sees, (B, L, D): of ids, or x itself, and of token types."""
        config = self.config
        require((input_ids is None) != (x is None), "give input_ids or inputs_embeds, not both")
        if x is None:
            check_ids("input_ids", input_ids, config.vocab_size)
            x = self.embedding_layer["word_embeddings"](input_ids)
            x = x * math.sqrt(config.hidden_size) if config.scale_embedding else x
        check_shape("inputs_embeds", x, "B", "L", config.hidden_size)
        if config.add_token_type_embeddings:
            types = x.new_zeros(x.shape[:2], dtype=torch.int64) if types is None else types
            check_ids("token_type_ids", types, config.type_vocab_size, *x.shape[:2])
            x = x + self.embedding_layer["token_type_embeddings"](types)
        return x

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """One vector for each row of x (B, L, D), (B, D): its first or, with mean_pooling, mean."""
        if not self.config.mean_pooling:
            return x[:, 0]
        mask = x.new_ones(x.shape[:2]) if mask is None else mask[:, -x.shape[1] :]
        visible = (mask != 0).to(x)
        return (x * (visible / visible.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)).sum(1)


def check_ids(name: str, ids: Tensor, limit: int, *shape: int):
    """ValueError unless `ids` is a non-empty (B, L) of integers from 0 to limit - 1."""
    check_shape(name, ids, *(shape or "BL"))
    require(ids.dtype in (torch.int64, torch.int32), f"{name} must be integers, got {ids.dtype}")
    for extreme in (ids.min(), ids.max()) if ids.device.type == "cpu" else ():  # no wait for a GPU
        require(0 <= extreme < limit, f"{name} must be from 0 to {limit - 1}, got {extreme}")


# -------------------------------------------------------------------------------------- 6 heads

SLICE = 512  # positions whose logits exist at once: those of all would be a step's largest tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Mean over labels (..) but those `ignored`, of logits (.., classes), in nats."""
    check_shape("labels", labels, *logits.shape[:-1])
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=ignored)


PROBLEM_TYPES = {
    "regression": lambda x, y: F.mse_loss(x, y.to(x).view_as(x)),  # of logits x and labels y
    "single_label_classification": cross_entropy,
    "multi_label_classification": lambda x, y: F.binary_cross_entropy_with_logits(x, y.to(x)),
}


class MegaHead(MegaBase):
    """A model, and on its `features` dropout, a linear layer named `output`, and a loss."""

    output, pooled, loss = "classifier", False, staticmethod(cross_entropy)

    def __init__(self, config: MegaConfig, size: int, p: float | None = 0.0):
        super().__init__()
        self.config, self.mega = config, MegaModel(config, self.pooled)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.add_module(self.output, linear(config, config.hidden_size, size))

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, **inputs) -> MegaOutput:
        """Arguments as MegaModel's; with labels, -100 for none, also their mean loss."""
        out = self.mega(input_ids, attention_mask, **inputs)
        out.logits = self.logits(out, attention_mask)
        out.loss = None if labels is None else self.loss(at_least_fp32(out.logits), labels)
        return out

    def logits(self, out: MegaOutput, mask: Tensor | None = None) -> Tensor:
        return getattr(self, self.output)(self.dropout(self.features(out, mask)))

    def features(self, out: MegaOutput, mask: Tensor | None) -> Tensor:
        return out.pooler_output if self.pooled else out.last_hidden_state


class MegaForTokenClassification(MegaHead):
    """Scores for each token: logits (B, L, num_labels), labels (B, L)."""

    def __init__(self, config: MegaConfig):
        super().__init__(config, config.num_labels, config.classifier_dropout)


class MegaForSequenceClassification(MegaHead):
    """Scores for each row (B, num_labels); labels: classes, numbers (B), flags (B, num_labels)."""

    def __init__(self, config: MegaConfig):
        super().__init__(config, config.num_labels, config.classifier_dropout)
        layers = {"dense": linear(config, config.hidden_size, config.hidden_size)}
        layers |= {"tanh": nn.Tanh(), "dropout": self.dropout, "out_proj": self.classifier}
        self.classifier = nn.Sequential(OrderedDict(layers))

    def features(self, out: MegaOutput, mask: Tensor | None) -> Tensor:
        return self.mega.pool(out.last_hidden_state, mask)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        flags = labels.is_floating_point() or labels.dtype == torch.bool
        kind = "multi_label_classification" if flags else "single_label_classification"
        kind = "regression" if logits.shape[-1] == 1 else kind
        return PROBLEM_TYPES[self.config.problem_type or kind](logits, labels)


class MegaForMultipleChoice(MegaHead):
    """Scores for each row's choices: inputs (B, choices, L), logits (B, choices), labels (B)."""

    pooled = True

    def __init__(self, config: MegaConfig):
        super().__init__(config, 1, config.hidden_dropout_prob)

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, **inputs) -> MegaOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        flat = {k: x.flatten(0, 1) if torch.is_tensor(x) else x for k, x in inputs.items()}
        out, rows = super().forward(**flat), [len(x) for x in inputs.values() if torch.is_tensor(x)]
        out.logits = out.logits.view(rows[0], -1)
        out.loss = None if labels is None else self.loss(at_least_fp32(out.logits), labels)
        return out


class MegaForQuestionAnswering(MegaHead):
    """Scores of each place as an answer's start and end (B, L); one from L on has no loss, one
    below 0 counts as 0.
    """

    output = "qa_outputs"

    def __init__(self, config: MegaConfig):
        require(config.num_labels == 2, f"num_labels must be 2 here, got {config.num_labels}")
        super().__init__(config, 2)

    def forward(self, *args, start_positions=None, end_positions=None, **inputs) -> MegaOutput:
        """As MegaModel's; with both positions (B), also the mean of their losses."""
        out = super().forward(*args, **inputs)
        out.start_logits, out.end_logits = out.logits.unbind(-1)
        if start_positions is not None and end_positions is not None:
            L = out.logits.shape[1]  # stands for all places outside
            start = cross_entropy(at_least_fp32(out.start_logits), start_positions.clamp(0, L), L)
            end = cross_entropy(at_least_fp32(out.end_logits), end_positions.clamp(0, L), L)
            out.loss = (start + end) / 2
        return out


class SlicedLoss(torch.autograd.Function):
    """`cross_entropy` of linear(x, weight, bias), x (T, D) and labels (T), slice by slice; so that
    the logits of a slice can go, their gradient, softmax minus the label's one-hot, is taken there.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, needs_gradient: bool):
        nats, dx, ctx.count, wide = 0, [], len(x), torch.promote_types(x.dtype, torch.float32)
        dweight, dbias = (torch.zeros_like(p, dtype=wide) for p in (weight, bias))
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, weight, bias = (t.to(low) for t in (x, weight, bias))
        for x_s, label in zip(x.split(SLICE), labels.unsqueeze(-1).split(SLICE), strict=True):
            logits = F.linear(x_s, weight, bias)
            p = logits.softmax(-1, dtype=wide)
            log_sum = logits.amax(-1, True) - p.amax(-1, True).log()  # of all logits' exponentials
            nats += (log_sum - logits.gather(-1, label)).sum()
            if needs_gradient:
                p = p.scatter_add_(-1, label, -torch.ones_like(log_sum)).to(low)
                dx, dweight, dbias = [*dx, p @ weight], dweight.add_(p.mT @ x_s), dbias + p.sum(0)
        ctx.save_for_backward(*([torch.cat(dx), dweight, dbias] if needs_gradient else []))
        return nats / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return *(d * (dloss / max(ctx.count, 1)) for d in ctx.saved_tensors), None, None


class LanguageModel(MegaHead):
    """Scores of the vocabulary at each position: logits (B, L, vocab_size), labels (B, L)."""

    def __init__(self, config: MegaConfig):
        if config.is_decoder != (self.output == "lm_head"):
            said = f"is_decoder={config.is_decoder} is not what {type(self).__name__} is for"
            warnings.warn(f"{said}: it says whether a token sees those after it", stacklevel=2)
        super().__init__(config, config.vocab_size)
        D = config.hidden_size
        self.dense = linear(config, D, D) if config.add_lm_hidden_dense_layer else None
        if config.tie_word_embeddings:
            getattr(self, self.output).weight = self.mega.embedding_layer["word_embeddings"].weight

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, output_logits=None,
                **inputs) -> MegaOutput:  # fmt: skip
        """As MegaHead's; output_logits=None leaves them out in training steps of many positions."""
        if output_logits is None:
            output_logits = not self.training or labels is None or labels.numel() <= SLICE
        if output_logits or labels is None:
            return super().forward(input_ids, attention_mask, labels=labels, **inputs)
        out, seen = self.mega(input_ids, attention_mask, **inputs), labels != -100
        check_shape("labels", labels, *out.last_hidden_state.shape[:2])
        x, output = self.features(out, None)[seen], getattr(self, self.output)
        labels, needs_gradient = labels[seen].long(), torch.is_grad_enabled()
        out.loss = SlicedLoss.apply(x, output.weight, output.bias, labels, needs_gradient)
        return out

    def features(self, out: MegaOutput, mask: Tensor | None) -> Tensor:
        hidden = out.last_hidden_state
        return hidden if self.dense is None else torch.tanh(self.dense(hidden))


class MegaForMaskedLM(LanguageModel):
    """Names the tokens behind masks; labels are -100 where there is none to name."""

    output = "mlm_head"


class MegaForCausalLM(LanguageModel):
    """Predicts the next token; labels[t] is the token at t or, if not shift_labels, after it."""

    output = "lm_head"

    def forward(self, *args, labels=None, shift_labels=True, **inputs) -> MegaOutput:
        """As LanguageModel's, with `shift_labels`."""
        if labels is not None and shift_labels:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return super().forward(*args, labels=labels, **inputs)

    # --------------------------------------------------------------------------- 7 generation
    # One pass over the prompt fills the cache; from there each token costs one step.

    def generate(self, input_ids, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
                 eos_token_id=None, attention_mask=None, seed=None, stream=None,
                 token_type_ids=None, **inputs) -> Tensor:  # fmt: skip
        """Continue input_ids (B, L): returns (B, L + new), new <= max_new_tokens.

        Temperature 0 takes the likeliest token; top_k and top_p limit the draw to the likeliest.
        After eos_token_id (None: there is no end) a row is filled with pads, or eos if there is no
        pad; the call ends when all are. Pads in front (attention_mask 0) change nothing for a row.
        `stream` is called with each new token (B,). New tokens have the last token type; other
        inputs as MegaModel's. A ValueError names what can't be: an option, a pad, a length.
        """
        valid = max_new_tokens >= 0 and 0 <= temperature < math.inf
        valid &= (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
        said = "generate needs max_new_tokens and temperature >= 0, top_k >= 1, top_p in (0, 1]"
        require(valid, f"{said}, got {max_new_tokens}, {temperature}, {top_k} and {top_p}")
        config, pad = self.config, self.config.pad_token_id
        check_ids("input_ids", input_ids, config.vocab_size)
        ids, start, end, cache = F.pad(input_ids, (0, max_new_tokens)), 0, input_ids.shape[1], None
        longest = max(ids.shape[1] - 1, 1)  # the last token is not read
        if not config.use_chunking or config.add_cross_attention:
            config.check_length("prompt and new tokens but the last:", longest)
        if attention_mask is not None:
            visible, whole = attention_mask != 0, config.attention_limit or 1
            check_shape("attention_mask", visible, *input_ids.shape)
            left = (visible.cumsum(1) > 0).eq(visible).all() and visible[:, -1].all()
            require(left, "generate needs the pads in front of each row's tokens")
            pads, crosses = (~visible).sum(1), config.add_cross_attention
            fits = not (pads.any() if crosses else (pads % whole).any())
            said = f"pads {pads.tolist()} move tokens against chunks or an encoder's states"
            require(fits, f"{said}; give rows of one length, or one row at a time")
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        done = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.inference_mode():  # less work for each step than no_grad
                while end < ids.shape[1] and not done.all():
                    new = ids[:, start:end], attention_mask, token_type_ids
                    out = self.mega(*new, cache=cache, use_cache=True, **inputs)
                    out.last_hidden_state = out.last_hidden_state[:, -1]
                    logits = at_least_fp32(self.logits(out))
                    token = draw(logits, temperature, top_k, top_p, generator)
                    if eos_token_id is not None:
                        token = token.masked_fill(done, eos_token_id if pad is None else pad)
                        done = done | (token == eos_token_id)
                    ids[:, end] = token
                    if not start:
                        pasts = zip(self.mega.layers, out.cache.layers, strict=True)
                        out.cache.layers = [b.mega_layer.prepare(p, longest) for b, p in pasts]
                    start, end, cache, attention_mask = end, end + 1, out.cache, None
                    token_type_ids = None if token_type_ids is None else token_type_ids[:, -1:]
                    if stream is not None:
                        stream(ids[:, start])  # a tensor that may be trained on
        finally:
            for module in training:
                module.training = True
        return ids[:, :end]


def draw(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token of each row of logits (B, vocab_size): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-30)  # no 0 / 0
    if top_k is not None:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if top_p is not None:
        p, index = logits.softmax(-1).sort(descending=True)
        late = p.cumsum(-1) - p >= top_p  # those before it hold top_p already; never the likeliest
        logits = logits.masked_fill(late.scatter(-1, index, late), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


if __name__ == "__main__":
    import_module("data.demo").main()
