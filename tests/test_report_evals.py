from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import rlrf
from rlrf import Outcome, Rollout, SingleTurnEnv, Task, UsageError
from rlrf._report import records
from rlrf.report import page_data, render, write_report
from rlrf.results import ResultsFile, current, read_results
from tests.fake_run import HOSTILE, make_fake_eval, make_fake_run
from tests.test_report import browser
from tests.test_report import page_data as embedded
from tests.test_report import render as dump


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evals")
    return (
        make_fake_eval(folder / "before.json", tasks=12, rate=0.35),
        make_fake_eval(folder / "after.json", tasks=12, rate=0.6, seed=1, temperature=0.6),
    )


# --- reading -------------------------------------------------------------------------------


def test_what_rlrf_eval_writes_is_read_back(tmp_path: Path) -> None:
    settings = {"env": "e-v0", "n_tasks": 2, "samples_per_task": 1, "feedback": "explained"}
    done = [
        Rollout(str(i), f"{i}:{i}", reward=float(i), solved=bool(i), finish_reason="terminated")
        for i in range(2)
    ]
    path = tmp_path / "a.json"
    with ResultsFile(path, settings) as file:
        file.add(done[0])
        under_way = read_results(path)
        assert under_way.path.name == "a.json.partial"
        assert under_way.partial
        assert under_way.settings == settings
        assert [r["task_id"] for r in under_way.rollouts] == ["0"]
        file.add(done[1])
        file.finish(rlrf.EvalReport.of(done), {"lock": {"python": "3"}, "warnings": ["slow"]})
    for name in ("a.json", "a.json.partial"):  # who follows it need not know that it ended
        found = read_results(tmp_path / name)
        assert not found.partial
        assert found.settings == settings
        assert found.about == {"lock": {"python": "3"}, "warnings": ["slow"]}
        assert len(found.rollouts) == 2


def test_the_newer_of_both_files_is_read(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=2)
    make_fake_eval(path, tasks=2, partial=True)
    os.utime(path.with_name("a.json.partial"), ns=(0, 0))
    partial = path.with_name("a.json.partial")
    for seconds, newer in enumerate((path, partial, path), 1):
        os.utime(newer, ns=(seconds * 10**18,) * 2)
        assert current(path) == current(partial) == newer


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"rollouts": 3}', "[" * 100_000])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    for name in ("a.json", "b.json.partial"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match="holds no results"):
            write_report(tmp_path / name)
    with pytest.raises(UsageError, match="there is nothing at"):
        write_report(tmp_path / "absent.json")


def test_damaged_rollouts_are_left_out_and_told(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=2, samples=1)
    data = json.loads(path.read_text())
    good = data["rollouts"][0]
    data["rollouts"] += [3, {}, {**good, "feedback": [[3]]}, {**good, "reward": "1"}]
    data["rollouts"] += [{**good, "messages": 7}, {**good, "weight_version": 3}]
    path.write_text(json.dumps(data))
    source = page_data([path])["sources"][0]
    assert source["total_rollouts"] == 3  # what a later version adds is no damage
    assert any("5 entries are no rollouts" in w for _, w in source["warnings"])


# --- what is shown -------------------------------------------------------------------------


def test_two_evaluations_side_by_side(files: tuple[Path, Path]) -> None:
    out = write_report(files)
    assert out.name == "report.html"
    data = embedded(out)
    before = data["sources"][0]
    assert [s["name"] for s in data["sources"]] == ["before", "after"]
    assert before["kind"] == "eval"
    assert before["facts"]["done"]
    low, high = before["report"]["pass_rate_ci"]
    assert low < before["report"]["pass_rate"] < high
    (compared,) = data["comparisons"]
    assert (compared["a"], compared["b"], compared["n_tasks"]) == (0, 1, 12)
    assert compared["interval"][0] < compared["difference"] < compared["interval"][1]
    assert compared["differs"] == [["temperature", "1.0", "0.6"]]
    attempts, scored, solved, mean = data["tables"][0]["tasks"]["squares-0"]
    assert attempts == 2 >= scored >= solved >= 0
    assert mean is not None
    assert write_report(files[0]).name == "before.html"


def test_a_run_is_compared_with_its_own_beginning(tmp_path: Path) -> None:
    run = make_fake_run(tmp_path / "run", steps=6)
    data = page_data([run])
    assert [t["name"] for t in data["tables"]] == ["run, step 0", "run, step 6"]
    assert data["comparisons"][0]["n_tasks"] == 6
    assert data["comparisons"][0]["differs"] == []


def test_an_evaluation_under_way(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=6, partial=True)
    source = page_data([path])["sources"][0]
    assert source["name"] == "a"
    assert not source["facts"]["done"]
    assert source["facts"]["wanted"] == 12
    assert "8 of 12 rollouts so far" in source["warnings"][0][1]


