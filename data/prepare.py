"""Turn a text into token files that train.py reads.

    python data/prepare.py wikitext-2            # downloads it (or wikitext-103)
    python data/prepare.py wikitext-2 --source FILE_OR_FOLDER_OR_URL
    python data/prepare.py pydocs                # English that ships with Python, no network
    python data/prepare.py my_text.txt           # a text file, or a folder or zip of them

It writes data/<name>/{train,val,test}.bin (token ids, the smallest unsigned integers that hold the
vocabulary), the tokenizer (tokenizer.tiktoken, tokenizer_meta.json) and, last, meta.json: how the
data were made, and the documents, bytes, words and tokens of each split.
"""

import ast
import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
if not __package__:  # run as a script, Python looks for modules in data/ alone
    sys.path.insert(0, str(DATA.parent))

from data.common import DownloadError, Parser, UserError, run, short, write_whole

WIKITEXT = {  # addresses in the order to try, size in bytes and sha256 if known, lines of a split
    "wikitext-2": {
        "urls": [
            "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        ],
        "size": 4_721_645,
        "sha256": "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        "lines": {"train": 36_718, "val": 3_760, "test": 4_358},
    },
    "wikitext-103": {
        "urls": ["https://wikitext.smerity.com/wikitext-103-raw-v1.zip"],
        "lines": {"train": 1_801_350, "val": 3_760, "test": 4_358},
    },
}
SPLITS = {"train": "train", "val": "valid|val|validation", "test": "test"}
ENDINGS = {".txt", ".md", ".rst", ".raw", ".tokens", ".text"}  # of text files
TAKEN = ("small", "lecture")  # folders in data/ that are no datasets
TOKENIZERS = ("bpe", "bytes", "gpt2")
# GPT-2's way to cut text into words, written without look-ahead, which rustbpe does not know.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_PATTERN = r"[\s\S]"


# -------------------------------------------------------------------------------------- tokenizer


@dataclass
class Tokenizer:
    """Byte-level BPE in tiktoken: `ranks` are its tokens in the order of merging, and their ids.

    `end_of_text` stands before each document; it may be one more id after those of `ranks`.
    """

    ranks: dict[bytes, int]
    pattern: str
    end_of_text: int

    def __post_init__(self):
        new = self.end_of_text == len(self.ranks)
        self.encoding = tiktoken.Encoding(
            "mega",
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": self.end_of_text} if new else {},
        )
        self.size = len(self.ranks) + new

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class RobertaTokenizer:
    """RoBERTa's: GPT-2's byte-level BPE in tiktoken, with ids of its own and special tokens.

    `vocab` (vocab.json) gives each token's id, `merges` (merges.txt) the pairs to merge, in order.
    """

    def __init__(self, vocab: dict[str, int], merges: list[list[str]]):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        # GPT-2 writes each byte as a character that can be seen: a space is Ġ.
        characters = {chr(byte): byte for byte in plain}
        characters |= {chr(256 + i): byte for i, byte in enumerate(others)}
        written = {bytes([byte]): character for character, byte in characters.items()}
        for left, right in merges:
            token = left + right
            written.setdefault(bytes(characters[c] for c in token), token)
        ranks = {token: rank for rank, token in enumerate(written)}
        special = [name for name in vocab if re.fullmatch("<[^<>]+>", name)]
        self.encoding = tiktoken.Encoding(
            "roberta",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: len(ranks) + i for i, name in enumerate(special)},
        )
        ids = [vocab.get(name, vocab["<unk>"]) for name in written.values()]
        self.ids = [*ids, *(vocab[name] for name in special)]  # of tiktoken's ranks
        self.bytes = dict(zip(ids, written, strict=True))
        self.bytes.pop(vocab["<unk>"], None)  # any byte that the vocabulary lacks
        self.start, self.end_of_text, self.mask = vocab["<s>"], vocab["</s>"], vocab.get("<mask>")
        self.size = max(vocab.values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of <s> and the text, in which special tokens are what they are called."""
        text = re.sub(r"\s+<mask>", "<mask>", text)  # a mask stands for a word and its space
        return [
            self.start,
            *(self.ids[r] for r in self.encoding.encode(text, allowed_special="all")),
        ]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text without special tokens."""
        return b"".join(self.bytes.get(i, b"") for i in ids)


def load_roberta(vocab: Path, merges: Path) -> RobertaTokenizer:
    try:
        lines = merges.read_text("utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return RobertaTokenizer(json.loads(vocab.read_text("utf-8")), pairs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer in {vocab.parent} is damaged ({short(error)})") from None


def new_tokenizer(kind: str, vocab_size: int, documents: list[str]) -> Tokenizer:
    """kind "bpe": trained on `documents`, at most vocab_size ids; "bytes": 256; "gpt2": 50257."""
    single_bytes = {bytes([i]): i for i in range(256)}
    if kind == "bytes":
        return Tokenizer(single_bytes, BYTE_PATTERN, end_of_text=0)  # a byte that texts hardly use
    if kind == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(
                f"GPT-2's vocabulary could not be downloaded ({short(error)}); "
                "use --tokenizer bpe or bytes, which need no network"
            ) from None
        return Tokenizer(gpt2._mergeable_ranks, gpt2._pat_str, gpt2.eot_token)
    if not 257 <= vocab_size <= 1 << 20:
        raise UserError(f"vocab_size must be from 257 to {1 << 20} for bpe, got {vocab_size}")
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(documents), vocab_size - 1, pattern=WORD_PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return Tokenizer(ranks, WORD_PATTERN, end_of_text=len(ranks))


TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer_meta.json")


def save_tokenizer(tokenizer: Tokenizer, folder: Path):
    ranks = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]
    write_whole(folder / "tokenizer.tiktoken", b"".join(lines))
    meta = {"pattern": tokenizer.pattern, "end_of_text": tokenizer.end_of_text}
    write_whole(folder / "tokenizer_meta.json", json.dumps(meta, indent=2).encode())


