"""Feedback: what each level shows, that hostile text is tamed, and token budgets."""

from __future__ import annotations

import copy
import itertools
import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrf import Feedback, Level, Segment, UsageError, clean_text, defuse, span_to_tokens
from rlrf.feedback import KINDS, REVEALS, SEVERITIES, shorten, token_offsets
from rlrf.wrappers import DropFeedback
from tests.environments_for_tests import Echo

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
    assert feedback.at_level(a).at_level(a) == feedback.at_level(a)
    assert feedback.at_level(a).at_level(b) == feedback.at_level(min(a, b))


@pytest.mark.parametrize("a", Level)
@pytest.mark.parametrize("b", Level)
def test_every_pair_of_levels_composes(a, b):
    assert EXAMPLE.at_level(a).at_level(b) == EXAMPLE.at_level(min(a, b))


@given(feedbacks)
def test_a_higher_level_says_no_less(feedback):
    for lower, higher in itertools.pairwise(Level):
        less, more = feedback.at_level(lower), feedback.at_level(higher)
        assert bool(less) <= bool(more)
        own = [s for s in less if s in feedback.segments]
        assert set(own) <= set(more)
        if lower >= Level.category:
            assert set(less.kinds) <= set(more.kinds)


@given(feedbacks)
def test_binary_does_not_tell_failures_apart(feedback):
    assert feedback.at_level("binary").segments in (
        (),
        (Segment("wrong_answer", "The attempt is not correct."),),
    )


@given(feedbacks, levels.filter(lambda level: level >= Level.explained))
def test_what_is_shown_keeps_its_order(feedback, level):
    shown = feedback.at_level(level)
    own = [s for s in shown if s in feedback.segments]
    assert own == [s for s in feedback if s in shown.segments]


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


@given(st.text(alphabet=st.characters(), max_size=200))
def test_cleaning_twice_changes_nothing(text):
    assert clean_text(clean_text(text)) == clean_text(text)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b(B\x1b[mplain\x1bc", "plain"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\x1bPdata\x1b\\after", "after"),
        # A control string without an end must not swallow the traceback that follows.
        ("\x1b]0;never closed\nTraceback: boom", "\nTraceback: boom"),
        ("a\x1b\x1b[31m[32mb", "a[32mb"),
        ("tail\x1b[", "tail"),
        ("\u202egnp.exe\u2066\ufeff\u00ad", "gnp.exe"),
        ("\ud83d half", "\ufffd half"),
        ("line\r\nline\rline", "line\nline\nline"),
    ],
)
def test_escapes(raw, clean):
    assert clean_text(raw) == clean
    assert Segment("hint", raw).text == clean


@given(st.text(max_size=400), st.integers(0, 120))
def test_shortening_never_exceeds_its_limit(text, limit):
    short = shorten(text, limit)
    assert len(short) <= limit or short == text
    if len(text) > limit:
        assert len(short) >= min(limit, 1) * max(0, limit - 1)  # and wastes at most a digit


def test_the_mark_counts_what_is_gone():
    short = shorten("a" * 500 + "b" * 500, 100)
    gone = int(short.partition("[... ")[2].partition(" ")[0])
    assert gone == 1000 - short.replace("characters cut", "").count("a") - short.count("b")
    assert shorten("0123456789", 4) == "6789"  # no room for a mark: the end says most


def test_a_long_segment_is_capped_when_it_is_built():
    segment = Segment("runtime_error", "start " + "x" * 10**6 + " end")
    assert len(segment.text) <= 8192
    assert segment.text.startswith("start ")
    assert segment.text.endswith(" end")


@given(feedbacks, st.integers(0, 120))
def test_rendering_keeps_to_its_limit(feedback, limit):
    assert feedback.render() == feedback.text == str(feedback)
    assert len(feedback.render(limit)) <= limit
    assert feedback.render(len(feedback.text)) == feedback.text


def test_rendering_drops_what_matters_least():
    feedback = Feedback(
        (
            Segment("lint", "style " * 20),
            Segment("runtime_error", "The cause.", priority=5),
            Segment("hint", "Mind the zero.", priority=1),
        )
    )
    assert feedback.render(26) == "The cause.\n\nMind the zero."
    cut = feedback.render(100)
    assert cut.endswith("style \n\nThe cause.\n\nMind the zero.")
    assert cut.startswith("style ")
    assert "characters cut" in cut
    assert feedback.render(12) == "The cause."


@given(feedbacks)
def test_copies_and_pickles_are_equal(feedback):
    assert pickle.loads(pickle.dumps(feedback)) == copy.deepcopy(feedback) == feedback


