"""Continue a prompt with a trained model.

python sample.py --prompt "The function"
echo "The function" | python sample.py --temperature 0
"""

import codecs
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.prepare import Parser, Tokenizer, UserError, decode, load_tokenizer, run, short
from mega import MegaForCausalLM


def load_model(folder: Path) -> tuple[MegaForCausalLM, Tokenizer]:
    """The checkpoint of a folder, in eval mode, and its tokenizer."""
    try:
        model = MegaForCausalLM.from_pretrained(folder)
    except FileNotFoundError as error:
        name = Path(error.filename or "model.safetensors").name
        missing = f"there is no checkpoint in {folder} ({name} is missing)"
        raise UserError(f"{missing}; python train.py makes one, --out_dir names another") from None
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the checkpoint in {folder} can't be read ({short(error)})") from None
    codec = load_tokenizer(folder)
    if codec.size != model.config.vocab_size:
        sizes = f"{codec.size} tokens and its model {model.config.vocab_size}"
        raise UserError(f"{folder}'s tokenizer has {sizes}; they do not belong together")
    return model, codec


def continue_text(model: MegaForCausalLM, codec: Tokenizer, prompt: str, write, **options):
    """Call `write` with the pieces of the prompt's continuation, as they come.

    An empty prompt starts a new document, and a document's end ends the sample. `options` are
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
    model.generate(ids, eos_token_id=codec.end_of_text, stream=stream, **options)
    write(decoder.decode(b"", final=True))


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={name} can't be used here ({short(error)})") from None


def read_prompt(prompt: str | None) -> str:
    """The flag's text; with "-", or without the flag at the end of a pipe, standard input."""
    if sys.stdin is not None and (prompt == "-" or (prompt is None and not sys.stdin.isatty())):
        text = decode(sys.stdin.buffer.read(), "standard input")
        return text.removesuffix("\n").removesuffix("\r")
    # What is not UTF-8 on a command line arrives as surrogates, which no tokenizer knows.
    return (prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--prompt", help='text to continue; "-" or a pipe: standard input')
    parser.add_argument("--out_dir", default="out", help="the checkpoint (default: out)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest that hold this much")
    parser.add_argument("--seed", type=int, default=1337, help="default: 1337")
    parser.add_argument("--num_samples", type=int, default=1, help="default: 1")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    options = vars(parser.parse_args())
    samples, seed = options.pop("num_samples"), options.pop("seed")
    if samples < 1:
        raise UserError(f"--num_samples must be at least 1, got {samples}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
    device, prompt = choose_device(options.pop("device")), read_prompt(options.pop("prompt"))
    model, codec = load_model(Path(options.pop("out_dir")))
    model.to(device)

    def write(text: str):
        print(text, end="", flush=True)

    for i in range(samples):
        write(f"--- sample {i + 1} of {samples}\n" * (samples > 1) + prompt)
        try:
            continue_text(model, codec, prompt, write, seed=seed + i, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        write("\n")


if __name__ == "__main__":
    run(main)
