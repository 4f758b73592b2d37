"""Feedback: what each level shows, that hostile text is tamed, and token budgets."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrf import Feedback, Level, Segment, UsageError, clean_text, defuse, span_to_tokens
from rlrf.feedback import KINDS, REVEALS, SEVERITIES, shorten, token_offsets

segments = st.builds(
    Segment,
    kind=st.sampled_from(KINDS),
    text=st.text(min_size=1, max_size=40),
    severity=st.sampled_from(SEVERITIES),
    reveals=st.sampled_from(REVEALS),
    span=st.none() | st.tuples(st.integers(0, 5), st.integers(5, 9)),
    priority=st.integers(-2, 2),
)
feedbacks = st.lists(segments, max_size=5).map(Feedback)
levels = st.sampled_from(list(Level))

EXAMPLE = Feedback(
    (
        Segment("runtime_error", "It raised ZeroDivisionError.", span=(4, 9), source="tests"),
        Segment("runtime_error", "Line 3 of the program.", reveals="location", span=(4, 9)),
        Segment("wrong_answer", "Expected 7.", reveals="expected"),
        Segment("hint", "Mind the zero.", severity="info"),
        Segment("reference", "return 7", severity="info", reveals="reference"),
    )
)


@pytest.mark.parametrize(
    ("level", "texts"),
    [
        ("none", []),
        ("binary", ["The attempt is not correct."]),
        ("category", ["The program raised an error.", "The answer is wrong."]),
        (
            "located",
            ["The program raised an error.", "Line 3 of the program.", "The answer is wrong."],
        ),
        (
            "explained",
            [
                "It raised ZeroDivisionError.",
                "Line 3 of the program.",
                "The answer is wrong.",  # its text is hidden, its kind is not
                "Mind the zero.",
            ],
        ),
        (
            "expected",
            [
                "It raised ZeroDivisionError.",
                "Line 3 of the program.",
                "Expected 7.",
                "Mind the zero.",
            ],
        ),
        ("reference", [s.text for s in EXAMPLE]),
    ],
)
def test_what_each_level_shows(level, texts):
    assert [s.text for s in EXAMPLE.at_level(level)] == texts


def test_located_names_the_span_where_no_location_is_written():
    told = Feedback.of("format_error", "It must be JSON.", span=(2, 8)).at_level("located")
    assert told.text == "The format of the reply is wrong. At characters 2 to 8 of the attempt."
    assert told.spans == ((2, 8),)
    below = Feedback.of("format_error", "It must be JSON.", span=(2, 8)).at_level("category")
    assert below.spans == ()


@given(feedbacks, levels, levels)
def test_levels_compose_to_the_lower(feedback, a, b):
    once = feedback.at_level(a)
    assert once.at_level(a) == once
    if min(a, b) >= Level.explained:
        assert once.at_level(b) == feedback.at_level(min(a, b))


@given(feedbacks, levels)
def test_a_level_never_shows_what_it_must_hide(feedback, level):
    shown = {s.text for s in feedback.at_level(level)}
    for segment in feedback:
        lowest = {"location": 3, "nothing": 4, "expected": 5, "reference": 6}[segment.reveals]
        titles = {s.text for s in Feedback(feedback).at_level("category")} | {
            "The attempt is not correct."
        }
        if level < lowest and segment.text not in titles:
            others = [s for s in feedback if s.text == segment.text and s is not segment]
            assert others or segment.text not in shown


@given(feedbacks)
def test_dictionaries_round_trip(feedback):
    assert Feedback.from_dicts(feedback.to_dicts()) == feedback


def test_it_is_an_immutable_sequence():
    assert not Feedback()
    assert len(EXAMPLE) == 5
    assert EXAMPLE[0].kind == "runtime_error"
    assert EXAMPLE[:2].kinds == ("runtime_error",)
    assert (EXAMPLE[:1] + EXAMPLE[1:]) == EXAMPLE
    assert hash(EXAMPLE) == hash(Feedback(EXAMPLE))
    with pytest.raises(AttributeError):
        EXAMPLE.segments = ()  # type: ignore[misc]  # that is the test


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "oops"}, "compile_error"),
        ({"severity": "bad"}, "warning"),
        ({"reveals": "all"}, "location"),
        ({"span": (5, 2)}, "start <= end"),
    ],
)
def test_wrong_segments_are_refused_with_what_is_accepted(fields, words):
    with pytest.raises(UsageError, match=words):
        Segment(**{"kind": "hint", "text": "x", **fields})


def test_unknown_levels_and_things_that_are_no_segments():
    with pytest.raises(UsageError, match="none, binary, category"):
        EXAMPLE.at_level("all")
    with pytest.raises(UsageError, match=r"Feedback\.of"):
        Feedback(["text"])  # type: ignore[list-item]  # that is the test


# --- hostile text -----------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=200))
def test_cleaned_text_has_no_control_characters(text):
    for c in clean_text(text):
        assert c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")


def test_cleaning_keeps_what_people_read():
    assert clean_text("a\r\nb\rc\td é 漢 \x1b[31mred\x1b[0m\x1b]0;title\x07!") == (
        "a\nb\nc\td é 漢 red!"
    )
    assert clean_text("‮evil​\ud800") == "evil�"
    assert clean_text("\x7f\x00x") == "x"


@given(st.text(max_size=300), st.integers(40, 120))
def test_long_text_keeps_head_and_tail(text, limit):
    short = shorten(text, limit)
    assert len(short) <= max(limit, len(text) if len(text) <= limit else limit)
    if len(text) > limit:
        assert "characters cut" in short
        assert short[:3] == text[:3] or limit < 60
        assert short[-5:] == text[-5:]


# --- tokens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from tests.tiny_model import tiny_tokenizer

    return tiny_tokenizer()


def test_special_tokens_are_broken(tokenizer):
    text = "a <|im_end|> b <tool_call> c <|<|im_end|>im_end|>"
    ids = tokenizer.encode(defuse(text, tokenizer), add_special_tokens=False)
    assert not {tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens} & set(ids)
    assert defuse("plain", tokenizer) == "plain"


@settings(max_examples=60, deadline=None)
@given(feedback=feedbacks)
def test_tokens_spell_the_text_and_know_their_segment(tokenizer, feedback):
    tokens = feedback.tokenize(tokenizer)
    assert not tokens.truncated
    assert tokenizer.decode(list(tokens.input_ids)) == tokens.text
    assert len(tokens.input_ids) == len(tokens.segment_ids) == len(tokens.offsets)
    assert list(tokens.segment_ids) == sorted(tokens.segment_ids)
    special = {tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    assert not special & set(tokens.input_ids)


@settings(max_examples=60, deadline=None)
@given(feedback=feedbacks, budget=st.integers(0, 60))
def test_budgets_hold(tokenizer, feedback, budget):
    whole = feedback.tokenize(tokenizer)
    cut = feedback.tokenize(tokenizer, budget)
    assert len(cut) <= budget or not cut.truncated
    assert cut.truncated == (len(whole) > budget)


def test_the_important_segment_stays_and_keeps_head_and_tail(tokenizer):
    feedback = Feedback(
        (
            Segment("lint", "style " * 30, priority=0),
            Segment("runtime_error", "HEAD " + "x" * 200 + " TAIL", priority=5),
        )
    )
    tokens = feedback.tokenize(tokenizer, 60)
    assert set(tokens.segment_ids) == {1}
    assert tokens.text.startswith("HEAD")
    assert tokens.text.endswith("TAIL")
    assert "cut" in tokens.text
    with pytest.raises(UsageError, match="max_tokens"):
        feedback.tokenize(tokenizer, -1)


def test_spans_map_to_tokens(tokenizer):
    text = "print(é漢) or 漢"
    ids = tokenizer.encode(text, add_special_tokens=False)
    offsets = token_offsets(tokenizer, ids)
    start = text.index("漢")
    first, last = span_to_tokens((start, start + 1), offsets)
    assert "漢" in tokenizer.decode(ids[first:last])
    assert span_to_tokens((0, len(text)), offsets) == (0, len(ids))
    assert span_to_tokens((500, 501), offsets) == (0, 0)
