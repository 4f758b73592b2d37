"""What may be shown and recorded: addresses and command lines without their secrets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_NAME = r"(?:\w*[-_])?(?:api[-_]?key|key|token|secret|password|passwd|sig|signature)"
_OPTION = re.compile(rf"(?i)--?{_NAME}")
_GIVEN = re.compile(rf"(?i)(?<![a-z0-9]){_NAME}[\"']?\s*[=:]\s*")
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://[^\s\"',}]+")


def safe_url(url: str) -> str:
    """An address as it may be shown: no user, no password, no values of its query, no fragment."""
    head, _, query = re.sub(r"//[^/?#]*@", "//", url).partition("#")[0].partition("?")
    names = [part.partition("=")[0] for part in query.split("&") if part]
    return head.rstrip("/") + ("?" + "&".join(f"{n}=***" for n in names) if names else "")


def safe_argv(argv: Sequence[str]) -> list[str]:
    """A command line as it may be recorded: what follows a secret's name hidden, addresses safe."""
    shown = []
    for before, word in itertools.pairwise(["", *argv]):
        word = _ADDRESS.sub(lambda found: safe_url(found[0]), word)
        if _OPTION.fullmatch(before):
            word = "***"
        elif found := _GIVEN.search(word):  # also within a table; the rest of it is hidden, too
            word = word[: found.end()] + "***"
        shown.append(word)
    return shown
