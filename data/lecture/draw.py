"""Draw the README's figures, data/lecture/figures/*.svg, from runs made on the spot.

    python -m data.lecture.draw --nanogpt ../nanoGPT/model.py    # all of them, in seven minutes
    python -m data.lecture.draw kernels memory                   # some of them

kernels, memory   the moving averages of the model in data/small, and of a new one
cost              time and memory of the EMA's modes, and a training step, by length
learning          what models of the experiments' size learn in MINUTES
positions         what two of these predict at which position of a row

transformers (4.40.2) and nanoGPT's model.py are not of this project: without them their curves are
missing. Under each figure's name the numbers that it shows are printed.
"""

import functools
import importlib.util
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.figure import Figure

import train
from data.common import Parser, keep_big_blocks, run, write_whole
from data.lecture import compare
from data.lecture.experiments import check_names, half_lives, layers_of, read_settings
from data.lecture.learn import NanoGPT, NoEMA, Undamped, learn, new_model_with, speed
from mega import MegaConfig, MegaForCausalLM, ema_kernel
from sample import SMALL

FIGURES = Path(__file__).parent / "figures"
MINUTES = 0.8  # of each training
EVERY = 0.1  # part of a training between two evaluations
LENGTHS = (256, 1024, 4096, 16384)  # of a training step's rows
STRIDE = 32  # between the starts of the windows of `positions`
rcParams["svg.fonttype"] = "none"  # text stays text
rcParams["svg.hashsalt"] = "mega"  # so that names inside a file do not change from run to run


