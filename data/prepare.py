"""Turn a text into token files that train.py reads.

    python data/prepare.py wikitext-2            # downloads it (or wikitext-103)
    python data/prepare.py wikitext-2 --source FILE_OR_FOLDER_OR_URL
    python data/prepare.py shakespeare           # tiny Shakespeare, 1.1 MB (or enwik8, 100 MB)
    python data/prepare.py pydocs                # Python's own documentation; needs no network
    python data/prepare.py my_text.txt           # a text file, or a folder or zip of them

Files or folders named train, valid (or val) and test become those splits; a missing one is cut from
the training text. Names that begin with a dot are skipped.

It writes data/<name>/{train,val,test}.bin (token ids, in the smallest unsigned type that fits the
vocabulary), the tokenizer (tokenizer.tiktoken, tokenizer_meta.json) and, last, meta.json: how the
data were made, and the documents, characters, bytes, words and tokens counted in each split.
"""

import ast
import base64
import contextlib
import difflib
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
import uuid
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import rustbpe
import tiktoken
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
if not __package__:  # run as a script: Python then searches only data/ for modules
    sys.path.insert(0, str(DATA.parent))

from data.common import (
    DownloadError,
    Parser,
    UserError,
    locked,
    reading,
    run,
    short,
    write_whole,
)

# URLs in the order to try; size and sha256 of the download, where known. WikiText has one file
# per split, with the given number of lines; the others are one text, cut by `percent`.
PUBLISHED = {
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
    "shakespeare": {  # cut as in nanoGPT
        "urls": [
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
        ],
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "bytes": 1_115_394,
        "percent": {"train": (0, 90), "val": (90, 100)},
    },
    "enwik8": {
        "urls": ["http://mattmahoney.net/dc/enwik8.zip"],
        "bytes": 100_000_000,
        "percent": {"train": (0, 90), "val": (90, 95), "test": (95, 100)},
    },
}
SPLITS = {"train": "train", "val": "valid|val|validation|dev", "test": "test"}
ENDINGS = {".txt", ".md", ".rst", ".raw", ".tokens", ".text"}  # of text files
ARCHIVES = {".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"}
VERSION = 3  # of how texts are read; data from an older version are prepared again
LARGEST_TEXT = 4 << 30  # bytes, since a text is read into memory as a whole
LARGEST_VOCABULARY = 1 << 20  # tokens
TAKEN = ("small", "lecture")  # folders in data/ that are not datasets
TOKENIZERS = ("auto", "bpe", "bytes", "gpt2")
# Like GPT-2's pattern for splitting text into words, but without look-ahead, which rustbpe lacks.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_PATTERN = r"[\s\S]"


# -------------------------------------------------------------------------------------- tokenizer


