"""Questions about MEGA, each answered by a run.

    python -m data.lecture.experiments           # the questions
    python -m data.lecture.experiments memory    # one answer; or several names, or `all`

`memory`, `border` and `cache` examine the trained model in data/small, or in --model, and take
seconds. The others train models of 0.46M parameters on the bytes of the text that ships with
Python, in train.py's loop, for 600 steps of 2,048 bytes (1,800 for `average`) with each of three
seeds, and take some minutes each on two CPU cores. `--steps=200 --seeds=1` gives a first
impression.
"""

import functools
import inspect
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import train
from data.common import Parser, UserError, keep_big_blocks, run
from data.lecture.learn import learn, speed
from data.lecture.variants import ComplexEMA, NoEMA, SlidingLayer, Undamped, new_model_with
from data.prepare import load_tokenizer, prepare, read_meta
from mega import DampedEMA, MegaCache, MegaForCausalLM
from sample import SMALL, load_model

TINY = {
    "dataset": "pydocs",
    "tokenizer": "bytes",
    "max_minutes": 0,
    "dropout": 0,
    "hidden_dropout": 0,
    "n_layer": 2,
    "n_embd": 128,
    "intermediate_size": 256,
    "nffn_hidden_size": 256,
}


def read_settings(**changes):
    """Return train.py's settings for a tiny model, with changes."""
    return train.read_settings([f"--{name}={value}" for name, value in (TINY | changes).items()])


# -------------------------------------------------------------------------------- a trained model


def load_decoder(source: str):
    """Load a model and its tokenizer; UserError unless it is a decoder with chunks."""
    model, tokenizer = load_model(source)
    if not (model.config.is_decoder and model.config.use_chunking):
        raise UserError(
            f"{source} is not a decoder with chunks; give the folder of a model made by train.py"
        )
    return model, tokenizer


def layers_of(source: str) -> dict[str, DampedEMA]:
    """Return the moving averages of a new layer and of each layer of a trained model."""
    model, _ = load_decoder(source)
    torch.manual_seed(0)
    layers = {"new, any layer": MegaForCausalLM(model.config).mega.layers[0]}
    layers |= {f"trained, layer {i + 1}": block for i, block in enumerate(model.mega.layers)}
    return {name: block.mega_layer.ema_gate for name, block in layers.items()}


def memory(options):
    """What does each layer remember?

    The half-life of an EMA state, ln 2 / -ln q, is the number of tokens after which half of what
    was written to it is left. A layer has D times N states.
    """
    print(f"{'':18}{'10th percentile':>15}{'median':>9}{'90th percentile':>18}{'longest':>9}")
    for name, ema in layers_of(options.model).items():
        lives = half_lives(ema)
        low, middle, high, longest = (lives.quantile(part).item() for part in (0.1, 0.5, 0.9, 1))
        print(f"{name:18}{low:15.1f}{middle:9.1f}{high:18.1f}{longest:9.1f}")


def half_lives(ema: DampedEMA) -> Tensor:
    """Return the half-lives of all states, (D N), in tokens."""
    return math.log(2) / -ema.coefficients()[1].detach().double().log().flatten()


