"""Compare how well MEGA and other models learn in train.py's loop in the same time.

    python -m data.lecture.learn --nanogpt ../nanoGPT/model.py --nanogpt_dropout 0.2 --max_minutes=5
    python -m data.lecture.learn --transformers       # their MEGA; needs transformers==4.40.2

All other flags are train.py's, for all models: text, optimizers, schedule, precision, batches.
"""

import argparse
import contextlib
import functools
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import train
from data.common import keep_big_blocks, run
from data.lecture.compare import check_file, load_file
from mega import MegaOutput, cross_entropy

# ------------------------------------------------------------------------------------ other models


class NanoGPT(nn.Module):
    """nanoGPT's model, called as MegaForCausalLM is in train.py."""

    def __init__(self, path: str, s, codec):
        super().__init__()
        nanogpt = load_file(path)
        sizes = {"n_layer": s.n_layer, "n_head": 4, "n_embd": s.n_embd, "vocab_size": codec.size}
        config = nanogpt.GPTConfig(block_size=s.block_size, dropout=s.dropout, bias=False, **sizes)
        self.gpt = nanogpt.GPT(config)

    def forward(self, ids: Tensor, labels: Tensor, **_) -> MegaOutput:
        targets = labels.masked_fill(labels == -100, -1).contiguous()  # nanoGPT's ignored label
        return MegaOutput(loss=self.gpt(ids, targets)[1])


class Transformers(nn.Module):
    """transformers' MEGA with our initial weights, called like ours in train.py.

    It lacks the final norm and the scaling of embeddings; its feature dropout drops whole chunks
    (fault 17 in checkpoints.md), so plain dropout is used here.
    """

    def __init__(self, s, codec):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        ours = train.new_model(s, codec)
        config = ours.config.to_dict() | {"use_feature_dropout": False}
        self.lm = transformers.MegaForCausalLM(transformers.MegaConfig(**config))
        self.lm.load_state_dict(ours.state_dict(), strict=False)
        self.chunk = config["chunk_size"]

    def forward(self, ids: Tensor, labels: Tensor, **_) -> MegaOutput:
        whole = (0, -ids.shape[1] % self.chunk)  # it accepts whole chunks only
        logits = self.lm(F.pad(ids, whole), use_cache=False).logits
        return MegaOutput(loss=cross_entropy(logits.float(), F.pad(labels, whole, value=-100)))


# ---------------------------------------------------------------------------------------- learning


def learn(s, make_model=train.new_model, after_step=lambda t: None) -> train.Training:
    """Train a model from the first to the last step, in a temporary folder; return the Training."""
    if s.threads:
        torch.set_num_threads(s.threads)
    with tempfile.TemporaryDirectory() as s.out_dir, contextlib.redirect_stdout(sys.stderr):
        t = train.Training(s, train.Distributed(s.device), make_model)  # its output goes to stderr
        with tqdm(total=1.0, leave=False, disable=None) as bar:
            while t.progress() < 1:
                t.train_step()
                after_step(t)
                bar.update(t.progress() - bar.n)
    return t


def speed(t: train.Training) -> float:
    """Return the training speed in tokens per second."""
    return t.step * t.sequences * t.settings.block_size / t.seconds


def nats_in_overlapping_windows(model, tokens: Tensor, length: int, autocast) -> float:
    """Sum the nats over windows that overlap by half; only each window's new tokens count."""
    total, half = 0.0, length // 2
    for start in range(0, len(tokens) - 1, half):
        window = tokens[None, start : start + length + 1]
        targets = window[:, 1:].clone()
        targets[:, : length - half if start else 0] = -100
        total += train.summed_loss(model, window[:, :-1], targets, autocast)[0]
    return total


def show(name: str, s, make_model=train.new_model):
    """Train a model, and print how well it then predicts the validation split."""
    t, ours, length, found = learn(s, make_model), make_model is train.new_model, s.block_size, {}
    for context in (str(length), *(("carried", "sliding") if ours else ())):
        about = f"windows of {context}" if context.isdigit() else context
        found[about] = train.evaluate(t.model, t.corpus, "val", context, t.autocast)
    if not ours:
        tokens = t.corpus.ids("val")
        nats = nats_in_overlapping_windows(t.model.eval(), tokens, length, t.autocast)
        found[f"overlapping windows of {length}"] = train.in_units(nats, t.corpus, "val")
    print(
        f"{name}, {s.dropout=}: {t.step} steps in {t.seconds:.0f} s, {speed(t):,.0f} tokens/s, "
        f"train loss {np.mean(t.losses[-100:]):.4f}"
    )
    for context, result in found.items():
        print(f"    {train.report(f'val, {context}', result)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--transformers", action="store_true", help="also train their MEGA")
    parser.add_argument("--nanogpt", metavar="MODEL_PY", help="also train nanoGPT: its model.py")
    parser.add_argument("--nanogpt_dropout", default="0.2", help="nanoGPT's, in place of --dropout")
    parser.add_argument("--rounds", type=int, default=1)
    mine, others = parser.parse_known_args()
    check_file(mine.nanogpt)
    keep_big_blocks()
    for _ in range(mine.rounds):
        show("MEGA", train.read_settings(others))
        if mine.transformers:
            show("transformers' MEGA", train.read_settings(others), Transformers)
        if mine.nanogpt:
            flags = [*others, f"--dropout={mine.nanogpt_dropout}"]
            make_model = functools.partial(NanoGPT, mine.nanogpt)
            show("nanoGPT", train.read_settings(flags), make_model)


if __name__ == "__main__":
    run(main)
