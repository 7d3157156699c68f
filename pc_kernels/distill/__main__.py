"""The command line: `python -m pc_kernels.distill compare --config digits`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report
from .config import CONFIGS, Config, load_config
from .engine import make_engine
from .experiment import compare, prepare, table_of
from .features import export
from .teachers import TEACHERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments describe; returns the exit status."""
    parser, given = _parse(arguments)
    try:
        config = load_config(given.config, given.set)
        engine = make_engine(config.device, config.mixed_precision)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        said = given.command(config, engine, given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if engine.is_main_process:
        print(said)
    return 0


def _compare(config: Config, engine: Any, given: argparse.Namespace) -> str:
    start = time.perf_counter()
    data = prepare(config, engine)
    results = compare(config, data, engine)
    seconds = time.perf_counter() - start
    text = report.write(results, data, seconds) if engine.is_main_process else ""
    where = f"{config.out}/{config.name}/"
    return f"\n{text}\n{seconds:.0f} s; report.html, report.md, results.json: {where}"


def _features(config: Config, engine: Any, given: argparse.Namespace) -> str:
    if not config.pretrained:
        allowed = ", ".join(TEACHERS)
        raise ValueError(f"teacher: got {config.teacher!r}; allowed for `features`: {allowed}")
    table = table_of(config, engine.device)
    return f'teacher = "features:{",".join(map(str, export(table, Path(given.out))))}"'


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
    comparison.set_defaults(command=_compare)
    features = commands.add_parser(
        "features",
        help="compute a pretrained teacher's features and write them to files",
        description="Computes the features of the configuration's data by its pretrained teacher, in "
        "parts that are kept: started again, it goes on. `compare` finds them; the files that are "
        "written serve any other program.",
    )
    features.set_defaults(command=_features)
    features.add_argument("--out", required=True, help="folder of train.npz, val.npz, test.npz")
    known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
    for command in (comparison, features):
        command.add_argument("--config", required=True, help=f"a TOML file, or one of {known}")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="changes a key of the file, as in --set epochs=20 --set limit.train=500",
        )  # fmt: skip
    return parser, parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
