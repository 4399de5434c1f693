"""Train MEGA, or a Transformer for comparison, on small tasks like those of the paper.

    python -m data.tasks listops             # the value of [MAX 4 3 [MIN 2 3 ] 1 0 ] and the like
    python -m data.tasks digits              # MNIST, pixel by pixel
    python -m data.tasks speech              # spoken digits, from the raw waveform
    python -m data.tasks translation         # Multi30k, English to German
    python -m data.tasks masks               # masked language modelling, on train.py's text
    python -m data.tasks digits --baseline   # a Transformer with as many parameters instead
    python -m data.tasks --results           # a table of the runs in this folder

Each setting below is a flag, --name=value or --name value; RECIPES has a task's own defaults.
Written to out_dir: the model in Hugging Face's layout (a baseline is not saved) and result.json.
"""

import argparse
import gzip
import io
import json
import math
import random
import re
import sys
import time
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sacrebleu
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from data.common import (
    DownloadError,
    UserError,
    keep_big_blocks,
    locked,
    read_flags,
    reading,
    run,
    write_whole,
)
from data.machine import (
    ProgressBar,
    choose_device,
    choose_dtype,
    dtype_name,
    make_autocast,
    told_to_stop,
)
from data.prepare import DATA, decode, download, load_tokenizer, new_tokenizer, save_tokenizer
from mega import (
    ATTENTION_FUNCTIONS,
    NORMS,
    MegaCache,
    MegaConfig,
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForSequenceClassification,
    MegaModel,
    MegaOutput,
    evaluating,
)

# files
out_dir = ""  # folder for the model and result; empty: out-<task>[-baseline]-<seed>
source = ""  # folder or file with the data, instead of a download
data_dir = ""  # folder for downloads; empty: the project's data/
# data
dataset = "auto"  # masks: a path, or one of data/prepare.py's, as in train.py
depth = 4  # listops: deepest nesting of operators, 1 to 10 (10 in the paper)
operands = 10  # listops: maximum operands of an operator, 2 to 10 (10 in the paper)
shortest = 4  # listops: minimum tokens in an expression (500 in the paper)
longest = 100  # listops: maximum tokens in an expression (2000 in the paper)
expressions = 52500  # listops: distinct expressions; one in 21 (2,500 by default) for the test
side = 14  # digits: width and height in pixels, 14 or 28
samples = 16  # speech: audio samples per position
vocab_size = 4096  # translation, masks: size of the BPE vocabulary
masked = 0.15  # masks: fraction of the tokens that are masked
beams = 4  # translation: beam size, the number of prefixes that beam search keeps
# model
baseline = False  # train a Transformer with as many parameters instead of MEGA
n_layer = 4  # blocks; for translation, of the encoder and of the decoder
n_embd = 64  # D, channels: the width of the hidden states
shared_size = 64  # Z, width of queries and keys
ema_size = 16  # N, EMA states per channel
chunk_size = 0  # C, attention sees at most this many positions; 0: all
attention = "softmax"  # softmax, laplace or relu2
norm = "layernorm"  # layernorm, scalenorm, rmsnorm or batchnorm
dropout = 0.1  # of outputs and hidden values of all sublayers, not of attention weights
# optimization
optimizer = "muon"  # muon or adamw
positions = 4096  # positions per batch, padding included; for translation, of source sentences
max_minutes = 8.0  # minutes of training
max_iters = 1000000  # maximum number of steps
learning_rate = 5e-3  # AdamW's peak, after the warm-up
ema_learning_rate = 2e-2  # AdamW's peak for EMAs, query/key scales and shifts, position biases
muon_learning_rate = 0.02  # Muon's peak
weight_decay = 0.1  # of the matrices
# machine
device = "auto"  # cpu, cuda, ...; auto: cuda if there is one
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is faster
threads = 0  # CPU threads; 0: torch's choice
seed = 1  # of the weights, the batches and the dropout

SETTINGS = {
    name: value
    for name, value in globals().items()
    if isinstance(value, bool | int | float | str) and name.islower() and name[0] != "_"
}
# Where a task's defaults differ from these.
RECIPES = {
    "listops": {"n_embd": 80, "dropout": 0.0},
    "digits": {"n_layer": 3, "attention": "laplace", "dropout": 0.0},
    "speech": {"attention": "laplace", "norm": "batchnorm"},
    "translation": {"n_layer": 3, "n_embd": 128, "positions": 1024, "dropout": 0.0},
    "masks": {"n_embd": 160, "chunk_size": 128, "vocab_size": 2048},
}
# Settings that only some tasks have.
OWN = {
    "listops": "depth operands shortest longest expressions",
    "digits": "side",
    "speech": "samples",
    "translation": "vocab_size beams",
    "masks": "vocab_size masked dataset",
}
# The rest of the optimizers' settings are train.py's.
TRAIN_SETTINGS = "min_lr_fraction warmup_fraction momentum beta1 beta2 grad_clip"

# --------------------------------------------------------------------------------------- downloads


FILES = {  # each task's address and files
    "digits": (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        [
            f"{part}-{kind}-ubyte.gz"
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ],
    ),
    "speech": (
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads",
        ["master.zip"],
    ),
    "translation": (
        "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/tok",
        [
            f"{part}.lc.norm.tok.{language}"
            for part in ("train", "test_2016_flickr")
            for language in ("en", "de")
        ],
    ),
}


