"""One training step of SDPO and of GRPO: rlrf beside TRL, same model, same number of tokens.

    python benchmarks/trainer.py                       both models; an hour or two on 2 cores
    python benchmarks/trainer.py --models random       a random 42M model, vocabulary 151,936
    python benchmarks/trainer.py --models real --runs 3      Qwen2.5-Coder-0.5B, bf16, LoRA r=16
    python benchmarks/trainer.py --quick               under a minute, one run, fewer tokens
    python benchmarks/trainer.py --device cuda         bf16; seconds, tokens/s, share of the peak

A step is everything from sampling to the teacher's update. Every run is a fresh process: one
step to warm up, then ``--steps`` measured ones; runs of the two sides alternate (with ``--quick``
they run side by side where there are two cores: one costs the other the same). On a CPU a step
costs CPU seconds (user + system, one thread) and memory is the peak RSS of the process since
just before its first step (``base`` is the RSS at that moment: libraries and weights, also the
teacher's where it is a model of its own). On a GPU it costs wall seconds and
``torch.cuda.max_memory_allocated``.

Both sides get the same prompts, exactly ``--tokens`` sampled tokens per rollout (nothing may
end one), a feedback text that differs from attempt to attempt as it does in life, reward 0
(SDPO) or 0 and 1 by turns (GRPO), the same templates, reverse KL, an EMA teacher, AdamW, dtype,
LoRA and ``--rows`` rollouts per forward (8 is TRL's default). Every rollout is distilled.

TRL is used as a user who knows it would: gradient accumulation (8 rows at a time), no
activation checkpointing (its default is on: less memory, more time; ``--checkpointing`` switches
it on for both sides), ``bf16=True`` for a bf16 model, GRPO with the chunked output layer that is
its default. Without Triton, that is on a CPU, TRL 1.16 puts the prompt's positions through that
layer as well; a CPU stands for a GPU here, so they are skipped as they are there, unless
``--trl-as-shipped``. SDPO reads a static dataset column for feedback; feedback on the attempt
itself takes the subclass in :func:`trl_sdpo`.

``--peer-python`` (or ``RLRF_TRL_PYTHON``) is a Python that has TRL 1.16; without one a virtual
environment is made in rlrf's cache. If that fails, only our side is measured.

The last line printed is one JSON object; its ratios are ours / TRL of the medians, and at top
level the worst of the models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRL = "1.16.0"
REAL = "qwen2.5-coder-0.5b-instruct"
METHODS = ("sdpo_full", "sdpo_topk", "grpo")
TOPK = 20
EMA_RATE = 0.05
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Job:
    """What one worker process measures; it travels as JSON."""

    side: str  # rlrf | trl
    method: str
    model: str  # a folder
    prompts: tuple[str, ...]
    feedback: str  # a text with one {n}
    templates: Mapping[str, str]
    group: int
    tokens: int
    rows: int
    steps: int
    dtype: str
    lora_r: int
    checkpointing: bool
    shipped: bool
    device: str
    threads: int
    seed: int

    @property
    def rollouts(self) -> int:
        """Rollouts per step."""
        return len(self.prompts) * self.group

    @property
    def learning_rate(self) -> float:
        """Small, as in training; the step costs the same at any."""
        return 1e-5 if self.lora_r else 1e-6

    def feedbacks(self) -> Iterator[str]:
        """A feedback text for every attempt, no two alike."""
        return (self.feedback.format(n=1000 + n) for n in itertools.count())


# --- measuring, inside a worker ------------------------------------------------------------------


class Meter:
    """Seconds and peak memory of steps; the first is warm-up but its memory counts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.base_mb = 0.0
        self.seconds: list[float] = []
        self.generate: list[float] = []
        self._generated = self._excluded = self._start = 0.0

    def now(self) -> float:
        """CPU seconds of this process, or wall seconds once the GPU is done."""
        if self.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """The first step starts now."""
        if self.device == "cpu":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            self.base_mb = _status_mb("VmRSS")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.base_mb = torch.cuda.memory_allocated() / 2**20
        self._generated = self._excluded = 0.0
        self._start = self.now()

    def end_step(self) -> None:
        """A step ends and the next one starts."""
        now = self.now()
        self.seconds.append(now - self._start - self._excluded)
        self.generate.append(self._generated)
        self._generated = self._excluded = 0.0
        self._start = now

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """What happens inside is sampling."""
        start = self.now()
        yield
        self._generated += self.now() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """What happens inside is no part of the step."""
        start = self.now()
        yield
        self._excluded += self.now() - start

    def peak_mb(self) -> float:
        """The most memory held since :meth:`begin`."""
        if self.device == "cpu":
            return _status_mb("VmHWM")
        import torch

        return float(torch.cuda.max_memory_allocated() / 2**20)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def matmul_peak(size: int = 8192, repeats: int = 30) -> float:
    """FLOP/s of a large bf16 matrix product on the GPU: the peak that steps are compared with."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def useful_flops(job: Job, shape: Mapping[str, float], prompt: float, teacher: float) -> float:
    """Matrix FLOPs that one step needs: attention left out, each prompt once for its group.

    Args:
        job: the batch.
        shape: ``body`` weights outside embeddings and output layer, ``head`` those of the latter.
        prompt: tokens of a prompt.
        teacher: tokens of a teacher prompt; 0 for GRPO.
    """
    sampled = job.rollouts * job.tokens
    once = 2 * shape["body"] * (len(job.prompts) * prompt + sampled) + 2 * shape["head"] * sampled
    flops = once * (1 + (2 if job.lora_r else 3))  # sampling, forward, gradients (of activations)
    if teacher:
        flops += 2 * shape["body"] * job.rollouts * (teacher + job.tokens)
        flops += 2 * shape["head"] * sampled
    return flops


def model_shape(model: Any) -> dict[str, float]:
    """Weights of a model, by what they cost."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = inner.get_input_embeddings().weight
    head = inner.get_output_embeddings().weight
    everything = sum(p.numel() for n, p in inner.named_parameters() if "lora_" not in n)
    tied = head.data_ptr() == embedding.data_ptr()
    body = everything - embedding.numel() - (0 if tied else head.numel())
    return {"body": body, "head": head.numel(), "all": everything}


