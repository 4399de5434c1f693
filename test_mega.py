"""The laws that mega.py, train.py, sample.py, data/prepare.py and the lecture must obey.

    pytest                                   # all: five minutes on two slow cores, no network
    pytest -m "not slow"                     # one: without what starts processes or trains for long
    pytest test_mega.py::TestEMA             # one room
    HYPOTHESIS_PROFILE=thorough pytest       # 20 times the examples

It says at its end which tests it left out, and why: those beside transformers need it installed.

Laws are checked by Hypothesis on random shapes and values, in fp64 where equality is meant exactly;
in fp32 a tolerance is stated. Helpers and strategies come first, then a class for each room:

    TestConfig       mega.py, 1: settings and their rules
    TestEMA          2: the modes of the moving average are one map
    TestAttention    3: chunks, masks, biases, the layer and cross-attention equal their equations
    TestModel        4, 5: norms, dropout, blocks, the bare model
    TestCache        5: cached equals uncached over any split
    TestHeads        6: losses, pooling, the loss without logits
    TestGenerate     7
    TestCheckpoints  8: files both ways, the hub, resizing; mega.py alone
    TestPrepare      data/prepare.py
    TestTrain        train.py: windows, steps, resume, kills, processes, evaluation
    TestSample       sample.py
    TestTasks        each head learns what it is for
    TestPaperTasks   data/tasks.py
    TestHuggingFace  equal to transformers 4.40.2
    TestFaults       faults of earlier implementations, as data/lecture/checkpoints.md numbers them
    TestLecture      README.md and data/lecture
"""

import argparse
import ast
import copy
import dataclasses
import datetime
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import unittest.mock
import warnings
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mega
import sample
import train
from data import common, machine, prepare, tasks
from data.lecture import compare, draw, exercises, experiments, solutions, variants
from data.lecture import learn as learning
from mega import (
    ACTIVATIONS,
    ATTENTION_FUNCTIONS,
    NORMS,
    DampedEMA,
    GatedCrossAttention,
    MegaConfig,
    MegaForCausalLM,
    MegaModel,
    MovingAverageGatedAttention,
    ema_blockwise,
    ema_direct,
    ema_fft,
    ema_kernel,
    ema_recurrent,
)

