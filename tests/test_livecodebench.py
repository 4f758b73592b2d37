"""LiveCodeBench: published files are read safely, filtered, split, and graded."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import shutil
import zlib

import pytest

import rlrf
from rlrf import UsageError
from rlrf.sandbox import CallCase, RawRun, StdinCase
from rlrf_environments.code import answers, livecodebench
from rlrf_environments.code.answers import MANY_ANSWERS, tolerance
from rlrf_environments.code.livecodebench import (
    OfficialLines,
    OfficialReturns,
    Results,
    load_tests,
    read_rows,
    unpack_tests,
)
from tests.code_data import packed, question, solution, write_jsonl

needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "lcb.jsonl", [question(i) for i in range(24)])


def make(file, **options):
    return rlrf.make("livecodebench-v6", data=file, **options)


def ids(env, split="all"):
    return set(env.tasks(split).ids())


# --- files ------------------------------------------------------------------------------------


def test_hidden_tests_are_unpacked_as_published_and_from_json():
    tests = [{"input": "1", "output": "2\n", "testtype": "stdin"}]
    assert unpack_tests(packed(tests)) == tests
    assert unpack_tests(json.dumps(tests)) == tests
    assert unpack_tests("") == []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(json.dumps(tests), protocol=protocol)
        assert unpack_tests(base64.b64encode(zlib.compress(pickled)).decode()) == tests


class _Bomb:
    ran = False

    def __reduce__(self):
        return exec, ("import tests.test_livecodebench as t; t._Bomb.ran = True",)


def _wrap(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (_wrap(pickle.dumps(_Bomb())), "only a string is accepted"),
        (_wrap(pickle.dumps([1, 2])), "only a string is accepted"),
        (_wrap(pickle.dumps("no json")), "cannot be read"),
        (_wrap(pickle.dumps('"a string"')), "no list"),
        (_wrap(pickle.dumps("[]"))[:-12], "cannot be read"),
        (_wrap(b"not a pickle"), "cannot be read"),
        (base64.b64encode(b"not zlib").decode(), "cannot be read"),
        ("%%%", "cannot be read"),
    ],
)
def test_a_file_cannot_make_it_run_anything(text, why):
    with pytest.raises(UsageError, match=why):
        unpack_tests(text, "q")
    assert not _Bomb.ran


def test_a_question_with_its_hidden_tests(file):
    rows = read_rows(file, 6)
    assert "private_test_cases" not in rows[0].fields
    tests = load_tests(rows[0])
    assert [t.public for t in tests] == [True, True] + [False] * 7
    assert tests[0].case == StdinCase("1", "1")
    assert load_tests(rows[1])[0].case == CallCase((1,), 2)


def test_a_large_file_is_read_once_and_again_when_it_changes(file, monkeypatch, tmp_path):
    monkeypatch.setenv("RLRF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(livecodebench, "_WHOLE_FILE_BYTES", 1)
    first = read_rows(file, 6)
    scanned = []
    real = livecodebench._scan
    monkeypatch.setattr(livecodebench, "_scan", lambda path: scanned.append(path) or real(path))
    assert read_rows(file, 6) == first
    assert not scanned
    assert load_tests(read_rows(file, 6)[3]) == load_tests(first[3])
    write_jsonl(file, [question(i) for i in range(5)])
    assert len(read_rows(file, 6)) == 5
    assert scanned


def test_a_file_of_the_hub_is_checked_against_its_checksum(tmp_path):
    good = write_jsonl(tmp_path / "x", [question(0)])
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    good.rename(tmp_path / digest)
    os.symlink(tmp_path / digest, tmp_path / "test.jsonl")
    assert len(read_rows(tmp_path, 1)) == 1
    with (tmp_path / digest).open("a") as damaged:
        damaged.write("\n")
    with pytest.raises(UsageError, match="is damaged: its SHA-256"):
        read_rows(tmp_path, 1)


def test_releases_are_cumulative(tmp_path):
    for n, start in ((1, 0), (2, 10), (3, 20)):
        name = f"test{n if n > 1 else ''}.jsonl"
        write_jsonl(tmp_path / name, [question(i) for i in range(start, start + 4)])
    sizes = [len(rlrf.make(f"livecodebench-v{n}", data=tmp_path).tasks("all")) for n in (1, 2, 3)]
    assert sizes == [4, 8, 12]
    with pytest.raises(UsageError, match=r"holds no test4\.jsonl"):
        len(rlrf.make("livecodebench-v4", data=tmp_path).tasks())


def test_a_collection_of_releases_keeps_them_apart(tmp_path):
    rows = [question(i, _version="v5" if i < 3 else "v6") for i in range(8)]
    file = write_jsonl(tmp_path / "both.jsonl", rows)
    assert len(rlrf.make("livecodebench-v5", data=file).tasks("all")) == 3
    assert len(rlrf.make("livecodebench-v6", data=file).tasks("all")) == 8


def test_what_is_wrong_with_a_file_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="data names 'no' for LiveCodeBench"):
        len(make("no").tasks())
    monkeypatch.setenv("RLRF_LIVECODEBENCH", "nowhere")
    with pytest.raises(UsageError, match="RLRF_LIVECODEBENCH names 'nowhere'"):
        len(rlrf.make("livecodebench-v6").tasks())
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(question(0)) + "\n{}\n")
    with pytest.raises(UsageError, match="line 2: question_title is missing"):
        len(make(broken).tasks())
    broken.write_text("nothing")
    with pytest.raises(UsageError, match=r"line 1.*no JSON"):
        len(make(broken).tasks())
    broken.write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match="no UTF-8; if the file is compressed, unpack it"):
        len(make(broken).tasks())
    write_jsonl(broken, [question(0, _version="v6")])
    with pytest.raises(UsageError, match="no question of release v2 in the data"):
        len(rlrf.make("livecodebench-v2", data=broken).tasks())
    with pytest.raises(UsageError, match="data is 5; it must be a path"):
        len(make(5).tasks())
    row = question(0, public_test_cases='[{"input": "1"}]', private_test_cases="")
    env = make(write_jsonl(broken, [row]))
    with pytest.raises(UsageError, match="broken test"):
        env.grade("abc900_a", solution(0))
    row = question(0, public_test_cases="[]", private_test_cases="")
    with pytest.raises(UsageError, match="has no test"):
        make(write_jsonl(broken, [row])).grade("abc900_a", solution(0))


def test_without_a_file_the_hub_is_asked_and_fails_over_fast(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the extra 'data'")
    monkeypatch.delenv("RLRF_LIVECODEBENCH", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(livecodebench, "hub_answers", lambda: bool(asked.append(1)))
    with pytest.raises(UsageError, match=r"data=FOLDER or RLRF_LIVECODEBENCH=FOLDER"):
        len(rlrf.make("livecodebench-v6").tasks())
    assert asked == [1]


# --- filters, splits, errata ------------------------------------------------------------------


def test_filters(file):
    assert ids(make(file, platform="leetcode")) == {f"90{i:02}" for i in range(1, 24, 2)}
    assert len(ids(make(file, difficulty=["easy", "hard"]))) == 16
    dates = {
        t.metadata["contest_date"] for t in make(file, contest_start="2025-03-15").tasks("all")
    }
    assert min(dates) == "2025-03-16"
    dates = {t.metadata["contest_date"] for t in make(file, contest_end="2025-02-11").tasks("all")}
    assert max(dates) == "2025-02-11"
    sdpo = make(file, subset="sdpo", contest_start="2025-03-01").tasks("all")
    assert {t.metadata["contest_date"][:7] for t in sdpo} == {"2025-03", "2025-04"}
    with pytest.raises(UsageError, match="none of 24 questions is left"):
        len(make(file, contest_start="2026-01-01").tasks())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"subset": "all"}, "subset is 'all'"),
        ({"protocol": "x"}, "protocol is 'x'; it must be one of 'disjoint', 'sdpo'"),
        ({"errata": "x"}, "errata is 'x'"),
        ({"difficulty": "simple"}, "difficulty is 'simple'; it must be one of easy, medium, hard"),
        ({"platform": ["codejam"]}, "platform is 'codejam'"),
        ({"contest_start": "May"}, "contest_start is 'May'; it must be a day"),
        ({"contest_end": "2025-02-01x"}, "contest_end is '2025-02-01x'"),
        ({"difficulty": 5}, "difficulty is 5"),
    ],
)
def test_wrong_options(file, options, why):
    with pytest.raises(UsageError, match=why):
        make(file, **options)


def test_disjoint_splits_do_not_depend_on_filters(file):
    env = make(file)
    train, held_out = ids(env, "train"), ids(env, "eval")
    assert not train & held_out
    assert train | held_out == ids(env)
    easy = make(file, difficulty="easy")
    assert ids(easy, "train") == train & ids(easy)


def test_sdpo_protocol_trains_on_half_of_the_hidden_tests(file):
    env = make(file, protocol="sdpo")
    assert ids(env, "train") == ids(env, "eval") == ids(env)
    half = env._full_tasks("train").get("abc900_a").hidden.tests()
    whole = env._full_tasks("eval").get("abc900_a").hidden.tests()
    assert len(half) == 3
    assert not any(t.public for t in half)
    assert set(half) < set(whole)
    assert len(whole) == 9
    again = make(file, protocol="sdpo")._full_tasks("train").get("abc900_a").hidden.tests()
    assert again == half


@needs_sandbox
def test_a_task_is_graded_as_in_the_split_it_was_taken_from(file):
    half = {
        n.case.stdin for n in make(file, protocol="sdpo")._full_tasks("train")[0].hidden.tests()
    }
    code = f"n = input()\nprint(n if n in {half!r} else 0)"
    reply = f"```python\n{code}\n```"
    env = make(file, protocol="sdpo", split="eval")
    for split, reward in (("train", 1.0), ("eval", 0.0), ("all", 0.0)):
        assert env.grade(env.tasks(split)[0], reply).reward == reward
        env.reset(options={"task_id": "abc900_a", "split": split})
        assert env.step(reply).reward == reward
    env.close()
    with pytest.raises(UsageError, match="has no public test, and tests='public'"):
        make(file, protocol="sdpo", split="train", tests="public").grade("abc900_a", reply)


def test_many_orders_are_checked_fast():
    n = 999_999_937
    wanted = StdinCase("\n".join(["10000", *[str(n)] * 10_000]), "")
    asked = []
    real = answers._small_primes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_small_primes", lambda: asked.append(1) or real())
        out = "\n".join([f"{n + 1} {n * n}"] * 10_000)
        assert MANY_ANSWERS["arc191_c"].accepts(printed(out), wanted)
    assert len(asked) <= 1  # factored once, not for each line


def test_errata_are_left_out_unless_kept(tmp_path):
    rows = [
        question(0, question_id="abc337_e"),
        question(1, question_title="Most Frequent IDs"),
        question(2),
        question(4, question_id="abc343_a"),
    ]
    file = write_jsonl(tmp_path / "e.jsonl", rows)
    assert ids(make(file)) == {"abc902_a"}
    assert len(ids(make(file, errata="keep"))) == 4
    assert len(ids(make(file, compat=True))) == 4
    assert ids(make(file, compat=True, errata="exclude")) == {"abc902_a"}


# --- grading ----------------------------------------------------------------------------------


@needs_sandbox
def test_public_and_hidden_tests_grade(file):
    env = make(file, run_all=True)
    for i in (0, 1):
        task = question(i)["question_id"]
        good = env.grade(task, solution(i))
        assert (good.reward, good.metrics) == (1.0, {"compiles": 1.0, "tests_passed": 1.0})
    # Right on the public tests only.
    code = "n = int(input())\nprint(n if n < 9 else 0)"
    reward, feedback = env.grade("abc900_a", f"```python\n{code}\n```")
    assert reward == 0.0
    assert feedback.text == "The answer is wrong on a hidden test."
    shown = make(file, feedback="expected")
    full = shown.grade("abc900_a", f"```python\n{code}\n```")
    shown.close()
    assert "Input:\n9\nOutput:\n0\nExpected:\n9" in full.feedback.text  # the smallest first
    env.close()


@needs_sandbox
def test_what_the_official_harness_imports_is_there_and_lines_still_count(file):
    env = make(file)
    code = (
        "class Solution:\n    def add(self, n: int) -> Optional[int]:\n"
        "        q = deque([n])\n        return q.popleft() + gcd(1, 5)\n"
    )
    assert env.grade("9001", f"```python\n{code}```").reward == 1.0
    code = "class Solution:\n    def add(self, n: int) -> List[int]:\n        return n / 0\n"
    assert "Line 3 in add of the program." in str(
        env.grade("9001", f"```python\n{code}```").feedback
    )
    env.close()


@needs_sandbox
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def add(n):\n    return n + 1", "does not define the class 'Solution'"),
        (
            "class Solution:\n    def adds(self, n):\n        return n + 1",
            "does not define the method 'add' of 'Solution'. There is a method 'adds'; rename it.",
        ),
        ("class solution:\n    pass", "There is a class 'solution'; rename it."),
    ],
)
def test_a_wrong_name_is_told_without_running(file, body, words):
    env = make(file, sandbox="nothing that exists")
    reward, feedback = env.grade("9001", f"```python\n{body}\n```")
    assert (reward, feedback.kinds) == (0.0, ("format_error",))
    assert words in feedback.text


def test_prompts_pose_the_question_and_give_nothing_away(file):
    for i, task in enumerate(make(file).tasks("all")):
        (message,) = task.messages
        assert question(i)["question_content"] in message["content"]
        assert ("class Solution:" in message["content"]) == (i % 2 == 1)
        assert "standard input" in message["content"] or i % 2
        assert task.hidden is None
        assert not {"tests", "private_test_cases", "public_test_cases"} & set(task.metadata)


# --- rules ------------------------------------------------------------------------------------


def printed(text: str) -> RawRun:
    return RawRun(stdout=text.encode())


@pytest.mark.parametrize(
    ("got", "wanted", "right"),
    [
        ("1.0 2\n", "1 2.00", True),
        ("1_000", "1000", True),
        ("٣", "3", True),
        ("Infinity", "inf", True),
        ("NaN", "nan", False),
        ("sNaN", "1", False),
        ("1 2", "1 2 3", False),
        ("1\n2", "1 2", False),
        ("a", "b", False),
    ],
)
def test_the_official_comparison_of_output(got, wanted, right):
    assert OfficialLines().accepts(printed(got), StdinCase("", wanted)) is right


@pytest.mark.parametrize(
    ("got", "wanted", "official", "ours"),
    [
        (True, 1, True, False),
        ((1, 2), [1, 2], True, True),
        ([(1, 2)], [[1, 2]], False, True),
        (1.1666666666, 1.16667, False, True),
        ([0.1 + 0.2], [0.3], False, True),
        (1000005.0, 1000000, False, False),
        (1.0, 1, True, True),
        (None, 0, False, False),
    ],
)
def test_the_official_comparison_of_results_and_ours(got, wanted, official, ours):
    case = CallCase((), wanted)
    assert OfficialReturns().accepts(RawRun(result=got), case) is official
    assert Results().accepts(RawRun(result=got), case) is ours


def test_an_allowed_error_is_read_from_the_statement():
    said = "Your answer is correct if the absolute or relative error is at most 10^{-6}."
    checker = tolerance(said)
    assert checker.accepts(printed("2.0000001"), StdinCase("", "2.0"))
    assert not checker.accepts(printed("2.0001"), StdinCase("", "2.0"))
    assert tolerance("Print the answer modulo 10^{9}.") is None


@pytest.mark.parametrize(
    ("name", "given", "wanted", "right", "wrong"),
    [
        (
            "arc185_c",
            "5 16\n1 8 5 10 13",
            "1 3 4",
            "1 3 4",
            ["1 4 3", "1 2 3", "1 3 9", "-1", "x y z"],
        ),
        ("arc185_c", "5 20\n1 8 5 10 13", "-1", "-1", ["1 2 3"]),
        ("abc397_d", "999", "12 9", "10 1", ["9 10", "0 0", "-1", "10", "1_0 1"]),
        ("abc397_d", "1", "-1", "-1", ["1 0"]),
        ("abc396_e", "3 1\n1 2 1", "0 1 0", "1 0 0", ["1 0 2", "0 0 0", "-1 2 0", "0 1"]),
        ("abc396_e", "1 1\n1 1 1", "-1", "-1", ["0"]),
        (
            "arc188_c",
            "3 3\n1 2 1\n1 3 0\n2 3 0",
            "010",
            "111",
            ["000", "01", "0101", "0 1 0", "-1", "02x"],
        ),
        ("arc188_c", "2 2\n1 2 0\n1 2 1", "-1", "-1", ["00"]),
        ("arc190_a", "5 2\n1 3\n2 5", "2\n1 1", "2\n1 1", ["2\n1 0", "1\n1 0", "2\n0 0", "2\n1 3"]),
        ("arc190_a", "4 2\n2 3\n2 3", "2\n1 2", "2\n2 1", ["2\n2 2", "3\n1 2"]),
        ("arc190_a", "5 2\n1 3\n2 4", "-1", "-1", ["2\n1 1"]),
        (
            "arc191_c",
            "3\n3\n1\n16",
            "2 7\n5 1\n11 68",
            "100 777\n1 3\n11 68",
            ["2 7\n5 1\n3 4", "2 7", "2 7\n5 0\n11 68"],
        ),
        (
            "arc195_c",
            "1\n4 0",
            "Yes\nR 1 1\nR 1 2\nR 2 2\nR 2 1",
            "Yes\nR 5 5\nR 6 5\nR 6 6\nR 5 6",
            [
                "No",
                "Yes\nR 1 1\nR 1 2\nR 2 2\nB 2 1",
                "Yes\nR 1 1\nR 1 2\nR 1 1\nR 1 2",
                "Yes\nR 0 1\nR 0 2\nR 1 2\nR 1 1",
                "Yes\nR 1 1",
            ],
        ),
        ("arc195_c", "1\n1 1", "No", "No", ["Yes\nR 1 1\nB 1 2"]),
    ],
)
def test_questions_with_many_answers(name, given, wanted, right, wrong):
    checker, case = MANY_ANSWERS[name], StdinCase(given, wanted)
    assert checker.accepts(printed(wanted), case)
    assert checker.accepts(printed(right), case)
    for answer in wrong:
        assert not checker.accepts(printed(answer), case), answer


def test_any_order():
    checker = MANY_ANSWERS["find-the-peaks"]
    case = CallCase((), [[1, 2], [3]])
    assert checker.accepts(RawRun(result=[[3], (1, 2)]), case)
    for wrong in ([[3]], [[3], [3]], None, "ab"):
        assert not checker.accepts(RawRun(result=wrong), case)


QUIRKS = [
    ("import sys\nprint(int(sys.stdin.buffer.read()))", 1.0, 0.0),
    ("import sys\nprint(int(input()))\nsys.exit(1)", 0.0, 1.0),
    ("print(int(input()))\nexit()", 1.0, 0.0),
    ("import sys\nsys.stdin.readline()\nprint(int(sys.stdin.read()))", 0.0, 1.0),
    ("import sys\nfor line in sys.stdin:\n    print(int(line))", 1.0, 1.0),
    ("n = int(input())\nprint(n)\ntry:\n    input()\nexcept EOFError:\n    pass", 1.0, 0.0),
]


@needs_sandbox
@pytest.mark.parametrize("compat", [False, True])
def test_quirks_of_the_official_harness(file, compat):
    env = make(file, compat=compat)
    for code, *rewards in QUIRKS:
        reward = env.grade("abc900_a", f"```python\n{code}\n```").reward
        assert reward == rewards[compat], code
    env.close()


@needs_sandbox
def test_compat_takes_the_last_block(file):
    text = f"```python\nprint('a much longer program than the other one')\n```\n{solution(0)}"
    for compat, reward in ((False, 0.0), (True, 1.0)):
        env = make(file, compat=compat)
        assert env.grade("abc900_a", text).reward == reward
        env.close()
