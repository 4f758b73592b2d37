"""A mkdocs hook: what the code knows better than a page is taken from the code.

``<!-- knobs: Class -->`` becomes the table of a configuration's fields, ``<!-- checks -->`` that of
the conformance checks, so neither can go stale.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

_KNOBS = re.compile(r"<!-- knobs: (\w+) -->")
_CHECKS = re.compile(r"<!-- checks -->")
# Docstrings name things as Sphinx does, :class:`x`; Markdown would show the role as text.
_ROLE = re.compile(r":(?:py:)?(?:class|func|meth|attr|data|mod|exc|obj):(?=<code>|`)")


def knobs(name: str) -> str:
    """The fields a config class adds to its base, as a Markdown table."""
    from rlrf_trainers import config

    cls = getattr(config, name)
    own = [k for k in cls.model_fields if k in cls.__annotations__]
    rows = ["| knob | default | what it is, and where the default comes from |", "|---|---|---|"]
    for key in own:
        field = cls.model_fields[key]
        what = _cell(field.description)
        if names := literals(field.annotation):
            what += f"; values: {', '.join(f'`{name}`' for name in names)}"
        rows.append(f"| `{key}` | `{_cell(repr(field.default))}` | {what} |")
    return "\n".join(rows)


def literals(kind: Any) -> list[str]:
    """The names that a field of this type accepts, or a list of them; none where others may be."""
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def checks() -> str:
    """The checks of the conformance suite, as a Markdown table."""
    from rlrf.testing import ALL

    rows = ["| check | what must hold |", "|---|---|"]
    for check in ALL:
        rows.append(f"| `{check.id}` | {_cell(check.what.replace('``', '`'))} |")
    return "\n".join(rows)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    markdown = _KNOBS.sub(lambda m: knobs(m.group(1)), markdown)
    return _CHECKS.sub(lambda _: checks(), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with every page's HTML, before the table of contents is built around it."""
    return _ROLE.sub("", html)
