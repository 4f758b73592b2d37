"""Data files as pandas and datasets write them; tasks by the ids the field calls them by."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

import rlrf
from rlrf import UnknownIdError, UsageError
from rlrf_environments.code.livecodebench import as_day, load_tests, read_rows
from rlrf_environments.code.tasks import read_tasks
from tests import code_data
from tests.code_data import code_tasks, question, write_jsonl

needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
BOM = b"\xef\xbb\xbf"


# --- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "split", "published", "own"),
    [
        ("humaneval-v0", "all", "HumanEval/3", "humaneval-3"),
        ("humaneval-plus-v0", "all", "HumanEval/3", "humaneval-3"),
        ("mbpp-v0", "test", "Mbpp/11", "mbpp-11"),
        ("mbpp-v0", "train", "602", "mbpp-602"),
        ("mbpp-v0", "eval", "MBPP/511", "mbpp-511"),
        ("mbpp-plus-v0", "all", "Mbpp/7", "mbpp-7"),
        ("livecodebench-v6", "all", "Add 3", "9003"),
        ("livecodebench-v6", "all", "add-3", "9003"),
        ("livecodebench-v6", "all", "abc904_a", "abc904_a"),
    ],
)
def test_a_published_id_is_an_alias(published_code_data, env, split, published, own):
    made = rlrf.make(env)
    assert made.tasks(split).get(published).id == own
    assert published == own or published not in made.tasks(split).ids()
    assert made.reset(options={"task_id": published})[1]["task_id"] == own
    assert made.grade(published, "no program").reward == 0.0
    policy = rlrf.ScriptedPolicy(lambda messages: "no program")
    (rollout,) = rlrf.rollout(made, policy, [published], group_size=1)
    assert rollout.task_id == own
    with pytest.raises(UnknownIdError, match="HumanEval/999"):
        made.grade("HumanEval/999", "x")


def test_an_alias_of_two_tasks_names_neither(tmp_path):
    rows = [question(i, question_title="Same") for i in range(3)]
    rows.append(question(4, question_title=question(2)["question_id"]))
    env = rlrf.make("livecodebench-v6", data=write_jsonl(tmp_path / "q.jsonl", rows))
    assert env.tasks("all").get("Same") is None
    assert env.tasks("all").get(rows[2]["question_id"]).id == rows[2]["question_id"]
    assert len(env.tasks("all").ids()) == 4


# --- code-v0 ----------------------------------------------------------------------------------


def exported(**changes):
    """A row with every field there is, as a table has."""
    row = {
        "entry_point": None,
        "starter_code": None,
        "checker": None,
        "limits": None,
        "split": None,
        "metadata": None,
        **code_tasks()[0],
        **changes,
    }
    row["tests"] = [{"args": None, "public": None, **t} for t in code_tasks()[0]["tests"]]
    return {**row, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solution": None},
        {"limits": {"cpu_s": 2, "memory_mb": None}},
        {"limits": '{"cpu_s": 2}', "metadata": '{"a": 1}'},
        {"checker": {"name": "tokens", "tolerance": None}},
        {"tests": json.dumps(code_tasks()[0]["tests"])},
        {"tests": {"stdin": ["1\n", "4\n"], "expected": ["2\n", "8\n"], "public": [True, None]}},
        {"entry_point": "f", "tests": [{"args": "[1]", "expected": None, "stdin": None}]},
    ],
)
def test_rows_as_tables_export_them(tmp_path, changes):
    data = write_jsonl(tmp_path / "t.jsonl", [exported(**changes)])
    (task,) = read_tasks(data)
    first = task.problem.tests()[0]
    assert first.public is ("entry_point" not in changes)
    assert task.starter_code == ""


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, packed):
    raw = BOM + json.dumps(code_tasks()[0]).encode()
    file = tmp_path / "t.jsonl"
    file.write_bytes(gzip.compress(raw) if packed else raw)
    assert [t.problem.id for t in read_tasks(file)] == ["double-0"]
    assert len(read_tasks(file, raw.decode())) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tests": [{"stdin": "1", "expected": float("nan")}]}, "tests.0.expected"),
        ({"tests": [{"args": [1], "expected": [1, [float("nan")]]}]}, "tests.0.expected.1.0"),
        ({"starter_code": float("nan")}, "starter_code"),
        ({"metadata": {"a": {"b": float("nan")}}}, "metadata.a.b"),
        ({"checker": {"name": "tokens", "tolerance": float("nan")}}, "checker.tolerance"),
    ],
)
def test_nan_is_refused_with_its_place(tmp_path, changes, field):
    data = write_jsonl(tmp_path / "t.jsonl", [code_tasks()[1], {**code_tasks()[0], **changes}])
    with pytest.raises(UsageError, match=rf"t\.jsonl, line 2: {field} is NaN"):
        read_tasks(data)


STDIN = {"stdin": "1", "expected": float("nan")}
CALL = {"args": [1], "expected": [1, [float("nan")]]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tests": json.dumps([STDIN])}, "tests.0.expected"),
        ({"tests": json.dumps([CALL]), "entry_point": "f"}, "tests.0.expected.1.0"),
        ({"tests": json.dumps(json.dumps([CALL])), "entry_point": "f"}, "tests.0.expected.1.0"),
        ({"tests": json.dumps({"args": [[1]], "expected": [float("nan")]})}, "tests.expected.0"),
        ({"metadata": '{"a": {"b": NaN}}'}, "metadata.a.b"),
        ({"limits": '{"cpu_s": NaN}'}, "limits.cpu_s"),
    ],
)
def test_nan_in_what_is_nested_is_refused_with_its_place(tmp_path, changes, field):
    data = write_jsonl(tmp_path / "t.jsonl", [code_tasks()[1], {**code_tasks()[0], **changes}])
    with pytest.raises(UsageError, match=rf"t\.jsonl, line 2: {field} is NaN"):
        read_tasks(data)


def test_nan_among_nested_arguments_is_none_of_ours(tmp_path):
    for args in ([float("nan")], "[NaN]"):
        tests = json.dumps([{"args": args, "expected": 1}])
        row = {**code_tasks()[0], "entry_point": "f", "tests": tests}
        (task,) = read_tasks(write_jsonl(tmp_path / "t.jsonl", [row]))
        assert str(task.problem.tests()[0].case.args) == "(nan,)"


def test_infinity_is_an_answer_but_no_tolerance(tmp_path):
    row = {**code_tasks()[0], "entry_point": "f"}
    row["tests"] = [{"args": [float("nan")], "expected": float("inf")}]
    (task,) = read_tasks(write_jsonl(tmp_path / "t.jsonl", [row]))
    assert task.problem.tests()[0].case.expected == float("inf")
    row["checker"] = {"name": "returns", "tolerance": float("inf")}
    with pytest.raises(UsageError, match=r"line 1: checker\.tolerance: .*finite"):
        read_tasks(write_jsonl(tmp_path / "t.jsonl", [row]))


# --- LiveCodeBench ----------------------------------------------------------------------------

TESTS = [{"input": "9", "output": "9", "testtype": "stdin"}]
COLUMNS = {name: [t[name] for t in TESTS] for name in TESTS[0]}


@pytest.mark.parametrize("hidden", [TESTS, json.dumps(TESTS), COLUMNS, code_data.packed(TESTS)])
@pytest.mark.parametrize("public", [TESTS, json.dumps(TESTS), COLUMNS, [], None, ""])
def test_tests_may_be_lists_by_now(tmp_path, hidden, public):
    row = question(0, private_test_cases=hidden, public_test_cases=public)
    file = write_jsonl(tmp_path / "q.jsonl", [row])
    file.write_bytes(BOM + file.read_bytes())
    tests = load_tests(read_rows(file, 6)[0])
    assert [t.public for t in tests] == [True] * bool(public) + [False]
    assert {(t.case.stdin, t.case.expected) for t in tests} == {("9", "9")}


@pytest.mark.parametrize("field", ["public_test_cases", "private_test_cases"])
@pytest.mark.parametrize("lost", [float("nan"), None])
@pytest.mark.parametrize("name", ["input", "output"])
def test_a_test_that_an_export_has_lost_is_told(tmp_path, field, lost, name):
    tests = json.dumps([TESTS[0], {**TESTS[0], name: lost}])
    for written in (tests, code_data.packed(json.loads(tests))):
        row = question(0, **{field: written if field.startswith("private") else tests})
        (read,) = read_rows(write_jsonl(tmp_path / "q.jsonl", [row]), 6)
        with pytest.raises(UsageError, match=r"broken test: .*(1\.\w+ is NaN|is null)"):
            load_tests(read)


def test_fields_that_are_null(tmp_path):
    null = dict.fromkeys(("starter_code", "metadata", "question_title", "contest_id"))
    row = question(0, private_test_cases=None, **null)
    env = rlrf.make("livecodebench-v6", data=write_jsonl(tmp_path / "q.jsonl", [row]))
    (task,) = env.tasks("all")
    assert "None" not in task.messages[0]["content"]
    assert env.tasks("all").get("none") is None
    for field in ("question_content", "question_id", "contest_date", "difficulty"):
        file = write_jsonl(tmp_path / "q.jsonl", [question(0), question(1, **{field: None})])
        with pytest.raises(UsageError, match=rf"q\.jsonl, line 2: {field} is null"):
            read_rows(file, 6)
    file = write_jsonl(tmp_path / "q.jsonl", [question(1, starter_code=float("nan"))])
    with pytest.raises(UsageError, match=r"q\.jsonl, line 1: starter_code is NaN"):
        read_rows(file, 6)


@pytest.mark.parametrize(
    ("date", "day"),
    [
        ("2025-02-01T00:00:00", "2025-02-01"),
        ("2025-02-01T00:00:00.000Z", "2025-02-01"),
        ("2025-02-01 00:00:00", "2025-02-01"),
        ("2025-02-01", "2025-02-01"),
        (1738368000000, "2025-02-01"),
        (1738368000000.0, "2025-02-01"),
        ("1738368000000", "2025-02-01"),
        (1738368000, "2025-02-01"),
        (1738368000000000, "2025-02-01"),
        (1738368000000000000, "2025-02-01"),
        ("soon", None),
        (-1, None),
        (1e300, None),
        (True, None),
        ([], None),
    ],
)
def test_dates_as_exports_have_them(tmp_path, date, day):
    assert (as_day(date) or "")[:10] == (day or "")
    rows = [question(0), question(1, contest_date=date)]
    data = write_jsonl(tmp_path / "q.jsonl", rows)
    if day is None:
        with pytest.raises(UsageError, match=r"line 2: contest_date is .*milliseconds since 1970"):
            read_rows(data, 6)
        return
    env = rlrf.make("livecodebench-v6", data=data, contest_start="2025-02-01", contest_end=day)
    assert [t.metadata["contest_date"] for t in env.tasks("all")] == [day]


def test_ids_that_became_floats(tmp_path):
    row = question(1, question_id=10000001.0)
    env = rlrf.make("livecodebench-v6", data=write_jsonl(tmp_path / "q.jsonl", [row]))
    assert env.tasks("all").ids() == ["10000001"]
    row = {**code_data.mbpp(11), "task_id": 11.0}
    env = rlrf.make("mbpp-v0", data=write_jsonl(tmp_path / "m.jsonl", [row]))
    assert env.tasks("test").ids() == ["mbpp-11"]


# --- HumanEval and MBPP -----------------------------------------------------------------------


@pytest.mark.parametrize("written", [lambda v: v, json.dumps])
def test_lists_of_mbpp_may_be_null_or_json(tmp_path, written):
    row = code_data.mbpp(11)
    row |= {"test_list": written(row["test_list"]), "challenge_test_list": None}
    row |= {"test_setup_code": None}
    env = rlrf.make("mbpp-v0", data=write_jsonl(tmp_path / "m.jsonl", [row]))
    assert len(env._find_task("Mbpp/11").hidden.tests()) == 3
    plus = code_data.mbpp_plus(11)
    plus |= {"base_input": written(plus["base_input"]), "plus_input": written(plus["plus_input"])}
    plus["atol"] = None
    env = rlrf.make("mbpp-plus-v0", data=write_jsonl(tmp_path / "p.jsonl", [plus]))
    assert len(env.tasks("all")) == 1


@pytest.mark.parametrize(
    ("env", "row", "change", "why"),
    [
        ("humaneval-v0", code_data.humaneval(1), {"prompt": None}, "prompt is None; it must be"),
        ("humaneval-v0", code_data.humaneval(1), {"test": None}, "test is None"),
        ("humaneval-v0", code_data.humaneval(1), {"prompt": float("nan")}, "prompt is NaN"),
        ("mbpp-v0", code_data.mbpp(11), {"text": None}, "text is None"),
        ("mbpp-v0", code_data.mbpp(11), {"test_list": "x"}, "'x' is no list"),
        ("mbpp-v0", code_data.mbpp(11), {"test_list": "[NaN]"}, "test 0 is nan; it must be"),
        ("mbpp-v0", code_data.mbpp(11), {"test_list": ["assert 1", None]}, "test 1 is None"),
        ("mbpp-plus-v0", code_data.mbpp_plus(11), {"atol": float("nan")}, "atol is NaN"),
        ("mbpp-plus-v0", code_data.mbpp_plus(11), {"atol": float("inf")}, "atol is inf; it must"),
        ("mbpp-plus-v0", code_data.mbpp_plus(11), {"atol": -1}, "atol is -1.0; it must"),
    ],
)
def test_what_must_be_there_is_told(tmp_path, env, row, change, why):
    data = write_jsonl(tmp_path / "x.jsonl", [{**row, **change}])
    with pytest.raises(UsageError, match=rf"x\.jsonl, line 1: .*{why}"):
        len(rlrf.make(env, data=data).tasks("train"))
