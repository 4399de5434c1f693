"""Train a MEGA language model.

    python train.py                       # WikiText-2 or, offline, the text that ships with Python
    python train.py --dataset=my_text.txt --max_minutes=5 --out_dir=out-mine
    python train.py --resume              # continue out_dir's run, with the settings it had
    python train.py --eval_only           # evaluate its best model on val and test
    torchrun --nproc_per_node=2 train.py  # several processes share the sequences of each step

Each setting below is a flag, --name=value or --name value. out_dir holds the best model so far, in
Hugging Face's layout, with its tokenizer; last.pt, with all that --resume needs; and log.csv,
loss.png and samples.txt, rewritten at each evaluation.
"""

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.common import (
    DownloadError,
    UserError,
    keep_big_blocks,
    locked,
    read_flags,
    reading,
    run,
    set_aside,
    short,
    write_whole,
)
from data.machine import (
    Distributed,
    ProgressBar,
    choose_dtype,
    dtype_name,
    make_autocast,
    memory_of_machine,
    told_to_stop,
)
from data.prepare import (
    TOKENIZER_FILES,
    TOKENIZERS,
    Tokenizer,
    load_tokenizer,
    prepared,
    read_meta,
    save_tokenizer,
)
from mega import MegaConfig, MegaForCausalLM, evaluating, unpickle
from sample import continue_text, load_model

# files
out_dir = "out"  # folder of the checkpoints and the log
resume = False  # continue from out_dir/last.pt
eval_only = False  # evaluate out_dir's best model on val and test, and stop
# data
dataset = "auto"  # a path, or one of data/prepare.py's; auto: wikitext-2, or pydocs when offline
data_dir = ""  # folder for the prepared datasets; empty: data/ beside this file
source = ""  # a folder, file, zip or URL from which to read the dataset instead of downloading it
train_split = "train"  # the dataset's split to train on
val_split = "val"  # the dataset's split to evaluate on
tokenizer = "auto"  # bpe, bytes or gpt2 (a download); auto: bytes for shakespeare, enwik8, else bpe
vocab_size = 2048  # number of bpe tokens
# model
n_layer = 4  # blocks
n_embd = 160  # D, channels: the width of the hidden states
intermediate_size = 0  # V, width of the values; 0: 2 n_embd
nffn_hidden_size = 0  # F, width of the feed-forward network; 0: 2 n_embd
shared_size = 64  # Z, width of queries and keys
ema_size = 16  # N, EMA states per channel
chunk_size = 128  # C, attention sees at most this many tokens; 0: block_size
attention = "softmax"  # softmax, laplace or relu2
dropout = 0.05  # on the outputs of the EMA, the layer and the feed-forward network
hidden_dropout = 0.05  # on the values and the feed-forward network's hidden layer
attention_dropout = 0.0  # on the attention weights
feature_dropout = True  # drop whole features of a sequence, not single elements
# optimization
optimizer = "muon"  # muon (for matrices; adamw for the rest) or adamw
batch_size = 4  # sequences per forward pass
block_size = 512  # tokens per sequence: the context length in training
gradient_accumulation_steps = 1  # forward passes per step, divided among the processes
max_iters = 10000  # maximum number of steps
max_minutes = 8.5  # training time limit; 0: none, and a resumed run repeats an unbroken one exactly
learning_rate = 5e-3  # AdamW's peak, after warm-up
ema_learning_rate = 2e-2  # AdamW's peak for EMAs, query/key scales and shifts, position biases
muon_learning_rate = 0.04  # Muon's peak
min_lr_fraction = 0.02  # final learning rates, as a fraction of the peaks
warmup_fraction = 0.02  # fraction of training spent on warm-up
weight_decay = 0.1  # of matrices only
momentum = 0.95  # of Muon
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # maximum gradient norm; 0: no clipping
# evaluation
evaluations = 10  # spread evenly over training
save_interval = 100  # steps between checkpoints; each evaluation makes one, too
contexts = "512,carried,sliding"  # of the final evaluation: window lengths, carried or sliding
eval_chunk_size = 0  # attention's chunk size with eval_only; 0: as in training
sample_tokens = 100  # length of the sample at each evaluation; 0: none
# machine
device = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is faster
compile = False  # torch.compile the model, where that works
threads = 0  # CPU threads; 0: torch's choice
seed = 1337  # for weights, batches and dropout

SETTINGS = {
    name: value
    for name, value in globals().items()
    if isinstance(value, bool | int | float | str) and name.islower() and name[0] != "_"
}

# ---------------------------------------------------------------------------------------- settings