def test_what_to_know_comes_first(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=3, samples=1)
    data = json.loads(path.read_text())
    plain = {**data["rollouts"][0], "reward": 0.0, "solved": False, "failure": None}
    lost = {**plain, "task_id": "l", "reward": None, "failure": "sandbox_died: gone"}
    cut = {**plain, "task_id": "c", "finish_reason": "length", "feedback": [[]]}
    data["rollouts"] = [plain, lost, cut]
    data["warnings"] = ["the sampler is slow"]
    path.write_text(json.dumps(data))
    told = [w for _, w in page_data([path])["sources"][0]["warnings"]]
    assert any("1 of 3 rollouts are unscored" in w and "sandbox_died 1" in w for w in told)
    assert any("1 of 3 replies were cut off at 256 tokens" in w for w in told)
    assert any("failed attempts got no feedback" in w for w in told)
    assert "the sampler is slow" in told
    run = make_fake_run(tmp_path / "run", steps=2, status="failed")
    first = page_data([run])["sources"][0]["warnings"][0]
    assert first == ("error", "failed: RlrfError: the loss of step 31 is nan")


def test_calls_reasoning_and_levels(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a":1}'}}
    bad = {"text": "<tool_call>", "span": [0, 11], "status": "unclosed", "why": "no end"}
    record = {
        "task_id": "t",
        "reward": 0.0,
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "1", "content": "no"},
            {"role": "assistant", "content": "<tool_call>", "invalid_tool_calls": [bad]},
        ],
        "feedback": [
            [],
            [
                {"kind": "wrong_answer", "text": "Got 3.", "span": [0, 2]},
                {"kind": "wrong_answer", "text": "Not 4.", "reveals": "expected"},
            ],
        ],
    }
    shown = records.shown(record)
    first, answer, last = shown["messages"]
    assert first["reasoning"] == "hm"
    assert first["calls"] == [{"name": "f", "arguments": '{\n  "a": 1\n}', "id": "1"}]
    assert answer["answers"] == "1"
    assert last["invalid"] == [bad]
    none, levels = shown["levels"]
    assert none == {}
    assert levels["none"] == []
    assert levels["binary"][0]["text"] == "The attempt is not correct."
    assert levels["located"][0]["span"] == [0, 2]
    assert levels["explained"] == [0]  # as it is
    assert "expected" not in levels  # and so is the whole


def test_feedback_of_another_version_is_shown_without_levels() -> None:
    record = {"task_id": "t", "feedback": [[{"kind": "of-tomorrow", "text": "x", "source": "s"}]]}
    shown = records.shown(record)
    assert shown["levels"] == [{}]
    assert shown["feedback"][0][0]["kind"] == "of-tomorrow"


def test_texts_that_have_no_room_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=30, samples=3)
    monkeypatch.setattr(rlrf.report, "MAX_BYTES", 30_000)
    rows = page_data([path])["sources"][0]["rollouts"]
    assert len(rows) == 90
    whole = [r for r in rows if not r.get("bare")]
    assert 5 < len(whole) < 30
    assert {r["sample"] for r in whole} == {0}  # one of each task before a second
    assert all("kinds" in r for r in rows if r.get("bare"))
    monkeypatch.setattr(rlrf.report, "MAX_ROWS", 10)
    source = page_data([path])["sources"][0]
    assert (len(source["rollouts"]), source["total_rollouts"]) == (10, 90)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=6, hostile=True, model=HOSTILE)
    text = write_report(path).read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<!--" not in text
    assert "\u202e" not in re.sub(r'id="data">.*?</script>', "", text, flags=re.S)
    assert HOSTILE in embedded(tmp_path / "a.html")["sources"][0]["facts"]["model"]


# --- cards ---------------------------------------------------------------------------------


