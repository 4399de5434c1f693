"""Train a MEGA language model.

    python train.py                       # WikiText-2, or offline the text that ships with Python
    python train.py --dataset=my_text.txt --max_minutes=5 --out_dir=out-mine
    python train.py --resume              # go on from the last checkpoint in out_dir
    python train.py --eval_only           # the best checkpoint on val and test
    torchrun --nproc_per_node=2 train.py  # several processes share each step's rows

Each setting below is a flag, --name=value or --name value. In out_dir: the best model so far in
Hugging Face's layout with its tokenizer; last.pt, all that --resume needs; and, new at each
evaluation, log.csv, loss.png and samples.txt.
"""

import argparse
import contextlib
import csv
import ctypes
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

from data.prepare import (
    TOKENIZER_FILES,
    TOKENIZERS,
    WIKITEXT,
    DownloadError,
    Parser,
    Tokenizer,
    UserError,
    load_tokenizer,
    prepare,
    read_meta,
    run,
    save_tokenizer,
    short,
    write_whole,
)
from mega import DampedEMA, MegaConfig, MegaForCausalLM
from sample import choose_device, continue_text, load_model

# files
out_dir = "out"  # folder of the checkpoints and the log
resume = False  # go on from out_dir/last.pt
eval_only = False  # evaluate out_dir's best model on val and test, and stop
preset = ""  # wikitext-103-base or -large: other defaults, the paper's, meant for GPUs
# data
dataset = "wikitext-2"  # wikitext-2, wikitext-103, pydocs, or the path of a text
source = ""  # read WikiText from this folder, zip or URL of a zip instead of downloading it
train_split = "train"  # the split of the source to train on
val_split = "val"  # the split to evaluate on
tokenizer = "bpe"  # bpe (trained on the text), bytes, or gpt2 (a download)
vocab_size = 4096  # tokens of bpe
# model
n_layer = 4  # blocks
n_embd = 256  # D
intermediate_size = 512  # V, width of the values
nffn_hidden_size = 512  # F, width of the feed-forward network
shared_size = 64  # Z, width of queries and keys
ema_size = 16  # N, EMA dimensions of a channel
chunk_size = 128  # C, attention sees this many tokens; 0: block_size
attention = "softmax"  # softmax, laplace or relu2
gate_bias = -2.0  # of the update gate, at first: how closed it starts
dropout = 0.1  # part of a row's features that is switched off in training
# optimization
optimizer = "muon"  # muon (for the matrices of linear layers, adamw for the rest) or adamw
batch_size = 4  # rows of a forward pass
block_size = 512  # tokens of a row: the context in training
gradient_accumulation_steps = 1  # forward passes of a step, shared by all processes
max_iters = 10000  # steps at most
max_minutes = 8.5  # minutes of training at most; 0: no limit, and resumes that are exact
learning_rate = 2e-3  # AdamW's highest, after the warm-up
ema_learning_rate = 2e-3  # AdamW's for the parameters of moving averages
muon_learning_rate = 0.02  # Muon's
min_lr_fraction = 0.02  # what is left of them at the end
warmup_fraction = 0.02  # part of the training in which they rise
weight_decay = 0.1  # of the matrices of linear layers
momentum = 0.95  # of Muon
beta1 = 0.9  # of AdamW
beta2 = 0.98  # of AdamW
grad_clip = 1.0  # the gradient's largest norm; 0: any
# evaluation
eval_interval = 500  # steps between evaluations
save_interval = 100  # steps between checkpoints; each evaluation makes one, too
contexts = "512,carried,sliding"  # of the last evaluation: lengths of windows, or see `evaluate`
sample_tokens = 100  # length of the sample at each evaluation; 0: none
# machine
device = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is native
compile = False  # torch.compile the model, where that works
threads = 0  # CPU threads; 0: torch's choice
seed = 1337  # of the weights, the batches and the dropout