@dataclass
class Tokenizer:
    """Byte-level BPE in tiktoken: `ranks` maps each token to its id, which is its merge rank.

    `end_of_text` precedes each document; it is an id in `ranks`, or the next one after them.
    `mask` is the last id, that of <mask>; if None, <mask> in a text is six ordinary characters.
    """

    ranks: dict[bytes, int]
    pattern: str
    end_of_text: int
    mask: int | None = None

    def __post_init__(self):
        special = {}
        if self.end_of_text == len(self.ranks):
            special["<|endoftext|>"] = self.end_of_text
        if self.mask is not None:
            special["<mask>"] = self.mask
        self.encoding = tiktoken.Encoding(
            "mega", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=special
        )
        self.size = len(self.ranks) + len(special)

    def with_mask(self) -> "Tokenizer":
        """Return this tokenizer with one more token, a mask."""
        return replace(self, mask=self.size)

    def encode(self, text: str) -> list[int]:
        if self.mask is None:
            return self.encoding.encode_ordinary(text)
        text = re.sub(r"\s+<mask>", "<mask>", text)  # a mask stands for a word and its space
        return self.encoding.encode(text, allowed_special={"<mask>"}, disallowed_special=())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class RobertaTokenizer:
    """GPT-2's byte-level BPE in tiktoken, with RoBERTa's own ids and special tokens.

    `vocab` (vocab.json) gives each token's id, `merges` (merges.txt) the pairs to merge, in order.
    """

    def __init__(self, vocab: dict[str, int], merges: list[list[str]]):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        # GPT-2 writes each byte as a printable character: a space is Ġ.
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
        self.ids = [*ids, *(vocab[name] for name in special)]  # indexed by tiktoken's ranks
        self.bytes = dict(zip(ids, written, strict=True))
        self.bytes.pop(vocab["<unk>"], None)  # it stands for any byte the vocabulary lacks
        self.start, self.end_of_text, self.mask = vocab["<s>"], vocab["</s>"], vocab.get("<mask>")
        self.size = max(vocab.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of <s> and the text; special tokens spelt out in it are recognised."""
        text = re.sub(r"\s+<mask>", "<mask>", text)  # a mask stands for a word and its space
        return [
            self.start,
            *(self.ids[r] for r in self.encoding.encode(text, allowed_special="all")),
        ]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Return the text without special tokens."""
        return b"".join(self.bytes.get(i, b"") for i in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def load_roberta(vocab: str | Path, merges: str | Path) -> RobertaTokenizer:
    with reading(f"the tokenizer in {Path(vocab).parent} is damaged"):
        lines = read_lines(Path(merges))
        pairs = [line.split(" ") for line in lines if not line.startswith("#version")]
        ids = json.loads(Path(vocab).read_bytes())
        check_ranks(ids.values(), most=LARGEST_VOCABULARY)
        return RobertaTokenizer(ids, pairs)


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a tokenizer file; raise a ValueError if there are too many."""
    content = path.read_bytes()
    if content.count(b"\n") > LARGEST_VOCABULARY:
        raise ValueError(f"{path.name} has more than {LARGEST_VOCABULARY:,} lines")
    lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    return [line for line in lines if line]


def check_ranks(ranks, most: int):
    """Raise a ValueError unless all ranks are distinct integers from 0 to most - 1."""
    seen = set()
    for rank in ranks:
        if type(rank) is not int or not 0 <= rank < most or rank in seen:
            raise ValueError(f"the rank {rank} occurs twice, or is not from 0 to {most - 1}")
        seen.add(rank)


def new_tokenizer(kind: str, vocab_size: int, documents: list[str]) -> Tokenizer:
    """Make a tokenizer: "bpe" (trained on the documents), "bytes" (256 ids) or "gpt2" (50,257).

    A bpe tokenizer has at most vocab_size ids.
    """
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
    if not 257 <= vocab_size <= LARGEST_VOCABULARY:
        most = LARGEST_VOCABULARY
        raise UserError(f"vocab_size must be from 257 to {most} for bpe, got {vocab_size}")
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(documents), vocab_size - 1, pattern=WORD_PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return Tokenizer(ranks, WORD_PATTERN, end_of_text=len(ranks))


TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer_meta.json")


def save_tokenizer(tokenizer: Tokenizer, folder: Path):
    ranks = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]
    write_whole(folder / "tokenizer.tiktoken", b"".join(lines))
    meta = {
        "pattern": tokenizer.pattern,
        "end_of_text": tokenizer.end_of_text,
        "mask": tokenizer.mask,
    }
    write_whole(folder / "tokenizer_meta.json", json.dumps(meta, indent=2).encode())


def check_pattern(tokenizer: Tokenizer):
    """Raise a ValueError unless a tokenizer's pattern splits a text without losing any of it."""
    text = " A cat: 猫 42\n\n"
    try:
        found = tokenizer.decode(tokenizer.encode(text))
    except BaseException as error:  # noqa: BLE001  a Rust panic in tiktoken is not an Exception
        raise ValueError(f"its pattern fails: {error}") from None
    if found != text:
        raise ValueError(f"its pattern turns {text!r} into {found!r}")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    folder = Path(folder)
    try:
        with reading(f"the tokenizer in {folder} is damaged"):
            meta = json.loads((folder / "tokenizer_meta.json").read_bytes())
            rows = [line.split() for line in read_lines(folder / "tokenizer.tiktoken")]
            ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
            if not 0 <= meta["end_of_text"] <= len(ranks):
                raise ValueError(f"end_of_text is {meta['end_of_text']}, not 0 to {len(ranks)}")
            check_ranks((int(rank) for _, rank in rows), most=len(ranks))
            if not {bytes([i]) for i in range(256)} <= ranks.keys():
                raise ValueError("it lacks some of the 256 bytes")
            tokenizer = Tokenizer(ranks, meta["pattern"], meta["end_of_text"])
            check_pattern(tokenizer)
            mask = meta.get("mask")
            if mask not in (None, tokenizer.size):
                raise ValueError(f"its mask is {mask}, not {tokenizer.size}")
            return tokenizer if mask is None else tokenizer.with_mask()
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no tokenizer: {error.filename} is missing") from None


# ------------------------------------------------------------------------------- files and network


TIMEOUT = 20  # seconds without an answer before a download is given up


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None):
    """Download and check a file; raise a DownloadError and leave nothing behind if it is not the
    expected one, or is not a zip file although `path` ends in .zip.
    """
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_url(url, new)
        if size is not None and new.stat().st_size != size:
            raise DownloadError(f"{url} has {new.stat().st_size:,} bytes, not {size:,}")
        if sha256 and hashlib.sha256(new.read_bytes()).hexdigest() != sha256:
            raise DownloadError(f"{url} is not the expected file: its sha256 differs")
        if path.suffix == ".zip" and not zipfile.is_zipfile(new):
            raise DownloadError(f"{url} did not return a zip file")
        os.replace(new, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} could not be downloaded ({short(error)})") from None
    finally:
        new.unlink(missing_ok=True)


def copy_url(url: str, path: Path):
    """Copy the body of a response to a file, with a progress bar; OSError if it is cut short."""
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
    """Return the text of a file, with all line endings converted to newlines."""
    try:
        text = content.decode("utf-8-sig")  # without the byte order mark that Windows adds
    except UnicodeDecodeError as error:
        byte = content[error.start]
        what = f"is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        raise UserError(f"{name} {what}; {how_to_convert(name)}") from None
    if "\0" in text:
        raise UserError(f"{name} is not text: it has null bytes; {how_to_convert(name)}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def how_to_convert(name: str) -> str:
    if Path(name).suffix.lower() in ARCHIVES:
        return "unpack this archive first, and give the file or folder in it"
    return "convert it first: save it as plain text in UTF-8"


def is_hidden(name: str) -> bool:
    """Return whether a part of a path begins with a dot or is macOS's metadata folder in a zip."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_text(name: str) -> bool:
    path = PurePosixPath(name)
    return (path.suffix.lower() in ENDINGS or path.name == "enwik8") and not is_hidden(name)


def check_exists(source: str):
    path = Path(source)
    if not source or is_url(source) or path.is_file() or path.is_dir():
        return
    if path.exists():  # a device, say: /dev/zero never ends
        raise UserError(f"{source} is not a file or folder; give a text file, a zip or a folder")
    near = difflib.get_close_matches(source, [*PUBLISHED, "pydocs"], 1)
    hint = f"did you mean {near[0]}?" if near else "give a text file, a zip or a folder"
    raise UserError(f"{source} does not exist; {hint}")


def is_url(source: str) -> bool:
    return re.match(r"https?://", source) is not None


def read_files(source: Path) -> dict[str, bytes]:
    """Return name -> content of a text file, or of the text files in a folder or zip, in order."""
    check_exists(str(source))
    if source.is_file() and (source.suffix == ".zip" or zipfile.is_zipfile(source)):
        return unzip(source)
    paths = {source.name: source}
    if source.is_dir():
        names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        paths = {name: source / name for name in tell_texts(source, names)}
    check_size(source, sum(path.stat().st_size for path in paths.values()))
    return {name: path.read_bytes() for name, path in paths.items()}


def unzip(path: Path) -> dict[str, bytes]:
    with reading(f"{path} is not a readable zip file"), zipfile.ZipFile(path) as archive:
        members = {m.filename.replace("\\", "/"): m for m in archive.infolist() if not m.is_dir()}
        texts = tell_texts(path, members)
        check_size(path, sum(members[name].file_size for name in texts))
        return {name: archive.read(members[name]) for name in texts}


def check_size(source: Path, size: int):
    if size > LARGEST_TEXT:
        most = LARGEST_TEXT >> 30
        raise UserError(
            f"{source} holds {size / (1 << 30):.1f} GiB of text; the limit is {most} GiB"
        )


def tell_texts(source: Path, names) -> list[str]:
    """Return the text files among the names in a folder or zip, sorted; print which are skipped."""
    texts = sorted(name for name in names if is_text(name))
    others = sorted(name for name in names if name not in texts and not is_hidden(name))
    if "[Content_Types].xml" in names:
        raise UserError(f"{source} is an Office document; {how_to_convert(source.name)}")
    if not texts:
        only = f", only {others[0]}; {how_to_convert(others[0])}" if others else ""
        raise UserError(f"{source} has no text files ({', '.join(sorted(ENDINGS))}){only}")
    if others:
        more = ", ..." if len(others) > 3 else ""
        skipped = ", ".join(others[:3])
        print(f"note: files in {source} skipped for their extensions: {skipped}{more}")
    return texts


# ------------------------------------------------------------------------------------- documents


def split_of(name: str) -> str | None:
    """Return the split that a path names: by a folder (train/a.txt) or file (wiki.train.raw)."""
    file = name.lower().rsplit("/", 1)[-1]
    for split, words in SPLITS.items():
        if re.fullmatch(rf"(?:^|.*[._-])(?:{words})(?:[._-].*)?", file):
            return folder_split(name) or split
    return folder_split(name)


def folder_split(name: str) -> str | None:
    folders = name.lower().split("/")[:-1]
    for split, words in SPLITS.items():
        if any(re.fullmatch(words, folder) for folder in folders):
            return split
    return None


def split_files(files: dict[str, bytes]) -> dict[str, list[str]]:
    """Return split -> its texts: the files in a folder of its name, or the one file of its name."""
    splits = {}
    for split in SPLITS:
        names = [name for name in files if split_of(name) == split]
        alone = [name for name in names if folder_split(name) is None]
        if alone and len(names) > 1:
            raise UserError(f"several files for the {split} split: {', '.join(names)}; keep one")
        if names:
            splits[split] = [decode(files[name], name) for name in names]
    return splits


def articles(text: str) -> list[str]:
    """Cut a WikiText split into articles, before each title: a line ` = Title = `."""
    return [part for part in re.split(r"(?m)^(?= = [^=\n]+ = $)", text) if part]


def wikitext(name: str, source: str | None, folder: Path) -> dict[str, list[str]]:
    about = PUBLISHED[name]
    texts = split_files(fetch(source, folder) if source else fetch_published(name, folder))
    if not texts:
        raise UserError(
            f"{source or name} has no file named like wiki.train.raw or test.txt; "
            "for a text of your own give its path as the dataset"
        )
    lines = {split: sum(text.count("\n") for text in found) for split, found in texts.items()}
    wrong = {split: n for split, n in lines.items() if n != about["lines"][split]}
    if wrong:
        found = ", ".join(f"{s} {n:,} (not {about['lines'][s]:,})" for s, n in wrong.items())
        if not source:
            raise UserError(f"{name}'s download has the wrong number of lines: {found}")
        print(f"note: {source} differs from {name} in the number of lines: {found}")
    return {split: [a for t in found for a in articles(t)] for split, found in texts.items()}


def one_text(name: str, source: str | None, folder: Path) -> dict[str, list[str]]:
    """Cut a published text into splits by bytes, as is customary for reported results."""
    about = PUBLISHED[name]
    files = fetch(source, folder) if source else fetch_published(name, folder)
    if len(files) != 1:
        raise UserError(f"{source or name} has several files, not just one: {', '.join(files)}")
    (content,) = files.values()
    size = len(content)
    if size != about["bytes"]:
        if not source:
            raise UserError(f"{name}'s download has {size:,} bytes, not {about['bytes']:,}")
        print(f"note: {source} has {size:,} bytes, {name} {about['bytes']:,}")
    decode(content, source or name)  # raises a UserError if it is not text
    splits = {}
    for split, (first, last) in about["percent"].items():
        part = content[size * first // 100 : size * last // 100]
        splits[split] = [part.decode("utf-8", "ignore")]  # drops a character cut in two
    return splits


def fetch_published(name: str, folder: Path) -> dict[str, bytes]:
    """Return the files of an earlier download, or of the first address that has them."""
    about = PUBLISHED[name]
    errors = []
    path = folder / f"raw{PurePosixPath(about['urls'][0]).suffix}"
    if not path.exists():
        for url in about["urls"]:
            try:
                download(url, path, about.get("size"), about.get("sha256"))
                break
            except DownloadError as error:
                errors.append(str(error))
        else:
            hint = "--source reads a copy from a file, folder or another address"
            raise DownloadError(f"{'; '.join(errors)}; {hint}")
    return read_files(path)


def fetch(source: str, folder: Path) -> dict[str, bytes]:
    """Return the files at a path, or of a zip or text at a URL, kept in `folder` while read."""
    if not is_url(source):
        return read_files(Path(source))
    text = PurePosixPath(source).suffix == ".txt"
    path = folder / f"source{'.txt' if text else '.zip'}"
    download(source, path)
    try:
        return read_files(path)
    finally:
        path.unlink()


def pydocs() -> dict[str, list[str]]:
    """Return the language reference and the library's docstrings, one document per module."""
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
    return hold_out(documents, [*HELD_OUT])


def docstrings(source: bytes) -> str:
    """Return all docstrings of a Python file, in order, without running it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    except (SyntaxError, ValueError):  # some library files are invalid on purpose
        return ""
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = []
    for node in nodes:
        text = ast.get_docstring(node)
        if text:
            name = getattr(node, "name", "")
            found.append(f"{name}\n{text}" if name else text)
    return "\n\n".join(found)


HELD_OUT = {"val": 7, "test": 17}  # documents whose index modulo 20 is this


def hold_out(documents: list[str], splits: list[str]) -> dict[str, list[str]]:
    """Cut 5% for each split from the end of a text; with 40 documents or more, take every 20th."""
    documents = [document for document in documents if document.strip()]
    if len(documents) >= 40:
        cut = {split: documents[HELD_OUT[split] :: 20] for split in splits}
        others = {HELD_OUT[split] for split in splits}
        return {"train": [d for i, d in enumerate(documents) if i % 20 not in others], **cut}
    text = "\n".join(documents)
    parts = {}
    end = len(text)
    for i, split in enumerate(reversed(splits), start=1):
        start = border(text, len(text) * (100 - 5 * i) // 100, end)
        parts[split] = text[start:end]
        end = start
    parts["train"] = text[:end]
    return {split: [part] for split, part in parts.items() if part.strip()}


def border(text: str, near: int, before: int) -> int:
    """Return the start of the first line after `near`, or `near` if that is not below `before`."""
    start = text.find("\n", near) + 1
    return start if 0 < start < before else near


def own_text(source: str, folder: Path) -> dict[str, list[str]]:
    """Return the splits that files and folders name; cut missing ones from the training text."""
    files = fetch(source, folder)
    splits = split_files(files) if len(files) > 1 else {}
    if [*splits] == ["train"]:  # perhaps just a file that is called how-to-train.txt
        print(f"note: no file in {source} is named like valid.txt or test.txt: all form one text")
        splits = {}
    if not splits:
        return hold_out([decode(content, name) for name, content in files.items()], [*HELD_OUT])
    others = [name for name in files if split_of(name) is None]
    said = f"note: {source} names the splits {', '.join(splits)}"
    if "train" not in splits:
        splits["train"] = [decode(files[name], name) for name in others]
    elif others:
        said += f"; {', '.join(others)}: not used"
    missing = [split for split in HELD_OUT if split not in splits]
    if missing:
        said += f"; {' and '.join(missing)} cut from the training text"
        splits.update(hold_out(splits["train"], missing))
    print(said)
    return splits


# --------------------------------------------------------------------------------------- prepare


@contextlib.contextmanager
def prepared(
    dataset: str,
    source: str | None = None,
    train_split: str = "train",
    val_split: str = "val",
    tokenizer: str = "auto",
    vocab_size: int = 4096,
    data_dir: str | Path | None = None,
):
    """Make data/<name>/, unless it exists and was made in the same way, and yield the folder.

    Other processes wait until the block ends: one with other settings would rebuild the folder.
    """
    dataset = os.path.expanduser(dataset)
    source = os.path.expanduser(source or "") or None
    if dataset == "pydocs" and source:
        raise UserError(f"pydocs has no source; give {source} as the dataset")
    known = dataset in PUBLISHED or dataset == "pydocs"
    if tokenizer == "auto":
        whole = "percent" in PUBLISHED.get(dataset, {})
        tokenizer = "bytes" if whole else "bpe"  # bytes are customary for these texts
    for split in (train_split, val_split):
        if split not in SPLITS:
            raise UserError(f"a split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = source or ("" if known else dataset)
    check_exists(path)
    name = dataset if known else re.sub(r"\W+", "_", Path(dataset).stem) or "text"
    folder = Path(data_dir or DATA).expanduser() / (f"{name}_text" if name in TAKEN else name)
    made_by = {
        "version": VERSION,
        "dataset": dataset,
        "source": source,
        "files": fingerprint(path),
        "train_split": train_split,
        "val_split": val_split,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
    }
    files = ("meta.json", "train.bin", "val.bin", "test.bin")
    theirs = [name for name in files if (folder / name).exists()]
    if theirs and not (folder / "lock").exists() and "made_by" not in read_meta(folder):
        raise UserError(
            f"{folder} has a {theirs[0]} not made by this script; rename the text, or choose "
            "another folder with --data_dir"
        )
    busy = f"another process is preparing {folder}: waiting for it"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, busy, wait=True))
        except OSError as error:  # in a read-only checkout, say
            hint = "name another folder with --data_dir"
            raise UserError(f"{folder} can't be written ({short(error)}); {hint}") from None
        if read_meta(folder).get("made_by") != made_by:
            make(folder, made_by)
        yield folder


def prepare(*args, **options) -> Path:
    """Like `prepared`, but return the folder and don't keep other processes waiting."""
    with prepared(*args, **options) as folder:
        return folder


def make(folder: Path, made_by: dict):
    """Write the files of a dataset; meta.json, which describes them, comes last."""
    dataset, source = made_by["dataset"], made_by["source"]
    if dataset == "pydocs":
        found = pydocs()
    elif dataset not in PUBLISHED:
        found = own_text(source or dataset, folder)
    elif "percent" in PUBLISHED[dataset]:
        found = one_text(dataset, source, folder)
    else:
        found = wikitext(dataset, source, folder)
    if not any(document.strip() for documents in found.values() for document in documents):
        raise UserError(f"{source or dataset} is empty")
    splits = {}
    for split in SPLITS:
        wanted = made_by.get(f"{split}_split", split)
        if wanted in found:
            splits[split] = found[wanted]
        elif split != "test":
            raise UserError(
                f"{source or dataset} has no {wanted!r} split, only {', '.join(found)}; "
                f"choose one with --{split}_split, or give more text"
            )
    for split, documents in splits.items():
        if not any(document.strip() for document in documents):
            raise UserError(f"the {split} split of {source or dataset} is empty")

    codec = new_tokenizer(made_by["tokenizer"], made_by["vocab_size"], splits["train"])
    (folder / "meta.json").unlink(missing_ok=True)
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
            "characters": sum(len(document) for document in documents),
            "bytes": sum(len(document.encode()) for document in documents),
            # As in the WikiText paper, the end of a line counts as a word.
            "words": sum(len(document.split()) + document.count("\n") for document in documents),
            "tokens": len(tokens),
        }
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())


