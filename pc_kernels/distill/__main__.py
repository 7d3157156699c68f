"""The command line: `python -m pc_kernels.distill compare --config digits`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from . import data, report
from .config import CONFIGS, load_config
from .experiment import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments describe; returns the exit status."""
    parser, given = _parse(arguments)
    start = time.perf_counter()
    try:
        config = load_config(given.config, given.set)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        loaded = data.load(
            config.data, config.teacher, limit=config.limit, classes=config.classes,
            image_size=config.image_size, cache=config.cache,
        )  # fmt: skip
        results = compare(config, loaded.to(config.device))
        seconds = time.perf_counter() - start
        print("\n" + report.write(results, loaded, seconds))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{seconds:.0f} s; report.html, report.md, results.json: {config.out}/{config.name}/")
    return 0


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m pc_kernels.distill", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    comparison = commands.add_parser(
        "compare",
        help="distil a teacher into a student by several methods and report",
        description="Computes a teacher's features once and distils them, by each method of the "
        "configuration at its own learning rate and over several seeds, into a small student. "
        "Finished runs are kept: started again, it does what is missing.",
    )
    known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
    comparison.add_argument("--config", required=True, help=f"a TOML file, or one of {known}")
    comparison.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="changes a key of the file, as in --set epochs=20 --set limit.train=500",
    )  # fmt: skip
    return parser, parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
