"""Compare MEGA's speed with that of other implementations, by turns in one process.

    python -m data.lecture.compare --nanogpt ../nanoGPT/model.py     # needs transformers==4.40.2
    python -m data.lecture.compare --mega_pytorch ../Mega-pytorch/mega_pytorch/mega_pytorch.py

It prints medians, in tokens per second, for training steps (forward, loss, backward; 4,096 tokens,
or one sequence if that is longer), forward passes and greedy decoding. The models given by flags,
of the same width and depth, are timed in training only. Decoding is also timed in a bare loop of
the same tensor operations. Freed memory is kept as in train.py, unless --default_allocator is
given. --only=decoding, for example, runs just one part.
"""

import argparse
import functools
import importlib.util
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data.common import UserError, keep_big_blocks, run
from data.machine import bfloat16_is_faster
from mega import (
    EMA_MODES,
    DampedEMA,
    MegaConfig,
    MegaForCausalLM,
    MegaOutput,
    count_parts,
    cross_entropy,
    quick_linear,
    vector_product,
)

# The model of the speed tables in measurements.md: 5.4M parameters.
MODEL = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
    "nffn_hidden_size": 512, "shared_representation_size": 64, "use_chunking": True,
    "chunk_size": 128, "normalization_type": "layernorm", "is_decoder": True,
    "bidirectional": False, "add_lm_hidden_dense_layer": False, "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
}  # fmt: skip
# The longest sequence that each EMA mode processes within a few seconds.
LONGEST = {"direct": 256, "recurrent": 1024, "fft": 16384, "blockwise": 65536}


def all_seconds(work, rounds: int = 3) -> list[float]:
    """Return the times of `rounds` calls, after a warm-up call."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times[1:]


def kept_bytes(work) -> int:
    """Return the bytes of tensors that `work` saves for backward, counting each storage once."""
    sizes = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _ = work()
    return sum(sizes.values())


def ema_inputs(length: int, dtype: torch.dtype, batch: int = 1) -> tuple:
    """Make x (B, L, 256) and the coefficients u, q, g (256, 16) of a new layer, with gradients."""
    torch.manual_seed(0)
    layer = DampedEMA(MegaConfig(**MODEL)).to(dtype)
    inputs = torch.randn(batch, length, MODEL["hidden_size"], dtype=dtype), *layer.coefficients()
    return tuple(t.detach().requires_grad_() for t in inputs)


def run_ema(mode: str, inputs: tuple) -> torch.Tensor:
    y = EMA_MODES[mode](*inputs)
    return y if mode in ("direct", "fft") else y[0]


def build_theirs(**changes) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.MegaForCausalLM(transformers.MegaConfig(**MODEL | changes))


def check_file(path: str | None):
    """Raise a UserError early, before any long run, if a given path is not a file."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"there is no file {path}; give the Python file of the other model")


def load_file(path: str):
    """Import a Python file as a module."""
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
    """lucidrains' model, without chunks and with untied output weights, called like ours."""

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
        if hasattr(model, "transformer"):  # nanoGPT, which takes labels already shifted
            loss = model(ids[:, :-1], ids[:, 1:].contiguous())[1]
        else:
            loss = model(ids, labels=ids).loss
    loss.backward()


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(ids, use_cache=False)


