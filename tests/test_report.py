from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest

import rlrf.report
from rlrf import UsageError
from rlrf.report import write_report
from rlrf.results import ResultsFile
from rlrf.runs import Run
from tests.fake_run import HOSTILE, make_fake_run


def page_data(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("runs") / "first", steps=12)


@pytest.fixture(scope="module")
def hostile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("runs") / "hostile", steps=4, hostile=True)


def test_the_page_stands_alone(run_dir: Path) -> None:
    out = write_report(run_dir)
    assert out == run_dir / "report.html"
    text = out.read_text(encoding="utf-8")
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"\b(src|href)\s*=|url\(|@import", markup)
    script = text.rsplit("<script>", 1)[1]
    assert not re.search(
        r"\bfetch\(|XMLHttpRequest|\bimport\b|innerHTML|document\.write|eval\(", script
    )


def test_only_the_pages_own_script_and_style_may_run(run_dir: Path) -> None:
    text = write_report([run_dir]).read_text(encoding="utf-8")
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, rule in (("<script>", "script-src"), ("<style>", "style-src")):
        body = text.split(tag, 1)[1].split("</", 1)[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy


def test_hostile_text_cannot_leave_the_data(hostile_dir: Path) -> None:
    path = write_report([hostile_dir])
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2  # the data and the page's own
    assert "window.pwned=1</script" not in text
    assert "<img" not in text
    assert "<!--" not in text
    run = page_data(path)["sources"][0]
    assert any(HOSTILE in m["content"] for r in run["rollouts"] for m in r["messages"])
    assert any(HOSTILE in e["message"] for e in run["events"])


def test_the_title_is_escaped(tmp_path: Path) -> None:
    path = write_report([make_fake_run(tmp_path / "<b>&x", steps=1)])
    assert "<title>&lt;b&gt;&amp;x" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *("status.json", "config.json", "config.toml", "lock.json", "trackers.json", ".lock"),
        *("metrics.jsonl", "other.jsonl", "checkpoints/step-00000001/state.json"),
        *("model/config.json", "model/new.html", ".model.new/config.json", "link.html", "model"),
    ],
)
def test_no_page_takes_the_place_of_what_a_run_is_made_of(tmp_path: Path, name: str) -> None:
    path = make_fake_run(tmp_path / "run", steps=1)
    out = path / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if name == "link.html":
        out.symlink_to("status.json")
    elif not out.exists():
        out.write_text("ours")
    before = out.read_text()
    with pytest.raises(UsageError, match="belongs to the run"):
        write_report([path], out)
    with pytest.raises(UsageError, match="belongs to the run"):
        write_report([path], tmp_path / "run" / ".." / "run" / name)
    assert out.read_text() == before
    with pytest.raises(UsageError, match="belongs to the run"):
        ResultsFile(out, {}, overwrite=True)
    assert Run.open(path).status == "done"


def test_a_page_may_lie_in_a_run_and_beside_it(tmp_path: Path) -> None:
    path = make_fake_run(tmp_path / "model", steps=1)
    for out in (path / "report.html", path / "mine.html", path / "pages" / "a.html"):
        out.parent.mkdir(exist_ok=True)
        assert write_report([path], out).stat().st_size > 1000
    assert write_report([path], tmp_path / "status.json").stat().st_size > 1000


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config={})
    run.log_rollouts(1, [{"task_id": "a\ud800", "messages": [], "reward": 1.0}])
    data = page_data(write_report([tmp_path]))
    assert data["sources"][0]["rollouts"][0]["task"] == "a\ud800"


def test_curves_intervals_and_kinds(run_dir: Path) -> None:
    run = page_data(write_report([run_dir]))["sources"][0]
    steps = [p[0] for p in run["series"]["reward"]]
    assert steps == list(range(1, 13))
    assert [6, None] in run["series"]["loss"]  # the NaN is shown, not dropped
    rates = {p[0]: p[1] for p in run["series"]["eval/pass_rate"]}
    assert {c[0] for c in run["ci"]} == set(rates)
    assert all(low < rates[step] < high for step, low, high in run["ci"])
    assert set(run["kinds"]) == {"wrong_answer", "hint", "runtime_error"}
    assert all(0 <= share <= 1 for points in run["kinds"].values() for _, share in points)
    assert run["facts"]["status"] == "done"
    assert run["config"]["trainer.learning_rate"] == "1e-05"
    assert run["total_rollouts"] == len(run["rollouts"])