SETTINGS = {
    name: value
    for name, value in globals().items()
    if isinstance(value, bool | int | float | str) and name.islower() and name[0] != "_"
}
# The paper trains one model on WikiText-103, the large one here, with 24 rows of 6,144 tokens a
# step, but with a vocabulary of words; the base one has the sizes of its enwik8 model.
PAPER = {
    "dataset": "wikitext-103", "vocab_size": 32768, "optimizer": "adamw", "learning_rate": 5e-3,
    "ema_learning_rate": 5e-3, "weight_decay": 0.1, "dropout": 0.3, "gate_bias": 0.0,
    "grad_clip": 0.25, "chunk_size": 1024, "block_size": 6144, "batch_size": 1,
    "gradient_accumulation_steps": 24, "max_iters": 400_000, "max_minutes": 0.0,
    "warmup_fraction": 0.06, "min_lr_fraction": 0.0, "eval_interval": 5000, "save_interval": 1000,
    "contexts": "6144,carried,sliding",
}  # fmt: skip
SIZES = ("n_layer", "n_embd", "intermediate_size", "nffn_hidden_size", "shared_size")
PRESETS = {
    "wikitext-103-base": PAPER | dict(zip(SIZES, (12, 512, 1024, 1024, 128), strict=True)),
    "wikitext-103-large": PAPER | dict(zip(SIZES, (16, 1024, 2048, 2048, 256), strict=True)),
}

# ---------------------------------------------------------------------------------------- settings


def flag_reader(default):
    """The function that reads a flag of the type of `default`."""

    def read(text: str):
        if isinstance(default, bool):
            if text.lower() in ("true", "1", "yes", "false", "0", "no"):
                return text.lower() in ("true", "1", "yes")
            raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
        try:
            return type(default)(text)
        except ValueError:
            kind = "an integer" if isinstance(default, int) else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text!r}") from None

    return read


def read_settings(arguments: list[str]) -> argparse.Namespace:
    """The settings on top of this file, changed by a preset and then by the command line."""
    comments = dict(re.findall(r"(?m)^(\w+) = .*?  # (.*)$", Path(__file__).read_text("utf-8")))
    parser = Parser(__doc__)
    for name, default in SETTINGS.items():
        text = f"{comments[name]} (default: {default!r})".replace("%", "%%")
        flag = {"type": flag_reader(default), "default": default, "help": text, "metavar": "X"}
        if isinstance(default, bool):
            flag |= {"nargs": "?", "const": True}
        parser.add_argument(f"--{name}", **flag)
    s, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), SETTINGS, 1, 0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all settings"
        raise UserError(f"there is no setting {name}; {hint}")
    if s.preset in PRESETS:
        parser.set_defaults(**PRESETS[s.preset])
        s = parser.parse_args(arguments)
    counts = "batch_size block_size gradient_accumulation_steps max_iters eval_interval n_layer"
    counts += " save_interval"
    sizes = "n_embd intermediate_size nffn_hidden_size shared_size ema_size"
    amounts = "chunk_size max_minutes weight_decay grad_clip sample_tokens threads seed"
    rates = "learning_rate ema_learning_rate muon_learning_rate"
    parts = "dropout warmup_fraction min_lr_fraction momentum beta1 beta2"
    for names, rule, valid in (
        (f"{counts} {sizes}", "at least 1", lambda value: value >= 1),
        (amounts, "0 or more", lambda value: 0 <= value < 1 << 63),
        ("gate_bias", "finite", math.isfinite),
        (rates, "above 0", lambda value: 0 < value < math.inf),
        (parts, "0 or more and below 1", lambda value: 0 <= value < 1),
        ("out_dir dataset", "non-empty", bool),
        ("preset", f"one of {', '.join(PRESETS)}", ["", *PRESETS].__contains__),
        ("optimizer", "one of muon, adamw", ("muon", "adamw").__contains__),
        ("dtype", f"one of {', '.join(DTYPES)}", DTYPES.__contains__),
        ("tokenizer", f"one of {', '.join(TOKENIZERS)}", TOKENIZERS.__contains__),
        ("contexts", CONTEXTS_RULE, lambda value: all(map(is_context, value.split(",")))),
    ):
        for name in names.split():
            if not valid(getattr(s, name)):
                raise UserError(f"--{name} must be {rule}, got {getattr(s, name)!r}")
    return s


CONTEXTS_RULE = "carried, sliding and lengths of windows, with commas between"


def is_context(text: str) -> bool:
    return text in ("carried", "sliding") or bool(re.fullmatch("[1-9][0-9]{0,8}", text))


# ----------------------------------------------------------------------------------------- machine


