"""How well MEGA and nanoGPT's model of the same size learn in the same minutes, by turns.

    python -m data.learn --nanogpt ../nanoGPT/model.py --nanogpt_dropout 0.2 --max_minutes=5

All other flags are train.py's, for both: text, optimizers, schedule, precision, batches.
"""

import argparse
import contextlib
import functools
import sys
import tempfile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import train
from data.compare import load_file
from data.prepare import run
from mega import MegaOutput


class NanoGPT(nn.Module):
    """nanoGPT's model, called as MegaForCausalLM is in train.py."""

    def __init__(self, path: str, s, codec):
        super().__init__()
        nanogpt = load_file(path)
        sizes = {"n_layer": s.n_layer, "n_head": 4, "n_embd": s.n_embd, "vocab_size": codec.size}
        config = nanogpt.GPTConfig(block_size=s.block_size, dropout=s.dropout, bias=False, **sizes)
        self.gpt = nanogpt.GPT(config)

    def forward(self, ids: Tensor, labels: Tensor, **_) -> MegaOutput:
        targets = labels.masked_fill(labels == -100, -1).contiguous()  # it ignores -1
        return MegaOutput(loss=self.gpt(ids, targets)[1])


def nats_in_overlapping_windows(model, tokens: Tensor, length: int, autocast) -> float:
    """As windows, but each begins half a length after the last, and only what is new counts."""
    total, half = 0.0, length // 2
    for start in range(0, len(tokens) - 1, half):
        window = tokens[None, start : start + length + 1]
        targets = window[:, 1:].clone()
        targets[:, : length - half if start else 0] = -100
        total += train.nats(model, window[:, :-1], targets, autocast)[0]
    return total


def learn(s, path: str | None):
    """Train for s.max_minutes MEGA or, with the path of its model.py, nanoGPT's, and say how well
    it then predicts the validation split.
    """
    with tempfile.TemporaryDirectory() as s.out_dir, contextlib.redirect_stdout(sys.stderr):
        make = None if path is None else functools.partial(NanoGPT, path)
        t = train.Training(s, train.Team(s.device), make)
        with tqdm(total=1.0, leave=False, disable=None) as bar:
            while t.progress() < 1:
                t.train_step()
                bar.update(t.progress() - bar.n)
    model, length = t.model.eval(), s.block_size
    found = {}
    for context in (str(length), *(("carried", "sliding") if path is None else ())):
        name = f"windows of {context}" if context.isdigit() else context
        found[name] = train.evaluate(model, t.corpus, "val", context, t.autocast)
    if path is not None:
        tokens = torch.from_numpy(t.corpus.tokens["val"].astype(np.int64))
        nats = nats_in_overlapping_windows(model, tokens, length, t.autocast)
        found[f"overlapping windows of {length}"] = train.in_units(nats, t.corpus, "val")
    speed = t.step * t.rows * length / t.seconds
    print(
        f"{'MEGA' if path is None else 'nanoGPT'}, {s.dropout=}: {t.step} steps in "
        f"{t.seconds:.0f} s, {speed:,.0f} tokens/s, train loss {np.mean(t.losses[-100:]):.4f}"
    )
    for context, result in found.items():
        print(f"    {train.report(f'val, {context}', result)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--nanogpt", required=True, help="the path of nanoGPT's model.py")
    parser.add_argument("--nanogpt_dropout", default="0.2", help="in place of --dropout")
    parser.add_argument("--rounds", type=int, default=1)
    mine, others = parser.parse_known_args()
    train.keep_big_blocks()
    for _ in range(mine.rounds):
        learn(train.read_settings(others), None)
        flags = [*others, f"--dropout={mine.nanogpt_dropout}"]
        learn(train.read_settings(flags), mine.nanogpt)


if __name__ == "__main__":
    run(main)
