"""Model cards without the empty headings of the Hub's template, which PEFT writes beside every adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynalora.common.files import write_file

CARD = "README.md"
_BLANK = "[More Information Needed]"
_TITLE = "# Model Card for Model ID"
_VERSIONS = "### Framework versions"
"""What PEFT puts behind the template's last heading, to which it does not belong."""


def tidy_card(folder: str | Path) -> None:
    """Leave out of a folder's card what nobody filled in; without a card nothing happens."""
    file = Path(folder) / CARD
    if file.exists():
        text = file.read_text(encoding="utf-8")
        if (tidied := without_blanks(text)) != text:
            write_file(file, tidied)


def without_blanks(card: str) -> str:
    """A model card without the parts of the Hub's template that nobody filled in.

    Headings of the template go with all below them if nothing there is anybody's own. All else stays as it is.
    """
    if _BLANK not in card and _TITLE not in card:
        return card
    template = _template()
    sections = list(_sections(card))
    own = [
        any(line.strip() and line not in template and _BLANK not in line for line in lines[1:]) for lines in sections
    ]
    kept: list[str] = []
    for index, lines in enumerate(sections):
        level = _level(lines[0])
        below = [
            other
            for other in range(index + 1, len(sections))
            if sections[other][0] != _VERSIONS
            and all(_level(sections[between][0]) > level for between in range(index + 1, other + 1))
        ]
        filled = own[index] or any(own[other] or sections[other][0] not in template for other in below)
        if level > 1 and lines[0] in template and not filled:
            continue
        kept += [line for line in lines if line in lines[:1] or not (_BLANK in line or _is_hint(line, template))]
    base = re.search(r"^base_model: ([\w./-]+)$", card, flags=re.MULTILINE)
    text = "\n".join(kept).replace(_TITLE, f"# Adapter of {base[1]}" if base else "# Adapter")
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _template() -> set[str]:
    """The lines of the Hub's template as PEFT fills it in."""
    from huggingface_hub import ModelCard, ModelCardData

    content = str(ModelCard.from_template(ModelCardData()).content)
    return {line for line in content.splitlines() if line.strip()}


def _is_hint(line: str, template: set[str]) -> bool:
    """Whether a line is one of the template's own that are no headings: comments and suggested sentences."""
    return line in template and not line.startswith("#") and line != "---"


def _sections(card: str) -> Iterator[Sequence[str]]:
    """The lines of each heading with what follows it; first what stands before any."""
    lines: list[str] = []
    fenced = False
    for line in card.splitlines():
        fenced ^= line.startswith("```")
        if _level(line) and not fenced and lines:
            yield lines
            lines = []
        lines.append(line)
    yield lines


def _level(line: str) -> int:
    """How deep a heading is; 0: no heading."""
    found = re.match(r"(#{1,6}) ", line)
    return len(found[1]) if found else 0