def keep_big_blocks():
    """Let glibc keep freed memory, or each step would fault all its pages in anew."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, or its old limit
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD


DTYPES = ("auto", "float32", "bfloat16")
CPUINFO = Path("/proc/cpuinfo")  # of Linux; elsewhere float32 is the safe choice


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype; auto: bfloat16 where the processor multiplies it natively."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = CPUINFO.exists() and re.search(r"avx512_bf16|amx_bf16|\bbf16\b", CPUINFO.read_text())
    return torch.bfloat16 if native and device.type == "cpu" else torch.float32


class Team:
    """The processes that torchrun started, or this one alone. The first is the one that writes."""

    def __init__(self, device: str):
        self.rank, self.size = (int(os.environ.get(name, i)) for i, name in enumerate(TORCHRUN))
        self.device = choose_device(device)
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            long = datetime.timedelta(hours=8)  # the others wait while the first one evaluates
            dist.init_process_group(backend, timeout=long)

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def share(self, *values: float) -> list[float]:
        """The sums of numbers over all processes."""
        if self.size == 1:
            return [*values]
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return shared.tolist()

    def first(self, work):
        """What `work()` returns in the first process, for which the others wait."""
        found = [work() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def leave(self):
        if self.size > 1:
            gc.collect()  # what is left of a training would keep threads alive beyond the group
            dist.destroy_process_group()


TORCHRUN = ("RANK", "WORLD_SIZE")


# -------------------------------------------------------------------------------------------- data


def find_data(s) -> Path:
    """The prepared dataset; where WikiText can't be downloaded, the text that ships with Python."""
    try:
        return prepare(s.dataset, s.source, s.train_split, s.val_split, s.tokenizer, s.vocab_size)
    except DownloadError as error:
        if s.dataset not in WIKITEXT or s.source:
            raise
        print(f"{s.dataset} can't be downloaded, so pydocs, Python's own text, is used: {error}")
        return prepare("pydocs", "", s.train_split, s.val_split, s.tokenizer, s.vocab_size)


