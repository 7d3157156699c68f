"""What mkdocs does here beyond its settings: pages from outside docs/, pictures, links to names."""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import pictures  # noqa: E402 - beside this file, which mkdocs runs from elsewhere

RESULTS = "benchmarks/results/amd-epyc-2t"
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    f"{RESULTS}.md": "report.md",
    f"{RESULTS}.png": "report.png",
    "benchmarks/results/peers-time.png": "peers-time.png",
    "benchmarks/results/peers-memory.png": "peers-memory.png",
    "examples/quick_start.ipynb": "quick_start.ipynb",
}
"""Where files of the repository that are not in docs/ are in the site."""
SOURCES = {place: source for source, place in PLACES.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""The target of a Markdown link to another file, without its anchor."""


def public_names() -> list[str]:
    """What `pc_kernels.__all__` says, without importing it."""
    tree = ast.parse((ROOT / "pc_kernels/__init__.py").read_text("utf-8"))
    (names,) = (
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    )
    return list(names)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of PLACES, and the pictures, drawn anew."""
    outside = {place: ROOT / source for source, place in PLACES.items()}
    folder = ROOT / "build" / "docs"
    drawn = {f"pictures/{path.name}": path for path in pictures.draw_all(folder)}
    for place, path in (outside | drawn).items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    place = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(place, f"docs/{place}"))

    def to_page(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        there = PLACES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(there, posixpath.dirname(place) or ".")

    return LINK.sub(to_page, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Links public names in the text to their descriptions."""
    names = "|".join(public_names())
    return re.sub(
        rf'(?<!">)<code>((?:pc_kernels\.)?({names}))</code>',
        r'<autoref identifier="pc_kernels.\2" optional><code>\1</code></autoref>',
        html,
    )