@torch.no_grad()
def border(options):
    """What crosses a chunk boundary?

    One token of a text is replaced by another. By how many nats (KL divergence) do the predictions
    after it change? If it is the first token of a chunk, all queries of that chunk attend to it. If
    it is the last one, no later query does: its effect must pass through the moving averages.
    """
    model, tokenizer = load_decoder(options.model)
    chunk = model.config.chunk_size
    tokens = val_tokens(tokenizer)
    sequences = tokens[: len(tokens) // (3 * chunk) * 3 * chunk].view(-1, 3 * chunk)
    ranges = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 126)]
    ranges = [(a, b) for a, b in ranges if b < chunk]
    found = []
    for at in (chunk, chunk - 1):
        changed = sequences.clone()
        changed[:, at] = sequences[:, at].roll(1)  # the token of another sequence
        nats = torch.cat(
            [
                divergence(model(a).logits, model(b).logits)
                for a, b in zip(sequences.split(8), changed.split(8), strict=True)
            ]
        ).mean(0)
        found.append([nats[at + a : at + b + 1].mean().item() for a, b in ranges])
    print(f"{'tokens later':>14}{'first of a chunk':>20}{'last of a chunk':>20}")
    for (a, b), first, last in zip(ranges, *found, strict=True):
        print(f"{f'{a} to {b}':>14}{first:20.1e}{last:20.1e}")


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Compute KL(p || q) of the distributions of logits (..., vocabulary), in nats (...)."""
    log_p = a.log_softmax(-1)
    log_q = b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def val_tokens(tokenizer) -> Tensor:
    """Return the tokens (T,) of the validation split of the text that ships with Python."""
    data = prepare("pydocs")
    ids = np.fromfile(data / "val.bin", read_meta(data)["dtype"]).astype(np.int64)
    other = load_tokenizer(data)
    if tokenizer != other:
        ids = tokenizer.encode(other.decode(ids.tolist()))
    return torch.as_tensor(ids)


@torch.no_grad()
def cache(options):
    """What is in the cache, and how large is it?

    A layer keeps D N states of its moving averages and, for each token of the unfinished chunk, a
    key of Z numbers and a value of V. A Transformer keeps two vectors of D numbers for every token.
    """
    model, tokenizer = load_decoder(options.model)
    config = model.config
    whole = MegaForCausalLM(replace(config, use_chunking=False)).eval()
    ids = torch.randint(tokenizer.size, (1, 10_000))
    print("size in KiB, fp32")
    print(f"{'tokens':>8}{'in chunks':>12}{'no chunks':>12}{'Transformer':>14}")
    for length in (100, 1000, 10_000):
        caches = [m.mega(ids[:, :length], use_cache=True).cache for m in (model, whole)]
        sizes = [cached_numbers(found) for found in caches]
        sizes.append(2 * config.hidden_size * length * config.num_hidden_layers)
        chunked, unchunked, transformer = (4 * size / 1024 for size in sizes)
        print(f"{length:8,}{chunked:12,.0f}{unchunked:12,.0f}{transformer:14,.0f}")
        if length == 100:
            shapes = [tuple(t.shape) for t in caches[0].layers[0][:3]]
    print("\na layer after 100 tokens: states {}, keys {}, values {}".format(*shapes))


def cached_numbers(found: MegaCache) -> int:
    return sum(t.numel() for layer in found.layers for t in layer[:3])


# ---------------------------------------------------------------------------- models to be trained


@functools.cache
def trained(seed: int, steps: int, ema=None, layer=None, **changes) -> tuple[float, float, float]:
    """Train a model; return bits per byte of the last 20 steps and of the validation split, and
    tokens a second.
    """
    s = read_settings(max_iters=steps, seed=seed, **changes)
    t = learn(s, functools.partial(new_model_with, ema=ema, layer=layer))
    train_bits = np.mean(t.losses[-20:]) / math.log(2)  # a token is a byte
    val = train.evaluate(t.model, t.corpus, "val", str(s.block_size), t.autocast)
    return train_bits, val["bits_per_byte"], speed(t)


def compare(options, models: dict[str, dict], longer: int = 1):
    """Train each model (its name: its changes from MEGA) with each seed; print a line for each."""
    print(f"bits per byte: means of {options.seeds} seeds, in windows of 512 bytes\n")
    print(f"{'':28}{'training':>10}{'validation':>12}{'lowest':>10}{'highest':>9}{'tokens/s':>10}")
    for name, changes in models.items():
        runs = [
            trained(seed, longer * options.steps, **changes) for seed in range(1, options.seeds + 1)
        ]
        train_bits, val, speeds = zip(*runs, strict=True)
        print(
            f"{name:28}{np.mean(train_bits):10.3f}{np.mean(val):12.3f}"
            f"{min(val):10.3f}{max(val):9.3f}{np.median(speeds):10,.0f}",
            flush=True,
        )


def average(options):
    """What is the moving average worth?

    This takes three times as many steps as the other questions, to show whether a model without
    the average catches up.
    """
    compare(options, {"MEGA": {}, "no average": {"ema": NoEMA}}, longer=3)


def damping(options):
    """What is damping worth?

    Without it delta is 1 and q = 1 - p: a state that forgets slowly also takes in little, but beta
    can make up for that. This model starts with the same q and the same p beta as MEGA.
    """
    compare(options, {"MEGA": {}, "delta = 1": {"ema": Undamped}})


def dims(options):
    """Does a channel need 16 states?

    With one, its kernel can only decay; a sum of 16 can rise first, or change its sign.
    """
    compare(options, {"N = 1": {"ema_size": 1}, "N = 4": {"ema_size": 4}, "N = 16, MEGA": {}})


def complex_q(options):
    """Do states that rotate help?

    S4D and Megalodon multiply q by e^{i theta}, with a learned theta for each state, so that
    kernels can oscillate.
    """
    compare(options, {"MEGA, q real": {}, "q complex": {"ema": ComplexEMA}})


def chunks(options):
    """How long should a chunk be?"""
    models = {
        f"chunks of {size}{', no average' * (ema is not None)}": {"chunk_size": size, "ema": ema}
        for ema in (None, NoEMA)
        for size in (32, 128, 512)
    }
    compare(options, models)


def sliding(options):
    """What if a query also sees the chunk before its own?

    Gecko does so. Sliding chunks of 64 need as many attention scores as plain chunks of 128.
    """
    models = {
        "chunks of 64": {"chunk_size": 64},
        "chunks of 128, MEGA": {},
        "sliding chunks of 64": {"chunk_size": 64, "layer": SlidingLayer},
        "chunks of 128, no average": {"ema": NoEMA},
        "sliding, no average": {"chunk_size": 64, "layer": SlidingLayer, "ema": NoEMA},
    }
    compare(options, models)


def attention(options):
    """Softmax, laplace or relu2?"""
    names = ("softmax", "laplace", "relu2")
    compare(options, {name: {"attention": name} for name in names})


ANSWERS = (
    memory,
    border,
    cache,
    average,
    damping,
    dims,
    complex_q,
    chunks,
    sliding,
    attention,
)
EXPERIMENTS = {answer.__name__: answer for answer in ANSWERS}


def check_names(what: str, names: list[str], known):
    """Raise a UserError if one of the names is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"there is no {what} {name!r}; choose from {', '.join(known)}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--model", default=SMALL, help="the checkpoint to examine")
    parser.add_argument("--steps", type=int, default=600, help="of 2,048 bytes each (default: 600)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default: 3)")
    options = parser.parse_args()
    check_names("experiment", options.names, [*EXPERIMENTS, "all"])
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not options.names:
        for name, answer in EXPERIMENTS.items():
            print(f"{name:10} {answer.__doc__.splitlines()[0]}")
    keep_big_blocks()
    for name in EXPERIMENTS if "all" in options.names else options.names:
        print(f"{inspect.cleandoc(EXPERIMENTS[name].__doc__)}\n")
        EXPERIMENTS[name](options)


if __name__ == "__main__":
    run(main)
