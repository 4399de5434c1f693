"""Train a MEGA language model.

    python train.py                       # WikiText-2, or offline the text that ships with Python
    python train.py --dataset=my_text.txt --max_minutes=5 --out_dir=out-mine
    python train.py --resume              # continue from the last checkpoint in out_dir
    python train.py --eval_only           # the best checkpoint on val and test
    torchrun --nproc_per_node=2 train.py  # several processes share the sequences of each step

Each setting below is a flag, --name=value or --name value. In out_dir: the best model so far in
Hugging Face's layout with its tokenizer; last.pt, all that --resume needs; and, new at each
evaluation, log.csv, loss.png and samples.txt.
"""

import argparse
import contextlib
import csv
import datetime
import difflib
import functools
import gc
import io
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.common import (
    DownloadError,
    Parser,
    UserError,
    flag_reader,
    keep_big_blocks,
    run,
    short,
    write_whole,
)
from data.prepare import (
    TOKENIZER_FILES,
    TOKENIZERS,
    WIKITEXT,
    Tokenizer,
    load_tokenizer,
    prepare,
    read_meta,
    save_tokenizer,
)
from mega import DampedEMA, MegaConfig, MegaForCausalLM, evaluating
from sample import choose_device, continue_text, load_model

# files
out_dir = "out"  # folder of the checkpoints and the log
resume = False  # continue from out_dir/last.pt
eval_only = False  # evaluate out_dir's best model on val and test, and stop
# data
dataset = "wikitext-2"  # wikitext-2, wikitext-103, pydocs, or the path of a text
source = ""  # read WikiText from this folder, zip or URL of a zip instead of downloading it
train_split = "train"  # the split of the source to train on
val_split = "val"  # the split to evaluate on
tokenizer = "bpe"  # bpe (trained on the text), bytes, or gpt2 (a download)
vocab_size = 2048  # tokens of bpe
# model
n_layer = 4  # blocks
n_embd = 160  # D
intermediate_size = 320  # V, width of the values
nffn_hidden_size = 320  # F, width of the feed-forward network
shared_size = 64  # Z, width of queries and keys
ema_size = 16  # N, EMA states of a channel
chunk_size = 128  # C, attention sees this many tokens; 0: block_size
attention = "softmax"  # softmax, laplace or relu2
gate_bias = -2.0  # initial bias of the update gate: the lower, the more input a layer keeps
dropout = 0.05  # of the outputs of the EMA, the layer and the feed-forward network
hidden_dropout = 0.05  # of the values and of the feed-forward network's hidden layer
attention_dropout = 0.0  # of the attention weights
feature_dropout = True  # drop whole features of a sequence, not single numbers
# optimization
optimizer = "muon"  # muon (for the matrices of linear layers, adamw for the rest) or adamw
batch_size = 4  # sequences of a forward pass
block_size = 512  # tokens of a sequence: the context in training
gradient_accumulation_steps = 1  # forward passes of a step, shared by all processes
max_iters = 10000  # steps at most
max_minutes = 8.5  # minutes of training at most; 0: no limit, and resumes that are exact
learning_rate = 2e-3  # AdamW's highest, after the warm-up
ema_learning_rate = 2e-3  # AdamW's for the parameters of moving averages
muon_learning_rate = 0.02  # Muon's
min_lr_fraction = 0.02  # fraction of the rates left at the end
warmup_fraction = 0.02  # part of the training in which they rise
weight_decay = 0.1  # of the matrices of linear layers
momentum = 0.95  # of Muon
beta1 = 0.9  # of AdamW
beta2 = 0.98  # of AdamW
grad_clip = 1.0  # the gradient's largest norm; 0: any
# evaluation
evaluations = 10  # spread over the training
save_interval = 100  # steps between checkpoints; each evaluation makes one, too
contexts = "512,carried,sliding"  # of the last evaluation: lengths of windows, or see `evaluate`
sample_tokens = 100  # length of the sample at each evaluation; 0: none
# machine
device = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is faster
compile = False  # torch.compile the model, where that works
threads = 0  # CPU threads; 0: torch's choice
seed = 1337  # of the weights, the batches and the dropout

