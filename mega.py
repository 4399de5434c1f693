"""MEGA: Moving Average Equipped Gated Attention (Ma et al. 2022, arXiv 2209.10655) in one file.

A layer smooths its input with a learned, damped exponential moving average (EMA). Queries and keys
come from the smoothed input, values from the input itself. A single head attends within chunks of
the sequence, and gates mix its output into the input. Only the EMA connects the chunks.

Shapes are batch-first. Letters stand for sizes (not for the paper's matrices of the same names):

    B  sequences in a batch                D  hidden_size, channels
    L  positions in this call              V  intermediate_size, width of the values
    C  chunk_size, positions per chunk     Z  shared_representation_size, width of queries and keys
    K  chunks per sequence                 N  ema_projection_size, EMA states per channel
    T  queries per chunk                   E  EMA channels: D, or 2D when bidirectional
    R  cached positions                    P  max_positions
    S  encoder positions                   M  EMA blocks per sequence, of c positions each

and for the coefficients of an EMA state: u scales the input written to it, q (between 0 and 1) is
the factor by which it decays per step, and g is its weight in the output.

Parameters have Hugging Face's names, so that its checkpoints load. Two of the names mislead:
`damping_factor` is the logit of the paper's alpha, here p, and `decay_factor` that of its damping
factor delta.
"""

import contextlib
import functools
import json
import math
import numbers
import operator
import re
import time
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------- 1 config
# Hugging Face's names and defaults. final_norm, scale_embedding and mean_pooling come from the
# paper's code, whose language models use the first two and add_lm_hidden_dense_layer=False.


