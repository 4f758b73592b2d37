"""Fixtures that several tests share."""

from __future__ import annotations

import gymnasium
import pytest

import rlrf
from tests import code_data
from tests.environments_for_tests import Echo, Guess


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
