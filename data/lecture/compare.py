"""Speed beside other implementations, in one process and by turns: medians, in tokens/s.

    python -m data.lecture.compare --nanogpt ../nanoGPT/model.py     # needs transformers==4.40.2
    python -m data.lecture.compare --mega_pytorch ../Mega-pytorch/mega_pytorch/mega_pytorch.py

Training steps (forward, loss, backward; 4,096 tokens, or one row where longer) with nanoGPT's model
of the same width and depth, forward passes, and greedy decoding of 1,024 tokens. By default blocks
of memory are kept as train.py keeps them; --default_allocator leaves that out.
"""

import argparse
import functools
import importlib.util
import statistics
import time
from pathlib import Path

import torch

from data.common import UserError, keep_big_blocks, run
from data.machine import bfloat16_is_faster
from mega import EMA_MODES, DampedEMA, MegaConfig, MegaForCausalLM, MegaOutput, cross_entropy

# The model of the README's speed tables: 5.4M parameters.
MODEL = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
    "nffn_hidden_size": 512, "shared_representation_size": 64, "use_chunking": True,
    "chunk_size": 128, "normalization_type": "layernorm", "is_decoder": True,
    "bidirectional": False, "add_lm_hidden_dense_layer": False, "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
}  # fmt: skip
LONGEST = {"direct": 256, "recurrent": 1024, "fft": 16384, "blockwise": 65536}  # in a few seconds


def seconds(work, rounds: int = 3) -> float:
    """The median time of a few calls, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def kept_bytes(work) -> int:
    """Of the tensors that `work` keeps for a backward pass, each piece of memory once."""
    sizes = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _ = work()
    return sum(sizes.values())


def ema_inputs(length: int, dtype: torch.dtype) -> tuple:
    """x (1, L, 256) and the coefficients u, q, g (256, 16) of a new layer, all with gradients."""
    torch.manual_seed(0)
    layer = DampedEMA(MegaConfig(**MODEL)).to(dtype)
    inputs = torch.randn(1, length, MODEL["hidden_size"], dtype=dtype), *layer.coefficients()
    return tuple(t.detach().requires_grad_() for t in inputs)


def run_ema(mode: str, inputs: tuple) -> torch.Tensor:
    y = EMA_MODES[mode](*inputs)
    return y if mode in ("direct", "fft") else y[0]


def build_theirs(**changes) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.MegaForCausalLM(transformers.MegaConfig(**MODEL | changes))


def check_file(path: str | None):
    """UserError if a path given is not a file's, before the work that ends with loading it."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"there is no file {path}; give that of other people's model")


def load_file(path: str):
    """The module in a Python file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_nanogpt(path: str, length: int) -> torch.nn.Module:
    module = load_file(path)
    sizes = {"n_embd": MODEL["hidden_size"], "n_layer": MODEL["num_hidden_layers"], "n_head": 4}
    vocabulary = {"vocab_size": MODEL["vocab_size"], "block_size": length}
    return module.GPT(module.GPTConfig(dropout=0.0, **sizes, **vocabulary))


class MegaPytorch(torch.nn.Module):
    """lucidrains' model, whole rows and an output that is not tied, called as ours is."""

    def __init__(self, path: str):
        super().__init__()
        sizes = {"dim": MODEL["hidden_size"], "depth": MODEL["num_hidden_layers"], "ff_mult": 2}
        sizes |= {"ema_heads": 16, "attn_dim_qk": 64, "attn_dim_value": MODEL["intermediate_size"]}
        options = {"num_tokens": MODEL["vocab_size"], "causal": True, "pre_norm": True}
        self.lm = load_file(path).Mega(**sizes, **options)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> MegaOutput:
        return MegaOutput(loss=cross_entropy(self.lm(ids)[:, :-1].float(), labels[:, 1:]))


def train_step(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype):
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        if hasattr(model, "transformer"):  # nanoGPT's: labels already moved
            loss = model(ids[:, :-1], ids[:, 1:].contiguous())[1]
        else:
            loss = model(ids, labels=ids).loss
    loss.backward()


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(ids, use_cache=False)


def by_turns(what: str, models: dict, work, tokens: int, rounds: int):
    """Print each model's median speed in `rounds` rounds, one more not counted, and the ratios."""
    times = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            work(model)
            times[name].append(time.perf_counter() - start)
    speeds = {name: tokens / statistics.median(t[1:]) for name, t in times.items()}
    ours = speeds["this"]
    found = ", ".join(f"{n} {v:,.0f} ({ours / v:.2f}x)" for n, v in speeds.items() if n != "this")
    print(f"{what}: this {ours:,.0f}, {found}", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", metavar="MODEL_PY", help="nanoGPT's model.py")
    parser.add_argument("--mega_pytorch", metavar="PY", help="lucidrains' mega_pytorch.py")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--new_tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--default_allocator", action="store_true")
    options = parser.parse_args(arguments)
    if not options.default_allocator:
        keep_big_blocks()
    check_file(options.nanogpt)
    check_file(options.mega_pytorch)
    random_ids = functools.partial(torch.randint, 3, MODEL["vocab_size"])
    ours = MegaForCausalLM(MegaConfig(**MODEL))
    dtypes = {"float32": torch.float32}
    if bfloat16_is_faster():  # elsewhere it would take hours
        dtypes["bfloat16"] = torch.bfloat16
    for dtype_name, dtype in dtypes.items():
        for length in options.lengths:
            models = {"this": ours.train(), "transformers": build_theirs().train()}
            if options.nanogpt:
                models["nanoGPT"] = build_nanogpt(options.nanogpt, length)
            if options.mega_pytorch:
                models["Mega-pytorch"] = MegaPytorch(options.mega_pytorch).train()
            ids = random_ids((max(4096 // length, 1), length))
            step = functools.partial(train_step, ids=ids, dtype=dtype)
            by_turns(f"train, {dtype_name}, {length}", models, step, ids.numel(), options.rounds)
        for chunking in (True, False):
            for length in options.lengths if chunking else [n for n in options.lengths if n < 9000]:
                models = {
                    "this": MegaForCausalLM(
                        MegaConfig(**MODEL | {"use_chunking": chunking})
                    ).eval(),
                    "transformers": build_theirs(use_chunking=chunking).eval(),
                }
                work = functools.partial(forward, ids=random_ids((1, length)), dtype=dtype)
                what = f"forward, {'chunks' if chunking else 'whole'}, {dtype_name}, {length}"
                by_turns(what, models, work, length, options.rounds)
    whole, n = {"use_chunking": False}, options.new_tokens
    models = {
        "this": MegaForCausalLM(MegaConfig(**MODEL | whole)),
        "transformers": build_theirs(**whole),
    }
    decode = {"max_new_tokens": n, "pad_token_id": 1, "eos_token_id": None}
    calls = {
        "this": lambda: models["this"].generate(random_ids((1, 8)), n, 0),
        "transformers": lambda: (
            models["transformers"].eval().generate(random_ids((1, 8)), do_sample=False, **decode)
        ),
    }
    by_turns(f"greedy decoding of {n} tokens", calls, lambda call: call(), n, 1)


if __name__ == "__main__":
    run(main)
