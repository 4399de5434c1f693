"""Train a MEGA language model.

    python train.py                       # WikiText-2, or offline the text that ships with Python
    python train.py --dataset=my_text.txt --max_minutes=5 --out_dir=out-mine
    python train.py --resume              # go on from the last checkpoint in out_dir

Each setting below is a flag, --name=value or --name value. In out_dir: the best checkpoint so far,
in Hugging Face's layout with its tokenizer; last/, the last one with all that --resume needs; and
log.csv, a row for each evaluation.
"""

import argparse
import contextlib
import csv
import ctypes
import difflib
import functools
import io
import math
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
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
from mega import MegaConfig, MegaForCausalLM
from sample import choose_device, continue_text, load_model

# files
out_dir = "out"  # folder of the checkpoints and the log
resume = False  # go on from out_dir/last
eval_only = False  # evaluate out_dir's best checkpoint and stop
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
chunk_size = 128  # C, attention sees this many tokens; 0: the whole context
attention = "softmax"  # softmax, laplace or relu2
dropout = 0.1  # part of a row's features that is switched off in training
# optimization
batch_size = 4  # rows of a forward pass
block_size = 256  # tokens of a row: the context in training and evaluation
gradient_accumulation_steps = 1  # forward passes of a step
max_iters = 10000  # steps at most
max_minutes = 9.0  # minutes at most, but for the last evaluation; 0: no limit, and exact resumes
learning_rate = 3e-3  # its highest value, after the warm-up
min_lr_fraction = 0.02  # what is left of it at the end
warmup_fraction = 0.02  # part of the training in which it rises
weight_decay = 0.1  # of the matrices of linear layers
beta1 = 0.9  # of AdamW
beta2 = 0.98  # of AdamW
grad_clip = 1.0  # the gradient's largest norm; 0: any
# evaluation
eval_interval = 500  # steps between evaluations and checkpoints
sample_tokens = 100  # length of the sample at each evaluation; 0: none
# machine
device = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one
dtype = "auto"  # float32 or bfloat16 (autocast); auto: what multiplies faster
compile = False  # torch.compile the model, where there is a compiler
threads = 0  # CPU threads; 0: torch's choice
seed = 1337  # of the weights, the batches and the dropout

