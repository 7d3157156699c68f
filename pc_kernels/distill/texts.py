"""Texts as data: files of lines, tables, WordNet's definitions; and texts as numbers of words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from .table import SPLITS, Table, split_of

PADDING, UNKNOWN = 0, 1  # numbers that are no word's
WORDS = r"\w+|[^\w\s]"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# WordNet's lexicographer files in the order of their numbers, lexnames(5WN).
CATEGORIES = tuple(
    f"{part}.{name}"
    for part, names in (
        ("adj", "all pert"),
        ("adv", "all"),
        (
            "noun",
            "Tops act animal artifact attribute body cognition communication event feeling food group "
            "location motive object person phenomenon plant possession process quantity relation shape "
            "state substance time",
        ),
        (
            "verb",
            "body change cognition communication competition consumption contact creation emotion motion "
            "perception possession social stative weather",
        ),
        ("adj", "ppl"),
    )
    for name in names.split()
)


def load_texts(paths: list[Path]) -> Table:
    """Texts with their classes.

    A `.txt` file holds the texts of a class, one a line; its name is the class, and a folder `train`,
    `val` or `test` around it the split. A `.csv` or `.tsv` file is a table with the columns `text`,
    `label` and, if there are splits, `split`; without that column, its name may begin with one. A
    folder is all such files in it.

    Raises:
        ValueError, FileNotFoundError: a file is not that; the message says which and why.
    """
    rows: list[tuple[str, str, str, str]] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file.suffix == ".txt":
                rows += _lines(file)
            elif file.suffix in DELIMITERS:
                rows += _table(file)
    return _as_table(rows, ", ".join(map(str, paths)))


def load_wordnet(folder: Path) -> Table:
    """WordNet's definitions, without their examples; the classes are its lexicographer's 45 files.

    Args:
        folder: with `data.noun`, `data.verb`, `data.adj`, `data.adv` as in wndb(5WN): of Debian's
            package wordnet-base, /usr/share/wordnet. Of definitions that are alike the first counts.

    Raises:
        ValueError, FileNotFoundError: a file is not that.
    """
    rows, known = [], set()
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{part}"
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist; is {folder} WordNet's?")
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith(" "):  # the licence, at the head of every file
                continue
            synset, bar, gloss = line.partition(" | ")
            number = synset.split()[1:2]
            if (
                not bar
                or not number
                or not number[0].isdigit()
                or int(number[0]) >= len(CATEGORIES)
            ):
                raise ValueError(f"data: {path} is not WordNet's: {line[:60]!r}")
            definition = gloss.split('; "')[0].strip()
            if definition not in known:
                known.add(definition)
                category = CATEGORIES[int(number[0])]
                rows.append((definition, category, "train", f"{category}/{synset[:8]}"))
    return _as_table(rows, str(folder))


def tokenise(
    texts: np.ndarray, train: np.ndarray, tokenizer: str, *, vocabulary: int, length: int
) -> tuple[np.ndarray, int]:
    """Numbers of words, [N, length] int64, and how many numbers there are.

    Args:
        texts: [N].
        train: mask [N] of those that `words` are counted in.
        tokenizer: `words`: the most frequent words of the training texts, in lower case, and marks;
            or a `tokenizer.json` of Hugging Face's package tokenizers.
        vocabulary: how many numbers `words` has at most.
        length: what is longer is cut, what is shorter ends in 0.

    Raises:
        ValueError, FileNotFoundError: the tokenizer cannot be read.
    """
    if tokenizer == "words":
        counts = CountVectorizer(token_pattern=WORDS, max_features=max(1, vocabulary - 2))
        known = counts.fit(texts[train]).vocabulary_
        words = counts.build_analyzer()
        found = [[known.get(word, -1) + 2 for word in words(text)] for text in texts]
        size = len(known) + 2
    else:
        found, size = _tokenizer_file(Path(tokenizer).expanduser(), texts)
    numbers = np.full((len(texts), length), PADDING, dtype=np.int64)
    for row, text in zip(numbers, found, strict=True):
        text = text[:length] or [UNKNOWN]
        row[: len(text)] = text
    return numbers, size


def _tokenizer_file(path: Path, texts: np.ndarray) -> tuple[list[list[int]], int]:
    if not path.exists():
        raise FileNotFoundError(f"tokenizer: {path} does not exist; allowed: words, or a file")
    try:
        from tokenizers import Tokenizer

        reader = Tokenizer.from_file(str(path))
    except ImportError as error:
        raise ValueError("tokenizer: a file needs the package: pip install tokenizers") from error
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(f"tokenizer: cannot read {path}: {error}") from error
    reader.no_padding()
    reader.no_truncation()
    numbers = [[number + 2 for number in text.ids] for text in reader.encode_batch(texts.tolist())]
    return numbers, reader.get_vocab_size() + 2


def _lines(path: Path) -> Iterator[tuple[str, str, str, str]]:
    split = path.parent.name if path.parent.name in SPLITS else "train"
    for number, line in enumerate(_read(path).splitlines()):
        if line.strip():
            yield line.strip(), path.stem, split, f"{path.stem}/{number}"


def _table(path: Path) -> Iterator[tuple[str, str, str, str]]:
    table = csv.DictReader(io.StringIO(_read(path), newline=""), delimiter=DELIMITERS[path.suffix])
    for number, row in enumerate(table):
        text, label, split = (row.get(key) for key in ("text", "label", "split"))
        split = split or split_of(path)
        if not text or not label or split not in SPLITS:
            raise ValueError(
                f"data: row {number + 1} of {path} has the text {text!r}, the label {label!r} and the "
                f"split {split!r}; the columns text and label are needed, and split may be "
                f"{', '.join(SPLITS)}"
            )
        yield text, label, split, f"{label}/{path.stem}-{number}"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from error


def _as_table(rows: list[tuple[str, str, str, str]], where: str) -> Table:
    if not rows:
        raise ValueError(f"data: no texts in {where}; expected CLASS.txt, or .csv or .tsv tables")
    texts, labels, splits, names = zip(*rows, strict=True)
    inputs = np.empty(len(rows), dtype=object)
    inputs[:] = texts
    return Table(inputs, np.array(labels), np.array(splits), np.array(names))
