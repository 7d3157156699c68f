"""Time and memory of a call.

Times: contenders of a size take turns, round after round, so that a machine that drifts drifts for
all of them. Memory: on a CPU the growth of a fresh process's peak resident memory over one call, on a
GPU PyTorch's own count.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

FEWEST_ROUNDS = 3
ROUNDS = 7
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Failure:
    """Why there is no number: a status for the table, and a line more."""

    status: str
    detail: str = ""


def failure(error: BaseException) -> Failure:
    """An exception as a line of the table, without paths of this machine."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    full = "alloc" in message or "out of memory" in message
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or full:
        return Failure("out of memory", "tried")
    message = re.sub(r"\S*/\S+", "…", message)
    return Failure("failed", f"{type(error).__name__}: {message[:100]}")


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a call, until the device is done, and its result."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, result


def plan_rounds(seconds: float, least_total: float, most_total: float) -> int:
    """How often to time a call that takes `seconds`."""
    wanted = max(ROUNDS, min(MOST_ROUNDS, round(least_total / seconds)))
    return max(FEWEST_ROUNDS, min(wanted, int(most_total / 2 / seconds)))


def take_turns(
    calls: Mapping[T, Callable[[], object]], rounds: Mapping[T, int], device: torch.device
) -> dict[T, list[float] | Failure]:
    """Times every call rounds[key] times, spread evenly over as many rounds as the longest needs."""
    times: dict[T, list[float] | Failure] = {key: [] for key in calls}
    total = max(rounds.values(), default=0)
    for turn in range(total):
        for key, call in calls.items():
            taken = times[key]
            if isinstance(taken, Failure):
                continue
            if (turn + 1) * rounds[key] // total > turn * rounds[key] // total:
                try:
                    taken.append(timed(call, device)[0])
                except (RuntimeError, MemoryError) as error:
                    times[key] = failure(error)
    return times


def free_memory(device: torch.device) -> int:
    """Bytes that are available on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        return int(found.group(1)) << 10
    return 8 << 30


@contextlib.contextmanager
def capped_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, makes asking for more than is there an error, where the system would kill someone."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if device.type != "cuda":
            cap = int(0.9 * free_memory(device))
            resource.setrlimit(resource.RLIMIT_DATA, (cap, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _peak() -> int:
    """Peak resident bytes of this process."""
    with contextlib.suppress(OSError, AttributeError):
        # ru_maxrss will not do on Linux: a new process starts with its parent's.
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found.group(1)) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _reset_peak() -> None:
    """Lowers the peak to what is resident now, where the system can."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Usage:
    """Of one call, the first at its size."""

    bytes: int
    seconds: float


def usage_here(prepare: Callable[[], Callable[[], object]], device: torch.device) -> Usage:
    """Extra memory and time of the call that `prepare` returns."""
    call = prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds, _ = timed(call, device)
        return Usage(torch.cuda.max_memory_allocated(device) - before, seconds)
    _reset_peak()
    before = _peak()
    seconds, _ = timed(call, device)
    return Usage(_peak() - before, seconds)


def _child(
    connection: Any, threads: int, prepare: Callable[..., Callable[[], object]], *job: object
) -> None:
    torch.set_num_threads(threads)
    try:
        connection.send(usage_here(lambda: prepare(*job), torch.device("cpu")))
    except Exception as error:
        connection.send(failure(error))


def usage(
    prepare: Callable[..., Callable[[], object]],
    job: tuple[object, ...],
    device: torch.device,
    timeout: float,
) -> Usage | Failure:
    """`usage_here` of prepare(*job); on a CPU in a process of its own, which may die of it."""
    if device.type == "cuda":
        try:
            return usage_here(lambda: prepare(*job), device)
        except (RuntimeError, MemoryError) as error:
            torch.cuda.empty_cache()
            return failure(error)
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, torch.get_num_threads(), prepare, *job)
    process = context.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Failure("too slow", f"> {timeout:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        killed = process.exitcode == -9
        detail = "tried, killed" if killed else f"exit code {process.exitcode}"
        return Failure("out of memory" if killed else "failed", detail)
    finally:
        process.kill()
        process.join()


def warm_up_processes() -> None:
    """Starts the process that measuring processes are forked from, with the imports done."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "pc_kernels"])