def fetch(task: str, s) -> Path:
    """Return where a task's data are: --source, or the folder to which they are downloaded."""
    if s.source:
        path = Path(s.source).expanduser()
        if not path.exists():
            raise UserError(f"--source={s.source} does not exist; give the folder of the data")
        return path
    address, names = FILES[task]
    folder = Path(s.data_dir or DATA).expanduser() / task
    with locked(folder, f"another process is downloading to {folder}: waiting for it", wait=True):
        for name in names:
            if not (folder / name).exists():
                try:
                    download(f"{address}/{name}", folder / name)
                except DownloadError as error:
                    hint = "--source takes a folder that has it"
                    raise DownloadError(f"{error}; {hint}") from None
    return folder


# ---------------------------------------------------------------------------------------- examples


class Example(NamedTuple):
    inputs: np.ndarray  # token ids (L), or numbers (L, k)
    target: int | np.ndarray = 0  # a class, or token ids
    kind: str = ""  # accuracy is also reported for each kind


def batches(examples: list[Example], size: int, rng=None) -> Iterator[list[Example]]:
    """Group examples of similar lengths into batches of at most `size` positions, padding included.

    A longer example is a batch of its own. With a random generator, batches differ from epoch to
    epoch and come in a random order.
    """
    lengths = np.array([len(example.inputs) for example in examples], np.float64)
    if rng is not None:
        lengths *= rng.uniform(0.9, 1.1, len(examples))
    groups = [[]]
    longest = 0  # positions of the longest example in the last group
    for i in np.argsort(lengths, kind="stable"):
        longest = max(longest, len(examples[i].inputs))
        if groups[-1] and (len(groups[-1]) + 1) * longest > size:
            groups.append([])
            longest = len(examples[i].inputs)
        groups[-1].append(examples[i])
    if rng is not None:
        rng.shuffle(groups)
    yield from groups


def pad(rows: list[np.ndarray], value: int = 0) -> tuple[Tensor, Tensor]:
    """Pad arrays (L, ...) at their ends and stack them; the mask (B, L) is False at padding."""
    lengths = torch.tensor([len(row) for row in rows])
    tensors = [torch.from_numpy(row) for row in rows]
    stacked = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return stacked, torch.arange(stacked.shape[1]) < lengths.unsqueeze(1)


def with_constant(numbers: np.ndarray) -> np.ndarray:
    """Append a 1 to each position's numbers (L, k), so that the map embedding them has a bias."""
    ones = np.ones((len(numbers), 1), np.float32)
    return np.concatenate([numbers.astype(np.float32), ones], axis=1)


class Task:
    """Training and test examples, and what is done with them.

    new_model() and new_baseline(F) make a MEGA, and a Transformer with F hidden units in its
    feed-forward networks; loss(model, batch) is what training minimises, measure(model) returns
    metrics on the test examples, save(model, folder) saves what is needed to use the model.
    """

    settings: argparse.Namespace
    train: list[Example]
    test: list[Example]


