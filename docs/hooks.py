"""A mkdocs hook: tables of knobs come from the code, so they cannot go stale."""

from __future__ import annotations

import re
from typing import Any

MARK = re.compile(r"<!-- knobs: (\w+) -->")


def knobs(name: str) -> str:
    """The fields a config class adds to its base, as a Markdown table."""
    from rlrf_trainers import config

    cls = getattr(config, name)
    own = [k for k in cls.model_fields if k in cls.__annotations__]
    rows = ["| knob | default | what it is, and where the default comes from |", "|---|---|---|"]
    for key in own:
        field = cls.model_fields[key]
        default = repr(field.default).replace("\\n", "\\\\n").replace("|", "\\|")
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{key}` | `{default}` | {text} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return MARK.sub(lambda m: knobs(m.group(1)), markdown)
