"""A student's questions to MEGA, each answered by a run of less than two minutes.

    python -m data.lecture.experiments           # the questions
    python -m data.lecture.experiments memory    # one answer; or several names, or `all`

`memory`, `border` and `cache` look into the trained model in data/small, or into --model. The
others train models of 0.46M parameters on the bytes of the text that ships with Python, in
train.py's loop, all for the same number of steps.
"""

import functools
import inspect
import math
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import train
from data.common import Parser, UserError, keep_big_blocks, run
from data.lecture.learn import NoEMA, Undamped, learn, new_model_with, speed
from data.prepare import load_tokenizer, prepare, read_meta
from mega import DampedEMA, MegaCache, MegaForCausalLM
from sample import SMALL, load_model

TINY = {
    "dataset": "pydocs",
    "tokenizer": "bytes",
    "max_minutes": 0,
    "dropout": 0,
    "hidden_dropout": 0,
}
TINY |= {"n_layer": 2, "n_embd": 128, "intermediate_size": 256, "nffn_hidden_size": 256}


def read_settings(**changes):
    """Settings of train.py for a tiny model, with changes."""
    return train.read_settings([f"--{name}={value}" for name, value in (TINY | changes).items()])


def compare(options, *models):
    """Train models (a name, another class of moving averages or None, settings): a row of each."""
    print(f"{'bits a byte':26}{'train':>10}{'val':>10}{'tokens/s':>12}")
    for name, ema, changes in models:
        make_model = functools.partial(new_model_with, ema) if ema else train.new_model
        t = learn(read_settings(max_iters=options.steps, **changes), make_model)
        bits = np.mean(t.losses[-20:]) / math.log(2)  # a token is a byte
        val = train.evaluate(t.model, t.corpus, "val", "carried", t.autocast)["bits_per_byte"]
        print(f"{name:26}{bits:10.3f}{val:10.3f}{speed(t):12,.0f}", flush=True)


# -------------------------------------------------------------------------------- a trained model


def load_decoder(source: str):
    """A trained model and its tokenizer; UserError unless it is a decoder with chunks."""
    model, codec = load_model(source)
    if not (model.config.is_decoder and model.config.use_chunking):
        raise UserError(f"{source} is no decoder with chunks; give the folder of one of train.py's")
    return model, codec


def layers_of(source: str) -> dict[str, DampedEMA]:
    """The moving averages of a new layer and of those of a trained model."""
    model, _ = load_decoder(source)
    torch.manual_seed(0)
    layers = {"new, any layer": MegaForCausalLM(model.config).mega.layers[0]}
    layers |= {f"trained, layer {i + 1}": block for i, block in enumerate(model.mega.layers)}
    return {name: block.mega_layer.ema_gate for name, block in layers.items()}


def memory(options):
    """What does each layer remember?

    The half-life of a hidden number, ln 2 / -ln q, is the number of tokens after which half of what
    was written to it is left. A layer has D times N of them.
    """
    print(f"{'':18}{'a tenth below':>15}{'half below':>12}{'a tenth above':>15}{'longest':>9}")
    for name, ema in layers_of(options.model).items():
        lives = half_lives(ema)
        low, middle, high, longest = (lives.quantile(part).item() for part in (0.1, 0.5, 0.9, 1))
        print(f"{name:18}{low:15.1f}{middle:12.1f}{high:15.1f}{longest:9.1f}")


def half_lives(ema: DampedEMA) -> Tensor:
    """Of all hidden numbers, (D N), in tokens."""
    return math.log(2) / -ema.coefficients()[1].detach().double().log().flatten()


