"""Build hooks of the documentation."""

from __future__ import annotations

import re
from typing import Any

# Docstrings may name objects with Sphinx roles, as the libraries around this one do; Markdown shows the role itself.
_ROLE = re.compile(r":(?:py:)?(?:attr|class|data|func|meth|mod|obj):(?=<code|`)")


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles' names and keep the code they mark."""
    return _ROLE.sub("", html)
