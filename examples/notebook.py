"""Run a notebook without Jupyter, keep what it shows, and write it as a page of the documentation.

    python examples/notebook.py examples/first_steps.ipynb docs/first-steps.md

A cell shows what it prints and what its last line is worth, as Jupyter does.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any


def execute(source: str, names: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Run one cell in a namespace; returns its outputs in Jupyter's form."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, outputs = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        shown = {"text/plain": _lines(repr(value)[:2000])}
        if hasattr(value, "_repr_html_"):
            shown = {"text/html": _lines(value._repr_html_()), "text/plain": [f"<{type(value).__name__}>"]}
        outputs.append({"output_type": "execute_result", "data": shown, "metadata": {}, "execution_count": None})
    return outputs


def run(notebook: dict[str, Any], where: str) -> dict[str, Any]:
    """The notebook with the outputs of its cells, which run from top to bottom."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        cell["outputs"] = execute("".join(cell["source"]), names, f"{where}, cell {number + 1}")
        cell["execution_count"] = number + 1
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number + 1
    return notebook


def page_of(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by their file's name."""
    parts, pictures = [f"<!-- Made from {name}.ipynb by examples/notebook.py. -->"], {}

    def picture(match: re.Match[str]) -> str:
        file = f"{name}-{len(pictures) + 1}.svg"
        pictures[file] = base64.b64decode(match[1])
        # In Markdown's own form, whose address mkdocs fits to the place of the page.
        return f"\n\n![What the cell shows]({file})\n\n"

    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            shown = output.get("data", {})
            if "text/html" in shown:
                page = "".join(shown["text/html"])
                parts.append(re.sub(r'<img src="data:image/svg\+xml;base64,([^"]+)"[^>]*>', picture, page).rstrip())
            else:
                text = "".join(output.get("text") or shown["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(file: Path, page: Path) -> None:
    notebook = run(json.loads(file.read_text(encoding="utf-8")), file.name)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, pictures = page_of(notebook, file.stem)
    page.write_text(text, encoding="utf-8")
    for name, content in pictures.items():
        (page.parent / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
