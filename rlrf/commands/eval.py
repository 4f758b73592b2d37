"""``rlrf eval``: measure a policy on an environment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlrf import _interrupt, notices, runs
from rlrf._plugin_source import read_signature
from rlrf.commands.common import (
    EnvOptions,
    Wraps,
    assignments,
    check_options,
    import_from_here,
    make_env,
    named_policy,
    new_console,
)
from rlrf.config import check_output, in_range
from rlrf.console import RolloutProgress
from rlrf.env import Env
from rlrf.errors import UsageError
from rlrf.evaluate import EvalReport, evaluate
from rlrf.policy import SCRIPTED, SamplingParams, policies
from rlrf.progress import phase
from rlrf.results import ResultsFile
from rlrf.rollout import MAX_AT_ONCE, Rollout
from rlrf.wrappers import in_words, wrappers_of


def eval_(
    context: typer.Context,
    env: Annotated[
        str | None, typer.Argument(metavar="ENV", help="Environment id; see `rlrf list`.")
    ] = None,
    env_option: Annotated[str | None, typer.Option("--env", help="The same as ENV.")] = None,
    policy: Annotated[
        str, typer.Option(help="Policy; see `rlrf list`; or scripted:module:function.")
    ] = "hf",
    model: Annotated[str | None, typer.Option(help="Model folder or name.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split; the environment's own for evaluation by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tasks.")] = None,
    samples: Annotated[int, typer.Option(help="Attempts per task.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per reply; the environment's suggestion by default.")
    ] = None,
    feedback: Annotated[str | None, typer.Option(help="Feedback level.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds sampling and episodes.")] = 0,
    max_concurrency: Annotated[int, typer.Option(help="Episodes under way at once.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(help="The JSON file for report and rollouts; runs/eval/... by default."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace --out, and start anew.")] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Server of the policy 'openai', up to and including /v1; else $OPENAI_BASE_URL, "
            "else OpenAI's own."
        ),
    ] = None,
    option: EnvOptions = None,
    wrap: Wraps = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option("--policy-option", help="Option of the policy, name=value; repeatable."),
    ] = None,
) -> None:
    """Measure a policy on an environment. A run that was cut off is continued."""
    env = _one_env(env, env_option)
    in_range("limit", limit)
    in_range("samples", samples, most=MAX_AT_ONCE)
    in_range("max-concurrency", max_concurrency, most=MAX_AT_ONCE)
    in_range("max-tokens", max_tokens, most=100_000_000)
    in_range("seed", seed, least=0, most=2**63 - 1)
    check_output("out", out)
    given = {"split": split, "feedback": feedback}
    policy_options = assignments(policy_option)
    policy_options |= {
        name: value for name, value in (("model", model), ("base_url", base_url)) if value
    }
    if policy.startswith(SCRIPTED):
        import_from_here()
        signature = None
    else:
        signature = read_signature(policies.target(policy))
    if signature is not None:  # before anything is imported
        check_options(policy, signature, policy_options)
    progress = context.with_resource(RolloutProgress())
    with phase(f"loading the environment {env!r}"):
        found = make_env(env, option, given, held_out=True, wraps=wrap)
    max_tokens = found.max_tokens if max_tokens is None else max_tokens
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    with contextlib.ExitStack() as stack:
        stack.callback(found.close)
        n_tasks = min(limit or sys.maxsize, len(found.tasks()))
        settings = {
            "env": env,
            "env_options": assignments(option),
            "split": found.split,
            "feedback": found.feedback_level.name,
            "n_tasks": n_tasks,
            "policy": policy,
            "model": model,
            "policy_options": {
                k: v for k, v in policy_options.items() if k not in ("api_key", "base_url")
            },
            "samples_per_task": samples,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        if around := wrappers_of(found):
            settings["wrappers"] = around
        if out is not None:
            results = ResultsFile(out, settings, overwrite=overwrite)
        else:
            name = "-".join((env, policy, *([Path(model).name] if model else [])))
            results = ResultsFile.named(Path("runs", "eval"), name, settings)
        stack.enter_context(results)
        if results.done:
            print(f"continuing {results.partial}: {len(results.done)} done", file=sys.stderr)
        with phase(f"loading the policy {policy!r}"):  # once the results are ours
            player = named_policy(policy, policy_options)
        stack.callback(getattr(player, "close", lambda: None))
        n_rollouts = n_tasks * samples
        progress.begin(n_rollouts, results.done)

        def kept() -> list[str]:
            return results.kept(progress.done, n_rollouts, "rollouts")

        with notices.collected() as slow, _interrupt.keeping(kept):

            def finished(rollout: Rollout) -> None:
                results.add(rollout)
                progress(rollout)

            report = evaluate(
                found,
                player,
                samples_per_task=samples,
                params=params,
                seed=seed,
                limit=limit,
                max_concurrency=max_concurrency,
                on_rollout=finished,
                done=results.done,
            )
        _print_eval(new_console(), report, found)
        cut = report.finish_reasons.get("length", 0)
        if 2 * cut > report.n_rollouts:
            print(
                f"warning: {cut} of {report.n_rollouts} replies were cut off at {max_tokens} "
                "tokens; raise --max-tokens",
                file=sys.stderr,
            )
        results.finish(report, {"lock": runs.environment_lock(found), "warnings": slow})
        print(f"written to {results.path}")
        if report.n_unscored:
            print(
                f"{report.n_unscored} rollouts are unscored; the same command, with --out "
                f"{results.path}, tries them again",
                file=sys.stderr,
            )
    if report.pass_rate is None:
        why = "".join(f". The first failed with {r.failure}" for r in report.rollouts[:1])
        print(f"error: no rollout could be scored{why}", file=sys.stderr)
        raise typer.Exit(1)


def _one_env(env: str | None, option: str | None) -> str:
    """The environment that is named, in one way or the other."""
    if env is not None and option is not None and env != option:
        raise UsageError(f"two environments are given, {env!r} and --env {option!r}; give one")
    found = option if env is None else env
    if found is None:
        raise UsageError("no environment is given: rlrf eval ENV; `rlrf list` shows what there is")
    return found


def _print_eval(console: Console, report: EvalReport, env: Env) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    rows: dict[str, str] = {
        "split": env.split,
        **({"wrappers": in_words(around)} if (around := wrappers_of(env)) else {}),
        "tasks": str(report.n_tasks),
        "rollouts": str(report.n_rollouts),
    }
    if report.pass_rate is not None and report.pass_rate_ci is not None:
        low, high = report.pass_rate_ci
        rows["pass rate"] = f"{report.pass_rate:.1%}  (95 % CI {low:.1%} to {high:.1%})"
        for k, chance in report.pass_at_k.items():
            low, high = report.pass_at_k_ci[k]
            if k > 1:
                rows[f"pass@{k}"] = f"{chance:.1%}  (95 % CI {low:.1%} to {high:.1%})"
        rows["mean reward"] = f"{report.mean_reward:.4f}"
        if report.mean_length is not None:
            rows["mean length"] = f"{report.mean_length:.1f} tokens"
    if report.n_unscored:
        rows["unscored"] = f"{report.n_unscored} (left out of every number): " + _counts(
            report.failures
        )
    if report.feedback_kinds:
        rows["feedback"] = _counts(report.feedback_kinds)
    rows["ended"] = _counts(report.finish_reasons)
    rows |= {name: f"{value:.4g}" for name, value in report.metrics.items()}
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    console.print(table)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