SETTINGS = {
    name: value
    for name, value in globals().items()
    if isinstance(value, bool | int | float | str) and name.islower() and name[0] != "_"
}

# ---------------------------------------------------------------------------------------- settings

DTYPES = ("auto", "float32", "bfloat16")
CONTEXTS = "carried, sliding and lengths of windows, with commas between"
RULES = (  # names, the rule in words, the rule as a function
    ("batch_size block_size gradient_accumulation_steps max_iters", "at least 1", lambda x: x >= 1),
    ("evaluations save_interval n_layer n_embd", "at least 1", lambda x: x >= 1),
    ("intermediate_size nffn_hidden_size shared_size", "at least 1", lambda x: x >= 1),
    ("ema_size", "at least 1", lambda x: x >= 1),
    ("chunk_size max_minutes weight_decay", "0 or more", lambda x: 0 <= x < 1 << 63),
    ("grad_clip sample_tokens threads seed", "0 or more", lambda x: 0 <= x < 1 << 63),
    ("gate_bias", "finite", math.isfinite),
    ("learning_rate ema_learning_rate muon_learning_rate", "above 0", lambda x: 0 < x < math.inf),
    ("dropout hidden_dropout attention_dropout", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("warmup_fraction min_lr_fraction", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("momentum beta1 beta2", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("out_dir dataset", "non-empty", bool),
    ("optimizer", "one of muon, adamw", lambda x: x in ("muon", "adamw")),
    ("dtype", f"one of {', '.join(DTYPES)}", lambda x: x in DTYPES),
    ("tokenizer", f"one of {', '.join(TOKENIZERS)}", lambda x: x in TOKENIZERS),
    ("contexts", CONTEXTS, lambda x: all(is_context(part) for part in x.split(","))),
)


def is_context(text: str) -> bool:
    return text in ("carried", "sliding") or re.fullmatch(r"[1-9]\d{0,8}", text) is not None


def read_settings(arguments: list[str]) -> argparse.Namespace:
    """Read the settings on top of this file, changed by the command line."""
    comments = dict(re.findall(r"(?m)^(\w+) = .*?  # (.*)$", Path(__file__).read_text("utf-8")))
    parser = Parser(__doc__)
    for name, default in SETTINGS.items():
        text = f"{comments.get(name, '')} (default: {default!r})".replace("%", "%%")
        options = {"type": flag_reader(default), "default": default, "help": text, "metavar": "X"}
        if isinstance(default, bool):
            options.update(nargs="?", const=True)
        parser.add_argument(f"--{name}", **options)
    s, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), SETTINGS, 1, 0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all settings"
        raise UserError(f"there is no setting {name}; {hint}")
    for names, rule, valid in RULES:
        for name in names.split():
            if not valid(getattr(s, name)):
                raise UserError(f"--{name} must be {rule}, got {getattr(s, name)!r}")
    return s


# ----------------------------------------------------------------------------------------- machine


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype; "auto" is bfloat16 where the processor is faster with it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and bfloat16_is_faster():
        return torch.bfloat16
    return torch.float32


@functools.cache
def bfloat16_is_faster() -> bool:
    """Time products of matrices: without instructions for bfloat16 they take up to 200 times as
    long as in float32, with them half as long.
    """
    seconds = {torch.float32: [], torch.bfloat16: []}
    for size in (64, 512, 512):  # the first calls of all load libraries
        for dtype, found in seconds.items():
            x = torch.ones(size, size, dtype=dtype)
            start = time.perf_counter()
            _ = x @ x
            found.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16][1:]) < 0.8 * min(seconds[torch.float32][1:])


