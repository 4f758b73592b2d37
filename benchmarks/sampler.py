"""Tokens per second: rlrf's sampler beside transformers `generate`.

The same weights, prompts, end tokens and temperature; runs of the two are interleaved, so what
else the machine does hits both. `generate` gets what a trainer would give it: every prompt
repeated, padded on the left, and it returns no log-probabilities, which the sampler does.
Seconds are CPU time on a CPU (the machine may be shared) and wall time on a GPU.

    python benchmarks/sampler.py --quick                 a random 1M model, under a minute
    python benchmarks/sampler.py --model FOLDER          a chat model and its own ends

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging as transformers_logging

from rlrf import SamplingParams, user
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.model.sampler import sample

CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time

QUESTIONS = (
    "Name three rivers in Europe.",
    "Write a Python function that reverses a string. Reply with the code only.",
    "What is 17 * 23? Explain in one sentence.",
    "Summarise in two sentences why the sky is blue, for a child of eight who likes dinosaurs.",
)


def random_setting(args: argparse.Namespace) -> tuple[Any, list[list[int]], list[int]]:
    """A random model, random prompts of different lengths, and ends that come at random."""
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    lengths = torch.linspace(args.prompt_tokens // 2, args.prompt_tokens, args.prompts).long()
    prompts = [torch.randint(1, 4096, (n,)).tolist() for n in lengths]
    # A random model is near uniform: so many ends make replies half of max_tokens long, ragged.
    ends = list(range(4096 - max(1, 2 * 4096 // args.max_tokens), 4096))
    return model, prompts, ends


def real_setting(args: argparse.Namespace) -> tuple[Any, list[list[int]], list[int]]:
    """A chat model, questions, and the ends the model knows."""
    policy = HFPolicy(args.model, dtype=args.dtype)
    prompts = [policy.encode((user(q),)) for q in QUESTIONS[: args.prompts]]
    return policy.model, prompts, sorted(policy.end_ids)


def with_sampler(model: Any, prompts: list[list[int]], ends: list[int], n: int, seed: int) -> int:
    params = SamplingParams(max_tokens=n)
    seeds = [(seed, i) for i in range(len(prompts))]
    out = sample(model, prompts, params, end_ids=ends, seeds=seeds, max_batch_size=len(prompts))
    return sum(len(o.token_ids) for o in out)


def with_generate(model: Any, prompts: list[list[int]], ends: list[int], n: int, seed: int) -> int:
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=real.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=n,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )[:, width:]
    ended = torch.isin(out, torch.tensor(ends, device=out.device))
    before_end = ended.cumsum(-1) - ended.long()  # 0 up to and with the first end token
    return int((before_end == 0).sum())


def measure(run: Callable[..., int], *args: Any) -> tuple[float, float]:
    """(tokens per second, seconds) of one run, which ends with its tokens on the host."""
    start = CLOCK()
    tokens = run(*args)
    seconds = CLOCK() - start
    return tokens / seconds, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few, short runs")
    parser.add_argument("--model", help="folder or name of a chat model; default: random weights")
    parser.add_argument("--dtype", default=None, help="of --model; default: as saved")
    parser.add_argument("--prompts", type=int, default=4, help="distinct prompts")
    parser.add_argument("--group", type=int, default=8, help="samples per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="longest random prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.runs, args.max_tokens = min(args.runs, 3), min(args.max_tokens, 64)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    model, distinct, ends = real_setting(args) if args.model else random_setting(args)
    prompts = [p for p in distinct for _ in range(args.group)]

    rates: dict[str, list[float]] = {"rlrf": [], "generate": []}
    seconds: dict[str, list[float]] = {"rlrf": [], "generate": []}
    for n in range(-1, args.runs):  # run -1 warms up
        for name, run in (("rlrf", with_sampler), ("generate", with_generate)):
            rate, spent = measure(run, model, prompts, ends, args.max_tokens, n + 1)
            if n >= 0:
                rates[name].append(rate)
                seconds[name].append(spent)
                print(f"run {n} {name:9} {rate:9.1f} tokens/s {spent:7.2f} s", flush=True)
    ratios = [a / b for a, b in zip(rates["rlrf"], rates["generate"], strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "sampler",
                "model": args.model or "random-1m",
                "prompts": len(distinct),
                "group": args.group,
                "max_tokens": args.max_tokens,
                "threads": args.threads,
                "device": str(model.device),
                "clock": "wall" if torch.cuda.is_available() else "cpu",
                "tokens_per_s": {k: round(statistics.median(v), 1) for k, v in rates.items()},
                "seconds": {k: round(statistics.median(v), 3) for k, v in seconds.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
