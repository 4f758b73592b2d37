"""What is fetched once and kept: where it lies, and whether the hub can be asked at all."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

HUB_TIMEOUT_S = 3.0


def cache_dir(*parts: str) -> Path:
    """A folder in rlrf's cache: ``$RLRF_HOME``, by default ``~/.cache/rlrf``. Not created."""
    home = os.environ.get("RLRF_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "rlrf").joinpath(*parts)


def hub_answers() -> bool:
    """Whether the hub can be reached, asked once and for no longer than :data:`HUB_TIMEOUT_S`.

    Its own client would retry for minutes before giving up.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(endpoint, timeout=HUB_TIMEOUT_S, follow_redirects=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True