def test_text_must_be_text():
    with pytest.raises(UsageError, match="must be a string"):
        Segment("hint", None)  # type: ignore[arg-type]  # that is the test


# --- tokens -------------------------------------------------------------------------------------


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


class Added:
    """A tokenizer that only has a vocabulary of added tokens."""

    def __init__(self, *added, special=()):
        self.added_tokens_decoder = dict(enumerate(added))
        self.all_special_tokens = list(special)


@given(
    st.lists(st.text("<|ab> ", min_size=1, max_size=4), max_size=4),
    st.lists(st.text("<|ab> ", min_size=1, max_size=4), max_size=2),
    st.text("<|ab> ", max_size=12),
)
def test_defusing_ends_and_leaves_no_token(added, special, text):
    safe = defuse(text, Added(*added, special=special))
    for token in (*(t for t in added if len(t) > 1), *special):
        assert not token.strip() or token not in safe


def test_letters_that_some_tokenizers_add_are_left_alone():
    assert defuse("aõb <|x|>", Added("õ", "<|x|>")) == "aõb < |x|>"


def test_segment_ids_and_offsets_point_into_the_text(tokenizer):
    feedback = Feedback(
        (Segment("hint", "né漢 one"), Segment("lint", ""), Segment("critique", "two"))
    )
    tokens = feedback.tokenize(tokenizer)
    assert tokens.text == "né漢 one\n\ntwo"
    assert set(tokens.segment_ids) == {0, 2}
    of_last = [o for o, s in zip(tokens.offsets, tokens.segment_ids, strict=True) if s == 2]
    assert tokens.text[of_last[0][0] : of_last[-1][1]] == "two"
    assert Feedback().tokenize(tokenizer) == Feedback().tokenize(tokenizer, 0)


def test_slow_tokenizers_give_the_same(tokenizer):
    class Slow:
        all_special_tokens = tokenizer.all_special_tokens
        added_tokens_decoder = tokenizer.added_tokens_decoder
        encode, decode = tokenizer.encode, tokenizer.decode

    feedback = Feedback((Segment("hint", "plain words"), Segment("lint", "<|im_end|> more")))
    fast, slow = feedback.tokenize(tokenizer), feedback.tokenize(Slow())
    assert (fast.input_ids, fast.segment_ids, fast.text) == (
        slow.input_ids,
        slow.segment_ids,
        slow.text,
    )
    assert fast.offsets == slow.offsets


def test_a_cut_segment_does_not_run_into_the_next(tokenizer):
    feedback = Feedback((Segment("lint", "s" * 300), Segment("hint", "Kept.", priority=1)))
    tokens = feedback.tokenize(tokenizer, 60)
    assert tokens.text.endswith("s\n\nKept.")
    assert tokens.text.startswith("s")
    assert "[... cut ...]" in tokens.text
    assert len(tokens) <= 60
    assert len(tokens) > 50


def test_every_byte_of_a_blamed_character_is_blamed(tokenizer):
    ids = tokenizer.encode("a漢b", add_special_tokens=False)
    first, last = span_to_tokens((1, 2), token_offsets(tokenizer, ids))
    assert tokenizer.decode(ids[first:last]) == "漢"


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20), data=st.data())
def test_token_offsets_tile_the_text(tokenizer, text, data):
    ids = tokenizer.encode(defuse(text, tokenizer), add_special_tokens=False)
    decoded = tokenizer.decode(ids)
    offsets = token_offsets(tokenizer, ids)
    assert len(offsets) == len(ids)
    if "\ufffd" in decoded:
        return
    assert "".join(decoded[a:b] for a, b in offsets) == decoded
    if decoded:
        start = data.draw(st.integers(0, len(decoded) - 1))
        end = data.draw(st.integers(start + 1, len(decoded)))
        first, last = span_to_tokens((start, end), offsets)
        assert decoded[start:end] in tokenizer.decode(ids[first:last])
        assert offsets[last - 1][0] < end
        assert offsets[first][1] >= start


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (("wrong-answer", "x"), r"Segment\.kind is 'wrong-answer'.*did you mean 'wrong_answer'\?"),
        (("hint", "x", "warn"), r"did you mean 'warning'\?"),
        (("zzz", "x"), r"hint, reference$"),
        ((None, "x"), r"Segment\.kind is None; .* reference$"),
    ],
)
def test_a_near_match_of_what_is_unknown_is_named(fields, told):
    with pytest.raises(UsageError, match=told):
        Segment(*fields)


def test_a_near_match_of_a_kind_to_drop_is_named():
    with pytest.raises(UsageError, match=r"did you mean 'runtime_error'\?"):
        DropFeedback(Echo(), kinds="runtime-error")
