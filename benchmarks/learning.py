"""Does the model learn the hidden rule? SDPO beside GRPO, same tasks, same rollout budget.

    python benchmarks/learning.py --seeds 0 1 2        # the table of docs/results.md; about an hour
    python benchmarks/learning.py --quick              # one SDPO step, under a minute

Runs `docs/examples/demo_{sdpo,grpo}.toml` for every seed and prints, per run, the held-out pass
rate before and after, and the seconds spent on training (evaluation apart). Ends with one line
of JSON.
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

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run(trainer: str, seed: int, model: str, out: Path, overrides: dict[str, Any]) -> dict:
    """Train once; the curve of held-out pass rates and the training seconds."""
    config = load_train_config(EXAMPLES / f"demo_{trainer}.toml")
    options = {**config.trainer.options, "seed": seed, **overrides}
    built = rlrf.make_trainer(
        config.trainer.name,
        model=model,
        env=rlrf.make(config.env.id, **config.env.options),
        config=options,
        run_dir=out / f"{trainer}-{seed}",
    )
    history = built.train().history
    curve = {int(m["step"]): m["eval/pass_rate"] for m in history if "eval/pass_rate" in m}
    steps = [m for m in history if m["step"] > 0]
    return {
        "trainer": trainer,
        "seed": seed,
        "before": curve[0],
        "after": curve[max(curve)],
        "best": max(curve.values()),
        "curve": curve,
        "train_s": history[-1]["time/train_total"],
        "all_fail_groups": statistics.mean(m["frac_reward_zero_std"] for m in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainers", nargs="+", default=["sdpo", "grpo"])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    args = parser.parse_args()
    overrides: dict[str, Any] = {}
    if args.quick:
        args.seeds, args.trainers = args.seeds[:1], ["sdpo"]
        overrides = {"max_steps": 1, "prompts_per_step": 2, "eval_tasks": 8}
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        results = []
        for seed in args.seeds:
            for trainer in args.trainers:
                result = run(trainer, seed, args.model, out, overrides)
                results.append(result)
                print(
                    f"{trainer} seed {seed}: held-out {result['before']:.2f} -> "
                    f"{result['after']:.2f} (curve {result['curve']}), "
                    f"{result['train_s']:.0f} s of training",
                    flush=True,
                )
    print(json.dumps({"benchmark": "learning", "quick": args.quick, "results": results}))


if __name__ == "__main__":
    main()