class Drawn(SingleTurnEnv):
    """Has a card of its own."""

    def __init__(self, *, bad: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bad = bad

    def load_tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-squares-0", "?", hidden="9")]

    def grade(self, task: Task, completion: str) -> Outcome:
        return Outcome(0.0)

    async def render_html(self, task: Task, rollout: Rollout) -> Any:
        if self.bad == "raises":
            raise ValueError("no board")
        if self.bad == "long":
            return "x" * 60_000
        if self.bad == "type":
            return 3
        said = html.escape(rollout.text)
        return f"<style>b{{color:red}}</style><b>{task.hidden}</b>\u202e{said}<script>x()</script>"


rlrf.register("report-drawn-v0", Drawn)


def drawn(path: Path, **options: Any) -> Path:
    make_fake_eval(path, tasks=1, env="report-drawn-v0", env_options=options, feedback="none")
    data = json.loads(path.read_text())
    for record in data["rollouts"]:
        record["task_id"] = "eval-squares-0"
    path.write_text(json.dumps(data))
    return path


def test_cards_are_drawn_when_they_are_asked_for(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.json")
    assert not any("card" in r for r in page_data([path])["sources"][0]["rollouts"])
    data = page_data([path], cards=True)
    card = data["sources"][0]["rollouts"][0]["card"]
    assert "<b>9</b>" in card  # the whole task
    assert "\u202e" not in card
    text = render(data)
    assert "style-src 'unsafe-inline'" in text
    assert "default-src 'none'" in text
    assert text.count("<script>") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bad": "raises"}, "no board"),
        ({"bad": "type"}, "gave a int, not a string"),
        ({"unknown": 1}, "cannot be made"),
    ],
)
def test_cards_that_cannot_be_drawn_are_told(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    source = page_data([drawn(tmp_path / "a.json", **options)], cards=True)["sources"][0]
    assert any("no cards" in w and told in w for _, w in source["warnings"])
    assert not any("card" in r for r in source["rollouts"])


def test_a_card_is_bounded(tmp_path: Path) -> None:
    source = page_data([drawn(tmp_path / "a.json", bad="long")], cards=True)["sources"][0]
    assert "60000 characters" in source["rollouts"][0]["card"]


# --- in a browser --------------------------------------------------------------------------


def driven(page: Path, script: str) -> Path:
    """The page without its policy, and with a script that does what a reader would."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    out = page.with_name("driven.html")
    out.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return out


def body_of(dom: str) -> str:
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert 'data-ready="1"' in root
    assert "data-error" not in root
    return dom.split("<main", 1)[1].split("</main>", 1)[0]


@pytest.mark.slow
@browser
def test_a_browser_draws_evaluations(tmp_path: Path) -> None:
    paths = [make_fake_eval(tmp_path / f"{n}.json", tasks=30, seed=n, hostile=True) for n in (0, 1)]
    dom = dump(write_report(paths), tmp_path / "profile")
    body = body_of(dom)
    for id in ("evals", "warnings", "compare", "task-table", "rollouts"):
        assert f'id="{id}"' in body
    assert body.count("<tr>") - body.count('<td class="key"') < 60  # a page of tasks
    assert '<span class="hidden-char">U+202E</span>' in body
    assert not re.search("[\u202e\u2066\x07\x1b]", body)
    assert "<img" not in body
    assert "<script" not in body
    assert 'class="call"' in body or 'class="call invalid"' in body


@pytest.mark.slow
@browser
def test_a_reader_sorts_filters_and_changes_the_level(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=40, rate=0.3)
    page = driven(
        write_report(path),
        """
        const $ = (css) => document.querySelector(css);
        const set = (node, value, event) => {
          node.value = value;
          node.dispatchEvent(new Event(event));
        };
        document.querySelectorAll(".sort")[1].click();
        document.querySelectorAll(".sort")[1].click();
        document.body.dataset.best = $("#task-table tbody td:nth-child(2)").textContent;
        set($("#task-show"), "never", "change");
        document.body.dataset.never = [...document.querySelectorAll(".tally")]
          .map((node) => node.textContent).join();
        $("#task-table .link").click();
        document.body.dataset.chip = $(".chip").textContent;
        document.body.dataset.rows = document.querySelectorAll(".row").length;
        $('[data-level="binary"]').click();
        document.body.dataset.binary = $(".segment .said").textContent;
        $('[data-level="none"]').click();
        document.body.dataset.none = $(".segment").textContent;
        set($("#filter-query"), "no such text", "input");
        document.body.dataset.empty = $("#detail").textContent;
        """,
    )
    dom = dump(page, tmp_path / "profile")
    found = dict(re.findall(r'data-([a-z]+)="([^"]*)"', re.findall(r"<body[^>]*>", dom)[0]))
    assert found["best"].startswith("2/2")
    assert set(found["never"].split(",")) <= {"0/2", "0/1"}
    assert found["chip"].startswith("task ")
    assert found["rows"] == "2"
    assert found["binary"] == "The attempt is not correct."
    assert "shows nothing" in found["none"]
    assert "No rollout matches" in found["empty"]
    body_of(dom)


@pytest.mark.slow
@browser
def test_thousands_of_rollouts_are_not_drawn_before_they_are_looked_at(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=2500, samples=2)
    dom = dump(write_report(path), tmp_path / "profile")
    body = body_of(dom)
    assert "all 5000" in body
    assert body.count("<") < 4000


@pytest.mark.slow
@browser
def test_a_card_runs_nothing_and_opens_nothing(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.json")
    dom = dump(write_report(path, cards=True), tmp_path / "profile")
    (frame,) = re.findall(r"<iframe[^>]*>", body_of(dom))
    assert 'sandbox=""' in frame
    assert "default-src 'none'" in html.unescape(frame)