def test_unscored_rollouts_stay_unscored(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config={})
    failed = {"task_id": "a", "group_id": "0:a", "reward": None, "failure": "deadline: slow"}
    good = {"task_id": "b", "group_id": "1:b", "reward": 1.0, "solved": True, "split": "eval"}
    run.log_rollouts(1, [{**failed, "split": "eval"}, good])
    data = page_data(write_report([tmp_path]))["sources"][0]
    assert [r["reward"] for r in data["rollouts"]] == [None, 1.0]
    (step, low, high), *_ = data["ci"]
    assert (step, high) == (1, 1.0)
    assert low == pytest.approx(0.20654, abs=1e-4)  # Wilson, one of one: the failure is no zero


def _many(path: Path, steps: int, groups: int, size: int) -> Path:
    run = Run.create(path, config={})
    for step in range(steps):
        run.log_rollouts(
            step,
            (
                {"task_id": f"t{g}", "group_id": f"{g}:t{g}", "reward": 0.0, "split": "train"}
                for g in range(groups)
                for _ in range(size)
            ),
        )
    return path


def test_thousands_of_rollouts_are_sampled_by_whole_groups(tmp_path: Path) -> None:
    data = page_data(write_report([_many(tmp_path, 60, 8, 8)]))["sources"][0]
    shown = data["rollouts"]
    assert data["total_rollouts"] == 3840
    assert 0.9 * rlrf.report.MAX_ROLLOUTS <= len(shown) <= rlrf.report.MAX_ROLLOUTS
    counts: dict[tuple[int, str], int] = {}
    for r in shown:
        counts[r["step"], r["group"]] = counts.get((r["step"], r["group"]), 0) + 1
    assert set(counts.values()) == {8}
    steps = [step for step, _ in counts]
    assert steps.count(0) == steps.count(59) == 8  # the ends whole
    assert len(set(steps)) > 20  # and the middle not forgotten
    assert [r["step"] for r in shown] == sorted(r["step"] for r in shown)


def test_the_bytes_of_a_page_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlrf.report, "MAX_BYTES", 200_000)
    monkeypatch.setattr(rlrf._report.records, "MAX_TEXT", 1000)
    monkeypatch.setattr(rlrf._report.records, "MAX_TOKENS", 10)
    run = Run.create(tmp_path, config={})
    message = {"role": "assistant", "content": "x" * 50_000}
    tool = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f"}}],
        "reasoning_content": "because",
    }
    record = {
        "messages": [message, tool],
        "reward": 0.0,
        "tokens": ["t"] * 50,
        "token_kl": [0.123456789] * 50,
        "completion_mask": [1, 0] * 25,
    }
    run.log_rollouts(1, ({**record, "task_id": str(i), "group_id": str(i)} for i in range(300)))
    path = write_report([tmp_path])
    assert path.stat().st_size < 400_000
    first = page_data(path)["sources"][0]["rollouts"][0]
    assert len(first["messages"][0]["content"]) < 1100
    assert "49000 characters not on this page" in first["messages"][0]["content"]
    assert first["messages"][1]["reasoning"] == "because"
    assert first["messages"][1]["calls"] == [{"name": "f", "arguments": "", "id": "1"}]
    assert first["kl"] == [0.12346] * 10
    assert first["mask"] == "1010101010"
    assert first["cut_tokens"] == 40
    assert first["length"] == 25


def test_long_curves_are_thinned_and_keep_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlrf._report.runs, "MAX_POINTS", 10)
    run = Run.create(tmp_path, config={})
    for step in range(95):
        run.log(step, {"loss": float(step)})
    data = page_data(write_report([tmp_path]))["sources"][0]
    assert data["thinned"]
    points = data["series"]["loss"]
    assert len(points) <= 11
    assert points[0] == [0, 0.0]
    assert points[-1] == [94, 94.0]


