"""What the tables of a family of losses have in common: their command line, times in turns, memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, TypeVar

import torch
from measure import Failure, plan_rounds, take_turns, usage, warm_up_processes

CPU = torch.device("cpu")
QUICK = 16
"""By what --quick divides sizes."""
Key = TypeVar("Key")


def medians(
    calls: Mapping[Key, Callable[[], object]],
    first: Mapping[Key, float],
    seconds: float,
    device: torch.device = CPU,
) -> dict[Key, float]:
    """Median seconds of calls that took `first`, in turns, less those that failed."""
    rounds = {key: plan_rounds(taken, seconds / 10, seconds) for key, taken in first.items()}
    times = take_turns(calls, rounds, device)
    return {key: median(taken) for key, taken in times.items() if not isinstance(taken, Failure)}


def mebibytes(
    prepare: Callable[..., Callable[[], object]], *job: object, device: torch.device = CPU
) -> str:
    """Extra memory of a step, for a table."""
    used = usage(prepare, job, device, 600)
    return used.status if isinstance(used, Failure) else f"{used.bytes / 2**20:.0f}"


def parser_of(
    command: str, description: str | None, quick: str, max_seconds: float
) -> argparse.ArgumentParser:
    """The options of every family; `quick` says what --quick does, `max_seconds` is a default."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(command, description=description, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, help="default: what torch picks")
    parser.add_argument("--max-seconds", type=float, default=max_seconds, help="for timed runs")
    return parser


def started(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options, with the threads set and the processes that measure memory ready."""
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warm_up_processes()
    return options


def print_table(
    arguments: list[str],
    command: str,
    description: str | None,
    columns: Sequence[str],
    cases: Sequence[Any],
    row_of: Callable[[Any, float], Sequence[str]],
) -> None:
    """Prints a row for each case, as it is measured; the first column is text.

    Args:
        arguments: of the command line.
        command: its name.
        description: for --help.
        columns: the table's head.
        cases: what is measured, each with a `size`.
        row_of: measures a case in so many seconds.
    """
    parser = parser_of(command, description, "sizes 16 times smaller, a run of each", 30.0)
    options = started(parser, arguments)
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
    for case in cases:
        case = replace(case, size=case.size // QUICK) if options.quick else case
        cells = row_of(case, 0.1 if options.quick else options.max_seconds)
        print(f"| {' | '.join(cells)} |", flush=True)