PROJECT = Path(__file__).resolve().parent
slow_is_fine = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=50, derandomize=True, **slow_is_fine)
settings.register_profile("thorough", max_examples=1000, derandomize=True, **slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
seeds = st.integers(0, 2**31)
torch.set_num_threads(1)  # more make such small tensors slower, many times so on a busy machine
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow  # starts processes, or trains for some seconds


@pytest.fixture(autouse=True)
def seeded():
    """What a test does not depend on the tests before it."""
    torch.manual_seed(0)


def randn(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10):
    """Equal up to `tolerance` of the largest number, and of 1."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    scale = 1 + b.abs().max().item() if b.numel() else 1
    error = (a - b).abs().max().item() if b.numel() else 0
    assert error <= tolerance * scale, f"differ by {error:.2e} of {scale:.2e}"


def small_config(**changes) -> MegaConfig:
    """A decoder of two tiny layers without dropout."""
    values = {
        "vocab_size": 23,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 12,
        "nffn_hidden_size": 10,
        "ema_projection_size": 3,
        "shared_representation_size": 6,
        "max_positions": 64,
        "is_decoder": True,
        "bidirectional": False,
        "normalization_type": "layernorm",
        "dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "nffn_activation_dropout_prob": 0.0,
    }
    return MegaConfig(**values | changes)


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In fp64 and eval mode, with parameters large enough for every one of them to matter."""
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        parameter.data += 0.5 * randn(seed + i, *parameter.shape)
    return module


def causal_lm(seed: int = 0, **changes) -> MegaForCausalLM:
    torch.manual_seed(seed)
    return randomized(MegaForCausalLM(small_config(**changes)), seed)


@functools.cache
def shared_lm(**changes) -> MegaForCausalLM:
    """One model for all examples of a test, which must not change it."""
    return causal_lm(**changes)


def token_ids(seed: int, rows: int, length: int, vocab_size: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


chunkings = st.sampled_from([{}, *({"use_chunking": True, "chunk_size": c} for c in (1, 3, 4, 8))])
attentions = st.sampled_from(sorted(ATTENTION_FUNCTIONS))
biases = st.sampled_from(["rotary", "simple"])
BAD_CONFIGS = [
    {"vocab_size": 0}, {"hidden_size": -4}, {"num_hidden_layers": 2.0}, {"hidden_size": "8"},
    {"intermediate_size": True}, {"ema_projection_size": 0}, {"shared_representation_size": 5},
    {"use_chunking": True}, {"use_chunking": True, "chunk_size": 0}, {"use_chunking": 1},
    {"truncation": 0}, {"truncation": -3}, {"normalization_type": "groupnorm"},
    {"activation": "selu"}, {"attention_activation": "sigmoid"}, {"dropout_prob": 1.0},
    {"dropout_prob": -0.1}, {"hidden_dropout_prob": "0.1"}, {"classifier_dropout": 2},
    {"attention_probs_dropout_prob": math.nan}, {"initializer_range": -1.0},
    {"ema_beta_range": math.inf}, {"relative_positional_bias": "rope"}, {"max_positions": 0},
    {"is_decoder": True, "bidirectional": True}, {"is_decoder": False, "add_cross_attention": True},
    {"num_labels": 3, "id2label": {0: "no", 1: "yes"}}, {"id2label": ["no", "yes"]},
    {"pad_token_id": 99}, {"pad_token_id": 23}, {"chunk_size": "8"}, {"pad_token_id": -1},
    {"eos_token_id": 1.5}, {"num_labels": 0},
    {"problem_type": "ranking"}, {"bidirectional": None}, {"nffn_hidden_size": None},
    {"final_norm": True, "normalize_before_ffn": False},
    {"final_norm": True, "normalize_before_mega": False}, {"activation": ["silu"]},
    {"relative_positional_bias": "simple", "use_chunking": True, "chunk_size": 65},
    {"id2label": {"no": 0, "yes": 1}}, {"id2label": {None: "no", 1: "yes"}},
    {"id2label": {"²": "no", "1": "yes"}}, {"num_labels": 10**9}, {"type_vocab_size": 10**9},
    {"num_hidden_layers": 10**9}, {"hidden_size": 10**18}, {"vocab_size": 1 << 62},
    {"chunk_size": 10**30}, {"ema_beta_range": 10**30}, {"initializer_range": 1e39},
]  # fmt: skip


@st.composite
def ema_inputs(draw, longest: int = 70, extreme: bool = True):
    """x (B, L, D) and the coefficients u, q, g (D, N) of random logits, in fp64."""
    B, L, D, N = (draw(st.integers(1, top)) for top in (3, longest, 4, 4))
    seed, scale = draw(seeds), draw(st.sampled_from([0.2, 1, 4] + [100] * extreme))
    p, decay = (torch.sigmoid(scale * randn(seed + i, D, N)) for i in (1, 2))
    u, g = p * randn(seed + 3, D, N), randn(seed + 4, D, N) / math.sqrt(N)
    x = randn(seed, B, L, D) * draw(st.sampled_from([1e-3, 1, 100]))
    return x, u, 1 - p * decay, g


def by_definition(x, u, q, g, state=None):
    """The recurrence of the paper's equation 2 in plain loops."""
    h = torch.zeros(x.shape[0], *u.shape, dtype=x.dtype) if state is None else state.clone()
    y = torch.zeros_like(x)
    for b, t, d in itertools.product(*map(range, x.shape)):
        for n in range(u.shape[1]):
            h[b, d, n] = q[d, n] * h[b, d, n] + u[d, n] * x[b, t, d]
            y[b, t, d] += g[d, n] * h[b, d, n]
    return y, h


def gradients(function, inputs, weight):
    leaves = [t.clone().requires_grad_() for t in inputs]
    (function(*leaves) * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


def EMA_Y(mode, *arguments):
    found = mega.EMA_MODES[mode](*arguments)
    return found[0] if isinstance(found, tuple) else found


def reference_layer(layer: MovingAverageGatedAttention, x, mask=None):
    """The layer from the paper's equations, position by position, in loops."""
    config = layer.config
    D, V, Z = config.hidden_size, config.intermediate_size, config.shared_representation_size
    B, L, _ = x.shape
    mask = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    act = ACTIVATIONS[config.activation]
    norm = layer.norm.norm
    n = norm(x) if config.normalize_before_mega else x
    ema = layer.ema_gate
    u, q, g = ema.coefficients()
    state, m = torch.zeros(B, *u.shape).double(), torch.zeros_like(n)
    for t in range(L):
        state = q * state + u * (n[:, t] * mask[:, t, None])[..., None]
        m[:, t] = F.silu((g * state).sum(-1) + ema.residual_weight * n[:, t])
    v = act(n @ layer.v_proj.weight.T + layer.v_proj.bias)
    base = m @ layer.mx_proj.weight.T + layer.mx_proj.bias
    update, hx = base[..., :D].sigmoid(), base[..., D + Z + V :]
    z, reset = F.silu(base[..., D : D + Z]), F.silu(base[..., D + Z : D + Z + V])
    queries = z * layer.qk_weight[0] + layer.qk_bias[0]
    keys = z * layer.qk_weight[1] + layer.qk_bias[1]
    chunk = config.chunk_size if config.use_chunking else L
    o = torch.zeros(B, L, V).double()
    for b, i in itertools.product(range(B), range(L)):
        first = i // chunk * chunk
        last = i if config.is_decoder else min(first + chunk, L) - 1
        seen = [j for j in range(first, last + 1) if mask[b, j]]
        if not seen:
            continue
        scores = torch.stack([queries[b, i] @ keys[b, j] for j in seen])
        bias = torch.stack([reference_bias(layer, j - i, L) for j in seen])
        if config.attention_activation == "softmax":
            weights = (scores / math.sqrt(Z) + bias).exp()
            weights = weights / weights.sum()
        else:
            scores = scores / len(seen) + bias
            if config.attention_activation == "relu2":
                weights = scores.clamp(min=0) ** 2
            else:
                weights = 0.5 * (1 + torch.erf((scores - 0.707107) / (0.282095 * math.sqrt(2))))
        o[b, i] = sum(weight * v[b, j] for weight, j in zip(weights, seen, strict=True))
    candidate = act(hx + (o * reset) @ layer.h_proj.weight.T + layer.h_proj.bias)
    y = update * candidate + (1 - update) * x
    return y if config.normalize_before_mega else norm(y)


def reference_bias(layer, distance: int, length: int) -> torch.Tensor:
    """Of a key `distance` places after its query (before it, if negative)."""
    config = layer.config
    if config.relative_positional_bias == "simple":
        centre = (config.chunk_size if config.use_chunking else config.max_positions) - 1
        return layer.rel_pos_bias.rel_pos_bias[centre + distance]
    half = config.shared_representation_size // 2
    alpha, b = layer.rel_pos_bias.alpha[0], layer.rel_pos_bias.b_param[0]
    alpha, b = torch.complex(alpha[:half], alpha[half:]), torch.complex(b[:half], b[half:])
    angle = distance * torch.tensor([10000 ** (-k / half) for k in range(half)]).double()
    return (alpha.conj() * b * torch.exp(1j * angle)).real.sum()


class LowRank(torch.nn.Module):
    """An adapter in an output layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2)
        self.up = torch.nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def decoder_config(**changes) -> MegaConfig:
    return small_config(**{"add_cross_attention": True, "num_hidden_layers": 1, **changes})


def reference_cross(layer: GatedCrossAttention, x, source, mask, start: int = 0):
    """The cross-attention in loops, from the arithmetic of the paper's code."""
    config, (B, L, D), S = layer.config, x.shape, source.shape[1]
    act = ACTIVATIONS[config.activation]
    n = layer.norm.norm(x) if config.normalize_before_mega else x
    k, v = layer.k_proj(source), act(layer.v_proj(source))
    projected = layer.q_proj(n)
    update, reset = projected[..., :D].sigmoid(), F.silu(projected[..., D : 2 * D])
    q, o = projected[..., 2 * D :], torch.zeros(B, L, D).double()
    for b, i in itertools.product(range(B), range(L)):
        seen = [j for j in range(S) if mask is None or mask[b, j]]
        if not seen:
            continue
        bias = torch.stack([reference_bias(layer, j - (start + i), S) for j in seen])
        scores = torch.stack([q[b, i] @ k[b, j] for j in seen])
        if config.attention_activation == "softmax":
            weights = (scores / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        else:
            weights = ACTIVATIONS[config.attention_activation](scores / len(seen) + bias)
        o[b, i] = sum(weight * v[b, j] for weight, j in zip(weights, seen, strict=True))
    candidate = act(layer.h_proj(o * reset))
    y = update * candidate + (1 - update) * x
    return y if config.normalize_before_mega else layer.norm.norm(y)


def head_model(head, **changes):
    return randomized(head(small_config(**{"is_decoder": False, **changes})))


ALL_HEADS_CONFIG = {"is_decoder": False, "add_token_type_embeddings": True}
HEADS = [
    mega.MegaModel,
    mega.MegaForCausalLM,
    mega.MegaForMaskedLM,
    mega.MegaForSequenceClassification,
    mega.MegaForMultipleChoice,
    mega.MegaForTokenClassification,
    mega.MegaForQuestionAnswering,
]
quiet = pytest.mark.filterwarnings("ignore:.*expects is_decoder=")


def same_weights(a: torch.nn.Module, b: torch.nn.Module, but: str = "") -> bool:
    """Whether the parameters and buffers of b, but those named, are a's in fp32."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(ours[n].float(), theirs[n].float()) for n in ours if n not in but.split()
    )


def write_weights(folder: Path, weights: dict, kind: str):
    """The weights in another form: one .bin, or shards of either kind with an index."""
    (folder / "model.safetensors").unlink()
    names, ending = sorted(weights), "safetensors" if "safetensors" in kind else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    parts = [names] if kind == "bin" else [names[::2], names[1::2]]
    files = [f"{stem}-{i}-of-{len(parts)}.{ending}" for i in range(len(parts))]
    files = ["pytorch_model.bin"] if kind == "bin" else files
    for file, part in zip(files, parts, strict=True):
        tensors = {name: weights[name].contiguous().clone() for name in part}
        if ending == "bin":
            torch.save(tensors, folder / file)
        else:
            safetensors.torch.save_file(tensors, folder / file)
    if kind != "bin":
        table = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        index = json.dumps({"metadata": {}, "weight_map": table})
        (folder / f"{stem}.{ending}.index.json").write_text(index)


MISFITS = {
    "vocab_size": (30, "vocab_size"),
    "hidden_size": (10, "hidden_size"),
    "intermediate_size": (14, "intermediate_size"),
    "ema_projection_size": (4, "ema_projection_size"),
    "shared_representation_size": (4, "shared_representation_size"),
    "nffn_hidden_size": (11, "nffn_hidden_size"),
    "max_positions": (50, "max_positions"),
    "type_vocab_size": (9, "type_vocab_size"),
    "num_labels": (5, "num_labels"),
    "num_hidden_layers": (3, r"mega.layers.2.\S+ is missing"),
    "relative_positional_bias": ("rotary", r"rel_pos_bias.alpha is missing"),
    "normalization_type": ("scalenorm", r"norm.scalar is missing"),
}


class Hub(http.server.ThreadingHTTPServer):
    """A local hub: the files of a folder at /owner/name/resolve/REVISION/; what it was asked."""

    def __init__(self, folder: Path):
        self.asked, self.broken, self.moved, self.secret, self.page = [], False, None, None, False

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(handler):
                handler.do_GET(body=False)

            def do_GET(handler, body=True):
                token = handler.headers["Authorization"]
                self.asked.append((handler.path, token))
                found = re.fullmatch(
                    r"(/elsewhere)?/owner/name/resolve/(\w+)/([\w.-]+)", handler.path
                )
                if self.page:
                    return handler.answer(200, b"<html>log in</html>", body, hub=False)
                if not found:
                    return handler.answer(404, body=body, error="RepoNotFound")
                away, revision, name = found.groups()
                if self.secret and token != f"Bearer {self.secret}" and not away:
                    return handler.answer(401, body=body)
                path = folder / name
                if revision not in ("main", "v2") or not path.is_file():
                    return handler.answer(404, body=body, error="EntryNotFound")
                if self.moved and not away:
                    url = f"{self.moved}/elsewhere{handler.path}"
                    return handler.answer(302, path.read_bytes(), False, location=url)
                return handler.answer(200, path.read_bytes(), body)

            def answer(
                handler, status, content=b"", body=True, location=None, error=None, hub=True
            ):
                handler.send_response(status)
                handler.send_header("Content-Length", "0" if location else str(len(content)))
                if hub:
                    handler.send_header("X-Repo-Commit", "c" * 40)
                    digest = hashlib.sha1(content).hexdigest()
                    handler.send_header("ETag", f'"{digest}"')
                    handler.send_header("X-Linked-Etag", f'"{digest}"')
                    handler.send_header("X-Linked-Size", str(len(content)))
                if error:
                    handler.send_header("X-Error-Code", error)
                if location:
                    handler.send_header("Location", location)
                handler.end_headers()
                if body:
                    handler.wfile.write(content[: len(content) // 2] if self.broken else content)

            def log_message(handler, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tmp_path):
    """A hub with one checkpoint, owner/name, and a function to load it with an empty cache."""
    causal_lm().save_pretrained(tmp_path / "served")
    with Hub(tmp_path / "served") as server:
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"PYTHONPATH": str(PROJECT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"}

        def load(*calls, **more):
            """What from_pretrained does with these arguments, a line each: "loaded" and a sum, or
            the error's kind and text.
            """
            code = "import mega, warnings\nwarnings.simplefilter('ignore')\n"
            for call in calls or ['"owner/name"']:
                code += (
                    "try:\n"
                    f"    model = mega.MegaForCausalLM.from_pretrained({call})\n"
                    "    total = sum(p.double().sum().item() for p in model.parameters())\n"
                    "    print('loaded', total)\n"
                    "except (OSError, ValueError) as error:\n"
                    "    print(type(error).__name__, error)\n"
                )
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, env=environment | more,
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        server.load = load
        yield server
        server.shutdown()


def words(seed: int, count: int) -> str:
    """Lines of English-like text."""
    generator = np.random.default_rng(seed)
    known = [
        "the",
        "a",
        "model",
        "moving",
        "average",
        "of",
        "gated",
        "attention",
        "and",
        "chunk",
        "decays",
        "slowly",
        "é",
        "猫",
        "42",
        ",",
    ]
    lines = [" ".join(generator.choice(known, 9)) + ".\n" for _ in range(count)]
    return "".join(lines)


def wiki(seed: int) -> str:
    return "".join(f" = Title {i} = \n \n = = Part = = \n{words(seed + i, 12)}" for i in range(3))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of the test's own."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def corpus(tmp_path):
    """A small WikiText in the layout of its zip."""
    folder = tmp_path / "wiki"
    folder.mkdir()
    for seed, split in enumerate(("train", "valid", "test")):
        (folder / f"wiki.{split}.raw").write_text(wiki(10 * seed), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bpe():
    return prepare.new_tokenizer("bpe", 300, [words(0, 200)])


class Server(http.server.ThreadingHTTPServer):
    """A local host of one zip, in several states of health."""

    def __init__(self, content: bytes):
        self.agents = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.agents.append(handler.headers["User-Agent"])
                handler.send_response(404 if "missing" in handler.path else 200)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                short = len(content) // 2 if "half" in handler.path else len(content)
                handler.wfile.write(content[:short])

            def log_message(handler, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


@pytest.fixture
def server(corpus, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "served"), "zip", corpus)
    with Server(Path(archive).read_bytes()) as server:
        yield server
        server.shutdown()


ROBERTA_WORDS = [
    "the",
    "of",
    "paris",
    "mod",
    "el",
    "is",
    "<mask>",
    "</s>",
    "é",
    "猫",
    "",
    "'s",
    "12",
]


def roberta_files(folder: Path, texts: str = "the model of paris is the capital of france 1234"):
    """A small RoBERTa vocabulary, vocab.json and merges.txt, as its tokenizer writes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    words = ["".join(letters[b] for b in f" {w}".encode()) for w in texts.split()]
    merges = []
    for word in dict.fromkeys(words):
        parts = list(word)
        while len(parts) > 1:
            for left, right in merges:
                for i in range(len(parts) - 1):
                    if parts[i : i + 2] == [left, right]:
                        parts[i : i + 2] = [left + right]
            if len(parts) > 1:
                merges.append((parts[0], parts[1]))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *reversed(letters.values())]
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokens


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    tokens = roberta_files(folder)
    codec = prepare.load_roberta(folder / "vocab.json", folder / "merges.txt")
    return folder, tokens, codec


TINY = [
    "--n_layer=1",
    "--n_embd=16",
    "--intermediate_size=16",
    "--nffn_hidden_size=16",
    "--shared_size=8",
    "--ema_size=2",
    "--chunk_size=8",
    "--block_size=20",
    "--batch_size=2",
    "--vocab_size=300",
    "--max_iters=6",
    "--max_minutes=0",
    "--evaluations=2",
    "--sample_tokens=5",
    "--dropout=0.2",
    "--hidden_dropout=0.2",
    "--threads=1",
]


def pickled(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipfile_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def call(main, *arguments):
    """What `python script.py arguments` does, here: main's exit code, 0 if it returns."""
    old, sys.argv = sys.argv, ["script.py", *map(str, arguments)]
    try:
        common.run(main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = old


@pytest.fixture
def trained(corpus, data, tmp_path):
    """A tiny checkpoint in tmp_path/out."""
    arguments = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path / 'out'}"]
    assert call(train.main, *arguments) == 0
    return tmp_path / "out", arguments


def training(*arguments) -> train.Training:
    """A training as train.main makes it, without its lock on out_dir."""
    s = train.read_settings([str(argument) for argument in arguments])
    return train.Training(s, train.Distributed(s.device))


def nats_of_all(model, ids, mask=None):
    """Nats of each of ids (T) but the first, by one pass over the whole row."""
    logp = model(ids[None, :-1], attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
    return -logp.gather(-1, ids[1:, None]).squeeze(-1)


def same(a, b) -> bool:
    """Equal, bit by bit, in all that they hold."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint_of(out) -> dict:
    """What a checkpoint holds, but for the clock's part in it."""
    state = torch.load(out / "last.pt", weights_only=True)
    clock = ("seconds", "tokens_per_second")
    state["log"] = [{k: v for k, v in row.items() if k not in clock} for row in state["log"]]
    return {name: value for name, value in state.items() if name != "seconds"}


@pytest.fixture
def masked(tmp_path, roberta):
    """A folder with a masked language model and RoBERTa's kind of vocabulary."""
    folder, tokens, codec = roberta
    config = small_config(is_decoder=False, bidirectional=True, vocab_size=len(tokens) + 3)
    model = randomized(mega.MegaForMaskedLM(config)).float()
    model.save_pretrained(tmp_path / "masked")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / "masked" / name)
    return tmp_path / "masked", model, codec


# A hundred ways to be wrong: script and flags, or files, and a part of the sentence that says so.
# out/ has a checkpoint and its training, wiki/ a WikiText; here/ is the folder of the files below.
ZIP = zipfile_of({"train.txt": b"the model " * 200, "valid.txt": b"the model " * 20})
WRONG_FLAGS = {
    "train": {
        "--learnin_rate=1": "did you mean --learning_rate?",
        "--zzz 3": "there is no setting --zzz",
        "stray": "there is no setting stray",
        "--max_iters=ten": "must be an integer, got 'ten'",
        "--max_iters=0": "--max_iters must be at least 1, got 0",
        "--max_iters": "expected one argument",
        "--learning_rate=fast": "must be a number, got 'fast'",
        "--learning_rate=-1": "--learning_rate must be above 0, got -1.0",
        "--learning_rate=nan": "--learning_rate must be above 0, got nan",
        "--muon_learning_rate=inf": "--muon_learning_rate must be above 0, got inf",
        "--min_lr_fraction=2": "--min_lr_fraction must be 0 or more and below 1, got 2.0",
        "--warmup_fraction=-0.1": "--warmup_fraction must be 0 or more and below 1, got -0.1",
        "--dropout=1": "--dropout must be 0 or more and below 1, got 1.0",
        "--momentum=1": "--momentum must be 0 or more and below 1, got 1.0",
        "--beta2=1.5": "--beta2 must be 0 or more and below 1, got 1.5",
        "--weight_decay=-1": "--weight_decay must be 0 or more, got -1.0",
        "--grad_clip=nan": "--grad_clip must be 0 or more, got nan",
        "--max_minutes=inf": "--max_minutes must be 0 or more, got inf",
        "--max_minutes=-3": "--max_minutes must be 0 or more, got -3.0",
        "--optimizer=sgd": "--optimizer must be one of muon, adamw, got 'sgd'",
        "--batch_size=2.5": "must be an integer, got '2.5'",
        "--batch_size=0": "--batch_size must be at least 1, got 0",
        "--gradient_accumulation_steps=0": "must be at least 1, got 0",
        "--block_size=100000": "give more text or lower --block_size",
        "--chunk_size=-4": "--chunk_size must be 0 or more, got -4",
        "--n_layer=0": "--n_layer must be at least 1, got 0",
        "--n_embd=-16": "--n_embd must be at least 1, got -16",
        "--ema_size=0": "--ema_size must be at least 1, got 0",
        "--shared_size=5": "shared_representation_size must be even",
        "--attention=sigmoid": "attention_activation must be one of softmax",
        "--evaluations=0": "--evaluations must be at least 1, got 0",
        "--learning_rate=0": "--learning_rate must be above 0, got 0.0",
        "--hidden_dropout=1": "--hidden_dropout must be 0 or more and below 1, got 1.0",
        "--save_interval=-1": "--save_interval must be at least 1, got -1",
        "--contexts=all": "--contexts must be carried, sliding or window lengths",
        "--contexts=": "--contexts must be carried, sliding or window lengths",
        "--contexts=0,carried": "--contexts must be carried, sliding or window lengths",
        "--sample_tokens=-1": "--sample_tokens must be 0 or more, got -1",
        "--compile=maybe": "must be True or False, got 'maybe'",
        "--lr=1": "did you mean --learning_rate?",
        "--epochs=3": "did you mean --max_iters or --max_minutes?",
        "--source= --dataset=wikitext2": "wikitext2 does not exist; did you mean wikitext-2?",
        "--learning_rate=1e39": "--learning_rate must be above 0, got 1e+39",
        "--weight_decay=1e39": "--weight_decay must be 0 or more, got 1e+39",
        "--threads=100000": "--threads must be at most 1024, got 100000",
        "--n_embd=1000000000000000000": "a step would need at least",
        "--n_layer=1000000000": "a step would need at least",
        "--ema_size=100000000000": "a step would need at least",
        "--batch_size=1000000000": "a step would need at least",
        "--gradient_accumulation_steps=1000000000": "must be at most 65536, got 1000000000",
        "--max_iters=9999999999999999999999": "--max_iters must be at least 1",
        "--chunk_size=1000000000000": "chunk_size must be at most 16777216, got 1000000000000",
        "--device=--": "-- can't be the value of a flag, got --device=--",
        "--out_dir=-- --resume": "-- can't be the value of a flag",
        "--dtype=fp8": "--dtype must be one of auto, float32, bfloat16, got 'fp8'",
        "--device=abacus": "--device=abacus can't be used here",
        "--device=": "--device= can't be used here",
        "--threads=-2": "--threads must be 0 or more, got -2",
        "--seed=-1": "--seed must be 0 or more, got -1",
        "--seed=99999999999999999999": "--seed must be 0 or more, got 99999999999999999999",
        "--tokenizer=words": "--tokenizer must be one of auto, bpe, bytes, gpt2, got 'words'",
        "--eval_chunk_size=-1": "--eval_chunk_size must be 0 or more, got -1",
        "--vocab_size=3": "vocab_size must be from 257",
        "--vocab_size=99999999": "vocab_size must be from 257",
        "--train_split=best": "a split must be one of train, val, test, got 'best'",
        "--source=nowhere": "nowhere does not exist; give a text file, a zip or a folder",
        "--source=http://127.0.0.1:9/no.zip": "http://127.0.0.1:9/no.zip could not be downloaded",
        "--out_dir=": "--out_dir must be non-empty, got ''",
        "--dataset=": "--dataset must be non-empty, got ''",
        "--dataset=no_such_file.txt --source=": "no_such_file.txt does not exist",
        "--dataset=pydocs": "pydocs has no source; give",
        "--eval_only --out_dir=nowhere": "there is no checkpoint in nowhere",
        "--resume --out_dir=nowhere": "there is nothing to resume: nowhere has no last.pt",
        "--resume --n_embd=24 --beta2=0.5": "n_embd was 16, not 24; beta2 was 0.95, not 0.5",
        "--resume --vocab_size=320": "vocab_size was 300, not 320",
        "--resume --train_split=test": "train_split was train, not test",
        "--eval_only --vocab_size=320": "vocab_size was 300, not 320",
    },
    "sample": {
        "--model nowhere": "there is no checkpoint in nowhere (nowhere has no config.json)",
        "--model=": "there is no checkpoint in  (",
        "--temperature=-1": "--temperature must be finite and 0 or more, got -1",
        "--temperature=nan": "--temperature must be finite and 0 or more, got nan",
        "--temperature=hot": "invalid float value: 'hot'",
        "--top_k=0": "--top_k must be at least 1, got 0",
        "--top_k=1.5": "invalid int value: '1.5'",
        "--top_p=2": "--top_p must be above 0 and at most 1, got 2.0",
        "--top_p=nan": "--top_p must be above 0 and at most 1, got nan",
        "--max_new_tokens=-1": "--max_new_tokens must be 0 or more, got -1",
        "--num_samples=0": "--num_samples must be at least 1, got 0",
        "--seed=-4": "--seed must be from 0",
        "--seed=9223372036854775808": "--seed must be from 0",
        "--device=abacus": "--device=abacus can't be used here",
        "--task=translate": "invalid choice: 'translate'",
        "--task=fill-mask": "--task fill-mask needs a MegaForMaskedLM; "
        "this model is a MegaForCausalLM",
        "--promt=x": "unrecognized arguments: --promt=x",
        "--model=--": "-- can't be the value of a flag",
    },
    "prepare": {
        "": "the following arguments are required: dataset",
        "nowhere.txt": "nowhere.txt does not exist",
        "pydocs --source=x": "pydocs has no source",
        "pydocs --tokenizer=words": "invalid choice: 'words'",
        "pydocs --vocab_size=many": "invalid int value: 'many'",
        "wikitext-2 --source=https://127.0.0.1:9/x": "could not be downloaded",
    },
}
WRONG_TEXTS = {
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b" \n\t\n ", "blank.txt is empty"),
    "latin.txt": ("caf\xe9".encode("latin-1") * 99, "is not UTF-8: byte 0xe9 at offset 3; convert"),
    "wide.txt": ("the model ".encode("utf-16") * 99, "is not UTF-8: byte 0xff at offset 0"),
    "one_word.txt": (b"the", "one_word.txt has no 'val' split"),
    "short.txt": (b"a quick brown fox\nis it\n", "give more text or lower --block_size"),
    "torn.zip": (ZIP[: len(ZIP) // 2], "torn.zip is not a readable zip file"),
    "other.zip": (zipfile_of({"a.pdf": b"%PDF"}), "other.zip has no text files (.md, .raw"),
    "half.zip": (zipfile_of({"train.txt": b"a " * 999, "val.txt": b""}), "the val split of"),
    "folder/a.pdf": (b"%PDF", "has no text files"),
}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def changed(**values):
    return lambda old: json.dumps(json.loads(old) | values).encode()


def state_with(**values):
    def change(old: bytes) -> bytes:
        content = io.BytesIO()
        torch.save(torch.load(io.BytesIO(old), weights_only=True) | values, content)
        return content.getvalue()

    return change


def part_of_state(part, name, value):
    def change(old: bytes) -> bytes:
        state = torch.load(io.BytesIO(old), weights_only=True)
        state[part][name] = value
        return pickled(state)

    return change


def weights_with(name, change):
    def changing(old: bytes) -> bytes:
        weights = safetensors.torch.load(old)
        return safetensors.torch.save(weights | {name: change(weights[name]).contiguous()})

    return changing


EMBEDDING = "mega.embedding_layer.word_embeddings.weight"
WRONG_FILES = [  # of out/: new content, or None, or a function of the old one
    ("sample", CONFIG, b"{", "config.json can't be read"),
    ("sample", CONFIG, b"[]", "can't be read"),
    ("sample", CONFIG, b"", "can't be read"),
    ("sample", CONFIG, None, "there is no checkpoint in"),
    ("sample", CONFIG, changed(hidden_size=-3), "hidden_size must be a positive integer, got -3"),
    ("sample", CONFIG, changed(hidden_size="16"), "must be a positive integer, got '16'"),
    ("sample", CONFIG, changed(hidden_size=24), "hidden_size"),
    ("sample", CONFIG, changed(vocab_size=299), "vocab_size"),
    ("sample", CONFIG, changed(normalization_type="none"), "normalization_type must be one of"),
    ("sample", CONFIG, changed(model_type="bert"), "for a 'bert' model, not for MEGA"),
    ("sample", CONFIG, changed(architectures=["MegaForPoems"]), "is a MegaForPoems"),
    ("sample", CONFIG, changed(bidirectional=True), "is_decoder=True needs bidirectional=False"),
    ("sample", WEIGHTS, b"short", "can't be read"),
    ("sample", WEIGHTS, b"", "can't be read"),
    ("sample", WEIGHTS, None, "has no model.safetensors"),
    ("sample", WEIGHTS, lambda old: old[:-9], "can't be read"),
    ("sample", WEIGHTS, weights_with(EMBEDDING, lambda x: x[:-1]), "vocab_size"),
    ("sample", WEIGHTS, weights_with(EMBEDDING, lambda x: x * math.nan), "not finite"),
    ("sample", "tokenizer.tiktoken", b"AA== x", "damaged"),
    ("sample", "tokenizer.tiktoken", b"", "damaged"),
    ("sample", "tokenizer.tiktoken", lambda old: old[:-30], "damaged (ValueError: end_of_text"),
    ("sample", "tokenizer_meta.json", None, "has no tokenizer"),
    ("sample", "tokenizer_meta.json", b"[1]", "damaged"),
    ("sample", "tokenizer_meta.json", changed(pattern="("), "damaged"),
    ("sample", "tokenizer_meta.json", changed(pattern=""), "damaged"),
    ("sample", "tokenizer_meta.json", changed(pattern="[a-z]+"), "damaged"),
    ("sample", "tokenizer_meta.json", changed(end_of_text="x"), "damaged"),
    ("sample", "tokenizer_meta.json", changed(end_of_text=7), "they do not belong together"),
    ("sample", "tokenizer_meta.json", changed(mask=5), "its mask is 5"),
    ("sample", "tokenizer_meta.json", changed(mask=300), "they do not belong together"),
    ("train --resume", "last.pt", b"nothing", "last.pt can't be read"),
    ("train --resume", "last.pt", b"", "last.pt can't be read"),
    ("train --resume", "last.pt", lambda old: old[: len(old) // 2], "last.pt can't be read"),
    ("train --resume", "last.pt", None, "has a model and no last.pt, the file with weights and"),
    ("train --resume", "last.pt", lambda old: pickled([1, 2]), "last.pt can't be read"),
    ("train --resume", "last.pt", lambda old: pickled({"step": 3}), "it lacks best, log, losses"),
    ("train --resume", "last.pt", state_with(optimizers=[]), "last.pt does not fit"),
    ("train --resume", "last.pt", state_with(optimizers=None), "last.pt does not fit"),
    ("train --resume", "last.pt", part_of_state("model", EMBEDDING, torch.zeros(2, 16)),
     "word_embeddings.weight is (2, 16)"),
    ("train --resume", "tokenizer.tiktoken", None, "has no tokenizer"),
    ("train --resume", "tokenizer.tiktoken", lambda old: old.replace(b" 256\n", b" 257\n", 1),
     "rank 257"),
    ("train --resume", "tokenizer_meta.json", changed(end_of_text=298), "a different tokenizer"),
    ("train --eval_only", WEIGHTS, b"short", "can't be read"),
    ("train --resume", "../data/wikitext-2/train.bin", lambda old: old[:-2], "damaged; delete"),
    ("train --resume", "../data/wikitext-2/val.bin", None, "damaged; delete"),
    ("train --resume", "../data/wikitext-2/train.bin", lambda old: old[:-2] + b"\x39\x30",
     "train.bin contains token 12345, but its vocabulary has only 300; delete"),
]  # fmt: skip
WRONG = [(f"{script} {flags}", None, said) for script, group in WRONG_FLAGS.items()
         for flags, said in group.items()]  # fmt: skip
WRONG += [(f"train --source= --dataset=here/{name.split('/')[0]}", (f"here/{name}", content), said)
          for name, (content, said) in WRONG_TEXTS.items()]  # fmt: skip
WRONG += [(command, (f"out/{name}", content), said) for command, name, content, said in WRONG_FILES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a WikiText, its prepared data and a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", folder / "data")
        patch.chdir(folder)
        (folder / "wiki").mkdir()
        for seed, split in enumerate(("train", "valid", "test")):
            (folder / "wiki" / f"wiki.{split}.raw").write_text(wiki(10 * seed), encoding="utf-8")
        assert call(train.main, *TINY, f"--source={folder / 'wiki'}") == 0
    return folder


def script(folder, name, *arguments, stdin=None, **options):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, name, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, encoding="utf-8",
        input=stdin, timeout=120, check=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the project, as after a clone."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    for name in (
        "mega.py",
        "train.py",
        "sample.py",
        "data/prepare.py",
        "data/common.py",
        "data/machine.py",
    ):
        shutil.copy(PROJECT / name, folder / name)
    return folder


MEGA_PYTORCH = """
from torch import nn

class Mega(nn.Sequential):  # as lucidrains' is called
    def __init__(self, *, dim, num_tokens, depth, ff_mult, pre_norm, causal, ema_heads,
                 attn_dim_qk, attn_dim_value):
        super().__init__(nn.Embedding(num_tokens, dim), nn.Linear(dim, num_tokens))
"""
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool = True

class GPT(nn.Module):  # as nanoGPT's is called; its past is the mean of all earlier tokens
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.mix = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.transformer = None  # by this name data/lecture/compare.py knows nanoGPT's

    def forward(self, idx, targets):
        x = self.mix(self.wte(idx).cumsum(1))
        logits = self.lm_head(x)
        return logits, nn.functional.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
"""
README = (PROJECT / "README.md").read_text("utf-8")
PAGES = [README, *(p.read_text("utf-8") for p in sorted((PROJECT / "data/lecture").glob("*.md")))]
SHRINK = [flag for flag in TINY if not flag.startswith(("--max_minutes", "--dropout"))]


def blocks(language: str) -> list[str]:
    """The fenced blocks of README.md and of the lecture's pages."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", "\n".join(PAGES))


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """A copy of the project and what its README takes for granted: a text, a zip of WikiText, other
    people's models. `python` there runs trainings of a few steps, pytest only collects.
    """
    root = tmp_path_factory.mktemp("clone")
    folder, tools = root / "mega", root / "tools"
    leave = shutil.ignore_patterns(".*", "out*", "__pycache__", "pydocs", "wikitext-*", "*_text")
    shutil.copytree(PROJECT, folder, ignore=leave)
    (folder / "my_text.txt").write_text(words(0, 300), encoding="utf-8")
    wikitext = {f"wiki.{s}.raw": wiki(i).encode() for i, s in enumerate(("train", "valid", "test"))}
    (folder / "wikitext-2-raw-v1.zip").write_bytes(zipfile_of(wikitext))
    cached = root / "home" / "hub" / "models--mnaylor--mega-base-wikitext"  # as after a download
    hub = cached / "snapshots" / "abc"
    hub.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    tokens = roberta_files(hub)
    config = small_config(is_decoder=False, bidirectional=True, vocab_size=len(tokens))
    mega.MegaForMaskedLM(config).save_pretrained(hub)
    (root / "nanoGPT").mkdir()
    (root / "nanoGPT" / "model.py").write_text(NANOGPT)
    tools.mkdir()
    python, train_flags = f'"{sys.executable}"', " ".join(SHRINK)
    for name, lines in {
        "python": f'case "$*" in\n'
        f'*wikitext-103*) exec {python} "$@" {train_flags} --source=wikitext-2-raw-v1.zip;;\n'
        f'*dataset=shakespeare*) exec {python} "$@" {train_flags} --source=my_text.txt;;\n'
        f'*train.py*|*lecture.learn*) exec {python} "$@" {train_flags};;\n'
        f'*"lecture.experiments "*) exec {python} "$@" --steps=2 --seeds=1;;\nesac\n'
        f'exec {python} "$@"',
        "torchrun": f'exec {python} -m torch.distributed.run "$@" {train_flags}',
        "pip": "exit 0",  # in a clean environment .ci/run does that
        "pytest": f'exec {python} -m pytest --collect-only -q "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip

    def run(command: str, source: str | None = None) -> str:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, input=source or "",
            capture_output=True, encoding="utf-8", timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


posix = pytest.mark.skipif(os.name == "nt", reason="the README's commands are of a POSIX shell")
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?"
EXACT = ("memory", "cache")  # of the trained model alone: not of the Python's text, nor of a clock


def late_recurrence(x, u, q, g):
    h, y = torch.zeros_like(u), torch.zeros_like(x)
    for t in range(len(x)):
        y[t] = (g * h).sum()
        h = q * h + u * x[t]
    return y


def rotated_once(u, q, theta, g, length):
    """(q cos theta)^l in the place of q^l cos(theta l)."""
    lags = torch.arange(length).unsqueeze(1)
    return (g * u * (q * theta.cos()) ** lags).sum(1)


def never_dropped(config, length):
    """Keys and values of a full chunk stay."""
    unchunked = dataclasses.replace(config, use_chunking=False)
    most = config.chunk_size if config.use_chunking else length
    return solutions.cached_numbers(unchunked, min(length, most))


def search_in_own_caches(*args):
    """Each beam goes on from the cache at its own place, whichever prefix it descends from."""
    rows_of = solutions.rows_of

    def in_place(cache, parent):
        full = isinstance(cache, mega.MegaCache) and len(cache.layers[0].keys) == len(parent)
        return cache if full else rows_of(cache, parent)

    with unittest.mock.patch.object(solutions, "rows_of", in_place):
        return solutions.beam_search(*args)


class AlwaysAffine(solutions.DynamicTanh):
    def __init__(self, size, eps, affine):
        super().__init__(size, eps, True)


class WrongSequenceRegression(solutions.SequenceRegression):
    def forward(self, *args, labels, **inputs):
        out = super().forward(*args, **inputs)
        return out._replace(loss=F.l1_loss(out.logits, labels))  # (B, 1) beside (B,)


NEAR_MISSES = {
    "half_life": lambda p, delta: math.log(2) / (p * delta),
    "recurrence": late_recurrence,
    "kernel": lambda ema, length: ema(torch.ones(length, dtype=torch.float64)),
    "join": lambda a, b: (a[0] * b[0], a[0] * b[1] + a[1]),
    "complex_kernel": rotated_once,
    "cached_numbers": never_dropped,
    "first_seen": lambda position, chunk, layers: max(position - layers * (chunk - 1), 0),
    "beam_search": search_in_own_caches,
    "DynamicTanh": AlwaysAffine,
    "SequenceRegression": WrongSequenceRegression,
}


def passes(name: str) -> bool:
    """Whether an exercise's test passes with what `exercises.name` is now."""
    test = getattr(exercises, f"test_{re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower()}")
    cases = [{}]
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = [names] if isinstance(names, str) else names
        values = [v if isinstance(v, tuple) else (v,) for v in values]
        cases = [c | dict(zip(names, v, strict=True)) for c in cases for v in values]
    try:
        for case in cases:
            test(**case)
        return True
    except AssertionError:
        return False


def task_config(**changes) -> MegaConfig:
    values = {
        "vocab_size": 16, "hidden_size": 48, "intermediate_size": 64, "nffn_hidden_size": 64,
        "ema_projection_size": 8, "shared_representation_size": 24, "max_positions": 128,
        "is_decoder": False, "bidirectional": True, "add_lm_hidden_dense_layer": False,
        "initializer_range": 0.1,  # tiny models learn sooner from larger numbers
    }  # fmt: skip
    return small_config(**values | changes)


def learn(model: torch.nn.Module, loss, batch, steps: int, rows: int = 64):
    """Train on `steps` batches and return one that was not among them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss(*batch(generator, rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return batch(torch.Generator().manual_seed(2), 512)


def numbers(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def assert_right(found: torch.Tensor, expected: torch.Tensor):
    """At least 95% of rows, or of positions, that is of the first axis."""
    right = (found == expected).flatten(1).all(1) if found.dim() > 1 else found == expected
    assert right.float().mean() >= 0.95


@pytest.fixture(scope="module")
def transformers():
    found = pytest.importorskip(
        "transformers", "4.40.2", reason="transformers==4.40.2 is not installed"
    )
    if not hasattr(found, "MegaForCausalLM"):
        pytest.skip("this version of transformers has no MEGA any more")
    found.logging.set_verbosity_error()
    return found


def their_config(data, head) -> dict:
    """Random settings with which their implementation is sound: see data/lecture/checkpoints.md."""
    draw, yes = data.draw, st.booleans()
    causal, chunked = draw(yes), draw(yes)
    norm = draw(st.sampled_from(["layernorm", "scalenorm", "batchnorm"]))  # rmsnorm: fault 1
    truncation = draw(st.sampled_from([None, None, 3]))
    reads_source = head in HEADS[:3] and causal and draw(yes)
    options = {
        "vocab_size": 23, "hidden_size": draw(st.sampled_from([6, 8])), "num_hidden_layers": 2,
        "intermediate_size": draw(st.sampled_from([5, 12])), "nffn_hidden_size": 10,
        "ema_projection_size": draw(st.integers(1, 4)), "shared_representation_size": 6,
        "max_positions": 32, "is_decoder": causal, "bidirectional": not causal and draw(yes),
        "use_chunking": chunked, "chunk_size": 4 if chunked else -1, "truncation": truncation,
        "attention_activation": draw(attentions), "relative_positional_bias": draw(biases),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))), "normalization_type": norm,
        "norm_affine": norm == "layernorm" or draw(yes),  # fault 19
        "normalize_before_mega": draw(yes), "normalize_before_ffn": draw(yes),
        "use_normalized_ffn": draw(yes), "add_lm_hidden_dense_layer": draw(yes),
        "tie_word_embeddings": draw(yes), "add_token_type_embeddings": draw(yes),
        "type_vocab_size": 3, "add_cross_attention": reads_source,
        "use_feature_dropout": draw(yes), "pad_token_id": draw(st.sampled_from([0, 1])),
        "num_labels": 2 if head is HEADS[6] else draw(st.integers(1, 4)),
        "use_cache": truncation is None,  # fault 11
    }  # fmt: skip
    return options | {n: 0.0 for n in vars(MegaConfig()) if n.endswith("dropout_prob")}


def their_inputs(data, head, config, seed) -> dict:
    """Random inputs and labels that fit, as far as their implementation is sound."""
    draw, yes, D = data.draw, st.booleans(), config["hidden_size"]
    causal, chunked = config["is_decoder"], config["use_chunking"]
    length = draw(st.integers(2, 14))
    if chunked and (causal or length > 4):  # faults 7 and 8
        length = 4 * draw(st.integers(1, 4))
    shape = (2, 3, length) if head is mega.MegaForMultipleChoice else (2, length)
    inputs = {"input_ids": token_ids(seed, math.prod(shape[:-1]), length).view(shape)}
    if draw(yes):
        inputs = {"inputs_embeds": randn(seed, *shape, D, dtype=torch.float32)}
    # Every row sees something (fault 5); causal laplace and relu2 count pads (fault 6).
    if draw(yes) and not (causal and config["attention_activation"] != "softmax"):
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)  # bool: fault 23
        inputs["attention_mask"][..., -1] = 0
        inputs["attention_mask"][0, ..., -2] = int(length == 2)
        inputs["attention_mask"][1, ..., 1] = int(causal or length < 4)
    if config["add_token_type_embeddings"] and draw(yes):
        inputs["token_type_ids"] = token_ids(seed + 1, 1, math.prod(shape)).view(shape) % 3
    if config["add_cross_attention"]:
        simple = chunked and config["relative_positional_bias"] == "simple"  # fault 15
        S = draw(st.integers(1, 4 if simple else 14))
        if simple:
            inputs = {key: value[:, :4] for key, value in inputs.items()}
        inputs["encoder_hidden_states"] = randn(seed + 2, 2, S, D, dtype=torch.float32)
        if draw(yes):
            inputs["encoder_attention_mask"] = torch.ones(2, S, dtype=torch.long)
            inputs["encoder_attention_mask"][0, -1] = int(S == 1)  # fault 20
    return inputs


def their_labels(data, head, config, inputs, seed) -> dict:
    draw, n = data.draw, config["num_labels"]
    first = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    shape = first.shape[: 3 if head is mega.MegaForMultipleChoice else 2]
    tokens = token_ids(seed + 3, 1, math.prod(shape)).view(shape)
    if head in HEADS[1:3]:
        tokens[0, 0] = -100
        return {"labels": tokens}
    if head is mega.MegaForSequenceClassification:
        numbers = randn(seed + 4, 2, n, dtype=torch.float32)
        if n == 1:
            return {"labels": numbers if draw(st.booleans()) else numbers[:, 0]}
        classes, flags = tokens[:, 0] % n, (numbers > 0).float()
        return {"labels": draw(st.sampled_from([classes, flags]))}
    if head is mega.MegaForMultipleChoice:
        return {"labels": tokens[:, 0, 0] % 3}
    if head is mega.MegaForTokenClassification:
        return {"labels": tokens % n}
    if head is mega.MegaForQuestionAnswering:
        ends = {"start_positions": tokens[:, 0] % shape[1], "end_positions": tokens[:, 1] + 30}
        ends["end_positions"][0] = 1  # the other lies outside of the row
        return ends
    return {}


# ------------------------------------------------------------------------------------- TestConfig


class TestConfig:
    """mega.py, 1: settings and their rules."""

    def test_config_has_the_names_and_defaults_of_hugging_face(self):
        expected = {
            "vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 4,
            "intermediate_size": 256,
            "ema_projection_size": 16, "bidirectional": True, "shared_representation_size": 64,
            "use_chunking": False, "chunk_size": -1, "truncation": None,
            "normalize_before_mega": True,
            "normalization_type": "scalenorm", "norm_affine": True, "activation": "silu",
            "attention_activation": "softmax", "dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1, "use_feature_dropout": False,
            "use_normalized_ffn": True, "nffn_hidden_size": 256, "normalize_before_ffn": True,
            "nffn_activation_dropout_prob": 0.1, "max_positions": 2048,
            "add_token_type_embeddings": False, "type_vocab_size": 2, "initializer_range": 0.02,
            "ema_delta_alpha_range": 0.2, "ema_beta_range": 0.02, "ema_gamma_omega_range": 1.0,
            "relative_positional_bias": "rotary", "is_decoder": False, "add_cross_attention": False,
            "classifier_dropout": None, "add_lm_hidden_dense_layer": True, "pad_token_id": 1,
            "bos_token_id": 0, "eos_token_id": 2, "num_labels": 2, "problem_type": None,
            "tie_word_embeddings": True, "use_cache": True,
        }  # fmt: skip
        own = ("final_norm", "scale_embedding", "mean_pooling", "gradient_checkpointing")
        own = dict.fromkeys(own, False)
        labels = {
            "id2label": {0: "LABEL_0", 1: "LABEL_1"},
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        }
        assert MegaConfig().to_dict() == expected | own | labels | {"model_type": "mega"}

    @pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
    def test_an_impossible_config_is_one_sentence_with_its_name(self, changes):
        with pytest.raises(ValueError) as error:
            small_config(**changes)
        message = str(error.value)
        assert any(name in message for name in changes) and "\n" not in message
        assert len(message) < 300

    def test_unknown_keys_of_a_config_are_kept_and_written_back(self):
        config = MegaConfig.from_dict({"hidden_size": 12, "torch_dtype": "float32", "mine": [1]})
        assert config.hidden_size == 12 and config.extra == {"torch_dtype": "float32", "mine": [1]}
        assert MegaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert config.to_dict()["mine"] == [1]

    def test_numbers_of_numpy_are_numbers_and_can_be_saved(self, tmp_path):
        config = small_config(
            hidden_size=np.int64(8), dropout_prob=np.float32(0.5), norm_affine=np.bool_(True),
            ema_beta_range=torch.tensor(0.25), pad_token_id=np.uint8(2),
        )  # fmt: skip
        config.num_hidden_layers = np.int16(2)
        MegaForCausalLM(config).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        expected = small_config(
            hidden_size=8, dropout_prob=0.5, norm_affine=True, ema_beta_range=0.25, pad_token_id=2
        )
        assert saved.items() >= json.loads(json.dumps(expected.to_dict())).items()
        with pytest.raises(ValueError, match="hidden_size must be a positive integer, got 8.5"):
            small_config(hidden_size=np.float64(8.5))

    def test_a_config_changed_after_its_construction_is_checked_where_a_model_is_built(
        self, tmp_path
    ):
        for changes, message in (
            ({"is_decoder": True}, "is_decoder=True needs bidirectional=False"),
            ({"num_labels": 3}, "num_labels is 3 and id2label has 2 names"),
            ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ):
            config = MegaConfig(vocab_size=23, hidden_size=8, num_hidden_layers=1)
            model = mega.MegaForTokenClassification(config)
            for name, value in changes.items():
                setattr(config, name, value)
            for head in HEADS:
                with pytest.raises(ValueError, match=message):
                    head(config)
            with pytest.raises(ValueError, match=message):
                model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- TestEMA


class TestEMA:
    """2: the modes of the moving average are one map."""

    @given(ema_inputs(longest=9), seeds, st.integers(1, 6))
    def test_all_modes_follow_the_definition(self, inputs, seed, block):
        x, u, q, g = inputs
        state = randn(seed, len(x), *u.shape)
        y, h = by_definition(x, u, q, g)
        close(ema_direct(*inputs), y)
        close(ema_fft(*inputs), y)
        for start in (None, state):
            y, h = by_definition(x, u, q, g, start)
            for found in (ema_recurrent(*inputs, start), ema_blockwise(*inputs, start, block)):
                close(found[0], y)
                close(found[1], h)

    @pytest.mark.parametrize("bidirectional", [False, True])
    @given(seed=seeds, length=st.integers(1, 80))
    @settings(max_examples=20)
    def test_the_output_is_the_same_whether_a_state_is_needed_or_not(
        self, bidirectional, seed, length
    ):
        ema = DampedEMA(
            small_config(bidirectional=bidirectional, is_decoder=not bidirectional)
        ).double()
        x = randn(seed, 2, length, 8)
        y, state = ema(x)
        close(ema(x, needs_state=False)[0], y)
        if bidirectional:
            assert state is None
            return
        more = randn(seed + 1, 2, 5, 8)
        expected, _ = ema(torch.cat([x, more], dim=1))
        for needs_state in (True, False):  # a given state is heeded in both
            close(ema(more, state=state, needs_state=needs_state)[0], expected[:, length:])

    @given(ema_inputs(), seeds, st.integers(1, 80))
    def test_direct_equals_fft_equals_recurrent_equals_blockwise_with_gradients(
        self, inputs, seed, block
    ):
        weight = randn(seed, *inputs[0].shape)
        modes = {
            "direct": ema_direct,
            "fft": ema_fft,
            "recurrent": lambda *c: ema_recurrent(*c)[0],
            "blockwise": lambda *c: ema_blockwise(*c, block=block)[0],
        }
        values = {name: mode(*inputs) for name, mode in modes.items()}
        slopes = {name: gradients(mode, inputs, weight) for name, mode in modes.items()}
        for name in ("fft", "recurrent", "blockwise"):
            close(values[name], values["direct"])
            for found, expected in zip(slopes[name], slopes["direct"], strict=True):
                close(found, expected, 1e-9)

    @given(ema_inputs(extreme=False), st.integers(1, 80))
    def test_the_modes_agree_in_fp32(self, inputs, block):
        """Tolerance: 2e-5 of the largest number, some hundred roundings."""
        inputs = [t.float() for t in inputs]
        expected = ema_direct(*(t.double() for t in inputs)).float()
        scale = (
            inputs[0].abs().max() * ema_kernel(*inputs[1:], inputs[0].shape[1]).abs().sum(-1).max()
        )
        found = (ema_direct(*inputs), ema_fft(*inputs), ema_recurrent(*inputs)[0])
        for y in (*found, ema_blockwise(*inputs, block=block)[0]):
            assert y.dtype == torch.float32
            assert (y - expected).abs().max() <= 2e-5 * scale

    @given(ema_inputs(), seeds, st.lists(st.integers(0, 70), max_size=3), st.integers(1, 20))
    def test_any_split_with_a_carried_state_equals_the_whole_with_gradients(
        self, inputs, seed, cuts, block
    ):
        x, u, q, g = inputs
        start = randn(seed, len(x), *u.shape)
        cuts = [0, *sorted(min(cut, x.shape[1]) for cut in cuts), x.shape[1]]
        weights = randn(seed + 1, *x.shape), randn(seed + 2, *start.shape)

        def loss(ema, x, u, q, g, h, cuts):
            ys = []
            for a, b in itertools.pairwise(cuts):
                if a < b:
                    y, h = ema(x[:, a:b], u, q, g, h)
                    ys.append(y)
            return (torch.cat(ys, 1) * weights[0]).sum() + (h * weights[1]).sum()

        leaves = [t.clone().requires_grad_() for t in (x, u, q, g, start)]
        whole = loss(ema_recurrent, *leaves, [0, x.shape[1]])
        expected = torch.autograd.grad(whole, leaves)
        for ema in (ema_recurrent, functools.partial(ema_blockwise, block=block)):
            parts = loss(ema, *leaves, cuts)
            close(parts, whole)
            for found, slope in zip(torch.autograd.grad(parts, leaves), expected, strict=True):
                close(found, slope, 1e-9)

    def test_a_large_negative_average_is_0_in_half_precision_as_in_full(self):
        """Its SiLU is 0, and not -inf times 0, where fp16 can't hold the average itself."""
        ema = DampedEMA(small_config(ema_gamma_omega_range=5.0)).half()
        x = torch.full((1, 30, 8), 6e4).half()
        x[:, :, ::2] *= -1
        with torch.no_grad():
            y = ema(x)[0]
            full = copy.deepcopy(ema).float()(x.float())[0]
        assert (full == 0).any() and full.max() > 65504  # some of both kinds
        assert not y.isnan().any() and (y[full.abs() < 1e-9] == 0).all()

    def test_the_backward_pass_by_hand_is_the_derivative(self):
        x, u, q, g = randn(0, 2, 11, 2), randn(1, 2, 3), torch.rand(2, 3).double(), randn(2, 2, 3)
        leaves = [t.requires_grad_() for t in (x, u, q, g, randn(3, 2, 2, 3))]
        assert torch.autograd.gradcheck(lambda *c: ema_blockwise(*c, 4), leaves)

    @given(ema_inputs(longest=40), seeds, st.integers(1, 12))
    def test_the_fast_blocks_are_the_plain_ones(self, inputs, seed, block):
        """In values and in gradients of all that they are given."""
        x, u, q, g = inputs
        x = x[:, : max(x.shape[1] // block, 1) * block]
        c = min(block, x.shape[1])
        inside, write, read = mega.block_matrices(u, q, g, c)
        given = [x, inside, write, read, q**c, randn(seed, len(x), *u.shape)]
        weights = randn(seed + 1, *x.shape), randn(seed + 2, len(x), *u.shape)
        found = []
        for average in (mega.average_blocks, mega.FastBlocks.apply):
            leaves = [t.detach().clone().requires_grad_() for t in given]
            y, h = average(*leaves)
            gradients = torch.autograd.grad((y * weights[0]).sum() + (h * weights[1]).sum(), leaves)
            found.append([y, h, *gradients])
        for plain, fast in zip(*found, strict=True):
            close(fast, plain, 1e-9)

    def test_second_derivatives_are_right_or_an_error(self):
        torch.manual_seed(0)
        x = randn(0, 1, 17, 2).requires_grad_()
        u, q, g = (
            t.requires_grad_() for t in (randn(1, 2, 3), torch.rand(2, 3).double(), randn(2, 2, 3))
        )

        def curvature(ema):
            y = ema(x, u, q, g)
            first = torch.autograd.grad(
                (y[0] if isinstance(y, tuple) else y).pow(3).sum(), (x, q), create_graph=True
            )
            return torch.autograd.grad(sum(t.pow(2).sum() for t in first), (x, u, q, g))

        expected = curvature(ema_direct)
        for ema in (ema_recurrent, functools.partial(ema_blockwise, block=4), ema_blockwise):
            for found, right in zip(curvature(ema), expected, strict=True):
                close(found, right, 1e-9)
        assert torch.autograd.gradgradcheck(
            lambda *c: ema_blockwise(*c, block=4), (x[:, :6].detach().requires_grad_(), u, q, g)
        )

    def test_transforms_of_torch_func_work(self):
        model, x = causal_lm(), randn(0, 3, 20, 8)
        parameters = dict(model.named_parameters())

        def loss(parameters, x):
            out = torch.func.functional_call(model, parameters, kwargs={"inputs_embeds": x[None]})
            return out.logits.square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for i in range(3):
            alone = torch.autograd.grad(
                loss(parameters, x[i]), list(parameters.values()), allow_unused=True
            )
            for (name, found), expected in zip(each.items(), alone, strict=True):
                if expected is not None:
                    close(found[i], expected, 1e-8)
        direction = randn(5, 20, 8)
        _, slope = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (direction,))
        gradient = torch.func.grad(lambda x: loss(parameters, x))(x[0])
        close(slope, (gradient * direction).sum(), 1e-8)

    @given(ema_inputs(), seeds, st.floats(-3, 3), st.integers(1, 20))
    def test_every_mode_is_linear_in_x(self, inputs, seed, a, block):
        x, *c = inputs
        other = randn(seed, *x.shape)
        for ema in (ema_direct, ema_fft, lambda *z: ema_blockwise(*z, block=block)[0]):
            close(ema(a * x + other, *c), a * ema(x, *c) + ema(other, *c), 1e-9)

    @given(ema_inputs(), st.integers(1, 20), st.integers(1, 20))
    def test_a_later_input_gives_the_same_output_later(self, inputs, shift, block):
        x, *c = inputs
        late = F.pad(x, (0, 0, shift, 0))
        for ema in (ema_direct, ema_fft, lambda *z: ema_blockwise(*z, block=block)[0]):
            y = ema(late, *c)
            close(y[:, shift:], ema(x, *c))
            close(y[:, :shift], torch.zeros_like(y[:, :shift]))

    @given(ema_inputs(), st.integers(1, 20))
    def test_the_response_to_an_impulse_is_the_kernel(self, inputs, block):
        x, u, q, g = inputs
        length = x.shape[1]
        impulse = torch.zeros(1, length, len(u)).double()
        impulse[:, 0] = 1
        kernel = torch.stack([(g * u * q**lag).sum(-1) for lag in range(length)], -1)
        close(ema_kernel(u, q, g, length), kernel)
        for ema in (ema_direct, ema_fft, lambda *z: ema_blockwise(*z, block=block)[0]):
            close(ema(impulse, u, q, g)[0].T.contiguous(), kernel)

    @given(ema_inputs(), st.data(), st.integers(1, 20))
    def test_a_change_at_t_leaves_all_before_t_bit_equal(self, inputs, data, block):
        x, *c = inputs
        t = data.draw(st.integers(0, x.shape[1] - 1))
        changed = x.clone()
        changed[:, t:] += 7
        for ema in (
            ema_direct,
            lambda *z: ema_recurrent(*z)[0],
            lambda *z: ema_blockwise(*z, None, block)[0],
        ):
            assert torch.equal(ema(changed, *c)[:, :t], ema(x, *c)[:, :t])
        close(ema_fft(changed, *c)[:, :t], ema_fft(x, *c)[:, :t], 1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("p_logit", [-100.0, 0.0, 100.0])
    @pytest.mark.parametrize("decay_logit", [-100.0, 0.0, 100.0])
    def test_saturated_sigmoids_give_finite_values_and_gradients(self, p_logit, decay_logit, dtype):
        ema = DampedEMA(small_config()).to(dtype)
        ema.damping_factor.data.fill_(p_logit)
        ema.decay_factor.data.fill_(decay_logit)
        results = []
        for mode in mega.EMA_MODES:
            x = randn(0, 2, 40, 8, dtype=dtype).requires_grad_()
            ema.zero_grad()
            y, _ = ema(x, mode=mode)
            y.sum().backward()
            results.append((y.detach(), x.grad, *(p.grad for p in ema.parameters())))
            assert all(torch.isfinite(t).all() for t in results[-1])
        for other in results[1:]:
            for found, expected in zip(other, results[0], strict=True):
                close(found, expected, 1e-4 if dtype == torch.float32 else 1e-9)

    @pytest.mark.parametrize("mode", mega.EMA_MODES)
    def test_the_ema_computes_in_fp32_under_autocast_and_in_half_precision(self, mode):
        ema = DampedEMA(small_config(), mode)
        x = randn(0, 2, 50, 8, dtype=torch.float32).requires_grad_()
        expected, state = ema(x)
        expected.sum().backward()
        gradient, x.grad = x.grad, None
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = ema(x)
        found.sum().backward()
        assert torch.equal(found, expected) and torch.equal(x.grad, gradient)
        half = copy.deepcopy(ema).bfloat16()
        single = copy.deepcopy(half).float()
        x = x.detach().bfloat16()
        with torch.no_grad():
            y, state = half(x)
            wide, _ = single(x.float())
        assert y.dtype == torch.bfloat16 and (state is None or state.dtype == torch.float32)
        assert (y.float() - wide).abs().max() < 0.03 * wide.abs().max()
        u, q, g = single.coefficients()
        close(EMA_Y(mode, x.float(), u, q, g), EMA_Y(mode, x.float(), *half.coefficients()))

    @given(ema_inputs(), st.integers(1, 90))
    def test_truncation_keeps_the_first_taps_only(self, inputs, truncation):
        x, *c = inputs
        kernel = ema_kernel(*c, x.shape[1]).clone()
        kernel[:, truncation:] = 0
        expected = torch.einsum("bjd,dij->bid", x, mega.toeplitz(kernel))
        close(ema_direct(*inputs, truncation), expected)
        close(ema_fft(*inputs, truncation), expected)

    @given(seeds, st.integers(1, 30), st.sampled_from(["direct", "fft", "recurrent", "blockwise"]))
    def test_bidirectional_is_forward_plus_reversed(self, seed, length, mode):
        both = randomized(DampedEMA(small_config(is_decoder=False, bidirectional=True)), seed)
        x = randn(seed, 2, length, 8)
        u, q, g = both.coefficients()
        first, second = (ema_direct(z, u[s], q[s], g[s]) for z, s in
                         ((x, slice(0, 8)), (x.flip(1), slice(8, 16))))  # fmt: skip
        expected = F.silu(first + second.flip(1) + both.residual_weight * x)
        y, state = both(x, mode=mode)
        close(y, expected)
        assert state is None

    def test_the_coefficients_are_those_of_the_paper(self):
        ema = randomized(DampedEMA(small_config()))
        p, decay = ema.damping_factor[..., 0].sigmoid(), ema.decay_factor[..., 0].sigmoid()
        u, q, g = ema.coefficients()
        close(u, p * ema.ema_expansion_matrix[..., 0])
        close(q, 1 - p * decay)
        close(g, ema.kernel_projection_matrix / 3**0.5)

    def test_masked_inputs_enter_the_ema_as_zeros_and_keep_their_residual(self):
        ema = randomized(DampedEMA(small_config()))
        x, mask = randn(0, 2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
        mask[0, 3:5] = False
        u, q, g = ema.coefficients()
        expected = F.silu(ema_direct(x * mask[..., None], u, q, g) + x * ema.residual_weight)
        close(ema(x, mask)[0], expected)

    def test_the_ema_refuses_what_it_cannot_do(self):
        x, state = torch.zeros(1, 4, 8), torch.zeros(1, 8, 3)
        truncated, causal = DampedEMA(small_config(truncation=3)), DampedEMA(small_config())
        both = DampedEMA(small_config(is_decoder=False, bidirectional=True))
        for call, word in (
            (lambda: causal(x, mode="quick"), "one of direct, fft"),
            (lambda: truncated(x, mode="recurrent"), "only direct and fft can"),
            (lambda: truncated(x, mode="blockwise"), "only direct and fft can"),
            (lambda: causal(x, state=state, mode="fft"), "state"),
            (lambda: both(x, state=state), "state"),
            (lambda: causal(x, state=state[..., :2]), r"state must have .*\(1, 8, 3\)"),
            (lambda: ema_blockwise(x, *causal.coefficients(), block=0), "block"),
            (lambda: causal(x[..., :5]), r"x must have non-empty shape \(B, L, 8\)"),
            (lambda: causal(x[0]), r"got \(4, 8\)"),
            (lambda: causal(x[:, :0]), r"got \(1, 0, 8\)"),
        ):
            with pytest.raises(ValueError, match=word):
                call()
        assert torch.allclose(truncated(x)[0], truncated(x, mode="direct")[0])

    def test_initial_values_are_those_of_the_papers_code(self):
        torch.manual_seed(0)
        config = MegaConfig(
            hidden_size=256, num_hidden_layers=1, is_decoder=True, bidirectional=False
        )
        model = MegaForCausalLM(config)
        layer = model.mega.layers[0].mega_layer
        ema = layer.ema_gate
        signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
        for tensor, std in (
            (ema.damping_factor, 0.2), (ema.decay_factor, 0.2),
            (ema.ema_expansion_matrix - signs, 0.02),
            (ema.kernel_projection_matrix, 1.0), (ema.residual_weight, 1.0),
            (layer.qk_weight, 0.02),
            (layer.v_proj.weight, 0.02), (layer.mx_proj.weight, 0.02), (layer.h_proj.weight, 0.02),
            (model.mega.layers[0].nffn.fc1.weight, 0.02), (layer.rel_pos_bias.alpha, 0.02),
            (model.mega.embedding_layer.word_embeddings.weight, 0.02), (model.dense.weight, 0.02),
        ):  # fmt: skip
            few = 5 / math.sqrt(2 * tensor.numel())
            assert (
                abs(tensor.std().item() / std - 1) < few
                and abs(tensor.mean().item()) < std * few * 2
            )
        zero = (layer.qk_bias, layer.v_proj.bias, layer.mx_proj.bias, model.lm_head.bias)
        assert not any(
            t.any() for t in (*zero, model.mega.embedding_layer.word_embeddings.weight[1])
        )


# ---------------------------------------------------------------------------------- TestAttention


class TestAttention:
    """3: chunks, masks, biases, the layer and cross-attention equal their equations."""

    @given(
        seeds,
        st.integers(1, 11),
        chunkings,
        attentions,
        biases,
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, "right", "left", "any"]),
    )
    def test_the_layer_equals_its_equations(
        self, seed, length, chunking, attention, bias, causal, pre, pads
    ):
        config = small_config(
            **chunking,
            attention_activation=attention,
            relative_positional_bias=bias,
            is_decoder=causal,
            normalize_before_mega=pre,
        )
        layer = randomized(MovingAverageGatedAttention(config), seed)
        x, mask = randn(seed, 2, length, 8), None
        if pads:
            mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.4
            if pads != "any":
                mask = mask.sort(descending=pads == "right").values
        found, *_ = layer(x, mask)
        # The sines and cosines of the rotary bias are fp32, as in the checkpoints' own code.
        close(found, reference_layer(layer, x, mask), 1e-6)

    @given(
        seeds,
        st.integers(1, 20),
        st.integers(0, 19),
        st.sampled_from([1, 3, 8]),
        biases,
        attentions,
    )
    def test_a_chunk_is_attended_to_as_if_it_were_alone(
        self, seed, length, past, chunk, bias, attention
    ):
        options = {"relative_positional_bias": bias, "attention_activation": attention}
        chunked = small_config(use_chunking=True, chunk_size=chunk, **options)
        layer = randomized(MovingAverageGatedAttention(chunked), seed)
        past %= chunk
        k, v = randn(seed, 2, past + length, 6), randn(seed + 1, 2, past + length, 12)
        q = randn(seed + 2, 2, past + length, 6)
        mask = torch.rand(2, past + length, generator=torch.Generator().manual_seed(seed)) > 0.2
        found, _ = layer.attend(q[:, past:], k, v, mask)
        parts = [
            layer.attend(*(t[:, start : start + chunk] for t in (q, k, v, mask)))[0]
            for start in range(0, past + length, chunk)
        ]
        close(found, torch.cat(parts, 1)[:, past:], 1e-12)

    @given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 6), seeds)
    def test_chunks_are_whole_and_end_in_zeros(self, batch, length, size, seed):
        x = randn(seed, batch, length, 3)
        chunks = mega.split_into_chunks(x, size).view(batch, -1, 3)
        assert torch.equal(chunks[:, :length], x) and not chunks[:, length:].any()
        assert chunks.shape[1] == math.ceil(length / size) * size

    @given(seeds, biases, st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
    def test_bias_by_distance_is_that_of_every_pair_of_places(self, seed, kind, first, rows, keys):
        layer = randomized(mega.POSITION_BIASES[kind](small_config()), seed)
        stop = first + rows
        found = mega.bias_matrix(layer(max(stop, keys)), first, stop, keys)
        if kind == "simple":
            w, centre = layer.rel_pos_bias.tolist(), 63
            expected = [[w[centre + j - i] for j in range(keys)] for i in range(first, stop)]
            assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
            return

        def turned(x, place):
            (x1, x2), pairs = x[0].chunk(2), torch.arange(3, dtype=torch.float64)
            sin, cos = (f(place * 10000 ** (-pairs / 3)) for f in (torch.sin, torch.cos))
            return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])

        queries = torch.stack([turned(layer.alpha, i) for i in range(first, stop)])
        close(
            found, queries @ torch.stack([turned(layer.b_param, j) for j in range(keys)]).mT, 1e-5
        )

    @given(seeds, st.integers(1, 8))
    def test_the_simple_bias_is_the_same_with_use_chunking_on_and_off(self, seed, length):
        """As in Hugging Face's files: its centre is chunk_size - 1 in both cases."""
        options = {"relative_positional_bias": "simple", "chunk_size": 8}
        on, off = (shared_lm(use_chunking=flag, **options) for flag in (True, False))
        ids = token_ids(seed, 2, length)
        assert torch.equal(on(ids).logits, off(ids).logits)
        table = off.mega.layers[0].mega_layer.rel_pos_bias
        middle = table(5)[4]
        assert middle == table.rel_pos_bias[7]

    @given(seeds, st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), biases, attentions)
    @torch.no_grad()
    def test_a_chunk_size_can_change_after_training(self, seed, length, old, new, bias, attention):
        """Distances keep their biases: one chunk is what it was, several are as if built so."""
        options = {"relative_positional_bias": bias, "attention_activation": attention}
        model = causal_lm(use_chunking=True, chunk_size=old, max_positions=9, **options)
        ids = token_ids(seed, 2, length)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        short = ids[:, : min(old, new)]
        expected = model(short).logits
        model.set_chunk_size(new)
        close(model(short).logits, expected)
        parts = [  # of a bias that knows distances, each chunk sees what a chunk alone would
            model.mega.layers[0].mega_layer.attend(q, q, q, None)[0]
            for q in randn(seed, 2, length, 6).split(new, dim=1)
        ]
        whole = model.mega.layers[0].mega_layer.attend(*[randn(seed, 2, length, 6)] * 3, None)[0]
        close(whole, torch.cat(parts, dim=1))
        unchunked = causal_lm(max_positions=9, chunk_size=new, **options)
        unchunked.load_state_dict(model.state_dict())
        close(model(ids[:, :new]).logits, unchunked(ids[:, :new]).logits)
        model.set_chunk_size(old)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        for wrong in (0, -1, 2.5, *([10] if bias == "simple" else [])):
            with pytest.raises(ValueError, match="chunk_size|max_positions"):
                model.set_chunk_size(wrong)
            assert model.config.chunk_size == old

    @given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
    @torch.no_grad()
    def test_a_product_in_parts_is_the_product(self, seed, parts, inputs, outputs):
        x = randn(seed, 1, inputs, dtype=torch.float32)
        layer = torch.nn.Linear(inputs, 4 * outputs)
        matrix = randn(seed, 1, inputs, 5 * outputs, dtype=torch.float32)
        with unittest.mock.patch.object(torch, "get_num_threads", lambda: parts):
            close(mega.quick_linear(layer, 1)(x), F.linear(x, layer.weight, layer.bias), 1e-6)
            close(mega.vector_product(x.unsqueeze(1), matrix, parts), x @ matrix[0], 1e-6)
            layer.register_forward_hook(lambda *_: x * 0)
            assert not mega.quick_linear(layer, 1)(x).any()  # a layer with a hook is called

    def test_nothing_of_size_l_by_l_when_chunking(self, monkeypatch):
        sizes = []

        def attention_weights(*arguments):
            found = whole(*arguments)
            sizes.extend(t.numel() for t in (*arguments[:4], found))
            return found

        whole = mega.attention_weights
        monkeypatch.setattr(mega, "attention_weights", attention_weights)
        length, chunk = 1003, 16
        layer = MovingAverageGatedAttention(small_config(use_chunking=True, chunk_size=chunk))
        layer(torch.randn(1, length, 8), torch.ones(1, length, dtype=torch.bool))
        assert len(sizes) == 5 and max(sizes) <= (length + chunk) * chunk

    @given(seeds, attentions, chunkings, st.booleans(), st.integers(1, 12))
    def test_no_mask_makes_a_nan_in_values_or_gradients(
        self, seed, attention, chunking, causal, length
    ):
        config = small_config(attention_activation=attention, is_decoder=causal, **chunking)
        layer = randomized(MovingAverageGatedAttention(config), seed)
        x = randn(seed, 3, length, 8).requires_grad_()
        mask = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) > 0.7
        mask[0] = False
        y, *_ = layer(x, mask)
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
        q = randn(seed, 3, length, 6)
        seen, _ = layer.attend(q, q, randn(seed, 3, length, 12), mask)
        assert not seen[0].any()

    def test_laplace_meets_relu2_in_value_and_slope_and_is_bounded(self):
        x = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
        for function in (mega.laplace, ACTIVATIONS["relu2"]):
            y = function(x)
            (slope,) = torch.autograd.grad(y, x)
            assert abs(y.item() - 0.5) < 1e-5 and abs(slope.item() - math.sqrt(2)) < 1e-4
        assert abs(mega.laplace(torch.zeros(())).item() - 0.0061) < 1e-4
        assert mega.laplace(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]

    @given(
        seeds,
        st.integers(1, 7),
        st.integers(1, 9),
        attentions,
        biases,
        st.booleans(),
        st.booleans(),
    )
    def test_cross_attention_equals_its_arithmetic(self, seed, L, S, attention, bias, pre, pads):
        config = decoder_config(
            attention_activation=attention, relative_positional_bias=bias, normalize_before_mega=pre
        )
        layer = randomized(GatedCrossAttention(config), seed)
        x, source, start = randn(seed, 2, L, 8), randn(seed + 1, 2, S, 8), seed % 5
        mask = (
            torch.rand(2, S, generator=torch.Generator().manual_seed(seed)) > 0.4 if pads else None
        )
        found, *_ = layer(x, *layer.keys_and_values(source), mask, start)
        close(found, reference_cross(layer, x, source, mask, start), 1e-6)

    @torch.no_grad()
    def test_pads_of_the_encoder_change_nothing(self):
        for attention in sorted(ATTENTION_FUNCTIONS):
            model = shared_lm(add_cross_attention=True, attention_activation=attention)
            ids, source = token_ids(0, 2, 5), randn(0, 2, 4, 8)
            padded, mask = F.pad(source, (0, 0, 0, 3), value=9.0), torch.ones(2, 7)
            mask[:, 4:] = 0
            for dtype in (torch.bool, torch.int64, torch.float32):
                found = model(
                    ids, encoder_hidden_states=padded, encoder_attention_mask=mask.to(dtype)
                )
                close(found.logits, model(ids, encoder_hidden_states=source).logits, 1e-6)

    @torch.no_grad()
    def test_attention_weights_of_every_kind_of_row_and_their_gradients(self):
        """What is asked for at any length, chunked or not, with a cache and an encoder."""
        for length, shape in ((3, (1, 1, 3, 3)), (8, (1, 2, 4, 4)), (10, (1, 3, 4, 4))):
            model = shared_lm(use_chunking=True, chunk_size=4, add_cross_attention=True)
            source = randn(0, 1, 5, 8)
            asked = {"encoder_hidden_states": source, "output_attentions": True}
            with torch.enable_grad():
                out = model(token_ids(0, 1, length), **asked)
                assert {w.shape for w in out.attentions} == {shape}
                assert {w.shape for w in out.cross_attentions} == {(1, length, 5)}
                for weights in (*out.attentions, *out.cross_attentions):
                    weights.retain_grad()
                out.logits.sum().backward()
            assert all(w.grad.any() for w in (*out.attentions, *out.cross_attentions))
        model, ids = shared_lm(), token_ids(0, 1, 9)
        out = model(
            ids[:, 6:], cache=model(ids[:, :6], use_cache=True).cache, output_attentions=True
        )
        whole = model(ids, output_attentions=True)
        assert out.attentions[0].shape == (1, 1, 3, 9)
        close(out.attentions[0], whole.attentions[0][:, :, 6:], 1e-6)


# -------------------------------------------------------------------------------------- TestModel


class TestModel:
    """4, 5: norms, dropout, blocks, the bare model."""

    @pytest.mark.parametrize("name", sorted(NORMS))
    @pytest.mark.parametrize("affine", [True, False])
    def test_norms_normalise(self, name, affine):
        norm = mega.SequenceNorm(small_config(normalization_type=name), affine).double().eval()
        x = randn(0, 2, 5, 8) * 3 + 1
        parameters = dict(norm.named_parameters())
        assert bool(parameters) == affine and all(n.startswith("norm.") for n in parameters)
        for i, parameter in enumerate(parameters.values()):
            parameter.data += randn(i, *parameter.shape)
        gain = norm.norm.scalar if name == "scalenorm" else getattr(norm.norm, "weight", None)
        gain = 1 if not affine else gain
        if name == "layernorm":
            expected = (x - x.mean(-1, True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()
        elif name in ("scalenorm", "rmsnorm"):
            expected = x / (x.square().mean(-1, True) + 1e-5).sqrt()
        else:
            expected = x / math.sqrt(1 + 1e-5)
        expected = expected * gain + (
            getattr(norm.norm, "bias", None)
            if affine and getattr(norm.norm, "bias", None) is not None
            else 0
        )
        close(norm(x), expected)

    def test_batchnorm_takes_its_statistics_over_rows_and_length(self):
        norm = (
            mega.SequenceNorm(small_config(normalization_type="batchnorm"), False).double().train()
        )
        x = randn(0, 3, 7, 8) * 2 + 5
        y = norm(x)
        close(y.mean((0, 1)), torch.zeros(8).double(), 1e-6)
        close(y.var((0, 1), False), torch.ones(8).double(), 1e-4)

    def test_feature_dropout_drops_whole_features_of_a_row(self):
        module = mega.Dropout(small_config(use_feature_dropout=True), 0.3).train()
        torch.manual_seed(0)
        kept = module(torch.ones(16, 50, 40))
        assert torch.equal(kept, kept[:, :1].expand_as(kept))
        assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
        assert abs((kept == 0).double().mean().item() - 0.3) < 0.08
        assert torch.equal(module.eval()(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))

    @pytest.mark.parametrize("pre", [True, False])
    def test_the_feed_forward_network_equals_its_equation(self, pre):
        ffn = randomized(mega.NormalizedFeedForward(small_config(normalize_before_ffn=pre)))
        x = randn(0, 2, 5, 8)
        n = ffn.norm(x) if pre else x
        y = x + F.silu(n @ ffn.fc1.weight.T + ffn.fc1.bias) @ ffn.fc2.weight.T + ffn.fc2.bias
        close(ffn(x), y if pre else ffn.norm(y))

    def test_dropout_is_where_the_paper_has_it(self, monkeypatch):
        places = []

        def record(self, x):
            places.append((x.shape[-1], self.p))
            return x

        monkeypatch.setattr(mega.Dropout, "forward", record)
        p = {"dropout_prob": 0.1, "hidden_dropout_prob": 0.2, "nffn_activation_dropout_prob": 0.3}
        block = mega.MegaBlock(small_config(add_cross_attention=True, intermediate_size=12, **p))
        block(torch.randn(1, 4, 8), source=torch.randn(1, 3, 8))
        layer, cross, feed_forward = (
            [(12, 0.2), (8, 0.1), (8, 0.1)],
            [(8, 0.2), (8, 0.1)],
            [(10, 0.3), (8, 0.1)],
        )
        assert places == layer + cross + feed_forward
        rates, dropout = [], F.dropout
        monkeypatch.setattr(F, "dropout", lambda x, p, *a: rates.append(p) or dropout(x, p, *a))
        config = small_config(add_cross_attention=True, attention_probs_dropout_prob=0.4)
        mega.MegaBlock(config)(torch.randn(1, 4, 8), source=torch.randn(1, 3, 8))
        assert rates == [0.4, 0.4]  # the weights of both

    def test_state_dict_keys_and_shapes_are_hugging_faces(self):
        D, V, Z, N, F_ = 8, 12, 6, 3, 10
        for bias, keys in (
            ("rotary", {"alpha": (1, Z), "b_param": (1, Z)}),
            ("simple", {"rel_pos_bias": (127,)}),
        ):
            model = MegaForCausalLM(
                small_config(num_hidden_layers=1, relative_positional_bias=bias)
            )
            layer = {
                "qk_weight": (2, Z), "qk_bias": (2, Z),
                "norm.norm.weight": (D,), "norm.norm.bias": (D,),
                "ema_gate.damping_factor": (D, N, 1), "ema_gate.decay_factor": (D, N, 1),
                "ema_gate.ema_expansion_matrix": (D, N, 1), "ema_gate.residual_weight": (D,),
                "ema_gate.kernel_projection_matrix": (D, N), "v_proj.weight": (V, D),
                "v_proj.bias": (V,), "mx_proj.weight": (Z + V + 2 * D, D), "h_proj.bias": (D,),
                "mx_proj.bias": (Z + V + 2 * D,), "h_proj.weight": (D, V),
            } | {f"rel_pos_bias.{key}": shape for key, shape in keys.items()}  # fmt: skip
            ffn = {"norm.norm.weight": (D,), "norm.norm.bias": (D,), "fc1.weight": (F_, D),
                   "fc1.bias": (F_,), "fc2.weight": (D, F_), "fc2.bias": (D,)}  # fmt: skip
            expected = {f"mega.layers.0.mega_layer.{k}": shape for k, shape in layer.items()}
            expected |= {f"mega.layers.0.nffn.{k}": shape for k, shape in ffn.items()}
            expected |= {"mega.embedding_layer.word_embeddings.weight": (23, D)}
            expected |= {"lm_head.weight": (23, D), "lm_head.bias": (23,)}
            expected |= {"dense.weight": (D, D), "dense.bias": (D,)}
            assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
        both = DampedEMA(small_config(is_decoder=False, bidirectional=True))
        assert both.damping_factor.shape == (2 * D, N, 1) and both.residual_weight.shape == (D,)

    def test_final_norm_and_embedding_scale(self):
        plain = MegaModel(small_config(num_hidden_layers=1)).eval()
        model = MegaModel(small_config(num_hidden_layers=1, final_norm=True, scale_embedding=True))
        model.load_state_dict(plain.state_dict())
        ids = token_ids(0, 2, 5)
        x = plain.embedding_layer.word_embeddings(ids) * math.sqrt(8)
        x, *_ = plain.layers[0](x)
        close(model.eval()(ids).last_hidden_state, F.layer_norm(x, (8,)), 1e-5)

    @given(seeds, st.integers(2, 20), chunkings, attentions, st.data())
    def test_no_token_sees_its_future(self, seed, length, chunking, attention, data):
        model = shared_lm(attention_activation=attention, **chunking)
        ids = token_ids(seed, 2, length)
        t = data.draw(st.integers(1, length - 1))
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 5) % 20 + 3
        with torch.no_grad():
            assert torch.equal(model(changed).logits[:, :t], model(ids).logits[:, :t])

    def test_the_rotary_bias_is_fp32_under_autocast(self):
        layer = MegaModel(small_config()).layers[0].mega_layer.rel_pos_bias
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(99)
        assert torch.equal(found, layer(99))

    def test_masks_of_any_dtype_are_one_mask(self):
        model, ids = shared_lm(attention_activation="laplace"), token_ids(0, 2, 6)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
        expected = model(ids, mask).logits
        for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16):
            assert torch.equal(model(ids, mask.to(dtype)).logits, expected)
        assert torch.equal(model(ids, mask * 7).logits, expected)  # 0 is a pad, all else is not

    def test_the_model_refuses_what_it_cannot_use(self):
        model, ids = shared_lm(use_chunking=True, chunk_size=4), token_ids(0, 2, 6)
        cache = model(ids, use_cache=True).cache
        simple = shared_lm(relative_positional_bias="simple")
        truncated = MegaForCausalLM(small_config(truncation=4)).eval()
        shorter, fft = cache._replace(layers=cache.layers[:1]), causal_lm()
        fft.mega.layers[0].mega_layer.ema_gate.mode = "fft"
        encoder = MegaModel(small_config(is_decoder=False)).eval()
        close(fft(ids, use_cache=False).logits, causal_lm()(ids).logits)
        for call, word in (
            (lambda: model(ids + 20), "from 0 to 22, got"),
            (lambda: model(-ids), "from 0 to 22, got -"),
            (lambda: model(ids[:, :0]), "non-empty"),
            (lambda: model(ids[0]), "non-empty"),
            (lambda: model(ids.float()), "integer"),
            (lambda: model(ids, torch.ones(2, 5)), r"\(2, 6\), got \(2, 5\)"),
            (lambda: model(ids[:, :1], torch.ones(2, 5), cache=cache), r"\(2, 1\), got \(2, 5\)"),
            (lambda: model(ids[:1], cache=cache), "2 sequences and the input 1"),
            (lambda: truncated(ids, use_cache=True), "truncation=4"),
            (lambda: encoder(ids, use_cache=True), "is_decoder=False"),
            (lambda: simple(token_ids(0, 1, 65)), "length 65 is above max_positions 64"),
            (lambda: model(ids, cache=shorter), "shorter"),
            (lambda: fft(ids, use_cache=True), "no state to cache"),
        ):
            with pytest.raises(ValueError, match=word):
                call()
        assert truncated(ids).cache is None

    def test_a_causal_lm_that_is_no_decoder_warns(self):
        with pytest.warns(UserWarning, match="expects is_decoder=True, got False"):
            MegaForCausalLM(small_config(is_decoder=False))

    def test_model_code_keeps_no_state_between_calls(self):
        model, ids = causal_lm(), token_ids(0, 1, 7)
        first = model(ids).logits
        model.load_state_dict(causal_lm(seed=9).state_dict())
        assert not torch.allclose(model(ids).logits, first)
        with torch.no_grad():
            model(ids)
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        copy.deepcopy(model)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_checkpointing_changes_no_gradient_with_dropout_on(self, autocast):
        options = {name: 0.3 for name in vars(small_config()) if name.endswith("dropout_prob")}
        ids, found = token_ids(0, 2, 21), []
        for on in (False, True):
            model = causal_lm(gradient_checkpointing=on, **options).float().train()
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=ids).loss
            loss.backward()
            found.append([loss, *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_checkpointing_keeps_little_for_the_backward_pass(self):
        def kept(on: bool) -> int:
            model, sizes = causal_lm(gradient_checkpointing=on).train(), []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel()) or t, id
            ):
                model.mega(token_ids(0, 1, 40))
            return sum(sizes)

        assert kept(True) < kept(False) / 10
        with pytest.raises(ValueError, match="gradient_checkpointing=True would update batchnorm"):
            small_config(gradient_checkpointing=True, normalization_type="batchnorm")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near_full_precision(self, dtype):
        model, ids = (
            MegaForCausalLM(small_config(use_chunking=True, chunk_size=4)).eval(),
            token_ids(0, 2, 11),
        )
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, labels=ids)
        assert out.loss.dtype == torch.float32
        assert (out.logits.float() - expected).abs().max() < 0.02
        half = copy.deepcopy(model).to(dtype)
        assert half(ids).logits.dtype == dtype
        assert (half(ids).logits.float() - expected).abs().max() < 0.02

    def test_inputs_embeds_and_token_types_and_what_is_returned_on_request(self):
        options = {"add_token_type_embeddings": True, "type_vocab_size": 3}
        model = randomized(MegaModel(small_config(use_chunking=True, chunk_size=4, **options)))
        ids, types = token_ids(0, 2, 8), token_ids(1, 2, 8) % 3
        words, kinds = (table.weight for table in model.embedding_layer.values())
        embedded = words[ids] + kinds[types]
        asked = {"output_hidden_states": True, "output_attentions": True}
        out = model(ids, token_type_ids=types, **asked)
        assert len(out.hidden_states) == 3 and len(out.attentions) == 2
        close(out.hidden_states[0], embedded)
        close(model.layers[0](embedded)[0], out.hidden_states[1])
        assert torch.equal(out.hidden_states[2], out.last_hidden_state)
        for weights in out.attentions:
            assert weights.shape == (2, 2, 4, 4)
            close(weights.sum(-1), torch.ones(2, 2, 4).double())
            assert not weights.triu(1).any()
        same = model(inputs_embeds=words[ids], token_type_ids=types)
        assert torch.equal(same.last_hidden_state, out.last_hidden_state)
        pooler = model.pooler["dense"]
        close(out.pooler_output, torch.tanh(pooler(out.last_hidden_state[:, 0])))
        bare = MegaModel(small_config(), add_pooling_layer=False)(ids)
        assert bare.pooler_output is bare.attentions is bare.hidden_states is bare.cross_attentions
        assert bare.pooler_output is None

    def test_outputs_are_tuples_with_names_as_other_tools_expect(self):
        """DataParallel gathers them field by field, torch.export flattens them."""
        out = shared_lm()(token_ids(0, 2, 5), output_hidden_states=True)
        for value in (out, out.cache, out.cache.layers[0]):
            assert isinstance(value, tuple) and value._fields
        leaves, tree = torch.utils._pytree.tree_flatten(out._replace(cache=None))
        assert all(leaf is None or torch.is_tensor(leaf) for leaf in leaves)
        assert type(torch.utils._pytree.tree_unflatten(leaves, tree)) is mega.MegaOutput

    def test_models_run_on_the_meta_device_and_quantizers_find_their_layers(self):
        with torch.device("meta"):
            model = MegaForCausalLM(small_config(use_chunking=True, chunk_size=4))
            ids = torch.zeros(2, 9, dtype=torch.int64)
            out = model(ids, torch.ones(2, 9), labels=ids)
        assert out.logits.shape == (2, 9, 23) and out.logits.is_meta
        linear = [m for m in causal_lm().modules() if isinstance(m, torch.nn.Linear)]
        assert len(linear) == 12 and {type(m) for m in linear} == {torch.nn.Linear}

    @slow
    @pytest.mark.parametrize("chunking", [{}, {"use_chunking": True, "chunk_size": 4}])
    def test_a_model_can_be_exported_and_compiled_in_one_graph(self, chunking):
        model = causal_lm(**chunking).float()
        ids, mask = token_ids(0, 2, 20), torch.ones(2, 20, dtype=torch.int64)
        options = {"use_cache": False}
        exported = torch.export.export(model, (ids, mask), options).module()
        close(exported(ids, mask, **options).logits, model(ids, mask).logits, 1e-5)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(ids, mask, **options).logits, model(ids, mask).logits, 1e-5)


# -------------------------------------------------------------------------------------- TestCache


class TestCache:
    """5: cached equals uncached over any split."""

    @given(
        seeds,
        st.integers(1, 21),
        st.lists(st.integers(0, 21), max_size=4),
        chunkings,
        attentions,
        biases,
        st.booleans(),
        st.booleans(),
    )
    def test_cached_equals_uncached_over_any_split(
        self, seed, length, cuts, chunking, attention, bias, padded, whole_mask
    ):
        model = shared_lm(attention_activation=attention, relative_positional_bias=bias, **chunking)
        ids, mask = token_ids(seed, 2, length), None
        cuts = [0, *sorted(min(cut, length) for cut in cuts), length]
        if padded:
            mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.3
            mask[:, [cut - 1 for cut in cuts[1:]]] = True  # a part may not end in padding
        cache, logits = None, []
        with torch.no_grad():
            expected = model(ids, mask).logits
            for a, b in itertools.pairwise(cuts):
                if a < b:
                    part = None if mask is None else mask[:, 0 if whole_mask else a : b]
                    out = model(ids[:, a:b], part, cache=cache, use_cache=True)
                    logits.append(out.logits)
                    cache = out.cache
        close(torch.cat(logits, 1), expected, 1e-6)  # fp32 angles in the rotary bias
        assert cache.length == length
        if chunking:
            for layer in cache.layers:
                assert layer.ema_state.shape == (2, 8, 3)
                assert layer.keys.shape == (2, length % chunking["chunk_size"], 6)
                assert layer.values.shape == (2, length % chunking["chunk_size"], 12)

    @given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), chunkings)
    @torch.no_grad()
    def test_a_cache_after_right_padding_is_refused_and_after_left_padding_right(
        self, seed, length, padding, new, chunking
    ):
        model = shared_lm(**chunking)
        ids, more = token_ids(seed, 1, length), token_ids(seed + 1, 1, new)
        junk = token_ids(seed + 2, 1, padding)
        ones, zeros = torch.ones(1, length), torch.zeros(1, padding)
        right = model(torch.cat([ids, junk], 1), torch.cat([ones, zeros], 1), use_cache=True).cache
        with pytest.raises(ValueError, match="the cache ends in padding"):
            model(more, cache=right)
        left = model(junk, zeros, use_cache=True).cache  # nothing but padding so far
        if not chunking or padding % chunking["chunk_size"] == 0:
            left = model(ids, ones, cache=left, use_cache=True).cache
            expected = model(torch.cat([ids, more], 1)).logits[:, length:]
            close(model(more, cache=left).logits, expected, 1e-6)

    @torch.no_grad()
    @given(
        seeds, st.integers(1, 12), st.integers(1, 9), chunkings, biases, attentions, st.booleans()
    )
    def test_steps_with_a_cache_equal_the_whole_row(
        self, seed, length, new, chunking, bias, attention, crosses
    ):
        options = {"relative_positional_bias": bias, "attention_activation": attention, **chunking}
        model = shared_lm(add_cross_attention=crosses, **options)
        ids = token_ids(seed, 2, length + new)
        encoder = {"encoder_hidden_states": randn(seed, 2, 5, 8)} if crosses else {}
        whole = model(ids, **encoder, use_cache=False).logits
        cache = model(ids[:, :length], **encoder, use_cache=True).cache
        for t in range(length, length + new):
            out = model(ids[:, t : t + 1], cache=cache)
            close(out.logits, whole[:, t : t + 1], 1e-6)
            cache = out.cache

    @torch.no_grad()
    @given(seeds, st.integers(1, 9), st.lists(st.integers(1, 3), min_size=2, max_size=5), chunkings)
    def test_a_kept_cache_can_be_continued_many_times(self, seed, length, steps, chunking):
        model = shared_lm(**chunking)
        ids = token_ids(seed, 2, length)
        branches = [(ids, model(ids, use_cache=True).cache)]
        for i, new in enumerate(steps):
            start = branches[(seed + i) % len(branches)]
            for branch in range(2):
                more = token_ids(seed + 10 * i + branch, 2, new)
                out = model(more, cache=start[1], use_cache=True)
                branches.append((torch.cat([start[0], more], 1), out.cache))
                close(out.logits, model(branches[-1][0]).logits[:, -new:], 1e-6)
        last = token_ids(seed, 2, 1)
        for ids, cache in branches:
            expected = model(torch.cat([ids, last], 1)).logits[:, -1:]
            close(model(last, cache=cache).logits, expected, 1e-6)

    def test_a_cache_with_gradients_carries_them_and_follows_the_weights(self):
        model, ids = causal_lm(use_chunking=True, chunk_size=4), token_ids(0, 1, 9)
        cache = model(ids[:, :6], use_cache=True).cache
        found = model(ids[:, 6:], cache=cache).logits
        expected = model(ids).logits[:, 6:]
        parameters = [p for n, p in model.named_parameters() if "ema_gate" in n]
        for a, b in zip(
            torch.autograd.grad(found.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters),
            strict=True,
        ):
            close(a, b, 1e-6)
        with torch.no_grad():
            cache = model(ids[:, :6], use_cache=True).cache
        model(ids[:, 6:], cache=cache).logits.sum().backward()
        assert model.mega.layers[0].mega_layer.ema_gate.decay_factor.grad.any()

    def test_a_cache_holds_little_more_memory_than_it_shows(self):
        """Nothing of closed chunks; room for later keys and values, at most twice theirs."""
        model = shared_lm(use_chunking=True, chunk_size=8)
        cache = model(token_ids(0, 1, 203), use_cache=True).cache
        for layer in cache.layers:
            for tensor, numbers in zip(layer[:3], (8 * 3, 3 * 6, 3 * 12), strict=True):
                assert tensor.untyped_storage().nbytes() == numbers * 8
        with torch.no_grad():
            out = model(token_ids(0, 1, 2), cache=cache, use_cache=True)
        for layer in out.cache.layers:
            for tensor, numbers in zip(layer[:3], (8 * 3, 5 * 6, 5 * 12), strict=True):
                assert tensor.untyped_storage().nbytes() <= 2 * numbers * 8

    @torch.no_grad()
    def test_a_cache_is_used_whatever_use_cache_says_and_never_changed(self):
        model, ids = shared_lm(use_chunking=True, chunk_size=4), token_ids(0, 1, 9)
        cache = model(ids[:, :6], use_cache=True).cache
        before = copy.deepcopy(cache)
        out = model(ids[:, 6:], cache=cache, use_cache=False)
        assert out.cache is None
        close(out.logits, model(ids).logits[:, 6:], 1e-6)
        for a, b in zip(cache.layers, before.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert model(ids).cache is not None  # a decoder in eval mode returns one
        assert copy.deepcopy(model).train()(ids).cache is None
        assert MegaForCausalLM(small_config(use_cache=False)).eval()(ids).cache is None

    @given(seeds, st.integers(1, 9), st.integers(1, 7), attentions)
    def test_left_and_right_padding_change_nothing(self, seed, length, pads, attention):
        model = shared_lm(attention_activation=attention)
        ids = token_ids(seed, 1, length)
        junk, ones = token_ids(seed + 1, 1, pads), torch.ones(1, length)
        zeros = torch.zeros(1, pads)
        with torch.no_grad():
            alone = model(ids).logits
            left = model(torch.cat([junk, ids], 1), torch.cat([zeros, ones], 1)).logits
            right = model(torch.cat([ids, junk], 1), torch.cat([ones, zeros], 1)).logits
        close(left[:, pads:], alone, 1e-6)
        close(right[:, :length], alone, 1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize("chunk", [0, 4])
    def test_a_mask_of_all_since_the_start_fits_its_cache(self, chunk):
        model = shared_lm(**({"use_chunking": True, "chunk_size": chunk} if chunk else {}))
        ids, mask = token_ids(0, 2, 11), torch.ones(2, 11)
        mask[0, 1] = mask[1, 5] = mask[1, 8] = 0
        expected, cache = model(ids, mask).logits, None
        for a, b in ((0, 3), (3, 7), (7, 8), (8, 11)):
            out = model(ids[:, a:b], mask[:, :b], cache=cache, use_cache=True)
            close(out.logits, expected[:, a:b], 1e-6)
            cache = out.cache

    @torch.no_grad()
    def test_a_mask_may_come_after_a_part_without_one(self):
        model, ids = shared_lm(), token_ids(0, 2, 9)
        mask = torch.ones(2, 9)
        mask[0, 5] = 0
        cache = model(ids[:, :4], use_cache=True).cache
        out = model(ids[:, 4:7], mask[:, 4:7], cache=cache, use_cache=True)
        rest = model(ids[:, 7:], cache=out.cache)
        close(torch.cat([out.logits, rest.logits], 1), model(ids, mask).logits[:, 4:], 1e-6)

    @torch.no_grad()
    @given(
        seeds, st.integers(2, 13), st.lists(st.integers(0, 13), max_size=3), chunkings, attentions,
        biases, st.booleans(),
    )  # fmt: skip
    def test_cached_equals_uncached_with_an_encoder(
        self, seed, L, cuts, chunking, attention, bias, pads
    ):
        options = {"attention_activation": attention, "relative_positional_bias": bias, **chunking}
        model = shared_lm(add_cross_attention=True, **options)
        ids, source = token_ids(seed, 2, L), randn(seed, 2, 7, 8)
        encoder = {"encoder_hidden_states": source}
        if pads:
            encoder["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0] * 7])
        expected, cache, logits = model(ids, **encoder).logits, None, []
        for a, b in itertools.pairwise([0, *sorted(min(c, L) for c in cuts), L]):
            if a < b:
                out = model(ids[:, a:b], cache=cache, use_cache=True, **(encoder if a == 0 else {}))
                cache = out.cache
                logits.append(out.logits)
        close(torch.cat(logits, 1), expected, 1e-6)
        for layer in cache.layers:
            assert layer.source_keys.shape == (2, 7, 6) and layer.source_values.shape == (2, 7, 8)


# -------------------------------------------------------------------------------------- TestHeads


class TestHeads:
    """6: losses, pooling, the loss without logits."""

    @pytest.mark.parametrize("cls", ["MegaForCausalLM", "MegaForMaskedLM"])
    def test_the_loss_without_logits_is_the_whole_one(self, cls):
        """With its gradients, of any scale, and labels that don't count."""
        for dense, tied in itertools.product((True, False), (True, False)):
            options = {"add_lm_hidden_dense_layer": dense, "tie_word_embeddings": tied}
            model = randomized(
                getattr(mega, cls)(small_config(is_decoder="Causal" in cls, **options))
            )
            ids = token_ids(0, 2, 400)
            labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
            found = []
            for asked in (True, False):
                out = model(ids, labels=labels, output_logits=asked)
                assert (out.logits is not None) == asked
                model.zero_grad()
                (3 * out.loss).backward()
                found.append(
                    [out.loss, *(p.grad for p in model.parameters() if p.grad is not None)]
                )
            for whole, sliced in zip(*found, strict=True):
                close(sliced, whole, 1e-12)

    @pytest.mark.parametrize(
        "change", ["hook", "pre-hook", "adapter", "subclass", "pruned", "forward"]
    )
    def test_a_training_step_of_many_labels_calls_a_changed_output_layer(self, change, monkeypatch):
        model, ids = causal_lm(tie_word_embeddings=False).train(), token_ids(0, 2, 300)
        plain = model(ids, labels=ids).loss
        if change == "hook":
            model.lm_head.register_forward_hook(lambda module, x, y: 2 * y)
        elif change == "pre-hook":
            model.lm_head.register_forward_pre_hook(lambda module, x: (2 * x[0],))
        elif change == "adapter":
            model.lm_head = LowRank(model.lm_head).double()
        elif change == "subclass":
            model.lm_head = Doubled(8, 23).double()
        elif change == "pruned":
            torch.nn.utils.prune.l1_unstructured(model.lm_head, "weight", 0.5)
        else:
            forward = model.lm_head.forward
            monkeypatch.setattr(model.lm_head, "forward", lambda x: 2 * forward(x))
        found, expected = model(ids, labels=ids), model(ids, labels=ids, output_logits=True)
        close(found.loss, expected.loss)
        assert found.logits is None and (found.loss - plain).abs() > 1e-3
        logits = []
        monkeypatch.setattr(mega, "draw", lambda x, *_: logits.append(x) or x.argmax(-1))
        model.float().eval()
        with unittest.mock.patch.object(torch, "get_num_threads", lambda: 1):
            model.generate(ids[:1, :4], 2)
        parts, logits[:] = list(logits), []
        with unittest.mock.patch.object(torch, "get_num_threads", lambda: 23):
            model.generate(ids[:1, :4], 2)
        close(torch.cat(parts), torch.cat(logits), 1e-5)  # decoding calls it, too

    def test_the_loss_without_logits_refuses_other_derivatives(self):
        model, ids = causal_lm().train(), token_ids(0, 2, 300)
        words = model.mega.embedding_layer["word_embeddings"](ids).detach().requires_grad_()

        def penalty(**more):
            loss = model(inputs_embeds=words, labels=ids, **more).loss
            (gradient,) = torch.autograd.grad(loss, words, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), words)[0]

        if mega.can_slice(words, model.lm_head):
            with pytest.raises(RuntimeError, match="output_logits=True"):
                penalty()
        assert penalty(output_logits=True).any()
        slope = torch.func.jvp(
            lambda x: model(inputs_embeds=x, labels=ids).loss, (words.detach(),), (words.detach(),)
        )[1]
        (gradient,) = torch.autograd.grad(model(inputs_embeds=words, labels=ids).loss, words)
        close(slope, (gradient * words).sum().detach(), 1e-8)

    def test_a_training_step_of_many_positions_leaves_its_logits_out(self, monkeypatch):
        monkeypatch.setattr(mega, "MANY_LABELS", 12)
        model, ids = causal_lm().train(), token_ids(0, 1, 13)
        assert model(ids, labels=ids).logits is None
        assert model(ids, labels=ids, output_logits=True).logits.shape == (1, 13, 23)
        assert model(ids[:, :12], labels=ids[:, :12]).logits is not None
        assert model(ids).logits is not None and model.eval()(ids, labels=ids).logits is not None
        with pytest.raises(
            ValueError, match=r"labels must have non-empty shape \(1, 13\), got \(13, 1\)"
        ):
            model(ids, labels=ids.mT, shift_labels=False, output_logits=False)
        assert torch.isnan(model(ids, labels=torch.full_like(ids, -100), output_logits=False).loss)

    def test_no_logits_of_all_positions_exist_in_a_training_step(self):
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip("torch is older than linear_cross_entropy")
        model, sizes = causal_lm(vocab_size=203, use_chunking=True, chunk_size=8).train(), []
        ids = token_ids(0, 2, 600)

        class Sizes(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                found = function(*args, **(kwargs or {}))
                sizes.extend(t.numel() for t in [found] if torch.is_tensor(t))
                return found

        with Sizes():
            model(ids, labels=ids).loss.backward()
        assert len(sizes) > 50 and max(sizes) < 1200 * 203

    def test_the_loss_is_the_mean_of_shifted_log_probabilities(self):
        model, ids = shared_lm(), token_ids(0, 2, 7)
        labels = ids.clone()
        labels[0, 3] = -100
        logp = model(ids).logits.log_softmax(-1)
        terms = [
            logp[b, t, labels[b, t + 1]] for b in range(2) for t in range(6) if labels[b, t + 1] > 0
        ]
        expected = -torch.stack(terms).mean()
        close(model(ids, labels=labels).loss, expected)
        close(model(ids[:, :-1], labels=labels[:, 1:], shift_labels=False).loss, expected)

    def test_tied_and_untied_heads(self):
        tied, untied = causal_lm(), causal_lm(tie_word_embeddings=False)
        embedding = "mega.embedding_layer.word_embeddings"
        assert tied.lm_head.weight is tied.get_submodule(embedding).weight
        assert untied.lm_head.weight is not untied.get_submodule(embedding).weight
        dense = MegaForCausalLM(small_config(add_lm_hidden_dense_layer=False))
        assert dense.dense is None
        hidden = randn(0, 2, 8)
        expected = (
            torch.tanh(hidden @ tied.dense.weight.T + tied.dense.bias) @ tied.lm_head.weight.T
        )
        close(tied.lm_head(tied.features(hidden)), expected + tied.lm_head.bias)

    @pytest.mark.parametrize("attention", sorted(ATTENTION_FUNCTIONS))
    @pytest.mark.parametrize("chunk_size", [0, 8])
    def test_a_tiny_model_learns_one_batch_by_heart(self, attention, chunk_size):
        torch.manual_seed(0)
        chunking = {"use_chunking": True, "chunk_size": chunk_size} if chunk_size else {}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "shared_representation_size": 16}
        config = small_config(**sizes, attention_activation=attention, final_norm=True, **chunking)
        model, ids = MegaForCausalLM(config), token_ids(0, 2, 20)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=0)
        for _ in range(120):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05

    def test_pooling_takes_the_first_visible_position_or_the_mean_of_the_visible(self):
        x = randn(0, 2, 5, 8)
        mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
        first, mean = small_config(), small_config(mean_pooling=True)
        first, mean = MegaModel(first), MegaModel(mean)
        assert torch.equal(first.pool(x, mask), torch.stack([x[0, 1], x[1, 0]]))
        assert torch.equal(first.pool(x, None), x[:, 0])
        close(mean.pool(x, None), x.mean(1))
        close(mean.pool(x, mask)[0], x[0, [1, 2, 4]].mean(0))
        assert not mean.pool(x, mask)[1].any()

    def test_sequence_classification_has_three_losses(self):
        ids, numbers = token_ids(0, 4, 5), randn(0, 4, 3)
        model, single = (
            head_model(mega.MegaForSequenceClassification, num_labels=n) for n in (3, 1)
        )
        logits, classes = model(ids).logits, torch.tensor([0, 2, -100, 1])
        logp = logits.log_softmax(-1)
        expected = -(logp[0, 0] + logp[1, 2] + logp[3, 1]) / 3
        for labels in (classes, classes.int()):
            close(model(ids, labels=labels).loss, expected)
        flags = numbers > 0
        p = logits.sigmoid()
        expected = -torch.where(flags, p, 1 - p).log().mean()
        for labels in (flags.double(), flags.float(), flags):
            close(model(ids, labels=labels).loss, expected, 1e-6)
        expected = (single(ids).logits - numbers[:, :1]).square().mean()
        for labels in (numbers[:, :1], numbers[:, 0]):  # one column is not spread over all rows
            close(single(ids, labels=labels).loss, expected)
        options = {"num_labels": 3, "problem_type": "regression"}
        model = head_model(mega.MegaForSequenceClassification, **options)
        expected = (model(ids).logits - numbers).square().mean()
        close(model(ids, labels=numbers).loss, expected)
        options = {"num_labels": 3, "problem_type": "multi_label_classification"}
        model = head_model(mega.MegaForSequenceClassification, **options)
        close(model(ids, labels=flags.long()).loss, model(ids, labels=flags.double()).loss)

    def test_the_other_heads_losses(self):
        ids, logp = token_ids(0, 2, 5), lambda logits: logits.log_softmax(-1)
        model, labels = head_model(mega.MegaForTokenClassification, num_labels=3), ids % 3
        labels[0, 1] = -100
        terms = [
            -logp(model(ids).logits)[i, j, y] for (i, j), y in np.ndenumerate(labels) if y >= 0
        ]
        close(model(ids, labels=labels).loss, torch.stack(terms).mean())
        model, labels = head_model(mega.MegaForMaskedLM), torch.full_like(ids, -100)
        labels[1, 2] = 7
        close(model(ids, labels=labels).loss, -logp(model(ids).logits)[1, 2, 7])
        model, many = head_model(mega.MegaForMultipleChoice), token_ids(1, 6, 5).view(2, 3, 5)
        logits = model(many).logits
        assert logits.shape == (2, 3)
        for b, choice in itertools.product(range(2), range(3)):
            alone = model(many[b : b + 1, choice : choice + 1]).logits
            close(logits[b, choice], alone[0, 0], 1e-6)
        expected = -(logp(logits)[0, 2] + logp(logits)[1, 0]) / 2
        close(model(many, labels=torch.tensor([2, 0])).loss, expected)
        mask, types = torch.ones(2, 3, 5), torch.zeros(2, 3, 5, dtype=torch.long)
        close(model(many, mask, token_type_ids=types).logits, logits)
        words = model.mega.embedding_layer["word_embeddings"](many)
        close(model(inputs_embeds=words).logits, logits)
        model = head_model(mega.MegaForQuestionAnswering)
        out = model(ids)
        assert out.loss is None and out.start_logits.shape == out.end_logits.shape == (2, 5)
        scores = model.qa_outputs(out.last_hidden_state)
        assert torch.equal(out.start_logits, scores[..., 0])
        assert torch.equal(out.end_logits, scores[..., 1])
        starts, ends = torch.tensor([3, 99]), torch.tensor([-4, 4])  # 99 is outside, -4 becomes 0
        expected = -logp(out.start_logits)[0, 3] / 2
        expected = expected - (logp(out.end_logits)[0, 0] + logp(out.end_logits)[1, 4]) / 4
        close(model(ids, start_positions=starts, end_positions=ends).loss, expected)
        assert model(ids, start_positions=starts).loss is None

    @pytest.mark.parametrize("step", [True, False])
    def test_labels_of_another_shape_are_refused(self, step):
        """As many of them, in another order, would give a loss of the wrong tokens."""
        ids = token_ids(0, 2, 6)
        for model in (causal_lm(), head_model(mega.MegaForMaskedLM)):
            labels = ids.view(3, 4)
            more = {"shift_labels": False} if isinstance(model, MegaForCausalLM) else {}
            with pytest.raises(
                ValueError, match=r"labels must have non-empty shape \(2, 6\), got \(3, 4\)"
            ):
                model.train(step)(ids, labels=labels, output_logits=not step, **more)
            mask = torch.ones(2, 6)  # the second argument, with and without labels
            loss = model(ids, mask, labels=ids, output_logits=not step).loss
            assert loss.isfinite()
        with pytest.raises(ValueError, match=r"labels must have non-empty shape \(2, 6\)"):
            head_model(mega.MegaForTokenClassification)(ids, labels=ids.view(3, 4) % 2)

    @pytest.mark.parametrize(("change", "message"), [
        (lambda x: x.float(), "labels must contain integers, got torch.float32"),
        (lambda x: x > 0, "labels must contain integers, got torch.bool"),
        (lambda x: x + 100, "labels must be from 0 to"),
        (lambda x: -1 - x, "labels must be from 0 to"),
        (lambda x: x.tolist(), "labels must be a tensor, got list"),
    ])  # fmt: skip
    def test_labels_that_are_no_classes_are_refused_by_name(self, change, message):
        ids = token_ids(0, 2, 6)
        options = {"problem_type": "single_label_classification", "num_labels": 3}
        classifier = head_model(mega.MegaForSequenceClassification, **options)
        for model, labels in (
            (causal_lm(), ids),
            (head_model(mega.MegaForMaskedLM), ids),
            (head_model(mega.MegaForTokenClassification), ids % 2),
            (classifier, ids[:, 0] % 3),
        ):
            for step in (True, False):
                with pytest.raises(ValueError, match=message):
                    model.train(step)(ids, labels=change(labels))
        for step in (True, False):  # a step makes no logits
            with pytest.raises(ValueError, match=message):
                causal_lm().train(step)(ids, labels=change(ids), output_logits=False)
        questions = head_model(mega.MegaForQuestionAnswering)
        for wrong in (torch.tensor([0.5, 1]), torch.tensor([True, False]), [0, 1]):
            with pytest.raises(ValueError, match="end_positions must (be|contain)"):
                questions(ids, start_positions=torch.tensor([0, 1]), end_positions=wrong)

    def test_numbers_and_flags_as_labels_fit_their_logits(self):
        ids = token_ids(0, 2, 6)
        for kind, size, labels, message in (
            ("regression", 1, torch.rand(3), r"labels must have non-empty shape \(2\)"),
            (
                "regression",
                3,
                torch.rand(2),
                r"labels must have non-empty shape \(2, 3\)|got \(2,\)",
            ),
            ("multi_label_classification", 3, torch.rand(3, 2), r"labels must have .*\(2, 3\)"),
            ("multi_label_classification", 3, torch.full((2, 3), 2), "labels must be from 0 to 1"),
        ):
            options = {"problem_type": kind, "num_labels": size}
            with pytest.raises(ValueError, match=message):
                head_model(mega.MegaForSequenceClassification, **options)(ids, labels=labels)
        model = head_model(mega.MegaForSequenceClassification, num_labels=1)
        column = torch.tensor([[0.5], [2.0]])
        assert model(ids, labels=column).loss == model(ids, labels=column[:, 0]).loss

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
    def test_ids_and_labels_of_any_integers_are_the_same_ids(self, dtype):
        ids = token_ids(0, 2, 7, vocab_size=300)
        model = causal_lm(vocab_size=300)
        narrow = (ids % 120).to(dtype)
        wide = narrow.long()
        for step in (True, False):
            found = model.train(step)(narrow, labels=narrow)
            assert found.loss == model(wide, labels=wide).loss
        new = model.generate(narrow, 20, temperature=0)
        assert new.dtype == torch.int64 and new.equal(model.generate(wide, 20, temperature=0))
        assert new.max() > 255  # more than a byte can hold
        types = causal_lm(add_token_type_embeddings=True)
        kinds = torch.ones(2, 7, dtype=dtype)
        small = wide % 23
        assert same(types(small, token_type_ids=kinds), types(small, token_type_ids=kinds.long()))

    def test_dropout_of_the_heads(self, monkeypatch):
        rates = []
        dropout = F.dropout
        monkeypatch.setattr(F, "dropout", lambda x, p, *a: rates.append(p) or dropout(x, p, *a))
        p = {"hidden_dropout_prob": 0.25, "is_decoder": False, "num_hidden_layers": 1}
        for head, changes, expected in (
            (mega.MegaForTokenClassification, {"classifier_dropout": 0.5}, [0.5]),
            (mega.MegaForTokenClassification, {}, [0.25]),
            (mega.MegaForSequenceClassification, {"classifier_dropout": 0.5}, [0.5, 0.5]),
            (mega.MegaForSequenceClassification, {"classifier_dropout": 0.0}, []),
            (mega.MegaForMultipleChoice, {"classifier_dropout": 0.5}, [0.25]),
            (mega.MegaForQuestionAnswering, {"classifier_dropout": 0.5}, []),
            (mega.MegaForMaskedLM, {"classifier_dropout": 0.5}, []),
        ):
            rates.clear()
            ids = token_ids(0, 2, 5)
            choices = head is mega.MegaForMultipleChoice
            head(small_config(**p, **changes)).train()(ids[None] if choices else ids)
            body = [0.25]  # the values' dropout, of the one layer
            assert sorted(r for r in rates if r) == sorted(body + expected), head

    def test_the_heads_refuse_what_they_cannot_use(self):
        ids, source = token_ids(0, 2, 6), randn(0, 2, 3, 8)
        bare, crossing = shared_lm(), shared_lm(add_cross_attention=True)
        typed = randomized(MegaModel(small_config(add_token_type_embeddings=True)))
        choice = head_model(mega.MegaForMultipleChoice)
        for call, word in (
            (lambda: bare(), "input_ids and inputs_embeds"),
            (lambda: bare(ids, inputs_embeds=randn(0, 2, 6, 8)), "input_ids and inputs_embeds"),
            (lambda: bare(inputs_embeds=randn(0, 2, 6, 7)), r"inputs_embeds .*8.*got \(2, 6, 7\)"),
            (lambda: bare(inputs_embeds=randn(0, 6, 8)), r"inputs_embeds .*got \(6, 8\)"),
            (lambda: typed(ids, token_type_ids=ids), "token_type_ids must be from 0 to 1, got"),
            (lambda: typed(ids, token_type_ids=ids[:, :3] * 0), r"token_type_ids .*\(2, 3\)"),
            (lambda: bare(ids, encoder_hidden_states=source), "add_cross_attention=True"),
            (lambda: crossing(ids), "encoder_hidden_states"),
            (lambda: crossing(ids, encoder_hidden_states=source[:1]), r"got \(1, 3, 8\)"),
            (lambda: crossing(ids, encoder_hidden_states=source[..., :5]), r"got \(2, 3, 5\)"),
            (
                lambda: crossing(
                    ids, encoder_hidden_states=source, encoder_attention_mask=torch.ones(2, 4)
                ),
                r"encoder_attention_mask .*\(2, 3\), got \(2, 4\)",
            ),
            (lambda: crossing.generate(ids, 2), "encoder_hidden_states"),
            (lambda: choice(ids), "input_ids"),
            (lambda: choice(), "input_ids and inputs_embeds"),
            (lambda: mega.MegaForQuestionAnswering(small_config(num_labels=3)), "num_labels .*3"),
        ):
            with pytest.raises(ValueError, match=word):
                call()
        with pytest.raises(TypeError, match="label"):
            bare(ids, label=ids)

    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize(
        "head", ["MegaModel", "MegaForSequenceClassification", "MegaForMultipleChoice"]
    )
    @given(seed=seeds, length=st.integers(1, 7), padding=st.integers(1, 5))
    def test_padding_on_either_side_changes_no_vector_of_a_sequence(
        self, mean, head, seed, length, padding
    ):
        model = head_model(getattr(mega, head), mean_pooling=mean)
        ids, junk = token_ids(seed, 2, length), token_ids(seed + 1, 2, padding)
        ones, zeros = torch.ones(2, length), torch.zeros(2, padding)

        def vector(ids, mask):
            many = head == "MegaForMultipleChoice"
            out = model(*(t.unsqueeze(0) if many else t for t in (ids, mask)))
            return out.pooler_output if head == "MegaModel" else out.logits

        expected = vector(ids, ones)
        close(vector(torch.cat([junk, ids], 1), torch.cat([zeros, ones], 1)), expected, 1e-6)
        close(vector(torch.cat([ids, junk], 1), torch.cat([ones, zeros], 1)), expected, 1e-6)

    @pytest.mark.parametrize("mean", [False, True])
    def test_left_padding_of_whole_chunks_is_classified_and_other_refused(self, mean):
        model = head_model(
            mega.MegaForSequenceClassification, mean_pooling=mean, use_chunking=True, chunk_size=4
        )
        ids = token_ids(0, 2, 6)
        padded, mask = F.pad(ids, (4, 0), value=9), F.pad(torch.ones(2, 6), (4, 0))
        close(model(padded, mask).logits, model(ids).logits, 1e-6)
        with pytest.raises(ValueError, match=r"left padding of \[3, 3\] positions"):
            model(padded[:, 1:], mask[:, 1:])


# ----------------------------------------------------------------------------------- TestGenerate


class TestGenerate:
    """7."""

    @given(seeds, st.integers(1, 9), st.integers(0, 14), chunkings, attentions)
    def test_greedy_generation_takes_the_likeliest_token_again_and_again(
        self, seed, length, new, chunking, attention
    ):
        model = shared_lm(attention_activation=attention, **chunking)
        ids = token_ids(seed, 2, length)
        found = model.generate(ids, new, temperature=0)
        with torch.no_grad():
            for _ in range(new):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids)

    @pytest.mark.parametrize("plain", [True, False])
    def test_generation_streams_and_never_recomputes_the_prefix(self, monkeypatch, plain):
        model, ids, pieces, lengths = causal_lm(), token_ids(0, 2, 7), [], []
        monkeypatch.setattr(mega, "can_decode", lambda *_: plain)
        forward = model.mega.forward
        monkeypatch.setattr(model.mega, "forward", lambda ids, *a, **k: (
            lengths.append(ids.shape[1]), forward(ids, *a, **k))[1])  # fmt: skip
        model.train().mega.layers[0].eval()
        found = model.generate(ids, 5, seed=3, stream=pieces.append)
        assert model.training and not model.mega.layers[0].training
        model.eval()
        assert lengths == [7] if plain else [7, 1, 1, 1, 1]
        assert torch.equal(torch.stack(pieces, 1), found[:, 7:])
        assert torch.equal(found, model.generate(ids, 5, seed=3))
        assert not torch.equal(found, model.generate(ids, 5, seed=4))

    def test_generation_stops_at_the_end_of_text(self):
        model, ids = shared_lm(), token_ids(1, 3, 4)
        free = model.generate(ids, 12, temperature=0)
        eos = free[0, 6].item()
        found = model.generate(ids, 12, temperature=0, eos_token_id=eos)
        for row, expected in zip(found[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
            stop = expected.index(eos) + 1 if eos in expected else len(row)
            assert row[:stop] == expected[:stop] and set(row[stop:]) <= {1}
        alone = model.generate(ids[:1], 12, temperature=0, eos_token_id=eos)
        assert alone[0, -1] == eos and alone.shape[1] <= 7

    @given(seeds, st.lists(st.integers(1, 6), min_size=2, max_size=3), attentions)
    def test_each_row_of_a_batch_gives_what_it_gives_alone(self, seed, lengths, attention):
        model, longest = shared_lm(attention_activation=attention), max(lengths)
        rows = [token_ids(seed + i, 1, n) for i, n in enumerate(lengths)]
        batch = torch.cat([F.pad(row, (longest - row.shape[1], 0), value=1) for row in rows])
        found = model.generate(batch, 6, temperature=0, attention_mask=batch != 1)
        for row, n, together in zip(rows, lengths, found, strict=True):
            assert torch.equal(model.generate(row, 6, temperature=0)[0, n:], together[longest:])

    def test_a_chunked_batch_of_several_lengths_works_by_whole_chunks_or_is_refused(self):
        model = shared_lm(use_chunking=True, chunk_size=4)
        row = token_ids(0, 1, 3)
        batch = torch.cat([F.pad(row, (4, 0), value=1), token_ids(1, 1, 7)])
        found = model.generate(batch, 6, temperature=0, attention_mask=batch != 1)
        assert torch.equal(found[0, 7:], model.generate(row, 6, temperature=0)[0, 3:])
        with pytest.raises(ValueError, match="pass one sequence per call"):
            model.generate(batch[:, 1:], 6, attention_mask=batch[:, 1:] != 1)
        with pytest.raises(ValueError, match=r"\(2, 7\), got \(2, 6\)"):
            model.generate(batch, 2, attention_mask=batch[:, 1:])
        with pytest.raises(ValueError, match="left padding"):
            model.generate(batch, 2, attention_mask=batch.flip(1) != 1)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_new_tokens": -1},
            {"temperature": -1.0},
            {"temperature": math.nan},
            {"top_k": 0},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"max_new_tokens": 2.5},
            {"top_k": 1.5},
            {"eos_token_id": -3},
            {"max_new_tokens": True},
        ],
        ids=str,
    )
    def test_generation_refuses_impossible_options(self, options):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name} must be .*, got {options[name]}"):
            shared_lm().generate(token_ids(0, 1, 3), **{"max_new_tokens": 2, **options})
        assert shared_lm().generate(token_ids(0, 1, 3), 70).shape == (1, 73)  # beyond max_positions

    @torch.no_grad()
    def test_generation_from_a_cache_needs_the_padding_in_front_too(self):
        model, ids = causal_lm(), token_ids(0, 2, 6)
        cache = model(ids[:, :4], use_cache=True).cache
        for mask in ([[1, 0], [1, 1]], [[1] * 5 + [0], [1] * 6]):
            with pytest.raises(ValueError, match="left padding"):
                model.generate(ids[:, 4:], 1, cache=cache, attention_mask=torch.tensor(mask))

    def test_generation_goes_on_from_a_cache(self):
        for chunking in ({}, {"use_chunking": True, "chunk_size": 4}):
            model, ids = shared_lm(**chunking), token_ids(0, 2, 9)
            cache = model(ids[:, :6], use_cache=True).cache
            expected = model.generate(ids, 8, 0)
            for _ in range(2):  # twice: the cache stays as it was
                found = model.generate(ids[:, 6:], 8, 0, cache=cache)
                assert torch.equal(found, expected[:, 6:])

    @pytest.mark.parametrize("length", [1, 3, 64])
    def test_generation_ends_at_the_simple_biass_last_position(self, length):
        """It reads max_positions 64 tokens, and one more is made of them."""
        model = shared_lm(relative_positional_bias="simple")
        assert model.generate(token_ids(0, 1, length), 65 - length).shape == (1, 65)
        too_long = r"but the last new token\) 65 is above max_positions 64"
        with pytest.raises(ValueError, match=too_long):
            model.generate(token_ids(0, 1, length), 66 - length)
        changes = {"relative_positional_bias": "simple", "use_chunking": True, "chunk_size": 8}
        assert causal_lm(**changes).generate(token_ids(0, 1, length), 70).shape == (1, length + 70)
        crossing = MegaForCausalLM(decoder_config(**changes)).double()
        states = {"encoder_hidden_states": randn(0, 1, 4, 8)}
        assert crossing.generate(token_ids(0, 1, length), 65 - length, **states).shape == (1, 65)
        with pytest.raises(ValueError, match=too_long):
            crossing.generate(token_ids(0, 1, length), 66 - length, **states)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300, 5e-324])
    def test_a_temperature_near_0_takes_the_likeliest(self, temperature):
        logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
        assert mega.draw(logits, temperature, None, None, None).tolist() == [1, 0]

    @given(seeds, st.integers(1, 30), st.floats(0.05, 1))
    def test_top_k_and_top_p_keep_the_likeliest(self, seed, k, top_p):
        logits = randn(seed, 1, 12) * 2
        p, order = logits.softmax(-1)[0].sort(descending=True)
        smallest = next(n for n in range(1, 13) if p[:n].sum() >= top_p - 1e-12 or n == 12)
        generator = torch.Generator().manual_seed(seed)
        many = logits.expand(300, -1)
        for options, kept in (((k, None), min(k, 12)), ((None, top_p), smallest)):
            drawn = mega.draw(many, 1.0, *options, generator)
            assert set(drawn.tolist()) <= set(order[:kept].tolist())
        assert set(mega.draw(many, 1e-4, None, None, generator).tolist()) == {order[0].item()}

    def test_top_k_draws_no_more_than_k_of_equally_likely_tokens(self):
        many = torch.zeros(2000, 10)
        for k in (1, 3, 10):
            drawn = set(mega.draw(many, 1.0, k, None, None).tolist())
            assert len(drawn) == k and (k > 1 or drawn == {0})  # as temperature 0 takes
        assert drawn == set(range(10))
        for p in (1e-46, 1e-9):  # a number that fp32 takes for 0, too
            logits = randn(0, 50, 10, dtype=torch.float32)
            assert mega.draw(logits, 1.0, None, p, None).equal(logits.argmax(-1))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_logits_that_are_no_numbers_draw_nothing(self, value, temperature):
        logits = torch.full((2, 5), -math.inf)
        logits[:, 2] = 1.0  # the only one that is left
        assert mega.draw(logits, temperature, None, None, None).tolist() == [2, 2]
        logits[1, 2] = value
        with pytest.raises(ValueError, match="can't sample from logits"):
            mega.draw(logits, temperature, None, None, None)
        model = causal_lm()
        model.lm_head.bias.data[0] = math.nan
        with pytest.raises(ValueError, match="can't sample from logits"):
            model.generate(token_ids(0, 1, 3), 4)

    @pytest.mark.parametrize("kind", [list, tuple, set, torch.tensor, np.array])
    def test_any_of_several_tokens_ends_a_sequence(self, kind):
        model, ids = causal_lm(), token_ids(0, 3, 4)
        free = model.generate(ids, 12, temperature=0)[:, 4:]
        ends = [free[0, 2].item(), free[1, 5].item()]
        given = list(kind(ends)) if kind is set else kind(ends)
        ended = model.generate(ids, 12, temperature=0, eos_token_id=given)[:, 4:]
        for row, expected in zip(ended, free, strict=True):
            stop = next((i for i, token in enumerate(expected.tolist()) if token in ends), 99)
            assert row[: stop + 1].equal(expected[: len(row)][: stop + 1])
            assert (row[stop + 1 :] == model.config.pad_token_id).all()
        one = model.generate(ids, 12, temperature=0, eos_token_id=ends[0], seed=np.int64(3))
        for same_one in ([ends[0]], torch.tensor(ends[0]), np.int64(ends[0])):
            assert one.equal(model.generate(ids, 12, temperature=0, eos_token_id=same_one))
        assert free.equal(model.generate(ids, 12, temperature=0, eos_token_id=[])[:, 4:])
        for wrong in ([1.5], "a", {1, 2}, [1, None]):
            with pytest.raises(ValueError, match="eos_token_id must (be|contain) integers"):
                model.generate(ids, 12, eos_token_id=wrong)

    def test_logits_can_be_processed_and_a_stream_can_stop(self, transformers):
        model, ids = causal_lm(), token_ids(0, 2, 4)
        seen = []

        def process(all_ids, logits):
            seen.append(all_ids.clone())
            return logits.index_fill(-1, torch.tensor([7, 8]), -math.inf)

        banned = model.generate(ids, 30, temperature=2.0, seed=1, process=process)
        assert not {7, 8} & set(banned[:, 4:].flatten().tolist())
        assert [x.shape[1] for x in seen] == list(range(4, 34))
        assert all(x.equal(banned[:, : x.shape[1]]) for x in seen)
        theirs = transformers.SuppressTokensLogitsProcessor([7, 8])
        assert model.generate(ids, 30, temperature=2.0, seed=1, process=theirs).equal(banned)
        for wrong in (lambda i, x: None, lambda i, x: x[0], lambda i, x: x[:, 1:]):
            with pytest.raises(ValueError, match="processed logits must (be|have)"):
                model.generate(ids, 3, process=wrong)
        tokens = []
        stopped = model.generate(ids, 30, 0, stream=lambda t: tokens.append(t) or len(tokens) == 3)
        assert stopped.shape == (2, 7) and torch.stack(tokens, 1).equal(stopped[:, 4:])
        whole = model.generate(ids, 5, 0, stream=lambda t: 1)  # what write() returns stops nothing
        assert whole.shape == (2, 9)
        assert not any(t.is_inference() for t in [*tokens, stopped])  # they may be trained on

    @pytest.mark.parametrize("chunking", [{}, {"use_chunking": True, "chunk_size": 4}])
    def test_generation_sees_the_logits_of_the_whole_row(self, monkeypatch, chunking):
        model, seen, draw = shared_lm(**chunking), [], mega.draw
        monkeypatch.setattr(
            mega, "draw", lambda logits, *a: seen.append(logits) or draw(logits, *a)
        )
        made, coefficients = [], mega.DampedEMA.coefficients
        counting = lambda self: made.append(self) or coefficients(self)
        monkeypatch.setattr(mega.DampedEMA, "coefficients", counting)
        ids = model.generate(token_ids(0, 2, 5), 9, 0)
        assert len(made) == 4  # of both layers, once for the prompt and once for all steps
        assert not ids.is_inference()  # it may be trained on
        close(torch.stack(seen, 1).clone(), model(ids).logits[:, 4:-1].detach(), 1e-6)

    @torch.no_grad()
    @given(
        seeds, st.integers(1, 12), st.sampled_from([1, 1, 2]), chunkings, biases, attentions,
        st.sampled_from(sorted(mega.NORMS)), st.booleans(), st.sampled_from(["silu", "linear"]),
        st.sampled_from([torch.float32] * 3 + [torch.float64, torch.bfloat16]), st.integers(1, 3),
    )  # fmt: skip
    def test_a_decoding_step_computes_what_the_model_computes(
        self,
        seed,
        length,
        rows,
        chunking,
        bias,
        attention,
        norm,
        before,
        act,
        dtype,
        threads,
    ):
        model = causal_lm(
            seed, relative_positional_bias=bias, attention_activation=attention,
            activation=act, normalization_type=norm, normalize_before_mega=before,
            normalize_before_ffn=before, final_norm=before, scale_embedding=True, **chunking,
        ).to(dtype).mega  # fmt: skip
        ids = token_ids(seed, rows, length + 9)
        cache = model(ids[:, :length], use_cache=True).cache
        kept = [t.clone() for layer in cache.layers for t in layer[:3]]
        assert mega.can_decode(model, cache, {"use_cache": True})
        with unittest.mock.patch.object(torch, "get_num_threads", lambda: threads):
            state = mega.start_decoding(model, cache)
            following = cache
            for t in range(length, length + 9):
                out = model(ids[:, t : t + 1], cache=following)
                following = out.cache
                found, state = mega.decode_step(model, state, ids[:, t])
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
                close(found, out.last_hidden_state[:, 0], tolerance)
        assert state.length == following.length == length + 9
        assert all(map(torch.equal, kept, (t for layer in cache.layers for t in layer[:3])))

    @pytest.mark.parametrize("change", [
        "hook", "forward", "layer", "average", "feed-forward", "mask", "types", "encoder",
        "cached encoder", "autocast", "no feed-forward", "adapter", "norm", "embedding",
    ])  # fmt: skip
    def test_generation_of_a_changed_model_is_that_of_its_forward(self, monkeypatch, change):
        """Whatever is put in a module's place takes part in every step."""
        settings = {
            "types": {"add_token_type_embeddings": True},
            "encoder": {"add_cross_attention": True},
            "cached encoder": {"add_cross_attention": True},
            "no feed-forward": {"use_normalized_ffn": False},
        }
        model, ids = causal_lm(**settings.get(change, {})), token_ids(0, 2, 5)
        inputs = {}
        layer = model.mega.layers[1].mega_layer
        twice = lambda *found: (found[-1][0] * 2, *found[-1][1:])
        if change == "hook":
            layer.register_forward_hook(lambda module, inputs, found: twice(found))
        elif change == "forward":
            forward = layer.forward
            layer.forward = lambda *a, **k: twice(forward(*a, **k))
        elif change in ("layer", "average", "feed-forward"):
            name = {"layer": "mega_layer", "average": "ema_gate", "feed-forward": "nffn"}[change]
            place = layer if change == "average" else model.mega.layers[1]
            old = getattr(place, name)

            class Other(type(old)):
                def forward(self, *a, **k):
                    found = super().forward(*a, **k)
                    return found * 2 if torch.is_tensor(found) else twice(found)

            old.__class__ = Other
        elif change == "mask":
            inputs["attention_mask"] = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        elif change == "types":
            inputs["token_type_ids"] = torch.ones_like(ids)
        elif change == "encoder":
            inputs["encoder_hidden_states"] = randn(0, 2, 3, 8)
        elif change == "cached encoder":
            encoder = {"encoder_hidden_states": randn(0, 2, 3, 8)}
            inputs["cache"] = model(ids, **encoder, use_cache=True).cache
        elif change == "norm":
            layer.norm = torch.nn.RMSNorm(8).double()
        elif change == "embedding":
            model.mega.embedding_layer["word_embeddings"] = torch.nn.Sequential(
                model.mega.embedding_layer["word_embeddings"], torch.nn.Linear(8, 8).double()
            )
        elif change == "adapter":
            layer.v_proj = LowRank(layer.v_proj).double()
        if change == "autocast":
            model.float()
            ids = ids[:1]
        draw, seen, found = mega.draw, [], []
        monkeypatch.setattr(mega, "draw", lambda x, *a: seen.append(x.clone()) or draw(x, *a))
        for patch in ({}, {"can_decode": lambda *_: False}):
            for name, value in patch.items():
                monkeypatch.setattr(mega, name, value)
            with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
                model.generate(ids, 9, 0, **inputs)
            found.append(torch.stack(seen))
            seen.clear()
        close(*(x.clone() for x in found), 0.02 if change == "autocast" else 1e-10)

    def test_a_chunked_model_generates_with_a_cache_that_does_not_grow(self):
        model, ids = shared_lm(use_chunking=True, chunk_size=8).float(), token_ids(0, 1, 3)
        cache, most = None, 0
        with torch.no_grad():
            for _ in range(300):
                out = model(ids[:, -1:], cache=cache, use_cache=True)
                ids, cache = out.logits[:, -1:].argmax(-1), out.cache
                held = [t.untyped_storage().nbytes() for layer in cache.layers for t in layer[:3]]
                most = max(most, sum(held))
        model.double()
        assert most <= 2 * 4 * (8 * 3 + 2 * 7 * (6 + 12)) and cache.length == 300


