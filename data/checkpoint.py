"""Checkpoints in Hugging Face's layout: a config.json, and weights in one file or in shards.

What mega.py's models do with their weights as a whole: `from_pretrained` is read and fill,
`save_pretrained` is write, `resize_token_embeddings` is resize.

    python -m data.checkpoint out data/small    # a copy for sample.py, its weights in bfloat16
"""

import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.hub import find_file

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")  # the first found is read
BACKBONE = r"layers\.\d+\.(mega_layer|nffn)\.|word_embeddings"  # what no checkpoint may lack


def write(model: nn.Module, folder: str | Path):
    """Write config.json and model.safetensors, first under other names, so that old ones stay."""
    tensors = [*model.named_parameters(), *model.named_buffers()]  # a tied one only once
    weights = {name: tensor.data.contiguous() for name, tensor in tensors}
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    files = {"config.json": json.dumps(config, indent=2).encode()}
    files["model.safetensors"] = save(weights, metadata={"format": "pt"})
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():
            Path(folder, name + ".part").write_bytes(content)
        for name in files:
            Path(folder, name + ".part").replace(Path(folder, name))
    finally:
        for name in files:
            Path(folder, name + ".part").unlink(missing_ok=True)


def read(source: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a folder, or of a repository `owner/name` of the hub.

    Tensors are named as in a bare model or, outside of it, in a head. FileNotFoundError if a file
    is missing, OSError if it can't be had, ValueError if it can't be read.
    """
    config = read_json(find_file(source, "config.json"))
    paths = [find_file(source, *WEIGHTS)]
    if paths[0].endswith(".json"):
        shards = read_json(paths[0]).get("weight_map", {}).values()
        paths = [find_file(source, Path(shard).name) for shard in sorted(set(shards))]
    weights = {}
    for path in paths:
        try:
            safe = path.endswith(".safetensors")
            weights |= load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # damaged files make the readers raise many kinds
            raise ValueError(f"{path} can't be read ({error})") from error
    # torch.compile and DDP leave prefixes, and a head calls the bare model `mega`.
    plain = {re.sub(r"\b(_orig_mod|module|mega)\.", "", name): x for name, x in weights.items()}
    return config, plain


def read_json(path: str) -> dict:
    try:
        return {**json.loads(Path(path).read_text("utf-8"))}
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise ValueError(f"{path} can't be read ({error})") from None


def fill(model: nn.Module, weights: dict[str, Tensor], ignore_mismatched_sizes: bool, source: str):
    """Copy tensors that `read` found into the model; ValueError names the first that does not fit.

    What may be lacking (a head, a cross-attention, a pooler), and with ignore_mismatched_sizes all
    that does not fit, stays as it was initialised, and one warning names it.
    """
    weights, fresh = dict(weights), []
    if model.output.endswith("lm_head"):  # a tied file has one of two; else the output's wins
        words, output = "embedding_layer.word_embeddings.weight", f"{model.output}.weight"
        weights.setdefault(output, weights.get(words))
        if model.config.tie_word_embeddings:
            weights[words] = weights[output]
    for name, tensor in model.state_dict().items():
        value = weights.pop(name.removeprefix("mega."), None)
        both = value is not None and "ema_gate" in name and len(value) == 2 * len(tensor)
        if ignore_mismatched_sizes and both and not model.config.bidirectional:
            value = value[: len(tensor)]  # of two directions the first, from left to right
        if value is not None and value.shape == tensor.shape:
            tensor.copy_(value)
            continue
        optional = value is None and not re.search(BACKBONE, name)
        if not (optional or ignore_mismatched_sizes):
            raise ValueError(f"{source}: {misfit(model.config, name, value, tensor)}")
        fresh.append(name)
    trained = rf"{BACKBONE}|cross_attn|token_type" + r"|^dense\." * model.output.endswith("lm_head")
    unused = [n for n in weights if re.search(trained, n) and "_float_tensor" not in n]
    lists = {"initialised anew": fresh, "not used": unused}
    said = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    if said:
        warnings.warn(f"{source}: {'; '.join(said)}", stacklevel=3)


def resize(model: nn.Module, size: int):
    """Keep the first `size` tokens, or add new ones, in place; ValueError if that can't be."""
    replace(model.config, vocab_size=size)  # which checks it
    resized = {}  # so that a tied parameter stays one
    for name, layer in model.named_modules():
        if name.endswith(("word_embeddings", "lm_head")):
            for key, old in list(layer.named_parameters()):
                std = model.config.initializer_range if old.dim() > 1 else 0  # biases start at 0
                new = old.data.new_empty(size, *old.shape[1:]).normal_(std=std)
                new[: len(old)] = old.data[:size]
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                setattr(layer, key, resized.setdefault(old, new))
            layer.num_embeddings = layer.out_features = size
    model.config.vocab_size = size


def misfit(config, name: str, found: Tensor | None, asked: Tensor) -> str:
    """What is wrong with a file's tensor, the settings that explain it, and the way on."""
    if found is None:
        kinds = "num_hidden_layers, normalization_type, relative_positional_bias or other layers"
        return f"tensor {name} is missing: are {kinds} those of the file, and is it of a MEGA?"
    said = f"tensor {name} is {tuple(found.shape)}, but the config asks for {tuple(asked.shape)}"
    if "ema_gate" in name and len(found) == 2 * len(asked):
        way = "or keep the half from left to right with ignore_mismatched_sizes=True"
        return f"{said}; the file needs bidirectional=True and is_decoder=False, {way}"
    if "ema_gate" in name and 2 * len(found) == len(asked):
        return f"{said}; the file needs bidirectional=False"
    sizes = {a for a, b in zip(asked.shape, found.shape, strict=False) if a != b}
    counted = bool(re.search("classifier|qa_outputs|token_type", name))
    numbers = {f.name: getattr(config, f.name) for f in fields(config) if f.type is int}
    del numbers["num_hidden_layers"]
    settings = [
        f"{setting}={number}"
        for setting, number in numbers.items()
        if {number, 2 * number - 1} & sizes
        and (setting in ("num_labels", "type_vocab_size")) == counted
    ]
    reason = f", due to {' or '.join(settings)}" if settings else ""
    return f"{said}{reason}; ignore_mismatched_sizes=True starts it anew"


def main():
    from data.prepare import Parser, Tokenizer, UserError, save_tokenizer
    from sample import load_model

    parser = Parser(__doc__)
    parser.add_argument("source", help="the folder of a model of train.py's")
    parser.add_argument("folder", type=Path, help="where its copy goes")
    options = parser.parse_args()
    model, codec = load_model(options.source)
    if not isinstance(codec, Tokenizer):
        raise UserError(f"{options.source} has not one of train.py's tokenizers; copy its files")
    write(model.bfloat16(), options.folder)
    save_tokenizer(codec, options.folder)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    from data.prepare import run

    run(main)
