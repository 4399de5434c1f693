"""What depends on the machine: devices, the fastest dtype, multiple processes, and signals."""

import contextlib
import datetime
import functools
import gc
import math
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.common import UserError, one_sentence, short


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={name} can't be used here ({short(error)})") from None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype; "auto" is bfloat16 where the processor is faster with it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and bfloat16_is_faster():
        return torch.bfloat16
    return torch.float32


@functools.cache
def bfloat16_is_faster() -> bool:
    """Return whether bfloat16 matrix products are faster than those in float32, by timing them.

    Without bfloat16 instructions they take up to 200 times as long, with them half as long.
    """
    seconds = {torch.float32: [], torch.bfloat16: []}
    for size in (64, 512, 512):  # the very first calls load libraries
        for dtype, found in seconds.items():
            x = torch.ones(size, size, dtype=dtype)
            start = time.perf_counter()
            _ = x @ x
            found.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16][1:]) < 0.8 * min(seconds[torch.float32][1:])


def make_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


START = datetime.timedelta(minutes=5)  # for all processes to find each other
LONG = datetime.timedelta(hours=8)  # the others wait while the first one evaluates


def memory_of_machine() -> float:
    """Return the machine's memory in bytes; infinity where the system doesn't report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # on Windows
        return math.inf


class Distributed:
    """The processes that torchrun started, or just this one. Only rank 0 writes anything."""

    def __init__(self, device: str):
        self.size = max(number_in_environment("WORLD_SIZE", 1), 1)
        self.rank = number_in_environment("RANK", 0) if self.size > 1 else 0
        self.device = choose_device(device)
        self.group = None
        if self.size == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", number_in_environment("LOCAL_RANK", self.rank))
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=START)
            self.group = dist.new_group(timeout=LONG)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"process {self.rank} of {self.size} can't find the others ({short(error)}); start "
                "them with torchrun, or unset WORLD_SIZE"
            ) from None

    def print0(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        if self.size == 1:
            return [*values]
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, group=self.group)
        return shared.tolist()

    def broadcast(self, work):
        """Run `work()` in the first process while the others wait, and return its result in all;
        if it fails there with a user error, raise the same error everywhere.
        """
        found = [None, None]
        if self.rank == 0:
            try:
                found[0] = work()
            except Exception as error:
                if self.size == 1 or one_sentence(error) is None:
                    raise
                found[1] = one_sentence(error)
        if self.size > 1:
            dist.broadcast_object_list(found, device=self.device, group=self.group)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]

    def check_same(self, settings: dict):
        """Raise a UserError if a process was started with different settings from the first."""
        if self.size == 1:
            return
        found = [None] * self.size
        dist.all_gather_object(found, settings, group=self.group)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise UserError(
                        f"process {rank} has --{name}={other[name]}, and process 0 has {value}; "
                        "start all with the same flags"
                    )

    def leave(self):
        if self.size > 1 and dist.is_initialized():
            gc.collect()  # DDP's threads must end before the group does
            dist.destroy_process_group()


def number_in_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        mend = "unset it, or start with torchrun"
        raise UserError(f"the environment has {name}={text}, which is not a number; {mend}")
    return int(text)


@contextlib.contextmanager
def told_to_stop(leads: bool):
    """Yield a list that Ctrl-C or SIGTERM makes non-empty; a second Ctrl-C stops at once."""
    stop = []
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return

    def interrupt(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if leads:  # print() may be running at this moment, and it is not reentrant
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class ProgressBar:
    """A bar on a terminal; elsewhere, as in a log file, a line every half minute."""

    def __init__(self, leads: bool, progress: float):
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = None if leads and sys.stderr else True  # None: hidden if there is no terminal
        self.bar = tqdm(total=1.0, initial=progress, bar_format=form, leave=False, disable=hidden)
        self.lines = leads and self.bar.disable
        self.last_line = time.monotonic()

    def update(self, progress: float, text: str):
        self.bar.set_postfix_str(text)
        self.bar.update(progress - self.bar.n)
        if self.lines and time.monotonic() > self.last_line + 30:
            print(f"{progress:4.0%} {text}", flush=True)
            self.last_line = time.monotonic()
