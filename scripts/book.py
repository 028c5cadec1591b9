#!/usr/bin/env python3
"""The documentation as a book: `make docs` runs this before and after mdBook.

book.py stage DIR    puts the documents that docs/SUMMARY.md lists into DIR/src, in the repository's own order of folders,
                     so that links between them are right as they are, with the files that they link to
book.py check DIR    holds every link within a built book to a file and to a name in it
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def stage(to: Path) -> None:
    """A book of its own folder, as mdBook takes every file below its sources for a part of the book."""
    shutil.rmtree(to, ignore_errors=True)
    (to / "src").mkdir(parents=True)
    shutil.copy(ROOT / "docs/book.toml", to)
    # The summary lies in docs/ and names its chapters from there; mdBook wants it at the top.
    from_top = lambda link: f"]({posixpath.normpath(posixpath.join('docs', link[1]))})"
    summary = LINK.sub(from_top, (ROOT / "docs/SUMMARY.md").read_text())
    (to / "src/SUMMARY.md").write_text(summary)
    chapters = [target for target, _ in LINK.findall(summary)]
    for chapter in chapters:
        copy(chapter, to / "src")
        text = (ROOT / chapter).read_text()
        # mdBook makes index.html of a README.md, but leaves links to it as they are.
        (to / "src" / chapter).write_text(re.sub(r"\bREADME\.md(?=[)#])", "index.md", text))
        for target, _ in LINK.findall(text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(chapter), target))
            if not urlsplit(target).scheme and path not in chapters:
                copy(path, to / "src")


def copy(name: str, to: Path) -> None:
    if not (ROOT / name).is_file():
        sys.exit(f"book: {name}: a link's target that is no file")
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, to / name)


class Page(HTMLParser):
    """A page's links and the names that can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id" and value:
                self.names.add(value)
            elif value and ((tag == "a" and key == "href") or (tag == "img" and key == "src")):
                self.links.append(value)


def check(book: Path) -> None:
    pages = {path: Page(path) for path in sorted(book.rglob("*.html"))}
    failures = []
    count = 0
    for path, page in pages.items():
        # Its links begin at the address that was not found.
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not to.is_file():
                failures.append(f"{path.relative_to(book)}: {link}: no such file")
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].names:
                failures.append(f"{path.relative_to(book)}: {link}: no such heading")
    if failures or not count:
        sys.exit("\n".join(failures) or f"book: no links in {book}")
    print(f"{len(pages)} pages, {count} links, all of them right: {book}/index.html")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stage", folder]:
            stage(Path(folder))
        case ["check", folder]:
            check(Path(folder).resolve())
        case _:
            sys.exit(__doc__)