# --- our side ------------------------------------------------------------------------------------


def measure_rlrf(job: Job) -> dict[str, Any]:
    """Steps of our trainer."""
    import torch

    import rlrf
    from rlrf_trainers.engines.hf import HFPolicy

    meter = Meter(job.device)
    peak_flops = matmul_peak() if job.device == "cuda" else None
    teacher_tokens: list[int] = []
    sampled: list[int] = []
    prompt_tokens: list[int] = []

    class Policy(HFPolicy):
        """Samples to the full length; the trainer's evaluations cost one token, not counted."""

        def encode(self, messages: Any, tools: Any = ()) -> list[int]:
            ids = super().encode(messages, tools)
            teacher_tokens.append(len(ids))
            return ids

        def generate(self, prompts: Any, params: Any) -> Any:
            if params.temperature != 1.0:  # an evaluation's
                with meter.excluded():
                    return super().generate(prompts, replace(params, max_tokens=1))
            with meter.generating():
                out = super().generate(prompts, params)
            sampled.extend(len(c.token_ids) for c in out)
            prompt_tokens.extend(len(c.prompt_ids) for c in out)
            return out

    class Environment(rlrf.SingleTurnEnv):
        """Never satisfied; rewards alternate within a task where there are any."""

        def __init__(self) -> None:
            super().__init__()
            self.texts = job.feedbacks()
            self.turns: dict[str, Iterator[int]] = defaultdict(itertools.count)

        def load_tasks(self, split: str) -> list[rlrf.Task]:
            return [rlrf.Task(f"task-{i}", text) for i, text in enumerate(job.prompts)]

        def grade(self, task: rlrf.Task, completion: str) -> rlrf.Outcome:
            reward = float(next(self.turns[task.id]) % 2) if job.method == "grpo" else 0.0
            return rlrf.Outcome(reward, rlrf.Feedback.of("runtime_error", next(self.texts)))

    lines: list[dict[str, float]] = []

    def on_step(line: dict[str, float]) -> None:
        if line["step"] == 0:
            meter.begin()
            return
        meter.end_step()
        lines.append(line)

    policy = Policy(job.model, dtype=job.dtype, device=job.device, max_batch_size=job.rollouts)
    policy.end_ids = frozenset()  # nothing ends a rollout but its length
    config: dict[str, Any] = {
        "max_steps": 1 + job.steps,
        "prompts_per_step": len(job.prompts),
        "num_generations": job.group,
        "max_completion_length": job.tokens,
        # As many rollouts as TRL's micro-batches; a group's prompt is counted once.
        "micro_batch_tokens": job.rows * job.tokens
        + max(len(policy.chat.encode((rlrf.user(p),))) for p in job.prompts),
        "learning_rate": job.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "lora_r": job.lora_r,
        "temperature": 1.0,
        "eval_tasks": 1,
        "seed": job.seed,
    }
    if job.checkpointing:
        config["gradient_checkpointing"] = True
    if job.method == "grpo":
        config["loss_type"] = "dapo"
    else:
        config |= {
            "distillation_alpha": 1.0,
            "distillation_topk": TOPK if job.method == "sdpo_topk" else 0,
            "teacher_regularization": "ema",
            "teacher_update_rate": EMA_RATE,
            "probe_tasks": 0,
        }
    trainer: Any = rlrf.make_trainer(
        job.method.split("_")[0],
        model=policy,
        env=Environment(),
        config=config,
        run_dir=None,
        on_step=on_step,
    )
    trainer.train()
    out: dict[str, Any] = {
        "seconds": meter.seconds,
        "generate": meter.generate,
        "base_mb": meter.base_mb,
        "peak_mb": meter.peak_mb(),
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "distilled": [
            line["self_distillation/reprompt_sample_fraction"]
            for line in lines
            if job.method != "grpo"
        ],
        "prompt_tokens": statistics.mean(prompt_tokens),
        "teacher_tokens": statistics.mean(teacher_tokens) if job.method != "grpo" else 0,
        "sampled_tokens": sum(sampled) / (1 + job.steps),
        "phases": {
            k: statistics.median(line.get(f"time/{k}", 0.0) for line in lines[1:])
            for k in ("rollout", "teacher", "update")
        },
        "torch": torch.__version__,
    }
    if peak_flops is not None:
        shape = model_shape(policy.model)
        out["peak_flops"] = peak_flops
        out["flops"] = useful_flops(job, shape, out["prompt_tokens"], out["teacher_tokens"])
    return out


