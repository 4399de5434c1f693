"""Continue a prompt, or fill its masks, with a trained model.

The default model is the one that `python train.py` made in out/ or, until there is one, the small
one in data/small; --model names another.

python sample.py --prompt "The function"
echo "The function" | python sample.py --temperature 0
python sample.py --model mnaylor/mega-base-wikitext --task fill-mask \
    --prompt "Paris is the <mask> of France"
"""

import codecs
import os
import sys
import warnings
from pathlib import Path

import torch

from data.common import Parser, UserError, run, short
from data.machine import choose_device
from data.prepare import (
    DATA,
    RobertaTokenizer,
    Tokenizer,
    decode,
    load_roberta,
    load_tokenizer,
)
from mega import MegaForCausalLM, MegaForMaskedLM, draw, find_file, read_json

ABOUT_MASKS = (
    "{} learned to fill masks from the text on both sides. Here it fills one mask after another at "
    "the end of the text, with nothing to the right: expect weak text, and a full pass over it for "
    "each token. --task fill-mask is what it was trained for."
)
SMALL = DATA / "small"  # the trained model that comes with the project
KINDS = {"MegaForCausalLM": MegaForCausalLM, "MegaForMaskedLM": MegaForMaskedLM}


def load_model(source: str | Path, chunk_size: int = 0):
    """Return the language model of a folder or hub id, in eval mode, and its tokenizer.

    With chunk_size, attention sees chunks of that many tokens, not of the size used in training.
    """
    try:
        config = read_json(find_file(str(source), "config.json"))
        kind = "MegaForCausalLM" if config.get("is_decoder") else "MegaForMaskedLM"
        kind = next(iter(config.get("architectures") or [kind]), kind)
        if kind not in KINDS:
            raise UserError(f"{source} is a {kind}; sample.py needs a {' or a '.join(KINDS)}")
        model = KINDS[kind].from_pretrained(str(source))
        if chunk_size:
            model.set_chunk_size(chunk_size)
    except FileNotFoundError as error:
        mend = "make one with python train.py, or name another with --model"
        raise UserError(f"there is no checkpoint in {source} ({error}); {mend}") from None
    except OSError as error:
        raise UserError(f"the checkpoint in {source} can't be read ({error})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint in {source} can't be read ({short(error)})") from None
    wrong = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if wrong:
        raise UserError(f"the checkpoint in {source} is broken: {wrong[0]} is not finite")
    codec = find_tokenizer(str(source))
    sizes = f"{codec.size} tokens and its model {model.config.vocab_size}"
    # The table of a published model is sometimes padded to a round number of rows.
    padded = isinstance(codec, RobertaTokenizer) and codec.size < model.config.vocab_size
    if codec.size != model.config.vocab_size and not padded:
        raise UserError(f"{source}'s tokenizer has {sizes}; they do not belong together")
    return model, codec


def find_tokenizer(source: str) -> Tokenizer | RobertaTokenizer:
    try:
        first = Path(find_file(source, "tokenizer_meta.json", "vocab.json"))
        if first.name == "vocab.json":
            return load_roberta(first, Path(find_file(source, "merges.txt")))
        return load_tokenizer(Path(find_file(source, "tokenizer.tiktoken")).parent)
    except FileNotFoundError as error:
        raise UserError(f"{source} has no tokenizer: {error}") from None
    except OSError as error:
        raise UserError(f"{source}'s tokenizer can't be read ({short(error)})") from None


def continue_text(model: MegaForCausalLM | MegaForMaskedLM, codec, prompt: str, write, **options):
    """Call `write` with the pieces of the prompt's continuation, as they come.

    An empty prompt starts a new document, and an end-of-text token ends the sample. `options` are
    those of MegaForCausalLM.generate.
    """
    ids = codec.encode(prompt) or [codec.end_of_text]
    # A token may hold a part of a character: the decoder keeps it until the rest comes.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def stream(token: torch.Tensor):
        if token.item() != codec.end_of_text:
            write(decoder.decode(codec.decode_bytes(token.tolist())))

    device = next(model.parameters()).device
    ids = torch.tensor([ids], device=device)
    if isinstance(model, MegaForCausalLM):
        model.generate(ids, eos_token_id=codec.end_of_text, stream=stream, **options)
    else:
        append_masks(model, codec, ids, stream, **options)
    write(decoder.decode(b"", final=True))


@torch.no_grad()
def append_masks(model, codec, ids, stream, max_new_tokens, temperature, top_k, top_p, seed):
    """Continue ids (1, L) with a masked language model: append a mask, fill it, and repeat."""
    mask = ids.new_tensor([[mask_of(codec)]])
    generator = torch.Generator(ids.device).manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = model(torch.cat([ids, mask], 1)).logits[:, -1]
        token = draw(logits.float(), temperature, top_k, top_p, generator)
        stream(token)
        if token.item() == codec.end_of_text:
            break
        ids = torch.cat([ids, token.unsqueeze(1)], 1)


def mask_of(codec) -> int:
    if getattr(codec, "mask", None) is None:
        raise UserError("this model's vocabulary has no <mask>; use a checkpoint that has one")
    return codec.mask


@torch.no_grad()
def fill_masks(model: MegaForMaskedLM, codec, prompt: str, write, count: int):
    """Write the `count` likeliest tokens for each <mask> of the prompt, with probabilities."""
    if not isinstance(model, MegaForMaskedLM):
        raise UserError("--task fill-mask needs a MegaForMaskedLM; this model is a MegaForCausalLM")
    # A text starts with <s>, which RobertaTokenizer.encode adds, or with an end-of-text token.
    start = [codec.end_of_text] if isinstance(codec, Tokenizer) else []
    ids = torch.tensor([[*start, *codec.encode(prompt), codec.end_of_text]])
    masks = (ids[0] == mask_of(codec)).nonzero().flatten()
    if len(masks) == 0:
        raise UserError(f"--task fill-mask needs a prompt with <mask> in it, got {prompt!r}")
    logits = model(ids.to(next(model.parameters()).device)).logits[0, masks].float()
    probabilities, tokens = logits.softmax(-1).topk(min(count, logits.shape[-1]))
    for i in range(len(masks)):
        if len(masks) > 1:
            write(f"mask {i + 1} of {len(masks)}\n")
        for p, token in zip(probabilities[i].tolist(), tokens[i].tolist(), strict=True):
            text = codec.decode_bytes([token]).decode("utf-8", "replace")
            write(f"{p:7.2%} {text!r}\n")


def read_prompt(prompt: str | None) -> str:
    """Return --prompt, or standard input if it is "-", or if there is no flag but a pipe."""
    if prompt == "-" and sys.stdin is None:
        raise UserError("--prompt - reads standard input, which is closed")
    if sys.stdin is not None and (prompt == "-" or (prompt is None and not sys.stdin.isatty())):
        text = decode(sys.stdin.buffer.read(), "standard input")
        return text.removesuffix("\n").removesuffix("\r")
    # Bytes of a command line that are not UTF-8 arrive as surrogates, which can't be encoded.
    return (prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def note(text):
    print(f"note: {text}", file=sys.stderr)


def find_out() -> str:
    """Return the folder of train.py's model or, until there is one, of the one in data/small."""
    out = Path("out")
    # A run that has saved nothing yet has only a lock.
    if out.exists() and {p.name for p in out.iterdir()} - {"lock"}:
        return "out"
    note("there is no model in out/ yet, so data/small is used; train.py trains one of your own")
    return str(SMALL)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--prompt", help='text to continue; "-" or a pipe: standard input')
    help_model = "the checkpoint: a folder, or owner/name on Hugging Face's hub (default: out, or"
    help_model += " data/small while there is none)"
    parser.add_argument("--model", "--out_dir", help=help_model)
    tasks = ("generate", "fill-mask")
    parser.add_argument("--task", default="generate", choices=tasks, help="default: generate")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    help_top_k = "sample from the k likeliest tokens only; fill-mask: show k tokens (default: 5)"
    parser.add_argument("--top_k", type=int, help=help_top_k)
    parser.add_argument("--top_p", type=float, help="nucleus sampling: total probability to keep")
    parser.add_argument("--seed", type=int, default=1337, help="default: 1337")
    parser.add_argument("--num_samples", type=int, default=1, help="default: 1")
    help_chunk = "maximum number of tokens that attention sees (default: as in training)"
    parser.add_argument("--chunk_size", type=int, default=0, help=help_chunk)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    options = vars(parser.parse_args())
    top_k, top_p, temperature = options["top_k"], options["top_p"], options["temperature"]
    for name, valid, rule in (
        ("num_samples", options["num_samples"] >= 1, "at least 1"),
        ("seed", 0 <= options["seed"] < 1 << 63, "from 0 to 2^63 - 1"),
        ("max_new_tokens", options["max_new_tokens"] >= 0, "0 or more"),
        ("chunk_size", options["chunk_size"] >= 0, "0 or more"),
        ("temperature", 0 <= temperature < float("inf"), "finite and 0 or more"),
        ("top_k", top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not valid:
            raise UserError(f"--{name} must be {rule}, got {options[name]}")
    samples, seed, task = options.pop("num_samples"), options.pop("seed"), options.pop("task")
    device, prompt = choose_device(options.pop("device")), read_prompt(options.pop("prompt"))
    warnings.showwarning = lambda message, *_: note(message)
    source = options.pop("model")
    source = find_out() if source is None else os.path.expanduser(source)
    model, codec = load_model(source, options.pop("chunk_size"))
    model.to(device)

    def write(text: str):
        print(text, end="", flush=True)

    try:
        if task == "fill-mask":
            fill_masks(model, codec, prompt, write, top_k or 5)
            return
        if isinstance(model, MegaForMaskedLM):
            note(ABOUT_MASKS.format(source))
        for i in range(samples):
            if samples > 1:
                write(f"--- sample {i + 1} of {samples}\n")
            write(prompt)
            continue_text(model, codec, prompt, write, seed=seed + i, **options)
            write("\n")
    except ValueError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run(main)