SETTINGS = {
    name: value
    for name, value in globals().items()
    if isinstance(value, bool | int | float | str) and name.islower() and name[0] != "_"
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
    """The settings on top of this file, changed by the command line."""
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
    counts = "batch_size block_size gradient_accumulation_steps max_iters eval_interval n_layer"
    sizes = "n_embd intermediate_size nffn_hidden_size shared_size ema_size"
    amounts = "chunk_size max_minutes weight_decay grad_clip sample_tokens threads seed"
    parts = "dropout warmup_fraction min_lr_fraction beta1 beta2"
    for names, rule, valid in (
        (f"{counts} {sizes}", "at least 1", lambda value: value >= 1),
        (amounts, "0 or more", lambda value: 0 <= value < 1 << 63),
        ("learning_rate", "above 0", lambda value: 0 < value < math.inf),
        (parts, "0 or more and below 1", lambda value: 0 <= value < 1),
        ("out_dir dataset", "non-empty", bool),
        ("dtype", f"one of {', '.join(DTYPES)}", DTYPES.__contains__),
        ("tokenizer", f"one of {', '.join(TOKENIZERS)}", TOKENIZERS.__contains__),
    ):
        for name in names.split():
            if not valid(getattr(s, name)):
                raise UserError(f"--{name} must be {rule}, got {getattr(s, name)!r}")
    return s


# ----------------------------------------------------------------------------------------- machine


def keep_big_blocks():
    """Let glibc keep freed memory, or each step would fault all its pages in anew."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, or its old limit
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD


DTYPES = ("auto", "float32", "bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype; auto: bfloat16 where its products are much faster than float32's."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32

    def seconds(dtype):
        x, times = torch.ones(768, 768, device=device, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    much_faster = seconds(torch.bfloat16) * 1.5 < seconds(torch.float32)
    return torch.bfloat16 if much_faster else torch.float32


# -------------------------------------------------------------------------------------------- data


def find_data(s) -> Path:
    """The prepared dataset; where WikiText can't be downloaded, the text that ships with Python."""
    try:
        return prepare(s.dataset, s.source, s.train_split, s.val_split, s.tokenizer, s.vocab_size)
    except DownloadError as error:
        if s.dataset not in WIKITEXT or s.source:
            raise
        print(
            f"{s.dataset} can't be downloaded, so this trains on pydocs, Python's own text: {error}"
        )
        return prepare("pydocs", "", s.train_split, s.val_split, s.tokenizer, s.vocab_size)


class Corpus:
    """The token files of a prepared dataset, as memory maps."""

    def __init__(self, folder: Path, block_size: int):
        meta = read_meta(folder)
        self.counts, self.block_size, self.tokens = meta["splits"], block_size, {}
        for split, counts in self.counts.items():
            path, dtype = folder / f"{split}.bin", np.dtype(meta["dtype"])
            if not path.exists() or path.stat().st_size != counts["tokens"] * dtype.itemsize:
                raise UserError(f"{path} is damaged; delete {folder} and run again")
            self.tokens[split] = np.memmap(path, dtype, "r")
        for split, least in (("train", block_size + 1), ("val", 2)):
            if len(self.tokens[split]) < least:
                raise UserError(
                    f"the {split} split of {folder} has {len(self.tokens[split])} tokens and "
                    f"--block_size={block_size} needs {least}; give more text or shorten it"
                )

    def batch(self, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows of the training split: inputs and the tokens after them, (rows, L)."""
        tokens, length = self.tokens["train"], self.block_size
        starts = torch.randint(len(tokens) - length, (rows,)).tolist()
        windows = np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64)
        windows = torch.from_numpy(windows).to(device)
        return windows[:, :-1], windows[:, 1:]

    def windows(self, split: str, rows: int):
        """A whole split in order, in windows without a common target: (inputs, targets) batches."""
        tokens, length = torch.from_numpy(self.tokens[split].astype(np.int64)), self.block_size
        whole = (len(tokens) - 1) // length * length
        inputs, targets = tokens[:whole].view(-1, length), tokens[1 : whole + 1].view(-1, length)
        if whole:
            yield from zip(inputs.split(rows), targets.split(rows), strict=True)
        if whole < len(tokens) - 1:
            yield tokens[whole:-1].unsqueeze(0), tokens[whole + 1 :].unsqueeze(0)


# ----------------------------------------------------------------------------- model and optimizer


def model_config(s, codec: Tokenizer) -> MegaConfig:
    try:
        return MegaConfig(
            vocab_size=codec.size,
            num_hidden_layers=s.n_layer,
            hidden_size=s.n_embd,
            intermediate_size=s.intermediate_size,
            nffn_hidden_size=s.nffn_hidden_size,
            shared_representation_size=s.shared_size,
            ema_projection_size=s.ema_size,
            use_chunking=s.chunk_size > 0,
            chunk_size=s.chunk_size or -1,
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


def check_same(found: dict, wanted: dict, what: str):
    """A resume goes on with what it left: the first dict's values must be the second's."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        differences = "; ".join(f"{n} was {found.get(n)}, not {wanted[n]}" for n in names)
        raise UserError(f"{what} can't be resumed with other settings: {differences}")


def build_optimizer(s, model: MegaForCausalLM, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; only the matrices of linear layers decay: no embedding, EMA, bias or norm."""
    embedding = model.mega.embedding_layer.word_embeddings.weight
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = [weight for weight in matrices if weight is not embedding]
    decaying = {id(weight) for weight in matrices}
    rest = [p for p in model.parameters() if id(p) not in decaying]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    settings = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "weight_decay": s.weight_decay}
    return torch.optim.AdamW(groups, **settings, fused=device.type in ("cpu", "cuda"))


def learning_rate_at(s, progress: float) -> float:
    """Linear warm-up and decay; `progress` is the part of the training that is done, 0 to 1."""
    if progress < s.warmup_fraction:
        return s.learning_rate * max(progress / s.warmup_fraction, 0.01)
    return s.learning_rate * max((1 - progress) / (1 - s.warmup_fraction), s.min_lr_fraction)


# ---------------------------------------------------------------------------------------- training


# The settings that a resumed run may change, and the parts of its training.pt.
CHANGEABLE = "out_dir source resume eval_only max_iters max_minutes eval_interval sample_tokens"
CHANGEABLE = {*CHANGEABLE.split(), "device", "dtype", "compile", "threads", "dataset"}
COUNTERS = ("step", "seconds", "tokens", "best", "rows")
STATE = {*COUNTERS, "fixed", "dtype", "optimizer", "rng", "cuda_rng"}


class Training:
    """All that a training changes: what a checkpoint must hold for a resume."""

    def __init__(self, s):
        self.settings, self.out = s, Path(s.out_dir)
        self.device = choose_device(s.device)
        self.step, self.seconds, self.tokens, self.best, self.rows = 0, 0.0, 0, math.inf, []
        torch.manual_seed(s.seed)
        folder = self.find_last() if s.resume else self.out
        state = self.read_state(folder) if s.resume else None
        if s.resume or s.eval_only:
            self.model, self.codec = load_model(folder)
        data = find_data(s)
        self.corpus, codec = Corpus(data, s.block_size), load_tokenizer(data)
        dtype = state["dtype"] if s.resume and s.dtype == "auto" else s.dtype
        self.dtype = choose_dtype(dtype, self.device)
        if not (s.resume or s.eval_only):
            self.model, self.codec = MegaForCausalLM(model_config(s, codec)), codec
        elif self.codec != codec:
            raise UserError(f"the checkpoint in {folder} has another tokenizer than {data}")
        self.model.to(self.device).train()
        self.optimizer = build_optimizer(s, self.model, self.device)
        # What a resumed run must have in common with the first part.
        self.fixed = {n: v for n, v in vars(s).items() if n not in CHANGEABLE}
        self.fixed["dataset"] = data.name
        if s.resume:
            check_same(state["fixed"], self.fixed, str(folder))
            self.load_state(state, folder)
        self.autocast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32
        )
        if not s.eval_only:
            self.claim_out_dir()
        sizes = ", ".join(
            f"{split} {n['tokens']:,} tokens" for split, n in self.corpus.counts.items()
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        print(
            f"{parameters:,} parameters on {self.device}, {dtype_name(self.dtype)}, "
            f"{torch.get_num_threads()} threads; {sizes}",
            flush=True,
        )

    def claim_out_dir(self):
        """Make out_dir; a new run moves what an earlier one left there to out_dir/previous."""
        self.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.out).close()  # an unwritable folder shows now
        names = ("last", "last.new", "last.old", "log.csv", "config.json", "model.safetensors")
        names += TOKENIZER_FILES
        found = [name for name in names if (self.out / name).exists()]
        if found and not self.settings.resume:
            previous = self.out / "previous"
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
            for name in found:
                (self.out / name).rename(previous / name)
            mend = "--resume would have gone on with it"
            print(f"the earlier run in {self.out} is now in {previous}; {mend}")

    def find_last(self) -> Path:
        """out_dir/last, or what a crash between the two renames of a save left of it."""
        for name in ("last", "last.new", "last.old"):
            if (self.out / name / "training.pt").exists():
                return self.out / name
        raise UserError(
            f"there is nothing to resume in {self.out / 'last'}; start without --resume"
        )

    def read_state(self, folder: Path) -> dict:
        try:
            state = torch.load(folder / "training.pt", weights_only=True, map_location="cpu")
            if not STATE <= state.keys():
                raise ValueError("parts are missing")
            return state
        except (
            OSError,
            EOFError,
            ValueError,
            AttributeError,
            RuntimeError,
            pickle.PickleError,
        ) as e:
            raise UserError(f"{folder / 'training.pt'} can't be read ({short(e)})") from None

    def load_state(self, state: dict, folder: Path):
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder / 'training.pt'} does not fit ({short(error)})") from None
        for name in COUNTERS:
            setattr(self, name, state[name])

    def save_model(self, folder: Path):
        self.model.save_pretrained(folder)
        save_tokenizer(self.codec, folder)

    def save_last(self):
        """out_dir/last, made beside it, then renamed: weights and optimizer stay of one step."""
        last, new, old = (self.out / name for name in ("last", "last.new", "last.old"))
        shutil.rmtree(new, ignore_errors=True)
        self.save_model(new)
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"fixed": self.fixed, "dtype": dtype_name(self.dtype)}
        state["optimizer"] = self.optimizer.state_dict()
        state |= {"rng": torch.get_rng_state(), "cuda_rng": None}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(new / "training.pt", buffer.getvalue())
        shutil.rmtree(old, ignore_errors=True)
        if last.exists():
            last.rename(old)
        new.rename(last)
        shutil.rmtree(old, ignore_errors=True)
        if self.best == math.inf:  # not evaluated yet: the last is the best
            self.save_model(self.out)

    def progress(self) -> float:
        """The part of the training that is done, by steps or minutes, whichever is further."""
        s = self.settings
        by_time = self.seconds / 60 / s.max_minutes if s.max_minutes else 0.0
        return min(max(self.step / s.max_iters, by_time), 1.0)

    def train_step(self, model) -> float:
        """One update of the weights; the loss in nats per token."""
        s, loss = self.settings, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(s, self.progress())
        for _ in range(s.gradient_accumulation_steps):
            inputs, targets = self.corpus.batch(s.batch_size, self.device)
            with self.autocast:
                part = model(inputs, labels=targets, shift_labels=False).loss
            (part / s.gradient_accumulation_steps).backward()
            loss += part.item() / s.gradient_accumulation_steps
            self.tokens += targets.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            found = f"step {self.step + 1} has the loss {loss} and a gradient of norm {norm.item()}"
            raise UserError(
                f"{found}; the checkpoints stay as they were, try a lower --learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    @torch.no_grad()
    def evaluate(self, split: str = "val") -> dict[str, float]:
        """Over the whole split: nats a token, bits a byte, perplexity a word (ends of lines count).

        Windows of block_size tokens, each with no context before it. Of a split's tokens only the
        first, an end of text, is not predicted.
        """
        nats, tokens, counts = 0.0, 0, self.corpus.counts[split]
        self.model.eval()
        rows = max(8192 // self.settings.block_size, 1)  # large enough to be fast
        for inputs, targets in self.corpus.windows(split, rows):
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            with self.autocast:
                options = {"use_cache": False, "output_logits": False}
                out = self.model(inputs, labels=targets, shift_labels=False, **options)
            nats += out.loss.item() * targets.numel()
            tokens += targets.numel()
        self.model.train()
        return {
            "loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / counts["bytes"],
            "word_perplexity": math.exp(min(nats / counts["words"], 700.0)),
        }

    def add_row(self, train_loss: float, result: dict[str, float], tokens_per_second: float):
        """A row of log.csv."""
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "train_loss": train_loss,
            "val_loss": result["loss"],
            "bits_per_byte": result["bits_per_byte"],
            "word_perplexity": result["word_perplexity"],
            "tokens_per_second": tokens_per_second,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def write_log(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.out / "log.csv", text.getvalue().encode())

    def print_sample(self):
        if self.settings.sample_tokens:
            options = {"max_new_tokens": self.settings.sample_tokens, "seed": self.settings.seed}
            write = functools.partial(print, end="", flush=True)
            continue_text(self.model, self.codec, "", write, temperature=0.8, **options)
            print()


def report(result: dict[str, float]) -> str:
    return "val: " + " ".join(f"{name} {value:.4f}" for name, value in result.items())


def train(t: Training) -> dict[str, float]:
    """The loop: steps, and from time to time an evaluation, checkpoints and a sample."""
    s, model = t.settings, torch.compile(t.model) if t.settings.compile else t.model
    stop = []  # Ctrl-C waits for the end of a step

    def interrupt(*_):
        stop.append(True)
        signal.signal(signal.SIGINT, previous)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, interrupt)
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=1.0, initial=t.progress(), bar_format=form, leave=False, disable=None)
    start, losses, tokens, seconds = time.time() - t.seconds, [], t.tokens, t.seconds
    result = t.evaluate() if t.progress() == 1 else None
    while t.progress() < 1:
        losses.append(t.train_step(model))
        t.seconds = time.time() - start
        speed = (t.tokens - tokens) / max(t.seconds - seconds, 1e-9)
        bar.set_postfix_str(f"step {t.step}, loss {losses[-1]:.3f}, {speed:,.0f} tokens/s")
        bar.update(t.progress() - bar.n)
        if stop:
            t.save_last()
            bar.close()
            print(f"stopped and saved at step {t.step}; --resume goes on from here")
            sys.exit(130)
        if t.step % s.eval_interval == 0 or t.progress() == 1:
            result, train_loss = t.evaluate(), float(np.mean(losses))
            better = result["loss"] < t.best
            t.best = min(result["loss"], t.best)
            t.add_row(train_loss, result, speed)
            t.seconds = time.time() - start
            t.save_last()
            if better:
                t.save_model(t.out)
            t.write_log()
            bar.clear()
            line = f"step {t.step}: train loss {train_loss:.4f}, {report(result)}"
            print(f"{line}, {speed:,.0f} tokens/s", flush=True)
            t.print_sample()
            losses, tokens, seconds = [], t.tokens, t.seconds
    bar.close()
    signal.signal(signal.SIGINT, previous)
    return result


def main():
    s = read_settings(sys.argv[1:])
    keep_big_blocks()
    if s.threads:
        torch.set_num_threads(s.threads)
    t = Training(s)
    result = t.evaluate() if s.eval_only else train(t)
    print(report(result))


if __name__ == "__main__":
    run(main)
