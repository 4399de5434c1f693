"""What the scripts share: errors in one sentence, flags, files written whole, memory."""

import argparse
import contextlib
import ctypes
import os
import sys
import urllib.error
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend, said in one sentence."""


class DownloadError(UserError):
    """A file of the network that can't be had now."""


def short(error: Exception) -> str:
    """An exception in few words, on one line."""
    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    return " ".join(f"{type(error).__name__}: {reason}".split())[:160]


def write_whole(path: Path, content):
    """Write a file under another name, then rename it: it is never seen half-written."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name is, should the power go
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse with the file's docstring as help, and errors for `run` to print."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all flags")


def run(main):
    """Call a script's main(); a mistake of the user's ends it with one sentence and exit code 2."""
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # a character that a terminal lacks must not end it
        if stream is not None:
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sizes = "try a smaller batch, context or model"
        print(f"{script}: out of memory ({short(error)}); {sizes}", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        text = str(error) if isinstance(error, UserError) else short(error)
        print(f"{script}: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        sys.exit(130)


def flag_reader(default):
    """Return the function that reads a flag of the type of `default`."""

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
    """Let glibc keep freed memory, or each step would fault all its pages in anew."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, or its old limit
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD
