"""``rlrf list`` and ``rlrf info``: what there is."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rlrf
from rlrf._async import run_sync
from rlrf._plugin_source import describe_target, plain
from rlrf.commands.common import EnvId, EnvOptions, Wraps, make_env, new_console
from rlrf.env import EmptySplitError, Env, StepResult, Task
from rlrf.errors import RlrfError
from rlrf.feedback import Level
from rlrf.messages import Messages
from rlrf.policy import policies
from rlrf.registry import accepted_options, origins
from rlrf.sandbox import sandboxes
from rlrf.trainer import trainers
from rlrf.wrappers import in_words, innermost, wrappers, wrappers_of


def list_() -> None:
    """List environments, trainers, policies and sandboxes."""
    console = new_console()
    for title, registry in (
        ("Environments", None),
        ("Trainers", trainers),
        ("Policies", policies),
        ("Sandboxes", sandboxes),
        ("Wrappers", wrappers),
    ):
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        table.show_header = False
        if registry is None:
            brings = origins()
            rows = [(n, s.entry_point, brings.get(n, "")) for n, s in rlrf.registry.items()]
        else:
            rows = registry.items()
        for name, target, of in rows:
            doc, missing = describe_target(target, of)
            needs = f"  (needs: pip install 'rlrf[{missing}]')" if missing else ""
            table.add_row(escape(name), escape(doc + needs))
        if not table.row_count:
            table.add_row("-", "none installed")
        console.print(table)
        console.print()


# --- info ---------------------------------------------------------------------------------


def info(
    env: EnvId,
    option: EnvOptions = None,
    wrap: Wraps = None,
    split: Annotated[str | None, typer.Option(help="Split of the example task.")] = None,
) -> None:
    """Show what an environment is: options, splits, a task, and its feedback at every level."""
    console = new_console()
    found = make_env(env, option, {"split": split, "feedback": "reference"}, wraps=wrap)
    try:
        made = type(innermost(found))
        doc = plain(inspect.getdoc(made) or "")
        console.print(f"[bold cyan]{escape(env)}[/]  {made.__qualname__}")
        console.print(doc, markup=False, highlight=False)
        console.print()
        if around := wrappers_of(found):
            console.print(f"[bold]Wrappers[/]  {escape(in_words(around))}\n", highlight=False)
        _print_options(console, made)
        sizes = {name: _size(found, name) for name in found.splits}
        told = ", ".join(f"{name} {size} tasks" for name, size in sizes.items())
        console.print(f"[bold]Splits[/]  {told}")
        low, high = found.reward_range
        console.print(
            f"[bold]Reward[/]  {low:g} to {high:g}, solved at {found.success_threshold:g}\n",
            highlight=False,
        )
        shown = next((n for n in (found.split, *found.splits) if sizes[n]), found.split)
        task = found.tasks(shown)[0]
        console.print(f"[bold]Example task[/]  {escape(task.id)} ({shown})")
        _print_messages(console, task.messages)
        console.print()
        _print_levels(console, found, task)
    finally:
        found.close()


def _size(env: Env, split: str) -> int:
    """Tasks of a split; 0 where the environment has none."""
    try:
        return len(env.tasks(split))
    except EmptySplitError:
        return 0


def _print_options(console: Console, cls: type[Env]) -> None:
    table = Table(title="Options", title_justify="left", title_style="bold", box=None)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("default")
    table.add_column("type")
    accepted = accepted_options(cls) or set()
    seen: set[str] = set()
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or not issubclass(base, Env):
            continue
        for p in inspect.signature(init).parameters.values():
            if p.name in accepted and p.name not in seen:
                seen.add(p.name)
                default = "(required)" if p.default is p.empty else repr(p.default)
                kind = "" if p.annotation is p.empty else inspect.formatannotation(p.annotation)
                table.add_row(p.name, escape(default), escape(kind.strip("'")))
    console.print(table)
    console.print()


def _print_messages(console: Console, messages: Messages) -> None:
    for message in messages:
        console.print(f"[dim]{message['role']}:[/]")
        console.print(message["content"] or "", markup=False, highlight=False)


def _print_levels(console: Console, env: Env, task: Task) -> None:
    """What the environment says to an empty reply, at each level."""

    async def attempt() -> StepResult:
        episode = await env.aepisode(task, seed=0)
        return await episode.astep("")

    try:
        result = run_sync(attempt())
    except RlrfError as error:
        console.print(f"An empty attempt could not be graded here: {error}", markup=False)
        return
    console.print(f"[bold]Feedback to an empty attempt[/]  reward {result.reward:g}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("level", style="cyan", no_wrap=True)
    table.add_column("kinds", no_wrap=True)
    table.add_column("text")
    for level in Level:
        shown = result.info["feedback"].at_level(level)
        table.add_row(level.name, ", ".join(shown.kinds), escape(shown.text) or "(nothing)")
    console.print(table)