def test_several_runs_get_names_that_tell_them_apart(tmp_path: Path) -> None:
    a, b = (make_fake_run(tmp_path / x / "run", steps=1) for x in "ab")
    out = write_report([a, b])
    assert out == tmp_path / "a" / "report.html"
    assert [r["name"] for r in page_data(out)["sources"]] == ["a/run", "b/run"]
    same = write_report([a, a], tmp_path / "same.html")
    assert len({r["name"] for r in page_data(same)["sources"]}) == 2


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    Run.create(tmp_path, config={})
    data = page_data(write_report([tmp_path]))["sources"][0]
    assert data["rollouts"] == []
    assert data["facts"]["status"] == "running"


def test_facts_come_from_what_rlrf_train_was_told(tmp_path: Path) -> None:
    Run.create(tmp_path, config={"model": "in memory"})
    (tmp_path / "config.toml").write_text('model = "org/m"\n[trainer]\nname = "sdpo"\n')
    facts = page_data(write_report([tmp_path]))["sources"][0]["facts"]
    assert (facts["model"], facts["trainer"]) == ("org/m", "sdpo")


def test_wrong_use_is_told(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        write_report([])
    with pytest.raises(UsageError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="cannot write the report"):
        write_report([run_dir], tmp_path / "absent" / "x.html")


# --- in a browser -------------------------------------------------------------------------

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")


def render(page: Path, profile: Path, *flags: str) -> str:
    return subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--window-size=1400,2400",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to render the page in")


@pytest.mark.slow
@browser
def test_a_browser_draws_the_page_without_an_error(hostile_dir: Path, tmp_path: Path) -> None:
    page = write_report([hostile_dir], tmp_path / "page.html")
    dom = render(page, tmp_path / "profile")
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert 'data-ready="1"' in root
    assert "data-error" not in root
    for chart in (
        "Training reward",
        "Held-out pass rate",
        "Loss",
        "Gradient norm",
        "Entropy",
        "Completion length",
        "Self-distillation",
        "Time per step",
        "Feedback by kind",
    ):
        assert f'data-chart="{chart}"' in dom
    assert 'class="ci"' in dom
    assert 'class="lost"' in dom  # the step whose loss was not finite
    body = dom.split("<main", 1)[1].split("</main>", 1)[0]
    assert 'id="rollouts"' in body
    assert 'id="heatmap"' in body
    assert 'id="teacher"' in body
    assert "background-color" in body
    assert 'data-kind="' in body
    assert "&lt;/script&gt;&lt;script&gt;window.pwned=1" in body  # shown, as text
    assert "<img" not in body
    assert "<script" not in body


@pytest.mark.slow
@browser
def test_the_blamed_span_counts_characters_not_utf16_units(tmp_path: Path) -> None:
    text = "🙂🙂 wrong word"
    run = Run.create(tmp_path / "run", config={})
    segment = {"kind": "hint", "text": "no", "severity": "error", "span": [3, 8]}
    run.log_rollouts(
        1,
        [
            {
                "task_id": "a",
                "reward": 0.0,
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": text},
                ],
                "feedback": [[segment]],
            }
        ],
    )
    dom = render(write_report([tmp_path / "run"]), tmp_path / "profile")
    assert re.findall(r"<mark[^>]*>([^<]*)</mark>", dom) == ["wrong"]


@pytest.mark.slow
@browser
def test_several_runs_are_overlaid(run_dir: Path, hostile_dir: Path, tmp_path: Path) -> None:
    page = write_report([run_dir, hostile_dir], tmp_path / "two.html")
    dom = render(page, tmp_path / "profile", "--blink-settings=preferredColorScheme=0")
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert 'data-ready="1"' in root
    assert 'data-theme="dark"' in root
    assert 'id="filter-run"' in dom
    reward = dom.split('data-chart="Training reward"', 1)[1].split("</section>", 1)[0]
    assert len(re.findall(r'<path[^>]*stroke-width="1.8"', reward)) == 2
    assert "first" in reward
    assert "hostile" in reward
    assert 'class="differs"' not in dom or "shaded: the runs differ" in dom