def fingerprint(source: str) -> list:
    """Return names, sizes and modification times of local files, to notice when a text changes."""
    if not source or is_url(source):
        return []
    path = Path(source)
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(p.resolve()), p.stat()) for p in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def read_meta(folder: Path) -> dict:
    """Return the content of meta.json; empty if the folder is not complete."""
    try:
        return {**json.loads((folder / "meta.json").read_bytes())}
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def main():
    parser = Parser(__doc__)
    parser.add_argument("dataset", help=f"{', '.join(PUBLISHED)}, pydocs, or a path")
    parser.add_argument("--source", help="read it from this file, zip or folder, or from a URL")
    parser.add_argument("--train_split", default="train", choices=SPLITS)
    parser.add_argument("--val_split", default="val", choices=SPLITS)
    parser.add_argument("--tokenizer", default="auto", choices=TOKENIZERS)
    parser.add_argument("--vocab_size", type=int, default=4096, help="of bpe (default: 4096)")
    parser.add_argument("--data_dir", default="", help="parent folder (default: the repo's data/)")
    start = time.time()
    folder = prepare(**vars(parser.parse_args()))
    for split, counts in read_meta(folder)["splits"].items():
        print(f"{split}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print(f"{folder} is ready ({time.time() - start:.1f} s)")


if __name__ == "__main__":
    run(main)