# --- TRL's side; runs in TRL's Python, where rlrf is not installed --------------------------------


def measure_trl(job: Job) -> dict[str, Any]:
    """Steps of TRL's trainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, PrinterCallback, TrainerCallback

    meter = Meter(job.device)
    seen: dict[str, list[float]] = defaultdict(list)
    logs: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        """Added last, so that a step ends after the teacher's update."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end_step()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                remember(logs)

    def remember(line: dict[str, float]) -> None:
        logs.append(dict(line))

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        seen["sampled"] += [len(ids) for ids in completion_ids]
        return [float(i % 2) if job.method == "grpo" else 0.0 for i in range(len(completion_ids))]

    vocabulary = AutoConfig.from_pretrained(job.model).vocab_size
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1 + job.steps,
        "per_device_train_batch_size": job.rows,
        "gradient_accumulation_steps": job.rollouts // job.rows,
        "num_generations": job.group,
        "max_completion_length": job.tokens,
        "learning_rate": job.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "loss_type": "dapo",
        "beta": 0.0,
        "gradient_checkpointing": job.checkpointing,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        # All weights in bf16 would be trained without fp32 masters; its default has them, as we do.
        "model_init_kwargs": {"dtype": job.dtype if job.lora_r else "float32"},
        "generation_kwargs": {"eos_token_id": vocabulary},  # an id that cannot be sampled
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device != "cpu",
        "seed": job.seed,
    }
    lora = LoraConfig(
        r=job.lora_r or 1,
        lora_alpha=2 * job.lora_r,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": p}]} for p in job.prompts] * (1 + job.steps)
    )
    make = trl_grpo if job.method == "grpo" else trl_sdpo
    trainer = make(
        job,
        options,
        seen,
        model=job.model,
        reward_funcs=reward,
        train_dataset=data,
        peft_config=lora if job.lora_r else None,
    )
    trainer.eos_token_ids = [vocabulary]
    if job.lora_r and job.device == "cpu" and not job.shipped:
        # On a CPU torch.matmul copies a frozen [V, H] weight once per row for a strided input.
        trainer.model.get_base_model().lm_head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
    name = "_generate_single_turn" if job.method == "grpo" else "_generate_transformers"
    inner = getattr(trainer, name)

    def generate(*args: Any, **kwargs: Any) -> Any:
        with meter.generating():
            return inner(*args, **kwargs)

    setattr(trainer, name, generate)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    trainer.train()
    shutil.rmtree(options["output_dir"], ignore_errors=True)
    if not seen["prompt"]:
        ids = trainer.processing_class.apply_chat_template(
            [row["prompt"] for row in data], add_generation_prompt=True
        )["input_ids"]
        seen["prompt"] += [len(i) for i in ids]
    return {
        "seconds": meter.seconds,
        "generate": meter.generate,
        "base_mb": meter.base_mb,
        "peak_mb": meter.peak_mb(),
        "loss": [line["loss"] for line in logs],
        "grad_norm": [line["grad_norm"] for line in logs],
        "distilled": [
            line["self_distillation/reprompt_sample_fraction"]
            for line in logs
            if job.method != "grpo"
        ],
        "prompt_tokens": statistics.mean(seen["prompt"]),
        "teacher_tokens": statistics.mean(seen["teacher"]) if seen["teacher"] else 0,
        "sampled_tokens": sum(seen["sampled"]) / (1 + job.steps),
        "torch": torch.__version__,
    }