# -------------------------------------------------------------------------------- TestCheckpoints


class TestCheckpoints:
    """8: files both ways, the hub, resizing; mega.py alone."""

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_saved_model_loads_bit_equal(self, tmp_path, tied):
        model = causal_lm(tie_word_embeddings=tied, final_norm=True)
        model.config.extra["mine"] = 1
        model.save_pretrained(tmp_path)
        loaded = MegaForCausalLM.from_pretrained(tmp_path).double()
        assert not loaded.training and loaded.config.extra["mine"] == 1
        assert loaded.config.to_dict() | {"architectures": 0} == model.config.to_dict() | {
            "architectures": 0
        }
        for (name, a), b in zip(
            model.state_dict().items(), loaded.state_dict().values(), strict=True
        ):
            assert torch.equal(a.float(), b.float()), name
        assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    def test_a_folder_whose_files_do_not_fit_is_named(self, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 10}))
        with pytest.raises(ValueError, match=r"word_embeddings.weight is \(23, 8\).*\(23, 10\)"):
            MegaForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(ValueError, match="mega.layers.2.* is missing"):
            MegaForCausalLM.from_pretrained(tmp_path)

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        causal_lm().save_pretrained(tmp_path)
        old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        write_bytes = Path.write_bytes

        def full_disk(path, content):
            write_bytes(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="space"):
            causal_lm(seed=5).save_pretrained(tmp_path)
        monkeypatch.undo()
        assert all((tmp_path / name).read_bytes() == content for name, content in old.items())

    @quiet
    @pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
    @pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
    def test_every_form_of_checkpoint_is_read(self, tmp_path, kind, prefix):
        model = causal_lm(tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        write_weights(tmp_path, weights, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same_weights(model, MegaForCausalLM.from_pretrained(tmp_path))

    @quiet
    @pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
    def test_base_and_head_checkpoints_open_each_other(self, tmp_path, head):
        model = randomized(head(small_config(**ALL_HEADS_CONFIG)))
        model.save_pretrained(tmp_path / "own")
        config = json.loads((tmp_path / "own" / "config.json").read_text())
        assert config["architectures"] == [head.__name__] and config["model_type"] == "mega"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=".*expects is_decoder=")
            assert same_weights(model, head.from_pretrained(tmp_path / "own"))
            body = MegaModel(model.config, add_pooling_layer=False)
            body.load_state_dict(getattr(model, "mega", model).state_dict(), strict=False)
            body.save_pretrained(tmp_path / "body")
        for other in HEADS:  # each head's file opens as each other
            if head is not other and {head, other} <= set(HEADS[3:6]):
                continue  # `classifier` means something else in each of them
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = other.from_pretrained(tmp_path / "own")
            body = getattr(found, "mega", found).state_dict()
            old = getattr(model, "mega", model).state_dict()
            assert all(torch.equal(body[n], old[n].float()) for n in body if n in old)
            said = [str(w.message) for w in caught if "newly initialised" in str(w.message)]
            new = found.state_dict().keys() - model.state_dict().keys()
            new -= {"mega." + name for name in model.state_dict()}
            new -= {name.removeprefix("mega.") for name in model.state_dict()}
            # A tied output layer is the embedding, which every file has.
            new -= {"lm_head.weight", "mlm_head.weight"}
            assert len(said) == bool(new), (said, new)
            assert all(name in said[0] for name in new)
        with pytest.warns(
            UserWarning, match="newly initialised: .*(dense|classifier|outputs|head)"
        ):
            head.from_pretrained(tmp_path / "body")

    @pytest.mark.parametrize("file_tied", [True, False])
    @pytest.mark.parametrize("model_tied", [True, False])
    def test_tied_and_untied_files_open_in_every_combination(self, tmp_path, file_tied, model_tied):
        model = causal_lm(tie_word_embeddings=file_tied)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = MegaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=model_tied)
        words = found.mega.embedding_layer["word_embeddings"].weight
        assert (found.lm_head.weight is words) == model_tied
        head = model.lm_head.weight.float()
        assert torch.equal(found.lm_head.weight, head)
        if not model_tied:
            old = model.mega.embedding_layer["word_embeddings"].weight.float()
            assert torch.equal(words, old)
        names = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
        assert ("lm_head.weight" in names) != file_tied

    def test_the_statistics_of_batchnorm_are_saved(self, tmp_path):
        model = causal_lm(normalization_type="batchnorm").train()
        model(token_ids(0, 2, 6))
        model.save_pretrained(tmp_path)
        assert same_weights(model, MegaForCausalLM.from_pretrained(tmp_path))

    def test_a_tied_file_may_have_the_output_instead_of_the_embedding(self, tmp_path):
        model = causal_lm()
        model.save_pretrained(tmp_path)
        weights = model.state_dict()
        del weights["mega.embedding_layer.word_embeddings.weight"]
        write_weights(tmp_path, weights, "bin")
        assert same_weights(model, MegaForCausalLM.from_pretrained(tmp_path))

    @pytest.mark.parametrize("setting", MISFITS)
    def test_a_setting_that_does_not_fit_the_file_is_named(self, tmp_path, setting):
        options = {"relative_positional_bias": "simple", "add_token_type_embeddings": True}
        head = mega.MegaForSequenceClassification
        head_model(head, num_labels=7, **options).save_pretrained(tmp_path)
        value, message = MISFITS[setting]
        with pytest.raises(ValueError, match=message) as error:
            head.from_pretrained(tmp_path, **{setting: value})
        said = str(error.value)
        assert "tensor " in said and str(tmp_path) in said and "\n" not in said
        if "missing" not in message:
            assert len(re.findall(r"\(\d+,[ \d,]*\)", said)) == 2  # both shapes
            assert f"{setting}={value}" in said and "ignore_mismatched_sizes" in said
        with pytest.raises(TypeError, match="hiden_size"):
            head.from_pretrained(tmp_path, hiden_size=8)

    @quiet
    def test_a_bidirectional_checkpoint_opens_as_a_decoder_only_on_request(self, tmp_path):
        model = head_model(mega.MegaForMaskedLM, bidirectional=True)
        model.save_pretrained(tmp_path)
        causal = {"is_decoder": True, "bidirectional": False}
        with pytest.raises(ValueError, match=r"\(16, 3, 1\).*\(8, 3, 1\).*bidirectional=True"):
            MegaForCausalLM.from_pretrained(tmp_path, **causal)
        with pytest.warns(UserWarning, match="newly initialised: .*dense.weight|lm_head.bias"):
            found = MegaForCausalLM.from_pretrained(
                tmp_path, **causal, ignore_mismatched_sizes=True
            )
        for new, old in zip(found.mega.layers, model.mega.layers, strict=True):
            for name in ("damping_factor", "kernel_projection_matrix"):  # the forward half is kept
                a, b = (getattr(layer.mega_layer.ema_gate, name) for layer in (new, old))
                assert torch.equal(a, b[:8].float())
        assert found.generate(token_ids(0, 1, 3), 2).shape == (1, 5)
        model = causal_lm()
        model.save_pretrained(tmp_path / "causal")
        with pytest.raises(ValueError, match="bidirectional=False"):
            mega.MegaForMaskedLM.from_pretrained(
                tmp_path / "causal", is_decoder=False, bidirectional=True
            )

    @quiet
    def test_a_config_that_is_no_config_is_named(self, tmp_path):
        head_model(MegaModel).save_pretrained(tmp_path)
        for content in ("", "{", "[]", "null", '"x"', "3"):
            (tmp_path / "config.json").write_text(content)
            with pytest.raises(ValueError, match="config.json (can't be read|must hold)"):
                MegaModel.from_pretrained(tmp_path)

    @quiet
    def test_what_does_not_fit_starts_anew_on_request_and_is_named(self, tmp_path):
        head = mega.MegaForTokenClassification
        model = head_model(head, num_labels=3)
        model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="classifier.weight, classifier.bias") as caught:
            found = head.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
        assert len(caught) == 1 and found.classifier.weight.shape == (5, 8)
        assert found.config.num_labels == 5 and len(found.config.id2label) == 5
        assert same_weights(model.mega, found.mega)
        with pytest.warns(UserWarning, match="not used: .*layers.1"):
            head.from_pretrained(tmp_path, num_hidden_layers=1)
        causal_lm(add_cross_attention=True).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="not used: .*cross_attn"):
            MegaForCausalLM.from_pretrained(tmp_path, add_cross_attention=False)
        with pytest.warns(UserWarning, match="not used: dense.weight|not used: dense.bias"):
            MegaForCausalLM.from_pretrained(tmp_path, add_lm_hidden_dense_layer=False)

    def test_labels_are_read_and_written(self, tmp_path):
        names = names_given = {0: "no", 1: "maybe", 2: "yes"}
        model = head_model(mega.MegaForTokenClassification, id2label=names)
        assert model.config.num_labels == 3
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["label2id"] == {"no": 0, "maybe": 1, "yes": 2} and saved["num_labels"] == 3
        found = mega.MegaForTokenClassification.from_pretrained(tmp_path)
        assert (
            found.config.id2label == names
            and found.config.to_dict()
            == model.config.to_dict() | {"architectures": ["MegaForTokenClassification"]}
        )
        del saved["num_labels"]  # as Hugging Face's library writes it
        (tmp_path / "config.json").write_text(json.dumps(saved))
        assert mega.MegaForTokenClassification.from_pretrained(tmp_path).config.num_labels == 3
        assert MegaConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        names = {str(i): f"LABEL_{i}" for i in range(4)}
        assert MegaConfig.from_dict({"id2label": names}).num_labels == 4
        assert MegaConfig.from_dict({"id2label": names}, num_labels=5).num_labels == 5
        others = {i: str(i) for i in range(5)}
        assert MegaConfig.from_dict({"id2label": names}, id2label=others).id2label == others
        assert MegaConfig.from_dict({"num_labels": 4}, id2label=others).num_labels == 5
        kept = mega.MegaForTokenClassification.from_pretrained(tmp_path, num_labels=3)
        assert kept.config.id2label == names_given
        with pytest.raises(ValueError, match="'bert' model"):
            MegaConfig.from_dict({"model_type": "bert"})

    @quiet
    def test_a_file_that_is_no_checkpoint_is_named(self, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pytorch_model.bin can't be read"):
            MegaForCausalLM.from_pretrained(tmp_path)

        class Dangerous:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "broken-into"),))

        torch.save({"lm_head.weight": Dangerous()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pytorch_model.bin can't be read"):
            MegaForCausalLM.from_pretrained(tmp_path)
        assert not (tmp_path / "broken-into").exists()
        (tmp_path / "pytorch_model.bin").unlink()
        with pytest.raises(
            FileNotFoundError, match="has no model.safetensors or .*pytorch_model.bin"
        ):
            MegaForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere has no config.json"):
            MegaForCausalLM.from_pretrained("nowhere")

    def test_a_saved_config_has_the_dtype_of_its_weights(self, tmp_path):
        for name in ("torch_dtype", "dtype"):
            model = MegaForCausalLM(
                MegaConfig.from_dict(small_config().to_dict() | {name: "float16"})
            )
            for dtype in (torch.float32, torch.bfloat16):
                model.to(dtype).save_pretrained(tmp_path)
                saved = json.loads((tmp_path / "config.json").read_text())
                assert saved[name] == str(dtype).removeprefix("torch.")

    @pytest.mark.parametrize("changes", [
        {"vocab_size": 1 << 24, "hidden_size": 1 << 24}, {"num_hidden_layers": 1 << 24},
        {"nffn_hidden_size": 1 << 24, "hidden_size": 1 << 24}, {"ema_projection_size": 1 << 24},
        {"intermediate_size": 1 << 24, "hidden_size": 1 << 24}, {"hidden_size": 1 << 24},
    ], ids=str)  # fmt: skip
    def test_a_config_larger_than_its_file_is_refused_before_memory_is_taken(
        self, tmp_path, changes, monkeypatch
    ):
        causal_lm().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        devices = []
        register = torch.nn.Module.register_parameter

        def registering(self, name, parameter):
            devices.append(None if parameter is None else parameter.device.type)
            register(self, name, parameter)

        monkeypatch.setattr(torch.nn.Module, "register_parameter", registering)
        with pytest.raises(ValueError, match="tensor mega.* is missing|but the config asks for"):
            MegaForCausalLM.from_pretrained(tmp_path)
        assert "meta" in devices and "cpu" not in devices and len(devices) < 500

    @pytest.mark.parametrize(
        "kind", ["sparse", "quantized", "complex", "number", "expanded", "name", "bomb"]
    )
    def test_what_is_no_plain_tensor_is_refused(self, tmp_path, kind):
        causal_lm().save_pretrained(tmp_path)
        weights = {n: t.float() for n, t in causal_lm().state_dict().items()}
        (tmp_path / "model.safetensors").unlink()
        name = "lm_head.weight"
        path = tmp_path / "pytorch_model.bin"
        x = weights[name]
        wrong = {
            "sparse": lambda: x.to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "complex": lambda: x.to(torch.complex64),
            "number": lambda: 3.0,
            "expanded": lambda: torch.zeros(()).expand(x.shape),
        }
        if kind in wrong:
            weights[name] = wrong[kind]()
        elif kind == "name":
            weights[5] = x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(weights, path)
        if kind == "bomb":  # the same file, packed, with a part that is larger than it
            with zipfile.ZipFile(path) as old:
                parts = {n: old.read(n) for n in old.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
                for part, content in parts.items():
                    new.writestr(part, content)
                new.writestr("pytorch_model/data/99", bytes(1 << 24))
        with pytest.raises(ValueError, match="pytorch_model.bin can't be read") as error:
            MegaForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(error.value) or kind == "quantized"

    @pytest.mark.parametrize("content", [b"[" * 100_000, b"{" * 100_000, b'{"a":' * 100_000])
    def test_json_of_any_depth_is_one_error(self, tmp_path, content):
        causal_lm().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="config.json can't be read"):
            MegaForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": 5}}])
    def test_an_index_without_names_of_files_is_named(self, tmp_path, index):
        causal_lm().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="index.json can't be read"):
            MegaForCausalLM.from_pretrained(tmp_path)

    def test_a_config_with_a_byte_order_mark_is_read(self, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        MegaForCausalLM.from_pretrained(tmp_path)

    @quiet
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("size", [5, 23, 40])
    @pytest.mark.parametrize("head", [MegaForCausalLM, mega.MegaForMaskedLM, MegaModel])
    def test_resized_embeddings_keep_what_they_have(self, tmp_path, head, size, tied):
        old = head_model(head, tie_word_embeddings=tied)
        model = copy.deepcopy(old)
        model.resize_token_embeddings(size)
        kept, ids = min(size, 23), token_ids(0, 2, 6, vocab_size=5)
        assert model.config.vocab_size == size
        if head is MegaModel:
            assert torch.equal(model(ids).last_hidden_state, old(ids).last_hidden_state)
        else:
            found, expected = model(ids).logits, old(ids).logits
            assert found.shape == (2, 6, size)
            close(found[..., :kept], expected[..., :kept])
            output = model.lm_head if head is MegaForCausalLM else model.mlm_head
            words = model.mega.embedding_layer
            assert (output.weight is words["word_embeddings"].weight) == tied
            assert output.out_features == size and not output.bias[kept:].any()
        table = getattr(model, "mega", model).embedding_layer["word_embeddings"]
        frozen = copy.deepcopy(old).requires_grad_(False)
        frozen.resize_token_embeddings(size)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        new = table.weight[kept:]
        assert table.num_embeddings == size and (len(new) == 0 or 0 < new.std() < 0.05)
        model.save_pretrained(tmp_path)
        assert same_weights(model, head.from_pretrained(tmp_path))
        for bad in (0, 1, "9", 2.0):  # 1 is the pad's id
            with pytest.raises(ValueError, match="vocab_size"):
                model.resize_token_embeddings(bad)

    @slow
    @pytest.mark.parametrize("kind", ["safetensors", "sharded bin"])
    def test_every_form_of_checkpoint_is_found_on_the_hub_and_later_without_it(
        self, hub, tmp_path, kind
    ):
        if kind != "safetensors":
            write_weights(tmp_path / "served", causal_lm().state_dict(), kind)
        expected = sum(p.float().double().sum().item() for p in causal_lm().parameters())
        name, total = hub.load().split()
        assert name == "loaded" and float(total) == pytest.approx(expected, rel=1e-9)
        assert hub.load('"owner/name", revision="v2"').startswith("loaded")
        assert any("/resolve/v2/" in path for path, _ in hub.asked)
        asked = len(hub.asked)
        assert hub.load(HF_HUB_OFFLINE="1").startswith("loaded") and len(hub.asked) == asked

    @slow
    def test_a_download_that_fails_says_why_and_is_not_kept(self, hub, tmp_path):
        calls = {
            '"owner/other"': "OSError owner/other is not a local folder, and its config.json",
            '"owner/name", revision="v9"': "is not on the hub",
            '"nowhere"': "FileNotFoundError nowhere has no config.json",
            '"./served/none"': "FileNotFoundError ./served/none has no config.json",
        }
        found = hub.load(*calls).splitlines()
        for line, message in zip(found, calls.values(), strict=True):
            assert message in line, line
        found = hub.load(HF_HUB_OFFLINE="1")
        assert found.startswith("OSError owner/name is not a local folder") and "\n" not in found
        hub.page = True  # an answer that is not the hub's, as from a hotel's network
        assert hub.load().startswith("OSError")
        hub.page, hub.broken = False, True
        assert hub.load().split()[0] in ("OSError", "ValueError")
        hub.broken = False
        assert hub.load().startswith("loaded")

    @slow
    def test_the_token_goes_to_the_hub_alone(self, hub, tmp_path):
        hub.secret = "s3cret"
        assert "HF_TOKEN" in hub.load()
        asked = len(hub.asked)
        with Hub(tmp_path / "served") as other:
            hub.moved = other.url.replace("127.0.0.1", "localhost")
            assert hub.load(HF_TOKEN="s3cret").startswith("loaded")
            other.shutdown()
        assert {token for _, token in hub.asked[asked:]} == {"Bearer s3cret"}
        assert other.asked and {token for _, token in other.asked} == {None}

    @slow
    def test_the_self_check_of_mega_py_runs_with_nothing_of_the_project(self, tmp_path):
        shutil.copy(PROJECT / "mega.py", tmp_path)
        done = script(tmp_path, "mega.py", env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        errors = re.findall(r"by (\S+) at most", done.stdout)
        assert len(errors) == 5 and all(float(error) < 1e-6 for error in errors)
        assert done.stdout.count("positions: ") == 5

    @slow
    def test_mega_py_alone_trains_saves_loads_and_generates(self, tmp_path):
        shutil.copy(PROJECT / "mega.py", tmp_path)
        code = """
import torch, mega
sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
config = mega.MegaConfig(**sizes, is_decoder=True, bidirectional=False)
model = mega.MegaForCausalLM(config)
ids = torch.randint(50, (2, 300))
model(ids, labels=ids).loss.backward()
model.save_pretrained("saved")
other = mega.MegaForCausalLM.from_pretrained("saved")
assert torch.equal(other.generate(ids[:, :9], 5, 0), model.generate(ids[:, :9], 5, 0))
"""
        done = script(tmp_path, "-", stdin=code)
        assert done.returncode == 0, done.stderr
        assert {p.name for p in tmp_path.iterdir()} <= {"mega.py", "saved", "__pycache__"}

    def test_imports_point_one_way(self):
        """Each file of the project imports only those before it in this list."""
        order = ["mega", "data.common", "data.prepare", "sample", "train"]
        lecture = [f"data.lecture.{p.stem}" for p in sorted(PROJECT.glob("data/lecture/[a-z]*.py"))]
        imported = {}
        for name in (*order, *lecture):
            source = (PROJECT / f"{name.replace('.', '/')}.py").read_text("utf-8")
            assert "import_module(" not in source
            found = set()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom):
                    found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
            imported[name] = found & {*order, *lecture}
        assert not imported["mega"]
        for i, name in enumerate(order):
            assert imported[name] <= set(order[:i]), name
        done = set(order)
        while not done >= set(lecture):  # no circle among the files of the lecture
            ready = {name for name in lecture if imported[name] <= done} - done
            assert ready, f"a circle in {set(lecture) - done}"
            done |= ready


# ------------------------------------------------------------------------------------ TestPrepare


class TestPrepare:
    """data/prepare.py."""

    @given(text=st.text())
    def test_any_string_comes_back_from_its_tokens(self, bpe, text):
        for codec in (bpe, prepare.new_tokenizer("bytes", 0, [])):
            ids = codec.encode(text)
            assert codec.decode(ids) == text and all(0 <= i < codec.size for i in ids)

    def test_a_saved_tokenizer_is_the_same(self, bpe, tmp_path):
        assert bpe.size == 300 and bpe.end_of_text == 299
        assert len(bpe.encode(words(1, 50))) < len(words(1, 50).encode()) / 2
        for codec in (bpe.with_mask(), bpe):
            prepare.save_tokenizer(codec, tmp_path)
            assert prepare.load_tokenizer(tmp_path) == codec
        first = (tmp_path / "tokenizer.tiktoken").read_bytes().splitlines()[0]
        assert first == b"AA== 0"  # tiktoken's format: the token in base64, its rank
        (tmp_path / "tokenizer.tiktoken").write_bytes(b"what is this")
        with pytest.raises(common.UserError, match="damaged"):
            prepare.load_tokenizer(tmp_path)

    def test_a_mask_stands_for_a_word_and_the_space_before_it(self, bpe):
        masked = bpe.with_mask()
        text = "the <mask> of a <|endoftext|>"
        assert masked.size == bpe.size + 1 and masked.mask == bpe.size
        expected = [*bpe.encode("the"), masked.mask, *bpe.encode(" of a <|endoftext|>")]
        assert masked.encode(text) == expected
        assert bpe.decode(bpe.encode(text)) == text and bpe.size not in bpe.encode(text)

    @pytest.mark.parametrize("names", [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("raw/wiki.train.raw", "raw/wiki.valid.raw", "raw/wiki.test.raw"),
        ("train.txt", "val.txt", "test.txt"), ("a/train.txt", "a/validation.txt", "a/test.txt"),
    ])  # fmt: skip
    @pytest.mark.parametrize("zipped", [True, False])
    def test_the_usual_layouts_are_understood(self, names, zipped, data, tmp_path):
        texts = [wiki(0), wiki(5), wiki(9)]
        source = tmp_path / ("source.zip" if zipped else "source")
        if zipped:
            with zipfile.ZipFile(source, "w") as archive:
                for name, text in zip(names, texts, strict=True):
                    archive.writestr(name, text)
        else:
            for name, text in zip(names, texts, strict=True):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_text(text, encoding="utf-8")
        folder = prepare.prepare("wikitext-2", str(source), vocab_size=300)
        meta, codec = prepare.read_meta(folder), prepare.load_tokenizer(folder)
        for split, text in zip(("train", "val", "test"), texts, strict=True):
            counts = meta["splits"][split]
            ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
            assert counts["documents"] == 3 and (ids == codec.end_of_text).sum() == 3
            assert codec.decode([i for i in ids if i != codec.end_of_text]) == text
            assert counts["tokens"] == len(ids) and counts["bytes"] == len(text.encode())
            assert counts["words"] == len(text.split()) + text.count("\n")
        stamp = (folder / "train.bin").stat().st_mtime_ns
        assert prepare.prepare("wikitext-2", str(source), vocab_size=300) == folder
        assert (folder / "train.bin").stat().st_mtime_ns == stamp  # what is there is not made again
        assert not list(data.rglob("*.part"))

    def test_a_changed_text_or_setting_is_prepared_anew(self, data, tmp_path):
        source = tmp_path / "mine.txt"
        source.write_text(words(0, 100), encoding="utf-8")
        folder = prepare.prepare(str(source), tokenizer="bytes")
        meta = prepare.read_meta(folder)
        assert (
            folder.name == "mine"
            and meta["dtype"] == "uint8"
            and meta["tokens_in_vocabulary"] == 256
        )
        assert sum(counts["bytes"] for counts in meta["splits"].values()) == len(
            words(0, 100).encode()
        )
        source.write_text(words(3, 100), encoding="utf-8")
        prepare.prepare(str(source), tokenizer="bytes")
        assert prepare.read_meta(folder) != meta
        prepare.prepare(str(source), vocab_size=300)
        assert prepare.read_meta(folder)["dtype"] == "uint16"

    @slow
    def test_pydocs_is_english_split_by_document(self):
        splits = prepare.pydocs()
        assert splits == prepare.pydocs()
        text = "".join(splits["train"])
        assert len(text) > 1_000_000 and "The" in text and "assert" in text
        assert not set(splits["train"]) & set(splits["val"] + splits["test"])
        assert 0.02 < sum(map(len, splits["val"])) / len(text) < 0.1

    def test_docstrings_are_found_without_running_the_code(self):
        source = b"""
raise SystemExit("never run")
class A:
    'About A.'
    def method(self):
        'About method.'
async def function():
    'About function.'
"""
        expected = "A\nAbout A.\n\nmethod\nAbout method.\n\nfunction\nAbout function."
        assert prepare.docstrings(source) == expected
        assert prepare.docstrings(b"def broken(") == ""

    @pytest.mark.parametrize(("content", "message"), [
        (b"", "t.txt is empty"), (b"  \n ", "t.txt is empty"),
        (b"good \xff bad", "not UTF-8: byte 0xff at offset 5"),
    ])  # fmt: skip
    def test_a_bad_text_is_one_sentence(self, content, message, data, tmp_path):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(common.UserError, match=message):
            prepare.prepare(str(tmp_path / "t.txt"))
        assert not list(data.rglob("*.*"))

    def test_only_clear_names_make_a_split(self, data, tmp_path):
        source = tmp_path / "notes.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for i in range(50):
                archive.writestr(f"note{i}.TXT", words(i, 5))
            archive.writestr("how-to-train.md", "Patience.")  # a note like others
            archive.writestr("__MACOSX/._note1.txt", b"\xff\xfe")
            archive.writestr("picture.png", b"\x89PNG\xff")
        counts = prepare.read_meta(prepare.prepare(str(source), tokenizer="bytes"))["splits"]
        assert sum(c["documents"] for c in counts.values()) == 51
        with zipfile.ZipFile(source, "w") as archive:
            for name in ("train-0.txt", "train-1.txt", "val.txt"):
                archive.writestr(name, words(0, 5))
        with pytest.raises(
            common.UserError, match="several files for the train split.*train-1.txt"
        ):
            prepare.prepare(str(source))
        (tmp_path / "one.txt").write_text("no line ends here, " * 500)
        counts = prepare.read_meta(prepare.prepare(str(tmp_path / "one.txt"), tokenizer="bytes"))[
            "splits"
        ]
        assert [c["bytes"] for c in counts.values()] == [8550, 475, 475]

    def test_splits_can_be_chosen_and_missing_ones_are_named(self, corpus, data):
        (corpus / "wiki.train.raw").unlink()
        with pytest.raises(
            common.UserError, match="no 'train' split, only val, test.*--train_split"
        ):
            prepare.prepare("wikitext-2", str(corpus))
        folder = prepare.prepare("wikitext-2", str(corpus), train_split="test", vocab_size=300)
        splits = prepare.read_meta(folder)["splits"]
        assert splits["train"] == splits["test"] != splits["val"]

    def test_a_zip_is_downloaded_and_nothing_half_written_stays(self, server, data, monkeypatch):
        for name, message in (("half.zip", "broke off after|could not be"), ("missing.zip", "404")):
            with pytest.raises(prepare.DownloadError, match=message):
                prepare.prepare("wikitext-2", server.url(name))
            assert {p.name for p in data.rglob("*") if p.is_file()} == {"lock"}
        folder = prepare.prepare("wikitext-2", server.url("good.zip"), vocab_size=300)
        assert prepare.read_meta(folder)["splits"]["train"]["documents"] == 3
        assert not list(data.rglob("*.zip")) and not any("urllib" in a for a in server.agents)

    def test_the_known_zip_is_checked_and_the_second_address_is_tried(
        self, server, data, monkeypatch
    ):
        urls = [server.url("missing.zip"), server.url("half.zip"), server.url("good.zip")]
        known = {"urls": urls, "lines": {"train": 45, "val": 45, "test": 45}}
        monkeypatch.setitem(prepare.PUBLISHED, "wikitext-2", known | {"sha256": "0" * 64})
        with pytest.raises(prepare.DownloadError, match="sha256"):
            prepare.prepare("wikitext-2")
        monkeypatch.setitem(
            prepare.PUBLISHED, "wikitext-2", known | {"lines": known["lines"] | {"train": 1}}
        )
        with pytest.raises(
            common.UserError, match=r"the wrong number of lines: train 45 \(not 1\)"
        ):
            prepare.prepare("wikitext-2")
        monkeypatch.setitem(prepare.PUBLISHED, "wikitext-2", known)
        asked = len(server.agents)
        folder = prepare.prepare("wikitext-2", vocab_size=300)
        assert len(server.agents) == asked  # the zip that was downloaded before is used
        assert prepare.read_meta(folder)["splits"]["val"]["documents"] == 3

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("name", ["shakespeare", "enwik8"])
    def test_a_published_text_is_cut_by_bytes_and_read_a_byte_at_a_time(
        self, name, zipped, data, monkeypatch
    ):
        text = "猫\r\n" + "ü" * 498  # line ends stay, and every cut is in the middle of a character
        content = text.encode()
        served = zipfile_of({name: content}) if zipped else content
        if zipped and name == "shakespeare":
            served = zipfile_of({"input.txt": content})
        with Server(served) as server:
            url = server.url("text.zip" if zipped else "text.txt")
            known = prepare.PUBLISHED[name] | {"urls": [url], "bytes": len(content), "sha256": None}
            monkeypatch.setitem(prepare.PUBLISHED, name, known | {"bytes": 7})
            with pytest.raises(common.UserError, match="has 1,001 bytes, not 7"):
                prepare.prepare(name)
            monkeypatch.setitem(prepare.PUBLISHED, name, known)
            folder = prepare.prepare(name)
            assert len(server.agents) == 1  # the file that was downloaded before is used
            server.shutdown()
        splits = prepare.read_meta(folder)["splits"]
        cuts = [0, 90, 100] if name == "shakespeare" else [0, 90, 95, 100]
        cuts = [len(content) * cut // 100 for cut in cuts]
        for split, first, last in zip(splits, cuts[:-1], cuts[1:], strict=True):
            ids = np.fromfile(folder / f"{split}.bin", "uint8")
            part = content[first:last].decode("utf-8", "ignore")  # without characters cut in two
            assert ids[0] == 0 and ids[1:].tobytes() == part.encode()
            counts = splits[split]
            assert counts["characters"] == len(part) and counts["bytes"] == len(part.encode())

    def test_a_published_text_can_come_from_a_file_and_be_another(self, data, tmp_path, capsys):
        source = tmp_path / "mine.txt"
        source.write_text("abc " * 100, encoding="utf-8")
        folder = prepare.prepare("shakespeare", str(source))
        assert "has 400 bytes, shakespeare 1,115,394" in capsys.readouterr().out
        assert [*prepare.read_meta(folder)["splits"]] == ["train", "val"]
        (tmp_path / "two.txt").write_text("more", encoding="utf-8")
        with pytest.raises(common.UserError, match="has several files, not just one"):
            prepare.prepare("shakespeare", str(tmp_path))

    def test_robertas_words_are_cut_as_gpt2s_are(self, roberta):
        _, tokens, codec = roberta
        number = {token: i for i, token in enumerate(tokens)}
        # A space belongs to the word after it, also one of several; digits are not cut by threes.
        expected = [number[token] for token in ("<s>", "Ġthe", "Ġ", "Ġ", "Ġmodel", "Ġ1234", "</s>")]
        assert codec.encode(" the   model 1234</s>") == expected

    @given(st.text() | st.lists(st.sampled_from(ROBERTA_WORDS)).map(" ".join))
    def test_robertas_tokens_come_back_as_the_text(self, roberta, text):
        _, tokens, codec = roberta
        ids = codec.encode(text)
        assert ids[0] == 0 and codec.size == len(tokens)
        shown = re.sub(r"\s+<mask>", "<mask>", text)
        shown = re.sub("<s>|<pad>|</s>|<unk>|<mask>", "", shown)
        assert codec.decode_bytes(ids) == shown.encode("utf-8", "replace")

    @given(st.text() | st.lists(st.sampled_from(ROBERTA_WORDS)).map(" ".join))
    def test_robertas_ids_are_those_of_transformers(self, transformers, roberta, text):
        folder, _, codec = roberta
        theirs = transformers.RobertaTokenizer(folder / "vocab.json", folder / "merges.txt")
        # Their tokenizer drops spaces around other special tokens, and some control characters.
        assert codec.encode(text) == theirs(text)["input_ids"][:-1]

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(("names", "expected"), [
        ({"train.txt": 0, "test.txt": 1}, {"train": [0], "test": [1]}),
        ({"train.txt": 0, "valid.txt": 1}, {"train": [0], "val": [1]}),
        ({"train/a.txt": 0, "train/b.txt": 1, "valid/c.txt": 2}, {"train": [0, 1], "val": [2]}),
        ({"x/train/a.md": 0, "x/val/b.md": 1, "x/test/c.md": 2},
         {"train": [0], "val": [1], "test": [2]}),
        ({"a.txt": 0, "b.txt": 1, "test.txt": 2}, {"train": [0, 1], "test": [2]}),
        ({"a.txt": 0, "b.txt": 1, "Validation/c.txt": 2}, {"train": [0, 1], "val": [2]}),
        ({"train.txt": 0, "notes.txt": 3, "dev.txt": 4, "test.txt": 1},
         {"train": [0], "val": [4], "test": [1]}),
        ({".ipynb_checkpoints/train.txt": 3, "._test.txt": 4, ".git/x.txt": 5, "a.txt": 0}, {}),
    ])  # fmt: skip
    def test_named_splits_are_kept_and_missing_ones_cut_from_train(
        self, names, expected, zipped, data, tmp_path, capsys
    ):
        files = {name: words(i, 200).encode() for name, i in names.items()}
        source = tmp_path / ("mine.zip" if zipped else "mine")
        if zipped:
            source.write_bytes(zipfile_of(files))
        for name, content in {} if zipped else files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
        folder = prepare.prepare(str(source), tokenizer="bytes")
        meta, codec = prepare.read_meta(folder), prepare.load_tokenizer(folder)
        texts = {}
        for split in meta["splits"]:
            ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
            texts[split] = codec.decode(ids.tolist())
        assert [*texts] == ["train", "val", "test"] and all(texts.values())
        for split, numbers in expected.items():
            if split != "train":
                assert texts[split].replace("\0", "") == "".join(words(i, 200) for i in numbers)
        others = [i for split, found in expected.items() if split != "train" for i in found]
        lines = {line for split in ("train", "val", "test") for line in texts[split].split("\n")}
        for i in others:  # of what is held out no line is trained on
            assert not set(words(i, 200).split("\n")) - {""} & set(texts["train"].split("\n"))
        for name, i in names.items():
            used = not name.startswith(".") and name != "notes.txt"
            assert (
                words(i, 200).split("\n")[0].strip("\0") in {x.strip("\0") for x in lines}
            ) == used
        said = capsys.readouterr().out
        missing = {"val", "test"} - expected.keys() if expected else set()
        assert ("cut from the training text" in said) == bool(missing)
        assert all(split in said for split in missing)

    @pytest.mark.parametrize("change", [
        lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"), lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    ])  # fmt: skip
    def test_marks_and_line_ends_of_other_systems_change_no_token(
        self, change, corpus, data, tmp_path
    ):
        found = []
        for written in (lambda text: text, change):
            for path in corpus.iterdir():
                text = path.read_bytes().decode("utf-8-sig")
                path.write_bytes(written(text).encode())
            folder = prepare.prepare("wikitext-2", str(corpus), vocab_size=300)
            files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".bin"}
            found.append((files, prepare.read_meta(folder)["splits"]))
        assert found[0] == found[1] and found[0][1]["train"]["documents"] == 3
        text = tmp_path / "mine.txt"
        text.write_bytes(change(words(0, 50)).encode())
        splits = prepare.own_text(str(text), data)
        assert "".join(splits[name][0] for name in ("train", "val", "test")) == words(0, 50)

    @pytest.mark.parametrize("text", [
        "short\n" + "a" * 1000, "a" * 1000 + "\nend\n", "a" * 930 + "\n" + "b" * 60 + "\nc\n",
        "x y\n" * 10 + "b" * 300, "a" * 960 + "\n" + "b" * 30 + "\n",
    ])  # fmt: skip
    def test_a_text_of_few_long_lines_has_three_splits(self, text, data, tmp_path):
        (tmp_path / "mine.txt").write_text(text)
        splits = prepare.own_text(str(tmp_path / "mine.txt"), data)
        assert {*splits} == {"train", "val", "test"}
        assert "".join(splits[name][0] for name in ("train", "val", "test")) == text

    @pytest.mark.parametrize(("name", "content", "message"), [
        ("t.txt.gz", gzip.compress(words(0, 9).encode()), "unpack this archive first"),
        ("t.tar", tar_of("a.txt", words(0, 9).encode()), "it has null bytes; unpack this archive"),
        ("t.docx", zipfile_of({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}),
         "is an Office document; convert it first: save it as plain text"),
        ("t.zip", zipfile_of({"a.csv": b"a,b"}), "only a.csv; convert it first"),
        ("t.zip", zipfile_of({"a.txt.gz": b"a,b"}), "only a.txt.gz; unpack this archive first"),
        ("t.pdf", b"%PDF-1.4\n\xe2\xe3", "is not UTF-8: byte 0xe2 at offset 9; convert it first"),
    ])  # fmt: skip
    def test_what_is_no_text_is_named_with_what_to_do(self, name, content, message, data, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(common.UserError, match=re.escape(message)) as refused:
            prepare.prepare(str(tmp_path / name))
        assert name in str(refused.value)

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED,
                                        zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])  # fmt: skip
    def test_a_damaged_zip_is_one_sentence(self, method, data, tmp_path):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", method) as archive:
            archive.writestr("a.txt", words(0, 300))
        whole = content.getvalue()
        for i in (35, 45, 60, len(whole) // 3, len(whole) // 2):
            torn = bytearray(whole)
            torn[i : i + 5] = bytes(255 - x for x in torn[i : i + 5])
            (tmp_path / "torn.zip").write_bytes(torn)
            with pytest.raises(common.UserError, match="torn.zip is not a readable zip file"):
                prepare.prepare(str(tmp_path / "torn.zip"))

    def test_a_text_too_large_to_be_read_is_refused_before_it_is(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(prepare, "LARGEST_TEXT", 10_000)
        (tmp_path / "large.txt").write_text("a " * 6000)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "a " * 6000)
        (tmp_path / "large.zip").write_bytes(packed.getvalue())
        monkeypatch.setattr(Path, "read_bytes", None)  # nothing may be read
        monkeypatch.setattr(zipfile.ZipFile, "read", None)
        for name in ("large.txt", "large.zip"):
            with pytest.raises(common.UserError, match=f"{name} holds .* of text; the limit is"):
                prepare.prepare(str(tmp_path / name))

    @pytest.mark.parametrize("change", [
        lambda rows: rows[:5] + rows[4:], lambda rows: rows[:5] + rows[6:],
        lambda rows: [*rows[:-1], rows[-1].replace(b" 298", b" 7")],
        lambda rows: [*rows[:-1], rows[-1].replace(b" 298", b" -1")],
        lambda rows: rows * 4,
    ])  # fmt: skip
    def test_a_tokenizer_with_a_rank_twice_or_missing_is_damaged(
        self, change, bpe, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(prepare, "LARGEST_VOCABULARY", 1000)
        prepare.save_tokenizer(bpe, tmp_path)
        path = tmp_path / "tokenizer.tiktoken"
        rows = path.read_bytes().splitlines()
        assert prepare.load_tokenizer(str(tmp_path)) == bpe  # as text, too
        path.write_bytes(b"\n".join(change(rows)) + b"\n")
        with pytest.raises(common.UserError, match="is damaged"):
            prepare.load_tokenizer(tmp_path)

    def test_a_vocabulary_with_an_id_twice_is_damaged(self, tmp_path):
        tokens = roberta_files(tmp_path)
        files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
        assert prepare.load_roberta(*files).decode([*range(4), 9]) != ""
        for wrong in (7, -1, 1e9, 10**9, "7", None):
            ids = {token: i for i, token in enumerate(tokens)} | {tokens[20]: wrong}
            (tmp_path / "vocab.json").write_text(json.dumps(ids))
            with pytest.raises(common.UserError, match="is damaged"):
                prepare.load_roberta(*files)

    def test_a_dataset_stays_as_it_is_while_it_is_read(self, data, tmp_path, capsys):
        text = tmp_path / "mine.txt"
        text.write_text(words(0, 300), encoding="utf-8")
        other = threading.Thread(target=prepare.prepare, args=(str(text),),
                                 kwargs={"vocab_size": 310})  # fmt: skip
        with prepare.prepared(str(text), vocab_size=300) as folder:
            other.start()
            other.join(0.5)
            assert other.is_alive() and prepare.load_tokenizer(folder).size == 300
            assert prepare.read_meta(folder)["tokens_in_vocabulary"] == 300
        other.join(60)
        assert prepare.load_tokenizer(folder).size == 310
        assert "another process is preparing" in capsys.readouterr().out

    def test_many_may_write_one_file_at_once(self, tmp_path):
        contents = [bytes([i]) * 100_000 for i in range(8)]
        failed = []

        def write(content):
            try:
                for _ in range(20):
                    common.write_whole(tmp_path / "file", content)
            except OSError as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and (tmp_path / "file").read_bytes() in contents
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_parts_of_files_of_a_killed_process_are_swept_up_and_no_others(self, tmp_path):
        ours = tmp_path / f"last.pt.{'0a' * 16}.part"
        theirs = [tmp_path / name for name in ("film.part", "a.1234.part", "0a.part")]
        for path in (ours, *theirs):
            path.write_text("x")
        with common.locked(tmp_path, "busy"):
            assert not ours.exists() and all(path.exists() for path in theirs)

    def test_data_may_go_to_another_folder_and_a_home_is_known(self, data, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "mine.txt").write_text(words(0, 100), encoding="utf-8")
        arguments = ("~/mine.txt", "--tokenizer=bytes", "--data_dir=~/elsewhere")
        assert call(prepare.main, *arguments) == 0
        assert (tmp_path / "elsewhere" / "mine" / "meta.json").exists() and not data.exists()
        flags = [*TINY, "--dataset=~/mine.txt", "--data_dir=~/there", "--out_dir=~/run"]
        assert call(train.main, *flags) == 0
        assert (tmp_path / "there" / "mine" / "meta.json").exists()
        assert (tmp_path / "run" / "last.pt").exists()
        assert call(sample.main, "--model=~/run", "--prompt=a", "--max_new_tokens=2") == 0

    def test_files_that_are_passed_over_are_named(self, data, tmp_path, capsys):
        folder = tmp_path / "mine"
        folder.mkdir()
        for name in ("train.txt", "valid.txt.gz", "test.csv", ".hidden", "b.pdf", "c.pdf"):
            (folder / name).write_text(words(0, 100), encoding="utf-8")
        prepare.prepare(str(folder), tokenizer="bytes")
        said = capsys.readouterr().out
        assert "for their extensions: b.pdf, c.pdf, test.csv, ..." in said

    def test_a_zip_with_the_separators_of_windows_has_its_splits(self, data, tmp_path):
        files = {"c\\train\\a.txt": words(0, 99), "c\\test\\b.txt": words(1, 99)}
        (tmp_path / "t.zip").write_bytes(zipfile_of({n: x.encode() for n, x in files.items()}))
        assert prepare.own_text(str(tmp_path / "t.zip"), data)["test"] == [words(1, 99)]

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
    def test_a_device_is_no_text(self, data):
        with pytest.raises(common.UserError, match="/dev/zero is not a file or folder"):
            prepare.prepare("/dev/zero")

    @pytest.mark.parametrize("name", ["train.bin", "meta.json"])
    def test_data_of_others_are_not_written_over(self, data, tmp_path, name):
        (tmp_path / "mine.txt").write_text(words(0, 100), encoding="utf-8")
        (data / "mine").mkdir(parents=True)
        (data / "mine" / name).write_text("[]")
        with pytest.raises(common.UserError, match=f"mine has a {name} not made by this script"):
            prepare.prepare(str(tmp_path / "mine.txt"))
        assert [p.name for p in (data / "mine").iterdir()] == [name]
        (data / "mine" / name).unlink()
        prepare.prepare(str(tmp_path / "mine.txt"), tokenizer="bytes")
        (data / "mine" / "meta.json").unlink()  # as one that was killed leaves it
        prepare.prepare(str(tmp_path / "mine.txt"), tokenizer="bytes")

    def test_a_folder_for_data_that_cannot_be_made_is_named_with_the_setting(
        self, data, tmp_path, capsys
    ):
        data.write_text("in the way")
        (tmp_path / "mine.txt").write_text(words(0, 100), encoding="utf-8")
        assert call(train.main, *TINY, f"--dataset={tmp_path / 'mine.txt'}") == 2
        error = capsys.readouterr().err
        assert str(data) in error and "--data_dir" in error and error.count("\n") == 1

    def test_a_text_may_be_called_like_a_folder_of_the_project(self, data, tmp_path):
        for name in prepare.TAKEN:
            (tmp_path / f"{name}.txt").write_text(words(0, 50), encoding="utf-8")
            assert (
                prepare.prepare(str(tmp_path / f"{name}.txt"), vocab_size=300).name
                == f"{name}_text"
            )


# -------------------------------------------------------------------------------------- TestTrain


class TestTrain:
    """train.py: windows, steps, resume, kills, processes, evaluation."""

    def test_training_writes_checkpoints_log_and_last_line(self, trained, capsys):
        out, arguments = trained
        rows = (out / "log.csv").read_text().splitlines()
        assert rows[0] == (
            "step,tokens,seconds,train_loss,val_loss,bits_per_byte,word_perplexity,"
            "tokens_per_second,learning_rate"
        )
        assert [row.split(",")[:2] for row in rows[1:]] == [["3", "120"], ["6", "240"]]
        names = {"config.json", "model.safetensors", "tokenizer.tiktoken", "tokenizer_meta.json"}
        seen = {"log.csv", "samples.txt", "loss.png"}
        assert {p.name for p in out.iterdir()} == names | seen | {"last.pt", "lock"}
        assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
        samples = (out / "samples.txt").read_text("utf-8")
        assert re.findall(r"--- step (\d+)\n", samples) == ["3", "6"]
        best = min(float(row.split(",")[4]) for row in rows[1:])
        capsys.readouterr()
        assert call(train.main, *arguments, "--eval_only", "--contexts=carried") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [
            "test", "test, carried", "val", "val, carried", "val"
        ]  # fmt: skip
        pattern = r"val: loss (\d+\.\d+) bits_per_byte \d+\.\d+ word_perplexity \d+\.\d+"
        assert float(re.fullmatch(pattern, lines[-1])[1]) == pytest.approx(best, abs=1e-4)
        counts = prepare.read_meta(out.parent / "data" / "wikitext-2")["splits"]["val"]
        assert call(train.main, *arguments, "--eval_only", "--contexts=9", "--val_split=test") == 0
        assert capsys.readouterr().out.count("tokens predicted") == 1  # the test split is val now
        assert f"{counts['tokens'] - 1:,} tokens predicted, {counts['bytes']:,} bytes" in lines[2]
        model, _ = sample.load_model(out)
        model.set_chunk_size(3)
        run = training(*arguments)
        expected = train.evaluate(model, run.corpus, "val", "9", run.autocast)
        capsys.readouterr()
        flags = ["--eval_only", "--contexts=9", "--eval_chunk_size=3"]
        assert call(train.main, *arguments, *flags) == 0
        assert capsys.readouterr().out.splitlines()[-1] == train.report("val", expected)

    @pytest.mark.parametrize("at_once", [8, 24, 8192])
    @pytest.mark.parametrize("chunk", [7, 8])
    @torch.no_grad()
    def test_evaluation_is_over_the_whole_split_and_in_the_stated_units(
        self, corpus, data, tmp_path, monkeypatch, chunk, at_once
    ):
        flags = [f"--source={corpus}", f"--out_dir={tmp_path}", "--dtype=float32"]
        run = training(*TINY, *flags, f"--chunk_size={chunk}")
        monkeypatch.setattr(train, "EVALUATED", at_once)
        ids, model = (
            torch.from_numpy(run.corpus.tokens["val"].astype(np.int64)),
            randomized(run.model),
        )
        # Past `half` of its chunk a token counts as the model sees it, before that as with later
        # chunks; pads in front, which nobody sees, move them.
        half = chunk // 2
        pads = ids.new_zeros(chunk - half)
        plain, mask = nats_of_all(model, ids), torch.ones(1, len(pads) + len(ids) - 1)
        mask[:, : len(pads)] = 0
        moved = nats_of_all(model, torch.cat([pads, ids]), mask)[len(pads) :]
        late = torch.arange(len(plain)) % chunk >= half
        assert (plain - moved).abs().max() > 0.01
        expected = {"carried": plain.sum(), "sliding": torch.where(late, plain, moved).sum()}
        for length in (1, 20, 200, len(ids) - 2):  # the last leaves a rest of one
            pieces = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
            expected[str(length)] = sum(nats_of_all(model, piece).sum() for piece in pieces)
        text = "".join(prepare.wikitext("wikitext-2", str(corpus), data)["val"])
        per_word = len(text.split()) + text.count("\n")
        for context, nats in expected.items():
            found = train.evaluate(model, run.corpus, "val", context, run.autocast)
            nats = nats.item()
            assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
            bits = nats / math.log(2) / len(text.encode())
            assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
            assert found["word_perplexity"] == pytest.approx(math.exp(nats / per_word), rel=1e-5)
        assert len({nats.item() for nats in expected.values()}) == len(expected)
        assert not model.training and train.evaluate(
            model.train(), run.corpus, "val", "9", run.autocast
        )
        assert model.training

    @pytest.mark.parametrize("context", ["9", "carried", "sliding"])
    def test_an_evaluation_while_training_keeps_no_graph(self, corpus, data, tmp_path, context):
        run, enabled = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}"), []
        run.model.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
        train.evaluate(run.model, run.corpus, "val", context, run.autocast)
        assert enabled and not any(enabled)

    def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(
        self, corpus, data, tmp_path
    ):
        found = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}").corpus
        length, tokens = found.block_size, torch.from_numpy(found.tokens["train"].astype(np.int64))
        n = found.windows
        assert n == (len(tokens) - 1) // length - 1
        orders = []
        for epoch in range(3):
            inputs, targets = found.sequences(
                range(epoch * n, (epoch + 1) * n), torch.device("cpu")
            )
            starts = found.epoch(epoch)
            assert sorted(starts - starts.min()) == [i * length for i in range(n)]
            for i, start in enumerate(starts):
                assert inputs[i].equal(tokens[start : start + length])
                assert targets[i].equal(tokens[start + 1 : start + length + 1])
            orders.append(tuple(starts))
        assert len(set(orders)) == 3 and len({min(order) for order in orders}) > 1
        # A row's number alone says what it is: in any order, after any other, across two epochs.
        both, _ = found.sequences(range(n - 1, n + 1), torch.device("cpu"))
        assert both[0].equal(tokens[orders[0][-1] :][:length])
        assert both[1].equal(tokens[orders[1][0] :][:length])

    @pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "muon")])
    def test_a_resumed_run_equals_one_that_never_stopped(
        self, corpus, data, tmp_path, dtype, optimizer
    ):
        def started(out, *more):
            flags = [f"--source={corpus}", f"--out_dir={tmp_path / out}", f"--dtype={dtype}"]
            return training(*TINY, *flags, f"--optimizer={optimizer}", *more)

        whole, first = started("whole"), started("parts")
        for run, steps in ((whole, 6), (first, 4)):
            for _ in range(steps):
                run.train_step()
                if run.step == 3:
                    run.evaluate()
            run.save(better=False)
        torch.manual_seed(99)
        second = started("parts", "--resume")
        assert second.step == 4 and second.losses == whole.losses[:4]
        for _ in range(2):
            second.train_step()
        second.save(better=False)
        assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "parts"))
        files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "parts")]
        assert files[0] == files[1]

    def test_each_part_of_each_step_has_chance_of_its_own(self, corpus, data, tmp_path):
        flags = [*TINY, f"--source={corpus}", "--gradient_accumulation_steps=3"]
        seen = []
        for seed in (1, 2):
            run = training(*flags, f"--seed={seed}", f"--out_dir={tmp_path / str(seed)}")
            run.model.register_forward_pre_hook(lambda *_: seen.append(torch.initial_seed()))
            for _ in range(3):
                run.train_step()
        assert len(set(seen)) == len(seen) == 2 * 3 * 3

    @pytest.mark.parametrize("dropout", [0, 0.2])
    def test_gradient_accumulation_equals_one_large_batch(self, corpus, data, tmp_path, dropout):
        def stepped(out, rows, times):
            flags = [
                f"--source={corpus}",
                f"--out_dir={tmp_path / out}",
                f"--dropout={dropout}",
                f"--hidden_dropout={dropout}",
            ]
            flags += [f"--batch_size={rows}", f"--gradient_accumulation_steps={times}"]
            run = training(*TINY, *flags, "--dtype=float32", "--optimizer=adamw")
            run.train_step()
            return [p.detach() for p in run.model.parameters()]

        one, parts, uneven = stepped("a", 6, 1), stepped("b", 2, 3), stepped("c", 3, 2)
        if dropout:  # other parts, other masks
            assert not all(a.allclose(b) for a, b in zip(one, parts, strict=True))
        else:
            for a, b, c in zip(one, parts, uneven, strict=True):
                close(a, b, 1e-4)
                close(a, c, 1e-4)

    @slow
    def test_two_processes_equal_one(self, copied, corpus):
        flags = [
            *TINY,
            f"--source={corpus}",
            "--dtype=float32",
            "--max_iters=20",
            "--sample_tokens=0",
        ]
        flags += ["--gradient_accumulation_steps=2", "--evaluations=2", "--contexts=sliding"]
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

        def compare(*more):
            states, said = [], []
            for out, command in (("one", ()), ("two", torchrun)):
                done = script(copied, *command, "train.py", *flags, *more, f"--out_dir={out}")
                assert done.returncode == 0, done.stderr
                other = r"(?m)^(note|the earlier run).*\n|, [\d,]+ tokens/s|1 threads( x 2)?"
                said.append(re.sub(other, "", done.stdout))
                states.append(checkpoint_of(copied / out))
            assert [text.count("step 20: ") for text in said] == [1, 1]  # one of them prints
            assert [state.pop("processes") for state in states] == [1, 2]
            return *states, *said

        # The same rows in the same parts, dropout and all: bit by bit.
        one, two, said_by_one, said_by_two = compare()
        assert same(one, two) and said_by_one == said_by_two
        # One part of four rows, or two in each process: as close as sums in another order.
        uneven = (
            "--batch_size=4",
            "--gradient_accumulation_steps=1",
            "--dropout=0",
            "--hidden_dropout=0",
        )
        one, two, *_ = compare(*uneven, "--optimizer=adamw")
        for a, b in zip(one["model"].values(), two["model"].values(), strict=True):
            assert (a - b).abs().max() <= 1e-5
        for a, b in zip(one["log"], two["log"], strict=True):
            assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), abs=1e-5)
        again = [
            *flags,
            *uneven,
            "--optimizer=adamw",
            "--out_dir=two",
            "--resume",
            "--max_iters=21",
        ]
        done = script(copied, "train.py", *again)
        assert (
            done.returncode == 0 and "2 processes made two/last.pt, now there are 1" in done.stdout
        )

    def test_rows_that_the_processes_cannot_share_are_refused(self, corpus, data, tmp_path):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}")
        run.processes.size = 3
        with pytest.raises(common.UserError) as refused:
            run.share_sequences()
        assert str(refused.value) == (
            "a step's 2 sequences (--batch_size=2 times --gradient_accumulation_steps=1) can't be "
            "divided among 3 processes; make their product a multiple of 3"
        )

    def test_parts_of_a_step_are_shared_without_remainder(self, corpus, data, tmp_path):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}", "--batch_size=4",
                       "--gradient_accumulation_steps=3")  # fmt: skip
        for size in (1, 2, 3, 4, 6, 12):
            parts = []
            for rank in range(size):
                run.processes.rank, run.processes.size = rank, size
                mine = run.share_sequences()
                assert all(1 <= len(part) <= 4 for part in mine)
                assert sum(map(len, mine)) == 12 // size
                parts += mine
            assert [i for part in parts for i in part] == list(range(12))

    @slow
    @pytest.mark.skipif(os.name == "nt", reason="Windows kills in another way")
    def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(self, copied, corpus):
        flags = [*TINY, f"--source={corpus}", "--max_iters=400", "--save_interval=7"]
        flags += ["--evaluations=4", "--contexts=carried", "--dtype=float32"]  # in both runs
        whole = script(copied, "train.py", *flags, "--out_dir=unbroken")
        assert whole.returncode == 0, whole.stderr
        command = [sys.executable, "train.py", *flags, "--out_dir=killed"]
        killed, steps, resume = copied / "killed", [], []
        for moment in (0.0, 0.2, 0.1):  # seconds after the checkpoint of a later step is there
            with subprocess.Popen(
                [*command, *resume], cwd=copied, stdout=subprocess.DEVNULL
            ) as run:

                def step():
                    found = (killed / "last.pt").exists()
                    return checkpoint_of(killed)["step"] if found else -1

                while step() <= max(steps, default=-1):
                    assert run.poll() is None
                    time.sleep(0.02)
                time.sleep(moment)
                run.kill()
            steps.append(step())
            resume = ["--resume"]
        assert steps[-1] < 400, "none was killed in time"
        done = script(copied, *command[1:], "--resume")
        assert done.returncode == 0, done.stderr
        assert same(checkpoint_of(copied / "unbroken"), checkpoint_of(killed))
        for name in ("model.safetensors", "samples.txt", "config.json"):
            assert (killed / name).read_bytes() == (copied / "unbroken" / name).read_bytes()

    @pytest.mark.parametrize(("ends", "saved"), [(1, 1), (3, 2)])
    def test_a_run_that_ends_before_its_first_evaluation_has_saved(
        self, corpus, data, tmp_path, capsys, monkeypatch, ends, saved
    ):
        update, out = train.Training.update, tmp_path / "out"

        def ending(self, *found):
            if self.step == ends:
                raise KeyboardInterrupt
            return update(self, *found)

        flags = [*TINY, f"--source={corpus}", f"--out_dir={out}", "--save_interval=2"]
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "update", ending)
            assert call(train.main, *flags, "--evaluations=1") == 130
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        state, (model, _) = checkpoint_of(out), sample.load_model(out)
        assert state["step"] == saved and state["log"] == []
        assert same(model.state_dict(), state["model"])
        assert call(train.main, *flags, "--evaluations=1", "--resume") == 0
        assert checkpoint_of(out)["step"] == 6

    def test_two_runs_in_one_folder_are_refused(self, trained, capsys):
        out, arguments = trained
        before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
        with common.locked(out, "busy"):
            for more in ([], ["--resume", "--max_iters=9"]):
                assert call(train.main, *arguments, *more) == 2
                error = capsys.readouterr().err
                assert f"another run is using {out}" in error and error.count("\n") == 1
        assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
        assert call(train.main, *arguments, "--resume", "--max_iters=9") == 0

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    @pytest.mark.parametrize("name", ["last.pt", "model.safetensors", "log.csv", "loss.png"])
    def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(
        self, trained, capsys, name, monkeypatch
    ):
        out, arguments = trained
        before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
        monkeypatch.setattr(common.uuid, "uuid4", lambda: types.SimpleNamespace(hex="full"))
        (out / f"{name}.full.part").symlink_to("/dev/full")
        capsys.readouterr()
        assert call(train.main, *arguments, "--resume", "--max_iters=9") == 2
        error = capsys.readouterr().err
        assert "can't be saved" in error and "No space left" in error and error.count("\n") == 1, (
            error
        )
        if name in ("last.pt", "model.safetensors"):
            assert (out / name).read_bytes() == before[out / name]
        assert not list(out.glob("*.part"))
        assert call(train.main, *arguments, "--resume", "--max_iters=9") == 0
        assert checkpoint_of(out)["step"] == 9

    def test_a_compiler_that_fails_is_one_line(self, corpus, data, tmp_path, capsys, monkeypatch):
        def broken(model):
            def engine(*_, **__):
                raise RuntimeError("no working C++ compiler")

            return engine

        monkeypatch.setattr(torch, "compile", broken)
        flags = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path / 'out'}", "--dtype=float32"]
        assert call(train.main, *flags, "--compile") == 0
        said = capsys.readouterr().out
        assert said.count("without --compile, which fails here (RuntimeError: no working C++") == 1
        first = checkpoint_of(tmp_path / "out")
        assert call(train.main, *flags, f"--out_dir={tmp_path / 'eager'}") == 0
        assert same(first["model"], checkpoint_of(tmp_path / "eager")["model"])

    def test_the_papers_recipes_in_the_readme_are_of_the_papers_size(self):
        codec = prepare.new_tokenizer("bytes", 0, [])
        commands = [
            line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()
        ]
        recipes = [line for line in commands if "--dataset=wikitext-103" in line]
        sizes = []
        for recipe in recipes:
            s = train.read_settings(recipe.split()[2:])
            assert (s.learning_rate, s.ema_learning_rate, s.optimizer) == (5e-3, 5e-3, "adamw")
            assert (s.beta1, s.beta2, s.weight_decay, s.grad_clip) == (0.9, 0.98, 0.1, 0.25)
            assert (s.max_iters, s.max_minutes) == (400_000, 0)
            assert s.warmup_fraction * s.max_iters == 24_000 and s.min_lr_fraction == 0
            assert s.chunk_size == 1024 and s.block_size % s.chunk_size == 0
            assert s.batch_size * s.gradient_accumulation_steps * s.block_size == 24 * 6144
            codec.size = s.vocab_size
            with torch.device("meta"):
                model = train.new_model(s, codec)
            sizes.append(sum(p.numel() for p in model.parameters()))
        assert len(sizes) == 1 and 2e8 < sizes[0] < 2.6e8

    def test_a_new_run_keeps_the_earlier_one(self, trained, capsys):
        out, arguments = trained
        weights = (out / "model.safetensors").read_bytes()
        capsys.readouterr()
        assert call(train.main, *arguments, "--seed=5") == 0
        assert f"is now in {out / 'previous-1'}" in capsys.readouterr().out
        assert (out / "previous-1" / "model.safetensors").read_bytes() == weights
        assert (out / "model.safetensors").read_bytes() != weights
        assert call(train.main, *arguments, "--seed=5", "--resume") == 0  # done: evaluates only
        assert len((out / "log.csv").read_text().splitlines()) == 3
        assert call(train.main, f"--out_dir={out / 'previous-1'}", "--resume") == 0

    def test_a_validation_split_shorter_than_the_context_is_evaluated(self, corpus, data, tmp_path):
        (corpus / "wiki.valid.raw").write_text("the model of the average .\n")
        flags = [f"--source={corpus}", f"--out_dir={tmp_path / 'out'}", "--block_size=200"]
        assert call(train.main, *TINY, *flags) == 0

    def test_the_learning_rate_rises_and_falls_linearly(self):
        s = train.read_settings(
            ["--learning_rate=1", "--warmup_fraction=0.1", "--min_lr_fraction=0.05"]
        )
        found = [train.learning_rate_factor(s, x) for x in (0.05, 0.1, 0.55, 1.0)]
        assert found == pytest.approx([0.5, 1, 0.5, 0.05])

    def test_progress_is_by_steps_or_by_minutes_of_training(self, corpus, data, tmp_path):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}")  # of 6 steps
        run.step, run.seconds = 3, 90.0
        assert run.progress() == 0.5
        for minutes, expected in ((2, 0.75), (6, 0.5), (1, 1.0)):
            run.settings.max_minutes = minutes
            assert run.progress() == expected
        run.train_step()
        assert 90 < run.seconds < 91
        run.evaluate()
        assert 90 < run.seconds < 91

    @pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20), (1, 9)])
    def test_muons_step_is_orthogonal_and_that_of_torch(self, shape):
        matrices = [randn(i, *shape, dtype=torch.float32) for i in range(2)]  # one step for both
        matrices.append(randn(2, 7, 5, dtype=torch.float32))
        singular = torch.linalg.svdvals(train.orthogonalize(torch.stack(matrices[:2])))
        assert 0.5 < singular.min() and singular.max() < 1.3
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
        found = []
        for optimizer in (train.Muon, getattr(torch.optim, "Muon", train.Muon)):
            parameters = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
            steps = optimizer(parameters, **options)
            for i in range(4):
                for k, p in enumerate(parameters):
                    p.grad = 10**k * randn(10 * i + k, *p.shape, dtype=torch.float32)
                steps.step()
            found.append([p.detach() for p in parameters])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).abs().max() < 0.02  # torch's computes in bfloat16

    def test_bfloat16_is_chosen_where_its_products_take_less_time(self, monkeypatch):
        cpu = torch.device("cpu")
        for seconds, dtype in ((1.0, torch.float32), (200.0, torch.float32), (0.5, torch.bfloat16)):
            machine.bfloat16_is_faster.cache_clear()
            waits = itertools.cycle([0.0, 1.0, 0.0, seconds])  # float32 and bfloat16 take turns
            clock = itertools.accumulate(waits)
            monkeypatch.setattr(train.time, "perf_counter", functools.partial(next, clock))
            assert train.choose_dtype("auto", cpu) == dtype
            assert train.choose_dtype("float32", cpu) == torch.float32
        machine.bfloat16_is_faster.cache_clear()

    def test_a_resume_keeps_the_dtype_that_its_run_chose(self, corpus, data, tmp_path, monkeypatch):
        flags = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path}"]
        for faster, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr(machine, "bfloat16_is_faster", lambda faster=faster: faster)
            run = training(*flags)
            run.train_step()
            run.save(better=True)
            monkeypatch.setattr(machine, "bfloat16_is_faster", lambda faster=faster: not faster)
            assert training(*flags, "--resume").dtype == dtype

    def test_evaluations_are_spread_over_the_training_and_the_curve_has_every_step(
        self, corpus, data, tmp_path, monkeypatch
    ):
        drawn = []
        curves = train.draw_curves
        monkeypatch.setattr(train, "draw_curves", lambda *a: drawn.append(a) or curves(*a))
        flags = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path}", "--sample_tokens=0"]
        assert call(train.main, *flags, "--max_iters=23", "--evaluations=5") == 0
        rows = (tmp_path / "log.csv").read_text().splitlines()[1:]
        assert [int(row.split(",")[0]) for row in rows] == [5, 10, 14, 19, 23]
        log, losses, _ = drawn[-1]
        assert len(log) == 5 and len(losses) == 23
        for before, after in itertools.pairwise([{"step": 0}, *log]):
            mean = np.mean(losses[before["step"] : after["step"]])
            assert float(after["train_loss"]) == pytest.approx(mean, rel=1e-4)

    def test_without_a_terminal_a_line_now_and_then_shows_the_progress(
        self, trained, capsys, monkeypatch
    ):
        _, arguments = trained
        capsys.readouterr()
        clock = itertools.count(0, 20)  # seconds from one look at it to the next
        monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
        assert call(train.main, *arguments, "--resume", "--max_iters=12") == 0
        lines = re.findall(
            r"(?m)^ ?\d+% step \d+, loss \d+\.\d+, [\d,]+ tokens/s$", capsys.readouterr().out
        )
        assert 1 <= len(lines) < 6

    def test_the_best_model_is_that_of_the_lowest_loss_so_far(
        self, corpus, data, tmp_path, monkeypatch
    ):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}", "--sample_tokens=0")
        saved = []
        monkeypatch.setattr(run, "write_checkpoint", saved.append)
        for loss in (3.0, 2.0, 4.0, 3.0, 1.0):
            result = {"loss": loss, "bits_per_byte": loss, "word_perplexity": loss}
            monkeypatch.setattr(train, "evaluate", lambda *_, result=result: result)
            run.losses.append(loss)
            run.step += 1
            run.evaluate()
        assert saved == [True, True, False, False, True]

    def test_a_better_model_is_written_before_the_checkpoint_that_counts_on_it(
        self, corpus, data, tmp_path, monkeypatch
    ):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}")
        written = []
        write = train.write_whole
        monkeypatch.setattr(
            train, "write_whole", lambda p, c: written.append(p.name) or write(p, c)
        )
        monkeypatch.setattr(run.model, "save_pretrained", lambda _: written.append("model"))
        run.save(better=True)
        assert written == ["model", "last.pt"]

    def test_no_gradient_is_clipped_with_grad_clip_0(self, corpus, data, tmp_path):
        steps = {}
        for clip in (0, 1e9, 1e-3):
            flags = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path / str(clip)}"]
            run = training(*flags, f"--grad_clip={clip}", "--dtype=float32", "--beta1=0.0")
            seen = []
            run.optimizers[0].register_step_pre_hook(
                lambda *_, run=run, seen=seen: seen.extend(
                    p.grad.clone() for p in run.model.parameters()
                )
            )
            run.train_step()
            steps[clip] = torch.cat([grad.flatten() for grad in seen])
        assert torch.equal(steps[0], steps[1e9]) and steps[0].any()
        assert steps[1e-3].norm() == pytest.approx(1e-3, rel=1e-3)

    def test_a_text_of_just_one_window_is_trained_on(self, corpus, data, tmp_path):
        folder = prepare.prepare("wikitext-2", str(corpus), tokenizer="bytes")
        codec = prepare.load_tokenizer(folder)
        tokens = prepare.read_meta(folder)["splits"]["train"]["tokens"]
        whole = train.Corpus(folder, codec, tokens - 1, seed=1)
        assert whole.windows == 1 and whole.epoch(0).tolist() == [0]
        starts = {train.Corpus(folder, codec, tokens - 2, seed=i).epoch(0)[0] for i in range(20)}
        assert starts == {0, 1}
        with pytest.raises(common.UserError, match="give more text or lower --block_size"):
            train.Corpus(folder, codec, tokens, seed=1)

    def test_a_setting_without_a_comment_is_a_flag_too(self, tmp_path, monkeypatch, capsys):
        copied = tmp_path / "train.py"
        copied.write_text(
            Path(train.__file__).read_text("utf-8").replace("  # blocks\n", "\n"), "utf-8"
        )
        monkeypatch.setattr(train, "__file__", str(copied))
        assert call(train.main, "--help") == 0
        assert "--n_layer" in capsys.readouterr().out

    def test_a_dataset_has_defaults_of_its_own_that_flags_override(self):
        for name, preset in train.PRESETS.items():
            usual = {n: x for n, x in train.SETTINGS.items() if n not in preset} | {"dataset": name}
            assert vars(train.read_settings([f"--dataset={name}"])) == usual | preset
            assert {n: type(train.SETTINGS[n]) for n in preset} == {
                n: type(x) for n, x in preset.items()
            }
        s = train.read_settings(["--dataset=shakespeare", "--n_layer=7"])
        assert s.n_layer == 7 and s.block_size == train.PRESETS["shakespeare"]["block_size"]
        assert train.read_settings([]).block_size == train.block_size != s.block_size

    @pytest.mark.parametrize("optimizer", ["muon", "adamw"])
    def test_weight_decay_is_for_matrices_only(self, corpus, data, tmp_path, optimizer):
        flags = [f"--source={corpus}", f"--out_dir={tmp_path}", f"--optimizer={optimizer}"]
        rates = ("--learning_rate=0.5", "--muon_learning_rate=0.25", "--ema_learning_rate=0.125")
        run = training(*TINY, *flags, *rates)
        names = {id(p): name for name, p in run.model.named_parameters()}
        decaying, rest, rates = [], [], {}
        for found in run.optimizers:
            for group in found.param_groups:
                members = [names[id(p)] for p in group["params"]]
                (decaying if group["weight_decay"] else rest).extend(members)
                assert group["weight_decay"] in (0.0, 0.1)
                rates |= dict.fromkeys(members, group["lr"])
        assert {name.split(".")[-2] for name in decaying} == {
            "v_proj",
            "mx_proj",
            "h_proj",
            "fc1",
            "fc2",
        }
        assert sorted(decaying + rest) == sorted(names.values())
        theirs = torch.nn.TransformerEncoderLayer(8, 2)  # its matrix of q, k and v is no nn.Linear
        built = train.build_optimizers(run.settings, theirs, torch.device("cpu"), torch.float32)
        groups = [group for found in built for group in found.param_groups if group["weight_decay"]]
        assert {id(p) for group in groups for p in group["params"]} == {
            id(p) for name, p in theirs.named_parameters() if p.ndim == 2
        }
        own = re.compile(r"ema_gate|\.qk_|rel_pos_bias")
        assert {n: rates[n] for n in rest} == {n: 0.125 if own.search(n) else 0.5 for n in rest}
        assert len({rates[name] for name in rest}) == 2
        assert {rates[name] for name in decaying} == {0.25 if optimizer == "muon" else 0.5}

    def test_a_step_learns_the_tokens_after_its_inputs_at_the_rate_of_its_time(
        self, corpus, data, tmp_path
    ):
        flags = [
            *TINY,
            f"--source={corpus}",
            f"--out_dir={tmp_path}",
            "--dropout=0",
            "--hidden_dropout=0",
        ]
        run = training(*flags, "--dtype=float32")
        tokens, length = run.corpus.tokens["train"].astype(np.int64), run.corpus.block_size
        for step in range(4):
            nats, rates = [], []
            for row in (2 * step, 2 * step + 1):
                start = run.corpus.epoch(row // run.corpus.windows)[row % run.corpus.windows]
                window = torch.from_numpy(tokens[start : start + length + 1])
                nats.append(nats_of_all(run.model, window).mean().item())
            run.train_step()
            assert run.losses[-1] == pytest.approx(np.mean(nats), rel=1e-5)
            factor = train.learning_rate_factor(run.settings, step / 6)
            rates = [group["lr"] for o in run.optimizers for group in o.param_groups]
            s = run.settings
            peaks = (s.learning_rate, s.ema_learning_rate, s.muon_learning_rate)
            assert rates == pytest.approx([peak * factor for peak in peaks])

    def test_momentum_betas_and_the_largest_gradient_are_those_set(
        self, corpus, data, tmp_path, monkeypatch
    ):
        flags = [*TINY, f"--source={corpus}", f"--out_dir={tmp_path}", "--momentum=0.7"]
        run = training(*flags, "--beta1=0.6", "--beta2=0.5", "--grad_clip=0.25")
        adamw, muon = run.optimizers
        assert {group["betas"] for group in adamw.param_groups} == {(0.6, 0.5)}
        assert {group["momentum"] for group in muon.param_groups} == {0.7}
        norms = []

        def norm(grads) -> float:
            return torch.cat([grad.flatten() for grad in grads]).norm().item()

        step = type(muon).step
        parameters = [*run.model.parameters()]
        monkeypatch.setattr(
            type(muon),
            "step",
            lambda self: norms.append(norm(p.grad for p in parameters)) or step(self),
        )
        adamw.zero_grad = lambda **_: None  # or half of the gradient were gone before Muon's step
        run.train_step()
        assert norms[0] == pytest.approx(0.25, rel=1e-3)

    def test_a_closed_update_gate_leaves_the_input_as_it_is(self):
        codec, x = prepare.new_tokenizer("bytes", 0, []), randn(0, 1, 9, 16, dtype=torch.float32)
        layer = train.new_model(train.read_settings(TINY), codec).eval().mega.layers[0].mega_layer
        for logit, near in ((-30.0, True), (0.0, False)):
            torch.nn.init.constant_(layer.mx_proj.bias[:16], logit)  # the gate's come first
            assert layer(x)[0].allclose(x) == near

    @pytest.mark.parametrize(("command", "file", "message"), WRONG, ids=[str(w[0]) for w in WRONG])
    @pytest.mark.filterwarnings("ignore:.*expects is_decoder=")
    def test_what_is_wrong_is_one_sentence_and_nothing_is_lost(
        self, command, file, message, finished, tmp_path, capsys, monkeypatch
    ):
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
        monkeypatch.chdir(tmp_path)
        name, *flags = command.split()
        if file:
            path, content = tmp_path / file[0], file[1]
            content = content(path.read_bytes()) if callable(content) else content
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
        main = {"train": train, "sample": sample, "prepare": prepare}[name].main
        source = f"--source={finished / 'wiki'}"
        given = {"train": [*TINY, source], "sample": ["--prompt=x"], "prepare": []}[name]
        capsys.readouterr()
        assert call(main, *given, *flags) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1 and "Traceback" not in error, error
        assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
        assert not (tmp_path / "nowhere").exists()

    def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
        self, trained, capsys, monkeypatch
    ):
        out, arguments = trained
        before = (out / "last.pt").read_bytes()
        forward = MegaForCausalLM.forward

        def broken(self, *args, **kwargs):
            found = forward(self, *args, **kwargs)
            return found._replace(loss=found.loss * math.nan)

        with monkeypatch.context() as patch:  # a finite loss with a gradient that is not
            clip = torch.nn.utils.clip_grad_norm_
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * math.inf)
            assert call(train.main, *arguments, "--resume", "--max_iters=9") == 2
            assert "gradient norm inf" in capsys.readouterr().err
        monkeypatch.setattr(MegaForCausalLM, "forward", broken)
        assert call(train.main, *arguments, "--resume", "--max_iters=9") == 2
        assert "step 7 has loss nan" in capsys.readouterr().err
        assert (out / "last.pt").read_bytes() == before

    def test_a_start_that_fails_touches_no_earlier_run(self, trained, capsys, monkeypatch):
        out, arguments = trained
        (out / "previous").mkdir()
        (out / "previous" / "notes.txt").write_text("mine")
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for error, code in ((RuntimeError("not enough memory"), 2), (KeyboardInterrupt(), 130)):
            for name in ("gradients", "update"):
                with monkeypatch.context() as patch:
                    patch.setattr(train.Training, name, unittest.mock.Mock(side_effect=error))
                    for _ in range(2):
                        assert call(train.main, *arguments, "--seed=5") == code
                assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        for number in (1, 2):  # and runs that succeed number it
            assert call(train.main, *arguments, f"--seed={number}") == 0
            assert (out / f"previous-{number}" / "last.pt").exists()
        assert (out / "previous-1" / "last.pt").read_bytes() == before[out / "last.pt"]
        assert (out / "previous" / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("links", [True, False])
    def test_a_new_run_killed_at_any_file_operation_leaves_the_earlier_one_whole(
        self, trained, monkeypatch, links
    ):
        out, arguments = trained
        old = {name: (out / name).read_bytes() for name in train.FILES}
        kept = shutil.copytree(out, out.with_name("kept"))

        class Killed(BaseException):
            """And what `finally` would do fails too, as if it did not come to it."""

        def count(function, left):
            def counted(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*args, **options)

            return counted

        moments = 0
        for moment in itertools.count():
            shutil.rmtree(out)
            shutil.copytree(kept, out)
            run = training(*arguments, "--seed=5")
            run.train_step()
            left = [moment]
            with monkeypatch.context() as patch:
                for owner, name in ((os, "link"), (os, "replace"), (os, "fsync"), (Path, "mkdir"),
                                    (Path, "rename"), (Path, "replace"), (Path, "unlink"),
                                    (shutil, "copy2"), (Path, "write_bytes")):  # fmt: skip
                    patch.setattr(owner, name, count(getattr(owner, name), left))
                if not links:
                    patch.setattr(os, "link", unittest.mock.Mock(side_effect=OSError("no links")))
                try:
                    run.save(better=True)
                except Killed:
                    moments += 1
                else:
                    break
            again = training(*arguments, "--seed=6")
            again.train_step()
            again.save(better=True)
            folders = [out, *out.glob("previous-*")]
            whole = [all((f / n).exists() and (f / n).read_bytes() == x for n, x in old.items())
                     for f in folders]  # fmt: skip
            assert any(whole), moment
            assert checkpoint_of(out)["settings"]["seed"] == 6
        assert moments > 25

    @pytest.mark.parametrize("optimizer", ["muon", "adamw"])
    @pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30])
    def test_only_weights_that_a_loss_has_proved_are_saved_and_a_lower_rate_goes_on(
        self, corpus, data, tmp_path, capsys, monkeypatch, wrong, optimizer
    ):
        out = tmp_path / "out"
        flags = [*TINY, f"--source={corpus}", f"--out_dir={out}", "--save_interval=1"]
        flags += [f"--optimizer={optimizer}", "--evaluations=1", "--dtype=float32"]
        update = train.Training.update

        def breaking(self, *found):
            update(self, *found)
            if self.step == 4:
                self.model.lm_head.weight.data[:] = wrong
                self.model.mega.layers[0].mega_layer.v_proj.weight.data[:] = wrong

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "update", breaking)
            assert call(train.main, *flags) == 2
            said = capsys.readouterr().err
            assert "not finite" in said or "step 5 has loss" in said, said
            assert said.count("\n") == 1 and "--learning_rate" in said
            state = checkpoint_of(out)
            assert state["step"] == 3
            assert all(x.isfinite().all() for x in train.leaves(state["model"]).values())
            assert call(train.main, *flags, "--evaluations=3", "--out_dir=" + str(out / "b")) == 2
            assert "Traceback" not in capsys.readouterr().err  # from an evaluation of such weights
            assert checkpoint_of(out / "b")["step"] <= 3
        sample.load_model(out)
        lower = ["--learning_rate=1e-5", "--muon_learning_rate=1e-5", "--ema_learning_rate=1e-5"]
        assert call(train.main, f"--out_dir={out}", "--resume", *lower) == 0
        state = checkpoint_of(out)
        assert state["step"] == 6 and state["settings"]["learning_rate"] == 1e-5
        assert state["log"][-1]["learning_rate"] <= 1e-5

    def test_moments_that_are_not_finite_are_not_saved(self, corpus, data, tmp_path):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path}", "--optimizer=adamw")
        run.train_step()
        next(iter(run.optimizers[0].state.values()))["exp_avg_sq"][:] = math.inf
        with pytest.raises(common.UserError, match="step 1 are not finite"):
            run.save(better=True)
        assert not (tmp_path / "last.pt").exists()

    def test_a_run_whose_folder_is_deleted_goes_on_in_another(
        self, corpus, data, tmp_path, monkeypatch, capsys
    ):
        out, update = tmp_path / "out", train.Training.update

        def deleting(self, *found):
            if self.step == 4:
                shutil.rmtree(out)
                self.best = -math.inf  # no model will be better than the one that is gone
            update(self, *found)

        monkeypatch.setattr(train.Training, "update", deleting)
        flags = [*TINY, f"--source={corpus}", f"--out_dir={out}"]
        assert call(train.main, *flags) == 0
        (rescued,) = tmp_path.glob("out-*")
        assert checkpoint_of(rescued)["step"] == 6 and not out.exists()
        sample.load_model(rescued)
        assert f"the run continues in {rescued}" in capsys.readouterr().out
        shutil.rmtree(rescued)

        def occupying(self, *found):  # and another run has begun there
            update(self, *found)
            if self.step == 4:
                shutil.rmtree(out)
                with common.locked(out, "busy"):
                    (out / "last.pt").write_text("another's")

        monkeypatch.setattr(train.Training, "update", occupying)
        assert call(train.main, *flags) == 0
        assert (out / "last.pt").read_text() == "another's"
        assert checkpoint_of(*tmp_path.glob("out-*"))["step"] == 6

    def test_an_error_while_saving_says_what_there_is(self, corpus, data, tmp_path, monkeypatch):
        run = training(*TINY, f"--source={corpus}", f"--out_dir={tmp_path / 'out'}")
        run.train_step()
        full = unittest.mock.Mock(side_effect=OSError(28, "No space left on device"))
        monkeypatch.setattr(train, "write_whole", full)
        with pytest.raises(common.UserError, match=r"last.pt does not exist, either"):
            run.save(better=False)
        monkeypatch.undo()
        monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
        run.save(better=False)
        monkeypatch.setattr(train, "write_whole", full)
        with pytest.raises(common.UserError, match=r"the earlier .*last.pt is intact"):
            run.save(better=False)

    def test_a_resume_has_the_settings_of_its_run(self, trained, capsys, monkeypatch):
        out, _ = trained
        saved = checkpoint_of(out)["settings"]
        assert (
            saved["n_embd"] == 16 and saved["source"] and saved["dtype"] in ("float32", "bfloat16")
        )
        capsys.readouterr()
        more = ["--resume", "--max_iters=9", "--learning_rate=1e-3", "--grad_clip=0.5"]
        assert call(train.main, f"--out_dir={out}", *more) == 0
        settings = checkpoint_of(out)["settings"]
        changed = {"max_iters": 9, "learning_rate": 1e-3, "grad_clip": 0.5}
        assert settings == saved | changed and checkpoint_of(out)["step"] == 9
        said = capsys.readouterr().out
        assert re.search(r"note: the run was 100% done, now it is 67%, so its learning rates go "
                         r"back up, from 2% to \d+%", said)  # fmt: skip
        assert call(train.main, f"--out_dir={out}", "--resume", "--max_iters=9") == 0
        assert "go back up" not in capsys.readouterr().out
        assert call(train.main, f"--out_dir={out}", "--eval_only", "--contexts=carried") == 0
        assert "val, carried: loss" in capsys.readouterr().out
        for flag in ("--n_layer=2", "--seed=3", "--optimizer=adamw", "--batch_size=4"):
            assert call(train.main, f"--out_dir={out}", "--resume", flag) == 2
            assert f"{flag.split('=')[0][2:]} was" in capsys.readouterr().err

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_a_text_that_has_changed_is_not_trained_on_and_its_results_are_marked(
        self, trained, corpus, capsys, split
    ):
        out, _ = trained
        path = corpus / f"wiki.{split}.raw"
        path.write_text(path.read_text("utf-8").replace("average", "the"), encoding="utf-8")
        assert call(train.main, f"--out_dir={out}", "--resume", "--max_iters=9") == 2
        said = capsys.readouterr().err
        assert "checksum was" in said or "a different tokenizer" in said
        if split != "train":  # with another training text the tokenizer is another, too
            assert call(train.main, f"--out_dir={out}", "--eval_only", "--contexts=carried") == 0
            said = capsys.readouterr().out
            assert "this model was not trained on" in said and "val, carried" in said

    def test_an_evaluation_takes_the_dtype_that_is_fast_here(self, trained, monkeypatch):
        out, _ = trained
        state = torch.load(out / "last.pt", weights_only=True)
        state["settings"]["dtype"] = "bfloat16"
        torch.save(state, out / "last.pt")
        assert train.read_settings([f"--out_dir={out}", "--eval_only"]).dtype == "auto"
        assert train.read_settings([f"--out_dir={out}", "--resume"]).dtype == "bfloat16"

    def test_settings_that_an_evaluation_would_not_use_are_refused(self, trained, capsys):
        out, _ = trained
        for flag in ("--n_layer=9", "--seed=4", "--train_split=val"):
            assert call(train.main, f"--out_dir={out}", "--eval_only", flag) == 2
            assert f"{flag.split('=')[0][2:]} was" in capsys.readouterr().err

    def test_a_picture_that_cannot_be_drawn_ends_no_run(self, trained, capsys, monkeypatch):
        out, _ = trained
        monkeypatch.setattr(train, "draw_curves", unittest.mock.Mock(side_effect=ValueError("x")))
        assert call(train.main, f"--out_dir={out}", "--resume", "--max_iters=9") == 0
        assert "loss.png can't be drawn" in capsys.readouterr().out
        assert len((out / "log.csv").read_text().splitlines()) > 3

    def test_a_model_without_its_last_pt_is_evaluated_by_the_flags(self, trained, capsys):
        out, arguments = trained
        (out / "last.pt").unlink()
        assert call(train.main, *arguments, "--eval_only", "--contexts=carried") == 0
        assert "val, carried: loss" in capsys.readouterr().out

    @pytest.mark.parametrize("optimizer", ["muon", "adamw"])
    def test_a_forged_checkpoint_never_reaches_the_optimizer(
        self, corpus, data, tmp_path, capsys, optimizer
    ):
        flags = [f"--source={corpus}", f"--out_dir={tmp_path}", f"--optimizer={optimizer}"]
        assert call(train.main, *TINY, *flags) == 0
        path = tmp_path / "last.pt"
        good = torch.load(path, weights_only=True)
        assert all(isinstance(x, dict) for o in good["optimizers"] for x in o.values())
        for change in (
            lambda x: x[:1], lambda x: x.double(), lambda x: x.to_sparse(),
            lambda x: x.flatten()[:0],
            lambda x: x.tolist(), lambda x: None, lambda x: x.to("meta"), lambda x: x[..., None],
        ):  # fmt: skip
            for o in range(len(good["optimizers"])):
                for key in {*good["optimizers"][o][0]} - {"step"}:
                    state = copy.deepcopy(good)
                    state["optimizers"][o][0][key] = change(state["optimizers"][o][0][key])
                    torch.save(state, path)
                    assert call(train.main, f"--out_dir={tmp_path}", "--resume") == 2
                    error = capsys.readouterr().err
                    assert f"optimizers.{o}.0.{key}" in error and error.count("\n") == 1
        # Of the right shape, but all of it one number in memory: it is copied, not written to.
        state = copy.deepcopy(good)
        for moments in state["optimizers"]:
            for tensors in moments.values():
                for key in tensors.keys() - {"step"}:
                    tensors[key] = torch.zeros(()).expand(tensors[key].shape)
        torch.save(state, path)
        assert call(train.main, f"--out_dir={tmp_path}", "--resume", "--max_iters=9") == 0

    def test_values_of_wrong_types_in_a_checkpoint_are_named(self, trained, capsys):
        out, _ = trained
        good = torch.load(out / "last.pt", weights_only=True)
        wrong = [None, "x", -1, 10**30, math.nan, [[]], {}, torch.zeros(2)]
        refused = 0
        for name in [*good, "settings.n_embd", "settings.dtype", "text.checksum", "log.0.seconds",
                     "log.0.sample", "losses.0"]:  # fmt: skip
            for value in wrong:
                state = copy.deepcopy(good)
                *parents, last = [int(x) if x.isdigit() else x for x in name.split(".")]
                part = functools.reduce(lambda x, key: x[key], parents, state)
                part[last] = value
                torch.save(state, out / "last.pt")
                code = call(train.main, f"--out_dir={out}", "--resume", "--sample_tokens=0")
                error = capsys.readouterr().err
                assert code == 2 and error.count("\n") == 1 and "last.pt" in error or code == 0, (
                    name, value, error
                )  # fmt: skip
                refused += code == 2
        assert refused > 100

    def test_a_text_on_which_the_tokenizer_fails_is_one_sentence(self, capsys):
        class PanicException(BaseException):
            """As tiktoken's Rust raises it, of very many blanks."""

        assert call(unittest.mock.Mock(side_effect=PanicException("stack overflow"))) == 2
        error = capsys.readouterr().err
        assert "the tokenizer fails on this text" in error and error.count("\n") == 1

    def test_streams_may_be_of_any_kind_and_closed(self, trained, monkeypatch, capsys):
        _, arguments = trained
        for out, error in ((io.StringIO(), io.StringIO()), (None, None), (io.StringIO(), None)):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", out)
                patch.setattr(sys, "stderr", error)
                assert call(train.main, *arguments, "--resume", "--max_iters=8") == 0
                assert call(train.main, *arguments, "--zzz") == 2
            assert out is None or "val: loss" in out.getvalue()

    def test_training_works_in_a_thread_and_takes_its_flags_as_an_argument(
        self, trained, monkeypatch
    ):
        out, arguments = trained
        monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])  # as in a notebook
        more = [*arguments, "--resume", "--max_iters=8"]
        thread = threading.Thread(target=train.main, args=(more,))
        thread.start()
        thread.join(120)
        assert checkpoint_of(out)["step"] == 8

    def test_an_environment_that_is_not_torchruns_is_no_mystery(self, trained, monkeypatch, capsys):
        out, _ = trained
        again = [f"--out_dir={out}", "--resume", "--max_iters=8", "--contexts=carried"]
        monkeypatch.setenv("RANK", "1")  # as some cluster leaves it, of one process
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert call(train.main, *again) == 0
        assert "val: loss" in capsys.readouterr().out
        assert call(train.main, "--zzz") == 2
        assert "there is no setting --zzz" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "0")
        assert call(train.main, *again) == 0
        monkeypatch.setenv("LOCAL_RANK", "0")
        capsys.readouterr()
        for size in ("two", "-1", "1.5", "²"):
            monkeypatch.setenv("WORLD_SIZE", size)
            assert call(train.main, *again) == 2
            assert f"the environment has WORLD_SIZE={size}" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(machine, "START", datetime.timedelta(seconds=1))
        for address in (None, "127.0.0.1"):  # nobody is told of, and nobody comes
            if address:
                monkeypatch.setenv("MASTER_ADDR", address)
                monkeypatch.setenv("MASTER_PORT", "29877")
                monkeypatch.setenv("RANK", "0")
            assert call(train.main, *again) == 2
            error = capsys.readouterr().err
            assert "can't find the others" in error and "torchrun" in error, error

    @slow
    @pytest.mark.parametrize(("flags", "said"), [
        ([], "last.pt was made with other settings"),
        (["--dataset=nowhere.txt"], "nowhere.txt does not exist"),
        (["--batch_size=3", "--out_dir=new"], "can't be divided among 2 processes"),
    ])  # fmt: skip
    def test_a_mistake_ends_all_processes_with_one_sentence(self, copied, corpus, flags, said):
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        given = [*TINY, f"--source={corpus}", "--out_dir=shared"]
        if not flags:
            assert script(copied, "train.py", *given).returncode == 0
            flags = ["--resume", "--n_embd=24"]
        if flags[0].startswith("--dataset"):
            flags = ["--source=", *flags]
        done = script(copied, *torchrun, "train.py", *given, *flags)
        ours = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
        assert done.returncode != 0 and len(ours) == 1 and said in ours[0], done.stderr
        assert "gloo" not in done.stderr and 'train.py", line' not in done.stderr, done.stderr

    @slow
    def test_processes_with_other_settings_are_found_at_the_start(self, copied, corpus):
        given = [*TINY, f"--source={corpus}", "--out_dir=unlike"]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29878"}
        running = []
        for rank in (0, 1):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": "0"}
            command = [sys.executable, "train.py", *given, f"--seed={rank + 5}"]
            running.append(subprocess.Popen(command, cwd=copied, env=environment, text=True,
                                            stderr=subprocess.PIPE))  # fmt: skip
        for process in running:
            error = process.communicate(timeout=100)[1]
            assert process.returncode == 2
            assert "process 1 has --seed=6, and process 0 has 5" in error and error.count("\n") == 1
        assert not (copied / "unlike").exists()

    def test_an_unwritable_out_dir_is_one_sentence(self, corpus, data, tmp_path, capsys):
        (tmp_path / "file").write_text("in the way")
        assert call(train.main, *TINY, f"--source={corpus}", f"--out_dir={tmp_path / 'file'}") == 2
        assert "file" in capsys.readouterr().err

    def test_help_lists_every_setting_with_its_default(self, capsys):
        assert call(train.main, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        for name, default in train.SETTINGS.items():
            assert f"--{name}" in text and f"(default: {default!r})" in text
        assert (
            train.read_settings(["--learning_rate", "0.5", "--resume=False"]).learning_rate == 0.5
        )
        assert train.read_settings(["--resume"]).resume is True

    @slow
    def test_the_scripts_work_from_end_to_end(self, copied, corpus, server):
        for source in (corpus, server.url("good.zip")):
            done = script(copied, "train.py", *TINY, f"--source={source}")
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1].startswith("val: loss ")
        done = script(copied, "sample.py", "--max_new_tokens=5", stdin="the model\n")
        assert done.returncode == 0 and done.stdout.startswith("the model")
        done = script(copied, "sample.py", "--prompt", "猫", env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and done.stdout.startswith("?")
        done = script(copied, "data/prepare.py", "pydocs", "--tokenizer=bytes")
        assert done.returncode == 0 and "pydocs is ready" in done.stdout
        done = script(copied, "train.py", *TINY, f"--source={server.url('half.zip')}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "half.zip" in done.stderr
        assert not [p for p in (copied / "data").rglob("*") if p.suffix in (".part", ".zip")]

    @slow
    def test_without_network_training_says_so_and_uses_pydocs(
        self, data, capsys, monkeypatch, tmp_path
    ):
        """But only where nobody has named a dataset."""
        known = {"urls": ["http://127.0.0.1:9/none.zip"], "lines": {}}
        monkeypatch.setitem(prepare.PUBLISHED, "wikitext-2", known)
        s = train.read_settings([*TINY, f"--out_dir={tmp_path}"])
        with train.find_data(s) as folder:
            assert folder == data / "pydocs"
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "wikitext-2 can't be downloaded" in said
        monkeypatch.setitem(prepare.PUBLISHED, "wikitext-103", known)
        for name in ("wikitext-2", "wikitext-103"):
            assert call(train.main, *TINY, f"--dataset={name}", f"--out_dir={tmp_path}") == 2
            caught = capsys.readouterr()
            assert "could not be downloaded" in caught.err and not caught.out
            assert not (tmp_path / "last.pt").exists()

    @slow
    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
    @pytest.mark.parametrize(
        ("number", "evaluated"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
    )
    def test_ctrl_c_saves_and_a_resume_goes_on(self, copied, corpus, number, evaluated):
        out = f"stopped{number}"
        arguments = [*TINY, f"--source={corpus}", f"--out_dir={out}", "--max_iters=100000"]
        arguments.append(f"--evaluations={30000 if evaluated else 1}")
        command = [sys.executable, "train.py", *arguments, "--sample_tokens=0"]
        first = "step " if evaluated else "7,396 parameters"
        with subprocess.Popen(command, cwd=copied, stdout=subprocess.PIPE, text=True) as process:
            while not process.stdout.readline().startswith(first):
                assert process.poll() is None
            time.sleep(0 if evaluated else 0.5)
            process.send_signal(number)
            said = process.communicate(timeout=60)[0].splitlines()[-1]
        assert process.returncode == 128 + number
        step = int(re.fullmatch(r"stopped and saved at step (\d+); --resume continues", said)[1])
        assert step > 0 and checkpoint_of(copied / out)["step"] == step
        assert script(copied, "sample.py", "--out_dir", out, "--prompt=the").returncode == 0
        done = script(copied, "train.py", *arguments, "--resume", f"--max_iters={step + 2}")
        assert done.returncode == 0 and f"step {step + 2}: " in done.stdout


# ------------------------------------------------------------------------------------- TestSample


class TestSample:
    """sample.py."""

    def test_sampling_continues_the_prompt(self, trained, capsys, monkeypatch):
        out, _ = trained
        capsys.readouterr()
        prompt = "the model é 猫"
        flags = ["--prompt", prompt, "--out_dir", out, "--max_new_tokens", "7"]
        assert call(sample.main, *flags) == 0
        first = capsys.readouterr().out
        assert first.startswith(prompt) and len(first) > len(prompt) + 1
        call(sample.main, *flags)
        assert capsys.readouterr().out == first
        call(
            sample.main, *flags, "--num_samples=2", "--top_k=5", "--top_p=0.9", "--temperature=1.5"
        )
        assert capsys.readouterr().out.count(prompt) == 2
        assert call(sample.main, "--prompt", "", "--out_dir", out, "--max_new_tokens=3") == 0
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(
                sample, "continue_text", lambda m, *_, **__: seen.append(m.config.chunk_size)
            )
            for flag in ("--chunk_size=3", "--chunk_size=0"):
                assert call(sample.main, f"--model={out}", "--prompt=The", flag) == 0
        capsys.readouterr()
        assert seen == [3, 8]
        model, codec = sample.load_model(out)
        pieces = []
        sample.continue_text(model, codec, prompt, pieces.append, max_new_tokens=7, temperature=0)
        ids = torch.tensor([codec.encode(prompt)])
        new = model.generate(ids, 7, temperature=0, eos_token_id=codec.end_of_text)[
            0, ids.shape[1] :
        ]
        expected = codec.decode([i for i in new.tolist() if i != codec.end_of_text])
        assert "".join(pieces) == expected

    def test_fill_mask_names_the_likeliest_tokens(self, masked, capsys):
        folder, model, codec = masked
        prompt = "paris is the <mask> of france <mask>"
        flags = ["--model", folder, "--task=fill-mask", "--prompt", prompt, "--top_k=3"]
        assert call(sample.main, *flags) == 0
        lines = capsys.readouterr().out.splitlines()
        ids = torch.tensor([[*codec.encode(prompt), codec.end_of_text]])
        p = model(ids).logits.softmax(-1)[ids == codec.mask]
        expected = []
        for i, (values, tokens) in enumerate(zip(*p.topk(3), strict=True)):
            expected.append(f"mask {i + 1} of 2")
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                text = codec.decode_bytes([token]).decode("utf-8", "replace")
                expected.append(f"{value:7.2%} {text!r}")
        assert lines == expected
        assert call(sample.main, *flags[:-1], "--prompt=the <mask>") == 0
        assert len(capsys.readouterr().out.splitlines()) == 5

    def test_fill_mask_reads_a_text_of_ours_between_two_ends(self, bpe, tmp_path, capsys):
        codec = bpe.with_mask()
        config = small_config(is_decoder=False, bidirectional=True, vocab_size=codec.size)
        model = randomized(mega.MegaForMaskedLM(config)).float()
        model.save_pretrained(tmp_path)
        prepare.save_tokenizer(codec, tmp_path)
        flags = ["--task=fill-mask", "--prompt=the <mask> of", "--top_k=1"]
        assert call(sample.main, f"--model={tmp_path}", *flags) == 0
        ids = [codec.end_of_text, *codec.encode("the <mask> of"), codec.end_of_text]
        logits = model(torch.tensor([ids])).logits[0, ids.index(codec.mask)]
        text = codec.decode([logits.argmax().item()])
        assert capsys.readouterr().out == f"{logits.softmax(-1).max():7.2%} {text!r}\n"

    def test_a_masked_model_continues_a_prompt_by_masks_and_says_what_that_means(
        self, masked, capsys
    ):
        folder, model, codec = masked
        different = set()
        for prompt in ("paris is", "the", "of the model", "capital 1234 a"):
            flags = [f"--prompt={prompt}", "--max_new_tokens=4", "--temperature=0"]
            assert call(sample.main, "--model", folder, *flags) == 0
            captured = capsys.readouterr()
            assert "learned to fill masks" in captured.err and captured.err.count("\n") == 1
            ids = codec.encode(prompt)
            start = len(ids)
            for _ in range(4):
                ids.append(model(torch.tensor([[*ids, codec.mask]])).logits[0, -1].argmax().item())
                if ids[-1] == codec.end_of_text:
                    break
            text = codec.decode_bytes(ids).decode("utf-8", "replace")
            assert captured.out == text + "\n"
            different.add(len(set(ids[start:])))
        assert max(different) > 1  # a token depends on those before it

    @slow
    def test_a_checkpoint_of_the_hub_is_sampled(self, masked, copied, tmp_path):
        folder, _, _ = masked
        with Hub(folder) as server:
            environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
            flags = ["--model=owner/name", "--prompt=the <mask>", "--task=fill-mask"]
            done = script(copied, "sample.py", *flags, env=environment)
            server.shutdown()
        assert done.returncode == 0 and done.stdout.count("%") == 5, done.stderr

    def test_a_checkpoint_of_another_kind_is_refused(self, masked, trained, tmp_path, capsys):
        folder, _, _ = masked
        out, _ = trained
        head_model(mega.MegaForTokenClassification).save_pretrained(tmp_path / "other")
        vocabulary = json.loads((folder / "vocab.json").read_text())
        shutil.copytree(folder, tmp_path / "damaged")
        (tmp_path / "damaged" / "merges.txt").write_text("a b c\n猫 x\n", encoding="utf-8")
        shutil.copytree(folder, tmp_path / "large")
        (tmp_path / "large" / "vocab.json").write_text(json.dumps(vocabulary | {"<new>": 999}))
        shutil.copytree(folder, tmp_path / "bare")
        (tmp_path / "bare" / "vocab.json").unlink()
        capsys.readouterr()
        for model, task, prompt, message in (
            (folder, "fill-mask", "no mask", "needs a prompt with <mask> in it, got 'no mask'"),
            (out, "fill-mask", "a <mask>", "needs a MegaForMaskedLM"),
            (tmp_path / "other", "generate", "x", "is a MegaForTokenClassification"),
            (tmp_path / "damaged", "generate", "x", "is damaged"),
            (tmp_path / "large", "generate", "x", "they do not belong together"),
            (tmp_path / "bare", "generate", "x", "has no tokenizer"),
            ("no_owner", "generate", "x", "there is no checkpoint in no_owner"),
        ):
            arguments = [f"--model={model}", f"--task={task}", f"--prompt={prompt}"]
            assert call(sample.main, *arguments) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1, error

    def test_the_small_model_is_sampled_until_there_is_another(
        self, tmp_path, trained, monkeypatch, capsys
    ):
        out, _ = trained
        monkeypatch.chdir(tmp_path / "data")
        capsys.readouterr()
        flags = ["--prompt=The function", "--max_new_tokens=20", "--temperature=0"]
        assert call(sample.main, *flags) == 0
        small = capsys.readouterr()
        assert (
            small.err.count("\n") == 1
            and "no model in out/ yet" in small.err
            and "data/small" in small.err
        )
        assert small.out.startswith("The function") and len(small.out) > 40
        monkeypatch.chdir(out.parent)
        assert call(sample.main, *flags) == 0
        assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------- TestTasks


class TestTasks:
    """Each head learns what it is for."""

    @slow
    def test_a_causal_lm_copies_across_a_chunk_border(self):
        """The first chunk's four letters: from the second one only the EMA can see them."""
        config = {"is_decoder": True, "bidirectional": False, "use_chunking": True, "chunk_size": 8}
        model = MegaForCausalLM(task_config(**config))

        def batch(generator, rows):
            letters = numbers(generator, 8, 16, rows, 4)
            middle = torch.tensor([[3, 3, 3, 3, 4]]).expand(rows, -1)
            ids = torch.cat([letters, middle, letters], 1)
            return ids, F.pad(ids[:, 9:], (9, 0), value=-100)

        ids, _ = learn(model, lambda ids, labels: model(ids, labels=labels).loss, batch, 250)
        assert_right(
            model.generate(ids[:, :9], 4, temperature=0)[:, 9:].flatten(), ids[:, 9:].flatten()
        )

    @slow
    def test_a_masked_lm_fills_a_mask_from_both_sides(self):
        """Each second token names both of its neighbours; one neighbour leaves three choices."""
        model = mega.MegaForMaskedLM(task_config())

        def batch(generator, rows):
            letters = numbers(generator, 0, 3, rows, 13)
            ids = letters + 3
            ids[:, 1::2] = 3 * letters[:, :-1:2] + letters[:, 2::2] + 6
            place = 2 * numbers(generator, 0, 6, rows, 1) + 1
            labels = torch.full_like(ids, -100).scatter(1, place, ids.gather(1, place))
            return ids.scatter(1, place, 2), labels

        ids, labels = learn(model, lambda ids, labels: model(ids, labels=labels).loss, batch, 120)
        asked = labels >= 0
        assert_right(model(ids).logits.argmax(-1)[asked], labels[asked])

    @slow
    def test_a_sequence_is_classified_by_its_majority(self):
        """Of 63 tokens, from the first position: its chunk has 16, others reach it by the EMA."""
        model = mega.MegaForSequenceClassification(task_config(use_chunking=True, chunk_size=16))

        def batch(generator, rows):
            y = numbers(generator, 0, 2, rows)
            fewer, more = numbers(generator, 18, 29, rows), numbers(generator, 35, 46, rows)
            places = torch.rand(rows, 63, generator=generator).argsort(1)
            ids = (places < torch.where(y == 1, more, fewer).unsqueeze(1)).long() + 3
            return F.pad(ids, (1, 0)), y

        ids, y = learn(model, lambda ids, y: model(ids, labels=y).loss, batch, 200)
        assert_right(model(ids).logits.argmax(-1), y)

    @slow
    def test_the_span_of_a_planted_needle_is_found(self):
        model = mega.MegaForQuestionAnswering(task_config())

        def batch(generator, rows):
            ids = numbers(generator, 5, 16, rows, 32)
            start = numbers(generator, 1, 26, rows)
            end = start + numbers(generator, 1, 5, rows)
            return ids.scatter(1, start[:, None], 3).scatter(1, end[:, None], 4), start, end

        def loss(ids, start, end):
            return model(ids, start_positions=start, end_positions=end).loss

        ids, start, end = learn(model, loss, batch, 80)
        out = model(ids)
        found = torch.stack([out.start_logits.argmax(-1), out.end_logits.argmax(-1)], 1)
        assert_right(found, torch.stack([start, end], 1))

    @slow
    def test_each_bracket_gets_its_depth(self):
        model = mega.MegaForTokenClassification(task_config(num_labels=8))

        def batch(generator, rows):
            depth, depths = torch.zeros(rows, dtype=torch.long), []
            for _ in range(24):
                opens = (numbers(generator, 0, 2, rows) == 1) & (depth < 7) | (depth == 0)
                depth = depth + torch.where(opens, 1, -1)
                depths.append(depth)
            depths = torch.stack(depths, 1)
            return torch.where(depths.diff(dim=1, prepend=depths[:, :1] * 0) > 0, 3, 4), depths

        ids, depths = learn(model, lambda ids, y: model(ids, labels=y).loss, batch, 150)
        assert_right(model(ids).logits.argmax(-1).flatten(), depths.flatten())

    @slow
    def test_the_odd_sequence_out_is_chosen(self):
        """In three of four sequences a 3 stands before a 4, in the odd one a 4 before a 3."""
        model = mega.MegaForMultipleChoice(task_config())

        def batch(generator, rows):
            ids, y = numbers(generator, 5, 16, rows, 4, 16), numbers(generator, 0, 4, rows)
            first = numbers(generator, 0, 8, rows, 4, 1)
            second = first + numbers(generator, 1, 8, rows, 4, 1)
            odd = (torch.arange(4) == y.unsqueeze(1)).unsqueeze(-1)
            ids = ids.scatter(2, first, torch.where(odd, 4, 3))
            return ids.scatter(2, second, torch.where(odd, 3, 4)), y

        ids, y = learn(model, lambda ids, y: model(ids, labels=y).loss, batch, 80)
        assert_right(model(ids).logits.argmax(-1), y)

    @slow
    def test_an_encoder_decoder_reverses(self):
        """Two models: the decoder sees the sequence through cross-attention alone."""
        encoder = MegaModel(task_config(num_hidden_layers=1), add_pooling_layer=False)
        config = {"is_decoder": True, "bidirectional": False, "add_cross_attention": True}
        decoder = MegaForCausalLM(task_config(num_hidden_layers=1, **config))
        both = torch.nn.ModuleList([encoder, decoder])

        def batch(generator, rows):
            x = numbers(generator, 4, 16, rows, 6)
            return x, F.pad(x.flip(1), (1, 0), value=3)

        def loss(x, y):
            return decoder(y, labels=y, encoder_hidden_states=encoder(x).last_hidden_state).loss

        x, y = learn(both, loss, batch, 200)
        states = encoder(x).last_hidden_state
        assert_right(decoder.generate(y[:, :1], 6, 0, encoder_hidden_states=states), y)

    @slow
    def test_waveforms_are_classified_through_inputs_embeds(self):
        """Sine, square or saw-tooth, of any frequency and phase, as 96 numbers with noise."""
        options = {"num_labels": 3, "mean_pooling": True, "use_chunking": True, "chunk_size": 32}
        model = mega.MegaForSequenceClassification(task_config(**options))
        both = torch.nn.ModuleList([model, torch.nn.Linear(1, 48)])

        def batch(generator, rows):
            y = numbers(generator, 0, 3, rows)
            frequency, phase, noise = (torch.rand(rows, n, generator=generator) for n in (1, 1, 96))
            t = (torch.linspace(0, 1, 96) * (2 + 3 * frequency) + phase) % 1
            waves = torch.stack([torch.sin(2 * math.pi * t), (t - 0.5).sign(), 2 * t - 1], 1)
            return (waves[torch.arange(rows), y] + 0.3 * noise).unsqueeze(-1), y

        x, y = learn(
            both, lambda x, y: model(inputs_embeds=both[1](x), labels=y).loss, batch, 80, rows=32
        )
        assert_right(model(inputs_embeds=both[1](x)).logits.argmax(-1), y)

    @slow
    def test_shapes_are_classified_pixel_by_pixel(self):
        """Squares, crosses, diamonds of any size and place in 10 x 10 pixels in a row, by laplace
        attention and the mean of all positions.
        """
        options = {"num_labels": 3, "mean_pooling": True, "attention_activation": "laplace"}
        model = mega.MegaForSequenceClassification(task_config(**options))
        both = torch.nn.ModuleList([model, torch.nn.Linear(1, 48)])

        def batch(generator, rows):
            y, place = numbers(generator, 0, 3, rows), numbers(generator, 3, 7, 2, rows, 1, 1)
            radius, line = numbers(generator, 2, 4, rows, 1, 1), torch.arange(10)
            dx, dy = (line - place[0]).abs(), (line.unsqueeze(1) - place[1]).abs()
            cross = ((dx == 0) & (dy <= radius)) | ((dy == 0) & (dx <= radius))
            shapes = torch.stack([torch.maximum(dx, dy) == radius, cross, dx + dy == radius], 1)
            image = shapes[torch.arange(rows), y].float().flatten(1)
            return (image + 0.3 * torch.rand(rows, 100, generator=generator)).unsqueeze(-1), y

        x, y = learn(
            both, lambda x, y: model(inputs_embeds=both[1](x), labels=y).loss, batch, 100, rows=32
        )
        assert_right(model(inputs_embeds=both[1](x)).logits.argmax(-1), y)


# -------------------------------------------------------------------------------- TestHuggingFace


class Toy:
    """A translator that a table (sentences, 5, 5) of log-probabilities makes up.

    The next token depends on the sum of those before it.
    """

    def __init__(self, table: torch.Tensor):
        self.table = table

    def start(self, source, mask, first):
        return self.step(torch.cat([source, torch.zeros_like(source)], dim=1), first)

    def step(self, state, token):
        sentence, sofar = state.unbind(dim=1)
        sofar = (sofar + token) % 5
        return self.table[sentence, sofar], torch.stack([sentence, sofar], dim=1)


def mnist(folder: Path, count: int, parts=("train", "t10k")) -> np.ndarray:
    """Write images in MNIST's files: their upper part is bright, by the digit. Return them."""
    folder.mkdir(exist_ok=True)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[: 2 + 2 * label] += 150
    for part in parts:
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + content.ndim, *content.shape], ">i4").tobytes()
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head + content.tobytes()))
    return images