class Classification(Task):
    """A task with a class for each sequence, measured by accuracy."""

    vocabulary: int  # number of tokens; for numeric inputs, of numbers in each position

    def new_model(self) -> MegaForSequenceClassification:
        more = {"mean_pooling": True, "num_labels": 10}
        return MegaForSequenceClassification(new_config(self.settings, self.vocabulary, **more))

    def new_baseline(self, ffn_size: int) -> nn.Module:
        return TransformerEncoder(self.settings, self.vocabulary, ffn_size, classes=10)

    def outputs(self, model: nn.Module, examples: list[Example]) -> MegaOutput:
        """Apply a model. Numeric inputs are embedded by a linear map: the embedding matrix."""
        device = device_of(model)
        inputs, mask = pad([example.inputs for example in examples])
        inputs = inputs.to(device)
        given = {"attention_mask": mask.to(device)}
        if inputs.is_floating_point():
            given["inputs_embeds"] = inputs @ table_of(model).weight
        else:
            given["input_ids"] = inputs
        labels = torch.tensor([example.target for example in examples], device=device)
        return model(**given, labels=labels)

    def loss(self, model: nn.Module, examples: list[Example]) -> Tensor:
        return self.outputs(model, examples).loss

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on the test examples in percent, overall and for each kind."""
        right = {}
        for batch in batches(self.test, 4 * self.settings.positions):
            predictions = self.outputs(model, batch).logits.argmax(dim=-1).tolist()
            for example, prediction in zip(batch, predictions, strict=True):
                names = ["accuracy"]
                if example.kind:
                    names.append(f"accuracy {example.kind}")
                for name in names:
                    right.setdefault(name, []).append(prediction == example.target)
        return {name: 100 * float(np.mean(all_right)) for name, all_right in sorted(right.items())}

    def save(self, model: MegaForSequenceClassification, folder: Path):
        model.save_pretrained(folder)


# ----------------------------------------------------------------------------------------- listops


OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),  # rounded down: of 2 and 5, 3
    "[SM": lambda values: sum(values) % 10,
}
SYMBOLS = ["padding", *map(str, range(10)), *OPERATORS, "]"]
NESTED = 0.25  # probability that an operand is an expression


def random_expression(rng: random.Random, depth: int, most: int) -> tuple:
    """Return an operator and 2 to `most` operands, digits or expressions one level less deep."""
    operands = []
    for _ in range(rng.randint(2, most)):
        if depth > 1 and rng.random() < NESTED:
            operands.append(random_expression(rng, depth - 1, most))
        else:
            operands.append(rng.randrange(10))
    return rng.choice([*OPERATORS]), *operands


def tokens_of(expression) -> list[str]:
    if isinstance(expression, int):
        return [str(expression)]
    operator, *operands = expression
    return [operator, *(token for operand in operands for token in tokens_of(operand)), "]"]


def value_of(expression) -> int:
    if isinstance(expression, int):
        return expression
    operator, *operands = expression
    return OPERATORS[operator]([value_of(operand) for operand in operands])


def in_order(expression):
    """Sort the operands of all operators, whose values do not depend on their order."""
    if isinstance(expression, int):
        return expression
    operator, *operands = expression
    return operator, *sorted(map(in_order, operands), key=str)


def depth_of(expression) -> int:
    if isinstance(expression, int):
        return 0
    return 1 + max(depth_of(operand) for operand in expression[1:])


class ListOps(Classification):
    """ListOps of Long Range Arena: nested operators on digits, whose value is a digit again.

    No operator depends on the order of its operands, so a training expression must differ from
    all test expressions in more than that order.
    """

    vocabulary = len(SYMBOLS)

    def __init__(self, s):
        self.settings = s
        rng = random.Random(0)  # the same expressions whatever the seed
        expressions = {}  # keyed by their tokens, so that all are distinct
        tries = 0
        while len(expressions) < s.expressions:
            tries += 1
            if tries > 1000 + 100 * len(expressions):
                raise UserError(
                    f"with --depth={s.depth} and --operands={s.operands}, hardly one random "
                    f"expression in a hundred is new and has {s.shortest} to {s.longest} tokens; "
                    "change --shortest, --longest or --depth, or lower --expressions"
                )
            expression = random_expression(rng, s.depth, s.operands)
            tokens = tokens_of(expression)
            if s.shortest <= len(tokens) <= s.longest:
                expressions[" ".join(tokens)] = expression
        shuffled = [*expressions.values()]
        rng.shuffle(shuffled)  # short ones were found first
        for_test = shuffled[: max(s.expressions // 21, 1)]
        held_out = {in_order(expression) for expression in for_test}
        for_training = [x for x in shuffled if in_order(x) not in held_out]
        if not for_training:
            raise UserError(f"--expressions={s.expressions} leaves none for training; raise it")
        self.train = [self.example(expression) for expression in for_training]
        self.test = [self.example(expression) for expression in for_test]

    def example(self, expression: tuple) -> Example:
        ids = np.array([SYMBOLS.index(token) for token in tokens_of(expression)])
        return Example(ids, value_of(expression), f"at depth {depth_of(expression)}")


# ------------------------------------------------------------------------------------------ digits


class Digits(Classification):
    """MNIST, pixel by pixel; scikit-learn's 8 x 8 digits where it can't be downloaded."""

    vocabulary = 2  # a pixel and a constant

    def __init__(self, s):
        self.settings = s
        try:
            folder = fetch("digits", s)
        except DownloadError as error:
            print(
                f"note: MNIST can't be downloaded, so scikit-learn's small digits are used: {error}"
            )
            self.split(self.small_digits())
            return
        self.test = self.read(folder, "t10k")
        if (folder / "train-images-idx3-ubyte.gz").exists():
            self.train = self.read(folder, "train")
        else:
            print(f"note: {folder} has the test images only: four in five are used for training")
            self.split(self.test)

    def split(self, examples: list[Example]):
        """Use four in five examples for training, the rest for the test, the same every time."""
        order = np.random.default_rng(0).permutation(len(examples))
        count = len(examples) * 4 // 5
        self.train = [examples[i] for i in order[:count]]
        self.test = [examples[i] for i in order[count:]]

    def read(self, folder: Path, part: str) -> list[Example]:
        """Read images (n, 28, 28) and shrink them to (n, side, side) by averaging pixels."""
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if images.shape != (len(labels), 28, 28) or len(labels) < 2 or labels.max() > 9:
            raise UserError(
                f"{folder} has images {images.shape} of {part} and {len(labels)} labels; it needs "
                "one 28 x 28 image per label, at least two of them, and labels from 0 to 9"
            )
        side = self.settings.side
        step = 28 // side
        pixels = images.reshape(len(images), side, step, side, step).mean(axis=(2, 4))
        return as_examples(pixels / 255, labels)

    def small_digits(self) -> list[Example]:
        from sklearn.datasets import load_digits

        found = load_digits()
        return as_examples(found.images / 16, found.target)


def as_examples(images: np.ndarray, labels: np.ndarray) -> list[Example]:
    """Turn images (n, height, width), of numbers from 0 to 1, into sequences of pixels."""
    images = (images - 0.1307) / 0.3081  # mean and standard deviation of MNIST
    return [
        Example(with_constant(image.reshape(-1, 1)), int(label))
        for image, label in zip(images, labels, strict=True)
    ]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the IDX format: a magic number for the count of dimensions, their sizes, the bytes."""
    if not path.exists():
        raise UserError(f"{path} is missing; --source takes the folder with MNIST's files")
    with reading(f"{path} is damaged"):
        content = gzip.decompress(path.read_bytes())
        start = 4 + 4 * dimensions
        magic, *sizes = np.frombuffer(content[:start], ">i4").tolist()
        if magic != 0x800 + dimensions:
            raise ValueError(f"its magic number is {magic}, not {0x800 + dimensions}")
        return np.frombuffer(content[start:], np.uint8).reshape(sizes)


