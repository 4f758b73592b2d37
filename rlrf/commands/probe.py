"""``rlrf probe``: does this feedback help this model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlrf._files import refused, write_whole
from rlrf._run_folder import check_output_of
from rlrf.commands.common import EnvId, EnvOptions, assignments, make_env, named_policy, new_console
from rlrf.config import check_output, in_range
from rlrf.console import Display
from rlrf.paired import Comparison
from rlrf.policy import SamplingParams
from rlrf.probe import ProbeReport
from rlrf.probe import probe as ask
from rlrf.progress import phase
from rlrf.rollout import MAX_AT_ONCE

_SHOWN = {
    "nothing": "nothing",
    "binary": "'wrong'",
    "feedback": "feedback",
    "reference": "reference",
}


def probe(
    context: typer.Context,
    env: EnvId,
    model: Annotated[str | None, typer.Option(help="Model folder or name.")] = None,
    policy: Annotated[str, typer.Option(help="Policy; see `rlrf list`.")] = "hf",
    split: Annotated[str | None, typer.Option(help="Split; that for training by default.")] = None,
    limit: Annotated[int, typer.Option(help="So many tasks, drawn at random.")] = 40,
    samples: Annotated[
        int, typer.Option(help="Second attempts at a failed task, for each thing it is shown.")
    ] = 2,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per reply; the environment's suggestion by default.")
    ] = None,
    feedback: Annotated[str | None, typer.Option(help="Feedback level.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds tasks, sampling and episodes.")] = 0,
    max_concurrency: Annotated[int, typer.Option(help="Episodes under way at once.")] = 64,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Server of the policy 'openai', up to and including /v1.")
    ] = None,
    option: EnvOptions = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option("--policy-option", help="Option of the policy, name=value; repeatable."),
    ] = None,
) -> None:
    """Ask, before any training, whether an environment's feedback helps a model.

    What it fails it tries again: shown nothing, that it was wrong, the feedback, the reference.
    """
    in_range("limit", limit)
    in_range("samples", samples, most=MAX_AT_ONCE)
    in_range("max-concurrency", max_concurrency, most=MAX_AT_ONCE)
    in_range("max-tokens", max_tokens, most=100_000_000)
    in_range("seed", seed, least=0, most=2**63 - 2)
    check_output("out", out)
    if out is not None:
        check_output_of(out)
    context.with_resource(Display())
    with phase(f"loading the environment {env!r}"):
        found = make_env(env, option, {"split": split, "feedback": feedback})
    context.call_on_close(found.close)
    max_tokens = found.max_tokens if max_tokens is None else max_tokens
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    named = (("model", model), ("base_url", base_url))
    options = assignments(policy_option) | {name: value for name, value in named if value}
    with phase(f"loading the policy {policy!r}"):
        player = named_policy(policy, options)
    context.call_on_close(getattr(player, "close", lambda: None))
    report = ask(
        found,
        player,
        limit=limit,
        samples=samples,
        params=params,
        seed=seed,
        max_concurrency=max_concurrency,
    )
    _print(new_console(), report)
    if out is not None:
        settings = {
            "env": env,
            "env_options": assignments(option),
            "split": found.split,
            "feedback": found.feedback_level.name,
            "policy": policy,
            "model": model,
            "samples": samples,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        text = json.dumps(settings | report.to_dict(), indent=1, default=str) + "\n"
        try:
            write_whole(out, text)
        except OSError as error:
            raise refused(f"cannot write {str(out)!r}", error) from None
        print(f"written to {out}")
    if report.n_unscored == report.n_tasks:
        raise typer.Exit(1)


def _print(console: Console, report: ProbeReport) -> None:
    told = f"{report.n_tasks} tasks: {report.n_solved} solved at the first attempt and not asked"
    told += f" again, {report.n_failed} tried again"
    if report.n_silent:
        told += f", {report.n_silent} failed without feedback"
    if report.n_unscored:
        told += f", {report.n_unscored} unscored"
    console.print(told, highlight=False)
    if report.arms:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("shown", style="cyan", no_wrap=True)
        for heading in ("solved", "95 % CI", "tries", "tasks", "over nothing", "over 'wrong'"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm in report.arms:
            rate, interval = arm.pass_rate, arm.pass_rate_ci
            table.add_row(
                _SHOWN[arm.shown],
                "-" if rate is None else f"{rate:.0%}",
                "-" if interval is None else f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]",
                str(arm.n_attempts),
                str(arm.n_tasks),
                _gain(arm.over_nothing),
                _gain(arm.over_binary),
            )
        console.print(table)
        console.print("\nover: points, task by task, with their 95 % intervals", style="dim")
    console.print(report.advice, highlight=False, markup=False)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _gain(gain: Comparison | None) -> str:
    if gain is None:
        return ""
    low, high = gain.interval
    return f"{100 * gain.difference:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