def trl_grpo(job: Job, options: dict[str, Any], seen: dict[str, list[float]], **kwargs: Any) -> Any:
    """TRL's GRPO trainer."""
    import trl.trainer.utils
    from trl import GRPOConfig, GRPOTrainer

    if job.device == "cpu" and not job.shipped:
        # It asks this to decide whether the output layer skips the prompt's positions.
        trl.trainer.utils._use_triton = lambda _: True
    return GRPOTrainer(args=GRPOConfig(**options), **kwargs)


def trl_sdpo(job: Job, options: dict[str, Any], seen: dict[str, list[float]], **kwargs: Any) -> Any:
    """TRL's SDPO trainer, fed with a feedback text per attempt."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

    texts = job.feedbacks()

    class Builder(SuccessfulRolloutTeacherContextBuilder):  # type: ignore[misc]
        """Takes the feedback from the attempt, not from a column of the dataset."""

        def build(self, output: Any, prompts: Any, rewards: Any, feedbacks: Any = None) -> Any:
            context = super().build(output, prompts, rewards, [next(texts) for _ in prompts])
            whole, reply = context["teacher_attention_mask"], output["completion_mask"]
            seen["teacher"] += (whole.sum(1) - reply.sum(1)).tolist()
            seen["prompt"] += output["prompt_mask"].sum(1).tolist()
            return context

    topk = job.method == "sdpo_topk"
    config = SDPOConfig(
        **options,
        **job.templates,
        distillation_mode="topk_logits" if topk else "full_logits",
        distillation_topk=TOPK if topk else None,
        distillation_add_tail=topk,
        distillation_alpha=1.0,
        teacher_model_kind="ema",
        teacher_update_rate=EMA_RATE,
        include_environment_feedback=True,
    )
    trainer = SDPOTrainer(args=config, **kwargs)
    trainer.teacher_context_builder = Builder(trainer)
    return trainer


def work(text: str) -> None:
    """A worker process: measure, print one line of JSON."""
    job = Job(**json.loads(text))
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(job.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(job.seed)
    result = measure_rlrf(job) if job.side == "rlrf" else measure_trl(job)
    print(json.dumps(result), flush=True)
    os._exit(0)  # what libraries do when the interpreter ends is not measured, and cannot fail it


# --- preparing -----------------------------------------------------------------------------------


def find_peer(given: str | None) -> str | None:
    """A Python that has TRL, or None (and why, on stderr)."""
    if given == "none":
        return None
    if given:
        if shutil.which(given) is None:
            raise SystemExit(f"--peer-python (or RLRF_TRL_PYTHON) is {given!r}: no such program")
        return given
    if importlib.util.find_spec("trl"):
        return sys.executable
    from rlrf.fetch import cache_dir

    folder = cache_dir("benchmarks", f"trl-{TRL}")
    python = folder / "bin" / "python"
    if (folder / "done").exists():
        return str(python)
    import torch
    import transformers

    say(f"making a virtual environment with TRL {TRL} in {folder}; takes minutes, once")
    pins = [
        f"torch=={torch.__version__.partition('+')[0]}",
        f"transformers=={transformers.__version__}",
        f"trl=={TRL}",
        *("peft", "accelerate", "datasets"),
    ]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1"]
        subprocess.run([*install, "--timeout", "20", *pins], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"no TRL, so only our side is measured: {error}")
        return None
    (folder / "done").touch()
    return str(python)


def random_model(folder: Path, *, hidden: int, layers: int) -> Path:
    """A random Qwen2 with the vocabulary of the real ones; wide weights, so teachers differ."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
    from transformers.utils import logging

    from rlrf_trainers.model.fetch import models_dir

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (models_dir() / REAL).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(models_dir() / REAL)
    else:
        sys.path.insert(0, str(ROOT))
        from tests.tiny_model import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    for part in (model.config, model.generation_config):
        part.eos_token_id, part.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(folder: Path, prompts: int, prompt_tokens: int, feedback_tokens: int) -> Any:
    """Questions and a feedback template of about so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def fill(start: str, line: str, tokens: int) -> str:
        text = start + "".join(line.format(i=i) for i in range(tokens))
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:tokens]))

    questions = [
        fill(
            f"Problem {n}. Write a Python function solve(rows) that follows these rules.\n",
            "- row {i}: add its first number to the total unless it repeats.\n",
            prompt_tokens,
        )
        for n in range(prompts)
    ]
    feedback = fill(
        "Attempt 1000 failed.\nTraceback (most recent call last):\n",
        "  line {i}, in solve: total += rows[{i}][0]\n",
        feedback_tokens,
    )
    return questions, feedback.replace("1000", "{n}", 1)


# --- running -------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(job: Job, python: str) -> dict[str, Any]:
    """One worker process."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(job.threads),
        "MKL_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, str(Path(__file__).resolve()), "--worker", json.dumps(asdict(job))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{job.side} {job.method} failed ({done.returncode}):\n"
            f"{done.stderr[-4000:]}\n{done.stdout[-300:]}"
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["step_s"] = statistics.median(result["seconds"][1:])
    result["generate_s"] = statistics.median(result["generate"][1:])
    return result


