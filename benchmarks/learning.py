"""Does the model learn, and from what? SDPO, GRPO and what lies between, on equal rollouts.

    python benchmarks/learning.py --seeds 0 1 2          # format-rules-v0; about an hour
    python benchmarks/learning.py --setup code --seeds 0 1 2
    python benchmarks/learning.py --quick                # one SDPO step, under a minute

Arms: ``sdpo`` (feedback), ``siblings`` (SDPO shown only correct siblings), ``grpo``, ``grpo_ema``
(GRPO with the anchor that SDPO's teacher is: a KL to a moving average), ``hybrid`` (0.9 GRPO + 0.1
SDPO, the paper's). Every arm of a setup has the same tasks, rollouts, steps, learning rate and
adapter. With ``--out`` every finished run is kept, and a killed benchmark goes on after them.

With ``--setup code`` only the first run evaluates before it trains: the model, the tasks and the
seed of that evaluation are the same for all, and it would take as long as the training.

Prints, per run, the held-out pass rate at every evaluation and the seconds spent on training
(evaluation apart). Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import rlrf
from rlrf.config import load_train_config
from rlrf.runs import Run, is_run

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
ANCHOR = {
    "beta": 0.05,
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    "ref_model_mixup_alpha": 0.01,
}
SIBLINGS = {
    "include_environment_feedback": False,
    "use_successful_as_teacher": True,
    "feedback_kinds": None,
}
HYBRID = {"distillation_weight": 0.1}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdpo": ("sdpo", {}),
    "siblings": ("sdpo", SIBLINGS),
    "grpo": ("grpo", {}),
    "grpo_ema": ("grpo", ANCHOR),
    "hybrid": ("sdpo", HYBRID),
}
SETUPS = {"format": "demo_{}.toml", "code": "code_{}.toml"}


def run(setup: str, arm: str, seed: int, model: str, out: Path, more: dict[str, Any]) -> dict:
    """Train once, unless that has been done; the curve of held-out pass rates."""
    trainer, changes = ARMS[arm]
    folder = out / f"{setup}-{arm}-{seed}"
    if not (is_run(folder) and Run.open(folder).status == "done"):
        config = load_train_config(EXAMPLES / SETUPS[setup].format(trainer))
        options = {**config.trainer.options, **changes, "seed": seed, **more}
        resume = is_run(folder)
        env = rlrf.make(config.env.id, **config.env.options)
        held_out = config.held_out()
        eval_env = rlrf.make(held_out.id, **held_out.options)
        try:
            rlrf.make_trainer(
                config.trainer.name,
                model=model,
                env=env,
                eval_env=eval_env,
                config=options,
                run_dir=folder,
                **({"resume": True} if resume else {}),
            ).train()
        finally:
            env.close()
            eval_env.close()
    history = Run.open(folder).metrics
    curve = {int(m["step"]): m["eval/pass_rate"] for m in history if "eval/pass_rate" in m}
    steps = [m for m in history if m["step"] > 0]
    return {
        "setup": setup,
        "arm": arm,
        "seed": seed,
        "before": curve.get(0),
        "after": curve[max(curve)],
        "best": max(curve.values()),
        "curve": curve,
        "train_s": history[-1]["time/train_total"],
        "updates": sum("grad_norm" in m for m in steps),
        "train_reward": [round(m.get("reward", 0.0), 4) for m in steps],
        "all_alike_groups": statistics.mean(m.get("frac_reward_zero_std", 1.0) for m in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--setup", choices=SETUPS, default="format")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    args = parser.parse_args()
    more: dict[str, Any] = {"save_steps": 4, "save_total_limit": 1, "save_model": False}
    if args.quick:
        args.seeds, args.arms = args.seeds[:1], ["sdpo"]
        more |= {"max_steps": 1, "prompts_per_step": 2, "eval_tasks": 8, "probe_tasks": 0}
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        if args.quick:  # no part of a benchmark that is gone on with
            out = out / "quick"
        results = []
        before: float | None = None
        for seed in args.seeds:
            for arm in args.arms:
                options = {**more, "eval_on_start": args.setup != "code" or before is None}
                result = run(args.setup, arm, seed, args.model, out, options)
                if result["before"] is None:
                    result["before"] = before
                before = result["before"]
                results.append(result)
                known = "?" if before is None else f"{before:.2f}"
                print(
                    f"{args.setup} {arm} seed {seed}: held-out {known} -> "
                    f"{result['after']:.2f} (curve {result['curve']}), {result['updates']} "
                    f"updates, {result['train_s']:.0f} s of training",
                    flush=True,
                )
    print(json.dumps({"benchmark": "learning", "quick": args.quick, "results": results}))


if __name__ == "__main__":
    main()