def load_tokenizer(folder: Path) -> Tokenizer:
    try:
        meta = json.loads((folder / "tokenizer_meta.json").read_bytes())
        rows = [line.split() for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
        if not 0 <= meta["end_of_text"] <= len(ranks):
            raise ValueError(f"end_of_text is {meta['end_of_text']}")
        return Tokenizer(ranks, meta["pattern"], meta["end_of_text"])
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no tokenizer: {error.filename} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged ({short(error)})") from None


# ------------------------------------------------------------------------------- files and network


TIMEOUT = 20  # seconds without an answer before a download is given up


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None):
    """Fetch a zip into a file, checked; DownloadError, and nothing left, if it is not the one."""
    new = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_url(url, new)
        if size is not None and new.stat().st_size != size:
            raise DownloadError(f"{url} has {new.stat().st_size:,} bytes, not {size:,}")
        if sha256 and hashlib.sha256(new.read_bytes()).hexdigest() != sha256:
            raise DownloadError(f"{url} is not the expected file: its sha256 differs")
        if not zipfile.is_zipfile(new):
            raise DownloadError(f"{url} gave something else than a zip file")
        os.replace(new, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} could not be downloaded ({short(error)})") from None
    finally:
        new.unlink(missing_ok=True)


def copy_url(url: str, path: Path):
    """Copy the body of an answer to a file, with a progress bar; OSError if it breaks off."""
    # Some hosts answer 403 to Python's own User-Agent.
    request = urllib.request.Request(url, headers={"User-Agent": "mega/1.0"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        size = answer.length
        bar = {"total": size, "desc": path.name, "unit": "B", "unit_scale": True, "disable": None}
        with tqdm.wrapattr(answer, "read", **bar) as body:
            shutil.copyfileobj(body, file)
    got = path.stat().st_size
    if size is not None and got != size:
        raise OSError(f"it broke off after {got:,} of {size:,} bytes; try again")


def decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UserError(
            f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert it first"
        ) from None


def text_paths(source: Path) -> list[Path]:
    """A file itself, or the text files under a folder."""
    if not source.is_dir():
        return [source]
    return sorted(p for p in source.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())


def read_files(source: Path) -> dict[str, bytes]:
    """Name -> content of a text file, or of the text files in a folder or zip, in order."""
    if not source.exists():
        raise UserError(f"{source} does not exist; give a text file, a zip or a folder")
    if source.is_file() and (source.suffix == ".zip" or zipfile.is_zipfile(source)):
        return unzip(source)
    root = source if source.is_dir() else source.parent
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in text_paths(source)}
    if not files:
        raise UserError(f"{source} has no text files ({', '.join(sorted(ENDINGS))})")
    return files


def unzip(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in sorted(archive.namelist()) if Path(m).suffix.lower() in ENDINGS]
            members = [m for m in members if "__MACOSX" not in m]  # a Mac's notes, not texts
            return {member: archive.read(member) for member in members}
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable zip file ({short(error)})") from None


# ------------------------------------------------------------------------------------- documents


def split_files(files: dict[str, bytes]) -> dict[str, str]:
    """Split -> text, from names such as wiki.train.tokens, train.txt or validation.txt."""
    texts = {}
    for split, words in SPLITS.items():
        pattern = rf"(?:^|.*[._-])(?:{words})(?:[._-].*)?"
        found = [n for n in files if re.fullmatch(pattern, n.rsplit("/", 1)[-1].lower())]
        if len(found) > 1:
            raise UserError(f"several files for the {split} split, keep one: {', '.join(found)}")
        if found:
            texts[split] = decode(files[found[0]], found[0])
    return texts


def articles(text: str) -> list[str]:
    """A WikiText split cut before each title, a line ` = Title = `."""
    return [part for part in re.split(r"(?m)^(?= = [^=\n]+ = $)", text) if part]


def wikitext(name: str, source: str | None) -> dict[str, list[str]]:
    about = WIKITEXT[name]
    texts = split_files(fetch(source, DATA / name) if source else fetch_wikitext(name))
    if not texts:
        raise UserError(
            f"{source or name} has no file named like wiki.train.raw or test.txt; "
            "for a text of your own give its path as the dataset"
        )
    wrong = {
        split: text.count("\n")
        for split, text in texts.items()
        if text.count("\n") != about["lines"][split]
    }
    if wrong:
        found = ", ".join(f"{s} {n:,} (not {about['lines'][s]:,})" for s, n in wrong.items())
        if not source:
            raise UserError(f"{name}'s download has other lines than it should: {found}")
        print(f"note: {source} has other lines than {name}: {found}")
    return {split: articles(text) for split, text in texts.items()}


def fetch_wikitext(name: str) -> dict[str, bytes]:
    """The files of the zip, from an earlier download or the first address that has it."""
    about, errors = WIKITEXT[name], []
    path = DATA / name / "raw.zip"
    if not path.exists():
        for url in about["urls"]:
            try:
                download(url, path, about.get("size"), about.get("sha256"))
                break
            except DownloadError as error:
                errors.append(str(error))
        else:
            raise DownloadError("; ".join(errors))
    return unzip(path)


def fetch(source: str, folder: Path) -> dict[str, bytes]:
    """The files of a path, or of the zip at a URL, which passes through `folder`."""
    if not re.match(r"https?://", source):
        return read_files(Path(source))
    path = folder / "source.zip"
    download(source, path)
    try:
        return unzip(path)
    finally:
        path.unlink()


def pydocs() -> dict[str, list[str]]:
    """The language reference and the standard library's docstrings, one document a module."""
    from pydoc_data import topics

    documents = [f"{name}\n\n{text}" for name, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if skipped.isdisjoint(relative.parts):
            text = docstrings(path.read_bytes())
            if text:
                documents.append(f"{relative.as_posix()}\n\n{text}")
    return split_documents(documents)


def docstrings(source: bytes) -> str:
    """All docstrings of a Python file in its order, without running it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    except (SyntaxError, ValueError):  # some files of the library are wrong on purpose
        return ""
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = []
    for node in nodes:
        text = ast.get_docstring(node)
        if text:
            name = getattr(node, "name", "")
            found.append(f"{name}\n{text}" if name else text)
    return "\n\n".join(found)


def split_documents(documents: list[str]) -> dict[str, list[str]]:
    """Every 20th document for validation, another for the test; few ones are cut by length."""
    documents = [document for document in documents if document.strip()]
    if len(documents) >= 40:
        splits = {"train": [], "val": documents[7::20], "test": documents[17::20]}
        splits["train"] = [d for i, d in enumerate(documents) if i % 20 not in (7, 17)]
        return splits
    text = "\n".join(documents)
    first, second = (border(text, len(text) * part // 100) for part in (90, 95))
    parts = {"train": text[:first], "val": text[first:second], "test": text[second:]}
    return {split: [part] for split, part in parts.items() if part.strip()}


def border(text: str, near: int) -> int:
    """The start of the next line, or `near` itself where the text's last line has begun."""
    start = text.find("\n", near) + 1
    return start if 0 < start < len(text) else near


def own_text(source: str, folder: Path) -> dict[str, list[str]]:
    files = fetch(source, folder)
    texts = split_files(files) if len(files) > 1 else {}
    if {"train", "val"} <= texts.keys():
        return {split: [text] for split, text in texts.items()}
    return split_documents([decode(content, name) for name, content in files.items()])


# --------------------------------------------------------------------------------------- prepare


def prepare(
    dataset: str,
    source: str | None = None,
    train_split: str = "train",
    val_split: str = "val",
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
) -> Path:
    """Make data/<name>/ unless it is there already, made in the same way; return the folder."""
    source = source or None
    if dataset == "pydocs" and source:
        raise UserError(f"pydocs has no source; give {source} as the dataset")
    known = dataset in WIKITEXT or dataset == "pydocs"
    for split in (train_split, val_split):
        if split not in SPLITS:
            raise UserError(f"a split is {', '.join(SPLITS)}, not {split!r}")
    name = dataset if known else re.sub(r"\W+", "_", Path(dataset).stem) or "text"
    folder = DATA / (f"{name}_text" if name in TAKEN else name)
    made_by = {
        "dataset": dataset,
        "source": source,
        "files": fingerprint(source or ("" if known else dataset)),
        "train_split": train_split,
        "val_split": val_split,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
    }
    if read_meta(folder).get("made_by") == made_by:
        return folder
    if dataset in WIKITEXT:
        found = wikitext(dataset, source)
    else:
        found = pydocs() if dataset == "pydocs" else own_text(source or dataset, folder)
    if not any(document.strip() for documents in found.values() for document in documents):
        raise UserError(f"{source or dataset} is empty")
    splits = {}
    for split, wanted in (("train", train_split), ("val", val_split), ("test", "test")):
        if wanted in found:
            splits[split] = found[wanted]
        elif split != "test":
            raise UserError(
                f"{source or dataset} has no {wanted!r} split, only {', '.join(found)}; "
                f"choose one with --{split}_split"
            )
    for split, documents in splits.items():
        if not any(document.strip() for document in documents):
            raise UserError(f"the {split} split of {source or dataset} is empty")

    codec = new_tokenizer(tokenizer, vocab_size, splits["train"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # until all the rest is there
    save_tokenizer(codec, folder)
    size = codec.size
    dtype = "uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "uint32"
    meta = {"made_by": made_by, "tokens_in_vocabulary": size, "dtype": dtype, "splits": {}}
    for split, documents in splits.items():
        tokens = np.concatenate(
            [np.array([codec.end_of_text, *codec.encode(text)], dtype) for text in documents]
        )
        write_whole(folder / f"{split}.bin", tokens.tobytes())
        meta["splits"][split] = {
            "documents": len(documents),
            "bytes": sum(len(document.encode()) for document in documents),
            # As the WikiText paper counts: the end of a line is a word.
            "words": sum(len(document.split()) + document.count("\n") for document in documents),
            "tokens": len(tokens),
        }
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())
    return folder


def fingerprint(source: str) -> list:
    """Names, sizes and times of local files, so that a changed text is noticed."""
    if not source or "://" in source:
        return []
    stats = [(str(p.resolve()), p.stat()) for p in text_paths(Path(source)) if p.exists()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def read_meta(folder: Path) -> dict:
    """The content of meta.json; empty if the folder is not complete."""
    try:
        return json.loads((folder / "meta.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def main():
    parser = Parser(__doc__)
    parser.add_argument("dataset", help="wikitext-2, wikitext-103, pydocs, or a path")
    parser.add_argument("--source", help="where to read it: a file, zip, folder or URL of a zip")
    parser.add_argument("--train_split", default="train", choices=SPLITS)
    parser.add_argument("--val_split", default="val", choices=SPLITS)
    parser.add_argument("--tokenizer", default="bpe", choices=TOKENIZERS)
    parser.add_argument("--vocab_size", type=int, default=4096, help="of bpe (default: 4096)")
    start = time.time()
    folder = prepare(**vars(parser.parse_args()))
    for split, counts in read_meta(folder)["splits"].items():
        print(f"{split}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print(f"{folder} is ready ({time.time() - start:.1f} s)")


if __name__ == "__main__":
    run(main)