def make_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Distributed:
    """The processes that torchrun started, or this one alone. The first is the one that writes."""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            long = datetime.timedelta(hours=8)  # the others wait while the first one evaluates
            dist.init_process_group(backend, timeout=long)

    def print0(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.size == 1:
            return [*values]
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return shared.tolist()

    def broadcast(self, work):
        """Return what `work()` returns in the first process, for which the others wait."""
        found = [work() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def leave(self):
        if self.size > 1:
            gc.collect()  # DDP's threads must end before the group does
            dist.destroy_process_group()


# -------------------------------------------------------------------------------------------- data


def find_data(s) -> Path:
    """Prepare the dataset; where WikiText can't be downloaded, the text that ships with Python."""
    try:
        return prepare(s.dataset, s.source, s.train_split, s.val_split, s.tokenizer, s.vocab_size)
    except DownloadError as error:
        if s.dataset not in WIKITEXT or s.source:
            raise
        print(f"{s.dataset} can't be downloaded, so pydocs, Python's own text, is used: {error}")
        return prepare("pydocs", "", s.train_split, s.val_split, s.tokenizer, s.vocab_size)


class Corpus:
    """The token files of a prepared dataset, as memory maps."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, block_size: int, seed: int):
        meta = read_meta(folder)
        self.folder = folder
        self.counts = meta["splits"]
        self.block_size = block_size
        self.seed = seed
        self.tokens = {}
        for split, counts in self.counts.items():
            path = folder / f"{split}.bin"
            dtype = np.dtype(meta["dtype"])
            if not path.exists() or path.stat().st_size != counts["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged; delete {folder} and run again")
            tokens = np.memmap(path, dtype, "r")
            if tokens.max() >= tokenizer.size:
                raise UserError(
                    f"{path} has the token {tokens.max()} and its vocabulary only "
                    f"{tokenizer.size}; delete {folder} and run again"
                )
            self.tokens[split] = tokens
        for split, least in (("train", block_size + 1), ("val", 2)):
            if len(self.tokens[split]) < least:
                raise UserError(
                    f"the {split} split of {folder} has {len(self.tokens[split])} tokens and "
                    f"--block_size={block_size} needs {least}; give more text or shorten it"
                )
        pairs = len(self.tokens["train"]) - 1  # of a token and the next one
        self.windows = max(pairs // block_size - 1, 1)  # of an epoch; one less leaves room to shift
        self.spare = pairs - self.windows * block_size
        self.orders = {}  # by epoch

    def ids(self, split: str) -> Tensor:
        """Return a whole split, (T,)."""
        return torch.from_numpy(self.tokens[split].astype(np.int64))

    def epoch(self, number: int) -> np.ndarray:
        """Return where the windows of an epoch start: in a new order, with new borders."""
        if number not in self.orders:
            random = np.random.default_rng((self.seed, number))
            starts = np.arange(self.windows) * self.block_size + random.integers(self.spare + 1)
            self.orders.pop(number - 2, None)  # a step may read the end of the last epoch
            self.orders[number] = random.permutation(starts)
        return self.orders[number]

    def sequences(self, numbers: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return training windows: inputs and the tokens after them, each (B, L).

        A window's number, counted from the start of the training, alone says which it is.
        """
        windows = []
        for number in numbers:
            start = self.epoch(number // self.windows)[number % self.windows]
            windows.append(self.tokens["train"][start : start + self.block_size + 1])
        ids = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
        return ids[:, :-1], ids[:, 1:]


# ----------------------------------------------------------------------------------------- model


def new_model(s, tokenizer: Tokenizer) -> MegaForCausalLM:
    """Make a model with random weights; `gate_bias` lets a new layer keep most of its input."""
    try:
        config = MegaConfig(
            vocab_size=tokenizer.size,
            num_hidden_layers=s.n_layer,
            hidden_size=s.n_embd,
            intermediate_size=s.intermediate_size,
            nffn_hidden_size=s.nffn_hidden_size,
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
    model = MegaForCausalLM(config)
    for block in model.mega.layers:  # the update gate's are the first D of them
        nn.init.constant_(block.mega_layer.mx_proj.bias[: s.n_embd], s.gate_bias)
    return model


# ------------------------------------------------------------------------------------- optimizers


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, whose step is made orthogonal (Jordan et al. 2024).

    All directions of a matrix then move equally far, also those in which its gradient is small.
    `dtype` is what the processor multiplies fastest; bfloat16 is precise enough.
    """

    def __init__(self, parameters, lr, momentum, weight_decay, dtype=torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
                direction = orthogonalize(ahead.to(self.dtype)).to(p.dtype)
                rows, columns = p.shape
                size = group["lr"] * max(1, rows / columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1, to about 0.7 to 1.2, by five Newton-Schulz steps.

    Each step applies the polynomial a s + b s^3 + c s^5 to every singular value s.
    """
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # the smaller x x^T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def build_optimizers(s, model: nn.Module, device: torch.device, dtype: torch.dtype) -> list:
    """Make Muon or AdamW for the matrices of linear layers, which decay, and AdamW for all else.

    The moving averages have a learning rate of their own.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = [weight for weight in linear if id(weight) not in tables]  # the output is tied
    ema = [p for m in model.modules() if isinstance(m, DampedEMA) for p in m.parameters()]
    chosen = {id(p) for p in (*matrices, *ema)}
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
    """Rise and fall linearly; `progress` is the part of the training that is done, 0 to 1."""
    if progress < s.warmup_fraction:
        return max(progress / s.warmup_fraction, 0.01)
    return max((1 - progress) / (1 - s.warmup_fraction), s.min_lr_fraction)


# -------------------------------------------------------------------------------------- evaluation

EVALUATED = 8192  # tokens at once: enough to be fast


def evaluate(model: MegaForCausalLM, corpus: Corpus, split: str, context: str, autocast) -> dict:
    """Measure a whole split: nats per token, bits per byte, perplexity per word (with line ends).

    Of the split only the first token, an end of text, is not predicted. Contexts are

        "512"      windows of so many tokens, each of which starts with nothing before it;
        "carried"  the split is one sequence: its moving averages are never reset, attention sees
                   the tokens before in the same chunk;
        "sliding"  two carried passes, the second with chunk borders half a chunk later; each token
                   counts in the pass that shows attention more of the text before it.
    """
    tokens = corpus.ids(split)
    with evaluating(model):
        if context.isdigit():
            total = loss_in_windows(model, tokens, int(context), autocast)
            return in_units(total, corpus, split)
        chunk = model.config.attention_limit
        if chunk is None:
            raise UserError(f"--contexts={context} needs a model with chunks; give a number")
        late = chunk // 2 if context == "sliding" else 0
        total = loss_carried(model, tokens, chunk, 0, late, autocast)
        if late:
            total += loss_carried(model, tokens, chunk, chunk - late, chunk - late, autocast)
        return in_units(total, corpus, split)


def in_units(total: float, corpus: Corpus, split: str) -> dict[str, float]:
    """Turn the summed loss of a split, in nats, into what papers quote."""
    counts = corpus.counts[split]
    return {
        "loss": total / (counts["tokens"] - 1),
        "bits_per_byte": total / math.log(2) / counts["bytes"],
        "word_perplexity": math.exp(min(total / counts["words"], 700.0)),
    }


@torch.no_grad()
def summed_loss(model, inputs: Tensor, targets: Tensor, autocast, **more):
    """Return the summed loss of the targets but -100, in nats, and the cache."""
    device = next(model.parameters()).device
    options = {"shift_labels": False, "output_logits": False, **more}
    with autocast:
        out = model(inputs.to(device), labels=targets.to(device), **options)
    count = (targets != -100).sum().item()
    return out.loss.item() * count if count else 0.0, out.cache


def loss_in_windows(model, tokens: Tensor, length: int, autocast) -> float:
    """Cut tokens (T) into windows, each with nothing before it, and sum their loss."""
    length = min(length, len(tokens) - 1)
    rest = -(len(tokens) - 1) % length  # fills up the last window, without labels
    inputs = F.pad(tokens[:-1], (0, rest)).view(-1, length)
    targets = F.pad(tokens[1:], (0, rest), value=-100).view(-1, length)
    batch = max(EVALUATED // length, 1)
    total = 0.0
    for some in zip(inputs.split(batch), targets.split(batch), strict=True):
        found, _ = summed_loss(model, *some, autocast, use_cache=False)
        total += found
    return total


def loss_carried(model, tokens: Tensor, chunk: int, padding: int, least: int, autocast) -> float:
    """Sum the loss of tokens (T) behind padding, which moves the chunks' borders, with a cache.

    Only positions count that have `least` others before them in their chunk.
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
    """Print each context's result; the last line is that of the last split and context again."""
    for split in splits:
        n = corpus.counts[split]
        print(
            f"{split}: {n['tokens'] - 1:,} tokens predicted, {n['bytes']:,} bytes, "
            f"{n['words']:,} words, where the end of a line is one; loss in nats per token"
        )
        for context in contexts.split(","):
            result = evaluate(model, corpus, split, context, autocast)
            name = f"windows of {context} tokens" if context.isdigit() else context
            print(report(f"{split}, {name}", result), flush=True)
    print(report(splits[-1], result))


# ---------------------------------------------------------------------------------------- training

# The settings that a resumed run may change, and the parts of its last.pt.
CHANGEABLE = """
    out_dir source dataset resume eval_only max_iters max_minutes evaluations save_interval contexts
    sample_tokens device dtype compile threads
"""
COUNTERS = ("step", "seconds", "best", "losses", "log")
STATE = {*COUNTERS, "fixed", "dtype", "processes", "model", "optimizers"}
READING_FAILS = (OSError, EOFError, ValueError, AttributeError, RuntimeError, pickle.PickleError)
FILES = ("last.pt", "log.csv", "loss.png", "samples.txt", "config.json", "model.safetensors")
FILES += TOKENIZER_FILES


class Training:
    """A run: model, optimizers and counters, all of which a checkpoint must hold for a resume."""

    def __init__(self, s, processes: Distributed, make_model=new_model):
        self.settings = s
        self.processes = processes
        self.device = processes.device
        self.out = Path(s.out_dir)
        self.lock = filelock.FileLock(self.out / "lock")  # the system frees it when we die
        self.step = 0
        self.seconds = 0.0  # of training
        self.best = math.inf
        self.losses = []  # of all steps
        self.log = []  # of all evaluations
        state = read_state(self.out) if s.resume else None
        data = processes.broadcast(lambda: find_data(s))
        self.tokenizer = load_tokenizer(data)
        self.corpus = Corpus(data, self.tokenizer, s.block_size, s.seed)
        dtype = state["dtype"] if s.resume and s.dtype == "auto" else s.dtype
        self.dtype = processes.broadcast(lambda: choose_dtype(dtype, self.device))
        self.autocast = make_autocast(self.device, self.dtype)
        torch.manual_seed(s.seed)
        self.model = make_model(s, self.tokenizer).to(self.device)
        self.optimizers = build_optimizers(s, self.model, self.device, self.dtype)
        self.peaks = [group["lr"] for group in self.parameter_groups()]
        self.sequences = s.batch_size * s.gradient_accumulation_steps  # of a step
        self.parts = self.share_sequences()
        changeable = CHANGEABLE.split()
        self.fixed = {name: value for name, value in vars(s).items() if name not in changeable}
        self.fixed["dataset"] = data.name
        self.fixed["checksum of the text"] = zlib.crc32(self.corpus.tokens["train"])
        if s.resume:
            self.load_state(state)
        if processes.rank == 0:
            self.claim_out_dir()
        self.engine = compiled(self) if s.compile else self.model
        if processes.size > 1:
            self.engine = DistributedDataParallel(self.engine)

    def share_sequences(self) -> list[range]:
        """Return which of a step's sequences this process takes, one range a forward pass."""
        s = self.settings
        size = self.processes.size
        if self.sequences % size:
            raise UserError(
                f"a step's {self.sequences} sequences (--batch_size={s.batch_size} times "
                f"--gradient_accumulation_steps={s.gradient_accumulation_steps}) can't be shared "
                f"by {size} processes; make them a multiple of {size}"
            )
        mine = self.sequences // size
        first = self.processes.rank * mine
        stop = first + mine
        return [range(i, min(i + s.batch_size, stop)) for i in range(first, stop, s.batch_size)]

    def parameter_groups(self) -> list[dict]:
        return [group for o in self.optimizers for group in o.param_groups]

    def progress(self) -> float:
        """Return the part of the training that is done, by steps or minutes, the further one."""
        s = self.settings
        by_time = self.seconds / 60 / s.max_minutes if s.max_minutes else 0.0
        return min(max(self.step / s.max_iters, by_time), 1.0)

    def train_step(self):
        """Update the weights once.

        All randomness of a step comes from the seed, the step and the index of a part's first
        sequence. So a checkpoint holds no generator's state, and more processes change dropout only
        where they change the parts.
        """
        s = self.settings
        start = time.perf_counter()
        factor = learning_rate_factor(s, self.progress())
        for group, peak in zip(self.parameter_groups(), self.peaks, strict=True):
            group["lr"] = peak * factor
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
            raise UserError(
                f"step {self.step + 1} has the loss {loss} and a gradient of norm {norm}; the "
                "checkpoints stay as they were, try a lower --learning_rate"
            )
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start if self.processes.rank == 0 else 0.0
        loss, seconds = self.processes.sum(loss / self.processes.size, seconds)
        self.losses.append(loss)
        self.seconds += seconds

    def gradients_shared(self, last: bool):
        """Return a context in which processes add up their gradients only after their last part."""
        if self.processes.size == 1 or last:
            return contextlib.nullcontext()
        return self.engine.no_sync()

    def evaluate(self):
        """Add a line to the log, with a sample, and save; show it on the screen, too."""
        if self.processes.rank:
            return
        s = self.settings
        result = evaluate(self.model, self.corpus, "val", "carried", self.autocast)
        before = self.log[-1] if self.log else {"step": 0, "seconds": 0.0}
        per_step = self.sequences * s.block_size
        speed = (self.step - before["step"]) * per_step
        speed /= max(self.seconds - float(before["seconds"]), 1e-9)
        train_loss = float(np.mean(self.losses[before["step"] :]))
        print(
            f"step {self.step}: train loss {train_loss:.4f}, {report('val', result)}, "
            f"{speed:,.0f} tokens/s",
            flush=True,
        )
        row = {
            "seconds": self.seconds,
            "train_loss": train_loss,
            "val_loss": result["loss"],
            "bits_per_byte": result["bits_per_byte"],
            "word_perplexity": result["word_perplexity"],
            "tokens_per_second": speed,
            "learning_rate": self.parameter_groups()[0]["lr"],
        }
        row = {name: f"{value:.6g}" for name, value in row.items()}
        row = {"step": self.step, "tokens": self.step * per_step, **row, "sample": self.sample()}
        self.log.append(row)
        better = result["loss"] < self.best
        self.best = min(result["loss"], self.best)
        self.save(better)
        self.write_log()

    def sample(self) -> str:
        """Return text that starts a document, shown as it comes."""
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

    def claim_out_dir(self):
        """Make out_dir ours; a new run moves what an earlier one left there to out_dir/previous."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"another run is at work in {self.out}; wait for its end, or choose another "
                "--out_dir"
            ) from None
        if self.settings.resume:
            self.write_log()  # that of a run that was killed may be ahead of its checkpoint
            return
        found = [name for name in FILES if (self.out / name).exists()]
        if found:
            previous = self.out / "previous"
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
            for name in found:
                (self.out / name).rename(previous / name)
            print(
                f"the earlier run in {self.out} is now in {previous}; --resume would have "
                "continued it"
            )

    def load_state(self, state: dict):
        """Continue from last.pt, or raise a UserError that says why it does not fit."""
        path = self.out / "last.pt"
        check_same(state["fixed"], self.fixed, path)
        check_tokenizer(self.out, load_tokenizer(self.out), self.corpus.folder, self.tokenizer)
        try:
            shapes = {name: tuple(value.shape) for name, value in state["model"].items()}
            wanted = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
            check_same(shapes, wanted, path)
            self.model.load_state_dict(state["model"])
            for o, values in zip(self.optimizers, state["optimizers"], strict=True):
                o.load_state_dict(values)
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} does not fit ({short(error)})") from None
        for name in COUNTERS:
            setattr(self, name, state[name])
        if state["processes"] != self.processes.size:
            self.processes.print0(
                f"note: {state['processes']} processes made {path}, now there are "
                f"{self.processes.size}: sequences are the same, sums and dropout may differ"
            )

    def save(self, better: bool):
        """Write the checkpoint, after the model if it is a `better` one; old files stay until new
        ones are whole. A run that is killed in between does the same again.
        """
        state = {name: getattr(self, name) for name in COUNTERS}
        state["fixed"] = self.fixed
        state["dtype"] = dtype_name(self.dtype)
        state["processes"] = self.processes.size
        state["model"] = self.model.state_dict()
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        content = io.BytesIO()
        torch.save(state, content)
        with self.saving():
            if better:
                save_tokenizer(self.tokenizer, self.out)
                self.model.save_pretrained(self.out)
            write_whole(self.out / "last.pt", content.getbuffer())

    def write_log(self):
        """Write log.csv, samples.txt and loss.png, of all evaluations."""
        if not self.log:
            return
        text = io.StringIO()
        columns = [name for name in self.log[0] if name != "sample"]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        samples = "".join(f"--- step {row['step']}\n{row['sample']}\n\n" for row in self.log)
        per_step = self.sequences * self.settings.block_size
        with self.saving():
            write_whole(self.out / "log.csv", text.getvalue().encode())
            write_whole(self.out / "samples.txt", samples.encode())
            write_whole(self.out / "loss.png", draw_curves(self.log, self.losses, per_step))

    @contextlib.contextmanager
    def saving(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"step {self.step} can't be saved in {self.out} ({short(error)}); what was saved "
                "before is still there: fix the cause and continue with --resume"
            ) from None


def read_state(out: Path) -> dict:
    """Read last.pt, or raise a UserError."""
    path = out / "last.pt"
    if not path.exists():
        model = "a model and no " if (out / "model.safetensors").exists() else "no "
        raise UserError(
            f"there is nothing to resume: {out} has {model}last.pt, the file with weights and "
            "optimizer; start without --resume"
        )
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not STATE <= state.keys():
            raise ValueError(f"without {', '.join(sorted(STATE - state.keys()))}")
        return state
    except READING_FAILS as error:
        raise UserError(f"{path} can't be read ({short(error)})") from None


def check_same(found: dict, wanted: dict, path: Path):
    """Raise a UserError unless the values of the first dict are those of the second."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        differences = "; ".join(f"{n} was {found.get(n)}, not {wanted[n]}" for n in names[:4])
        raise UserError(f"{path} can't be resumed with other settings: {differences}")


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
        f"the checkpoint in {folder} has another tokenizer than {data}: {difference}; give the "
        "flags of its training, or start without --resume"
    )


def compiled(t: Training) -> nn.Module:
    """Return the model by torch.compile, or itself where that does not work."""
    engine = torch.compile(t.model)
    try:
        inputs, targets = t.corpus.sequences(range(t.settings.batch_size), t.device)
        with t.autocast:
            engine(inputs, labels=targets, shift_labels=False).loss.backward()
    except (RuntimeError, OSError, ImportError, AssertionError, TypeError) as error:
        t.processes.print0(f"note: this is without --compile, which fails here ({short(error)})")
        engine = t.model
    t.model.zero_grad(set_to_none=True)
    return engine


def draw_curves(log: list[dict], losses: list[float], tokens_per_step: int) -> bytes:
    """Draw losses (that of every step, too), speed and learning rate over the tokens read."""
    from matplotlib.figure import Figure  # a slow import, only where it is needed

    figure = Figure(figsize=(7, 7), layout="constrained")
    loss, speed, rate = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    tokens = [row["tokens"] for row in log]
    steps = tokens_per_step * np.arange(1, len(losses) + 1)
    loss.plot(steps, losses, color="lightgray", linewidth=0.8, label="each step")
    for name in ("train_loss", "val_loss"):
        loss.plot(tokens, [float(row[name]) for row in log], ".-", label=name)
    speed.plot(tokens, [float(row["tokens_per_second"]) for row in log], ".-")
    rate.plot(tokens, [float(row["learning_rate"]) for row in log], ".-")
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


@contextlib.contextmanager
def told_to_stop(leads: bool):
    """Yield a list that Ctrl-C or SIGTERM makes non-empty; a second Ctrl-C stops at once."""
    stop = []

    def interrupt(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if leads:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class ProgressBar:
    """A bar on a terminal; elsewhere, as in a log file, a line every half minute."""

    def __init__(self, leads: bool, progress: float):
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = None if leads else True  # None: without a terminal
        self.bar = tqdm(total=1.0, initial=progress, bar_format=form, leave=False, disable=hidden)
        self.lines = leads and self.bar.disable
        self.last_line = time.monotonic()

    def update(self, t: Training, seconds: float):
        speed = t.sequences * t.settings.block_size / max(seconds, 1e-9)
        text = f"step {t.step}, loss {t.losses[-1]:.3f}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(text)
        self.bar.update(t.progress() - self.bar.n)
        if self.lines and time.monotonic() > self.last_line + 30:
            print(f"{t.progress():4.0%} {text}", flush=True)
            self.last_line = time.monotonic()


def train(t: Training):
    """Take steps, and from time to time evaluate and save."""
    s = t.settings
    leads = t.processes.rank == 0
    if leads and t.step == 0:
        t.save(better=True)  # from here on the run can be resumed
    bar = ProgressBar(leads, t.progress())
    with told_to_stop(leads) as signals, bar.bar:
        stopped = False
        while t.progress() < 1 and not stopped:
            before = t.progress()
            seconds = t.seconds
            t.train_step()
            bar.update(t, t.seconds - seconds)
            stopped = t.processes.sum(len(signals))[0] > 0
            if math.floor(before * s.evaluations) < math.floor(t.progress() * s.evaluations):
                bar.bar.clear()
                t.evaluate()
            elif leads and (stopped or t.step % s.save_interval == 0):
                t.save(better=not t.log)
        # Also what came during the last evaluation; the others wait here until the first has saved.
        stopped = t.processes.sum(len(signals))[0] > 0
    if stopped:
        t.processes.print0(f"stopped and saved at step {t.step}; --resume continues")
        sys.exit(128 + (signals or [signal.SIGINT])[0])


def train_and_report(s, processes: Distributed):
    t = Training(s, processes)
    splits = ", ".join(f"{split} {n['tokens']:,} tokens" for split, n in t.corpus.counts.items())
    threads = f"{torch.get_num_threads()} threads"
    if processes.size > 1:
        threads += f" x {processes.size}"
    parameters = sum(p.numel() for p in t.model.parameters())
    processes.print0(
        f"{parameters:,} parameters on {t.device}, {dtype_name(t.dtype)}, {threads}; {splits}"
    )
    try:
        train(t)
        if processes.rank == 0:
            model, _ = load_model(s.out_dir)
            report_all(model.to(t.device), t.corpus, ["val"], s.contexts, t.autocast)
    finally:
        t.lock.release()


def evaluate_only(s, processes: Distributed):
    """Print the results of out_dir's best model on all splits that were not trained on."""
    model, tokenizer = load_model(s.out_dir)
    data = find_data(s)
    check_tokenizer(Path(s.out_dir), tokenizer, data, load_tokenizer(data))
    corpus = Corpus(data, tokenizer, s.block_size, s.seed)
    autocast = make_autocast(processes.device, choose_dtype(s.dtype, processes.device))
    splits = ["val"]
    if "test" in corpus.counts and "test" not in (s.train_split, s.val_split):
        splits = ["test", "val"]
    report_all(model.to(processes.device), corpus, splits, s.contexts, autocast)


def main():
    s = read_settings(sys.argv[1:])
    keep_big_blocks()
    if s.threads:
        torch.set_num_threads(s.threads)
    processes = Distributed(s.device)
    try:
        if not s.eval_only:
            train_and_report(s, processes)
        elif processes.rank == 0:
            evaluate_only(s, processes)
    except UserError:
        if processes.rank:
            sys.exit(2)  # one sentence is enough
        raise
    finally:
        processes.leave()


if __name__ == "__main__":
    run(main)