# Values with which a dataset overrides the defaults above, for 8 to 15 minutes on two cores.
PRESETS = {
    "shakespeare": {
        "n_embd": 192,
        "batch_size": 8,
        "block_size": 256,
        "dropout": 0.02,
        "hidden_dropout": 0.02,
        "contexts": "256,sliding",
    },
}
DTYPES = ("auto", "float32", "bfloat16")
CONTEXTS = "carried, sliding or window lengths, separated by commas"
MOST = 1 << 63
RULES = (  # names, the rule in words, the rule as a function
    ("batch_size block_size max_iters evaluations", "at least 1", lambda x: 1 <= x < MOST),
    ("save_interval n_layer n_embd", "at least 1", lambda x: 1 <= x < MOST),
    ("intermediate_size nffn_hidden_size", "0 or more", lambda x: 0 <= x < MOST),
    ("shared_size ema_size", "at least 1", lambda x: 1 <= x < MOST),
    ("gradient_accumulation_steps", "at least 1", lambda x: x >= 1),
    ("gradient_accumulation_steps", "at most 65536", lambda x: x <= 65536),
    ("chunk_size eval_chunk_size", "0 or more", lambda x: 0 <= x < MOST),
    ("max_minutes weight_decay", "0 or more", lambda x: 0 <= x < MOST),
    ("grad_clip sample_tokens seed threads", "0 or more", lambda x: 0 <= x < MOST),
    ("threads", "at most 1024", lambda x: x <= 1024),
    ("learning_rate ema_learning_rate muon_learning_rate", "above 0", lambda x: 0 < x < MOST),
    ("dropout hidden_dropout attention_dropout", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("warmup_fraction min_lr_fraction", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("momentum beta1 beta2", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("out_dir dataset", "non-empty", bool),
    ("out_dir dataset data_dir source", "without null bytes", lambda x: "\0" not in x),
    ("optimizer", "one of muon, adamw", lambda x: x in ("muon", "adamw")),
    ("dtype", f"one of {', '.join(DTYPES)}", lambda x: x in DTYPES),
    ("tokenizer", f"one of {', '.join(TOKENIZERS)}", lambda x: x in TOKENIZERS),
    ("contexts", CONTEXTS, lambda x: all(is_context(part) for part in x.split(","))),
)
# Common names for settings, and the names used here.
ALSO_CALLED = {
    "lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "steps": "max_iters",
    "epochs": "max_iters or --max_minutes", "num_epochs": "max_iters or --max_minutes",
}  # fmt: skip
# Settings that a resumed run may change; the others come from its checkpoint.
CHANGEABLE = """
    out_dir resume eval_only dataset data_dir source max_iters max_minutes evaluations save_interval
    contexts eval_chunk_size sample_tokens device dtype compile threads learning_rate
    ema_learning_rate muon_learning_rate min_lr_fraction warmup_fraction grad_clip
"""


def is_context(text: str) -> bool:
    return text in ("carried", "sliding") or re.fullmatch(r"[1-9]\d{0,8}", text) is not None


def read_settings(arguments: list[str]) -> argparse.Namespace:
    """Return this file's settings, or those of the run in out_dir, with the flags applied."""
    given = read_flags(arguments, __doc__, Path(__file__), SETTINGS, ALSO_CALLED)
    for name in {"out_dir", "dataset", "data_dir", "source"} & given.keys():
        given[name] = os.path.expanduser(given[name])
    preset = PRESETS.get(given.get("dataset"), {})
    s = argparse.Namespace(**{**SETTINGS, **preset, **given})
    if wrong_setting(s):
        raise UserError(wrong_setting(s))
    last = Path(s.out_dir) / "last.pt"
    if (s.resume or s.eval_only) and last.exists():
        saved = read_state(last.parent)["settings"]
        if s.eval_only:
            saved["dtype"] = "auto"  # the run's may be slow on this machine
        changeable = CHANGEABLE.split()
        if s.eval_only:
            changeable.append("val_split")
        check_same(saved, {n: x for n, x in given.items() if n not in changeable}, last)
        s = argparse.Namespace(**{**SETTINGS, **saved, **given})
    return s


def wrong_setting(s) -> str | None:
    """Return a sentence about the first setting that is out of range, or None."""
    for names, rule, valid in RULES:
        for name in names.split():
            if not valid(getattr(s, name)):
                return f"--{name} must be {rule}, got {getattr(s, name)!r}"
    return None


def check_memory(s):
    """Raise a UserError if a training step can't fit into memory, even by a low estimate."""
    width = s.n_embd + sum(widths(s)) + s.shared_size + s.ema_size
    numbers = 3 * s.n_embd + s.batch_size * s.block_size  # weight, gradient, moment; activations
    needed = s.n_layer * (4 * width * numbers + 30_000)  # bytes; Python's objects take some, too
    if needed > memory_of_machine():
        raise UserError(
            f"a step would need at least {needed / 1e9:,.0f} GB of memory, and this machine has "
            f"{memory_of_machine() / 1e9:,.0f}; lower --n_layer, --n_embd, --batch_size or "
            "--block_size"
        )


def widths(s) -> tuple[int, int]:
    """Return V and F."""
    return s.intermediate_size or 2 * s.n_embd, s.nffn_hidden_size or 2 * s.n_embd


# -------------------------------------------------------------------------------------------- data


@contextlib.contextmanager
def find_data(s):
    """Prepare the dataset and yield its folder, which stays as it is until the block ends.

    If no dataset is named and WikiText can't be downloaded, use the text that ships with Python.
    """
    options = (s.source, s.train_split, s.val_split, s.tokenizer, s.vocab_size, s.data_dir)
    name = "wikitext-2" if s.dataset == "auto" else s.dataset
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(prepared(name, *options))
        except DownloadError as error:
            if s.dataset != "auto" or s.source:
                raise
            used = "the text that ships with Python (pydocs) is used"
            print(f"{name} can't be downloaded, so {used}: {error}")
            folder = stack.enter_context(prepared("pydocs", *options))
        yield folder


COUNTS = {"documents": 0, "characters": 0, "bytes": 0, "words": 0, "tokens": 0}  # of a split


class Corpus:
    """The token files of a prepared dataset, as memory maps."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, block_size: int, seed: int):
        meta = read_meta(folder)
        with reading(f"{folder}/meta.json is damaged; delete {folder} and run again"):
            for counts in meta["splits"].values():
                check_like(counts, COUNTS)
            dtype = np.dtype({"uint8": "u1", "uint16": "u2", "uint32": "u4"}[meta["dtype"]])
        self.folder = folder
        self.counts = meta["splits"]
        self.block_size = block_size
        self.seed = seed
        self.tokens = {}
        for split, counts in self.counts.items():
            path = folder / f"{split}.bin"
            if not path.exists() or path.stat().st_size != counts["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged; delete {folder} and run again")
            tokens = np.memmap(path, dtype, "r")
            if tokens.max() >= tokenizer.size:
                raise UserError(
                    f"{path} contains token {tokens.max()}, but its vocabulary has only "
                    f"{tokenizer.size}; delete {folder} and run again"
                )
            self.tokens[split] = tokens
        for split, least in (("train", block_size + 1), ("val", 2)):
            if len(self.tokens[split]) < least:
                mend = " or lower --block_size" if split == "train" else ""
                raise UserError(
                    f"the {split} split of {folder} has {len(self.tokens[split])} tokens and needs "
                    f"at least {least}; give more text{mend}"
                )
        pairs = len(self.tokens["train"]) - 1  # of a token and the next one
        self.windows = max(pairs // block_size - 1, 1)  # per epoch; one less, to leave a shift
        self.spare = pairs - self.windows * block_size
        self.orders = {}  # by epoch

    def checksum(self) -> int:
        """Return a number that changes with the text of any split."""
        return functools.reduce(lambda sofar, x: zlib.crc32(x, sofar), self.tokens.values(), 0)

    def ids(self, split: str) -> Tensor:
        """Return the token ids of a whole split, (T,)."""
        return torch.from_numpy(self.tokens[split].astype(np.int64))

    def epoch(self, number: int) -> np.ndarray:
        """Return the starts of an epoch's windows: in random order, all shifted by one offset."""
        if number not in self.orders:
            random = np.random.default_rng((self.seed, number))
            starts = np.arange(self.windows) * self.block_size + random.integers(self.spare + 1)
            self.orders.pop(number - 2, None)  # a step may span the previous epoch's end
            self.orders[number] = random.permutation(starts)
        return self.orders[number]

    def sequences(self, numbers: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return training windows: inputs and next-token targets, each (B, L).

        A window is determined by its number alone, counted from the start of training.
        """
        windows = []
        for number in numbers:
            start = self.epoch(number // self.windows)[number % self.windows]
            windows.append(self.tokens["train"][start : start + self.block_size + 1])
        ids = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
        return ids[:, :-1], ids[:, 1:]


# ----------------------------------------------------------------------------------------- model


def new_model(s, tokenizer: Tokenizer) -> MegaForCausalLM:
    """Make a model with random weights."""
    value_size, ffn_size = widths(s)
    try:
        config = MegaConfig(
            vocab_size=tokenizer.size,
            num_hidden_layers=s.n_layer,
            hidden_size=s.n_embd,
            intermediate_size=value_size,
            nffn_hidden_size=ffn_size,
            shared_representation_size=s.shared_size,
            ema_projection_size=s.ema_size,
            use_chunking=True,
            chunk_size=s.chunk_size or s.block_size,
            attention_activation=s.attention,
            dropout_prob=s.dropout,
            hidden_dropout_prob=s.hidden_dropout,
            nffn_activation_dropout_prob=s.hidden_dropout,
            attention_probs_dropout_prob=s.attention_dropout,
            use_feature_dropout=s.feature_dropout,
            normalization_type="layernorm",
            is_decoder=True,
            bidirectional=False,
            final_norm=True,
            scale_embedding=True,
            add_lm_hidden_dense_layer=False,
            pad_token_id=None,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return MegaForCausalLM(config)


# ------------------------------------------------------------------------------------- optimizers


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, with orthogonalized updates (Jordan et al. 2024).

    A step changes a matrix equally in all directions, even those in which its gradient is small.
    `dtype` is that of the matrix products in `orthogonalize`; bfloat16 is precise enough.
    """

    def __init__(self, parameters, lr, momentum, weight_decay, dtype=torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            moves = {}  # by shape: those of one shape are orthogonalized together, which is faster
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
                moves.setdefault(p.shape, {})[p] = ahead
            for (rows, columns), found in moves.items():
                stacked = torch.stack([*found.values()])
                directions = orthogonalize(stacked.to(self.dtype)).to(stacked.dtype)
                size = group["lr"] * max(1, rows / columns) ** 0.5
                for p, direction in zip(found, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices (M, rows, columns) near 1: between about 0.7 and 1.2.

    Each of five Newton-Schulz steps applies a s + b s^3 + c s^5 to every singular value s.
    """
    a, b, c = (3.4445, -4.7750, 2.0315)
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # keeps x x^T small
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b S + c S S
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b S + c S S) x
    return x.mT if tall else x


def build_optimizers(s, model: nn.Module, device: torch.device, dtype: torch.dtype) -> list:
    """Make Muon or AdamW, with weight decay, for matrices; AdamW for the rest and embeddings.

    EMAs, scales and shifts of queries and keys, and position biases have their own learning rate:
    they learn best at a rate several times as high (see data/lecture/training.md).
    """
    names = re.compile("ema_gate|qk_weight|qk_bias|rel_pos_bias")
    ema = [p for name, p in model.named_parameters() if names.search(name)]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    no_matrices = {id(p) for p in (*ema, *tables)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in no_matrices]
    chosen = {id(p) for p in (*ema, *matrices)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": rest, "weight_decay": 0.0},
        {"params": ema, "weight_decay": 0.0, "lr": s.ema_learning_rate},
    ]
    if s.optimizer == "adamw":
        groups.insert(0, {"params": matrices, "weight_decay": s.weight_decay})
    fused = device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, s.learning_rate, betas=(s.beta1, s.beta2), fused=fused)
    if s.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon(matrices, s.muon_learning_rate, s.momentum, s.weight_decay, dtype)]


def learning_rate_factor(s, progress: float) -> float:
    """Return the factor of the peak learning rates: linear warm-up, then linear decay.

    `progress` is the fraction of training done, from 0 to 1.
    """
    if progress < s.warmup_fraction:
        return max(progress / s.warmup_fraction, 0.01)
    return max((1 - progress) / (1 - s.warmup_fraction), s.min_lr_fraction)


# -------------------------------------------------------------------------------------- evaluation

EVALUATED = 8192  # tokens per forward pass: enough to be fast


def evaluate(model: MegaForCausalLM, corpus: Corpus, split: str, context: str, autocast) -> dict:
    """Evaluate on a whole split: nats per token, bits per byte, and perplexity per word.

    The end of a line counts as a word. All tokens but the split's first, an end-of-text token, are
    predicted. Contexts are

        "512"      windows of this many tokens, each without earlier context;
        "carried"  the split is one sequence: the EMA is never reset, and attention sees the earlier
                   tokens of the same chunk;
        "sliding"  two carried passes, the second with chunk boundaries half a chunk later; each
                   token is scored in the pass in which attention sees more of the earlier text.
    """
    tokens = corpus.ids(split)
    with evaluating(model):
        if context.isdigit():
            total = loss_in_windows(model, tokens, int(context), autocast)
            return in_units(total, corpus, split)
        chunk = model.config.attention_limit
        if chunk is None:
            raise UserError(f"--contexts={context} needs a model with chunks; give window lengths")
        late = chunk // 2 if context == "sliding" else 0
        total = loss_carried(model, tokens, chunk, 0, late, autocast)
        if late:
            total += loss_carried(model, tokens, chunk, chunk - late, chunk - late, autocast)
        return in_units(total, corpus, split)


def in_units(total: float, corpus: Corpus, split: str) -> dict[str, float]:
    """Convert the summed loss of a split, in nats, to the units that papers report."""
    counts = corpus.counts[split]
    return {
        "loss": total / (counts["tokens"] - 1),
        "bits_per_byte": total / math.log(2) / counts["bytes"],
        "word_perplexity": math.exp(min(total / counts["words"], 700.0)),
    }


@torch.no_grad()
def summed_loss(model, inputs: Tensor, targets: Tensor, autocast, **more):
    """Return the loss summed over targets other than -100, in nats, and the cache."""
    device = next(model.parameters()).device
    options = {"shift_labels": False, "output_logits": False, **more}
    with autocast:
        out = model(inputs.to(device), labels=targets.to(device), **options)
    count = (targets != -100).sum().item()
    return out.loss.item() * count if count else 0.0, out.cache


def loss_in_windows(model, tokens: Tensor, length: int, autocast) -> float:
    """Split tokens (T) into windows without earlier context, and sum their loss."""
    length = min(length, len(tokens) - 1)
    rest = -(len(tokens) - 1) % length  # padding of the last window, without labels
    inputs = F.pad(tokens[:-1], (0, rest)).view(-1, length)
    targets = F.pad(tokens[1:], (0, rest), value=-100).view(-1, length)
    batch = max(EVALUATED // length, 1)
    total = 0.0
    for some in zip(inputs.split(batch), targets.split(batch), strict=True):
        found, _ = summed_loss(model, *some, autocast, use_cache=False)
        total += found
    return total


def loss_carried(model, tokens: Tensor, chunk: int, padding: int, least: int, autocast) -> float:
    """Sum the loss of tokens (T), with a cache, after padding that shifts the chunk boundaries.

    Only positions with at least `least` others before them in their chunk count.
    """
    inputs = F.pad(tokens[:-1], (padding, 0)).unsqueeze(0)  # (1, padding + T - 1)
    targets = F.pad(tokens[1:], (padding, 0), value=-100).unsqueeze(0)
    targets[:, torch.arange(targets.shape[1]) % chunk < least] = -100
    device = next(model.parameters()).device
    mask = (torch.arange(inputs.shape[1], device=device) >= padding).unsqueeze(0)
    total = 0.0
    cache = None
    length = max(EVALUATED // chunk, 1) * chunk
    for start in range(0, inputs.shape[1], length):
        part = (slice(None), slice(start, start + length))
        more = {"cache": cache, "use_cache": True}
        if padding and cache is None:
            more["attention_mask"] = mask[part]
        found, cache = summed_loss(model, inputs[part], targets[part], autocast, **more)
        total += found
    return total


def report(name: str, result: dict[str, float]) -> str:
    return f"{name}: " + " ".join(f"{key} {value:.4f}" for key, value in result.items())


def report_all(model: MegaForCausalLM, corpus: Corpus, splits: list, contexts: str, autocast):
    """Print the result of each context, and at the end that of the last split and context again."""
    for split in splits:
        n = corpus.counts[split]
        predicted = n["tokens"] - 1
        unit = "character" if predicted == n["characters"] else "token"
        print(
            f"{split}: {predicted:,} tokens predicted, {n['bytes']:,} bytes, {n['words']:,} words, "
            f"counting line ends; loss in nats per {unit}"
        )
        for context in contexts.split(","):
            result = evaluate(model, corpus, split, context, autocast)
            name = f"windows of {context} tokens" if context.isdigit() else context
            print(report(f"{split}, {name}", result), flush=True)
    print(report(splits[-1], result))


# ---------------------------------------------------------------------------------------- training

# The contents of last.pt and their types, except for model and optimizers.
COUNTERS = ("step", "seconds", "best", "losses", "log")
ROW = {
    "step": 0, "tokens": 0, "seconds": 0.0, "train_loss": 0.0, "val_loss": 0.0,
    "bits_per_byte": 0.0, "word_perplexity": 0.0, "tokens_per_second": 0.0, "learning_rate": 0.0,
    "sample": "",
}  # fmt: skip
SAVED = {n: x for n, x in SETTINGS.items() if n not in ("out_dir", "resume", "eval_only")}
STATE = {
    "settings": SAVED, "text": {"dataset": "", "checksum": 0}, "processes": 0,
    "step": 0, "seconds": 0.0, "best": 0.0, "losses": [], "log": [],
}  # fmt: skip
FILES = ("last.pt", "log.csv", "loss.png", "samples.txt", "config.json", "model.safetensors")
FILES += TOKENIZER_FILES


class Diverged(UserError):
    """A loss, gradient or weight is not finite; the checkpoints saved before are intact."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}; earlier checkpoints are unchanged: try a lower --learning_rate and "
            "--muon_learning_rate (also with --resume)"
        )


class Training:
    """A run: model, optimizers and counters, all of which a checkpoint holds for resuming."""

    def __init__(self, s, processes: Distributed, make_model=new_model, lock=None):
        self.settings = s
        self.lock = lock  # os.stat of out_dir's lock file
        self.processes = processes
        self.device = processes.device
        self.out = Path(s.out_dir)
        self.owns_files = s.resume  # until the first save, out_dir may hold an earlier run's
        self.step = 0
        self.seconds = 0.0  # of training
        self.best = math.inf
        self.losses = []  # of all steps
        self.log = []  # of all evaluations
        with contextlib.ExitStack() as stack:
            folder = processes.broadcast(lambda: stack.enter_context(find_data(s)))
            self.tokenizer = load_tokenizer(folder)
            self.corpus = Corpus(folder, self.tokenizer, s.block_size, s.seed)
            processes.sum(0.0)  # wait until all have read it
        s.dataset = folder.name if s.dataset == "auto" else s.dataset
        self.dtype = processes.broadcast(lambda: choose_dtype(s.dtype, self.device))
        s.dtype = dtype_name(self.dtype)
        self.autocast = make_autocast(self.device, self.dtype)
        if self.device.type == "cpu":
            check_memory(s)
        torch.manual_seed(s.seed)
        self.model = make_model(s, self.tokenizer).to(self.device)
        self.optimizers = build_optimizers(s, self.model, self.device, self.dtype)
        self.peaks = [group["lr"] for group in self.parameter_groups()]
        self.sequences = s.batch_size * s.gradient_accumulation_steps  # of a step
        self.parts = self.share_sequences()
        self.text = {"dataset": folder.name, "checksum": self.corpus.checksum()}
        if s.resume:
            self.load_state(read_state(self.out))
        self.engine = compiled(self) if s.compile else self.model
        if processes.size > 1:
            self.engine = DistributedDataParallel(self.engine, process_group=processes.group)

    def share_sequences(self) -> list[range]:
        """Return which of a step's sequences this process takes, one range per forward pass."""
        s = self.settings
        size = self.processes.size
        if self.sequences % size:
            raise UserError(
                f"a step's {self.sequences} sequences (--batch_size={s.batch_size} times "
                f"--gradient_accumulation_steps={s.gradient_accumulation_steps}) can't be divided "
                f"among {size} processes; make their product a multiple of {size}"
            )
        mine = self.sequences // size
        first = self.processes.rank * mine
        stop = first + mine
        return [range(i, min(i + s.batch_size, stop)) for i in range(first, stop, s.batch_size)]

    def parameter_groups(self) -> list[dict]:
        return [group for o in self.optimizers for group in o.param_groups]

    def progress(self) -> float:
        return progress(self.settings, self.step, self.seconds)

    def train_step(self):
        """Update the weights once."""
        self.update(*self.gradients())

    def gradients(self) -> tuple[float, float]:
        """Compute a step's gradient; return this process's loss and the seconds taken.

        Raises a UserError if the loss or the gradient is not finite; otherwise the weights are
        finite, too.

        All randomness of a step comes from the seed, the step and the index of a part's first
        sequence. So a checkpoint needs no generator's state, and the number of processes affects
        dropout only through the parts.
        """
        s = self.settings
        start = time.perf_counter()
        loss = 0.0
        for part in self.parts:
            first = self.step * self.sequences
            numbers = range(first + part.start, first + part.stop)
            inputs, targets = self.corpus.sequences(numbers, self.device)
            seed = np.random.SeedSequence((s.seed, self.step, part.start))
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
            with self.gradients_shared(last=part is self.parts[-1]), self.autocast:
                part_loss = self.engine(inputs, labels=targets, shift_labels=False).loss
            part_loss = part_loss * (len(part) * self.processes.size / self.sequences)
            part_loss.backward()
            loss += part_loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"step {self.step + 1} has loss {loss} and gradient norm {norm}")
        return loss, time.perf_counter() - start

    def update(self, loss: float, seconds: float):
        """Take the step whose gradient has been computed."""
        start = time.perf_counter()
        factor = learning_rate_factor(self.settings, self.progress())
        for group, peak in zip(self.parameter_groups(), self.peaks, strict=True):
            group["lr"] = peak * factor
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        self.step += 1
        seconds += time.perf_counter() - start
        seconds = seconds if self.processes.rank == 0 else 0.0
        loss, seconds = self.processes.sum(loss / self.processes.size, seconds)
        self.losses.append(loss)
        self.seconds += seconds

    def gradients_shared(self, last: bool):
        """Return a context in which processes average gradients only after their last part."""
        if self.processes.size == 1 or last:
            return contextlib.nullcontext()
        return self.engine.no_sync()

    def evaluate(self):
        """Evaluate and sample, print and log the results, and save."""
        self.processes.broadcast(self.evaluate_and_write)

    def evaluate_and_write(self):
        s = self.settings
        result = evaluate(self.model, self.corpus, "val", "carried", self.autocast)
        if not math.isfinite(result["loss"]):
            raise Diverged(f"after step {self.step} the val loss is {result['loss']}")
        before = self.log[-1] if self.log else ROW
        per_step = self.sequences * s.block_size
        speed = (self.step - before["step"]) * per_step
        speed /= max(self.seconds - before["seconds"], 1e-9)
        train_loss = float(np.mean(self.losses[before["step"] :]))
        print(
            f"step {self.step}: train loss {train_loss:.4f}, {report('val', result)}, "
            f"{speed:,.0f} tokens/s",
            flush=True,
        )
        row = {
            "step": self.step,
            "tokens": self.step * per_step,
            "seconds": self.seconds,
            "train_loss": train_loss,
            "val_loss": result["loss"],
            "bits_per_byte": result["bits_per_byte"],
            "word_perplexity": result["word_perplexity"],
            "tokens_per_second": speed,
            "learning_rate": self.parameter_groups()[0]["lr"],
            "sample": self.sample(),
        }
        self.log.append(row)
        better = result["loss"] < self.best
        self.best = min(result["loss"], self.best)
        self.write_checkpoint(better)
        self.write_log()

    def sample(self) -> str:
        """Return a sampled start of a document, printed as it is generated."""
        pieces = []

        def write(piece: str):
            pieces.append(piece)
            print(piece, end="", flush=True)

        if self.settings.sample_tokens:
            options = {"max_new_tokens": self.settings.sample_tokens, "seed": self.settings.seed}
            continue_text(self.model, self.tokenizer, "", write, temperature=0.8, **options)
            print(flush=True)
        return "".join(pieces)

    # ------------------------------------------------------------------------------------- files

    def state(self) -> dict:
        """Return all that a resumed run needs."""
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "settings": {name: getattr(self.settings, name) for name in SAVED},
            "text": self.text,
            "processes": self.processes.size,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict()["state"] for o in self.optimizers],
        }

    @torch.no_grad()
    def load_state(self, state: dict):
        """Continue from last.pt, or raise a UserError that says why it does not fit."""
        path = self.out / "last.pt"
        check_same(state["text"], self.text, path)
        check_tokenizer(self.out, load_tokenizer(self.out), self.corpus.folder, self.tokenizer)
        self.make_moments()
        own = {name: self.state()[name] for name in ("model", "optimizers")}
        found = {name: state[name] for name in own}
        with reading(f"{path} does not fit"):
            check_like(found, own)
        found = leaves(found)
        for name, tensor in leaves(own).items():
            tensor.copy_(found[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        then = argparse.Namespace(**state["settings"])
        before = progress(then, self.step, self.seconds)
        rate = learning_rate_factor(then, before)
        new_rate = learning_rate_factor(self.settings, self.progress())
        if self.progress() < before and new_rate > rate:
            self.processes.print0(
                f"note: the run was {before:.0%} done, now it is {self.progress():.0%}, so its "
                f"learning rates go back up, from {rate:.0%} to {new_rate:.0%} of their peaks"
            )
        if state["processes"] != self.processes.size:
            self.processes.print0(
                f"note: {state['processes']} processes made {path}, now there are "
                f"{self.processes.size}: the data order is the same; rounding and dropout may "
                "differ"
            )

    def make_moments(self):
        """Initialize the optimizers' state by a step that changes nothing."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        for group in self.parameter_groups():
            group["lr"] = 0.0
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    def save(self, better: bool):
        self.processes.broadcast(lambda: self.write_checkpoint(better))

    def write_checkpoint(self, better: bool):
        """Write the model if it is a `better` one, then last.pt; old files stay until the new ones
        are complete. A run killed in between repeats the steps since the earlier last.pt.
        """
        state = self.state()
        if not all(x.isfinite().all() for x in leaves(state).values() if torch.is_tensor(x)):
            raise Diverged(f"the weights of step {self.step} are not finite")
        content = io.BytesIO()
        torch.save(state, content)
        with self.saving():
            previous = None if self.owns_files else set_aside(self.out, FILES)
            self.owns_files = True
            if better or not (self.out / "model.safetensors").exists():
                save_tokenizer(self.tokenizer, self.out)
                self.model.save_pretrained(self.out)
            write_whole(self.out / "last.pt", content.getvalue())
        if previous:
            print(f"the earlier run is now in {previous}; --resume would have continued it")

    def write_log(self):
        """Write log.csv, samples.txt and loss.png, of all evaluations."""
        if not self.log:
            return
        text = io.StringIO()
        columns = [name for name in ROW if name != "sample"]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in self.log:
            writer.writerow({n: f"{x:.6g}" if type(x) is float else x for n, x in row.items()})
        samples = "".join(f"--- step {row['step']}\n{row['sample']}\n\n" for row in self.log)
        per_step = self.sequences * self.settings.block_size
        with self.saving():
            write_whole(self.out / "log.csv", text.getvalue().encode())
            write_whole(self.out / "samples.txt", samples.encode(errors="replace"))
        try:
            picture = draw_curves(self.log, self.losses, per_step)
        except Exception as error:  # noqa: BLE001  e.g. a wrong MPLBACKEND: no reason to stop
            print(f"note: loss.png can't be drawn ({short(error)})")
            return
        with self.saving():
            write_whole(self.out / "loss.png", picture)

    @contextlib.contextmanager
    def saving(self):
        lock = self.out / "lock"
        if self.lock and not (lock.exists() and os.path.samestat(os.stat(lock), self.lock)):
            self.out = Path(f"{self.out.resolve()}-{os.getpid()}")
            self.settings.out_dir = str(self.out)
            self.lock = None
            print(f"note: this run's folder has been deleted; the run continues in {self.out}")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            last = self.out / "last.pt"
            if last.exists():
                advice = f"the earlier {last} is intact: fix the cause and continue with --resume"
            else:
                advice = f"{last} does not exist, either: fix the cause and start again"
            raise UserError(
                f"step {self.step} can't be saved in {self.out} ({short(error)}); {advice}"
            ) from None


def progress(s, step: int, seconds: float) -> float:
    """Return the fraction of training done, by steps or by minutes, whichever is further."""
    by_time = seconds / 60 / s.max_minutes if s.max_minutes else 0.0
    return min(max(step / s.max_iters, by_time), 1.0)


def last_checkpoint(out: Path) -> Path:
    path = out / "last.pt"
    if not path.exists():
        model = "a model and no " if (out / "model.safetensors").exists() else "no "
        raise UserError(
            f"there is nothing to resume: {out} has {model}last.pt, the file with weights and "
            "optimizer; start without --resume"
        )
    return path


def read_state(out: Path) -> dict:
    """Read last.pt, or raise a UserError."""
    path = last_checkpoint(out)
    with reading(f"{path} can't be read"):
        state = unpickle(path)
        lacking = {*STATE, "model", "optimizers"} - state.keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        lists = {"losses": [0.0] * len(state["losses"]), "log": [ROW] * len(state["log"])}
        check_like({name: state[name] for name in STATE}, {**STATE, **lists})
        wrong = wrong_setting(argparse.Namespace(**{**SETTINGS, **state["settings"]}))
        if wrong:
            raise ValueError(wrong)
        steps = [row["step"] for row in state["log"]]
        within = 0 <= max(steps, default=0) <= state["step"]
        if not within or state["step"] != len(state["losses"]):
            losses = f"its {len(state['losses'])} losses and its log"
            raise ValueError(f"step {state['step']}, {losses} do not match")
        return state


def leaves(x, name: str = "") -> dict:
    """Return the leaves of nested dicts and lists, by dotted names."""
    if not isinstance(x, dict | list):
        return {name: x}
    found = {}
    for key, part in x.items() if isinstance(x, dict) else enumerate(x):
        found.update(leaves(part, f"{name}.{key}".lstrip(".")))
    return found


def check_like(found, wanted):
    """Raise a ValueError unless both have the same names, types, and shapes of tensors."""
    found = {name: describe(x) for name, x in leaves(found).items()}
    wanted = {name: describe(x) for name, x in leaves(wanted).items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {found.get(name)}, not {wanted.get(name)}")


def describe(x) -> str:
    if torch.is_tensor(x):
        data = " without data" if x.is_meta else ""
        return f"{tuple(x.shape)} {dtype_name(x.dtype)} {x.layout}{data}"
    return "NaN" if isinstance(x, float) and math.isnan(x) else type(x).__name__


def check_same(found: dict, wanted: dict, path: Path):
    """Raise a UserError unless the values of the first dict are those of the second."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        differences = "; ".join(f"{n} was {found.get(n)}, not {wanted[n]}" for n in names[:4])
        raise UserError(
            f"{path} was made with other settings or texts: {differences}; give the same ones"
        )


def check_tokenizer(folder: Path, own: Tokenizer, data: Path, other: Tokenizer):
    """Raise a UserError unless a checkpoint's tokenizer is that of the data."""
    if own == other:
        return
    difference = f"{own.size} and {other.size} tokens"
    for a, b in zip(own.ranks.items(), other.ranks.items(), strict=False):
        if a != b:
            difference = f"{a} in place of {b}"
            break
    raise UserError(
        f"the checkpoint in {folder} has a different tokenizer from {data}: {difference}; give the "
        "flags it was trained with, or train a new model"
    )


def compiled(t: Training) -> nn.Module:
    """Return the compiled model, or the model itself where torch.compile does not work."""
    engine = torch.compile(t.model)
    try:
        inputs, targets = t.corpus.sequences(range(t.settings.batch_size), t.device)
        with t.autocast:
            engine(inputs, labels=targets, shift_labels=False).loss.backward()
    except (RuntimeError, OSError, ImportError, AssertionError, TypeError) as error:
        t.processes.print0(f"note: running without --compile, which fails here ({short(error)})")
        engine = t.model
    t.model.zero_grad(set_to_none=True)
    return engine


def draw_curves(log: list[dict], losses: list[float], tokens_per_step: int) -> bytes:
    """Plot losses (of every step, too), speed and learning rate against the tokens read."""
    from matplotlib.figure import Figure  # a slow import, only where it is needed

    figure = Figure(figsize=(7, 7), layout="constrained")
    loss, speed, rate = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    tokens = [row["tokens"] for row in log]
    steps = tokens_per_step * np.arange(1, len(losses) + 1)
    loss.plot(steps, losses, color="lightgray", linewidth=0.8, label="each step")
    for name in ("train_loss", "val_loss"):
        loss.plot(tokens, [row[name] for row in log], ".-", label=name)
    speed.plot(tokens, [row["tokens_per_second"] for row in log], ".-")
    rate.plot(tokens, [row["learning_rate"] for row in log], ".-")
    loss.set_ylabel("loss (nats per token)")
    speed.set_ylabel("tokens per second")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens read in training")
    loss.legend()
    for axes in (loss, speed, rate):
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def train(t: Training):
    """Take steps, and from time to time evaluate and save."""
    s = t.settings
    leads = t.processes.rank == 0
    bar = ProgressBar(leads, t.progress())
    unsaved = False
    stopped = False
    with told_to_stop(leads) as signals, bar.bar:
        while t.progress() < 1:
            loss, seconds = t.gradients()
            if unsaved:  # the loss is finite, so these weights are worth saving
                t.save(better=not t.log)
                unsaved = False
            if stopped:
                break
            before = t.progress()
            seconds_before = t.seconds
            t.update(loss, seconds)
            speed = t.sequences * s.block_size / max(t.seconds - seconds_before, 1e-9)
            text = f"step {t.step}, loss {t.losses[-1]:.3f}, {speed:,.0f} tokens/s"
            bar.update(t.progress(), text)
            stopped = t.processes.sum(len(signals))[0] > 0
            if math.floor(before * s.evaluations) < math.floor(t.progress() * s.evaluations):
                bar.bar.clear()
                t.evaluate()
                stopped = t.processes.sum(len(signals))[0] > 0
            else:  # step 1 too, so that a run can be resumed from its start on
                unsaved = stopped or t.step == 1 or t.step % s.save_interval == 0
    if stopped:
        t.processes.print0(f"stopped and saved at step {t.step}; --resume continues")
        number = signals[0] if signals else signal.SIGINT  # another process got it
        sys.exit(128 + number)


def train_and_report(s, processes: Distributed, lock: os.stat_result):
    t = Training(s, processes, lock=lock)
    splits = ", ".join(f"{split} {n['tokens']:,} tokens" for split, n in t.corpus.counts.items())
    threads = f"{torch.get_num_threads()} threads"
    if processes.size > 1:
        threads += f" x {processes.size}"
    parameters = sum(p.numel() for p in t.model.parameters())
    processes.print0(
        f"{parameters:,} parameters on {t.device}, {dtype_name(t.dtype)}, {threads}; {splits}"
    )
    if s.resume and processes.rank == 0:
        t.write_log()  # a killed run's log may be ahead of its checkpoint
    train(t)
    if processes.rank == 0:
        model, _ = load_model(s.out_dir)
        report_all(model.to(t.device), t.corpus, ["val"], s.contexts, t.autocast)


def evaluate_only(s, processes: Distributed):
    """Print the results of out_dir's best model on all splits that were not trained on."""
    model, tokenizer = load_model(s.out_dir, s.eval_chunk_size)
    with find_data(s) as data:
        check_tokenizer(Path(s.out_dir), tokenizer, data, load_tokenizer(data))
        corpus = Corpus(data, tokenizer, s.block_size, s.seed)
    last = Path(s.out_dir) / "last.pt"
    if last.exists() and read_state(last.parent)["text"]["checksum"] != corpus.checksum():
        print(f"note: this model was not trained on {data}; it may have seen these texts")
    autocast = make_autocast(processes.device, choose_dtype(s.dtype, processes.device))
    splits = ["val"]
    if "test" in corpus.counts and "test" not in (s.train_split, s.val_split):
        splits = ["test", "val"]
    report_all(model.to(processes.device), corpus, splits, s.contexts, autocast)


def main(arguments: list[str] | None = None):
    processes = None
    try:
        s = read_settings(sys.argv[1:] if arguments is None else arguments)
        keep_big_blocks()
        if s.threads:
            torch.set_num_threads(s.threads)
        processes = Distributed(s.device)
        everywhere = {n: x for n, x in vars(s).items() if n not in ("device", "threads")}
        processes.check_same(everywhere)
        with contextlib.ExitStack() as stack:
            if s.eval_only:
                processes.broadcast(lambda: evaluate_only(s, processes))
                return
            if s.resume:
                last_checkpoint(Path(s.out_dir))  # raises before a folder is made
            busy = f"another run is using {s.out_dir}: wait, or choose another --out_dir"
            lock = processes.broadcast(lambda: stack.enter_context(locked(Path(s.out_dir), busy)))
            train_and_report(s, processes, lock)
    except UserError:
        if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)  # one process's message is enough
        raise
    finally:
        if processes is not None:
            processes.leave()


if __name__ == "__main__":
    run(main)
