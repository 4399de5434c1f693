"""Draw the figures of the lecture, data/lecture/figures/*.svg, from runs made on the spot.

    python -m data.lecture.draw --nanogpt ../nanoGPT/model.py    # all of them
    python -m data.lecture.draw kernels memory                   # some of them

kernels, memory   the moving averages of the model in data/small, and of a new one
cost              time and memory of the EMA's four modes, and a training step, by length
learning          how models of experiments.py's size learn, with and without a moving average
positions         how well these predict at each position of a window

transformers (4.40.2) and nanoGPT's model.py are not part of this project: without them their curves
are missing. The numbers that a figure shows are printed under its name. All take eight minutes on
two cores. layer.svg was drawn by hand.
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
from cycler import cycler
from matplotlib import rcParams
from matplotlib.figure import Figure

import train
from data.common import Parser, keep_big_blocks, run, write_whole
from data.lecture import compare
from data.lecture.experiments import check_names, half_lives, layers_of, load_decoder, read_settings
from data.lecture.learn import learn, speed
from data.lecture.variants import NoEMA, new_model_with
from mega import MegaConfig, MegaForCausalLM, ema_kernel
from sample import SMALL

FIGURES = Path(__file__).parent / "figures"
STEPS = 600  # of each training run
SEEDS = (1, 2, 3)
EMA_LENGTHS = (16, 64, 256, 1024, 4096, 16384)  # of a sequence for one EMA
LENGTHS = (256, 1024, 4096, 16384)  # of a training step's sequences
BIN = 16  # positions; also the distance between windows, so that each bin sees the whole text

# Okabe and Ito's colours, which colour-blind readers can tell apart, plus dashes and markers.
rcParams["axes.prop_cycle"] = (
    cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"])
    + cycler(linestyle=["-", "--", "-.", ":", "-", "--"])
    + cycler(marker=["o", "s", "^", "D", "v", "P"])
)
rcParams["lines.markersize"] = 4
rcParams["font.size"] = 11
rcParams["axes.titlesize"] = 11
rcParams["legend.fontsize"] = 10
rcParams["svg.fonttype"] = "none"  # text stays text
rcParams["svg.hashsalt"] = "mega"  # so that ids inside a file do not change from run to run


def new_figure(rows: int, columns: int, height: float = 3.6, **options):
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
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
    """Kernels of six channels of a new layer and of the first and last layer of a trained model."""
    layers = layers_of(options.model)
    found = {name: ema_kernel(*ema.coefficients(), 256) for name, ema in layers.items()}
    for name, kernel in found.items():
        largest, where = kernel.abs().max(-1, keepdim=True)
        shape = kernel / largest
        late = (where > 0).double().mean().item()
        sign = ((shape > 0.05).any(-1) & (shape < -0.05).any(-1)).double().mean().item()
        print(
            f"  {name}: {late:.0%} of the kernels peak after lag 0, {sign:.0%} change sign "
            "(above 5% of the peak)"
        )
    first, second, *_, last = found
    figure, axes = new_figure(1, 3, 3.2, sharey=True)
    for ax, name in zip(axes, (first, second, last), strict=True):
        kernel = found[name]
        lags = np.arange(1, kernel.shape[1] + 1)
        for channel in range(0, len(kernel), math.ceil(len(kernel) / 6)):
            ax.semilogx(lags, kernel[channel], markevery=[0, 1, 3, 7, 15, 31, 63, 127])
        ax.set_title(name)
        ax.set_xlabel("lag + 1, in tokens")
    axes[0].set_ylabel("kernel")
    save("kernels", figure)


def memory(options):
    """Half-lives of all EMA states of a layer, longest first, on log-log axes."""
    figure, (ax,) = new_figure(1, 1)
    for name, ema in layers_of(options.model).items():
        lives = half_lives(ema).sort(descending=True).values
        ranks = torch.logspace(0, math.log10(len(lives)), 40).long().clamp(1, len(lives))
        ax.loglog(ranks, lives[ranks - 1], label=name)
        over = (lives > 10).sum().item()
        print(
            f"  {name}: median {lives.median():.1f} tokens, longest {lives[0]:.0f}; {over:,} of "
            f"{len(lives):,} above 10"
        )
    model, _ = load_decoder(options.model)
    ax.axhline(model.config.chunk_size, color="gray", linestyle=":", marker="")
    ax.set_xlabel("rank of the state among the D N of its layer; dotted line: length of a chunk")
    ax.set_ylabel("half-life in tokens")
    ax.legend()
    save("memory", figure)


# ---------------------------------------------------------------------------------- time and space


def with_range(ax, x, times, label):
    """Draw medians of repeated measurements, with bars from the lowest to the highest."""
    times = np.array(times)  # (lengths, repeats)
    middle = np.median(times, axis=1)
    bars = [middle - times.min(axis=1), times.max(axis=1) - middle]
    ax.errorbar(x, middle, bars, capsize=2, label=label)
    ax.set_xscale("log")


def cost(options):
    """EMA modes, forward and backward (time, memory), and the training step, by length."""
    figure, axes = new_figure(2, 2, 7)
    config = MegaConfig(**compare.MODEL)
    D = config.hidden_size
    N = config.ema_projection_size
    for ax, batch in zip(axes, (1, 8), strict=False):
        for mode, longest in compare.LONGEST.items():
            lengths = [n for n in EMA_LENGTHS if n <= longest // batch]
            times = []
            for length in lengths:
                inputs = compare.ema_inputs(length, torch.float32, batch)
                work = functools.partial(compare.run_ema, mode, inputs)
                found = compare.all_seconds(lambda work=work: work().sum().backward())
                times.append([1e3 * t for t in found])
            with_range(ax, lengths, times, mode)
            found = zip(lengths, np.median(times, axis=1), strict=True)
            print(
                f"  {mode}, batch {batch}: " + ", ".join(f"{n:,} {t:.1f} ms" for n, t in found),
                flush=True,
            )
        ax.set_yscale("log")
        ax.set_ylabel("ms, forward and backward")
        ax.set_title(f"the EMA, batch {batch}, D = {D}, N = {N}, fp32")
    for mode, longest in compare.LONGEST.items():
        lengths = [n for n in EMA_LENGTHS if n <= longest]
        sizes = []
        for length in lengths:
            inputs = compare.ema_inputs(length, torch.float32)
            work = functools.partial(compare.run_ema, mode, inputs)
            sizes.append(compare.kept_bytes(work) / 2**20)
        axes[2].loglog(lengths, sizes, label=mode)
    axes[2].set_title("the EMA, batch 1: kept for the backward pass")
    axes[2].set_ylabel("MiB")
    training_cost(axes[3], options)
    for ax in axes:
        ax.set_xlabel("length of a sequence")
        ax.legend()
    save("cost", figure)


def training_cost(ax, options):
    models = {"mega.py": lambda _: MegaForCausalLM(MegaConfig(**compare.MODEL))}
    if importlib.util.find_spec("transformers"):
        models["transformers"] = lambda _: compare.build_theirs()
    if options.nanogpt:
        models["nanoGPT"] = functools.partial(compare.build_nanogpt, options.nanogpt)
    dtype = train.choose_dtype("auto", torch.device("cpu"))
    for name, build in models.items():
        speeds = []
        for length in LENGTHS:
            ids = compare.random_ids(max(4096 // length, 1), length)
            work = functools.partial(compare.train_step, build(length).train(), ids, dtype)
            speeds.append([ids.numel() / t for t in compare.all_seconds(work)])
        with_range(ax, LENGTHS, speeds, name)
        found = zip(LENGTHS, np.median(speeds, axis=1), strict=True)
        print(f"  {name}: " + ", ".join(f"{n:,} {v:,.0f} tokens/s" for n, v in found), flush=True)
    ax.set_title(f"a training step, {train.dtype_name(dtype)}, 5.4M parameters")
    ax.set_ylabel("tokens a second")
    ax.set_ylim(bottom=0)


# ---------------------------------------------------------------------------------------- learning

MODELS = {"MEGA": None, "no moving average": NoEMA}


@functools.cache
def trained(name: str, seed: int):
    """Train a model for STEPS; return the Training and (step, bits per byte) along the way."""
    s = read_settings(max_iters=STEPS, seed=seed)
    curve = []

    def evaluate(t: train.Training):
        if t.progress() >= 0.1 * (len(curve) + 1) - 1e-9:
            result = train.evaluate(t.model, t.corpus, "val", str(s.block_size), t.autocast)
            curve.append((t.step, result["bits_per_byte"]))

    t = learn(s, functools.partial(new_model_with, ema=MODELS[name]), evaluate)
    print(f"  {name}, seed {seed}: {speed(t):,.0f} tokens/s, {curve[-1][1]:.3f} bits per byte")
    return t, curve


def learning(options):
    """Bits per byte of the validation split by training step, with the range of three seeds."""
    figure, (ax,) = new_figure(1, 1)
    for name in MODELS:
        curves = np.array([trained(name, seed)[1] for seed in SEEDS])  # (seeds, points, 2)
        steps = curves[0, :, 0]
        bits = curves[:, :, 1]
        (line,) = ax.plot(steps, bits.mean(axis=0), label=name)
        ax.fill_between(
            steps, bits.min(axis=0), bits.max(axis=0), color=line.get_color(), alpha=0.2
        )
    ax.set_xlabel("steps of 2,048 bytes")
    ax.set_ylabel("bits per byte, windows of 512")
    ax.legend()
    save("learning", figure)


@torch.no_grad()
def bits_by_position(t: train.Training, length: int) -> np.ndarray:
    """Return the mean bits of the byte at each position of windows of the validation split."""
    windows = t.corpus.ids("val").unfold(0, length + 1, BIN)
    model = t.model.eval()
    total = 0
    for some in windows.split(64):
        with t.autocast:
            logits = model(some[:, :-1], use_cache=False).logits
        nats = F.cross_entropy(logits.float().mT, some[:, 1:], reduction="none")
        total = total + nats.double().sum(0)
    return (total / len(windows) / math.log(2)).numpy()


def positions(options):
    """Bits per byte by position in a window (mean of three seeds), and near the first boundary."""
    figure, (ax, near) = new_figure(1, 2, width_ratios=(2, 1))
    for name in MODELS:
        runs = [trained(name, seed)[0] for seed in SEEDS]
        chunk = runs[0].settings.chunk_size
        bits = np.mean([bits_by_position(t, 3 * chunk) for t in runs], axis=0)
        middle = np.arange(0, len(bits), BIN) + (BIN - 1) / 2
        ax.plot(middle, bits.reshape(-1, BIN).mean(axis=1), label=name)
        border = np.arange(max(chunk - 12, 0), chunk + 12)
        near.plot(border - chunk, bits[border])
        last = bits[chunk - 16 : chunk].mean()
        after = bits[chunk : chunk + 16]
        print(
            f"  {name}: {bits[0]:.3f} bits at the first position, {last:.3f} at the last 16 of a "
            f"chunk, {after[0]:.3f} at the first of the next, {after.mean():.3f} at its first 16"
        )
    for edge in range(chunk, 3 * chunk, chunk):
        ax.axvline(edge - 0.5, color="gray", linestyle=":", marker="")
    near.axvline(-0.5, color="gray", linestyle=":", marker="")
    ax.set_xlabel(f"position in the window; dotted: boundaries of chunks of {chunk}")
    ax.set_ylabel("bits per byte")
    ax.legend()
    near.set_title("the first boundary")
    near.set_xlabel("position in the second chunk")
    save("positions", figure)


DRAWINGS = {draw.__name__: draw for draw in (kernels, memory, cost, learning, positions)}


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(DRAWINGS)}; none: all")
    parser.add_argument("--model", default=SMALL, help="the checkpoint for kernels and memory")
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
