"""What `python mega.py` shows: that the modes of the EMA agree, what each costs, and tokens/s."""

import statistics
import time

import torch

from mega import EMA_MODES, DampedEMA, MegaConfig, MegaForCausalLM
from train import choose_dtype, keep_big_blocks

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


def show_agreement():
    print("1. The EMA's modes compute the same: largest difference from the definition, `direct`,")
    print("   of outputs and of gradients, relative to the largest number (L 200, D 256, N 16)\n")
    for dtype in (torch.float64, torch.float32):
        found = {}
        for mode in EMA_MODES:
            inputs = ema_inputs(200, dtype)
            y = run_ema(mode, inputs)
            (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
            found[mode] = [y.detach(), *(t.grad for t in inputs)]
        for mode in EMA_MODES:
            pairs = zip(found[mode], found["direct"], strict=True)
            errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
            line = f"y {errors[0]:.1e}, gradients of x {errors[1]:.1e}, of u, q, g"
            print(f"   {str(dtype)[6:]} {mode:10} {line} {max(errors[2:]):.1e}")
    print()


def show_ema_costs():
    print(
        "2. Milliseconds, forward and backward, and MiB kept for the backward pass (D 256, N 16)\n"
    )
    print("   " + " " * 7 + "".join(f"{mode:>20}" for mode in EMA_MODES))
    for length in (16, 64, 256, 1024, 4096, 16384, 65536):
        line = f"   L {length:5}"
        for mode in EMA_MODES:
            cell = "-"
            if length <= LONGEST[mode]:
                inputs = ema_inputs(length, torch.float32)
                ms = 1e3 * seconds(lambda m=mode, i=inputs: run_ema(m, i).sum().backward())
                mib = kept_bytes(lambda m=mode, i=inputs: run_ema(m, i)) / 2**20
                cell = f"{ms:.1f} ms {mib:6.1f} M"
            line += f"{cell:>20}"
        print(line, flush=True)
    print()


def show_training():
    dtype = choose_dtype("auto", torch.device("cpu"))
    print(f"3. Training steps (forward, loss, backward), {str(dtype)[6:]}: tokens/s\n")
    model = MegaForCausalLM(MegaConfig(**MODEL)).train()

    def step(ids: torch.Tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        model.zero_grad()
        loss.backward()

    for length in (256, 1024, 4096, 16384):
        ids = torch.randint(MODEL["vocab_size"], (max(4096 // length, 1), length))
        speed = ids.numel() / seconds(lambda ids=ids: step(ids), 2)
        print(f"   {len(ids):2} rows of {length:5}: {speed:7,.0f}", flush=True)
    print()


def show_decoding():
    print("4. Greedy decoding, one row, float32: tokens/s after so many tokens of context\n")
    for name, changes in (("in chunks of 128", {}), ("without chunks", {"use_chunking": False})):
        model, line = MegaForCausalLM(MegaConfig(**MODEL | changes)).eval(), f"   {name:17}"
        for length in (128, 1024, 4096, 16384) if not changes else (128, 1024, 4096):
            ids, times = torch.randint(MODEL["vocab_size"], (1, length)), []
            model.generate(ids, 60, 0, stream=lambda _, t=times: t.append(time.perf_counter()))
            steps = torch.tensor(times, dtype=torch.float64).diff().tolist()
            line += f"{length:>7}: {1 / statistics.median(steps):5.0f}"
        print(line, flush=True)


def main():
    keep_big_blocks()  # as train.py does
    print(f"PyTorch {torch.__version__} on {torch.get_num_threads()} CPU threads\n")
    show_agreement()
    show_ema_costs()
    show_training()
    show_decoding()