@dataclass
class MegaConfig:
    """Settings of a model; an invalid one raises a ValueError when a config or a model is built."""

    vocab_size: int = 30522
    hidden_size: int = 128  # D
    num_hidden_layers: int = 4
    intermediate_size: int = 256  # V
    ema_projection_size: int = 16  # N
    bidirectional: bool = True  # the EMA also runs from right to left
    shared_representation_size: int = 64  # Z
    use_chunking: bool = False
    chunk_size: int = -1  # C
    truncation: int | None = None  # keep only this many taps of the EMA kernel; None: all
    normalize_before_mega: bool = True
    normalization_type: str = "scalenorm"
    norm_affine: bool = True
    activation: str = "silu"
    attention_activation: str = "softmax"
    dropout_prob: float = 0.1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    use_feature_dropout: bool = False  # dropout drops a feature at all positions of a sequence
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
    add_cross_attention: bool = False  # a decoder's layers also attend to an encoder's states
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    add_lm_hidden_dense_layer: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    num_labels: int = 2
    id2label: dict | None = None  # names of the labels; None: LABEL_0, LABEL_1, ...
    problem_type: str | None = None  # for sequence classification; None: inferred from the labels
    tie_word_embeddings: bool = True
    use_cache: bool = True  # a decoder in eval mode returns its cache unless told otherwise
    final_norm: bool = False  # a norm without learned scale and shift after the last layer
    scale_embedding: bool = False  # embeddings times sqrt(D)
    mean_pooling: bool = False  # pool a sequence by its mean, not its first position
    gradient_checkpointing: bool = False  # recompute layers in the backward pass to save memory
    extra: dict = field(default_factory=dict, repr=False)  # a config.json's unknown keys

    def __setattr__(self, name, value):
        """Set a setting; turn a NumPy or PyTorch scalar into a Python one, which JSON can hold."""
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        super().__setattr__(name, value)

    def __post_init__(self):
        if isinstance(self.id2label, dict) and self.num_labels == 2:  # 2 may be just the default
            self.num_labels = len(self.id2label)
        self.check()
        if self.id2label is None:
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        self.id2label = {int(i): name for i, name in self.id2label.items()}  # JSON keys are text

    def check(self):
        """Raise a ValueError about the first invalid setting or pair of settings."""
        for names, rule, valid in (
            (COUNTS, "a positive integer", lambda x: is_integer(x, 1)),
            ("chunk_size", "an integer", lambda x: is_integer(x, -math.inf)),
            (f"{COUNTS} chunk_size", f"at most {LARGEST}", lambda x: x <= LARGEST),
            ("num_labels type_vocab_size", "at most 65536", lambda x: x <= 65536),
            ("truncation", "None or a positive integer", lambda x: x is None or is_integer(x, 1)),
            (TOKEN_IDS, "None or an integer >= 0", lambda x: x is None or is_integer(x, 0)),
            (FLAGS, "True or False", lambda x: isinstance(x, bool)),
            (PROBABILITIES, "at least 0 and below 1", lambda x: is_number(x, below=1)),
            (
                "classifier_dropout",
                "None, or at least 0 and below 1",
                lambda x: x is None or is_number(x, 1),
            ),
            (SPREADS, "at least 0 and below a million", lambda x: is_number(x, below=1e6)),
            ("id2label", "None or a dict from numbers to names", is_optional_names),
            ("extra", "a dict", lambda x: isinstance(x, dict)),
            ("normalization_type", *one_of(NORMS)),
            ("activation", *one_of(ACTIVATIONS)),
            ("attention_activation", *one_of(ATTENTION_FUNCTIONS)),
            ("relative_positional_bias", *one_of(POSITION_BIASES)),
            ("problem_type", *one_of([None, *PROBLEM_TYPES])),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not valid(value):
                    raise ValueError(f"{name} must be {rule}, got {value!r}")

        if self.use_chunking and self.chunk_size < 1:
            raise ValueError(
                f"use_chunking=True needs a positive chunk_size, got {self.chunk_size}"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(  # the embedding must have a row for it
                f"pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}"
            )
        if self.relative_positional_bias == "rotary" and self.shared_representation_size % 2:
            raise ValueError(
                "shared_representation_size must be even for the rotary bias, "
                f"got {self.shared_representation_size}"
            )
        if self.is_decoder and self.bidirectional:
            raise ValueError("is_decoder=True needs bidirectional=False: the EMA must be causal")
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention=True needs is_decoder=True")
        if self.final_norm and not (self.normalize_before_mega and self.normalize_before_ffn):
            raise ValueError(
                "final_norm=True needs normalize_before_mega=True and normalize_before_ffn=True"
            )
        if self.gradient_checkpointing and "batchnorm" in self.normalization_type:
            raise ValueError(
                f"gradient_checkpointing=True would update {self.normalization_type}'s statistics "
                "twice; choose another normalization_type"
            )
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ValueError(
                f"num_labels is {self.num_labels} and id2label has {len(self.id2label)} names; "
                "give one name per label, or id2label=None"
            )
        if self.use_chunking:
            self.check_length("chunk_size", self.chunk_size)

    @property
    def attention_limit(self) -> int | None:
        """Return C, or None if attention sees the whole sequence."""
        return self.chunk_size if self.use_chunking else None

    def check_length(self, what: str, length: int):
        """Raise a ValueError if the simple bias has too few weights for `length` positions."""
        if self.relative_positional_bias == "simple" and length > self.max_positions:
            raise ValueError(
                f"{what} {length} is above max_positions {self.max_positions}, the simple bias's "
                "limit; use a shorter input, smaller chunks or the rotary bias"
            )

    @classmethod
    def from_dict(cls, values: dict, **settings) -> "MegaConfig":
        """Build a config from a parsed config.json, whose values `settings` override.

        Keys that MegaConfig does not have are kept in `extra`.
        """
        if values.get("model_type", "mega") != "mega":
            raise ValueError(f"the config is for a {values['model_type']!r} model, not for MEGA")
        names = {f.name for f in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known["extra"] = {name: value for name, value in values.items() if name not in names}
        labels = settings.get("id2label") or known.pop("id2label", None)
        if not isinstance(labels, dict):
            known["id2label"] = labels  # None, or invalid
        elif settings.get("num_labels", len(labels)) == len(labels):
            known["id2label"] = labels  # a different num_labels discards the file's names
            known["num_labels"] = len(labels)
        return cls(**{**known, **settings})

    def to_dict(self) -> dict:
        """Return the content of a config.json, unknown keys included."""
        values = asdict(self)
        extra = values.pop("extra")
        label2id = {name: i for i, name in self.id2label.items()}
        return {**extra, **values, "label2id": label2id, "model_type": "mega"}


# Settings, grouped by the rule that MegaConfig.check applies.
COUNTS = """
    vocab_size hidden_size num_hidden_layers intermediate_size ema_projection_size
    shared_representation_size nffn_hidden_size max_positions type_vocab_size num_labels
"""
LARGEST = 1 << 24  # beyond any real model, but the product of two does not overflow
TOKEN_IDS = "pad_token_id bos_token_id eos_token_id"
FLAGS = """
    bidirectional use_chunking normalize_before_mega norm_affine use_feature_dropout
    use_normalized_ffn normalize_before_ffn add_token_type_embeddings is_decoder
    add_cross_attention add_lm_hidden_dense_layer tie_word_embeddings use_cache final_norm
    scale_embedding mean_pooling gradient_checkpointing
"""
PROBABILITIES = """
    dropout_prob hidden_dropout_prob attention_probs_dropout_prob nffn_activation_dropout_prob
"""
SPREADS = "initializer_range ema_delta_alpha_range ema_beta_range ema_gamma_omega_range"


def is_integer(x, least: float) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= least


def is_number(x, below: float) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < below


def is_optional_names(x) -> bool:
    return x is None or (isinstance(x, dict) and all(str(key).isdecimal() for key in x))


def one_of(choices):
    """Return the rule "one of the choices", as text and as a predicate."""
    choices = list(choices)
    return f"one of {', '.join(map(str, choices))}", lambda x: x in choices


def check_shape(name: str, x: Tensor, *shape: int | str):
    """Raise a ValueError unless x has the shape, in which a letter stands for any size but 0."""
    if not torch.is_tensor(x):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    fits = [
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(x.shape, shape, strict=False)
    ]
    if x.ndim != len(shape) or not all(fits):
        text = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have non-empty shape ({text}), got {tuple(x.shape)}")


def check_integers(name: str, x: Tensor, *shape: int | str) -> Tensor:
    """Return x as int64; raise a ValueError unless it has integers and this shape."""
    check_shape(name, x, *shape)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} must contain integers, got {x.dtype}")
    return x.long()


def check_ids(name: str, ids: Tensor, limit: int, *shape: int | str, ignored=None) -> Tensor:
    """Return ids as int64; raise a ValueError for a wrong shape or ids outside 0 ... limit - 1."""
    ids = check_integers(name, ids, *shape)
    check_range(name, ids if ignored is None else ids.masked_fill(ids == ignored, 0), limit - 1)
    return ids


def check_range(name: str, x: Tensor, most: int):
    """Raise a ValueError unless all of x lies between 0 and `most`."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values would wait for the GPU, and can't be traced
    low, high = x.aminmax()
    if not (low >= 0 and high <= most):  # NaN fails both
        raise ValueError(f"{name} must be from 0 to {most}, got {high if low >= 0 else low}")


# ----------------------------------------------------------------------------- 2 moving average
# The multi-dimensional damped EMA (section 3.1). Each channel of x is written to N states, each
# state decays at its own rate, and the channel's output is a weighted sum of them (equation 5):
#
#     h_t = q h_{t-1} + u x_t,    y_t = sum_n g h_t
#     u = p beta,    q = 1 - p delta,    g = gamma / sqrt(N)
#
# where p is the paper's alpha, and gamma its eta (1/sqrt(N) is only in the paper's code). Unrolled,
# this is a convolution with the kernel k[l] = sum_n g u q^l (appendix A). The functions below all
# compute the same y (B, L, D) of x (B, L, D) and u, q, g (D, N), in fp32 or fp64; some continue
# from a state (B, D, N) and return the last one. A bidirectional layer calls them with E channels
# in place of D.


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_is_on(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_off(x: Tensor):
    """Return a context without autocast on x's device, so that fp32 stays fp32."""
    if autocast_is_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def ema_kernel(u: Tensor, q: Tensor, g: Tensor, length: int, truncation=None) -> Tensor:
    """Compute k[l] = sum_n g u q^l (appendix A), (D, length); 0 for l >= truncation."""
    taps = length if truncation is None else min(truncation, length)
    lags = torch.arange(taps, dtype=q.dtype, device=q.device)
    kernel = torch.einsum("dn,dnl->dl", g * u, q.unsqueeze(-1) ** lags)
    return F.pad(kernel, (0, length - taps))


def toeplitz(kernel: Tensor) -> Tensor:
    """Make the matrices that convolve with k (D, L): M[d, i, j] = k[d, i - j], or 0 if j > i."""
    length = kernel.shape[-1]
    padded = F.pad(kernel, (length - 1, 0))  # 0 ... 0 k[0] ... k[L-1]
    windows = padded.unfold(-1, length, 1)  # the i-th is k[i-L+1] ... k[i]
    return windows.flip(-1)


def ema_direct(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """Convolve by the definition, y_i = sum_j k[i - j] x_j: O(L^2 D) time and memory."""
    matrices = toeplitz(ema_kernel(u, q, g, x.shape[1], truncation))  # (D, L, L)
    return torch.einsum("dij,bjd->bid", matrices, x)


def ema_fft(x: Tensor, u: Tensor, q: Tensor, g: Tensor, truncation=None) -> Tensor:
    """Convolve by FFT (appendix A): O(L (N + log L) D) time."""
    length = x.shape[1]
    kernel = ema_kernel(u, q, g, length, truncation)
    padded = 2 * length  # with zeros, so that the circular convolution does not wrap around
    spectrum = torch.fft.rfft(x.mT, padded) * torch.fft.rfft(kernel, padded)
    return torch.fft.irfft(spectrum, padded)[..., :length].mT


def ema_recurrent(x: Tensor, u: Tensor, q: Tensor, g: Tensor, state=None) -> tuple[Tensor, Tensor]:
    """Step through the recurrence (equation 5); return y and the last state. O(L D N) time."""
    h = initial_state(x, u, state)
    ys = []
    for x_t in x.unbind(dim=1):
        h = torch.addcmul(q * h, u, x_t.unsqueeze(-1))  # q h + u x, (B, D, N)
        ys.append((g * h).sum(dim=-1))  # (B, D)
    return torch.stack(ys, dim=1), h


def initial_state(x: Tensor, u: Tensor, state: Tensor | None) -> Tensor:
    """Return the state to start from, (B, D, N): the one given, or zeros."""
    if state is None:
        return x.new_zeros(len(x), *u.shape)
    check_shape("state", state, len(x), *u.shape)
    return state.to(x.dtype)


def ema_blockwise(x, u, q, g, state=None, block=32) -> tuple[Tensor, Tensor]:
    """Convolve within blocks, apply the recurrence between them; return y and the last state.

    It takes O(L D (c + N)) time. In a block of c positions after position s, for 1 <= i <= c,

        y_{s+i} = sum_{j<=i} k[i-j] x_{s+j}  +  sum_n g q^i h_s              (a)
        h_{s+c} = q^c h_s  +  sum_{j<=c} q^{c-j} u x_{s+j}                   (b)
    """
    if block < 1:
        raise ValueError(f"block must be a positive integer, got {block}")
    state = initial_state(x, u, state)
    length = x.shape[1]
    whole = length - length % block
    inside, write, read = block_matrices(u, q, g, min(block, length))
    average = average_blocks if needs_plain_autograd() else FastBlocks.apply
    ys = []
    # Whole blocks, then a shorter last one, which needs only a corner of the same matrices.
    for part in (x[:, :whole], x[:, whole:]):
        c = min(block, part.shape[1])
        if c > 0:
            corner = (inside[:, :c, :c], write[..., -c:], read[..., :c], q**c)
            y, state = average(part, *corner, state)
            ys.append(y)
    y = torch.cat(ys, dim=1) if len(ys) > 1 else ys[0]
    return y, state


def block_matrices(u: Tensor, q: Tensor, g: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the matrices of equations (a) and (b):

    inside_ij = k[i-j] (D, c, c), write_j = q^{c-j} u (D, N, c), read_i = g q^i (D, N, c).
    """
    powers = q.unsqueeze(-1).expand(-1, -1, c).cumprod(dim=-1)  # q^1 ... q^c
    from_zero = F.pad(powers[..., :-1], (1, 0), value=1.0)  # q^0 ... q^{c-1}
    kernel = torch.einsum("dn,dnl->dl", g * u, from_zero)
    write = u.unsqueeze(-1) * from_zero.flip(-1)
    read = g.unsqueeze(-1) * powers
    return toeplitz(kernel), write, read


def average_blocks(x, inside, write, read, decay, state) -> tuple[Tensor, Tensor]:
    """Apply equations (a) and (b) to x (B, M c, D), starting from state (B, D, N); decay is q^c."""
    blocks = x.unflatten(1, (-1, inside.shape[-1])).permute(3, 0, 1, 2)  # (D, B, M, c)
    written = torch.einsum("dnj,dbmj->dnbm", write, blocks)
    first = state.permute(1, 2, 0).unsqueeze(-1)  # (D, N, B, 1)
    states = scan(torch.cat([first, written], dim=-1), decay)  # (D, N, B, M + 1)
    y = torch.einsum("dij,dbmj->bmid", inside, blocks)
    y = y + torch.einsum("dni,dnbm->bmid", read, states[..., :-1])
    return y.flatten(1, 2), states[..., -1].permute(2, 0, 1)


def scan(terms: Tensor, decay: Tensor) -> Tensor:
    """Compute h_m = decay h_{m-1} + terms_m for all m at once, from h_0 = terms_0 on.

    terms (D, N, B, M), decay (D, N). An associative scan in log2(M) rounds, after which each h sums
    its last 2, 4, 8, ... terms. With r = decay, the first round turns a, b, c, d into
    a, ra + b, rb + c, rc + d; the second adds r^2 a to the third and r^2 (ra + b) to the fourth.
    """
    h = terms
    decay = decay[..., None, None]
    step = 1
    while step < h.shape[-1]:
        earlier = h[..., :-step]
        h = h.clone()
        h[..., step:].addcmul_(decay, earlier)
        decay = decay * decay
        step = 2 * step
    return h


def needs_plain_autograd() -> bool:
    """Return whether torch.compile or torch.func is active: they need autograd's own backward."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


# The same results in less time. You can skip ahead to EMA_MODES on a first reading.


class FastBlocks(torch.autograd.Function):
    """`average_blocks` as matrix products batched over channels, with a hand-written backward.

    Autograd would copy the gradients of permuted tensors: without this class a training step takes
    1.11 to 1.15 times as long in fp32, 1.25 times in bfloat16 (4 layers of 256 channels, 2 CPU
    threads). With dy and dh for the gradients of y and of the states, (a) and (b) give

        dh_s = q^c dh_{s+c} + sum_i read_i dy_{s+i}              from the last block to the first
        dx_{s+j} = sum_{i>=j} inside_ij dy_{s+i} + sum_n write_j dh_{s+c}
    """

    @staticmethod
    def forward(ctx, x, inside, write, read, decay, state):
        blocks = to_blocks(x, inside.shape[-1])  # (D, B (M + 1), c)
        written = (write @ blocks.mT).unflatten(-1, (len(x), -1))  # (D, N, B, M + 1)
        first = state.permute(1, 2, 0).unsqueeze(-1)  # (D, N, B, 1)
        before = scan(torch.cat([first, written[..., :-1]], dim=-1), decay)  # (D, N, B, M + 1)
        y = torch.bmm(blocks, inside.mT).baddbmm_(before.flatten(2).mT, read)
        ctx.save_for_backward(x, inside, write, read, decay, state, blocks, before)
        last = before[..., -1].permute(2, 0, 1).contiguous()  # a view would keep all states alive
        return from_blocks(y, len(x)), last

    @staticmethod
    def backward(ctx, dy, dlast):
        *inputs, blocks, before = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the plain version
            return plain_gradients(inputs, ctx.needs_input_grad, (dy, dlast))

        x, inside, write, read, decay, _ = inputs
        dy = to_blocks(dy, inside.shape[-1])  # (D, B (M + 1), c)
        dbefore = (read @ dy.mT).unflatten(-1, (len(x), -1))  # (D, N, B, M + 1)
        dbefore[..., -1] = dlast.permute(1, 2, 0)
        dbefore = scan(dbefore.flip(-1), decay).flip(-1)
        dafter = F.pad(dbefore[..., 1:], (0, 1))
        ddecay = (dafter * before).sum(dim=(-2, -1))
        dstate = dbefore[..., 0].permute(2, 0, 1)
        dafter = dafter.flatten(2)  # (D, N, B (M + 1))
        dblocks = torch.bmm(dy, inside).baddbmm_(dafter.mT, write)
        dinside = dy.mT @ blocks
        dwrite = dafter @ blocks
        dread = before.flatten(2) @ dy
        return from_blocks(dblocks, len(x)), dinside, dwrite, dread, ddecay, dstate


def plain_gradients(inputs, needed, doutputs) -> tuple[Tensor | None, ...]:
    """Differentiate `average_blocks` by autograd: the result can be differentiated again."""
    outputs = average_blocks(*inputs)
    wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]
    pairs = [(y, dy) for y, dy in zip(outputs, doutputs, strict=True) if y.requires_grad]
    ys, dys = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if needs else None for needs in needed)


def to_blocks(x: Tensor, c: int) -> Tensor:
    """Cut x (B, M c, D) into blocks (D, B (M + 1), c), with one of zeros after each sequence: the
    state before that block is the last state of the sequence.
    """
    B, L, D = x.shape
    blocks = x.new_empty(B, L // c + 1, D, c)
    blocks[:, :-1] = x.unflatten(1, (-1, c)).mT
    blocks[:, -1] = 0
    return blocks.flatten(0, 1).transpose(0, 1)


def from_blocks(y: Tensor, batch: int) -> Tensor:
    """Undo `to_blocks`: turn y (D, B (M + 1), c) into (B, M c, D)."""
    blocks = y.unflatten(1, (batch, -1))[:, :, :-1]  # (D, B, M, c)
    return blocks.permute(1, 2, 3, 0).flatten(1, 2).contiguous()


EMA_MODES = {
    "direct": ema_direct,
    "fft": ema_fft,
    "recurrent": ema_recurrent,
    "blockwise": ema_blockwise,
}
STATEFUL_MODES = ("recurrent", "blockwise")  # continue from a state; the others can truncate


class DampedEMA(nn.Module):
    """SiLU(EMA(x) + omega x) as in the paper's code; equation 6 of the paper is EMA(x).

    `mode` names one of EMA_MODES; None picks the fastest that applies.
    """

    def __init__(self, config: MegaConfig, mode: str | None = None):
        super().__init__()
        D = config.hidden_size
        N = config.ema_projection_size
        E = 2 * D if config.bidirectional else D
        self.config = config
        self.mode = mode
        logit_std = config.ema_delta_alpha_range
        self.damping_factor = normal(E, N, 1, std=logit_std)  # logit of p, the paper's alpha
        self.decay_factor = normal(E, N, 1, std=logit_std)  # logit of the paper's delta
        self.ema_expansion_matrix = normal(E, N, 1, std=config.ema_beta_range)  # beta
        self.ema_expansion_matrix.data[:, ::2] += 1  # near 1, -1, 1, ...
        self.ema_expansion_matrix.data[:, 1::2] -= 1
        self.kernel_projection_matrix = normal(E, N, std=config.ema_gamma_omega_range)  # gamma
        self.residual_weight = normal(D, std=config.ema_gamma_omega_range)  # omega

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute u = p beta, q = 1 - p delta and g = gamma / sqrt(N), (E, N), in fp32 or fp64."""
        p = torch.sigmoid(at_least_fp32(self.damping_factor)).squeeze(-1)
        delta = torch.sigmoid(at_least_fp32(self.decay_factor)).squeeze(-1)
        beta = at_least_fp32(self.ema_expansion_matrix).squeeze(-1)
        gamma = at_least_fp32(self.kernel_projection_matrix)
        return p * beta, 1 - p * delta, gamma / math.sqrt(gamma.shape[-1])

    def forward(self, x: Tensor, mask=None, state=None, mode=None, needs_state=True):
        """Compute SiLU(EMA(x) + omega x) of x (B, L, D); the EMA reads 0 where mask (B, L) is 0.

        `state` (B, D, N) is the EMA's state before x. Returns y (B, L, D) and the last state: None
        if the layer is bidirectional or the mode stateless, and possibly if needs_state is False.
        """
        D = self.config.hidden_size
        check_shape("x", x, "B", "L", D)
        needs_state = state is not None or (needs_state and not self.config.bidirectional)
        mode = mode or self.mode or self.fastest_mode(x.shape[1], needs_state)
        self.check_mode(mode, state)
        inputs = x if mask is None else x * mask.unsqueeze(-1)
        if self.config.bidirectional:  # the second D channels read from right to left
            inputs = torch.cat([inputs, inputs.flip(1)], dim=-1)
        u, q, g = self.coefficients()
        wide = torch.promote_types(x.dtype, u.dtype)  # powers of a q near 1 need fp32
        arguments = [t.to(wide) for t in (inputs, u, q, g)]
        with autocast_off(x):
            if mode in STATEFUL_MODES:
                y, state = EMA_MODES[mode](*arguments, state)
            else:
                y = EMA_MODES[mode](*arguments, self.config.truncation)
        if self.config.bidirectional:
            y = y[..., :D] + y[..., D:].flip(1)
            state = None
        y = torch.addcmul(y, x.to(wide), self.residual_weight.to(wide))  # y + omega x
        return F.silu(y).to(x.dtype), state  # cast last: SiLU of -inf in fp16 is NaN

    def fastest_mode(self, length: int, needs_state: bool) -> str:
        """Return the mode that is fastest on CPUs.

        For up to 64 positions without a state, it is fft: a training step takes up to 1.3 times as
        long with blockwise, and 1.6 times with direct. With a state, recurrent and blockwise are
        equally fast at 16 positions.
        """
        if self.config.truncation is not None or (length <= 64 and not needs_state):
            return "fft"
        return "recurrent" if length <= 16 else "blockwise"

    def check_mode(self, mode: str, state: Tensor | None):
        """Raise a ValueError if the mode can't do what is asked."""
        if mode not in EMA_MODES:
            raise ValueError(f"EMA mode must be one of {', '.join(EMA_MODES)}, got {mode!r}")
        has_state = mode in STATEFUL_MODES
        if has_state and self.config.truncation is not None:
            raise ValueError(f"EMA mode {mode!r} can't truncate; only direct and fft can")
        if state is not None and not has_state:
            raise ValueError(f"EMA mode {mode!r} has no state; recurrent and blockwise have one")
        if state is not None and self.config.bidirectional:
            raise ValueError("a bidirectional EMA can't continue from a state; pass state=None")


def normal(*shape: int, std: float) -> nn.Parameter:
    """Make a parameter from N(0, std^2)."""
    x = torch.empty(shape)
    if not x.is_meta:  # for meta tensors, PyTorch would spend a second doing nothing
        x.normal_(std=std)
    return nn.Parameter(x)


# ---------------------------------------------------------------------------------- 3 attention
# A single head attends within chunks (sections 3.2 and 3.4). chunk_size 4 splits 11 tokens into
#
#     | 0  1  2  3 | 4  5  6  7 | 8  9 10  . |        . is padding, which no token sees
#
# In a decoder, token 6 sees 4, 5 and 6. What came before its chunk reaches it only through the EMA.
# So a cache holds the EMA's state and the keys and values of the unfinished chunk: after 11 tokens,
# those of 8, 9 and 10.


def split_into_chunks(x: Tensor, size: int) -> Tensor:
    """Cut x (B, L, ...) into chunks (B K, size, ...), with zeros after the last position."""
    missing = -x.shape[1] % size
    if missing:
        zeros = x.new_zeros(x.shape[0], missing, *x.shape[2:])
        x = torch.cat([x, zeros], dim=1)
    return x.reshape(-1, size, *x.shape[2:])


def laplace(x: Tensor) -> Tensor:
    """Compute the Laplace function (equation 16), a smooth and bounded relu2.

    mu = sqrt(1/2) and sigma = sqrt(1 / (4 pi)) are rounded as in the paper's code.
    """
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# From scores (..., queries, keys) to weights. Softmax normalises over the scores of a query, the
# others act on each score alone.
ATTENTION_FUNCTIONS = {
    "softmax": functools.partial(torch.softmax, dim=-1),
    "laplace": laplace,
    "relu2": relu2,
}


def attention_weights(query, key, bias, visible, kind: str) -> Tensor:
    """Compute f(query key^T / tau + bias) of equation 11, with zeros where a key is not visible.

    tau is sqrt(Z) for softmax, and for the others the number of keys that a query sees. query
    (..., T, Z), key (..., C, Z), bias (T, C) -> (..., T, C); visible (..., T, C) is boolean, or
    None if all keys are visible.
    """
    if kind == "softmax":
        tau = math.sqrt(query.shape[-1])
    elif visible is None:
        tau = key.shape[-2]
    else:
        tau = visible.sum(dim=-1, keepdim=True).clamp(min=1)
    scores = (query / tau) @ key.mT
    scores = at_least_fp32(scores) + bias
    if visible is None:
        return ATTENTION_FUNCTIONS[kind](scores)
    lowest = torch.finfo(scores.dtype).min  # not -inf: a softmax of nothing but -inf is NaN
    weights = ATTENTION_FUNCTIONS[kind](torch.where(visible, scores, lowest))
    if visible.dim() > 2:  # with padding, a query may see no key, and softmax weights all equally
        weights = weights * visible
    return weights


class SimpleBias(nn.Module):
    """A learned bias for each distance from query to key (T5's without the buckets)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.rel_pos_bias = normal(2 * config.max_positions - 1, std=config.initializer_range)

    def forward(self, size: int) -> Tensor:
        """Return the bias (2 size - 1) for distances 1 - size ... size - 1 from query to key."""
        distance = torch.arange(1 - size, size, device=self.rel_pos_bias.device)
        # Indices beyond one end of the table wrap around to the other; up to size P none collide.
        return self.rel_pos_bias[(centre(self.config) + distance) % len(self.rel_pos_bias)]


def centre(config: MegaConfig) -> int:
    """Return the index of distance 0 in a SimpleBias's table, as in Hugging Face's checkpoints."""
    return (config.chunk_size if config.chunk_size > 0 else config.max_positions) - 1


class RotaryBias(nn.Module):
    """bias[i, j] = (rot_i alpha) . (rot_j b); rot_i rotates entries m and m + Z/2 by i theta_m.

    It depends only on d = j - i: with theta_m = 10000^(-2 m / Z) it is the sum over the pairs m of
    cos(d theta_m) (a1 b1 + a2 b2) + sin(d theta_m) (a2 b1 - a1 b2). This is not RoPE, which rotates
    queries and keys.
    """

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.alpha = normal(1, config.shared_representation_size, std=config.initializer_range)
        self.b_param = normal(1, config.shared_representation_size, std=config.initializer_range)

    def forward(self, size: int) -> Tensor:
        """Return the bias (2 size - 1) for distances 1 - size ... size - 1 from query to key."""
        a1, a2 = at_least_fp32(self.alpha[0]).chunk(2)  # (Z / 2)
        b1, b2 = at_least_fp32(self.b_param[0]).chunk(2)
        half = len(a1)
        pair = torch.arange(half, dtype=torch.float32, device=a1.device)
        distance = torch.arange(1 - size, size, dtype=torch.float32, device=a1.device)
        angle = distance.unsqueeze(1) * torch.exp(pair * (-math.log(10000) / half))
        cos = angle.cos().to(a1.dtype)  # (2 size - 1, Z / 2)
        sin = angle.sin().to(a1.dtype)
        with autocast_off(a1):
            return cos @ (a1 * b1 + a2 * b2) + sin @ (a2 * b1 - a1 * b2)


POSITION_BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


def bias_matrix(by_distance: Tensor, first: int, stop: int, keys: int) -> Tensor:
    """Return the bias (T, keys) for queries at first ... stop - 1 and keys at 0 ... keys - 1.

    by_distance (2 size - 1) has distance 0 in its middle.
    """
    middle = len(by_distance) // 2
    query_position = torch.arange(first, stop, device=by_distance.device).unsqueeze(1)
    key_position = torch.arange(keys, device=by_distance.device)
    return by_distance[key_position - query_position + middle]


# ---------------------------------------------------------------------------- 4 layer and block
# Mega's layer (section 3.2, figure 2b): EMA, attention, reset gate and update gate. A block is the
# layer, a cross-attention in some decoders, and a feed-forward network (section 3.3).


class ScaleNorm(nn.Module):
    """x / rms(x) times one learned scalar (Nguyen & Salazar 2019)."""

    def __init__(self, size: int, eps: float, affine: bool):
        super().__init__()
        self.eps = eps
        self.scalar = nn.Parameter(torch.ones(1)) if affine else 1

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.scalar


NORMS = {  # over the features of each position; batchnorm: each feature over all positions
    "layernorm": nn.LayerNorm,
    "scalenorm": ScaleNorm,
    "rmsnorm": nn.RMSNorm,  # a no-op in transformers 4.40.2, whose outputs differ
    "batchnorm": lambda size, eps, affine: nn.BatchNorm1d(size, eps, affine=affine),
    "syncbatchnorm": lambda size, eps, affine: nn.SyncBatchNorm(size, eps, affine=affine),
}


class SequenceNorm(nn.Module):
    """Norm of x (B, L, D), of the config's type; in checkpoints it is called `norm.norm`."""

    def __init__(self, config: MegaConfig, affine: bool):
        super().__init__()
        self.norm = NORMS[config.normalization_type](config.hidden_size, 1e-5, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)  # batchnorm wants (B L, D)


class Dropout(nn.Module):
    """Dropout of single elements of x (B, L, D) or, with use_feature_dropout, of whole features."""

    def __init__(self, config: MegaConfig, p: float):
        super().__init__()
        self.p = p
        self.whole_features = config.use_feature_dropout

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.whole_features:  # at all positions of a sequence
            return x * F.dropout(torch.ones_like(x[:, :1]), self.p)
        return F.dropout(x, self.p)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


tanh_gelu = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": nn.Identity(),
    "laplace": laplace,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": gelu_10,
    "quick_gelu": quick_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_accurate": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}


def linear(config: MegaConfig, inputs: int, outputs: int) -> nn.Linear:
    """Make a linear layer with weights from N(0, initializer_range^2) and biases of 0."""
    layer = nn.Linear(inputs, outputs)
    layer.weight = normal(outputs, inputs, std=config.initializer_range)
    layer.bias.data.zero_()
    return layer


def mix(residual: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
    """Blend the candidate into the residual (equations 13 and 15): gate H + (1 - gate) X."""
    gate = torch.sigmoid(update)
    return residual + gate * (candidate - residual)


class LayerCache(NamedTuple):
    """What one block remembers of earlier positions; with chunking, its size is bounded."""

    ema_state: Tensor  # (B, D, N)
    keys: Tensor  # (B, R, Z), of the unfinished chunk; without chunking, of all positions
    values: Tensor  # (B, R, V)
    source_keys: Tensor | None = None  # (B, S, Z), of the encoder, for cross-attention
    source_values: Tensor | None = None  # (B, S, D)


class MovingAverageGatedAttention(nn.Module):
    """Mega's layer: EMA, attention within chunks, reset and update gates (figure 2b)."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        D = config.hidden_size
        V = config.intermediate_size
        Z = config.shared_representation_size
        self.config = config
        self.norm = SequenceNorm(config, config.norm_affine)
        self.ema_gate = DampedEMA(config)
        self.v_proj = linear(config, D, V)  # W_v
        self.mx_proj = linear(config, D, D + Z + V + D)  # W_phi, W_z, W_r and W_h
        self.h_proj = linear(config, V, D)  # U_h
        self.qk_weight = normal(2, Z, std=config.initializer_range)  # kappa, kappa'
        self.qk_bias = nn.Parameter(torch.zeros(2, Z))  # mu, mu'
        self.rel_pos_bias = POSITION_BIASES[config.relative_positional_bias](config)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config, config.dropout_prob)
        self.value_dropout = Dropout(config, config.hidden_dropout_prob)
        self.weight_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, mask=None, cache: LayerCache | None = None, use_cache=False):
        """Apply the layer to x (B, L, D), which follows the R cached positions.

        mask (B, R + L) is False at padding. Returns y (B, L, D), the next cache or None, and the
        attention weights (B, K, T, C). With one chunk T is L; with several it is C, and the rows of
        cached positions and of the last chunk's padding are meaningless.
        """
        D = self.config.hidden_size
        V = self.config.intermediate_size
        Z = self.config.shared_representation_size
        past = 0 if cache is None else cache.keys.shape[1]
        residual = x  # the X of equation 15; all other equations use the normalized x
        if self.config.normalize_before_mega:
            x = self.norm(x)
        values = self.value_dropout(self.activation(self.v_proj(x)))  # (10): (B, L, V)
        smooth, ema_state = self.ema_gate(  # (6): (B, L, D)
            x,
            mask=None if mask is None else mask[:, past:],
            state=None if cache is None else cache.ema_state,
            needs_state=use_cache,
        )
        projected = self.mx_proj(self.dropout(smooth))
        update, shared_and_reset, candidate = projected.split([D, Z + V, D], dim=-1)
        shared, reset = F.silu(shared_and_reset).split([Z, V], dim=-1)  # (7), (12)
        queries = torch.addcmul(self.qk_bias[0], self.qk_weight[0], shared)  # (8): (B, L, Z)
        keys = torch.addcmul(self.qk_bias[1], self.qk_weight[1], shared)  # (9): (B, L, Z)
        if cache is not None:
            keys = torch.cat([cache.keys, keys], dim=1)  # (B, R + L, Z)
            values = torch.cat([cache.values, values], dim=1)  # (B, R + L, V)

        attended, weights = self.attend(queries, keys, values, mask)  # (11)
        candidate = self.activation(candidate + self.h_proj(attended * reset))  # (14)
        candidate = self.dropout(candidate)
        y = mix(residual, update, candidate)  # (13), (15)
        if not self.config.normalize_before_mega:
            y = self.norm(y)
        if not use_cache:
            return y, None, weights
        return y, self.next_cache(ema_state, keys, values), weights

    def attend(self, queries, keys, values, mask) -> tuple[Tensor, Tensor]:
        """Attend from queries (B, L, Z) to the keys and values (B, R + L, ...) of their chunks.

        The queries are those of the last L positions; mask (B, R + L) is False at padding. Returns
        outputs (B, L, V) and weights (B, K, T, C).
        """
        batch, length, _ = queries.shape
        total = keys.shape[1]
        past = total - length
        chunk = self.config.attention_limit
        if chunk is None:
            self.config.check_length("length", total)
        if chunk is None or total <= chunk:  # one chunk, in which the queries are the last ones
            chunk = total
            first = past
        else:  # dummy queries for the cached positions, so that queries and keys split alike
            first = 0
            queries = F.pad(queries, (0, 0, past, 0))
        if mask is None and total % chunk and not self.config.is_decoder:
            # Mask the padding of the last chunk; in a decoder the causal mask hides it.
            mask = keys.new_ones(keys.shape[:2], dtype=torch.bool)
        if mask is not None:
            mask = split_into_chunks(mask, chunk)  # (B K, C)
        queries = split_into_chunks(queries, chunk - first)  # (B K, T, Z)
        keys = split_into_chunks(keys, chunk)  # (B K, C, Z)
        values = split_into_chunks(values, chunk)  # (B K, C, V)

        visible = self.visible(queries, first, mask)  # (T, C), (B K, 1 or T, C) or None
        bias = bias_matrix(self.rel_pos_bias(chunk), first, chunk, chunk)  # (T, C)
        kind = self.config.attention_activation
        weights = attention_weights(queries, keys, bias, visible, kind)  # (B K, T, C)
        weights = weights.view(batch, -1, *bias.shape)  # (B, K, T, C)
        dropped = self.weight_dropout(weights).flatten(0, 1).to(values.dtype)
        outputs = (dropped @ values).view(batch, -1, values.shape[-1])  # (B, K T, V)
        start = past - first
        return outputs[:, start : start + length], weights

    def visible(self, queries: Tensor, first: int, mask: Tensor | None) -> Tensor | None:
        """Return which keys of its chunk each query (B K, T, Z) may see; None: all of them. The
        queries start at position `first` of the chunk, and mask (B K, C) is False at padding.
        """
        visible = None if mask is None else mask.unsqueeze(1)  # (B K, 1, C)
        count = queries.shape[1]
        if self.config.is_decoder and count > 1:  # a single query is the last one, and sees all
            causal = torch.ones(count, first + count, dtype=torch.bool, device=queries.device)
            causal = causal.tril(first)
            visible = causal if visible is None else visible & causal
        return visible

    def next_cache(self, ema_state, keys, values) -> LayerCache:
        """Keep what later positions can see: the unfinished chunk or, without chunking, all."""
        if ema_state is None:
            raise ValueError(
                "this EMA has no state to cache; set use_cache=False, or bidirectional=False, "
                "truncation=None and a mode other than direct and fft"
            )
        length = keys.shape[1]
        chunk = self.config.attention_limit
        if chunk is not None and length >= chunk:
            closed = length // chunk * chunk
            keys = keys[:, closed:].clone()  # a view would keep the whole tensor allocated
            values = values[:, closed:].clone()
        return LayerCache(ema_state, keys, values)


class GatedCrossAttention(nn.Module):
    """Gated attention of a decoder to an encoder's states, as in the paper's code."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        D = config.hidden_size
        Z = config.shared_representation_size
        self.config = config
        self.norm = SequenceNorm(config, config.norm_affine)
        self.k_proj = linear(config, D, Z)
        self.v_proj = linear(config, D, D)
        self.q_proj = linear(config, D, D + D + Z)
        self.h_proj = linear(config, D, D)
        self.rel_pos_bias = POSITION_BIASES[config.relative_positional_bias](config)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config, config.dropout_prob)
        self.value_dropout = Dropout(config, config.hidden_dropout_prob)
        self.weight_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys (B, S, Z) and values (B, S, D) of an encoder's states (B, S, D)."""
        return self.k_proj(source), self.activation(self.v_proj(source))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask=None, start: int = 0):
        """Attend from x (B, L, D), which begins at position `start`, to the encoder's positions.

        mask (B, S) is False at padding. Returns y (B, L, D) and the attention weights (B, L, S).
        """
        D = self.config.hidden_size
        Z = self.config.shared_representation_size
        length = x.shape[1]
        source_length = keys.shape[1]
        residual = x
        if self.config.normalize_before_mega:
            x = self.norm(x)
        update, reset, queries = self.q_proj(x).split([D, D, Z], dim=-1)

        self.config.check_length("length", max(start + length, source_length))
        bias = self.rel_pos_bias(max(start + length, source_length))
        visible = None if mask is None else mask.unsqueeze(1)  # (B, 1, S)
        bias = bias_matrix(bias, start, start + length, source_length)  # (L, S)
        kind = self.config.attention_activation
        weights = attention_weights(queries, keys, bias, visible, kind)  # (B, L, S)
        values = self.value_dropout(values)
        attended = self.weight_dropout(weights).to(values.dtype) @ values  # (B, L, D)

        candidate = self.dropout(self.activation(self.h_proj(attended * F.silu(reset))))
        y = mix(residual, update, candidate)
        if not self.config.normalize_before_mega:
            y = self.norm(y)
        return y, weights


class NormalizedFeedForward(nn.Module):
    """x + fc2(act(fc1(norm(x)))) or, as in equation 17, with the norm after the sum."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.config = config
        self.norm = SequenceNorm(config, config.norm_affine)
        self.fc1 = linear(config, config.hidden_size, config.nffn_hidden_size)
        self.fc2 = linear(config, config.nffn_hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config, config.dropout_prob)
        self.hidden_dropout = Dropout(config, config.nffn_activation_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.config.normalize_before_ffn:
            x = self.norm(x)
        hidden = self.hidden_dropout(self.activation(self.fc1(x)))  # (B, L, nffn_hidden_size)
        y = residual + self.dropout(self.fc2(hidden))
        if not self.config.normalize_before_ffn:
            y = self.norm(y)
        return y


class MegaBlock(nn.Module):
    """The layer, a cross-attention in some decoders, and the feed-forward network."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        self.mega_layer = MovingAverageGatedAttention(config)
        self.cross_attn = GatedCrossAttention(config) if config.add_cross_attention else None
        self.nffn = NormalizedFeedForward(config) if config.use_normalized_ffn else nn.Identity()

    def forward(self, x, mask=None, cache=None, use_cache=False, source=None, source_mask=None,
                start=0):  # fmt: skip
        """Apply the block to x (B, L, D), which begins at position `start`.

        With a cache, `source` (B, S, D) is ignored: the cache holds its keys and values. Returns y,
        the next LayerCache or None, and the weights of attention and of cross-attention, or None.
        """
        x, next_cache, weights = self.mega_layer(x, mask, cache, use_cache)
        cross_weights = None
        if self.cross_attn is not None:
            if cache is None:
                keys, values = self.cross_attn.keys_and_values(source)
            else:
                keys = cache.source_keys
                values = cache.source_values
            x, cross_weights = self.cross_attn(x, keys, values, source_mask, start)
            if use_cache:
                next_cache = next_cache._replace(source_keys=keys, source_values=values)
        return self.nffn(x), next_cache, weights, cross_weights


# -------------------------------------------------------------------------- 5 model and cache
# Embeddings, blocks, and the cache with which a decoder continues where it stopped. A cache is
# passed in and a new one returned; the old one never changes, so you can continue from it twice.


class MegaCache(NamedTuple):
    """A decoder's memory of `length` positions; outside no_grad it keeps the autograd graph."""

    layers: list[LayerCache]
    length: int
    mask: Tensor | None = None  # (B, R), False at padding; None: no padding
    started: Tensor | None = None  # (B), with a mask: whether the sequence has had a token yet
    ended: Tensor | None = None  # (B), with a mask: whether it ends in padding after a token
    source_mask: Tensor | None = None  # (B, S), False at padding of the encoder's states


class MegaOutput(NamedTuple):
    """What a model returns; what was not requested is None."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # the shape depends on the head
    start_logits: Tensor | None = None  # (B, L), for question answering
    end_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None  # (B, L, D)
    pooler_output: Tensor | None = None  # (B, D)
    cache: MegaCache | None = None
    hidden_states: tuple | None = None  # (B, L, D) of the embedding and after each layer
    attentions: tuple | None = None  # (B, K, T, C) of each layer
    cross_attentions: tuple | None = None  # (B, L, S) of each layer


class MegaBase(nn.Module):
    """What the bare model and the heads share: a checked config, loading, saving, resizing."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        config.check()  # it may have been changed since it was made
        self.config = config

    def save_pretrained(self, folder: str | Path):
        """Write config.json and model.safetensors, which transformers reads, too."""
        write_checkpoint(self, Path(folder))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None,
                        ignore_mismatched_sizes: bool = False, **settings):  # fmt: skip
        """Load a model, in eval mode, from a folder or from `owner/name` on Hugging Face's hub.

        `settings` override the config. Raises OSError if a file can't be obtained, ValueError if it
        can't be read or does not fit; warns of weights that are missing or unused.
        """
        values, weights = read_checkpoint(source, revision)
        config = MegaConfig.from_dict(values, **settings)
        weights = match(cls, config, weights, ignore_mismatched_sizes, str(source))
        model = cls(config)
        model.load_state_dict(weights, strict=False)
        return model.eval()

    def resize_token_embeddings(self, size: int):
        """Change the vocabulary to `size` tokens in place: cut the last ones or append new ones.

        Raises a ValueError for a bad size.
        """
        resize(self, size)

    def set_chunk_size(self, size: int):
        """Let attention see chunks of `size` positions. Larger chunks than in training improve the
        paper's models (appendix D.4, figure 6). Raises a ValueError for a bad size.
        """
        config = replace(self.config, use_chunking=True, chunk_size=size)
        shift = centre(config) - centre(self.config)
        for module in self.modules():
            if isinstance(module, SimpleBias):  # the index of distance 0 in its table changes
                module.rel_pos_bias.data = module.rel_pos_bias.data.roll(shift)
        self.config.use_chunking = True
        self.config.chunk_size = size


class MegaModel(MegaBase):
    """Embeddings and blocks: token ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        D = config.hidden_size
        tables = {"word_embeddings": embedding(config, config.vocab_size, config.pad_token_id)}
        if config.add_token_type_embeddings:
            tables["token_type_embeddings"] = embedding(config, config.type_vocab_size)
        self.embedding_layer = nn.ModuleDict(tables)
        self.layers = nn.ModuleList(MegaBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = SequenceNorm(config, False) if config.final_norm else nn.Identity()
        self.pooler = nn.ModuleDict({"dense": linear(config, D, D)}) if add_pooling_layer else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: MegaCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> MegaOutput:
        """Compute last_hidden_state (B, L, D) of input_ids (B, L) or inputs_embeds (B, L, D).

        Masks (B, L) and (B, S) are 0 at padding. Padding takes up positions: before tokens it
        shifts the chunk boundaries, between tokens the EMA decays over it. Token types (B, L), 0 by
        default, are used if the config enables them; cross-attention needs encoder_hidden_states
        (B, S, D). With a cache, the input continues where the cache ends, and encoder_hidden_states
        are ignored; the mask may cover the input or all positions since the start. `use_cache`
        requests the next cache; by default a decoder in eval mode returns one. Raises a ValueError
        for inputs that do not fit the config, each other or the cache.
        """
        use_cache = self.wants_cache(cache, use_cache)
        x = self.embed(input_ids, inputs_embeds, token_type_ids)
        if cache is None:
            start = 0
            layer_caches = [None] * len(self.layers)
            self.check_source(x, encoder_hidden_states, encoder_attention_mask)
            source_mask = encoder_attention_mask
            if source_mask is not None:
                source_mask = source_mask != 0
        else:
            start = cache.length
            layer_caches = cache.layers
            source_mask = cache.source_mask
        mask = visible_positions(x, attention_mask, cache)  # (B, R + L) or None

        hidden_states = [x]
        all_weights = []
        next_caches = []
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            call = layer
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                call = functools.partial(checkpoint, layer, use_reentrant=False)
            x, next_cache, weights, cross_weights = call(
                x, mask, layer_cache, use_cache, encoder_hidden_states, source_mask, start
            )
            next_caches.append(next_cache)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                all_weights.append((weights, cross_weights))

        out = MegaOutput(last_hidden_state=self.final_norm(x))
        if self.pooler is not None:
            pooled = self.pool(out.last_hidden_state, attention_mask)
            out = out._replace(pooler_output=torch.tanh(self.pooler["dense"](pooled)))
        if output_hidden_states:
            out = out._replace(hidden_states=tuple(hidden_states))
        if output_attentions:
            attentions, cross_attentions = zip(*all_weights, strict=True)
            out = out._replace(attentions=attentions)
            if self.config.add_cross_attention:
                out = out._replace(cross_attentions=cross_attentions)
        if use_cache:
            next_cache = join_caches(next_caches, start + x.shape[1], mask, cache)
            out = out._replace(cache=next_cache._replace(source_mask=source_mask))
        return out

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pool x (B, L, D) to one vector per sequence, (B, D): that of its first visible position
        or, with mean_pooling, the mean over positions where mask (B, L) is not 0.
        """
        if mask is None:
            mask = x.new_ones(x.shape[:2])
        wide = at_least_fp32(x)  # for counts and sums
        visible = (mask[:, -x.shape[1] :] != 0).to(wide.dtype)
        if not self.config.mean_pooling:
            first = visible.argmax(dim=1)
            return x[torch.arange(len(x), device=x.device), first]
        shares = visible / visible.sum(dim=1, keepdim=True).clamp(min=1)
        return (wide * shares.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def embed(self, input_ids, inputs_embeds, token_type_ids) -> Tensor:
        """Return the first layer's input, (B, L, D)."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = inputs_embeds
        if x is None:
            input_ids = check_ids("input_ids", input_ids, config.vocab_size, "B", "L")
            x = self.embedding_layer["word_embeddings"](input_ids)
            if config.scale_embedding:
                x = x * math.sqrt(config.hidden_size)
        check_shape("inputs_embeds", x, "B", "L", config.hidden_size)
        if config.add_token_type_embeddings:
            if token_type_ids is None:
                token_type_ids = x.new_zeros(x.shape[:2], dtype=torch.int64)
            types = config.type_vocab_size
            token_type_ids = check_ids("token_type_ids", token_type_ids, types, *x.shape[:2])
            x = x + self.embedding_layer["token_type_embeddings"](token_type_ids)
        return x

    def wants_cache(self, cache: MegaCache | None, use_cache: bool | None) -> bool:
        """Return whether to make a cache; raise a ValueError if this model can't use one."""
        can_cache = self.config.is_decoder and self.config.truncation is None
        if (use_cache or cache is not None) and not can_cache:
            raise ValueError(
                "a cache needs a decoder whose EMA is not truncated, got "
                f"is_decoder={self.config.is_decoder} and truncation={self.config.truncation}"
            )
        if use_cache is None:
            return self.config.use_cache and can_cache and not self.training
        return use_cache

    def check_source(self, x: Tensor, source: Tensor | None, mask: Tensor | None):
        """Raise a ValueError unless the encoder's states and their mask fit the model."""
        if self.config.add_cross_attention != (source is not None):
            raise ValueError("give encoder_hidden_states if and only if add_cross_attention=True")
        if source is not None:
            check_shape("encoder_hidden_states", source, len(x), "S", x.shape[2])
            if mask is not None:
                check_shape("encoder_attention_mask", mask, *source.shape[:2])


def embedding(config: MegaConfig, size: int, padding: int | None = None) -> nn.Embedding:
    weight = normal(size, config.hidden_size, std=config.initializer_range)
    if padding is not None:
        weight.data[padding] = 0
    return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=padding)


def visible_positions(x: Tensor, mask: Tensor | None, cache: MegaCache | None) -> Tensor | None:
    """Join the cached mask and that of x (B, L, D) as booleans (B, R + L); None: no padding.

    `mask` covers x, (B, L), or all positions so far, (B, cache.length + L).
    """
    batch, length, _ = x.shape
    if cache is None:
        if mask is None:
            return None
        check_shape("attention_mask", mask, batch, length)
        return mask != 0

    cached_batch, cached = cache.layers[0].keys.shape[:2]
    if cached_batch != batch:
        raise ValueError(
            f"the cache has {cached_batch} sequences and the input {batch}; they must match"
        )
    if cache.ended is not None and not torch.compiler.is_compiling() and cache.ended.any():
        raise ValueError(
            "the cache ends in padding, so a sequence can't continue where its tokens end; put the "
            "padding in front of the tokens"
        )
    if mask is None and cache.mask is None:
        return None
    if mask is None:
        mask = x.new_ones(batch, length, dtype=torch.bool)
    if mask.shape == (batch, cache.length + length):
        return mask[:, cache.length - cached :] != 0
    check_shape("attention_mask", mask, batch, length)
    old = cache.mask
    if old is None:
        old = mask.new_ones(batch, cached, dtype=torch.bool)
    return torch.cat([old, mask != 0], dim=1)


def join_caches(layers: list[LayerCache], length: int, mask, old: MegaCache | None) -> MegaCache:
    """Make the cache of `length` positions from a call's mask (B, R + L) and its `old` cache."""
    cache = MegaCache(layers, length)
    if mask is None:
        return cache
    started = mask.any(dim=1)
    if old is not None and old.started is None:
        started = torch.ones_like(started)
    elif old is not None:
        started = started | old.started
    kept = layers[0].keys.shape[1]
    return cache._replace(
        mask=mask[:, mask.shape[1] - kept :],
        started=started,
        ended=started & ~mask[:, -1],
    )


# -------------------------------------------------------------------------------------- 6 heads
# A head adds layers and a loss to a MegaModel. All but question answering take the arguments of
# MegaModel.forward and `labels`; a token or class label of -100 is ignored.

MANY_LABELS = 512  # with more labels than this, training computes the logits in slices if it can
SLICE = 512  # positions per slice


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (..., classes) and labels (...), in nats and fp32."""
    labels = check_ids("labels", labels, logits.shape[-1], *logits.shape[:-1], ignored=-100)
    return F.cross_entropy(at_least_fp32(logits).flatten(0, -2), labels.flatten())


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        logits = logits.squeeze(-1)
    check_shape("labels", labels, *logits.shape)
    logits = at_least_fp32(logits)
    return F.mse_loss(logits, labels.to(logits))


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    check_shape("labels", labels, *logits.shape)
    logits = at_least_fp32(logits)
    labels = labels.to(logits)
    check_range("labels", labels, 1)
    return F.binary_cross_entropy_with_logits(logits, labels)


PROBLEM_TYPES = {
    "regression": mean_squared_error,
    "single_label_classification": cross_entropy,
    "multi_label_classification": binary_cross_entropy,
}


class MegaForTokenClassification(MegaBase):
    """Scores for each token: logits (B, L, num_labels), labels (B, L)."""

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = linear(config, config.hidden_size, config.num_labels)

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, **inputs) -> MegaOutput:
        out = self.mega(input_ids, attention_mask, **inputs)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels)
        return out._replace(logits=logits, loss=loss)


class MegaForSequenceClassification(MegaBase):
    """Scores for each sequence: logits (B, num_labels).

    Labels are classes (B), real numbers (B) with num_labels=1, or flags (B, num_labels) as floats
    or booleans. config.problem_type says which; if None, num_labels and the labels' dtype do.
    """

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        D = config.hidden_size
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        out_proj = linear(config, D, config.num_labels)
        dense = linear(config, D, D)
        self.classifier = nn.Sequential(
            OrderedDict(dense=dense, tanh=nn.Tanh(), dropout=self.dropout, out_proj=out_proj)
        )

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, **inputs) -> MegaOutput:
        check_padding(attention_mask, self.config.attention_limit)
        out = self.mega(input_ids, attention_mask, **inputs)
        pooled = self.mega.pool(out.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = PROBLEM_TYPES[self.problem_type(labels)](logits, labels)
        return out._replace(logits=logits, loss=loss)

    def problem_type(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        if labels.is_floating_point() or labels.dtype == torch.bool:
            return "multi_label_classification"
        return "single_label_classification"


class MegaForMultipleChoice(MegaBase):
    """Scores of choices: inputs (B, choices, L), logits (B, choices), labels (B)."""

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = linear(config, config.hidden_size, 1)

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, **inputs) -> MegaOutput:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        flat = {}
        choices = None
        for name, value in given.items():
            flat[name] = value
            if torch.is_tensor(value):
                if choices not in (None, value.shape[1]):
                    raise ValueError(
                        f"{name} has {value.shape[1]} choices, other inputs {choices}; give all "
                        "inputs the same number"
                    )
                choices = value.shape[1]
                flat[name] = value.flatten(0, 1)  # (B choices, L, ...)
        check_padding(flat["attention_mask"], self.config.attention_limit)
        out = self.mega(**flat)
        logits = self.classifier(self.dropout(out.pooler_output)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return out._replace(logits=logits, loss=loss)


class MegaForQuestionAnswering(MegaBase):
    """Scores (B, L) of each position as the answer's start and end; labels are positions (B).

    A position beyond the sequence is ignored, a negative one counts as 0.
    """

    def __init__(self, config: MegaConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels must be 2 (for start and end), got {config.num_labels}")
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = linear(config, config.hidden_size, 2)

    def forward(self, *args, start_positions=None, end_positions=None, **inputs) -> MegaOutput:
        """Return scores and, given start_positions and end_positions (B), their mean loss."""
        out = self.mega(*args, **inputs)
        logits = self.qa_outputs(out.last_hidden_state)  # (B, L, 2)
        starts, ends = logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss("start_positions", starts, start_positions)
            end_loss = position_loss("end_positions", ends, end_positions)
            loss = (start_loss + end_loss) / 2
        return out._replace(logits=logits, start_logits=starts, end_logits=ends, loss=loss)


def position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    """Average the cross-entropy of logits (B, L) over the positions (B) that are below L."""
    length = logits.shape[1]
    positions = check_integers(name, positions, len(logits)).clamp(0, length)
    return F.cross_entropy(at_least_fp32(logits), positions, ignore_index=length)


def classifier_dropout(config: MegaConfig) -> float:
    if config.classifier_dropout is None:
        return config.hidden_dropout_prob
    return config.classifier_dropout


def check_padding(mask: Tensor | None, chunk: int | None):
    """Raise a ValueError if left padding shifts tokens relative to the chunk boundaries."""
    if mask is None or chunk is None or mask.is_meta or torch.compiler.is_compiling():
        return
    in_front = ((mask != 0).cumsum(dim=1) == 0).sum(dim=1)  # (B)
    moved = (in_front % chunk != 0) & (in_front < mask.shape[1])
    if moved.any():
        raise ValueError(
            f"left padding of {in_front.tolist()} positions shifts tokens relative to chunks of "
            f"{chunk}; pad on the right, pad by whole chunks, or pass one sequence per call"
        )


class LanguageModel(MegaBase):
    """What the two language models share: an optional dense layer, and the loss."""

    def features(self, hidden: Tensor) -> Tensor:
        """Return the output layer's input for hidden states (..., D)."""
        return hidden if self.dense is None else torch.tanh(self.dense(hidden))

    def score(self, out: MegaOutput, output: nn.Module, labels, output_logits) -> MegaOutput:
        """Add logits (B, L, vocab_size) and, with labels (B, L), their loss."""
        features = self.features(out.last_hidden_state)
        if labels is not None:
            size = self.config.vocab_size
            labels = check_ids("labels", labels, size, *features.shape[:2], ignored=-100)
        if output_logits is None:
            output_logits = labels is None or not self.training or labels.numel() <= MANY_LABELS
        if labels is not None and not output_logits and can_slice(features, output):
            return out._replace(loss=sliced_cross_entropy(features, output, labels))
        logits = output(features)
        loss = None if labels is None else cross_entropy(logits, labels)
        return out._replace(logits=logits if output_logits else None, loss=loss)


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether this is an unmodified nn.Linear: no subclass, adapter, hook or pruning."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is not None
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


def can_slice(features: Tensor, layer: nn.Module) -> bool:
    """Return whether F.linear_cross_entropy computes what calling the layer would."""
    if not hasattr(F, "linear_cross_entropy") or needs_plain_autograd():
        return False  # the function is new in torch 2.13
    if autocast_is_on(features) or features.dtype.itemsize < 4:
        return False  # its loss would be rounded to half precision
    return is_plain_linear(layer)


def sliced_cross_entropy(features: Tensor, layer: nn.Linear, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of layer(features) slice by slice: the logits of all positions
    would be a training step's largest tensor. It can't be differentiated twice.
    """
    if torch.autograd.forward_ad.unpack_dual(features).tangent is not None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    loss = F.linear_cross_entropy(
        features.flatten(0, 1),
        layer.weight,
        labels.flatten(),
        linear_bias=layer.bias,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=SLICE, acc_policy="accurate"),
    )
    if loss.requires_grad:
        loss.register_hook(refuse_second_derivative)
    return loss


NO_SECOND_DERIVATIVE = (
    "the loss without logits supports first derivatives in reverse mode only; for others, call the "
    "model with output_logits=True"
)


def refuse_second_derivative(gradient: Tensor):
    if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
        raise RuntimeError(NO_SECOND_DERIVATIVE)


class MegaForMaskedLM(LanguageModel):
    """Predicts masked tokens; labels are -100 where there is nothing to predict."""

    def __init__(self, config: MegaConfig):
        warn_of_direction(config, False, "MegaForMaskedLM")
        super().__init__(config)
        D = config.hidden_size
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.mlm_head = linear(config, D, config.vocab_size)
        self.dense = linear(config, D, D) if config.add_lm_hidden_dense_layer else None
        if config.tie_word_embeddings:
            self.mlm_head.weight = self.mega.embedding_layer["word_embeddings"].weight

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, output_logits=None,
                **inputs) -> MegaOutput:  # fmt: skip
        """Score the vocabulary at each position. output_logits=None omits the logits in training
        steps with many labels.
        """
        out = self.mega(input_ids, attention_mask, **inputs)
        return self.score(out, self.mlm_head, labels, output_logits)


class MegaForCausalLM(LanguageModel):
    """Predicts the next token."""

    def __init__(self, config: MegaConfig):
        warn_of_direction(config, True, "MegaForCausalLM")
        super().__init__(config)
        D = config.hidden_size
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.lm_head = linear(config, D, config.vocab_size)
        self.dense = linear(config, D, D) if config.add_lm_hidden_dense_layer else None
        if config.tie_word_embeddings:
            self.lm_head.weight = self.mega.embedding_layer["word_embeddings"].weight

    def forward(self, input_ids=None, attention_mask=None, *, labels=None, shift_labels=True,
                output_logits=None, **inputs) -> MegaOutput:  # fmt: skip
        """Score the vocabulary at each position. labels[t] is the token at t or, with
        shift_labels=False, the one after it. output_logits=None omits the logits in training steps
        with many labels.
        """
        out = self.mega(input_ids, attention_mask, **inputs)
        if labels is not None and shift_labels:
            labels = check_integers("labels", labels, *out.last_hidden_state.shape[:2])
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return self.score(out, self.lm_head, labels, output_logits)

    # --------------------------------------------------------------------------- 7 generation
    # One pass over the prompt makes the cache; from there on each token costs one step. Where
    # possible, `decode_step` takes that step, otherwise the model's own forward does.

    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature=1.0, top_k=None,
                 top_p=None, eos_token_id=None, attention_mask=None, seed=None, stream=None,
                 process=None, token_type_ids=None, cache=None, **inputs) -> Tensor:  # fmt: skip
        """Continue input_ids (B, L); return (B, L + new), new <= max_new_tokens.

        Temperature 0 takes the likeliest token; top_k and top_p restrict sampling to the likeliest.
        After eos_token_id, one id or several, a sequence is filled with padding, or with eos if
        there is no padding token; generation stops when all have ended. Left padding
        (attention_mask 0) does not affect the result. `cache` holds the positions before input_ids.
        New tokens take the last token's type; other inputs are passed to MegaModel.

        `process(ids, logits)`, such as a Hugging Face logits processor, returns the logits to
        sample from. `stream` is called with each new token (B,); if it returns True, generation
        stops.
        """
        check_options(max_new_tokens, temperature, top_k, top_p)
        ids = check_ids("input_ids", input_ids, self.config.vocab_size, "B", "L")
        past = 0 if cache is None else cache.length
        self.check_prompt(ids, attention_mask, past, max_new_tokens)
        ends = end_tokens(eos_token_id).to(ids.device)
        generator = None
        if seed is not None:
            generator = torch.Generator(ids.device).manual_seed(operator.index(seed))

        if attention_mask is not None and past == 0 and (attention_mask != 0).all():
            attention_mask = None
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        new_ids = ids
        longest = ids.shape[1] + max_new_tokens
        inputs["use_cache"] = True
        output = quick_linear(self.lm_head, len(ids))
        state = None
        with evaluating(self), torch.inference_mode():  # a tenth faster than no_grad
            while ids.shape[1] < longest and not done.all():
                if state is not None:
                    hidden, state = decode_step(self.mega, state, ids[:, -1])
                else:
                    out = self.mega(new_ids, attention_mask, token_type_ids, cache=cache, **inputs)
                    hidden = out.last_hidden_state[:, -1]
                    attention_mask = None
                    cache = out.cache
                    if can_decode(self.mega, cache, inputs):
                        state = start_decoding(self.mega, cache)
                logits = at_least_fp32(output(self.features(hidden)))
                if process is not None:
                    logits = process(ids.clone(), logits)
                    check_shape("processed logits", logits, len(ids), self.config.vocab_size)
                token = draw(logits, temperature, top_k, top_p, generator)
                if len(ends) > 0:
                    filler = self.config.pad_token_id
                    token = token.masked_fill(done, ends[0] if filler is None else filler)
                    done = done | torch.isin(token, ends)
                new_ids = token.unsqueeze(1)
                ids = torch.cat([ids, new_ids], dim=1)
                if stream is not None:
                    with torch.inference_mode(False):  # so that autograd can use the token
                        if stream(token.clone()) is True:
                            break
                if token_type_ids is not None:
                    token_type_ids = token_type_ids[:, -1:]
        return ids.clone()

    def check_prompt(self, input_ids: Tensor, mask: Tensor | None, past: int, new: int):
        """Raise a ValueError if the prompt's padding or length can't be continued."""
        config = self.config
        longest = past + input_ids.shape[1] + max(new - 1, 0)  # the last token is not read
        if not config.use_chunking or config.add_cross_attention:
            config.check_length("length (prompt and all but the last new token)", longest)
        if mask is None:
            return
        visible = mask != 0
        ends_early = visible[:, :-1] & ~visible[:, 1:]  # a token followed by padding
        if not visible[:, -1].all() or (past == 0 and ends_early.any()):
            raise ValueError("generate needs left padding: put it before each sequence's tokens")
        if past > 0:
            return  # the model checks the rest
        check_shape("attention_mask", visible, *input_ids.shape)
        if config.add_cross_attention and not visible.all():
            raise ValueError(
                "left padding shifts tokens relative to the encoder's positions; pass sequences of "
                "equal length, or one at a time"
            )
        check_padding(visible, config.attention_limit)


class BlockState(NamedTuple):
    """What a block needs for a step, which overwrites the last three fields: use it only once."""

    u: Tensor  # (D, N), the EMA's
    q: Tensor
    g: Tensor
    omega: Tensor  # (D)
    qk_weight: Tensor  # (2, Z)
    qk_bias: Tensor
    bias: Tensor  # (2 room - 1), by distance, as in `bias_matrix`
    parts: int  # see `count_parts`
    norm: Callable
    ffn_norm: Callable
    v_proj: Callable
    mx_proj: Callable
    h_proj: Callable
    fc1: Callable
    fc2: Callable
    ema_state: Tensor  # (B, D, N)
    keys: Tensor  # (B, room, Z): space for `room` positions, zeros beyond those read so far
    values: Tensor  # (B, room, V)


class DecodingState(NamedTuple):
    """A MegaCache of `length` positions, in the form that `decode_step` reads fastest."""

    blocks: list[BlockState]
    length: int


def can_decode(model: MegaModel, cache: MegaCache, inputs: dict) -> bool:
    """Return whether `decode_step` does what calling the model would: unpadded ids alone, a
    feed-forward network in each block, and no module hooked, replaced or overridden.
    """
    config = model.config
    if config.add_cross_attention or config.add_token_type_embeddings or len(inputs) > 1:
        return False
    if cache.mask is not None:
        return False
    for module in model.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
    words = model.embedding_layer["word_embeddings"]
    plain = type(model) is MegaModel and type(words) is nn.Embedding
    return plain and all(is_plain_block(block) for block in model.layers)


def is_plain_block(block: nn.Module) -> bool:
    if type(block) is not MegaBlock or type(block.nffn) is not NormalizedFeedForward:
        return False
    layer = block.mega_layer
    return (
        type(layer) is MovingAverageGatedAttention
        and type(layer.ema_gate).forward is DampedEMA.forward
        and type(layer.norm) is type(block.nffn.norm) is SequenceNorm
    )


def start_decoding(model: MegaModel, cache: MegaCache) -> DecodingState:
    """Copy a cache, and precompute what depends on the weights alone."""
    batch = len(cache.layers[0].keys)
    room = model.config.attention_limit or 2 * cache.length
    blocks = []
    for block, old in zip(model.layers, cache.layers, strict=True):
        layer = block.mega_layer
        state = BlockState(
            *layer.ema_gate.coefficients(),
            omega=layer.ema_gate.residual_weight,
            qk_weight=layer.qk_weight,
            qk_bias=layer.qk_bias,
            bias=layer.rel_pos_bias(room),
            parts=count_parts(batch, old.values),
            norm=layer.norm.norm.forward,  # skips hooks: `can_decode` found none
            ffn_norm=block.nffn.norm.norm.forward,
            v_proj=quick_linear(layer.v_proj, batch),
            mx_proj=quick_linear(layer.mx_proj, batch),
            h_proj=quick_linear(layer.h_proj, batch),
            fc1=quick_linear(block.nffn.fc1, batch),
            fc2=quick_linear(block.nffn.fc2, batch),
            ema_state=old.ema_state.clone(),
            keys=extended(old.keys, room),
            values=extended(old.values, room),
        )
        blocks.append(state)
    return DecodingState(blocks, cache.length)


def extended(x: Tensor, room: int) -> Tensor:
    """Append zeros to x (B, R, ...) up to `room` positions: (B, room, ...)."""
    return F.pad(x, (0, 0, 0, room - x.shape[1]))


def decode_step(model: MegaModel, state: DecodingState, token: Tensor):
    """Read one token of each sequence, (B); return hidden states (B, D) and the next state.

    It is MegaModel.forward for L = 1, without the parts that only other inputs need.
    """
    config = model.config
    x = model.embedding_layer["word_embeddings"].weight[token]  # (B, D)
    if config.scale_embedding:
        x = x * math.sqrt(config.hidden_size)
    blocks = state.blocks
    room = blocks[0].keys.shape[1]
    place = state.length
    if config.use_chunking:
        place = place % room  # in its chunk
    elif place == room:
        blocks = [with_more_room(*pair) for pair in zip(model.layers, blocks, strict=True)]
    for block, block_state in zip(model.layers, blocks, strict=True):
        x = step_layer(block.mega_layer, block_state, x, place)
        x = step_ffn(block.nffn, block_state, x)
    x = model.final_norm(x.unsqueeze(1)).squeeze(1)
    return x, DecodingState(blocks, state.length + 1)


def with_more_room(block: MegaBlock, state: BlockState) -> BlockState:
    room = 2 * state.keys.shape[1]
    return state._replace(
        bias=block.mega_layer.rel_pos_bias(room),
        keys=extended(state.keys, room),
        values=extended(state.values, room),
    )


def step_layer(layer: MovingAverageGatedAttention, state: BlockState, x: Tensor, place: int):
    """Apply the equations of the layer's forward to x (B, D) at position `place` of a chunk."""
    config = layer.config
    D = config.hidden_size
    V = config.intermediate_size
    Z = config.shared_representation_size
    residual = x
    if config.normalize_before_mega:
        x = state.norm(x)
    state.values[:, place] = layer.activation(state.v_proj(x))  # (10)
    wide = x.to(state.u.dtype)
    state.ema_state.mul_(state.q).addcmul_(state.u, wide.unsqueeze(-1))  # (5)
    smooth = (state.g * state.ema_state).sum(dim=-1)
    smooth = F.silu(torch.addcmul(smooth, wide, state.omega)).to(x.dtype)  # (6)
    update, shared_and_reset, candidate = state.mx_proj(smooth).split_with_sizes([D, Z + V, D], -1)
    shared, reset = F.silu(shared_and_reset).split_with_sizes([Z, V], -1)  # (7), (12)
    query_and_key = torch.addcmul(state.qk_bias, state.qk_weight, shared.unsqueeze(1))  # (8), (9)
    query, state.keys[:, place] = query_and_key.unbind(dim=1)  # (B, Z)

    keys = state.keys[:, : place + 1]
    values = state.values[:, : place + 1]
    middle = len(state.bias) // 2
    bias = state.bias[middle - place : middle + 1]
    kind = config.attention_activation
    weights = attention_weights(query.unsqueeze(1), keys, bias, None, kind)  # (B, 1, place + 1)
    attended = vector_product(weights.to(values.dtype), values, state.parts)  # (11): (B, V)
    candidate = layer.activation(candidate + state.h_proj(attended * reset))  # (14)
    y = mix(residual, update, candidate)  # (13), (15)
    return y if config.normalize_before_mega else state.norm(y)


def step_ffn(ffn: NormalizedFeedForward, state: BlockState, x: Tensor) -> Tensor:
    """Apply the feed-forward network to x (B, D)."""
    residual = x
    if ffn.config.normalize_before_ffn:
        x = state.ffn_norm(x)
    y = residual + state.fc2(ffn.activation(state.fc1(x)))
    return y if ffn.config.normalize_before_ffn else state.ffn_norm(y)


def quick_linear(layer: nn.Module, batch: int) -> Callable:
    """Return the layer, or a faster function that does the same for a single vector x (1, n)."""
    if not is_plain_linear(layer):
        return layer
    weight = layer.weight
    parts = count_parts(batch, weight)
    if parts == 1 or len(weight) % parts:
        return layer
    matrices = weight.unflatten(0, (parts, -1)).mT  # (parts, n, m / parts)
    bias = layer.bias

    def apply(x: Tensor) -> Tensor:
        return torch.bmm(x.expand(parts, 1, -1), matrices).view(1, -1).add_(bias)

    return apply


def vector_product(x: Tensor, matrix: Tensor, parts: int) -> Tensor:
    """Multiply vectors x (B, 1, n) by matrices (B, n, m), cut into parts if B is 1: (B, m)."""
    if parts == 1 or matrix.shape[2] % parts:
        return (x @ matrix).squeeze(1)
    matrices = matrix[0].view(-1, parts, matrix.shape[2] // parts).transpose(0, 1)
    return torch.bmm(x.expand(parts, -1, -1), matrices).view(1, -1)


def count_parts(batch: int, matrix: Tensor) -> int:
    """Return how many parts to split a matrix into, so that all threads share its vector products.

    On CPUs a single thread would do them: with 2 threads, decoding would take 1.3 times as long.
    """
    if batch > 1 or matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return 1
    return torch.get_num_threads()


def warn_of_direction(config: MegaConfig, causal: bool, name: str):
    if config.is_decoder != causal:
        warnings.warn(
            f"{name} expects is_decoder={causal}, got {config.is_decoder}; it decides whether a "
            "token sees only earlier ones",
            stacklevel=3,
        )


def check_options(max_new_tokens, temperature, top_k, top_p):
    """Raise a ValueError about the first option of `generate` that is out of range."""
    if not is_integer(max_new_tokens, 0):
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, and finite, got {temperature}")
    if top_k is not None and not is_integer(top_k, 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def end_tokens(eos_token_id) -> Tensor:
    """Return the ids that end a sequence as a vector, given one id, several, or None."""
    try:
        ids = torch.as_tensor([] if eos_token_id is None else eos_token_id).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"eos_token_id must contain integers, got {eos_token_id!r}") from None
    return check_ids("eos_token_id", ids, LARGEST, "ids") if len(ids) > 0 else ids.long()


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Put a model into eval mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def draw(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """Sample one token per sequence, (B,), from logits (B, vocab_size)."""
    largest, likeliest = logits.max(dim=-1)
    maxima = largest.tolist()
    if not all(map(math.isfinite, maxima)):  # a NaN, which max returns, or only -inf
        raise ValueError(f"can't sample from logits whose maxima are {maxima}")
    if temperature == 0 or top_k == 1:
        return likeliest
    logits = (logits - largest.unsqueeze(1)) / max(temperature, 1e-30)  # at most 0: no overflow
    if top_k is not None:
        kept, tokens = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, kept)
    if top_p is not None:
        p, order = logits.softmax(dim=-1).sort(descending=True)
        likelier = p.cumsum(dim=-1) - p  # probability of the tokens before each
        late = likelier >= top_p
        late[:, 0] = False  # the likeliest stays, however small top_p is
        late = late.gather(-1, order.argsort(dim=-1))  # in the vocabulary's order
        logits = logits.masked_fill(late, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


# -------------------------------------------------------------------------------- 8 checkpoints
# Hugging Face's layout: a config.json, and weights in one file or in shards, in a folder or on the
# hub. Tied weights are written once. In a head, the MegaModel's weights have the prefix `mega.`.

WEIGHT_FILES = (  # the first one found is read
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WORDS = "embedding_layer.word_embeddings.weight"
# Weights that a file must have, and weights that are worth a warning if unused.
BACKBONE = r"layers\.\d+\.(mega_layer|nffn)\.|word_embeddings"
TRAINED = rf"{BACKBONE}|cross_attn|token_type"


def write_checkpoint(model: MegaBase, folder: Path):
    """Write config.json and model.safetensors; old files stay until the new ones are complete."""
    from safetensors.torch import save

    model.config.check()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    for name in {"dtype", "torch_dtype"} & config.keys():  # from the file that was loaded
        config[name] = str(next(model.parameters()).dtype).removeprefix("torch.")
    tensors = [*model.named_parameters(), *model.named_buffers()]  # a tied one only once
    weights = {name: tensor.data.contiguous() for name, tensor in tensors}
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = f"{uuid.uuid4().hex}.part"  # unique to this call
    try:
        for name, content in files.items():
            (folder / f"{name}.{part}").write_bytes(content)
        for name in files:
            (folder / f"{name}.{part}").replace(folder / name)
    finally:
        for name in files:
            (folder / f"{name}.{part}").unlink(missing_ok=True)


def find_file(source: str | Path, *names: str, revision: str | None = None) -> Path:
    """Return the path of the first of `names` in a folder or in a hub repository `owner/name`.

    Raises FileNotFoundError if none of them exists, OSError if the hub can't be reached.
    """
    choices = " or ".join(names)
    folder = Path(source)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(f"{source} has no {choices}")

    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    wanted = f"{source} is not a local folder, and its {choices}"
    unreachable = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(str(source), name, revision=revision))
        except LocalEntryNotFoundError as error:  # not cached, and the hub does not answer
            unreachable = error
        except EntryNotFoundError:  # the hub has other files
            continue
        except Exception as error:  # from many libraries: HTTP, TLS, the cache
            raise OSError(f"{wanted} can't be downloaded: {reason_and_advice(error)}") from error
    if unreachable is not None:
        raise OSError(f"{wanted} can't be downloaded: {reason_and_advice(unreachable)}")
    raise FileNotFoundError(f"{wanted} is not on the hub")


def reason_and_advice(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{reason} (is the name right, the network up, and HF_TOKEN set if it is private?)"


def read_checkpoint(source: str | Path, revision: str | None) -> tuple[dict, dict[str, Tensor]]:
    """Return the config, and the tensors under a bare model's names, of a folder or repository."""
    config = read_json(find_file(source, "config.json", revision=revision))
    path = find_file(source, *WEIGHT_FILES, revision=revision)
    paths = [path]
    if path.suffix == ".json":
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise ValueError(f"{path} can't be read (its weight_map must give each tensor's file)")
        paths = [
            find_file(source, Path(name).name, revision=revision) for name in set(shards.values())
        ]
    weights = {}
    for shard in paths:
        weights.update(read_tensors(shard))
    # torch.compile and DDP leave prefixes, and a head calls the bare model `mega`.
    prefix = r"\b(_orig_mod|module|mega)\."
    return config, {re.sub(prefix, "", name): tensor for name, tensor in weights.items()}


def read_json(path: Path) -> dict:
    try:
        return {**json.loads(path.read_bytes())}
    except (ValueError, TypeError, RecursionError) as error:  # not JSON, or not an object
        raise ValueError(f"{path} can't be read ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else unpickle(path)
        for name, x in found.items():
            if not isinstance(name, str) or not is_plain(x):
                raise ValueError(f"{name} is not a dense tensor of real numbers")
        return found
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(f"{path} can't be read ({error})") from error


def is_plain(x) -> bool:
    """Return whether x is a dense tensor of real numbers, with all its data in memory."""
    plain = torch.is_tensor(x) and x.layout == torch.strided and not (x.is_quantized or x.is_meta)
    return plain and not x.is_complex() and x.untyped_storage().nbytes() >= x.numel() * x.itemsize


def unpickle(path: Path):
    """Read what torch.save wrote: tensors and plain values, no code."""
    if zipfile.is_zipfile(path):  # torch.save does not compress, so a larger size is a zip bomb
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"it would unpack to {size:,} bytes, more than the file's size")
    return torch.load(path, "cpu", weights_only=True)


def match(cls, config: MegaConfig, weights: dict, ignore: bool, source: str) -> dict[str, Tensor]:
    """Return `read_checkpoint`'s tensors under a model's names; ValueError if one does not fit.

    What may be missing (a head, a cross-attention, a pooler), and with `ignore` whatever does not
    fit, is left out and named in a single warning.
    """
    depth = config.num_hidden_layers
    if not ignore:  # one layer more than the file has is enough to detect a missing one
        layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
        depth = min(depth, len(layers) + 1)
    with torch.device("meta"), warnings.catch_warnings():  # shapes alone, which take no memory
        warnings.simplefilter("ignore")
        model = cls(replace(config, num_hidden_layers=depth))
    weights = dict(weights)
    tie_as_in_file(model, weights)
    matching = {}
    fresh = []
    for name, tensor in model.state_dict().items():
        found = weights.pop(name.removeprefix("mega."), None)
        if found is None and not re.search(BACKBONE, name):
            fresh.append(name)
            continue
        if ignore and has_two_directions(name, found, tensor):
            found = found[: len(tensor)]  # the first half reads from left to right
        if found is not None and found.shape == tensor.shape:
            matching[name] = found
        elif ignore:
            fresh.append(name)
        else:
            raise ValueError(f"{source}: {describe_misfit(config, name, found, tensor)}")

    trained = TRAINED
    if isinstance(model, LanguageModel):
        trained += r"|^dense\."
    unused = [n for n in weights if re.search(trained, n) and not n.endswith("_float_tensor")]
    notes = []
    if fresh:
        notes.append(f"newly initialised: {', '.join(fresh)}")
    if unused:
        notes.append(f"not used: {', '.join(unused)}")
    if notes:
        warnings.warn(f"{source}: {'; '.join(notes)}", stacklevel=3)
    return matching


def tie_as_in_file(model: MegaBase, weights: dict[str, Tensor]):
    """Give a language model's embedding and output one tensor, if config or file ties them.

    A tied file has only one of the two; from an untied file the output layer's is used.
    """
    for head in ("lm_head", "mlm_head"):
        if not hasattr(model, head):
            continue
        output = f"{head}.weight"
        if output not in weights and WORDS in weights:
            weights[output] = weights[WORDS]
        if model.config.tie_word_embeddings and output in weights:
            weights[WORDS] = weights[output]


def has_two_directions(name: str, found: Tensor | None, wanted: Tensor) -> bool:
    """Return whether a file's EMA parameter is bidirectional and the model's is not."""
    return found is not None and "ema_gate" in name and len(found) == 2 * len(wanted)


def describe_misfit(config: MegaConfig, name: str, found: Tensor | None, wanted: Tensor) -> str:
    """Say what is wrong with a file's tensor, which settings explain it, and what to do."""
    if found is None:
        return (
            f"tensor {name} is missing; check that this is a MEGA checkpoint, and that its "
            "num_hidden_layers, normalization_type, relative_positional_bias and optional layers "
            "are those of the config"
        )
    text = f"tensor {name} is {tuple(found.shape)}, but the config asks for {tuple(wanted.shape)}"
    if has_two_directions(name, found, wanted):
        return (
            f"{text}; load it with bidirectional=True and is_decoder=False, or keep only its "
            "left-to-right half with ignore_mismatched_sizes=True"
        )
    if has_two_directions(name, wanted, found):
        return f"{text}; load it with bidirectional=False"
    wrong = {a for a, b in zip(wanted.shape, found.shape, strict=False) if a != b}
    labels = re.search("classifier|qa_outputs|token_type", name) is not None
    settings = []
    for setting in COUNTS.split():
        size = getattr(config, setting)
        explains = size in wrong or 2 * size - 1 in wrong  # 2 P - 1: the simple bias's table
        if explains and (setting in ("num_labels", "type_vocab_size")) == labels:
            settings.append(f"{setting}={size}")
    reason = f", due to {' or '.join(settings)}" if settings else ""
    return f"{text}{reason}; ignore_mismatched_sizes=True reinitialises it"


def resize(model: MegaBase, size: int):
    """Keep the first `size` tokens of a model, or add new ones, in place."""
    replace(model.config, vocab_size=size)  # raises a ValueError for a bad size
    resized = {}  # keyed by the old parameter, so that tied ones stay tied
    for name, layer in model.named_modules():
        if not name.endswith(("word_embeddings", "lm_head")):  # mlm_head, too
            continue
        for key, old in list(layer.named_parameters()):
            if old not in resized:
                std = model.config.initializer_range if old.dim() > 1 else 0  # biases start at 0
                new = old.data.new_empty(size, *old.shape[1:]).normal_(std=std)
                new[: len(old)] = old.data[:size]
                resized[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(layer, key, resized[old])
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = size
        else:
            layer.out_features = size
    model.config.vocab_size = size


# ---------------------------------------------------------------------------------- self-check


def main():
    """Show that the EMA's modes agree, that a cache changes no logits, and what each mode costs."""
    torch.manual_seed(0)
    config = MegaConfig(
        hidden_size=256, intermediate_size=512, bidirectional=False, is_decoder=True,
        use_chunking=True, chunk_size=128,
    )  # fmt: skip
    ema = DampedEMA(config).double()
    x = torch.randn(1, 300, 256, dtype=torch.float64)
    for mode in EMA_MODES:
        error = (ema(x, mode=mode)[0] - ema(x, mode="direct")[0]).abs().max()
        print(f"{mode:10} differs from the definition by {error:.0e} at most (fp64)")

    model = MegaForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (1, 300))
    with torch.no_grad():
        first = model(ids[:, :200], use_cache=True)
        rest = model(ids[:, 200:], cache=first.cache)
        error = (rest.logits - model(ids).logits[:, 200:]).abs().max()
    print(f"logits with a cache differ from those of a full pass by {error:.0e} at most (fp32)")

    print("\nmilliseconds of the EMA, forward and backward, 256 channels of 16 states, fp32")
    # The longest sequence that each mode processes within seconds:
    longest = {"direct": 256, "recurrent": 1024, "fft": 4096, "blockwise": 16384}
    for length in (64, 256, 1024, 4096, 16384):
        cells = []
        for mode, limit in longest.items():
            if length <= limit:
                cells.append(f"{mode} {milliseconds(mode, config, length):.1f}")
        print(f"{length:6} positions: {', '.join(cells)}", flush=True)


def milliseconds(mode: str, config: MegaConfig, length: int) -> float:
    """Time the second of two calls of the EMA, forward and backward, in milliseconds."""
    ema = DampedEMA(config, mode)
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    for _ in range(2):
        start = time.perf_counter()
        ema(x)[0].sum().backward()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
