"""What the scripts share: one-sentence errors, flags, atomic file writes, memory settings."""

import argparse
import contextlib
import ctypes
import difflib
import itertools
import os
import re
import shutil
import sys
import urllib.error
import uuid
from pathlib import Path

import filelock


class UserError(Exception):
    """An error that the user can fix, explained in one sentence."""


class DownloadError(UserError):
    """A file that can't be downloaded at the moment."""


def short(error: Exception) -> str:
    """Describe an exception briefly, on one line."""
    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    return " ".join(f"{type(error).__name__}: {reason}".split())[:160]


@contextlib.contextmanager
def reading(problem: str):
    """Turn any exception from reading a damaged file into a UserError: `problem` and why."""
    try:
        yield
    except (UserError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem} ({short(error)})") from error


def write_whole(path: Path, content):
    """Write a file atomically: under a temporary name first, then rename it."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # contents on disk before the rename, in case of power loss
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, busy: str, wait: bool = False):
    """Lock a folder for this process; if another holds it, say so, then wait for it or raise.

    Yield os.stat of the lock file: if that differs later, the folder has been deleted.
    The system releases the lock when a process dies; partial files that a killed process left
    behind are removed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise UserError(busy) from None
        print(busy, flush=True)
        lock.acquire()
    try:
        for part in folder.glob(f"*.{'[0-9a-f]' * 32}.part"):
            part.unlink(missing_ok=True)
        yield os.stat(folder / "lock")
    finally:
        lock.release()


def set_aside(folder: Path, names: tuple) -> Path | None:
    """Move whichever of these files an earlier run left to folder/previous-1, -2, ...

    All are linked or copied there before any is removed here, so if we are killed at any moment,
    a complete set remains in one place.
    """
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return None
    number = next(i for i in itertools.count(1) if not (folder / f"previous-{i}").exists())
    part = folder / f"previous-{number}.part"
    part.mkdir(exist_ok=True)
    for name in found:
        (part / name).unlink(missing_ok=True)  # left by a run killed at this point
        try:
            os.link(folder / name, part / name)
        except OSError:  # some file systems have no hard links
            shutil.copy2(folder / name, part / name)
    previous = part.rename(folder / f"previous-{number}")
    for name in found:
        (folder / name).unlink()
    return previous


class Parser(argparse.ArgumentParser):
    """argparse with the file's docstring as help, and errors for `run` to print."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for arg in args:
            if re.fullmatch(r"--\w+=--", arg):  # some versions of argparse lose this value
                self.error(f"-- can't be the value of a flag, got {arg}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all flags")


def run(main):
    """Call a script's main(); a user error ends it with a one-sentence message and exit code 2."""
    script = Path(sys.argv[0]).name
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `python train.py >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # A character the terminal can't encode must not end the script; notebooks encode them all.
        getattr(getattr(sys, name), "reconfigure", lambda **_: None)(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the process reading our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:  # SystemExit too, which has no message and is re-raised
        text = one_sentence(error)
        if text is None:
            raise
        print(f"{script}: {text}", file=sys.stderr)
        sys.exit(2)


def one_sentence(error: BaseException) -> str | None:
    """Return a message for an error that the user can fix; None for a bug of our own."""
    if type(error).__name__ == "PanicException":  # from tiktoken's Rust code
        return f"the tokenizer fails on this text ({short(error)}); shorten long runs of whitespace"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return short(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    ):
        return f"out of memory ({short(error)}); try a smaller batch, context or model"
    return None


def read_flags(arguments, about: str, file: Path, settings: dict, also_called: dict) -> dict:
    """Return the values of the settings given on a command line.

    A setting's comment in the file is its help; also_called maps names used elsewhere to ours.
    """
    comments = dict(re.findall(r"(?m)^(\w+) = .*?  # (.*)$", file.read_text("utf-8")))
    parser = Parser(about)
    for name, default in settings.items():
        text = f"{comments.get(name, '')} (default: {default!r})".replace("%", "%%")
        options = {"type": flag_reader(default), "help": text, "metavar": "X"}
        if isinstance(default, bool):
            options.update(nargs="?", const=True)
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        plain = name.lstrip("-").replace("-", "_")
        near = [also_called[plain]] if plain in also_called else []
        near += difflib.get_close_matches(plain, settings, 1, 0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all settings"
        raise UserError(f"there is no setting {name}; {hint}")
    return vars(given)


def flag_reader(default):
    """Return a function that converts a flag's text to the type of `default`."""

    def read(text: str):
        if isinstance(default, bool):
            if text.lower() in ("true", "1", "yes", "false", "0", "no"):
                return text.lower() in ("true", "1", "yes")
            raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
        try:
            return type(default)(text)
        except ValueError:
            kind = "an integer" if isinstance(default, int) else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text!r}") from None

    return read


def keep_big_blocks():
    """Let glibc keep freed memory; otherwise each step would fault in all its pages again."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD; older versions allow less
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD
