from __future__ import annotations

import json
import operator
import re
import warnings
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given
from hypothesis import strategies as st

import rlrf
import rlrf.testing
from rlrf_environments.format_rules import FAMILIES, RULES, SPLITS, FormatRules

JSON = 'Reply only with a JSON object with the single key "answer".'
ENVS: dict[str, Any] = {rule: FormatRules(rule=rule, feedback="reference") for rule in RULES}
TASK = "language-france"  # the right answer is "French"


def graded(reply: str, rule: str = "json", task: str = TASK) -> rlrf.Outcome:
    outcome: rlrf.Outcome = ENVS[rule].grade(task, reply)
    return outcome


def blamed(reply: str, outcome: rlrf.Outcome) -> str | None:
    span = outcome.feedback[0].span
    return None if span is None else reply[span[0] : span[1]]


# --- the rules --------------------------------------------------------------------------------

OBEYS = [
    ("json", '{"answer": "French"}'),
    ("json", ' \n{"answer": "French"}\n'),
    ("json", '{\n  "answer": "French"\n}'),
    ("json", '```json\n{"answer": "French"}\n```'),
    ("json", '```\n\n{"answer": "French"}\n\n```\n'),
    ("json", '```json {"answer": "French"}```'),
    ("json", '```json\r\n{"answer": "French"}\r\n```'),
    ("json", '{"\\u0061nswer": "\\u0046rench"}'),
    ("json", '{"answer": "  fRENCH "}'),
    ("json", '{"answer": "Ｆｒｅｎｃｈ"}'),
    ("bare", "French"),
    ("bare", " french\n"),
    ("tag", "<answer>French</answer>"),
    ("tag", "\n<answer>\n french </answer> "),
    ("brackets", "[[French]]"),
    ("brackets", "[[ french ]]"),
]


@pytest.mark.parametrize(("rule", "reply"), OBEYS)
def test_a_reply_that_obeys_and_is_right_passes(rule: str, reply: str) -> None:
    outcome = graded(reply, rule)
    assert outcome.reward == 1.0
    assert outcome.metrics == {"obeys_rule": 1.0, "right_answer": 1.0}
    assert not outcome.feedback


FAULTS = [
    # rule, reply, what is wrong, the part at fault
    ("json", "", "the reply is empty", None),
    ("json", " \n\t", "the reply is empty", None),
    ("json", "They speak French.\n", "the reply is plain text", "They speak French."),
    ("json", "French", "the reply is plain text", "French"),
    ("json", "```\n```", "the reply is plain text", "```\n```"),
    ("json", '"French"', "the reply is JSON, but not an object", '"French"'),
    ("json", " 7", "the reply is JSON, but not an object", "7"),
    ("json", '[{"answer": "French"}]', "the reply is JSON, but not an object", None),
    ("json", "```json\nnull\n```", "the reply is JSON, but not an object", "null"),
    (
        "json",
        'Sure! {"answer": "French"}',
        "there is other text before the JSON object",
        "Sure!",
    ),
    (
        "json",
        '{"answer": "French"}\n\nDone. ',
        "there is other text after the JSON object",
        "Done.",
    ),
    (
        "json",
        '({"answer": "French"})',
        "there is other text before and after the JSON object",
        "(",
    ),
    (
        "json",
        'Here:\n```json\n{"answer": "French"}\n```',
        "there is other text before the JSON object",
        "Here:",
    ),
    (
        "json",
        '```json\n{"answer": "French"}\n```\nIt is a language.',
        "there is other text after the JSON object",
        "It is a language.",
    ),
    (
        "json",
        '```python\n{"answer": "French"}\n```',
        "there is other text before the JSON object",
        "python",
    ),
    (
        "json",
        '{"answer": "French"}\n{"answer": "German"}',
        "there is other text after the JSON object",
        '{"answer": "German"}',
    ),
    ("json", '```json\n{"answer": "French"}\n', "the code fence is not closed", "```json"),
    ("json", '{"answer": "Fren', "the JSON object cannot be parsed", '{"answer": "Fren'),
    (
        "json",
        "So: {'answer': 'French'}",
        "the JSON object cannot be parsed",
        "{'answer': 'French'}",
    ),
    ("json", '{"answer": NaN}', "the JSON object cannot be parsed", '{"answer": NaN}'),
    (
        "json",
        '```json\n{"data": {"answer": "French"}',  # cut off: what is nested is not the reply
        "the JSON object cannot be parsed",
        '{"data": {"answer": "French"}',
    ),
    ("json", "{}", "the object has no key", "{}"),
    (
        "json",
        '{"value": "French"}',
        "the object has no key \"answer\", but a key 'value'",
        '"value"',
    ),
    (
        "json",
        '{"Answer": "French"}',
        "the object has no key \"answer\", but a key 'Answer'",
        '"Answer"',
    ),
    (
        "json",
        '{"<|im_end|> obey": "French"}',  # no short name: not quoted
        'the object has no key "answer", but a key of another name',
        '"<|im_end|> obey"',
    ),
    (
        "json",
        '{"answer": "x", "x": "French"}',  # the key x, not the value "x"
        "the object has a further key 'x'",
        '"x"',
    ),
    (
        "json",
        '{"answer": "German", "answer": "French"}',
        'the key "answer" occurs more than once',
        '"answer": "French"',
    ),
    ("json", '{"answer": ["French"]}', "the value is neither a string nor a number", '["French"]'),
    ("json", '{"answer" : true }', "the value is neither a string nor a number", "true"),
    ("json", '{"answer": null}', "the value is neither a string nor a number", "null"),
    (
        "json",
        '{"a":' * 1000,
        "the reply has too many brackets to be read as JSON",
        '{"a":' * 1000,
    ),
    ("bare", " ", "the reply is empty", None),
    ("bare", "French is spoken there", "the reply is more than the answer", None),
    ("bare", "French\nis", "the reply has more than one line", None),
    ("bare", "French.", "the reply has punctuation", "."),
    ("bare", '"French"', "the reply has punctuation", '"'),
    ("tag", "", "the reply is empty", None),
    ("tag", "It is French.", "the reply is plain text", "It is French."),
    ("tag", "French</answer>", "there is no <answer>", "</answer>"),
    (
        "tag",
        "So <answer>French",
        "there is no </answer> after <answer>",
        "<answer>French",
    ),
    (
        "tag",
        "So <answer>French</answer>",
        "there is other text before the marked answer",
        "So",
    ),
    (
        "tag",
        "<answer>German</answer> or <answer>French</answer>",
        "there is other text after the marked answer",
        "or <answer>French</answer>",
    ),
    ("tag", "<answer><answer>French</answer>", "<answer> occurs more than once", "<answer>"),
    ("tag", "<answer> </answer>", "there is no answer between the marks", "<answer> </answer>"),
    ("brackets", "[French]", "the reply is plain text", "[French]"),
    ("brackets", "[[French]] ok", "there is other text after the marked answer", "ok"),
]


@pytest.mark.parametrize(("rule", "reply", "words", "part"), FAULTS)
def test_a_fault_is_named_and_located(rule: str, reply: str, words: str, part: str | None) -> None:
    outcome = graded(reply, rule)
    assert outcome.reward == 0.0
    assert outcome.metrics == {"obeys_rule": 0.0, "right_answer": 0.0}
    broken, reference = outcome.feedback
    assert broken.kind == "format_error"
    assert broken.reveals == "nothing"
    assert broken.text == f"The output format is wrong: {words}. {RULES[rule].demand}"
    assert reference.kind == "reference"
    if not reply.strip():
        assert broken.span is None
    else:
        assert blamed(reply, outcome) == (part or reply)


def test_the_demands_are_the_measured_words() -> None:
    assert RULES["json"].demand == JSON


def test_every_level_shows_what_it_may_of_a_broken_format() -> None:
    full = graded("I say French.").feedback
    explained = f"The output format is wrong: the reply is plain text. {JSON}"
    assert {level.name: full.at_level(level).text for level in rlrf.Level} == {
        "none": "",
        "binary": "The attempt is not correct.",
        "category": "The format of the reply is wrong.",
        "located": "The format of the reply is wrong. At characters 0 to 13 of the attempt.",
        "explained": explained,
        "expected": explained,
        "reference": f'{explained}\n\nA correct reply: {{"answer": "French"}}',
    }


def test_every_level_shows_what_it_may_of_a_wrong_value() -> None:
    outcome = graded('{"answer": "a"}')  # "a" also stands in the key
    assert outcome.metrics == {"obeys_rule": 1.0, "right_answer": 0.0}
    explained = f"The output format is right, but the value is wrong. {JSON}"
    expected = f"{explained}\n\nThe right answer is French."
    full = outcome.feedback
    assert full.kinds == ("wrong_answer", "reference")
    assert {level.name: full.at_level(level).text for level in rlrf.Level} == {
        "none": "",
        "binary": "The attempt is not correct.",
        "category": "The answer is wrong.",
        "located": "The answer is wrong. At characters 11 to 14 of the attempt.",
        "explained": explained,
        "expected": expected,
        "reference": f'{expected}\n\nA correct reply: {{"answer": "French"}}',
    }


@pytest.mark.parametrize(
    ("rule", "reply", "part"),
    [
        ("json", '```json\n{"answer": "German"}\n```', '"German"'),
        ("json", '{"answer": ""}', '""'),
        ("json", '{"answer":7.50}', "7.50"),
        ("bare", " German\n", "German"),
        ("tag", "<answer> German </answer>", "German"),
        ("brackets", "[[German]]", "German"),
    ],
)
def test_a_wrong_value_is_located(rule: str, reply: str, part: str) -> None:
    outcome = graded(reply, rule)
    assert outcome.feedback[0].kind == "wrong_answer"
    assert outcome.metrics["obeys_rule"] == 1.0
    assert blamed(reply, outcome) == part


@pytest.mark.parametrize("value", ["7", "7.0", '"7"', '"7.0"', '" 7 "', '"７"', "70e-1", '"+7"'])
def test_numbers_are_compared_as_numbers(value: str) -> None:
    assert graded(f'{{"answer": {value}}}', task="add-3-4").reward == 1.0


@pytest.mark.parametrize(
    "value", ["7.0000001", "70", "1e400", "9" * 5000, '"seven"', '"7_0"', '"nan"', "-7", '"7 8"']
)
def test_other_numbers_are_wrong_not_broken(value: str) -> None:
    outcome = graded(f'{{"answer": {value}}}', task="add-3-4")
    assert outcome.reward == 0.0
    assert outcome.feedback[0].kind == "wrong_answer"


@pytest.mark.parametrize("value", ["7", "7.0", "+7"])
def test_a_bare_number_may_have_a_point(value: str) -> None:
    assert graded(value, "bare", "add-3-4").reward == 1.0


def test_synonyms_are_accepted() -> None:
    for answer in ("Chinese", "mandarin", "Mandarin  Chinese"):
        assert graded(json.dumps({"answer": answer}), task="language-china").reward == 1.0


def test_degenerate_replies_are_cheap() -> None:
    # Each is the worst case of a parser that backtracks, scans again, or recurses.
    n = 100_000
    for reply in ("```" + " " * n + "x", "x```" + "\n" * n + "{}", "[" * n, '{"a":' * n, "{" * n):
        for rule in RULES:
            assert graded(reply, rule).reward == 0.0


MARKS = '``` ```json { } [ ] [[ ]] "answer" "x" : , 1 1e999 null <answer> </answer> French \\ "'
PIECES = st.lists(
    st.sampled_from([*MARKS.split(), "\n", " ", "\ud800", "é", "\x00"]), max_size=14
).map("".join)


@given(st.one_of(st.text(), PIECES), st.sampled_from(sorted(RULES)))
def test_no_reply_breaks_the_grader(reply: str, rule: str) -> None:
    outcome = graded(reply, rule)
    assert bool(outcome.feedback) == (outcome.reward == 0.0)
    assert outcome == graded(reply, rule)
    for start, end in outcome.feedback.spans:
        assert start < end <= len(reply)
        assert reply[start:end] == reply[start:end].strip()
    shown = outcome.feedback.at_level("explained").text
    assert "French" not in shown or "'French'" in shown  # a key that the reply itself has


@given(st.text(), st.text(), st.integers(0, 3))
def test_text_around_an_object_never_passes(before: str, after: str, indent: int) -> None:
    right = json.dumps({"answer": "French"}, indent=indent or None)
    outcome = graded(before + right + after)
    assert outcome.reward == (0.0 if (before + after).strip() else 1.0)


@given(
    st.dictionaries(st.text(max_size=8), st.none() | st.text(max_size=4) | st.integers()),
    st.sampled_from(["", " ", "\n\t"]),
)
def test_only_the_single_key_obeys(value: dict[str, object], space: str) -> None:
    reply = json.dumps(value, separators=("," + space, ":" + space), ensure_ascii=False)
    outcome = graded(space + reply)
    obeys = list(value) == ["answer"] and value["answer"] is not None
    assert outcome.metrics["obeys_rule"] == obeys


# --- the questions ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_of_every_task_passes(rule: str, split: str) -> None:
    env = ENVS[rule]
    for task in env.tasks(split):
        reply = env.reference_solution(task)
        assert env.grade(task, reply).reward == 1.0
        if rule == "json":
            assert env.grade(task, f"```json\n{reply}\n```").reward == 1.0


def test_no_question_is_in_two_splits_or_twice() -> None:
    questions = [str(t.messages[0]["content"]) for s in SPLITS for t in ENVS["json"].tasks(s)]
    assert len(set(questions)) == len(questions) >= 900
    assert all("\n" not in q for q in questions)


def test_two_phrasings_of_a_sum_are_in_the_same_split() -> None:
    split_of = {i: s for s in SPLITS for i in ENVS["json"].tasks(s).ids()}
    for task_id, split in split_of.items():
        family, _, operands = task_id.partition("-")
        other = {"add": "plus", "subtract": "minus"}.get(family)
        if other:
            assert split_of[f"{other}-{operands}"] == split


def test_every_split_asks_every_family_and_mixes_them_from_the_start() -> None:
    for split in SPLITS:
        tasks = ENVS["json"].tasks(split)
        families = [t.metadata["family"] for t in tasks]
        assert set(families) == set(FAMILIES)
        assert set(families[: len(FAMILIES)]) == set(FAMILIES)
    assert len(ENVS["json"].tasks("eval")) >= 100


OPERATIONS = {"add": operator.add, "subtract": operator.sub, "times": operator.mul}
OPERATIONS |= {"plus": operator.add, "minus": operator.sub, "divide": operator.floordiv}
OPERATIONS |= {"larger": max}


def test_the_arithmetic_is_right() -> None:
    """By another way than the one that made the questions: from the text alone."""
    checked = 0
    for split in SPLITS:
        for task in ENVS["json"].tasks(split):
            family, text = task.metadata["family"], str(task.messages[0]["content"])
            numbers = [int(n) for n in re.findall(r"\d+", text)]
            if family in OPERATIONS:
                answer = OPERATIONS[family](*numbers)
                if family == "divide":
                    assert numbers[0] % numbers[1] == 0
            elif family in ("half", "after"):
                answer = numbers[0] / 2 if family == "half" else numbers[0] + 1
            elif family == "first-letter":
                answer = text.removesuffix("?").split()[-1][0]
            else:
                continue
            checked += 1
            assert graded(json.dumps({"answer": answer}), task=task.id).reward == 1.0, text
    assert checked > 700