# ------------------------------------------------------------------------------------------ speech


RECORDING = re.compile(r"(\d)_[A-Za-z]+_(\d+)\.wav")  # digit, speaker and number


class Speech(Classification):
    """The Free Spoken Digit Dataset at 8 kHz; each position holds `samples` audio samples."""

    def __init__(self, s):
        self.settings = s
        self.vocabulary = s.samples + 1  # and a constant
        folder = fetch("speech", s)
        self.train = []
        self.test = []
        for name, content in recordings(folder).items():
            digit, number = RECORDING.fullmatch(name).groups()
            example = Example(self.cut(read_wav(name, content)), int(digit))
            part = self.test if int(number) < 5 else self.train  # the dataset's own split
            part.append(example)
        if not self.train or not self.test:
            raise UserError(
                f"{folder} needs recordings with names like 7_jackson_0.wav, numbered 0 to 4 for "
                f"the test and from 5 for training; it has {len(self.test)} and {len(self.train)}"
            )

    def cut(self, sound: np.ndarray) -> np.ndarray:
        """Cut a sound (T) into positions (L, samples + 1), the last one padded with zeros."""
        size = self.settings.samples
        return with_constant(np.pad(sound, (0, -len(sound) % size)).reshape(-1, size))


def recordings(source: Path) -> dict[str, bytes]:
    """Read the recordings in a zip, in a folder, or in a zip in a folder."""
    zips = sorted(source.glob("*.zip")) if source.is_dir() else [source]
    if not zips:
        paths = [path for path in sorted(source.rglob("*.wav")) if RECORDING.fullmatch(path.name)]
        return {path.name: path.read_bytes() for path in paths}
    with reading(f"{zips[0]} is not a readable zip file"), zipfile.ZipFile(zips[0]) as archive:
        names = {name.rsplit("/", 1)[-1]: name for name in sorted(archive.namelist())}
        return {
            name: archive.read(path) for name, path in names.items() if RECORDING.fullmatch(name)
        }


def read_wav(name: str, content: bytes) -> np.ndarray:
    """Read a recording, normalised to mean 0 and standard deviation 1."""
    with reading(f"{name} is damaged"), wave.open(io.BytesIO(content)) as file:
        found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if found != (1, 2, 8000):
            raise ValueError(f"channels, sample width and rate are {found}, not (1, 2, 8000)")
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
        if len(sound) == 0:
            raise ValueError("it has no samples")
    return (sound - sound.mean()) / (sound.std() + 1e-6)


# ------------------------------------------------------------------------------------- translation


class Translator(nn.Module):
    """A bidirectional encoder and a cross-attending decoder that share one embedding matrix.

    Beam search needs two methods of a translator: `start` reads the source sentences, `step` one
    more token of each translation. Both return log-probabilities (B, vocabulary) of the next token,
    and a state.
    """

    def __init__(self, s, vocabulary: int):
        super().__init__()
        self.encoder = MegaModel(new_config(s, vocabulary), add_pooling_layer=False)
        decoder = {"is_decoder": True, "bidirectional": False, "add_cross_attention": True}
        self.decoder = MegaForCausalLM(new_config(s, vocabulary, **decoder))
        table = table_of(self.encoder).weight
        table_of(self.decoder).weight = table
        self.decoder.lm_head.weight = table

    def forward(self, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) of the token after each of target (B, T)."""
        return self.decoder(target, **self.encode(source, mask), use_cache=False).logits

    def encode(self, source: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Encode sentences (B, S) and return them as arguments for the decoder."""
        states = self.encoder(source, mask).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def start(self, source: Tensor, mask: Tensor, first: Tensor) -> tuple[Tensor, MegaCache]:
        out = self.decoder(first.unsqueeze(1), **self.encode(source, mask), use_cache=True)
        return log_probabilities(out.logits), out.cache

    def step(self, cache: MegaCache, token: Tensor) -> tuple[Tensor, MegaCache]:
        out = self.decoder(token.unsqueeze(1), cache=cache, use_cache=True)
        return log_probabilities(out.logits), out.cache

    def save_pretrained(self, folder: Path):
        self.encoder.save_pretrained(folder / "encoder")
        self.decoder.save_pretrained(folder / "decoder")


def log_probabilities(logits: Tensor) -> Tensor:
    return logits[:, -1].float().log_softmax(dim=-1)


def rows_of(state, rows: Tensor):
    """Select the sequences `rows` of a cache, in that order; the cache itself does not change."""
    if torch.is_tensor(state):
        return state[rows]
    if isinstance(state, list):
        return [rows_of(part, rows) for part in state]
    if isinstance(state, tuple):  # a named tuple
        return type(state)(*(rows_of(part, rows) for part in state))
    return state