@torch.no_grad()
def border(options):
    """What gets over a chunk's border?

    One token of a text is replaced by another. By how many nats (KL) do the predictions after it
    change? The first token of a chunk is seen by attention through all of the chunk. The last one
    is seen by no later query: what comes of it went through moving averages.
    """
    model, codec = load_decoder(options.model)
    chunk, tokens = model.config.chunk_size, val_tokens(codec)
    rows = tokens[: len(tokens) // (3 * chunk) * 3 * chunk].view(-1, 3 * chunk)
    ranges = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 126)]
    ranges = [(a, b) for a, b in ranges if b < chunk]
    found = []
    for at in (chunk, chunk - 1):
        changed = rows.clone()
        changed[:, at] = rows[:, at].roll(1)  # that of another row
        nats = torch.cat(
            [
                divergence(model(a).logits, model(b).logits)
                for a, b in zip(rows.split(8), changed.split(8), strict=True)
            ]
        ).mean(0)
        found.append([nats[at + a : at + b + 1].mean().item() for a, b in ranges])
    print(f"{'tokens later':>14}{'first of a chunk':>20}{'last of a chunk':>20}")
    for (a, b), first, last in zip(ranges, *found, strict=True):
        print(f"{f'{a} to {b}':>14}{first:20.1e}{last:20.1e}")


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(p || q) of logits (.., vocabulary), in nats (..)."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def val_tokens(codec) -> Tensor:
    """The validation split of the text that ships with Python, (T,), in a checkpoint's tokens."""
    data = prepare("pydocs")
    ids = np.fromfile(data / "val.bin", read_meta(data)["dtype"]).astype(np.int64)
    other = load_tokenizer(data)
    return torch.as_tensor(ids if codec == other else codec.encode(other.decode(ids.tolist())))


@torch.no_grad()
def cache(options):
    """What is in the cache, and how large is it?

    A layer keeps the state of its moving averages, D N numbers, and of the open chunk the keys, Z
    numbers a token, and the values, V numbers. A Transformer keeps 2 D numbers of every token.
    """
    model, codec = load_decoder(options.model)
    config = model.config
    whole = MegaForCausalLM(replace(config, use_chunking=False)).eval()
    ids = torch.randint(codec.size, (1, 10_000))
    print(f"{'tokens':>8}{'in chunks':>12}{'no chunks':>12}{'Transformer':>14}   KiB in fp32")
    for length in (100, 1000, 10_000):
        caches = [m.mega(ids[:, :length], use_cache=True).cache for m in (model, whole)]
        sizes = [cached_numbers(found) for found in caches]
        sizes.append(2 * config.hidden_size * length * config.num_hidden_layers)
        chunked, unchunked, transformer = (4 * size / 1024 for size in sizes)
        print(f"{length:8,}{chunked:12,.0f}{unchunked:12,.0f}{transformer:14,.0f}")
        if length == 100:
            shapes = [tuple(t.shape) for t in caches[0].layers[0][:3]]
    print("\na layer of the first row: state {}, keys {}, values {}".format(*shapes))


def cached_numbers(found: MegaCache) -> int:
    return sum(t.numel() for layer in found.layers for t in layer[:3])


# ---------------------------------------------------------------------------- models to be trained


def damping(options):
    """What if damping is off?

    Then delta is 1 and q = 1 - p: what forgets slowly also reads little, but for a larger beta.
    """
    models = ("damped", None, {}), ("delta = 1", Undamped, {}), ("no moving average", NoEMA, {})
    compare(options, *models)


def dims(options):
    """Does a channel need 16 hidden numbers?

    With one its kernel can only fall; a sum of 16 can rise first, or change its sign.
    """
    compare(options, *((f"N = {n}", None, {"ema_size": n}) for n in (1, 4, 16)))


def chunks(options):
    """Chunks of 32 bytes, without the moving average?"""
    compare(options, *(
        (f"chunks of {size}{', no EMA' * (ema is not None)}", ema, {"chunk_size": size})
        for ema in (None, NoEMA) for size in (32, 128)
    ))  # fmt: skip


def attention(options):
    """Softmax, laplace or relu2?"""
    compare(
        options, *((name, None, {"attention": name}) for name in ("softmax", "laplace", "relu2"))
    )


ANSWERS = (memory, border, cache, damping, dims, chunks, attention)
EXPERIMENTS = {answer.__name__: answer for answer in ANSWERS}


def check_names(what: str, names: list[str], known):
    """UserError if one of the names is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"there is no {what} {name!r}; choose of {', '.join(known)}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--model", default=SMALL, help="the checkpoint to look into")
    parser.add_argument("--steps", type=int, default=300, help="of 2,048 tokens (default: 300)")
    options = parser.parse_args()
    check_names("experiment", options.names, [*EXPERIMENTS, "all"])
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    if not options.names:
        for name, answer in EXPERIMENTS.items():
            print(f"{name:10} {answer.__doc__.splitlines()[0]}")
    keep_big_blocks()
    for name in EXPERIMENTS if "all" in options.names else options.names:
        start = time.perf_counter()
        print(f"{inspect.cleandoc(EXPERIMENTS[name].__doc__)}\n")
        EXPERIMENTS[name](options)
        print(f"\n({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    run(main)