def fsdd(folder: Path) -> dict[str, list[int]]:
    """Write recordings of tones, higher for each digit, of two speakers. Return them by name."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    found = {}
    for digit, speaker, number in itertools.product(range(10), ("ann", "bob"), range(8)):
        length = generator.integers(200, 300)
        tone = 9000 * np.sin((0.2 + 0.25 * digit) * np.arange(length) + generator.uniform(0, 6))
        sound = (tone + generator.normal(0, 200, length)).astype("<i2")
        name = f"{digit}_{speaker}_{number}.wav"
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 8000, length, "NONE", ""))
            file.writeframes(sound.tobytes())
        found[name] = sound.tolist()
    return found


def multi30k(folder: Path):
    """Write sentences, and their words in another language, in Multi30k's files."""
    folder.mkdir()
    known = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    other = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]
    generator = np.random.default_rng(0)
    for part, count in (("train", 300), ("test_2016_flickr", 30)):
        rows = [generator.integers(0, 8, generator.integers(4, 8)) for _ in range(count)]
        for language, words in (("en", known), ("de", other)):
            text = "".join(" ".join(words[i] for i in row) + "\n" for row in rows)
            (folder / f"{part}.lc.norm.tok.{language}").write_text(text, encoding="utf-8")


def tiny_task(task: str, folder: Path) -> tuple[list[str], float]:
    """Return flags for a training of seconds, and the measure it has to reach."""
    flags = ["--n_embd=32", "--shared_size=16", "--n_layer=2", "--dropout=0", "--dtype=float32"]
    flags += ["--device=cpu"]
    if task == "listops":
        return [*flags, "--expressions=1500", "--depth=1", "--operands=3", "--max_iters=80"], 50
    if task == "digits":
        mnist(folder / "mnist", 100)
        return [*flags, f"--source={folder / 'mnist'}", "--max_iters=100"], 80
    if task == "speech":
        fsdd(folder / "fsdd")
        return [*flags, f"--source={folder / 'fsdd'}", "--max_iters=40"], 90
    if task == "translation":
        multi30k(folder / "multi30k")
        flags += [f"--source={folder / 'multi30k'}", "--vocab_size=300", "--beams=2"]
        return [*flags, "--positions=250", "--max_iters=200"], 60
    text = folder / "counting.txt"
    text.write_text("one two three four " * 3000, encoding="utf-8")
    flags += [f"--dataset={text}", f"--data_dir={folder / 'data'}", "--vocab_size=300"]
    return [*flags, "--max_iters=40"], 80


