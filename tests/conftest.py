"""Fixtures that several tests share."""

from __future__ import annotations

import logging
import os
import re

# Tiny models gain nothing from threads, and workers that run beside each other lose by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import pytest

import rlrf
from rlrf import notices
from tests import code_data
from tests.environments_for_tests import Echo, Guess

_LIBRARIES = ("transformers", "peft", "torch", "accelerate", "huggingface_hub", "tokenizers")
_DEPRECATED = re.compile(r"deprecated|will be removed|will be renamed|no longer supported", re.I)


class _Heard(logging.Handler):
    """Keeps what a library's logger says of deprecated things."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if _DEPRECATED.search(message):
            self.messages.append(f"{record.name}: {message}")


@pytest.hookimpl(tryfirst=True)  # before -m leaves the slow ones out
def pytest_collection_modifyitems(items):
    """What needs a docker daemon is slow: the fast tests need nothing that pip does not bring."""
    for item in items:
        if item.get_closest_marker("docker"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _deprecations():
    """What a library has deprecated is not used by us, also where only its logger says so.

    pyproject.toml makes errors of warnings; transformers tells of some things through its logger.
    """
    heard = _Heard()
    for name in _LIBRARIES:
        logging.getLogger(name).addHandler(heard)
    yield
    for name in _LIBRARIES:
        logging.getLogger(name).removeHandler(heard)
    assert not heard.messages, "a library says that something used here is deprecated"


@pytest.fixture(autouse=True)
def _nothing_noticed_yet():
    """What earlier tests were told of slow paths does not silence later ones."""
    notices._said.clear()


@pytest.fixture
def registered():
    """Two environments under ids, gone again after the test."""
    before = set(gymnasium.registry)
    rlrf.register("test-echo-v0", Echo)
    rlrf.register("test-guess-v0", Guess, kwargs={"max_turns": 4})
    yield
    for name in set(gymnasium.registry) - before:
        gymnasium.registry.pop(name)


@pytest.fixture
def published_code_data(tmp_path, monkeypatch):
    """Small data sets in the published formats, named by the environment variables."""
    for name, file in code_data.write_all(tmp_path).items():
        monkeypatch.setenv(name, file)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with chat markup as special tokens; nothing is downloaded."""
    pytest.importorskip("transformers", reason="needs the extra 'train'")
    from tests.tiny_model import tiny_tokenizer

    return tiny_tokenizer()