def test_opposites_agree_with_each_other() -> None:
    """If cold is the opposite of hot, hot is one of cold, where both are asked."""
    asked = {i for s in SPLITS for i in ENVS["json"].tasks(s).ids() if i.startswith("opposite-")}
    pairs = 0
    for task_id in asked:
        answer = json.loads(ENVS["json"].reference_solution(ENVS["json"]._find_task(task_id)))
        back = f"opposite-{answer['answer']}"
        if back in asked:
            pairs += 1
            word = task_id.removeprefix("opposite-")
            assert graded(json.dumps({"answer": word}), task=back).reward == 1.0, task_id
    assert pairs >= 20


def test_the_order_never_changes() -> None:
    """A change here changes what a published number was measured on: raise the version."""
    assert ENVS["json"].tasks("eval").ids()[:8] == [
        "divide-48-8",
        "language-thailand",
        "after-25",
        "digits-fourteen",
        "plus-9-4",
        "first-letter-bread",
        "subtract-19-9",
        "times-2-10",
    ]
    sizes = {split: len(ENVS["json"].tasks(split)) for split in SPLITS}
    assert sizes == {"train": 630, "validation": 119, "eval": 182}


def test_a_question_says_nothing_of_the_rule() -> None:
    for split in SPLITS:
        for task in ENVS["json"].tasks(split):
            assert [m["role"] for m in task.messages] == ["user"]
            assert not re.search(r"\b(json|keys?|format|tags?|brackets?)\b", str(task.messages))
            assert task.hidden is None
            assert set(task.metadata) == {"family"}


# --- options ----------------------------------------------------------------------------------


def test_families_choose_the_questions() -> None:
    for families in ("add", ["add"], ["add", "add"]):
        tasks = FormatRules(families=families).tasks("eval")
        assert {t.metadata["family"] for t in tasks} == {"add"}
    some = FormatRules(families=["add", "symbol"]).tasks("train").ids()
    everything = ENVS["json"].tasks("train").ids()
    assert set(some) == {i for i in everything if i.split("-")[0] in ("add", "symbol")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "jason"}, r"unknown rule of format-rules 'jason'. Did you mean 'json'\?"),
        ({"rule": None}, r"unknown rule of format-rules 'None'. Did you mean 'json'\?"),
        ({"rule": "xml"}, "'xml'. Known: bare, brackets, json, tag."),
        ({"families": ["adds"]}, r"family of format-rules 'adds'. Did you mean 'add'\?"),
        ({"families": "subtracts"}, r"'subtracts'. Did you mean 'subtract'"),
        ({"families": []}, "families is .* name at least one"),
        ({"split": "test"}, "unknown split 'test'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(rlrf.UsageError, match=message):
        rlrf.make("format-rules-v0", **options)


# --- conformance ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_conformance(rule: str) -> None:
    report = rlrf.testing.check_env(
        rlrf.make("format-rules-v0", rule=rule),
        actions=[reply for r, reply, *_ in FAULTS if r == rule],
    )
    report.raise_if_failed()


def test_gymnasium_has_no_complaint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(rlrf.make("format-rules-v0"), skip_render_check=True)


def test_an_episode_is_one_step_with_feedback() -> None:
    env = rlrf.make("format-rules-v0", split="eval")
    (question,), info = env.reset(options={"task_id": "add-3-4"})
    assert question["content"] == "What is 3 + 4?"
    assert not info["feedback"]
    _, reward, terminated, truncated, info = env.step("3 + 4 is 7.")
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info["feedback"].text == f"The output format is wrong: the reply is plain text. {JSON}"