@torch.inference_mode()
def bare_loop(model: MegaForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Decode greedily with MODEL, without chunks, by tensor operations alone: no modules, checks
    or options. Any extra time that `generate` takes is overhead.
    """
    D, V, Z = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["shared_representation_size"]
    length = ids.shape[1]
    longest = length + new
    out = model.mega(ids, use_cache=True)
    layers = []
    for block, cache in zip(model.mega.layers, out.cache.layers, strict=True):
        layer = block.mega_layer
        ffn = block.nffn
        w = {name: p.data for name, p in layer.named_parameters()}
        f = {name: p.data for name, p in ffn.named_parameters()}
        modules = (layer.v_proj, layer.mx_proj, layer.h_proj, ffn.fc1, ffn.fc2)
        linears = [quick_linear(module, 1) for module in modules]
        u, q, g = layer.ema_gate.coefficients()
        keys, values = torch.zeros(longest, Z), torch.zeros(longest, V)
        keys[:length], values[:length] = cache.keys[0], cache.values[0]
        bias = layer.rel_pos_bias(longest)
        layers.append((linears, w, f, u, q, g, bias, cache.ema_state[0].clone(), keys, values))
    table = model.lm_head.weight.data
    output = quick_linear(model.lm_head, 1)
    parts = count_parts(1, table)
    token = output(out.last_hidden_state[:, -1]).argmax(-1)
    tokens = [token]
    for t in range(length, longest - 1):
        x = table[token]
        for linears, w, f, u, q, g, bias, h, keys, values in layers:
            v_proj, mx_proj, h_proj, fc1, fc2 = linears
            y = F.layer_norm(x, (D,), w["norm.norm.weight"], w["norm.norm.bias"])
            values[t] = F.silu(v_proj(y))
            h.mul_(q).addcmul_(u, y.mT)
            smooth = F.silu(torch.addcmul((g * h).sum(-1), y, w["ema_gate.residual_weight"]))
            update, shared_and_reset, candidate = mx_proj(smooth).split([D, Z + V, D], dim=-1)
            shared, reset = F.silu(shared_and_reset).split([Z, V], dim=-1)
            query_and_key = torch.addcmul(w["qk_bias"], w["qk_weight"], shared)
            keys[t] = query_and_key[1]
            scores = (query_and_key[:1] / Z**0.5) @ keys[: t + 1].mT
            weights = (scores + bias[longest - 1 - t : longest]).softmax(-1)
            attended = vector_product(weights[None], values[None, : t + 1], parts)
            candidate = F.silu(candidate + h_proj(attended * reset))
            x = x + torch.sigmoid(update) * (candidate - x)
            y = F.layer_norm(x, (D,), f["norm.norm.weight"], f["norm.norm.bias"])
            x = x + fc2(F.silu(fc1(y)))
        token = output(x).argmax(-1)
        tokens.append(token)
    return torch.cat(tokens)


def tokens_per_second_at_most(model: MegaForCausalLM) -> float:
    """Return the speed if a token took only the time to read all weights from memory once."""
    block = torch.ones(1 << 26)  # 256 MiB, more than any cache holds
    size = sum(p.nbytes for p in model.parameters())
    return block.nbytes / statistics.median(all_seconds(block.sum)) / size


def by_turns(what: str, models: dict, work, tokens: int, rounds: int):
    """Print each model's median speed in `rounds` rounds, after a warm-up, and the ratios."""
    times = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            work(model)
            times[name].append(time.perf_counter() - start)
    speeds = {name: tokens / statistics.median(t[1:]) for name, t in times.items()}
    ours = speeds["mega.py"]
    others = [name for name in models if name != "mega.py"]
    found = ", ".join(f"{name} {speeds[name]:,.0f} ({ours / speeds[name]:.2f}x)" for name in others)
    print(f"{what}: mega.py {ours:,.0f}, {found}", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", metavar="MODEL_PY", help="nanoGPT's model.py")
    parser.add_argument("--mega_pytorch", metavar="PY", help="lucidrains' mega_pytorch.py")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--new_tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["training", "forward", "decoding"])
    parser.add_argument("--default_allocator", action="store_true")
    options = parser.parse_args(arguments)
    if not options.default_allocator:
        keep_big_blocks()
    check_file(options.nanogpt)
    check_file(options.mega_pytorch)
    dtypes = {"float32": torch.float32}
    if bfloat16_is_faster():  # elsewhere it would take hours
        dtypes["bfloat16"] = torch.bfloat16
    for name, dtype in dtypes.items():
        if options.only in (None, "training"):
            compare_training(options, name, dtype)
        if options.only in (None, "forward"):
            compare_forward(options, name, dtype)
    if options.only in (None, "decoding"):
        compare_decoding(options)


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, MODEL["vocab_size"], (rows, length))


def compare_training(options, dtype_name: str, dtype: torch.dtype):
    ours = MegaForCausalLM(MegaConfig(**MODEL))
    for length in options.lengths:
        models = {"mega.py": ours.train(), "transformers": build_theirs().train()}
        if options.nanogpt:
            models["nanoGPT"] = build_nanogpt(options.nanogpt, length)
        if options.mega_pytorch:
            models["Mega-pytorch"] = MegaPytorch(options.mega_pytorch).train()
        ids = random_ids(max(4096 // length, 1), length)
        step = functools.partial(train_step, ids=ids, dtype=dtype)
        by_turns(f"train, {dtype_name}, {length}", models, step, ids.numel(), options.rounds)


def compare_forward(options, dtype_name: str, dtype: torch.dtype):
    for chunking in (True, False):
        for length in options.lengths if chunking else [n for n in options.lengths if n < 9000]:
            ours = MegaForCausalLM(MegaConfig(**MODEL | {"use_chunking": chunking}))
            models = {
                "mega.py": ours.eval(),
                "transformers": build_theirs(use_chunking=chunking).eval(),
            }
            work = functools.partial(forward, ids=random_ids(1, length), dtype=dtype)
            what = f"forward, {'chunks' if chunking else 'whole'}, {dtype_name}, {length}"
            by_turns(what, models, work, length, options.rounds)


def compare_decoding(options):
    n = options.new_tokens
    ours = MegaForCausalLM(MegaConfig(**MODEL | {"use_chunking": False})).eval()
    theirs = build_theirs(use_chunking=False).eval()
    greedy = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 1, "eos_token_id": None}
    calls = {
        "mega.py": lambda: ours.generate(random_ids(1, 8), n, 0),
        "the bare loop": lambda: bare_loop(ours, random_ids(1, 8), n),
        "transformers": lambda: theirs.generate(random_ids(1, 8), **greedy),
    }
    by_turns(f"greedy decoding of {n} tokens", calls, lambda call: call(), n, options.rounds)
    most = tokens_per_second_at_most(ours)
    print(f"greedy decoding, if a token took no longer than reading the weights once: {most:,.0f}")


if __name__ == "__main__":
    run(main)