class Corpus:
    """The token files of a prepared dataset, as memory maps."""

    def __init__(self, folder: Path, codec: Tokenizer, block_size: int, seed: int):
        meta, self.folder = read_meta(folder), folder
        self.counts, self.block_size, self.seed, self.tokens = meta["splits"], block_size, seed, {}
        for split, counts in self.counts.items():
            path, dtype = folder / f"{split}.bin", np.dtype(meta["dtype"])
            if not path.exists() or path.stat().st_size != counts["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged; delete {folder} and run again")
            tokens = self.tokens[split] = np.memmap(path, dtype, "r")
            if tokens.max() >= codec.size:
                said = f"{path} has the token {tokens.max()} and its vocabulary only {codec.size}"
                raise UserError(f"{said}; delete {folder} and run again")
        for split, least in (("train", block_size + 1), ("val", 2)):
            if len(self.tokens[split]) < least:
                raise UserError(
                    f"the {split} split of {folder} has {len(self.tokens[split])} tokens and "
                    f"--block_size={block_size} needs {least}; give more text or shorten it"
                )
        pairs = len(self.tokens["train"]) - 1
        self.windows = max(pairs // block_size - 1, 1)  # of an epoch
        self.spare = pairs - self.windows * block_size
        self.orders = {}  # of this epoch and the last one

    def ids(self, split: str) -> Tensor:
        """A whole split, (T,)."""
        return torch.from_numpy(self.tokens[split].astype(np.int64))

    def epoch(self, number: int) -> np.ndarray:
        """Where the windows of an epoch start: a new order, and other borders in the text."""
        if number not in self.orders:
            random = np.random.default_rng((self.seed, number))
            starts = np.arange(self.windows) * self.block_size + random.integers(self.spare + 1)
            last = {n: order for n, order in self.orders.items() if n == number - 1}
            self.orders = {**last, number: random.permutation(starts)}
        return self.orders[number]

    def rows(self, numbers: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """Windows of the training split: inputs and the tokens after them, each (rows, L).

        A row's number, counted from the start of the training, alone says which it is.
        """
        starts = [self.epoch(i // self.windows)[i % self.windows] for i in numbers]
        windows = [self.tokens["train"][i : i + self.block_size + 1] for i in starts]
        rows = torch.from_numpy(np.stack(windows).astype(np.int64))
        if device.type == "cuda":  # so that the copy runs beside the work before it
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]


# ----------------------------------------------------------------------------- model and optimizer


def new_model(s, codec: Tokenizer) -> MegaForCausalLM:
    """With weights at random; `gate_bias` lets a new layer leave most of its input as it is."""
    try:
        config = MegaConfig(
            vocab_size=codec.size,
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
            hidden_dropout_prob=s.dropout,
            nffn_activation_dropout_prob=s.dropout,
            attention_probs_dropout_prob=0.0,
            use_feature_dropout=True,  # as good here, and drawing its masks costs nothing
            normalization_type="layernorm",
            is_decoder=True,
            bidirectional=False,
            final_norm=True,
            scale_embedding=True,
            add_lm_hidden_dense_layer=False,
            pad_token_id=None,
            bos_token_id=codec.end_of_text,
            eos_token_id=codec.end_of_text,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    model = MegaForCausalLM(config)
    for block in model.mega.layers:  # the update gate's are the first D of them
        nn.init.constant_(block.mega_layer.mx_proj.bias[: s.n_embd], s.gate_bias)
    return model


def build_optimizers(s, model: nn.Module, device: torch.device) -> list:
    """Muon or AdamW for the matrices of linear layers, which decay, AdamW for all else.

    The moving averages have a learning rate of their own.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    matrices = [weight for weight in linear if id(weight) not in tables]  # the output is tied
    ema = [p for m in model.modules() if isinstance(m, DampedEMA) for p in m.parameters()]
    chosen = {id(p) for p in (*matrices, *ema)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    rest = [{"params": rest}, {"params": ema, "lr": s.ema_learning_rate}]
    rest = [group | {"weight_decay": 0.0} for group in rest]
    adamw = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "weight_decay": s.weight_decay}
    adamw = functools.partial(torch.optim.AdamW, **adamw, fused=device.type in ("cpu", "cuda"))
    if s.optimizer == "adamw":
        return [adamw([{"params": matrices}, *rest])]
    muon = {"lr": s.muon_learning_rate, "weight_decay": s.weight_decay, "momentum": s.momentum}
    return [adamw(rest), torch.optim.Muon(matrices, **muon)]


def learning_rate_factor(s, progress: float) -> float:
    """Linear warm-up and decay; `progress` is the part of the training that is done, 0 to 1."""
    if progress < s.warmup_fraction:
        return max(progress / s.warmup_fraction, 0.01)
    return max((1 - progress) / (1 - s.warmup_fraction), s.min_lr_fraction)


# -------------------------------------------------------------------------------------- evaluation


def evaluate(model: MegaForCausalLM, corpus: Corpus, split: str, context: str, autocast) -> dict:
    """Over a whole split: nats a token, bits a byte, perplexity a word (ends of lines count).

    Of the split only the first token, an end of text, is not predicted. Contexts are

        "512"      windows of so many tokens, each of which starts with nothing before it;
        "carried"  the split is one row: its moving averages are never reset, attention sees the
                   tokens before in the same chunk;
        "sliding"  so twice, the second time with the chunks half of their length later, and of
                   both the loss counts where attention sees more: at least half a chunk.
    """
    tokens = corpus.ids(split)
    training = model.training
    model.eval()
    if context in ("carried", "sliding"):
        chunk = model.config.attention_limit
        if chunk is None:
            raise UserError(
                f"--contexts={context} needs a model with chunks; give windows' lengths"
            )
        late = chunk // 2 if context == "sliding" else 0
        total = nats_carried(model, tokens, chunk, 0, late, autocast)
        if late:
            total += nats_carried(model, tokens, chunk, chunk - late, chunk - late, autocast)
    else:
        total = nats_in_windows(model, tokens, int(context), autocast)
    model.train(training)
    return in_units(total, corpus, split)


def in_units(nats: float, corpus: Corpus, split: str) -> dict[str, float]:
    counts = corpus.counts[split]
    return {
        "loss": nats / (counts["tokens"] - 1),
        "bits_per_byte": nats / math.log(2) / counts["bytes"],
        "word_perplexity": math.exp(min(nats / counts["words"], 700.0)),
    }


EVALUATED = 8192  # tokens at once: enough to be fast


@torch.no_grad()
def nats(model, inputs: Tensor, targets: Tensor, autocast, **more):
    """The sum over targets but -100, and the cache."""
    device = next(model.parameters()).device
    with autocast:
        options = {"shift_labels": False, "output_logits": False, **more}
        out = model(inputs.to(device), labels=targets.to(device), **options)
    count = (targets != -100).sum().item()
    return out.loss.item() * count if count else 0.0, out.cache


def nats_in_windows(model, tokens: Tensor, length: int, autocast) -> float:
    """Of tokens (T), cut in windows without a common target."""
    whole = (len(tokens) - 1) // length * length
    inputs, targets = (t.view(-1, length) for t in (tokens[:whole], tokens[1 : whole + 1]))
    rows = max(EVALUATED // length, 1)
    batches = [*zip(inputs.split(rows), targets.split(rows), strict=True)] if whole else []
    if whole < len(tokens) - 1:
        batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    return sum(nats(model, *batch, autocast, use_cache=False)[0] for batch in batches)


def nats_carried(model, tokens: Tensor, chunk: int, pads: int, least: int, autocast) -> float:
    """Of tokens (T) behind pads, which move the chunks' borders; all have the past of a cache.

    Only positions count that have `least` others before them in their chunk.
    """
    inputs = F.pad(tokens[:-1], (pads, 0)).unsqueeze(0)
    targets = F.pad(tokens[1:], (pads, 0), value=-100).unsqueeze(0)
    targets[:, torch.arange(targets.shape[1]) % chunk < least] = -100
    mask = (torch.arange(inputs.shape[1]) >= pads).unsqueeze(0)
    total, cache, length = 0.0, None, max(EVALUATED // chunk, 1) * chunk
    for batch in zip(*(t.split(length, 1) for t in (inputs, targets, mask)), strict=True):
        seen = batch[2].to(next(model.parameters()).device) if pads and cache is None else None
        more = {"attention_mask": seen, "cache": cache, "use_cache": True}
        found, cache = nats(model, *batch[:2], autocast, **more)
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
            f"{n['words']:,} words, where the end of a line is one; loss in nats a token"
        )
        for context in contexts.split(","):
            result = evaluate(model, corpus, split, context, autocast)
            name = f"windows of {context} tokens" if context.isdigit() else context
            print(report(f"{split}, {name}", result), flush=True)
    print(report(splits[-1], result))


# ---------------------------------------------------------------------------------------- training


# The settings that a resumed run may change, and the parts of its last.pt.
CHANGEABLE = {"out_dir", "source", "dataset", "resume", "eval_only", "preset"}
CHANGEABLE |= {"max_iters", "max_minutes", "eval_interval", "save_interval", "contexts"}
CHANGEABLE |= {"sample_tokens", "device", "dtype", "compile", "threads"}
COUNTERS = ("step", "seconds", "best", "losses", "log")
READING_FAILS = (OSError, EOFError, ValueError, AttributeError, RuntimeError, pickle.PickleError)
STATE = {*COUNTERS, "fixed", "dtype", "processes", "model", "optimizers"}


def check_same(found: dict, wanted: dict, what: str):
    """A resume goes on with what it left: the first dict's values must be the second's."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        differences = "; ".join(f"{n} was {found.get(n)}, not {wanted[n]}" for n in names[:4])
        raise UserError(f"{what} can't be resumed with other settings: {differences}")


def check_tokenizer(folder: Path, codec: Tokenizer, data: Path, other: Tokenizer):
    if codec != other:
        pairs = zip(codec.ranks.items(), other.ranks.items(), strict=False)
        found = next((f"{a} in place of {b}" for a, b in pairs if a != b), "")
        sizes = f"{codec.size} and {other.size} tokens"
        said = f"the checkpoint in {folder} has another tokenizer than {data}: {found or sizes}"
        raise UserError(f"{said}; give the flags of its training, or start without --resume")


class Training:
    """All that a training changes: what a checkpoint must hold for a resume."""

    def __init__(self, s, team: Team, make_model=None):
        self.settings, self.out, self.team, self.device = s, Path(s.out_dir), team, team.device
        self.last = self.out / "last.pt"
        self.lock = filelock.FileLock(self.out / "lock")  # the system frees it when we die
        self.step, self.seconds, self.best = 0, 0.0, math.inf
        self.losses, self.log = [], []  # of the steps since the last evaluation; of evaluations
        state = self.read_state() if s.resume else None
        data = team.first(lambda: find_data(s))
        codec = load_tokenizer(data)
        self.corpus = Corpus(data, codec, s.block_size, s.seed)
        dtype = state["dtype"] if s.resume and s.dtype == "auto" else s.dtype
        self.dtype = choose_dtype(dtype, self.device)
        self.autocast = make_autocast(self.device, self.dtype)
        torch.manual_seed(s.seed)
        self.model, self.codec = (make_model or new_model)(s, codec).to(self.device), codec
        self.optimizers = build_optimizers(s, self.model, self.device)
        self.peaks = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.parts = self.share_rows()
        # What a resumed run must have in common with the first part.
        self.fixed = {n: v for n, v in vars(s).items() if n not in CHANGEABLE}
        self.fixed |= {
            "dataset": data.name,
            "checksum of the text": zlib.crc32(self.corpus.tokens["train"]),
        }
        if s.resume:
            self.load_state(state)
        if team.rank == 0:
            self.claim_out_dir()
        self.engine = compiled(self) if s.compile else self.model
        if team.size > 1:
            self.engine = DistributedDataParallel(self.engine)
        self.waiting = None  # a batch that was fetched while the device was at work
        splits = self.corpus.counts.items()
        sizes = ", ".join(f"{split} {n['tokens']:,} tokens" for split, n in splits)
        parameters = sum(p.numel() for p in self.model.parameters())
        team.say(
            f"{parameters:,} parameters on {self.device}, {dtype_name(self.dtype)}, "
            f"{torch.get_num_threads()} threads{f' x {team.size}' * (team.size > 1)}; {sizes}"
        )

    def share_rows(self) -> list[range]:
        """The rows of a step that this process takes, in parts of one forward pass each."""
        s, team = self.settings, self.team
        self.rows = s.batch_size * s.gradient_accumulation_steps
        if self.rows % team.size:
            raise UserError(
                f"a step's {self.rows} rows (--batch_size={s.batch_size} times "
                f"--gradient_accumulation_steps={s.gradient_accumulation_steps}) can't be shared "
                f"by {team.size} processes; make them a multiple of {team.size}"
            )
        mine = self.rows // team.size
        first, stop = team.rank * mine, (team.rank + 1) * mine
        return [range(i, min(i + s.batch_size, stop)) for i in range(first, stop, s.batch_size)]

    # ------------------------------------------------------------------------------------- files

    def claim_out_dir(self):
        """Make out_dir ours; a new run moves what an earlier one left there to out_dir/previous."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            mend = "wait for its end, or choose another --out_dir"
            raise UserError(f"another run is at work in {self.out}; {mend}") from None
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
            mend = "--resume would have gone on with it"
            print(f"the earlier run in {self.out} is now in {previous}; {mend}")

    def read_state(self) -> dict:
        if not self.last.exists():
            model = "a model and no " if (self.out / "model.safetensors").exists() else "no "
            raise UserError(
                f"there is nothing to resume: {self.out} has {model}last.pt, the file with weights "
                "and optimizer; start without --resume"
            )
        try:
            state = torch.load(self.last, weights_only=True, map_location="cpu")
            if not STATE <= state.keys():
                raise ValueError(f"without {', '.join(sorted(STATE - state.keys()))}")
            return state
        except READING_FAILS as error:
            raise UserError(f"{self.last} can't be read ({short(error)})") from None

    def load_state(self, state: dict):
        check_same(state["fixed"], self.fixed, str(self.last))
        check_tokenizer(self.out, load_tokenizer(self.out), self.corpus.folder, self.codec)
        try:
            shapes = {name: tuple(value.shape) for name, value in state["model"].items()}
            wanted = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
            check_same(shapes, wanted, str(self.last))
            self.model.load_state_dict(state["model"])
            for o, values in zip(self.optimizers, state["optimizers"], strict=True):
                o.load_state_dict(values)
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.last} does not fit ({short(error)})") from None
        for name in COUNTERS:
            setattr(self, name, state[name])
        if state["processes"] != self.team.size:
            self.team.say(
                f"note: {state['processes']} processes made {self.last}, now there are "
                f"{self.team.size}: the rows are the same, sums and dropout may differ"
            )

    def save(self, better: bool):
        """The checkpoint, if there is a `better` model that first; old files stay until new ones
        are whole. A run that is killed in between does the same again.
        """
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"fixed": self.fixed, "dtype": dtype_name(self.dtype)}
        state |= {"processes": self.team.size, "model": self.model.state_dict()}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        content = io.BytesIO()
        torch.save(state, content)
        with self.saving():
            if better:
                save_tokenizer(self.codec, self.out)
                self.model.save_pretrained(self.out)
            write_whole(self.last, content.getbuffer())

    @contextlib.contextmanager
    def saving(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"step {self.step} can't be saved in {self.out} ({short(error)}); what was saved "
                "before is still there: mend that and go on with --resume"
            ) from None

    def write_log(self):
        """log.csv, samples.txt and loss.png, of all evaluations."""
        if not self.log:
            return
        text = io.StringIO()
        columns = [name for name in self.log[0] if name != "sample"]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        samples = "".join(f"--- step {row['step']}\n{row['sample']}\n\n" for row in self.log)
        with self.saving():
            write_whole(self.out / "log.csv", text.getvalue().encode())
            write_whole(self.out / "samples.txt", samples.encode())
            write_whole(self.out / "loss.png", draw_curves(self.log))

    # -------------------------------------------------------------------------------------- steps

    def progress(self) -> float:
        """The part of the training that is done, by steps or minutes, whichever is further."""
        s = self.settings
        by_time = self.seconds / 60 / s.max_minutes if s.max_minutes else 0.0
        return min(max(self.step / s.max_iters, by_time), 1.0)

    def fetch(self, step: int, part: range) -> tuple[Tensor, Tensor]:
        first = step * self.rows
        return self.corpus.rows(range(first + part.start, first + part.stop), self.device)

    def train_step(self, stop: bool = False) -> bool:
        """One update of the weights; its loss, in nats a token, is the last of `losses`.

        Returns whether any process was told to `stop`. All chance of a step follows from the seed,
        the step and the row, so that a resume needs no state of it, and the number of processes
        changes nothing as long as it does not change the parts.
        """
        s, start, loss = self.settings, time.perf_counter(), 0.0
        factor = learning_rate_factor(s, self.progress())
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        batch = self.waiting or self.fetch(self.step, self.parts[0])
        for part, after in zip(self.parts, [*self.parts[1:], None], strict=True):
            seed_sequence = np.random.SeedSequence((s.seed, self.step, part.start))
            torch.manual_seed(int(seed_sequence.generate_state(1, np.uint64)[0]))
            # The processes add up their gradients once a step, after their last part.
            alone = self.team.size == 1 or after is None
            with contextlib.nullcontext() if alone else self.engine.no_sync():
                with self.autocast:
                    found = self.engine(batch[0], labels=batch[1], shift_labels=False).loss
                found = found * (len(part) * self.team.size / self.rows)
                found.backward()
            loss = loss + found.detach()
            batch = self.fetch(self.step, after) if after else None
        self.waiting = self.fetch(self.step + 1, self.parts[0])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        loss, norm = loss.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {self.step + 1} has the loss {loss} and a gradient of norm {norm}; the "
                "checkpoints stay as they were, try a lower --learning_rate"
            )
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start if self.team.rank == 0 else 0.0
        loss, seconds, stop = self.team.share(loss / self.team.size, seconds, stop)
        self.losses.append(loss)
        self.seconds += seconds
        return stop > 0

    def evaluate(self):
        """A row of the log, with a sample, and a checkpoint; on the screen, too."""
        if self.team.rank:
            self.losses = []
            return
        s = self.settings
        result = evaluate(self.model, self.corpus, "val", "carried", self.autocast)
        before = self.log[-1] if self.log else {"step": 0, "seconds": 0.0}
        tokens = (self.step - before["step"]) * self.rows * s.block_size
        row = {
            "step": self.step,
            "tokens": self.step * self.rows * s.block_size,
            "seconds": self.seconds,
            "train_loss": float(np.mean(self.losses)),
            "val_loss": result["loss"],
            "bits_per_byte": result["bits_per_byte"],
            "word_perplexity": result["word_perplexity"],
            "tokens_per_second": tokens / max(self.seconds - float(before["seconds"]), 1e-9),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
        }
        print(
            f"step {self.step}: train loss {row['train_loss']:.4f}, {report('val', result)}, "
            f"{row['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self.log.append(row | {"sample": self.sample()})
        better, self.losses = result["loss"] < self.best, []
        self.best = min(result["loss"], self.best)
        self.save(better)
        self.write_log()

    def sample(self) -> str:
        """Text that starts a document, shown as it comes."""
        pieces = []

        def write(piece: str):
            pieces.append(piece)
            print(piece, end="", flush=True)

        if self.settings.sample_tokens:
            options = {"max_new_tokens": self.settings.sample_tokens, "seed": self.settings.seed}
            continue_text(self.model, self.codec, "", write, temperature=0.8, **options)
            print(flush=True)
        return "".join(pieces)


FILES = ("last.pt", "log.csv", "loss.png", "samples.txt", "config.json", "model.safetensors")
FILES += TOKENIZER_FILES


def make_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compiled(t: Training) -> nn.Module:
    """The model by torch.compile, or itself where that does not work."""
    engine = torch.compile(t.model)
    try:
        inputs, targets = t.fetch(0, t.parts[0])
        with t.autocast:
            engine(inputs, labels=targets, shift_labels=False).loss.backward()
    except (RuntimeError, OSError, ImportError, AssertionError, TypeError) as error:
        t.team.say(f"note: this goes on without --compile, which fails here ({short(error)})")
        engine = t.model
    t.model.zero_grad(set_to_none=True)
    return engine


def draw_curves(log: list[dict]) -> bytes:
    """A picture of the log: losses, speed and learning rate over the tokens read."""
    from matplotlib.figure import Figure  # a slow import, only where it is needed

    names = [("train_loss", "val_loss"), ("tokens_per_second",), ("learning_rate",)]
    labels = ("loss (nats a token)", "tokens a second", "learning rate")
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    tokens = [row["tokens"] for row in log]
    for ax, columns, label in zip(axes, names, labels, strict=True):
        for name in columns:
            ax.plot(tokens, [float(row[name]) for row in log], ".-", label=name)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("tokens read in training")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


@contextlib.contextmanager
def told_to_stop(leads: bool):
    """A list that Ctrl-C or SIGTERM makes non-empty; a second Ctrl-C stops at once."""
    stop = []

    def interrupt(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if leads:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    old = [(number, signal.signal(number, interrupt)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield stop
    finally:
        for number, handler in old:
            signal.signal(number, handler)


def train(t: Training):
    """The loop: steps, and from time to time an evaluation and checkpoints."""
    s, leads = t.settings, t.team.rank == 0
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    shown = {"bar_format": form, "leave": False, "disable": None if leads else True}
    with told_to_stop(leads) as stop, tqdm(total=1.0, initial=t.progress(), **shown) as bar:
        if leads and not t.step:
            t.save(better=True)  # from here on the run can be resumed
        while t.progress() < 1:
            before = t.seconds
            stopped = t.train_step(bool(stop))
            speed = t.rows * s.block_size / max(t.seconds - before, 1e-9)
            bar.set_postfix_str(f"step {t.step}, loss {t.losses[-1]:.3f}, {speed:,.0f} tokens/s")
            bar.update(t.progress() - bar.n)
            if t.step % s.eval_interval == 0 or t.progress() == 1:
                bar.clear()
                t.evaluate()
            elif leads and (stopped or t.step % s.save_interval == 0):
                t.save(better=not t.log)
            if stopped:
                bar.clear()
                t.team.say(f"stopped and saved at step {t.step}; --resume goes on from here")
                sys.exit(128 + (stop or [signal.SIGINT])[0])


def evaluate_only(s, team: Team):
    """Print the results of out_dir's best model on all splits that were not trained on."""
    model, codec = load_model(s.out_dir)
    data = find_data(s)
    check_tokenizer(Path(s.out_dir), codec, data, load_tokenizer(data))
    corpus = Corpus(data, codec, s.block_size, s.seed)
    autocast = make_autocast(team.device, choose_dtype(s.dtype, team.device))
    other = "test" in corpus.counts and "test" not in (s.train_split, s.val_split)
    splits = ["test", "val"] if other else ["val"]
    report_all(model.to(team.device), corpus, splits, s.contexts, autocast)


def train_and_report(s, team: Team):
    t = Training(s, team)
    try:
        train(t)
        if team.rank == 0:
            model, _ = load_model(s.out_dir)
            report_all(model.to(t.device), t.corpus, ["val"], s.contexts, t.autocast)
    finally:
        t.lock.release()


def main():
    s = read_settings(sys.argv[1:])
    keep_big_blocks()
    if s.threads:
        torch.set_num_threads(s.threads)
    team = Team(s.device)
    try:
        if not s.eval_only:
            train_and_report(s, team)
        elif team.rank == 0:
            evaluate_only(s, team)
    except UserError:
        if team.rank:
            sys.exit(2)  # one sentence is enough
        raise
    finally:
        team.leave()


if __name__ == "__main__":
    run(main)