def compare(
    jobs: Mapping[str, Job], pythons: Mapping[str, str], runs: int, side_by_side: bool
) -> dict[str, Any]:
    """Run every method on both sides, by turns or both at once; medians, ranges and ratios."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for n in range(runs):
        for method, job in jobs.items():
            todo = [replace(job, side=side, seed=n) for side in pythons]
            with ThreadPoolExecutor(len(pythons)) as at_once:
                each = at_once.map if side_by_side else map
                found = list(each(run, todo, pythons.values()))
            for side, result in zip(pythons, found, strict=True):
                results[method, side].append(result)
                say(
                    f"run {n} {method:9} {side:4} {result['step_s']:8.2f} s/step "
                    f"(sampling {result['generate_s']:.2f}) {result['peak_mb']:6.0f} MB "
                    f"(from {result['base_mb']:.0f}) loss {result['loss'][0]:.3e} "
                    f"grad {result['grad_norm'][0]:.3e}"
                )
    out: dict[str, Any] = {}
    for method, job in jobs.items():
        entry: dict[str, Any] = {}
        for side in pythons:
            entry[side] = summary(job, results[method, side])
        if "trl" in entry:
            pairs = list(zip(results[method, "rlrf"], results[method, "trl"], strict=True))
            for name, field in (("cpu", "step_s"), ("memory", "peak_mb")):
                ratios = [a[field] / b[field] for a, b in pairs]
                entry[f"{name}_ratio"] = round(entry["rlrf"][field] / entry["trl"][field], 3)
                entry[f"{name}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            grown = [entry[s]["peak_mb"] - entry[s]["base_mb"] for s in ("rlrf", "trl")]
            entry["memory_growth_ratio"] = round(grown[0] / max(grown[1], 1), 3)
        out[method] = entry
    return out


def summary(job: Job, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one side, and whether it did what was asked."""
    for result in runs:
        wanted = job.rollouts * job.tokens
        if result["sampled_tokens"] != wanted:
            raise SystemExit(f"{result['sampled_tokens']} tokens were sampled, not {wanted}")
        if any(share != 1 for share in result["distilled"]):
            raise SystemExit(f"not every rollout was distilled: {result['distilled']}")
    names = ("step_s", "generate_s", "base_mb", "peak_mb", "prompt_tokens", "teacher_tokens")
    out: dict[str, Any] = {
        name: round(statistics.median(r[name] for r in runs), 3) for name in names
    }
    steps = [r["step_s"] for r in runs]
    out["step_s_range"] = [round(min(steps), 3), round(max(steps), 3)]
    # Of the first step, when both sides still have the same weights.
    out["loss"] = statistics.median(r["loss"][0] for r in runs)
    out["grad_norm"] = statistics.median(r["grad_norm"][0] for r in runs)
    out["torch"] = runs[0]["torch"]
    out["tokens_per_s"] = round(job.rollouts * job.tokens / out["step_s"], 1)
    if "phases" in runs[0]:
        out["phases_wall_s"] = {
            k: round(statistics.median(r["phases"][k] for r in runs), 3) for k in runs[0]["phases"]
        }
    if "flops" in runs[0]:
        peak = statistics.median(r["peak_flops"] for r in runs)
        out["matmul_peak_tflops"] = round(peak / 1e12, 1)
        out["peak_fraction"] = round(runs[0]["flops"] / out["step_s"] / peak, 4)
    return out


