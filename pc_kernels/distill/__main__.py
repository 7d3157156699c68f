"""The command line: `python -m pc_kernels.distill --help`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import data, report
from .experiment import Config, run_seed
from .models import small
from .objectives import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison that the arguments describe; returns the exit status."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    given.setdefault("name", given.get("data", Config.data).partition(":")[0])
    start = time.perf_counter()
    try:
        config = Config(**given)
        images = data.load(config.data, config.limit, config.image_size)
        if len(images.train.labels) < config.batch_size:
            raise ValueError(
                f"--batch-size: got {config.batch_size}; allowed: at most the "
                f"{len(images.train.labels)} training images"
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # The steps on small images are too short to share: a second thread gains little, and costs a
    # lot where another process wants its core.
    if config.threads is not None or small(images):
        torch.set_num_threads(config.threads or 1)
    images = images.to(torch.device(config.device))
    print(_describe(images))
    try:
        results = [run_seed(config, images, seed) for seed in config.seeds]
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    seconds = time.perf_counter() - start
    print("\n" + report.write(config, images, results, seconds))
    print(f"{seconds:.0f} s; results, table and plots are in {config.out}/{config.name}/")
    return 0


def _describe(images: data.Dataset) -> str:
    counts = (len(split.labels) for split in (images.train, images.val, images.test))
    return "{} training, {} validation and {} test images of {} classes".format(
        *counts, len(images.classes)
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: integers, as in 0,1,2") from None


def _parser() -> argparse.ArgumentParser:
    """What is not given is left out, and so takes its default from `Config`."""
    parser = argparse.ArgumentParser(
        prog="python -m pc_kernels.distill",
        description="Trains a teacher CNN with labels and distils its features, without labels, "
        "into a far smaller student whose features have another width: by perception coherence "
        "(PC), by FitNet's projected MSE and by RKD distance; on demand by LFCC, of several layers. "
        "Reports linear-probe and kNN accuracy and coherence on test images, beside the teacher and "
        "the untrained student.",
        argument_default=argparse.SUPPRESS,
    )

    def add(option: str, kind: Callable[[str], Any], text: str, metavar: str | None = None) -> None:
        default = getattr(Config, option[2:].replace("-", "_"))
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        known = "" if default is None or "default" in text else f" (default: {default})"
        parser.add_argument(option, type=kind, help=text + known, metavar=metavar)

    add(
        "--data",
        str,
        "scikit-learn's digits, or a class-per-folder image tree: folders or tars (.tar, .tar.xz, "
        f"...), with or without train/, val/ and test/ above the classes (default: {Config.data})",
        "digits|imagefolder:PATH[,PATH...]",
    )
    add("--name", str, "name of the run (default: digits or imagefolder)")
    add("--out", str, "folder of all runs; files are written to OUT/NAME/")
    add("--seeds", _numbers, "comma-separated; each trains a teacher and its students")
    add("--methods", _names, f"comma-separated; the students to train, of {', '.join(METHODS)}")
    add("--epochs", int, "of each student")
    add("--teacher-epochs", int, "of each teacher")
    add("--batch-size", int, "images in a batch, in every training")
    add("--temperature", float, "of PC's soft ranks")
    add("--lr", float, "learning rate of every student")
    add("--limit", int, "use at most this many images, as many of each class (default: all)")
    add("--image-size", int, "resize images to this side, in pixels (default: as they are)")
    add("--device", str, "a PyTorch device, as in cuda:0")
    add("--threads", int, "CPU threads (default: 1 for small images, else PyTorch's choice)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