def beam_search(model, source: Tensor, mask: Tensor, end: int, beams: int, longest: int) -> Tensor:
    """Translate sentences (B, S), keeping the `beams` likeliest prefixes; beams=1: greedy search.

    A step never changes a cache, so several prefixes may continue from the same one. Return the
    ids (B, T), padded with `end`, of the prefix with the highest mean log-probability per token.
    """
    B = len(source)
    log_p, state = model.start(source, mask, torch.full((B,), end, device=source.device))
    scores, token = log_p.topk(beams)  # (B, beams)
    sentence = torch.arange(B, device=source.device).unsqueeze(1)  # (B, 1)
    state = rows_of(state, sentence.expand(B, beams).flatten())
    ids = token.unsqueeze(-1)  # (B, beams, T)
    while ids.shape[-1] < longest and not (token == end).all():
        log_p, state = model.step(state, token.flatten())
        log_p = log_p.view(B, beams, -1)
        ended = (token == end).unsqueeze(-1)
        stay = torch.full_like(log_p, -math.inf)
        stay[..., end] = 0.0  # a finished prefix goes on with `end`, at no cost
        scores = scores.unsqueeze(-1) + torch.where(ended, stay, log_p)
        scores, best = scores.flatten(1).topk(beams)  # (B, beams)
        parent = best // log_p.shape[-1]
        token = best % log_p.shape[-1]
        ids = torch.cat([ids[sentence, parent], token.unsqueeze(-1)], dim=-1)
        state = rows_of(state, (sentence * beams + parent).flatten())
    lengths = ((ids != end).sum(dim=-1) + 1).clamp(max=ids.shape[-1])  # counting `end`, if reached
    best = (scores / lengths).argmax(dim=1)
    return ids[sentence.squeeze(1), best]


class Translation(Task):
    """Multi30k's image descriptions, English to German, measured by BLEU."""

    def __init__(self, s):
        self.settings = s
        folder = fetch("translation", s)
        train = self.read(folder, "train")
        self.tokenizer = new_tokenizer(
            "bpe", s.vocab_size, [text for pair in train for text in pair]
        )
        self.train = self.examples(train)
        self.test = self.examples(self.read(folder, "test_2016_flickr"))

    def read(self, folder: Path, part: str) -> list[tuple[str, str]]:
        """Read pairs of sentences from two files with equally many lines."""
        texts = []
        for language in ("en", "de"):
            path = folder / f"{part}.lc.norm.tok.{language}"
            if not path.exists():
                raise UserError(
                    f"{path} is missing; --source takes the folder with Multi30k's files"
                )
            texts.append(decode(path.read_bytes(), str(path)).splitlines())
        english, german = texts
        if len(english) != len(german) or not english:
            raise UserError(
                f"{folder} has {len(english)} lines of {part} in English, {len(german)} in German; "
                "give as many of both"
            )
        return [*zip(english, german, strict=True)]

    def examples(self, pairs: list[tuple[str, str]]) -> list[Example]:
        end = self.tokenizer.end_of_text
        ids = [
            [np.array([*self.tokenizer.encode(text), end]) for text in (english, german)]
            for english, german in pairs
        ]
        return [Example(english, german) for english, german in ids]

    def new_model(self) -> Translator:
        return Translator(self.settings, self.tokenizer.size)

    def new_baseline(self, ffn_size: int) -> nn.Module:
        return TransformerTranslator(self.settings, self.tokenizer.size, ffn_size)

    def limit(self, length: int) -> int:
        """Return how many tokens the translation of `length` tokens may have."""
        return 2 * length + 10

    def loss(self, model: nn.Module, examples: list[Example]) -> Tensor:
        """Return the cross-entropy of the targets, with label smoothing 0.1."""
        device = device_of(model)
        source, mask = pad([example.inputs for example in examples])
        target, _ = pad([example.target for example in examples], value=-100)
        before = F.pad(target[:, :-1], (1, 0), value=self.tokenizer.end_of_text).clamp(min=0)
        logits = model(source.to(device), mask.to(device), before.to(device)).float()
        return F.cross_entropy(
            logits.flatten(0, 1), target.flatten().to(device), label_smoothing=0.1
        )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the BLEU of the test sentences, by greedy search and by beam search."""
        found = {"BLEU, greedy": self.bleu(model, 1)}
        if self.settings.beams > 1:
            found[f"BLEU, {self.settings.beams} beams"] = self.bleu(model, self.settings.beams)
        return found

    def bleu(self, model: nn.Module, beams: int) -> float:
        device = device_of(model)
        end = self.tokenizer.end_of_text
        found = []
        references = []
        for some in batches(self.test, self.settings.positions // beams):
            source, mask = pad([example.inputs for example in some])
            longest = self.limit(source.shape[1])
            ids = beam_search(model, source.to(device), mask.to(device), end, beams, longest)
            found += [self.text(row) for row in ids.tolist()]
            references += [self.text(example.target.tolist()) for example in some]
        # The text is tokenized already; sacrebleu must not do it again.
        return sacrebleu.corpus_bleu(found, [references], tokenize="none", force=True).score

    def text(self, ids: list[int]) -> str:
        end = self.tokenizer.end_of_text
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def save(self, model: Translator, folder: Path):
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)


# ------------------------------------------------------------------------------------------- masks


class Masks(Task):
    """Masked language modelling: predict masked tokens from the text on both sides."""

    window = 256  # tokens

    def __init__(self, s):
        self.settings = s
        text = {"dataset": s.dataset, "source": s.source, "data_dir": s.data_dir}
        text.update(train_split="train", val_split="val", tokenizer="bpe", vocab_size=s.vocab_size)
        with train.find_data(argparse.Namespace(**text)) as folder:
            self.tokenizer = load_tokenizer(folder).with_mask()
            corpus = train.Corpus(folder, self.tokenizer, self.window, s.seed)
            self.train = self.cut(corpus.ids("train").numpy())
            self.test = self.cut(corpus.ids("val").numpy())

    def cut(self, ids: np.ndarray) -> list[Example]:
        starts = range(0, len(ids), self.window)
        return [Example(ids[start : start + self.window]) for start in starts]

    def new_model(self) -> MegaForMaskedLM:
        return MegaForMaskedLM(new_config(self.settings, self.tokenizer.size))

    def new_baseline(self, ffn_size: int) -> nn.Module:
        return TransformerEncoder(self.settings, self.tokenizer.size, ffn_size)

    def outputs(self, model: nn.Module, examples: list[Example], generator=None):
        """Mask some tokens; return their logits (M, vocabulary) and ids (M)."""
        device = device_of(model)
        ids, mask = pad([example.inputs for example in examples])
        hidden = mask & (torch.rand(ids.shape, generator=generator) < self.settings.masked)
        seen = ids.masked_fill(hidden, self.tokenizer.mask)
        logits = model(seen.to(device), mask.to(device)).logits
        return logits[hidden.to(device)].float(), ids[hidden].to(device)

    def loss(self, model: nn.Module, examples: list[Example]) -> Tensor:
        logits, tokens = self.outputs(model, examples)
        return F.cross_entropy(logits, tokens, reduction="sum") / max(len(tokens), 1)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the percentage of masked tokens predicted correctly, and their perplexity."""
        generator = torch.Generator().manual_seed(0)  # the same masks for all models
        right = 0
        nats = 0.0
        total = 0
        for some in batches(self.test, self.settings.positions):
            logits, tokens = self.outputs(model, some, generator)
            right += (logits.argmax(dim=-1) == tokens).sum().item()
            nats += F.cross_entropy(logits, tokens, reduction="sum").item()
            total += len(tokens)
        total = max(total, 1)  # a tiny text may have no mask
        return {"accuracy": 100 * right / total, "perplexity": math.exp(min(nats / total, 700))}

    def save(self, model: MegaForMaskedLM, folder: Path):
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)  # for sample.py --task fill-mask