def table(name: str, methods: Mapping[str, Any], seconds: str) -> str:
    """What :func:`compare` found, for people."""
    head = (
        f"{'method':9} {'side':5} {seconds:>9} {'range':>15} {'sampling':>9} {'peak MB':>8} "
        f"{'base MB':>8} {'tokens/s':>9} {'loss':>10} {'grad norm':>10} "
        f"{'prompt':>7} {'teacher':>7}"
    )
    lines = [f"\n{name}", head]
    for method, entry in methods.items():
        for side in ("rlrf", "trl"):
            if side not in entry:
                continue
            s = entry[side]
            low, high = s["step_s_range"]
            lines.append(
                f"{method:9} {side:5} {s['step_s']:9.2f} {f'{low:.2f}..{high:.2f}':>15} "
                f"{s['generate_s']:9.2f} {s['peak_mb']:8.0f} {s['base_mb']:8.0f} "
                f"{s['tokens_per_s']:9.1f} {s['loss']:10.3e} {s['grad_norm']:10.3e} "
                f"{s['prompt_tokens']:7.0f} {s['teacher_tokens']:7.0f}"
            )
        if "cpu_ratio" in entry:
            lines.append(
                f"{'':9} ours / TRL: time {entry['cpu_ratio']:.2f} "
                f"({entry['cpu_ratio_range'][0]:.2f}..{entry['cpu_ratio_range'][1]:.2f}), "
                f"peak memory {entry['memory_ratio']:.2f}, "
                f"growth over base {entry['memory_growth_ratio']:.2f}"
            )
        elif "peak_fraction" in s:
            lines.append(
                f"{'':9} {s['peak_fraction']:.1%} of the matmul peak of "
                f"{s['matmul_peak_tflops']:.0f} TFLOP/s"
            )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, under a minute")
    parser.add_argument("--models", nargs="+", choices=("random", "real"))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--model", default=REAL, help="what `--models real` is: folder or name")
    parser.add_argument("--full", action="store_true", help="train all weights of the real model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: see the head")
    parser.add_argument("--prompts", type=int, help="per step")
    parser.add_argument("--group", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--tokens", type=int, help="of every completion")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--feedback-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8, help="rollouts per forward, both sides")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, both sides")
    parser.add_argument("--trl-as-shipped", action="store_true", help="see the head: GRPO on a CPU")
    parser.add_argument("--runs", type=int, help="per side and method")
    parser.add_argument("--steps", type=int, help="measured steps per run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("RLRF_TRL_PYTHON"),
        help="a Python with TRL; 'none' measures our side only",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def jobs_of(model: str, args: argparse.Namespace, scratch: Path) -> dict[str, Job]:
    """What to measure at one model."""
    from rlrf_trainers import config
    from rlrf_trainers.model.fetch import resolve_model

    real = model == "real"
    cuda = args.device == "cuda"
    if real:
        folder = resolve_model(args.model)
    else:
        hidden, layers = (128, 2) if args.quick else (256, 4)
        folder = random_model(scratch / "random", hidden=hidden, layers=layers)
    if args.quick:
        prompts, tokens, steps = 2, 48, 1
    elif cuda:
        prompts, tokens, steps = 8, 256, 5
    else:
        prompts, tokens, steps = (2, 64, 1) if real else (2, 128, 1)
    group = min(args.group, 4) if args.quick else args.group
    prompts, tokens = args.prompts or prompts, args.tokens or tokens
    if prompts * group % args.rows:
        raise SystemExit(f"{prompts} x {group} rollouts do not divide by --rows {args.rows}")
    few = 64 if args.quick else 10**9
    questions, feedback = texts_of(
        folder, prompts, min(few, args.prompt_tokens), min(few, args.feedback_tokens)
    )
    job = Job(
        side="rlrf",
        method="",
        model=str(folder),
        prompts=tuple(questions),
        feedback=feedback,
        templates={
            "reprompt_template": config.REPROMPT_TEMPLATE,
            "solution_template": config.SOLUTION_TEMPLATE,
            "feedback_template": config.FEEDBACK_TEMPLATE,
        },
        group=group,
        tokens=tokens,
        rows=args.rows,
        steps=args.steps or steps,
        dtype=args.dtype or ("bfloat16" if cuda or (real and not args.full) else "float32"),
        lora_r=16 if real and not args.full else 0,
        checkpointing=args.checkpointing,
        shipped=args.trl_as_shipped,
        device=args.device,
        threads=args.threads,
        seed=0,
    )
    default = ("sdpo_full", "grpo") if args.quick else METHODS
    return {method: replace(job, method=method) for method in args.methods or default}


def main() -> int:
    args = arguments()
    if args.worker:
        work(args.worker)
        return 0
    # Ours first, TRL second, within every run.
    pythons = {"rlrf": sys.executable}
    peer = find_peer(args.peer_python)
    if peer is not None:
        pythons["trl"] = peer
    runs = args.runs or (1 if args.quick else 5)
    models = args.models or (["random"] if args.quick else ["random", "real"])
    models_out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            jobs = jobs_of(model, args, Path(scratch))
            job = next(iter(jobs.values()))
            settings = {
                k: v
                for k, v in asdict(job).items()
                if k not in ("side", "method", "model", "prompts", "feedback", "templates", "seed")
            }
            settings = {"prompts": len(job.prompts), **settings}
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            side_by_side = args.quick and args.device == "cpu" and cores >= 2 * args.threads
            methods = compare(jobs, pythons, runs, side_by_side)
            models_out[model] = {"settings": settings, "methods": methods}
            unit = "CPU s" if args.device == "cpu" else "s"
            print(table(f"{model}: {json.dumps(settings)}", methods, unit), flush=True)
    out: dict[str, Any] = {"benchmark": "trainer", "quick": args.quick, "device": args.device}
    for key, method in (("sdpo", "sdpo_full"), ("sdpo_topk", "sdpo_topk"), ("grpo", "grpo")):
        for name in ("cpu_ratio", "memory_ratio"):
            ratios = [m["methods"].get(method, {}).get(name) for m in models_out.values()]
            worst = [r for r in ratios if r is not None]
            if worst or key != "sdpo_topk":
                out[f"{key}_{name}"] = max(worst) if worst else None
    if "trl" not in pythons:
        out["note"] = "TRL was not there: only our side was measured"
    print(json.dumps({**out, "trl": TRL, "runs": runs, "models": models_out}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