def new_figure(columns: int, width: float = 9.0, height: float = 3.2, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def save(name: str, figure: Figure):
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    FIGURES.mkdir(exist_ok=True)
    write_whole(FIGURES / f"{name}.svg", content.getvalue())


# ------------------------------------------------------------------------------- a trained model


@torch.no_grad()
def kernels(options):
    """Of some channels of each layer, each divided by its largest tap."""
    layers, taps = layers_of(options.model), 32
    figure, axes = new_figure(len(layers), 11, 2.6, sharey=True)
    for ax, (name, ema) in zip(axes, layers.items(), strict=True):
        kernel = ema_kernel(*ema.coefficients(), taps)
        largest, where = kernel.abs().max(-1, keepdim=True)
        shape = kernel / largest
        ax.plot(shape[:: len(shape) // 8][:8].T, linewidth=1)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("tokens ago")
        late = (where > 0).double().mean().item()
        sign = ((shape > 0.05).any(-1) & (shape < -0.05).any(-1)).double().mean().item()
        print(
            f"  {name}: {late:.0%} of the kernels have their largest tap after the first, "
            f"{sign:.0%} change their sign by more than 5% of it"
        )
    axes[0].set_ylabel("kernel / its largest tap")
    save("kernels", figure)


def memory(options):
    """How many of a layer's hidden numbers have a half-life above so many tokens."""
    figure, (ax,) = new_figure(1, 6)
    for name, ema in layers_of(options.model).items():
        lives = half_lives(ema).sort().values
        share = 1 - torch.arange(len(lives)) / len(lives)
        rows = torch.linspace(0, len(lives) - 1, 200).long()
        style = {"color": "black", "linestyle": "--"} if name.startswith("new") else {}
        ax.loglog(lives[rows], share[rows], label=name, **style)
        print(f"  {name}: median {lives.median():.1f} tokens, longest {lives[-1]:.0f}")
    ax.set_xlabel("half-life in tokens")
    ax.set_ylabel("part of the hidden numbers above it")
    ax.legend(fontsize=8)
    save("memory", figure)


# ---------------------------------------------------------------------------------- time and space


def cost(options):
    """EMA modes, forward and backward (time, memory), and the training step, by length."""
    figure, (ms, mib, steps) = new_figure(3, 11)
    for mode in compare.EMA_MODES:
        lengths = [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= compare.LONGEST[mode]]
        times, sizes = [], []
        for length in lengths:
            inputs = compare.ema_inputs(length, torch.float32)
            work = functools.partial(compare.run_ema, mode, inputs)
            times.append(1e3 * compare.seconds(lambda work=work: work().sum().backward()))
            sizes.append(compare.kept_bytes(work) / 2**20)
        ms.loglog(lengths, times, ".-", label=mode)
        mib.loglog(lengths, sizes, ".-", label=mode)
        found = zip(lengths, times, strict=True)
        print(f"  {mode}: " + ", ".join(f"{n:,} {t:.1f} ms" for n, t in found), flush=True)
    ms.set_title("the EMA, milliseconds", fontsize=10)
    mib.set_title("the EMA, MiB kept for backward", fontsize=10)
    models = {"this": lambda _: MegaForCausalLM(MegaConfig(**compare.MODEL))}
    if importlib.util.find_spec("transformers"):
        models["transformers"] = lambda _: compare.build_theirs()
    if options.nanogpt:
        models["nanoGPT"] = functools.partial(compare.build_nanogpt, options.nanogpt)
    dtype = train.choose_dtype("auto", torch.device("cpu"))
    for name, build in models.items():
        speeds = []
        for length in LENGTHS:
            ids = torch.randint(3, compare.MODEL["vocab_size"], (max(4096 // length, 1), length))
            work = functools.partial(compare.train_step, build(length).train(), ids, dtype)
            speeds.append(ids.numel() / compare.seconds(work, 2))
        steps.semilogx(LENGTHS, speeds, ".-", label=name)
        found = zip(LENGTHS, speeds, strict=True)
        print(f"  {name}: " + ", ".join(f"{n:,} {v:,.0f} tokens/s" for n, v in found), flush=True)
    steps.set_title(f"training, tokens a second ({train.dtype_name(dtype)})", fontsize=10)
    steps.set_ylim(bottom=0)
    for ax in (ms, mib, steps):
        ax.set_xlabel("length of a row")
        ax.legend(fontsize=8)
    save("cost", figure)


# ---------------------------------------------------------------------------------------- learning


@functools.cache
def trained(name: str, make_model=train.new_model, **changes):
    """A model after MINUTES of training, its corpus, and (minutes, bits a byte) on the way."""
    s, curve = read_settings(max_minutes=MINUTES, max_iters=10**6, **changes), []

    def evaluate(t: train.Training):
        if t.progress() >= EVERY * (len(curve) + 1):
            result = train.evaluate(t.model, t.corpus, "val", str(s.block_size), t.autocast)
            curve.append((t.seconds / 60, result["bits_per_byte"]))

    t = learn(s, make_model, evaluate)
    print(f"  {name}: {t.step} steps, {speed(t):,.0f} tokens/s, {curve[-1][1]:.3f} bits a byte")
    return t, curve


MODELS = {
    "MEGA": (train.new_model, {}),
    "no moving average": (functools.partial(new_model_with, NoEMA), {}),
    "delta = 1": (functools.partial(new_model_with, Undamped), {}),
    "N = 1": (train.new_model, {"ema_size": 1}),
}


def learning(options):
    """Bits a byte of the validation split after so many minutes of training."""
    figure, (ax,) = new_figure(1, 6)
    curves = {name: trained(name, make, **changes)[1] for name, (make, changes) in MODELS.items()}
    if options.nanogpt:
        make_model = functools.partial(NanoGPT, options.nanogpt)
        curves["nanoGPT"] = trained("nanoGPT", make_model)[1]
    for name, curve in curves.items():
        ax.plot(*zip(*curve, strict=True), ".-", label=name)
    ax.set_xlabel("minutes of training")
    ax.set_ylabel("bits a byte, windows of 512")
    ax.legend(fontsize=8)
    save("learning", figure)


@torch.no_grad()
def positions(options):
    """Bits of each byte of windows that start everywhere, by its position in the window."""
    figure, (ax,) = new_figure(1, 8)
    for name in ("MEGA", "no moving average"):
        make_model, changes = MODELS[name]
        t, _ = trained(name, make_model, **changes)
        chunk = t.settings.chunk_size
        length = 3 * chunk
        total, windows = 0, t.corpus.ids("val").unfold(0, length + 1, STRIDE)
        model = t.model.eval()
        for rows in windows.split(64):
            with t.autocast:
                logits = model(rows[:, :-1], use_cache=False).logits
            nats = F.cross_entropy(logits.float().mT, rows[:, 1:], reduction="none")
            total = total + nats.double().sum(0)
        bits = total / len(windows) / math.log(2)
        means = bits.view(-1, 8).mean(1)
        ax.plot(np.arange(0, length, 8) + 3.5, means, label=name)
        first, last, after = bits[0], bits[chunk - 16 : chunk].mean(), bits[chunk : chunk + 16]
        print(
            f"  {name}: {first:.2f} bits at the first position, {last:.2f} at the last 16 of a "
            f"chunk, {after[0]:.2f} at the first of the next, {after.mean():.2f} at its first 16"
        )
    for border in range(chunk, length, chunk):
        ax.axvline(border, color="gray", linestyle=":")
    ax.set_xlabel(f"position in the row; chunks of {chunk} end at the dotted lines")
    ax.set_ylabel("bits a byte")
    ax.legend(fontsize=8)
    save("positions", figure)


DRAWINGS = {draw.__name__: draw for draw in (kernels, memory, cost, learning, positions)}


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(DRAWINGS)}; none: all")
    parser.add_argument("--model", default=SMALL, help="the checkpoint of kernels and memory")
    parser.add_argument("--nanogpt", metavar="MODEL_PY", help="nanoGPT's model.py")
    options = parser.parse_args()
    check_names("figure", options.names, DRAWINGS)
    compare.check_file(options.nanogpt)
    keep_big_blocks()
    for name in options.names or DRAWINGS:
        start = time.perf_counter()
        print(f"{name}: {DRAWINGS[name].__doc__}")
        DRAWINGS[name](options)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    run(main)