# -------------------------------------------------------------------------------- the Transformer


HEADS = 4


class TransformerEncoder(nn.Module):
    """torch's encoder with sinusoidal positions and the interface of MEGA's heads.

    Its logits are those of `classes` classes, from the mean over positions, or, with classes=0, of
    tokens at each position.
    """

    def __init__(self, s, vocabulary: int, ffn_size: int, classes: int = 0):
        super().__init__()
        self.pool = classes > 0
        self.encoder = new_encoder(s, ffn_size)
        self.output = nn.Linear(s.n_embd, classes or vocabulary)
        initialize(self)
        self.embedding = new_embedding(vocabulary, s.n_embd)
        if not self.pool:
            self.output.weight = self.embedding.weight

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.encoder(with_positions(x), src_key_padding_mask=~attention_mask)
        if self.pool:
            shares = attention_mask / attention_mask.sum(dim=1, keepdim=True)
            x = (x * shares.unsqueeze(-1)).sum(dim=1)
        logits = self.output(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MegaOutput(loss=loss, logits=logits)


class Prefix(NamedTuple):
    """The state of a translator without a cache: all that it has read."""

    ids: Tensor
    states: Tensor
    mask: Tensor


class TransformerTranslator(nn.Module):
    """torch's encoder and decoder with sinusoidal positions and Translator's interface.

    It has no cache: each step reads the whole prefix again.
    """

    def __init__(self, s, vocabulary: int, ffn_size: int):
        super().__init__()
        self.encoder = new_encoder(s, ffn_size)
        layer = nn.TransformerDecoderLayer(s.n_embd, HEADS, ffn_size, **options_of(s))
        layer.self_attn.dropout = 0.0  # as in MEGA
        layer.multihead_attn.dropout = 0.0
        self.decoder = nn.TransformerDecoder(layer, s.n_layer, nn.LayerNorm(s.n_embd))
        self.output = nn.Linear(s.n_embd, vocabulary)
        initialize(self)
        self.embedding = new_embedding(vocabulary, s.n_embd)
        self.output.weight = self.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        return with_positions(self.embedding(ids))

    def forward(self, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        return self.decode(Prefix(target, self.encode(source, mask), mask))

    def encode(self, source: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(self.embed(source), src_key_padding_mask=~mask)

    def decode(self, prefix: Prefix) -> Tensor:
        length = prefix.ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=prefix.ids.device).triu(1)
        masks = {"tgt_mask": future, "memory_key_padding_mask": ~prefix.mask}
        return self.output(self.decoder(self.embed(prefix.ids), prefix.states, **masks))

    def start(self, source: Tensor, mask: Tensor, first: Tensor) -> tuple[Tensor, Prefix]:
        prefix = Prefix(first.unsqueeze(1), self.encode(source, mask), mask)
        return log_probabilities(self.decode(prefix)), prefix

    def step(self, prefix: Prefix, token: Tensor) -> tuple[Tensor, Prefix]:
        prefix = prefix._replace(ids=torch.cat([prefix.ids, token.unsqueeze(1)], dim=1))
        return log_probabilities(self.decode(prefix)), prefix


def new_encoder(s, ffn_size: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(s.n_embd, HEADS, ffn_size, **options_of(s))
    layer.self_attn.dropout = 0.0  # as in MEGA
    norm = nn.LayerNorm(s.n_embd)
    return nn.TransformerEncoder(layer, s.n_layer, norm, enable_nested_tensor=False)


def options_of(s) -> dict:
    return {"dropout": s.dropout, "activation": "gelu", "batch_first": True, "norm_first": True}


def initialize(model: nn.Module):
    """Re-initialise all matrices, as nn.Transformer does: torch's encoders clone one layer."""
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)


def new_embedding(vocabulary: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(vocabulary, size)
    nn.init.normal_(embedding.weight, std=size**-0.5)
    return embedding


def with_positions(x: Tensor) -> Tensor:
    """Compute sqrt(D) x + sines and cosines of the positions (Vaswani et al. 2017), (B, L, D)."""
    length, size = x.shape[1:]
    pair = torch.arange(0, size, 2, device=x.device)
    position = torch.arange(length, device=x.device).unsqueeze(1)
    angle = position * torch.exp(pair * (-math.log(10000) / size))
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    return x * math.sqrt(size) + waves


def of_size(make, parameters: int) -> nn.Module:
    """Return make(F) with the F that brings its number of parameters nearest to `parameters`."""
    one = count(make(1))
    per_unit = count(make(2)) - one
    return make(max(1 + round((parameters - one) / per_unit), 1))


# ---------------------------------------------------------------------------------------- training


TASKS = {
    "listops": ListOps,
    "digits": Digits,
    "speech": Speech,
    "translation": Translation,
    "masks": Masks,
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def table_of(model: nn.Module) -> nn.Embedding:
    """Return a model's token embedding, the first of its embeddings."""
    return next(m for m in model.modules() if isinstance(m, nn.Embedding))


def new_config(s, vocabulary: int, **more) -> MegaConfig:
    settings = {
        "vocab_size": vocabulary,
        "num_hidden_layers": s.n_layer,
        "hidden_size": s.n_embd,
        "intermediate_size": 2 * s.n_embd,
        "nffn_hidden_size": 2 * s.n_embd,
        "shared_representation_size": s.shared_size,
        "ema_projection_size": s.ema_size,
        "use_chunking": s.chunk_size > 0,
        "chunk_size": s.chunk_size or -1,
        "attention_activation": s.attention,
        "normalization_type": s.norm,
        "final_norm": True,
        "scale_embedding": True,
        "add_lm_hidden_dense_layer": False,
        "dropout_prob": s.dropout,
        "hidden_dropout_prob": s.dropout,
        "nffn_activation_dropout_prob": s.dropout,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": None,
    }
    try:
        return MegaConfig(**{**settings, **more})
    except ValueError as error:
        raise UserError(str(error)) from None


def train_model(s, task, model: nn.Module, autocast) -> tuple[int, bool]:
    """Train for max_minutes or max_iters; return the steps, and whether no signal came before."""
    optimizers = train.build_optimizers(s, model, device_of(model), torch.float32)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    highest = [group["lr"] for group in groups]
    rng = np.random.default_rng(s.seed)
    bar = ProgressBar(True, 0.0)
    start = time.perf_counter()
    step = 0
    with told_to_stop(True) as signals, bar.bar:
        while True:
            for examples in batches(task.train, s.positions, rng):
                minutes = (time.perf_counter() - start) / 60
                progress = max(minutes / s.max_minutes, step / s.max_iters)
                if progress >= 1 or signals:
                    return step, not signals
                for group, rate in zip(groups, highest, strict=True):
                    group["lr"] = rate * train.learning_rate_factor(s, progress)
                with autocast:
                    loss = task.loss(model, examples)
                if not loss.isfinite():
                    raise UserError(
                        f"the loss is {loss.item()} after {step} steps; lower --learning_rate, "
                        "--ema_learning_rate and --muon_learning_rate"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update(progress, f"step {step}, loss {loss.item():.3f}")


def run_task(name: str, s):
    """Read the data, train, measure and save."""
    keep_big_blocks()
    if s.threads:
        torch.set_num_threads(s.threads)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    autocast = make_autocast(device, dtype)
    folder = Path(s.out_dir).expanduser()
    if (folder / "result.json").exists():
        raise UserError(
            f"{folder} has the result of an earlier run; delete or rename it, or choose another "
            "--seed or --out_dir"
        )
    task = TASKS[name](s)  # before a folder is made: its data may be missing
    with locked(folder, f"another run is using {folder}; choose another --out_dir"):
        torch.manual_seed(s.seed)
        model = task.new_model()
        if s.baseline:
            model = of_size(task.new_baseline, count(model))
        model.to(device)
        about = {
            "task": name,
            "model": "Transformer" if s.baseline else "MEGA",
            "parameters": count(model),
            "examples": len(task.train),
            "seed": s.seed,
            "machine": f"{device.type}, {dtype_name(dtype)}, {torch.get_num_threads()} threads",
            "settings": {n: getattr(s, n) for n in SETTINGS if n not in NOT_IN_TABLE},
        }
        print(
            f"{name}: {about['model']}, {about['parameters']:,} parameters on {device}; "
            f"{about['examples']:,} examples for training, {len(task.test):,} for the test"
        )
        start = time.perf_counter()
        steps, all_done = train_model(s, task, model, autocast)
        minutes = (time.perf_counter() - start) / 60
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"after {steps} steps weights are not finite; lower the learning rates")
        if not all_done:
            print("stopped: measuring and saving what was learned so far", flush=True)
        if not s.baseline:
            task.save(model, folder)
        with evaluating(model), torch.no_grad(), autocast:
            measured = task.measure(model)
        result = {**about, "minutes": minutes, "steps": steps, "measured": measured}
        if all_done:  # a run that was stopped leaves a model but no result
            write_whole(folder / "result.json", json.dumps(result, indent=2).encode())
    found = ", ".join(f"{what} {value:.2f}" for what, value in measured.items())
    print(f"{name}, {about['model']}, {steps:,} steps in {minutes:.1f} minutes: {found}")


def print_results(folder: Path):
    """Print a table of all folder/*/result.json; runs that differ only in the seed share a row."""
    rows = {}
    for path in sorted(folder.glob("*/result.json")):
        with reading(f"{path} is damaged"):
            result = json.loads(path.read_bytes())
            defaults = {**SETTINGS, **RECIPES[result["task"]]}
            changed = [f"--{n}={x}" for n, x in result["settings"].items() if x != defaults[n]]
            about = [result["model"], f"{result['parameters']:,}", f"{result['examples']:,}"]
            about += [result["machine"], " ".join(changed)]
            for what, value in result["measured"].items():
                run = (float(value), float(result["minutes"]), int(result["steps"]))
                rows.setdefault((result["task"], what, *about), []).append(run)
    if not rows:
        raise UserError("there is no result in this folder; python -m data.tasks digits makes one")
    print(
        "| task | measure | model | parameters | examples | machine | settings | runs | minutes "
        "| steps | mean |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for about, runs in sorted(rows.items()):
        values, minutes, steps = zip(*runs, strict=True)
        print(
            f"| {' | '.join(about)} | {len(runs)} | {np.mean(minutes):.1f} | {np.mean(steps):,.0f} "
            f"| {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}) |"
        )


# -------------------------------------------------------------------------------------------- main


RULES = (  # names, the rule in words, the rule as a function
    ("depth", "from 1 to 10", lambda x: 1 <= x <= 10),
    ("operands", "from 2 to 10", lambda x: 2 <= x <= 10),
    ("beams", "from 1 to 256", lambda x: 1 <= x <= 256),
    ("shortest expressions samples", "at least 1", lambda x: x >= 1),
    ("n_layer n_embd shared_size ema_size positions max_iters", "at least 1", lambda x: x >= 1),
    ("shared_size", "even", lambda x: x % 2 == 0),
    ("chunk_size weight_decay", "0 or more", lambda x: x >= 0),
    ("threads", "from 0 to 1024", lambda x: 0 <= x <= 1024),
    ("seed", "from 0 to 2^63 - 1", lambda x: 0 <= x < train.MOST),
    ("max_minutes learning_rate ema_learning_rate", "above 0", lambda x: x > 0),
    ("muon_learning_rate", "above 0", lambda x: x > 0),
    ("masked", "above 0 and below 1", lambda x: 0 < x < 1),
    ("dropout", "0 or more and below 1", lambda x: 0 <= x < 1),
    ("dataset", "non-empty", bool),
    ("side", "14 or 28", lambda x: x in (14, 28)),
    ("attention", f"one of {', '.join(ATTENTION_FUNCTIONS)}", lambda x: x in ATTENTION_FUNCTIONS),
    ("norm", f"one of {', '.join(NORMS)}", lambda x: x in NORMS),
    ("optimizer", "muon or adamw", lambda x: x in ("muon", "adamw")),
    ("dtype", "auto, float32 or bfloat16", lambda x: x in ("auto", "float32", "bfloat16")),
)
# Settings that don't distinguish rows of the table of results.
NOT_IN_TABLE = ("out_dir", "source", "data_dir", "baseline", "device", "dtype", "threads", "seed")


def read_settings(name: str, given: dict) -> argparse.Namespace:
    """Return a task's settings, changed by the flags."""
    for flag in given:
        owners = [owner for owner, flags in OWN.items() if flag in flags.split()]
        if owners and name not in owners:
            raise UserError(f"{name} has no setting --{flag}: it is for {', '.join(owners)}")
    usual = {setting: train.SETTINGS[setting] for setting in TRAIN_SETTINGS.split()}
    s = argparse.Namespace(**{**usual, **SETTINGS, **RECIPES[name], **given})
    for names, rule, valid in RULES:
        for setting in names.split():
            value = getattr(s, setting)
            if not valid(value):
                raise UserError(f"--{setting} must be {rule}, got {value!r}")
    if s.longest < s.shortest:
        raise UserError(f"--longest={s.longest} must be at least --shortest={s.shortest}")
    if s.baseline and s.n_embd % HEADS:
        raise UserError(f"--n_embd={s.n_embd} must be a multiple of {HEADS} for --baseline")
    if not s.out_dir:
        model = "-baseline" if s.baseline else ""
        s.out_dir = f"out-{name}{model}-{s.seed}"
    return s


def main(arguments: list[str] | None = None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--results"]:
        print_results(Path("."))
        return
    name, *flags = arguments or [""]
    if name in ("-h", "--help"):
        flags = [name]
    elif name not in TASKS:
        raise UserError(f"the first argument must be {', '.join(TASKS)} or --results, got {name!r}")
    given = read_flags(flags, __doc__, Path(__file__), SETTINGS, {})
    run_task(name, read_settings(name, given))


if __name__ == "__main__":
    run(main)
