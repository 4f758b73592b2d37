"""One self-contained HTML page about runs and evaluations, one or several, side by side.

The page holds everything it needs: no network, no library. Text in rollouts is attacker-controlled
(a completion may contain ``</script>``), so it reaches the page as JSON whose ``<``, ``>`` and
``&`` are escaped, the page's script only ever sets it as text, and a content security policy
allows no script but that one, by its hash. An environment's own cards are markup: each stands in a
frame of its own, which may run, load and open nothing.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import rlrf
from rlrf._files import refused, write_whole
from rlrf._report.cards import Cards
from rlrf._report.evals import MAX_ROWS, read_eval
from rlrf._report.runs import read_run
from rlrf._report.tables import MAX_TABLES, Table, comparisons
from rlrf._run_folder import check_output_of
from rlrf.errors import UsageError
from rlrf.results import Results, current, read_results
from rlrf.runs import Run, is_run

MAX_ROLLOUTS = 480
"""Rollouts of runs on a page, all together; beyond it they are sampled, whole groups at a time."""
MAX_BYTES = 16_000_000
"""Characters of rollouts on a page, all together."""


def write_report(
    runs: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    cards: bool = False,
) -> Path:
    """Write a page about ``runs``, overlaid if there are several.

    Args:
        runs: run directories and files of ``rlrf eval``, or one.
        out: the file; None for ``report.html`` in the run directory, ``NAME.html`` beside a file,
            or ``report.html`` beside the first of several.
        cards: have the environments draw their own cards (:meth:`rlrf.Env.render_html`). They are
            made for it, as the runs and files say: only for those that are trusted.

    Returns:
        Where the page is.

    Raises:
        UsageError: no runs, a folder without a run, a file without results, or an ``out`` that
            cannot be written or that a run needs (its ``status.json``, a file of its model).
        Unwritable: the disk is full; an older page stays.
    """
    paths = [Path(p) for p in ((runs,) if isinstance(runs, (str, Path)) else runs)]
    if not paths:
        raise UsageError("a report needs at least one run directory or file of results")
    if out is None:
        out = _beside(paths)
        if out.is_symlink():
            raise UsageError(
                f"{str(out)!r} is a link, and the report is not written through it; delete it, or "
                "name a file with --out"
            )
    out = Path(out)
    check_output_of(out)
    page = render(page_data(paths, cards=cards))
    try:
        if _is_special(out):
            out.write_text(page, encoding="utf-8")
        else:  # the run's own process may be writing it, too
            write_whole(Path(os.path.realpath(out)), page, beside=f".{os.getpid()}")
    except OSError as error:
        raise refused(f"cannot write the report {str(out)!r}", error) from None
    return out


def _beside(paths: Sequence[Path]) -> Path:
    first = paths[0]
    if len(paths) > 1:
        return first.absolute().parent / "report.html"
    if is_run(first) or first.is_dir():
        return first / "report.html"
    name = first.name.removesuffix(".partial").removesuffix(".json")
    return first.with_name(f"{name}.html")


def page_data(paths: Sequence[Path], *, cards: bool = False) -> dict[str, Any]:
    """What a page about ``paths`` says, as JSON data; see :func:`write_report`."""
    opened = [_open(path) for path in paths]
    share = len(opened)
    found: list[dict[str, Any]] = []
    tables: list[Table] = []
    for source, name in zip(opened, _names(paths), strict=True):
        with ExitStack() as stack:
            drawn = stack.enter_context(_cards(source)) if cards else None
            card = drawn.draw if drawn is not None else None
            budget = MAX_BYTES // share
            if isinstance(source, Run):
                shown, own = read_run(source, name, MAX_ROLLOUTS // share, budget, card)
            else:
                shown, own = read_eval(source, name, MAX_ROWS // share, budget, card)
            if drawn is not None:
                shown["warnings"] += [("warning", told) for told in drawn.faults]
        for table in own:
            table.source = len(found)
            table.name = name if table.step is None else f"{name}, step {table.step}"
        found.append(shown)
        tables += own
    tables = tables[:MAX_TABLES]
    return {
        "sources": found,
        "tables": [table.to_dict() for table in tables],
        "comparisons": comparisons(tables),
        "version": rlrf.__version__,
        "written": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def _open(path: Path) -> Run | Results:
    if path.is_dir():
        return Run.open(path)
    if not current(path).exists():
        raise UsageError(
            f"there is nothing at {str(path)!r}; name a run directory or a file of `rlrf eval`"
        )
    return read_results(path)


def _cards(source: Run | Results) -> Cards:
    if isinstance(source, Run):
        return Cards(source.lock.get("env"))
    noted = source.settings
    options = {"feedback": noted["feedback"]} if noted.get("feedback") else {}
    return Cards(
        {"id": noted.get("env"), "options": noted.get("env_options"), "split": noted.get("split")},
        options,
    )


def render(data: Mapping[str, Any], *, live: str | None = None) -> str:
    """The page that says ``data``.

    Args:
        data: of :func:`page_data`.
        live: of a page that is served and follows its sources, what state of them it shows.
    """
    assets = resources.files("rlrf") / "_report"

    def read(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    style, script = read("report.css"), read("report.js")
    scripts = _hash(script)
    follow = ""
    if live is not None:
        follow = read("follow.js")
        scripts += f" {_hash(follow)}; connect-src 'self'"
    # A frame takes over the page's policy, and a card brings styles of its own.
    carded = any("card" in r for source in data["sources"] for r in source["rollouts"])
    styles = "'unsafe-inline'" if carded else _hash(style)
    parts = {
        "TITLE": html.escape(", ".join(source["name"] for source in data["sources"])),
        "POLICY": (
            f"default-src 'none'; style-src {styles}; script-src {scripts}; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "LIVE": "" if live is None else f' data-live="{html.escape(live)}"',
        "DATA": embed(data),
        "SCRIPT": script,
        "FOLLOW": follow and f"<script>{follow}</script>",
    }
    pieces = read("report.html").split("@@")  # text, name, text, name, ..., text
    return "".join(p if i % 2 == 0 else parts[p] for i, p in enumerate(pieces))


def _is_special(out: Path) -> bool:
    """Whether it is a pipe or a terminal, say, which no other file may take the place of."""
    try:
        return not stat.S_ISREG(out.stat().st_mode)
    except OSError:
        return False


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def embed(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the ``<script>`` element it stands in, nor begin another thing."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    # A lone surrogate has no UTF-8 form; as an escape it is what it was.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell the runs apart."""
    full = [path.absolute().parts for path in paths]
    full = [(*p[:-1], p[-1].removesuffix(".partial").removesuffix(".json")) for p in full if p]
    for n in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-n:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{i}" for i, name in enumerate(names, 1)]
