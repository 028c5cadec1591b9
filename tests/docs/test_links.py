"""Links between documents: each names a file that is there, and a heading that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import examples
from examples import ROOT

LINK = re.compile(r"!?\[(?:[^\]\\]|\\.)*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} +(.*?)\s*#*$")


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines that are no code."""
    found = []
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            found.append((number, re.sub(r"`[^`]*`", lambda code: "`" * len(code[0]), line)))
    return found


def slug(heading: str) -> str:
    """GitHub's name of a heading, which is mdBook's too."""
    text = LINK.sub(lambda link: link[0][link[0].index("[") + 1 : link[0].index("](")], heading)
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    found: dict[str, int] = {}
    names = set()
    fenced = False
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and (heading := HEADING.match(line)):
            name = slug(heading[1])
            names.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return names


def broken(path: Path, target: str) -> str | None:
    if re.match(r"(https?|mailto):", target):
        return None
    file, _, anchor = target.partition("#")
    to = (path.parent / file).resolve() if file else path
    if not to.exists():
        return f"there is no {file}"
    if not to.is_relative_to(ROOT):
        return f"{file} is outside the repository"
    if anchor and to.suffix == ".md" and anchor not in anchors(to):
        return f"{to.name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("path", examples.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    failures = [
        f"{path.relative_to(ROOT)}:{number}: {target}: {reason}"
        for number, line in prose(path)
        for target in LINK.findall(line)
        if (reason := broken(path, target))
    ]
    assert not failures, "\n".join(failures)


def test_links_are_found_and_broken_ones_seen(tmp_path: Path) -> None:
    assert sum(len(LINK.findall(line)) for path in examples.documents() for _, line in prose(path)) > 100
    assert LINK.findall("see [a](b.md#c), ![d](e.png) and [`f`](g.md)") == ["b.md#c", "e.png", "g.md"]
    page = ROOT / "docs/ARCHITECTURE.md"
    for target in ["NOTHING.md", "SCHEDULING.md#nothing", "#nothing", "../../outside"]:
        assert broken(page, target), target
    for target in ["SCHEDULING.md#sameness", "#the-house", "https://example.com/x", "../README.md"]:
        assert not broken(page, target), target
    assert slug("What is `m40llm`, honestly?") == "what-is-m40llm-honestly"


def test_every_document_is_in_the_book() -> None:
    summary = ROOT / "docs/SUMMARY.md"
    listed = {(summary.parent / target).resolve() for target in LINK.findall(summary.read_text())}
    assert listed == set(examples.documents()) - {summary}
