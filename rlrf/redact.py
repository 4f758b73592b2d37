"""What may be shown and recorded: addresses and command lines without their secrets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_SECRET = re.compile(r"(?i)(.*[-_])?(api[-_]?key|key|token|secret|password|passwd|sig|signature)")


def safe_url(url: str) -> str:
    """An address as it may be shown: no user, no password, no values of its query."""
    head, _, query = re.sub(r"//[^/?#]*@", "//", url).partition("?")
    names = [part.partition("=")[0] for part in query.split("&") if part]
    return head.rstrip("/") + ("?" + "&".join(f"{n}=***" for n in names) if names else "")


def safe_argv(argv: Sequence[str]) -> list[str]:
    """A command line as it may be recorded: values of secret options hidden, addresses safe."""
    shown = []
    for before, word in itertools.pairwise(["", *argv]):
        name, equals, _ = word.partition("=")
        if equals and _SECRET.fullmatch(name.lstrip("-").rpartition(".")[2]):
            word = f"{name}=***"
        elif before.startswith("--") and _SECRET.fullmatch(before.lstrip("-")):
            word = "***"
        elif "://" in word:
            named = "=" in word.partition("://")[0]
            word = f"{name}={safe_url(word[len(name) + 1 :])}" if named else safe_url(word)
        shown.append(word)
    return shown