class TestPaperTasks:
    """data/tasks.py."""

    @given(seed=seeds, depth=st.integers(1, 4), most=st.integers(2, 6))
    def test_an_expression_has_the_value_of_its_tokens(self, seed, depth, most):
        """Evaluated anew from the tokens alone, with a stack."""
        expression = tasks.random_expression(random.Random(seed), depth, most)
        tokens = tasks.tokens_of(expression)
        stack = []
        deepest = 0
        for token in tokens:
            if token != "]":
                stack.append(int(token) if token.isdigit() else token)
                deepest = max(deepest, sum(isinstance(x, str) for x in stack))
                continue
            operands = []
            while isinstance(stack[-1], int):
                operands.append(stack.pop())
            assert 2 <= len(operands) <= most
            operands.sort()
            middle = (operands[(len(operands) - 1) // 2] + operands[len(operands) // 2]) // 2
            values = {"[MIN": operands[0], "[MAX": operands[-1], "[MED": middle}
            stack[-1] = values.get(stack[-1], sum(operands) % 10)
        assert stack == [tasks.value_of(expression)]
        assert deepest == tasks.depth_of(expression) <= depth

    def test_no_expression_is_in_training_and_test(self):
        """Not with its operands in another order, either; and both have the same kinds."""

        def sorted_text(example):
            stack = []
            for token in (tasks.SYMBOLS[i] for i in example.inputs):
                if token != "]":
                    stack.append(token)
                    continue
                operands = []
                while stack[-1][0] != "[":
                    operands.append(stack.pop())
                stack.append(f"({stack.pop()} {sorted(operands)})")
            return stack[0]

        lengths = {"operands": 5, "shortest": 4, "longest": 9}
        s = tasks.read_settings("listops", {"expressions": 2100, **lengths})
        task = tasks.ListOps(s)
        texts = [tuple(x.inputs) for x in (*task.train, *task.test)]
        assert len(set(texts)) == len(texts) and len(task.test) == 100
        assert {len(text) for text in texts} == {4, 5, 6, 7, 8, 9}
        assert {*map(sorted_text, task.train)}.isdisjoint(map(sorted_text, task.test))
        assert len({*map(sorted_text, task.train)}) < len(task.train)  # else that shows nothing
        many = {"operands": 3, "longest": 30, "expressions": 10500}  # short ones run out
        parts = tasks.ListOps(tasks.read_settings("listops", many))
        flat, flat_in_test = (
            np.mean([x.kind == "at depth 1" for x in part]) for part in (parts.train, parts.test)
        )
        assert abs(flat - flat_in_test) < 0.07
        others = tasks.ListOps(argparse.Namespace(**{**vars(s), "seed": 5}))
        assert [x.target for x in others.test] == [x.target for x in task.test]

    @given(seed=seeds, size=st.integers(1, 60), shuffled=st.booleans())
    def test_batches_have_each_example_once_and_fit(self, seed, size, shuffled):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, 30, generator.integers(1, 40))
        examples = [tasks.Example(np.zeros(n), i) for i, n in enumerate(lengths)]
        found = [*tasks.batches(examples, size, generator if shuffled else None)]
        assert sorted(x.target for some in found for x in some) == [*range(len(examples))]
        for some in found:
            longest = max(len(x.inputs) for x in some)
            assert len(some) == 1 or len(some) * longest <= size

    @pytest.mark.parametrize("baseline", [False, True])
    @pytest.mark.parametrize("inputs", ["tokens", "numbers"])
    def test_an_example_is_classified_alone_as_beside_longer_ones(self, baseline, inputs):
        task = tasks.Classification()
        task.settings = tasks.read_settings("speech", {"n_embd": 16, "n_layer": 2})
        task.vocabulary = 9
        generator = np.random.default_rng(0)
        examples = []
        for length in (3, 11, 8):
            shape = (length,) if inputs == "tokens" else (length, 9)
            row = generator.integers(0, 9, shape)
            row = row if inputs == "tokens" else tasks.with_constant(row[:, 1:])
            examples.append(tasks.Example(row, 2))
        task.train = task.test = examples
        model = (task.new_baseline(20) if baseline else task.new_model()).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape)
        together = task.outputs(model, examples).logits
        alone = [task.outputs(model, [example]).logits for example in examples]
        close(torch.cat(alone), together, 1e-5)
        assert (together[0] - together[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("side", [14, 28])
    def test_digits_are_means_of_squares_of_pixels(self, side, tmp_path):
        images = mnist(tmp_path, 20)
        s = tasks.read_settings("digits", {"source": str(tmp_path), "side": side})
        task = tasks.Digits(s)
        assert (len(task.train), len(task.test)) == (20, 20)
        step = 28 // side
        parts = torch.tensor(images, dtype=torch.float64)[:, None]
        expected = F.avg_pool2d(parts, step).reshape(20, -1)
        expected = (expected / 255 - 0.1307) / 0.3081
        for example, image, label in zip(task.train, expected, itertools.count()):
            close(torch.from_numpy(example.inputs[:, 0]).double(), image, 1e-5)
            assert (example.inputs[:, 1] == 1).all() and example.target == label % 10

    def test_of_test_images_alone_four_of_five_are_for_training(self, tmp_path, capsys):
        mnist(tmp_path, 20)
        for path in tmp_path.glob("train-*"):
            path.unlink()
        s = tasks.read_settings("digits", {"source": str(tmp_path)})
        task = tasks.Digits(s)
        assert "test images only" in capsys.readouterr().out
        assert (len(task.train), len(task.test)) == (16, 4)
        assert {x.inputs.tobytes() for x in task.train}.isdisjoint(
            x.inputs.tobytes() for x in task.test
        )
        again = tasks.Digits(s)
        assert all((a.inputs == b.inputs).all() for a, b in zip(task.test, again.test, strict=True))

    def test_the_transformer_starts_with_different_layers_and_tells_positions_apart(self):
        """torch's encoder copies one layer; attention alone does not know the order."""
        s = tasks.read_settings("translation", {"n_embd": 16, "n_layer": 2, "dropout": 0.1})
        model = tasks.TransformerTranslator(s, 20, 12)
        for stack in (model.encoder, model.decoder):
            first, second = (dict(layer.named_parameters()) for layer in stack.layers)
            for name, p in first.items():
                assert p.ndim < 2 or (p - second[name]).abs().min() < (p - second[name]).abs().max()
                assert p.ndim < 2 or not torch.equal(p, second[name])
        modules = model.modules()
        attention = [m for m in modules if isinstance(m, torch.nn.MultiheadAttention)]
        assert [m.dropout for m in attention] == [0.0] * 6  # MEGA has none, either
        ids = torch.full((1, 9), 5)
        x = model.embed(ids)[0]
        angle = 3 / 10000 ** (torch.arange(0, 16, 2) / 16)
        plain = model.embedding.weight[5] * 4
        close(x[3], plain + torch.cat([angle.sin(), angle.cos()]), 1e-5)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_recordings_are_read_and_divided_by_their_numbers(self, zipped, tmp_path):
        sounds = fsdd(tmp_path / "sounds")
        source = tmp_path / "sounds"
        if zipped:
            source = Path(shutil.make_archive(str(tmp_path / "sounds"), "zip", source))
        s = tasks.read_settings("speech", {"source": str(source), "samples": 16})
        task = tasks.Speech(s)
        for part, wanted in ((task.train, range(5, 8)), (task.test, range(5))):
            expected = {name: x for name, x in sounds.items() if int(name[6]) in wanted}
            assert [x.target for x in part] == [int(name[0]) for name in sorted(expected)]
            for example, name in zip(part, sorted(expected), strict=True):
                sound = np.asarray(sounds[name], np.float64)
                assert example.inputs.shape == (-(-len(sound) // 16), 17)
                read = example.inputs[:, :16].flatten()[: len(sound)]
                assert np.allclose(read, (sound - sound.mean()) / sound.std(), atol=1e-4)

    @given(seed=seeds, beams=st.integers(1, 5), longest=st.integers(1, 6))
    def test_beam_search_is_the_one_that_a_list_of_prefixes_makes(self, seed, beams, longest):
        """In a language of 5 tokens, of which the last, 4, ends a sentence."""
        table = randn(seed, 2, 5, 5).mul(2).log_softmax(-1)
        source = torch.tensor([[0], [1]])
        found = tasks.beam_search(Toy(table), source, None, 4, beams, longest)
        for sentence in range(2):
            prefixes = [(0.0, [])]
            for _ in range(longest):
                longer = [(score, ids) for score, ids in prefixes if 4 in ids]
                for score, ids in prefixes:
                    if 4 not in ids:
                        p = table[sentence, (4 + sum(ids)) % 5].tolist()
                        longer += [(score + p[token], [*ids, token]) for token in range(5)]
                prefixes = sorted(longer)[-beams:]
            expected = max(prefixes, key=lambda x: x[0] / len(x[1]))[1]
            ids = found[sentence].tolist()
            assert ids == expected + [4] * (len(ids) - len(expected))

    def test_a_translator_goes_on_from_rows_of_its_cache(self):
        """Token by token, in another order, with one row twice: as in a pass over all tokens."""
        s = tasks.read_settings("translation", {"n_embd": 16, "n_layer": 2, "dropout": 0.0})
        for model in (tasks.Translator(s, 20), tasks.TransformerTranslator(s, 20, 16)):
            model.eval()
            for p in model.parameters():
                p.data += 0.1 * torch.randn(p.shape)
            source = token_ids(1, 3, 7, 20)
            mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
            target = token_ids(2, 3, 6, 20)
            rows = torch.tensor([2, 0, 2])
            with torch.no_grad():
                expected = model(source, mask, target).log_softmax(-1)
                other = source.masked_fill(~mask, 3)  # padding is not read
                close(model(other, mask, target).log_softmax(-1), expected, 1e-5)
                found, state = model.start(source, mask, target[:, 0])
                close(found, expected[:, 0], 1e-5)
                kept = copy.deepcopy(state)
                chosen = tasks.rows_of(state, rows)
                for i in range(1, 6):
                    found, chosen = model.step(chosen, target[rows, i])
                    close(found, expected[rows, i], 1e-5)
                found, _ = model.step(state, target[:, 1])  # it is as it was
                again, _ = model.step(kept, target[:, 1])
                close(found, expected[:, 1], 1e-5)
                assert torch.equal(found, again)

    @slow
    @pytest.mark.parametrize("task", ["listops", "digits", "speech", "translation", "masks"])
    def test_a_tiny_version_learns_and_its_model_is_kept(self, task, tmp_path, capsys):
        flags, least = tiny_task(task, tmp_path)
        out = tmp_path / "out-1"
        assert call(tasks.main, task, *flags, f"--out_dir={out}") == 0
        result = json.loads((out / "result.json").read_text())
        assert {"source", "out_dir", "device"}.isdisjoint(result["settings"])
        assert result["machine"].startswith("cpu, float32, ")
        assert result["settings"]["n_embd"] == 32
        measure = next(iter(result["measured"]))
        assert result["measured"][measure] >= least
        assert f"{measure} {result['measured'][measure]:.2f}" in capsys.readouterr().out
        kinds = {"translation": MegaForCausalLM, "masks": mega.MegaForMaskedLM}
        kind = kinds.get(task, mega.MegaForSequenceClassification)
        folder = out / "decoder" if task == "translation" else out
        kept = kind.from_pretrained(folder)
        assert all(p.isfinite().all() for p in kept.parameters())
        other = tmp_path / "out-2"
        short = ["--max_iters=2", "--baseline", f"--out_dir={other}"]
        assert call(tasks.main, task, *flags, *short) == 0
        baseline = json.loads((other / "result.json").read_text())
        assert abs(baseline["parameters"] / result["parameters"] - 1) < 0.05
        assert baseline["model"] == "Transformer" and result["model"] == "MEGA"
        if task == "masks":
            capsys.readouterr()
            prompt = ["--task=fill-mask", "--prompt=one two <mask> four one"]
            assert call(sample.main, f"--model={out}", *prompt, "--top_k=1") == 0
            assert "' three'" in capsys.readouterr().out

    def test_results_are_a_table_of_means(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert call(tasks.main, "--results") == 2
        assert "there is no result" in capsys.readouterr().err
        about = {"task": "digits", "parameters": 5000, "examples": 90, "minutes": 10.0, "steps": 9}
        about["machine"] = "cpu, float32, 2 threads"
        usual = {"side": 28, "n_layer": 3, "norm": "layernorm"}
        runs = (("MEGA", 90), ("MEGA", 95), ("Transformer", 70), ("MEGA", 20))
        for number, (model, x) in enumerate(runs):
            settings = {**usual, "norm": "scalenorm"} if x == 20 else usual
            result = {**about, "model": model, "settings": settings, "seed": number}
            (tmp_path / f"out-{number}").mkdir()
            path = tmp_path / f"out-{number}" / "result.json"
            path.write_text(json.dumps({**result, "measured": {"accuracy": x}}))
        assert call(tasks.main, "--results") == 0
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        assert [row[2] for row in rows] == ["MEGA", "MEGA", "Transformer"]
        mean = "92.50 (90.00 to 95.00) |"
        machine = about["machine"]
        assert rows[0][3:] == ["5,000", "90", machine, "--side=28", "2", "10.0", "9", mean]
        assert rows[1][6:8] == ["--side=28 --norm=scalenorm", "1"]
        (tmp_path / "out-0" / "result.json").write_text(json.dumps({**about, "parameters": None}))
        assert call(tasks.main, "--results") == 2
        assert "result.json is damaged" in capsys.readouterr().err

    def test_a_stopped_run_keeps_its_model_and_gives_no_result(self, tmp_path, monkeypatch, capsys):
        flags, _ = tiny_task("listops", tmp_path)
        update = machine.ProgressBar.update

        def stop(bar, progress, text):
            update(bar, progress, text)
            if text.startswith("step 2,"):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(machine.ProgressBar, "update", stop)
        out = tmp_path / "out"
        assert call(tasks.main, "listops", *flags, f"--out_dir={out}") == 0
        assert "2 steps" in capsys.readouterr().out
        assert (out / "model.safetensors").exists() and not (out / "result.json").exists()
        monkeypatch.undo()
        assert call(tasks.main, "listops", *flags, "--max_iters=1", f"--out_dir={out}") == 0
        (out / "model.safetensors").unlink()
        assert call(tasks.main, "listops", *flags, "--max_iters=1", f"--out_dir={out}") == 2
        assert "has the result of an earlier run" in capsys.readouterr().err
        assert not (out / "model.safetensors").exists()

    @pytest.mark.parametrize("task, flag, message", [
        ("", "", "the first argument must be listops, "),
        ("poems", "", "got 'poems'"),
        ("digits", "--depth=3", "digits has no setting --depth"),
        ("digits", "--deepth=3", "there is no setting --deepth; did you mean --depth?"),
        ("digits", "--side=7", "--side must be 14 or 28, got 7"),
        ("digits", "--source=nowhere", "--source=nowhere does not exist"),
        ("digits", "--source={}", "t10k-images-idx3-ubyte.gz is missing"),
        ("digits", "--seed=-1", "--seed must be from 0 to 2^63 - 1, got -1"),
        ("digits", "--attention=tanh", "--attention must be one of softmax, laplace, relu2, got"),
        ("digits", "--norm=none", "--norm must be one of layernorm"),
        ("digits", "--shared_size=7", "--shared_size must be even, got 7"),
        ("digits", "--dataset=pydocs", "digits has no setting --dataset: it is for masks"),
        ("digits", f"--seed={10**20}", "--seed must be from 0 to"),
        ("digits", "--threads=100000", "--threads must be from 0 to 1024"),
        ("masks", "--dataset=", "--dataset must be non-empty"),
        ("listops", "--depth=11", "--depth must be from 1 to 10, got 11"),
        ("listops", "--operands=1", "--operands must be from 2 to 10, got 1"),
        ("digits", "--device=abacus", "abacus"),
        ("digits", "--max_minutes=0", "--max_minutes must be above 0"),
        ("speech", "--source={}", "it has 0 and 0"),
        ("speech", "--source={}/empty.txt", "empty.txt is not a readable zip file"),
        ("translation", "--source={}", "train.lc.norm.tok.en is missing"),
        ("masks", "--dataset={}/empty.txt", "empty.txt is empty"),
        ("masks", "--masked=0", "--masked must be above 0"),
        ("listops", "--longest=3", "--longest=3 must be at least --shortest=4"),
        ("listops", "--depth=1 --operands=2 --expressions=420", "hardly one random expression"),
        ("listops", "--expressions=1", "leaves none for training"),
        ("listops", "--baseline --n_embd=30", "--n_embd=30 must be a multiple of 4"),
        ("listops", "--expressions=20 --max_iters=99 --muon_learning_rate=1e30", "the loss is"),
    ])  # fmt: skip
    def test_a_mistake_is_one_sentence(self, task, flag, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").touch()
        flags = flag.format(tmp_path).split()
        arguments = [*task.split(), *flags]
        if task != "masks" and "device" not in flag:
            arguments += ["--device=cpu"] * bool(task)
        assert call(tasks.main, *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not list(tmp_path.rglob("result.json"))
        assert "loss is" in message or not list(tmp_path.glob("out-*"))

    def test_damaged_data_are_one_sentence(self, tmp_path):
        mnist(tmp_path / "mnist", 20)
        fsdd(tmp_path / "fsdd")
        multi30k(tmp_path / "multi30k")
        images = "t10k-images-idx3-ubyte.gz"
        labels = "t10k-labels-idx1-ubyte.gz"
        for task, name, change, message in (
            ("digits", images, lambda old: old[:-40], "damaged"),
            ("digits", images, lambda old: b"", "damaged"),
            ("digits", images, lambda old: gzip.compress(gzip.decompress(old)[:-1]), "damaged"),
            ("digits", labels, lambda old: None, "is missing"),
            ("digits", labels, lambda old: gzip.compress(b"\0\0\x08\x01\0\0\0\0"), "0 labels"),
            (
                "digits",
                labels,
                lambda old: gzip.compress(gzip.decompress(old)[:-1] + b"x"),
                "from 0 to 9",
            ),
            ("speech", "3_ann_6.wav", lambda old: b"", "3_ann_6.wav is damaged"),
            ("speech", "3_ann_6.wav", lambda old: old[:30], "3_ann_6.wav is damaged"),
            ("speech", "3_ann_6.wav", lambda old: old[:44], "no samples"),
            ("speech", "3_ann_6.wav", lambda old: old[:22] + b"\2" + old[23:], "not (1, 2, 8000)"),
            ("translation", "train.lc.norm.tok.de", lambda old: old + b"x\n", "lines of train"),
            ("translation", "train.lc.norm.tok.de", lambda old: b"\xff", "is not UTF-8"),
            ("translation", "test_2016_flickr.lc.norm.tok.en", lambda old: b"", "0 lines"),
        ):
            folder = tmp_path / {"digits": "mnist", "speech": "fsdd"}.get(task, "multi30k")
            old = (folder / name).read_bytes()
            if change(old) is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(change(old))
            s = tasks.read_settings(task, {"source": str(folder)})
            with pytest.raises(common.UserError, match=re.escape(message)):
                tasks.TASKS[task](s)
            (folder / name).write_bytes(old)
            tasks.TASKS[task](s)

    def test_data_are_downloaded_whole_or_not_at_all(self, tmp_path, monkeypatch, capsys):
        fsdd(tmp_path / "sounds")
        archive = shutil.make_archive(str(tmp_path / "sounds"), "zip", tmp_path / "sounds")
        with Server(Path(archive).read_bytes()) as server:
            for task, name in (("speech", "half.zip"), ("speech", "missing.zip")):
                monkeypatch.setitem(tasks.FILES, task, (server.url(""), [name]))
                flags = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
                assert call(tasks.main, task, *flags) == 2
                said = capsys.readouterr().err.strip().splitlines()[-1]
                assert "could not be downloaded" in said and "--source takes a folder" in said
                assert [p.name for p in (tmp_path / "data").rglob("*")] == ["speech", "lock"]
            monkeypatch.setitem(tasks.FILES, "speech", (server.url(""), ["master.zip"]))
            s = tasks.read_settings("speech", {"data_dir": str(tmp_path / "data")})
            first = tasks.Speech(s)
            asked = len(server.agents)
            assert len(tasks.Speech(s).train) == len(first.train) == 60
            assert len(server.agents) == asked  # what is there is not fetched again
            server.shutdown()

    def test_without_a_network_there_are_small_digits(self, tmp_path, monkeypatch, capsys):
        pytest.importorskip("sklearn")
        monkeypatch.setitem(tasks.FILES, "digits", ("http://127.0.0.1:9", ["images.gz"]))
        task = tasks.Digits(tasks.read_settings("digits", {"data_dir": str(tmp_path)}))
        assert "can't be downloaded" in capsys.readouterr().out
        assert (len(task.train), len(task.test)) == (1437, 360)
        assert task.train[0].inputs.shape == (64, 2)


class TestHuggingFace:
    """Equal to transformers 4.40.2."""

    @slow
    @pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
    @settings(max_examples=min(300, settings.default.max_examples))  # of each head
    @given(st.data(), seeds, st.booleans())
    def test_every_head_equals_that_of_transformers(
        self, transformers, tmp_path_factory, head, data, seed, training
    ):
        """Outputs, losses and gradients, and weights there and back."""
        config = their_config(data, head)
        theirs = getattr(transformers, head.__name__)(transformers.MegaConfig(**config))
        for i, parameter in enumerate(theirs.parameters()):
            parameter.data += 0.2 * randn(seed + i, *parameter.shape, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("files")
        theirs.save_pretrained(folder, safe_serialization=data.draw(st.booleans()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=".*expects is_decoder=|TypedStorage")
            ours = head.from_pretrained(folder)
        weights = {k: v for k, v in theirs.state_dict().items() if "_float_tensor" not in k}
        assert weights.keys() == ours.state_dict().keys()
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in weights.items())
        ours.save_pretrained(folder / "back")
        back, report = type(theirs).from_pretrained(folder / "back", output_loading_info=True)
        assert not [k for k in report["missing_keys"] if "_float_tensor" not in k]
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in weights.items())
        assert all(getattr(back.config, name) == value for name, value in config.items())
        shutil.rmtree(folder)

        theirs.train(training), ours.train(training)
        inputs = their_inputs(data, head, config, seed)
        labels = their_labels(data, head, config, inputs, seed)
        asked = {"output_hidden_states": True, "output_attentions": True}
        a = theirs(**inputs, **labels, **asked)
        b = ours(**inputs, **labels, **asked, use_cache=False)
        names = "loss logits start_logits end_logits pooler_output hidden_states attentions"
        for name in [*names.split(), "cross_attentions"]:
            expected, found = (getattr(out, name, None) for out in (a, b))
            many = isinstance(expected, tuple)
            for x, y in zip(expected, found, strict=True) if many else [(expected, found)]:
                if x is not None:
                    close(y, x, 1e-5)
        for out in (a, b):
            loss = out.last_hidden_state.square().mean() if head is MegaModel else out.loss
            (loss + out.pooler_output.sum() if head is MegaModel else loss).backward()
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
        for name, parameter in theirs.named_parameters():
            expected, found = parameter.grad, gradients[name]
            if expected is None or found is None:
                assert not any(g is not None and g.any() for g in (expected, found)), name
            else:
                assert (found - expected).abs().max() <= 1e-4 * max(
                    expected.abs().max(), 0.1 * largest
                )

    @slow
    @torch.no_grad()
    @given(seeds, biases, st.integers(1, 6))
    def test_cached_decoding_equals_that_of_transformers(self, transformers, seed, bias, length):
        config = vars(small_config(relative_positional_bias=bias)) | {"extra": None}
        theirs = transformers.MegaForCausalLM(transformers.MegaConfig(**config)).eval()
        ours = MegaForCausalLM(small_config(relative_positional_bias=bias)).eval()
        ours.load_state_dict(
            {k: v for k, v in theirs.state_dict().items() if "_float_tensor" not in k}
        )
        ids = token_ids(seed, 2, length + 4)
        a, b = theirs(ids[:, :1], use_cache=True), ours(ids[:, :length], use_cache=True)
        for t in range(1, length + 4):
            a = theirs(ids[:, t : t + 1], past_key_values=a.past_key_values, use_cache=True)
            if t >= length:
                b = ours(ids[:, t : t + 1], cache=b.cache, use_cache=True)
                close(b.logits, a.logits, 1e-5)


# ------------------------------------------------------------------------------------- TestFaults


class TestFaults:
    """Faults of earlier implementations, as data/lecture/checkpoints.md numbers them."""

    def test_fault_01_rmsnorm_normalises(self):
        model = shared_lm(normalization_type="rmsnorm")
        norm = model.mega.layers[0].mega_layer.norm
        x, weight = randn(0, 2, 5, 8), norm.norm.weight
        close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight)

    @pytest.mark.parametrize("attention", ["laplace", "relu2"])
    @torch.no_grad()
    def test_fault_02_a_cached_step_divides_by_the_visible_keys(self, attention):
        model, ids = shared_lm(attention_activation=attention), token_ids(0, 1, 9)
        cache = model(ids[:, :8], use_cache=True).cache
        close(model(ids[:, 8:], cache=cache).logits, model(ids).logits[:, 8:], 1e-6)

    @torch.no_grad()
    def test_fault_03_a_cached_cross_attention_stands_at_the_number_of_past_tokens(self):
        layer = randomized(GatedCrossAttention(decoder_config()))
        x, source = randn(0, 1, 6, 8), randn(1, 1, 4, 8)
        past = layer.keys_and_values(source)
        whole, _ = layer(x, *past)
        close(layer(x[:, 5:], *past, start=5)[0], whole[:, 5:])
        assert not torch.allclose(layer(x[:, 5:], *past, start=6)[0], whole[:, 5:])

    @torch.no_grad()
    def test_fault_04_a_cache_remembers_earlier_pads(self):
        model, ids, mask = shared_lm(), token_ids(0, 2, 6), torch.ones(2, 6)
        mask[0, 1] = 0
        cache = model(ids[:, :5], mask[:, :5], use_cache=True).cache
        close(model(ids[:, 5:], cache=cache).logits, model(ids, mask).logits[:, 5:], 1e-6)

    def test_fault_05_a_row_that_sees_nothing_outputs_zero(self):
        model = causal_lm()
        mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
        out = model(token_ids(0, 2, 4), mask, labels=token_ids(0, 2, 4), output_attentions=True)
        out.loss.backward()
        assert torch.isfinite(out.logits).all() and not out.attentions[0][0, 0, :2].any()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    @pytest.mark.parametrize("attention", sorted(ATTENTION_FUNCTIONS))
    @torch.no_grad()
    def test_fault_06_left_pads_do_not_count(self, attention):
        model, ids = shared_lm(attention_activation=attention), token_ids(0, 1, 5)
        padded, mask = F.pad(ids, (3, 0), value=9), F.pad(torch.ones(1, 5), (3, 0))
        close(model(padded, mask).logits[:, 3:], model(ids).logits, 1e-6)

    @pytest.mark.parametrize("causal", [True, False])
    @torch.no_grad()
    def test_faults_07_and_08_any_length_works_with_chunking(self, causal):
        chunked = shared_lm(use_chunking=True, chunk_size=4, is_decoder=causal)
        whole = shared_lm(is_decoder=causal)
        ids = token_ids(0, 2, 11)
        close(chunked(ids[:, :3]).logits, whole(ids[:, :3]).logits, 1e-6)  # one short chunk
        if causal:  # a longer row begins as the shorter one does
            for length in range(1, 12):
                close(chunked(ids[:, :length]).logits, chunked(ids).logits[:, :length], 1e-6)
        mask = F.pad(torch.ones(2, 10), (0, 2))  # pads that make a chunk whole change nothing
        padded = chunked(F.pad(ids[:, :10], (0, 2)), mask).logits[:, :10]
        close(padded, chunked(ids[:, :10]).logits, 1e-6)

    @torch.no_grad()
    def test_faults_09_and_12_a_cache_goes_on_by_any_number_of_tokens_in_any_chunk(self):
        model, ids = shared_lm(use_chunking=True, chunk_size=4), token_ids(0, 1, 17)
        cache, found = None, []
        for a, b in itertools.pairwise([0, 1, 2, 7, 8, 17]):
            out = model(ids[:, a:b], cache=cache, use_cache=True)
            cache = out.cache
            found.append(out.logits)
        close(torch.cat(found, 1), model(ids).logits, 1e-6)

    @torch.no_grad()
    def test_fault_10_a_cache_is_used_whatever_use_cache_says(self):
        model, ids = shared_lm(), token_ids(0, 1, 6)
        cache = model(ids[:, :5], use_cache=True).cache
        found = model(ids[:, 5:], cache=cache, use_cache=False).logits
        close(found, model(ids).logits[:, 5:], 1e-6)

    def test_fault_11_truncation_with_a_cache_is_refused(self):
        model = shared_lm(truncation=4)
        for call in (
            lambda: model(token_ids(0, 1, 9), use_cache=True),
            lambda: model.generate(token_ids(0, 1, 9), 1),
        ):
            with pytest.raises(ValueError, match="truncation=4"):
                call()

    def test_fault_13_modules_keep_no_state(self):
        model, other, ids = causal_lm(), causal_lm(seed=5), token_ids(0, 1, 6)
        with torch.no_grad():
            model(ids)
            other(ids)
        model(ids).logits.sum().backward()
        assert model.mega.layers[0].mega_layer.ema_gate.damping_factor.grad.any()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(ids).logits, other(ids).logits)
        assert torch.equal(copy.deepcopy(model)(ids).logits, other(ids).logits)

    def test_fault_14_a_chunk_size_alone_does_not_chunk(self):
        ids, plain = token_ids(0, 1, 9), shared_lm()
        assert torch.equal(shared_lm(chunk_size=4)(ids).logits, plain(ids).logits)
        simple = shared_lm(chunk_size=4, relative_positional_bias="simple")  # is where it was saved
        longer = simple(token_ids(0, 1, 64), output_attentions=True)
        assert longer.logits.isfinite().all() and longer.attentions[0].shape == (1, 1, 64, 64)

    def test_fault_15_the_simple_bias_of_cross_attention_is_limited_by_max_positions(self):
        options = {"use_chunking": True, "chunk_size": 4, "relative_positional_bias": "simple"}
        model, source = shared_lm(add_cross_attention=True, **options), randn(0, 1, 64, 8)
        layer = model.mega.layers[0].cross_attn
        found = mega.bias_matrix(layer.rel_pos_bias(64), 0, 64, 64)
        numbers = [found.diagonal(i) for i in range(-63, 64)]
        assert all((n == n[0]).all() for n in numbers)  # one for each distance, each another
        assert len({n[0].item() for n in numbers}) == 127
        assert torch.equal(found[5:9, :7], mega.bias_matrix(layer.rel_pos_bias(9), 5, 9, 7))
        assert torch.isfinite(model(token_ids(0, 1, 64), encoder_hidden_states=source).logits).all()
        with pytest.raises(ValueError, match="65 is above max_positions 64"):
            model(token_ids(0, 1, 3), encoder_hidden_states=randn(0, 1, 65, 8))

    def test_fault_16_it_is_z_that_must_be_even(self):
        small_config(hidden_size=7, shared_representation_size=6)
        with pytest.raises(ValueError, match="shared_representation_size must be even"):
            small_config(hidden_size=8, shared_representation_size=7)

    def test_fault_17_feature_dropout_drops_features_of_a_row_with_chunks_too(self):
        config = small_config(
            use_chunking=True, chunk_size=4, use_feature_dropout=True, hidden_dropout_prob=0.5
        )
        layer, values = MovingAverageGatedAttention(config).train(), []
        attend = layer.attend
        layer.attend = lambda q, k, v, *rest: values.append(v) or attend(q, k, v, *rest)
        layer(torch.randn(3, 12, 8))
        dropped = values[0] == 0  # (3, 12, 12)
        assert torch.equal(dropped.all(1), dropped.any(1)) and 0 < dropped.float().mean() < 1

    def test_fault_18_token_types_are_zero_unless_given_at_any_length(self):
        model = shared_lm(add_token_type_embeddings=True, max_positions=4)
        ids = token_ids(0, 1, 9)
        found = model(ids).logits
        assert torch.equal(found, model(ids, token_type_ids=torch.zeros_like(ids)).logits)
        assert not torch.allclose(found, model(ids, token_type_ids=torch.ones_like(ids)).logits)

    @pytest.mark.parametrize("name", sorted(NORMS))
    def test_fault_19_every_norm_works_without_affine(self, name):
        model = MegaModel(small_config(normalization_type=name, norm_affine=False)).eval()
        assert torch.isfinite(model(token_ids(0, 2, 5)).last_hidden_state).all()
        assert not [n for n, _ in model.named_parameters() if ".norm." in n]

    @pytest.mark.parametrize("attention", sorted(ATTENTION_FUNCTIONS))
    def test_fault_20_an_encoder_row_of_pads_gives_zero(self, attention):
        layer = randomized(GatedCrossAttention(decoder_config(attention_activation=attention)))
        x, source = randn(0, 2, 3, 8).requires_grad_(), randn(1, 2, 4, 8).requires_grad_()
        mask = torch.tensor([[True] * 4, [False] * 4])
        y, weights = layer(x, *layer.keys_and_values(source), mask)
        y.sum().backward()
        assert not weights[1].any() and weights[0].any()
        assert all(torch.isfinite(t).all() for t in (y, x.grad, source.grad))

    def test_faults_21_and_22_the_config_refuses_them(self):
        for truncation in (0, -2):
            with pytest.raises(ValueError, match="truncation must be"):
                small_config(truncation=truncation)
        with pytest.raises(ValueError, match="is_decoder=True needs bidirectional=False"):
            small_config(is_decoder=True, bidirectional=True)

    @pytest.mark.parametrize("attention", sorted(ATTENTION_FUNCTIONS))
    @torch.no_grad()
    def test_fault_23_masks_of_any_dtype(self, attention):
        model, ids = shared_lm(attention_activation=attention, is_decoder=False), token_ids(0, 2, 4)
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        found = [model(ids, mask.to(t)).logits for t in (torch.bool, torch.int64, torch.float16)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    @torch.no_grad()
    def test_fault_24_positions_and_powers_are_fp32_in_half_precision(self):
        for dtype in (torch.bfloat16, torch.float16):
            layer = MegaModel(small_config()).to(dtype).layers[0].mega_layer
            assert all(c.dtype == torch.float32 for c in layer.ema_gate.coefficients())
            single = copy.deepcopy(layer).float()
            found, expected = (m.rel_pos_bias(3001) for m in (layer, single))
            assert found.dtype == torch.float32 and torch.equal(found, expected)
            x = torch.randn(1, 40, 8).to(dtype)
            y, state = layer.ema_gate(x, mode="blockwise")
            assert y.dtype == dtype and state.dtype == torch.float32

    @torch.no_grad()
    def test_fault_25_generation_carries_encoder_states_and_token_types(self):
        for chunking in ({}, {"use_chunking": True, "chunk_size": 4}):
            options = {"add_cross_attention": True, "add_token_type_embeddings": True, **chunking}
            model, ids, types = (
                shared_lm(**options),
                token_ids(0, 2, 3),
                torch.tensor([[0, 1, 1]] * 2),
            )
            source, mask = randn(0, 2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
            encoder = {"encoder_hidden_states": source, "encoder_attention_mask": mask}
            found, expected = model.generate(ids, 7, 0, token_type_ids=types, **encoder), ids
            for _ in range(7):
                types_so_far = F.pad(types, (0, expected.shape[1] - 3), value=1)
                logits = model(expected, token_type_ids=types_so_far, **encoder).logits
                expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="relative to the encoder's positions"):
            shared_lm(**options | {"use_chunking": False}).generate(
                ids, 2, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), **encoder
            )

    def test_fault_26_batches_of_one_empty_outputs_and_an_untouched_config(self):
        ids = token_ids(0, 2, 6)
        one = shared_lm(use_chunking=True, chunk_size=4)
        close(one(ids[:1]).logits, one(ids).logits[:1])
        model = head_model(mega.MegaForSequenceClassification, num_labels=3)
        before = copy.deepcopy(model.config)
        flags = torch.ones(2, 3)
        first = model(ids, labels=flags).loss
        model(ids, labels=torch.tensor([0, 2]))
        assert model.config == before and torch.equal(model(ids, labels=flags).loss, first)


# ------------------------------------------------------------------------------------ TestLecture


class TestLecture:
    """README.md and data/lecture."""

    @slow
    @pytest.mark.parametrize("dtypes", [1, 2])
    def test_the_comparison_runs(self, monkeypatch, capsys, transformers, tmp_path, dtypes):
        monkeypatch.setattr(compare, "bfloat16_is_faster", lambda: dtypes == 2)
        small = {"hidden_size": 16, "vocab_size": 64, "num_hidden_layers": 1}
        monkeypatch.setattr(compare, "MODEL", compare.MODEL | small)
        (tmp_path / "other.py").write_text(MEGA_PYTORCH)
        flags = ["--lengths", "128", "--new_tokens", "3", "--rounds", "1", "--default_allocator"]
        compare.main([*flags, "--mega_pytorch", str(tmp_path / "other.py")])
        lines = capsys.readouterr().out.splitlines()
        assert [", Mega-pytorch " in line for line in lines].count(True) == dtypes
        assert len(lines) == 3 * dtypes + 2
        assert all(", transformers " in line for line in lines[:-1]) and "once: " in lines[-1]
        assert ", the bare loop " in lines[-2]

    @pytest.mark.parametrize("threads", [1, 2, 3])  # 3 divide none of the sizes
    def test_the_bare_loop_decodes_what_generate_does(self, monkeypatch, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        small = {
            "hidden_size": 16,
            "vocab_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 8,
        }
        monkeypatch.setattr(compare, "MODEL", compare.MODEL | small)
        torch.manual_seed(0)
        model = MegaForCausalLM(MegaConfig(**compare.MODEL | {"use_chunking": False}))
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape)
        for seed in range(5):
            ids = token_ids(seed, 1, 8, 64)
            expected = model.generate(ids, 20, 0)[0, 8:]
            assert len(set(expected.tolist())) > 1
            assert torch.equal(compare.bare_loop(model.eval(), ids, 20), expected)

    def test_learning_beside_nanogpt_runs_and_its_windows_overlap(
        self, corpus, data, tmp_path, capsys
    ):
        (tmp_path / "model.py").write_text(NANOGPT)
        flags = [*TINY, f"--source={corpus}", f"--nanogpt={tmp_path / 'model.py'}"]
        with unittest.mock.patch("torch.set_num_threads") as told:
            assert call(learning.main, *flags, "--nanogpt_dropout=0.3", "--threads=1") == 0
        told.assert_called_with(1)
        said = capsys.readouterr().out.splitlines()
        names = [re.split(r"[,:]", line)[0 if i % 3 == 0 else 1] for i, line in enumerate(said[:4])]
        assert names[::3] == ["MEGA", "nanoGPT"] or said[0].startswith("MEGA")
        assert sum("bits_per_byte" in line for line in said) == 5 and "dropout=0.3" in said[4]
        s = train.read_settings([*TINY, "--block_size=6"])
        model = learning.NanoGPT(
            tmp_path / "model.py", s, prepare.new_tokenizer("bytes", 0, [])
        ).double()
        ids = token_ids(0, 1, 23, 256)[0]
        expected = 0.0
        for i in range(1, len(ids)):  # a token sees from its window's start on: 3 to 5 before it
            start = max((i - 1) // 3 - 1, 0) * 3
            past = ids[None, start:i]
            logits = model.gpt(past, torch.zeros_like(past))[0][0, -1]
            expected -= logits.log_softmax(-1)[ids[i]].item()
        autocast = train.make_autocast(torch.device("cpu"), torch.float32)
        found = learning.nats_in_overlapping_windows(model, ids, 6, autocast)
        assert found == pytest.approx(expected, rel=1e-9)

    def test_transformers_mega_learns_from_our_initial_weights(self, transformers):
        """Its loss is ours but for what it lacks, and on rows of no whole number of chunks."""
        s, codec = train.read_settings(TINY), prepare.new_tokenizer("bytes", 0, [])
        torch.manual_seed(0)
        theirs = learning.Transformers(s, codec).eval()
        torch.manual_seed(0)
        start = train.new_model(s, codec)
        config, weights = start.config, theirs.lm.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in start.state_dict().items())
        ours = MegaForCausalLM(dataclasses.replace(config, final_norm=False, scale_embedding=False))
        ours.load_state_dict(weights, strict=False)
        ids = token_ids(0, 3, 21, 256)
        labels = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
        expected = ours.eval()(ids, labels=labels, shift_labels=False).loss
        close(theirs(ids, labels).loss, expected, 1e-6)
        assert theirs.lm.config.hidden_dropout_prob == s.dropout

    @given(seeds)
    def test_what_is_left_of_a_layer_without_its_average_or_damping(self, seed):
        config, x = decoder_config(), randn(seed, 2, 9, 8)
        ema = randomized(DampedEMA(config), seed)
        none, classical = variants.NoEMA(config).double(), variants.Undamped(config).double()
        none.residual_weight.data = ema.residual_weight.data
        classical.load_state_dict(ema.state_dict())
        ema.decay_factor.data += 1e4  # its sigmoid is 1
        close(classical(x)[0], ema(x)[0])
        ema.kernel_projection_matrix.data *= 0
        close(none(x)[0], ema(x)[0])
        y, state = none(x, state=None)
        close(none(x[:, 4:], state=state)[0], y[:, 4:])

    @given(seeds)
    def test_without_damping_it_starts_with_the_coefficients_of_a_damped_average(self, seed):
        config = decoder_config()
        torch.manual_seed(seed)
        damped = DampedEMA(config)
        torch.manual_seed(seed)
        classical = variants.Undamped(config)
        for found, expected in zip(classical.coefficients(), damped.coefficients(), strict=True):
            close(found, expected, 1e-5)

    @given(seeds, st.integers(1, 20))
    def test_rotating_states_are_the_recurrence_with_a_complex_q(self, seed, length):
        config, x = decoder_config(), randn(seed, 2, length, 8)
        ema = randomized(variants.ComplexEMA(config), seed)
        u, q, g = ema.coefficients()
        q = torch.polar(q, ema.theta)
        g = torch.complex(g, -ema.gamma_imaginary / math.sqrt(g.shape[1]))
        h, ys = torch.zeros(2, *u.shape, dtype=q.dtype), []
        for x_t in x.unbind(1):
            h = q * h + u * x_t.unsqueeze(-1)
            ys.append((g * h).sum(-1).real)
        close(ema(x)[0], F.silu(torch.stack(ys, 1) + ema.residual_weight * x))
        plain = randomized(DampedEMA(config), seed)
        ema.load_state_dict(plain.state_dict(), strict=False)
        ema.theta.data *= 0
        close(ema(x)[0], plain(x)[0])

    @given(seeds, st.integers(1, 23), biases, attentions)
    def test_sliding_chunks_show_the_chunk_before(self, seed, length, bias, attention):
        """Each chunk with the one before it is a sequence of two chunks, read without chunking."""
        changes = {"relative_positional_bias": bias, "attention_activation": attention}
        config = decoder_config(use_chunking=True, chunk_size=4, **changes)
        layer = randomized(variants.SlidingLayer(config), seed).eval()
        whole = mega.MovingAverageGatedAttention(decoder_config(use_chunking=False, **changes))
        whole = whole.double().eval()
        whole.load_state_dict(layer.state_dict())
        if bias == "simple":  # its table is read around another middle
            shift = mega.centre(whole.config) - mega.centre(config)
            whole.rel_pos_bias.rel_pos_bias.data = layer.rel_pos_bias.rel_pos_bias.roll(shift)
        queries, keys = randn(seed, 2, 2, length, config.shared_representation_size)
        values = randn(seed + 1, 2, length, config.intermediate_size)
        found, _ = layer.attend(queries, keys, values, None)
        for start in range(0, length, 4):
            seen = slice(max(start - 4, 0), start + 4)
            expected, _ = whole.attend(*(t[:, seen] for t in (queries, keys, values)), None)
            close(found[:, start : start + 4], expected[:, start - seen.start :])

    @slow
    @posix
    def test_every_command_of_the_readme_runs(self, cloned):
        for block in blocks("sh"):
            for line in block.replace("\\\n", " ").splitlines():
                cloned(line)

    @slow
    @posix
    def test_every_python_block_of_the_readme_runs(self, cloned):
        alone = f"for block in {blocks('python')!r}:\n    exec(block, {{'__name__': 'block'}})"
        cloned("python -", alone)  # none knows another's names

    @slow
    @posix
    @pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
    def test_every_experiment_runs_and_says_what_its_page_shows(self, cloned, name):
        """All words of its output, and the numbers where they are the same on every machine."""
        command = f"python -m data.lecture.experiments {name}"
        found = cloned(command)
        (shown,) = (b for b in blocks("text") if b.startswith(f"$ {command}\n"))
        shown = shown.split("\n", 1)[1]
        found, shown = (text.split("\n\n", 1)[-1] for text in (found, shown))
        if name in EXACT:
            pairs = zip(re.findall(NUMBER, found), re.findall(NUMBER, shown), strict=True)
            for pair in pairs:
                a, b = (text.replace(",", "").rstrip("%") for text in pair)
                last = 1.01 * 10.0 ** -len(b.partition(".")[2])
                assert float(a) == pytest.approx(float(b), abs=last)  # processors round differently
        plain = [re.sub(rf"\s+|{NUMBER}", " ", text).split() for text in (found, shown)]
        assert plain[0] == plain[1]
        if name == "border":  # what a token changes fades with the distance
            rows = [[*map(float, re.findall(r"\S+e[+-]\d+", line))] for line in found.splitlines()]
            columns = [*zip(*(row for row in rows if row), strict=True)]
            assert len(columns) == 2 and all(c[0] > 0.1 > 100 * c[-1] > 0 for c in columns)

    @slow
    def test_the_notebook_runs_and_shows_what_it_finds(self):
        """Each cell's printed words are those that it shows, and what shall be equal is."""
        reason = "nbclient and ipykernel are not installed"
        nbclient = pytest.importorskip("nbclient", reason=reason)
        pytest.importorskip("ipykernel", reason=reason)
        nbformat = pytest.importorskip("nbformat", reason=reason)
        path = PROJECT / "data/lecture/mega.ipynb"
        notebook = nbformat.read(path, 4)
        where = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
        runs = [cell for cell in notebook.cells if cell.cell_type == "code"]
        stored = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        differences = 0
        for cell, other in zip(runs, stored, strict=True):
            found, shown = (
                "".join(out.get("text", "") for out in c.outputs if out.get("name") == "stdout")
                for c in (cell, other)
            )
            kinds = [  # what is printed may arrive in several pieces
                [kind for kind, _ in itertools.groupby(out.output_type for out in c.outputs)]
                for c in (cell, other)
            ]
            assert kinds[0] == kinds[1] and "error" not in kinds[0]
            if "generate(" not in cell.source:  # which another processor may continue otherwise
                plain = [re.sub(rf"\s+|{NUMBER}", " ", text).split() for text in (found, shown)]
                assert plain[0] == plain[1]
            for number in re.findall(
                rf"(?:difference.*|FFT|blockwise|mega.py, \w+): ({NUMBER})", found
            ):
                differences += 1
                assert float(number) < 1e-5
        assert differences >= 8

    def test_all_other_text_blocks_of_the_readme_are_of_commands_that_are_run(self):
        commands = [line for block in blocks("sh") for line in block.splitlines()]
        commands += [
            f"python -m data.lecture.experiments {name}" for name in experiments.EXPERIMENTS
        ]
        for block in blocks("text"):
            for line in re.findall(r"(?m)^\$ (.*)$", block):
                assert any(line in command for command in commands), line

    def test_the_readmes_table_of_parameters_is_that_of_the_model(self):
        table = "\n".join(PAGES).split("| name | paper | shape |")[1].split("\n\n")[0]
        sizes = {"D": 7, "N": 3, "V": 11, "Z": 4, "F": 13, "P": 17, "vocab_size": 19}
        known = set()
        for bidirectional, bias in itertools.product((True, False), ("simple", "rotary")):
            config = MegaConfig(
                vocab_size=19, hidden_size=7, num_hidden_layers=1, intermediate_size=11,
                ema_projection_size=3, shared_representation_size=4, nffn_hidden_size=13,
                max_positions=17, bidirectional=bidirectional, relative_positional_bias=bias,
                normalization_type="layernorm",
            )  # fmt: skip
            shapes = {k: tuple(v.shape) for k, v in MegaModel(config).state_dict().items()}
            letters = sizes | {"E": 14 if bidirectional else 7}
            for row in table.splitlines()[2:]:
                names, _, shape = (cell.strip() for cell in row.split("|")[1:4])
                wanted = eval(shape if "," in shape else f"({shape},)", {}, letters)
                for name in re.findall("`(.+?)`", names):
                    found = [s for k, s in shapes.items() if k.endswith(name)]
                    assert all(s == wanted for s in found), name
                    known |= {k for k in shapes if k.endswith(name)}
        assert not [k for k in shapes if not k.endswith("bias") and k not in known]

    def test_the_readme_lists_all_words_and_heads(self):
        for name in ("NORMS", "ATTENTION_FUNCTIONS", "POSITION_BIASES", "ACTIVATIONS"):
            (words,) = re.findall(rf"(?m)^\| `{name}` \| (.*) \|$", README)
            assert words.split(", ") == list(getattr(mega, name))
        heads = {name for name in vars(mega) if re.fullmatch("MegaFor[A-Z].*", name)}
        assert heads <= set(re.findall(r"`(MegaFor\w+)`", README))

    def test_pictures_of_the_readme_exist_and_are_light(self):
        pictures = re.findall(r"!\[[^]]+\]\((?:data/lecture/)?(.+?)\)", "\n".join(PAGES))
        known = {f"figures/{name}.svg" for name in ("layer", *draw.DRAWINGS)}
        kept = {f"figures/{path.name}" for path in (PROJECT / "data/lecture/figures").iterdir()}
        assert set(pictures) == kept == known
        for picture in pictures:
            content = (PROJECT / "data/lecture" / picture).read_bytes()
            assert len(content) < 200_000 and b"</svg>" in content

    @slow
    def test_the_figures_are_drawn(self, tmp_path, monkeypatch, capsys, data, transformers):
        small = {"hidden_size": 16, "vocab_size": 64, "num_hidden_layers": 1}
        monkeypatch.setattr(compare, "MODEL", compare.MODEL | small)
        monkeypatch.setattr(compare, "LONGEST", dict.fromkeys(compare.LONGEST, 128))
        monkeypatch.setattr(draw, "LENGTHS", (128, 256))
        monkeypatch.setattr(draw, "FIGURES", tmp_path / "figures")
        monkeypatch.setattr(draw, "STEPS", 10)
        monkeypatch.setattr(draw, "SEEDS", (1, 2))
        shrunk = {"n_layer": 1, "n_embd": 16, "block_size": 64, "chunk_size": 16}
        monkeypatch.setattr(experiments, "TINY", experiments.TINY | shrunk)
        (tmp_path / "model.py").write_text(NANOGPT)
        assert call(draw.main, f"--nanogpt={tmp_path / 'model.py'}") == 0
        shown = capsys.readouterr().out
        assert "MEGA, seed 2: " in shown
        assert "transformers: 128 " in shown and "nanoGPT: 128 " in shown
        for name in draw.DRAWINGS:
            assert (
                f"{name}: " in shown and "</svg>" in (tmp_path / f"figures/{name}.svg").read_text()
            )

    @pytest.mark.filterwarnings("ignore:Using a target size")  # of a near miss
    @pytest.mark.parametrize("name", NEAR_MISSES)
    def test_an_exercise_is_passed_by_its_solution_and_by_no_near_miss(self, name, monkeypatch):
        monkeypatch.setattr(exercises, name, getattr(solutions, name))
        assert passes(name)
        monkeypatch.setattr(exercises, name, NEAR_MISSES[name])
        assert not passes(name)

    def test_each_exercise_has_a_solution_and_is_unwritten(self):
        source = (PROJECT / "data/lecture/exercises.py").read_text("utf-8")
        unwritten = re.findall(r'NotImplementedError\("write (\w+)"\)', source)
        assert unwritten == list(NEAR_MISSES) and all(hasattr(solutions, n) for n in unwritten)

    def test_a_wrong_flag_of_an_experiment_or_figure_is_one_sentence(self, capsys, masked):
        folder, _, _ = masked
        for main, flags, message in (
            (experiments.main, ["memry"], "no experiment 'memry'; choose from "),
            (experiments.main, ["dims", "--steps=0"], "--steps must be at least 1, got 0"),
            (experiments.main, ["dims", "--seeds=0"], "--seeds must be at least 1, got 0"),
            (experiments.main, ["memory", "--model=nowhere"], "there is no checkpoint in nowhere"),
            (experiments.main, ["border", f"--model={folder}"], "is not a decoder with chunks"),
            (experiments.main, ["cache", f"--model={folder}"], "is not a decoder with chunks"),
            (draw.main, ["memry"], "no figure 'memry'; choose from "),
            (draw.main, ["kernels", f"--model={folder}"], "is not a decoder with chunks"),
            (draw.main, ["cost", "--nanogpt=none.py"], "there is no file none.py"),
            (learning.main, ["--nanogpt=none.py"], "there is no file none.py"),
        ):
            assert call(main, *flags) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1, error
        assert call(experiments.main) == 0
        assert len(capsys.readouterr().out.splitlines()) == len(experiments.EXPERIMENTS)

    @slow
    def test_what_gets_over_a_border_is_asked_within_a_chunk(self, trained, capsys):
        """Also in a model with shorter chunks, here of 8."""
        out, _ = trained
        capsys.readouterr()
        assert call(experiments.main, "border", f"--model={out}") == 0
        shown = capsys.readouterr().out
        assert "4 to 7 " in shown and "8 to 15" not in shown and "nan" not in shown

    def test_the_small_model_is_small_in_bfloat16_and_predicts(self, data):
        assert sum(p.stat().st_size for p in sample.SMALL.iterdir()) <= 6_000_000
        weights = safetensors.torch.load_file(sample.SMALL / "model.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.bfloat16}
        model, codec = sample.load_model(sample.SMALL)
        text = "Return a new list containing all items from the iterable in ascending order."
        ids = torch.tensor([[codec.end_of_text, *codec.encode(text)]])
        bits = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2) / len(text)
        assert bits < 2.2  # a new model has 12 bits a token, about 3.5 a byte
