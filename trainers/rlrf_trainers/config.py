"""Trainer configuration: every knob, its default, and where the default comes from.

Names are TRL's where TRL has the knob (``GRPOConfig``, ``SDPOConfig``), else those of the official
SDPO code. Sources: [P] is the SDPO paper (arXiv 2601.20802), §4 being its experiments *with*
environment feedback; [C] the official code's YAML; [TRL] TRL 1.16; [own] our choice, where they say
nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from rlrf.errors import MAX_COUNT
from rlrf.policy import MAX_TEMPERATURE, MIN_TEMPERATURE, MIN_TOP_P, SamplingParams
from rlrf.reprompt import RepromptConfig

# Bounds. Where a number makes no sense a run would hang, learn nothing or end in a traceback; each
# leaves room for whatever has been done, and for a few powers of ten more.
MOST_STEPS = 10_000_000
MOST_ROLLOUTS = 65_536  # of a batch in one dimension: tasks, or samples of a task
MOST_TOKENS = 10_000_000


def _switch(low: float, high: float) -> AfterValidator:
    """0, which is off, or from ``low`` (below which there is no effect in fp32) to ``high``."""

    def check(value: float | None) -> float | None:
        if value and not low <= value <= high:
            raise ValueError(f"must be 0, or from {low:g} to {high:g}")
        return value

    return AfterValidator(check)


def _share(low: float = 1e-6) -> AfterValidator:
    """From 0 to 1, and if it is neither not so near to one of them that it means the same."""

    def check(value: float) -> float:
        if value not in (0, 1) and not low <= value <= 1 - low:
            raise ValueError(f"must be 0, 1, or from {low:g} to {1 - low:g}")
        return value

    return AfterValidator(check)


class TrainerConfig(BaseModel):
    """What SDPO and GRPO share.

    Raises:
        pydantic.ValidationError: an unknown key or a value out of range (``make_trainer`` and
            the CLI turn it into one line).
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False
    )

    # --- how long, how much
    max_steps: int = Field(
        100, ge=1, le=MOST_STEPS, description="generation batches to train on; [own]"
    )
    prompts_per_step: int = Field(
        8, ge=1, le=MOST_ROLLOUTS, description="tasks per generation batch; [P] 32"
    )
    num_generations: int = Field(
        8, ge=1, le=MOST_ROLLOUTS, description="rollouts per task; [P], [TRL] 8"
    )
    num_iterations: int = Field(
        1, ge=1, le=1000, description="passes over a generation batch; [TRL] 1"
    )
    mini_batch_prompts: int = Field(
        0,
        ge=0,
        le=MOST_ROLLOUTS,
        description="tasks per optimizer step; 0: the whole batch ([P] §3; §4 uses 1)",
    )
    micro_batch_tokens: int = Field(
        2048,
        ge=1,
        le=2**31 - 1,
        description="tokens per forward, a group's prompt counted once; bounds memory only; [own]",
    )
    loss_chunk_mb: int = Field(
        256,
        ge=1,
        le=2**20,
        description="megabytes for the logits of a chunk of the loss; bounds memory only; [own]",
    )

    # --- sampling; the defaults sample the policy itself, as on-policy training needs
    temperature: float = Field(
        1.0,
        ge=MIN_TEMPERATURE,
        le=MAX_TEMPERATURE,
        description="[P], [TRL] 1.0; used on both logit sets",
    )
    top_p: float = Field(1.0, ge=MIN_TOP_P, le=1, description="[P] 1.0")
    top_k: int = Field(0, ge=-1, le=MAX_COUNT, description="0 keeps all tokens; [P] -1, the same")
    max_completion_length: int = Field(256, ge=1, le=MOST_TOKENS, description="[TRL] 256; [P] 8192")
    rollout_deadline_s: float = Field(
        120.0, ge=0.01, le=1e7, description="environment seconds per episode; [own]"
    )
    max_concurrency: int = Field(
        256, ge=1, le=MOST_ROLLOUTS, description="episodes under way at once; [own]"
    )

    # --- optimizer
    learning_rate: float = Field(
        1e-6, ge=1e-12, le=10, description="[P] §4, [TRL] 1e-6; LoRA wants ~1e-4"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="[P] constant"
    )
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS, description="[P] §4: 0; §3: 10")
    weight_decay: Annotated[float, _switch(1e-9, 10)] = Field(0.01, ge=0, description="[P] 0.01")
    adam_beta1: float = Field(0.9, ge=0, le=0.999999, description="torch, [TRL] 0.9")
    adam_beta2: float = Field(0.999, ge=0, le=0.999999, description="torch, [TRL] 0.999")
    max_grad_norm: float = Field(
        1.0, ge=1e-6, allow_inf_nan=True, description="[P] 1.0; inf: no clipping"
    )

    # --- what is trained
    lora_r: int = Field(
        0, ge=0, le=8192, description="rank of a LoRA adapter; 0 trains all weights, as [P] does"
    )
    lora_alpha: int = Field(0, ge=0, le=1_000_000, description="0: 2 * lora_r; [own]")
    lora_target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="names of modules, or every linear layer but the output's; [own]",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass: less memory, slower; [TRL] True, "
        "but the loss here needs less memory",
    )

    # --- off-policy correction
    rollout_is: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = Field(
        "token_truncate",
        description="weight for a sampler that is not quite the trainer: the ratio of their "
        "probabilities, of each token or of the whole reply, cut at rollout_is_threshold "
        "(truncate) or 0 above it (mask); [C] token, truncated; [TRL] sequence_mask",
    )
    rollout_is_threshold: float = Field(2.0, ge=1, le=1e6, description="[C] 2.0")

    epsilon: float = Field(
        0.2,
        ge=1e-6,
        lt=1,
        description="clip of the policy gradient: of GRPO, and of SDPO where rewards have weight; "
        "[TRL] 0.2",
    )
    epsilon_high: float | None = Field(
        None, ge=1e-6, le=1e6, description="its upper clip; None: epsilon; [P]'s GRPO baseline 0.28"
    )

    # --- evaluation, bookkeeping
    eval_steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="evaluate every so many steps; 0: at start and end only; [own]",
    )
    eval_on_start: bool = Field(
        True, description="evaluate before the first step, too; [TRL] False"
    )
    eval_tasks: int = Field(
        64, ge=0, le=MOST_STEPS, description="held-out tasks; 0: the whole split; [own]"
    )
    eval_samples: int = Field(
        1, ge=1, le=MOST_ROLLOUTS, description="rollouts per held-out task; [own]; [P] 16, 4"
    )
    eval_temperature: Annotated[float, _switch(MIN_TEMPERATURE, MAX_TEMPERATURE)] = Field(
        0.6, ge=0, description="[P] validation: 0.6"
    )
    eval_top_p: float = Field(0.95, ge=MIN_TOP_P, le=1, description="[P] validation: 0.95")
    early_stopping_patience: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="stop after so many evaluations without a new best; 0: never; [own]",
    )
    metric_for_best_model: Literal["eval/reward", "eval/pass_rate"] = Field(
        "eval/reward", description="what the best checkpoint has most of; [own]"
    )
    load_best_model_at_end: bool = Field(
        False,
        description="leave the best evaluated weights, not the last, in model/; [TRL] False. The "
        "best is chosen on the evaluation tasks, so report results on others",
    )
    save_steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="write a checkpoint every so many steps; 0: none but the best; [own]",
    )
    save_total_limit: int = Field(
        2, ge=1, le=MOST_STEPS, description="checkpoints to keep, besides the best; [own]"
    )
    log_rollouts: bool = Field(True, description="write rollouts.jsonl; [own]")
    save_model: bool = Field(True, description="write model/ at the end; [own]")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="trackers beside metrics.jsonl; [own]"
    )
    project: str = Field(
        "rlrf",
        min_length=1,
        max_length=200,
        description="name of the project in the trackers; [own]",
    )
    fsdp: bool = Field(
        False,
        description="with several processes: shard weights, gradients and optimizer (FSDP2) "
        "instead of keeping a copy in each; [own]",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of sampling, task order and adapter weights; [own]"
    )

    @property
    def sampling_params(self) -> SamplingParams:
        """How training samples."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_completion_length,
        )

    @property
    def eval_sampling_params(self) -> SamplingParams:
        """How an evaluation samples."""
        return SamplingParams(
            temperature=self.eval_temperature,
            top_p=self.eval_top_p,
            max_tokens=self.max_completion_length,
        )

    def evaluations_after(self, step: int) -> int:
        """How many evaluations come after a step; after 0, also the one at the start."""
        every, last = self.eval_steps, self.max_steps
        due = int(last > step)  # the last step's
        if every:
            due = last // every - step // every + (due and last % every > 0)
        return due + (self.eval_on_start and not step)

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if self.mini_batch_prompts > self.prompts_per_step:
            raise ValueError(
                f"mini_batch_prompts={self.mini_batch_prompts} is more than there are: "
                f"prompts_per_step={self.prompts_per_step} (0 takes them all)"
            )
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(self, name) and not self.eval_steps:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs evaluations: set eval_steps"
                )
        if self.lr_scheduler_type != "constant" and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay={self.weight_decay} at learning_rate={self.learning_rate} takes "
                "more off a weight than there is; their product must be below 1"
            )
        return self


class SDPOConfig(RepromptConfig, TrainerConfig):
    """SDPO. Where the sources conflict, the paper's §4 (with feedback) is followed.

    The official YAML (JSD, K=100, EMA 0.05) is the setting of §3, which uses no feedback; the
    official dataclass defaults (forward KL, full vocabulary) were used in no published run.
    """

    # --- divergence
    distillation_alpha: Annotated[float, _share(1e-3)] = Field(
        1.0, ge=0, le=1, description="0 forward KL, 1 reverse KL, else JSD; [P] §4: 1, §3: 0.5"
    )
    distillation_level: Literal["logit", "token", "sequence"] = Field(
        "logit",
        description="what gets credit: every token of the vocabulary; the sampled token "
        "([C] full_logit_distillation=False, [TRL] sampled_token); or all tokens of a reply "
        "alike, their mean. The last two are policy gradients with alpha 1, for ablation ([P] 4.4)",
    )
    distillation_topk: int = Field(
        20,
        ge=0,
        le=MAX_COUNT,
        description="the student's K likeliest tokens; 0: all; [P] §4: 20, §3: 100",
    )
    distillation_add_tail: bool = Field(
        True, description="one bucket for the rest; [C] True. Off is biased (see docs)"
    )
    distillation_is_clip: Annotated[float, _switch(0.01, 1e6)] = Field(
        2.0, ge=0, description="0: off; [P], [C] 2.0"
    )
    distillation_kl_clip: Annotated[float, _switch(1e-6, 1e6)] = Field(
        0.0, ge=0, description="cap of a token's divergence, nats; 0: off, as in [P]"
    )
    distillation_advantage_clip: Annotated[float, _switch(1e-6, 1e6)] = Field(
        0.0,
        ge=0,
        description="bound of |log q - log p| in the gradient, nats; 0: off; alpha must be 1. "
        "[P] §5 (test time): 5",
    )
    baseline: Literal["none", "control"] = Field(
        "none",
        description="control: subtract what the teacher says when shown another task's hint, so "
        "that what any longer prompt does is not taught (RLCSD, arXiv 2606.11709); one more "
        "teacher pass",
    )
    loss_aggregation: Literal["sequence_mean", "sequence_mean_active", "token_mean"] = Field(
        "sequence_mean",
        description="mean over tokens, then over ALL rollouts: what [C] computes with one "
        "sequence per micro-batch; _active divides by the distilled rollouts only; token_mean "
        "weighs all distilled tokens alike",
    )

    # --- reward beside feedback
    distillation_weight: Annotated[float, _share()] = Field(
        1.0,
        ge=0,
        le=1,
        description="w in w * SDPO + (1 - w) * GRPO, the GRPO part with the advantage r - mean r; "
        "[TRL] 1.0; [P] 4.5: 0.1 (its lambda is 1 - w)",
    )
    route_to_grpo: bool = Field(
        False,
        description="distil failed rollouts only, and train all others by GRPO (SRPO, arXiv "
        "2604.02288); distillation_weight is not used then",
    )
    teacher_entropy_beta: Annotated[float, _switch(1e-6, 1000)] = Field(
        0.0,
        ge=0,
        description="weight a token's divergence by exp(-beta * the teacher's entropy there); "
        "0: off; SRPO 1",
    )

    # --- teacher
    teacher_regularization: Literal["ema", "trust_region", "frozen", "live"] = Field(
        "ema", description="[P] ema; live diverges ([P] table 4)"
    )
    teacher_update_rate: Annotated[float, _switch(1e-6, 1)] = Field(
        0.01, ge=0, le=1, description="weight of the NEW weights; [P] §4: 0.01, §3: 0.05"
    )

    # --- the teacher gap; what a teacher is shown is in RepromptConfig
    probe_tasks: int = Field(
        8,
        ge=0,
        le=MOST_ROLLOUTS,
        description="training tasks on which the teacher gap (how much more often the policy is "
        "right when shown the hint) is measured before the first step; 0: none; [own]",
    )

    @property
    def probe_samples(self) -> int:
        """Attempts at each of the probe's tasks."""
        return max(2, min(4, self.num_generations))

    @model_validator(mode="after")
    def _check_sdpo(self) -> SDPOConfig:
        needs_reverse_kl = {
            f"distillation_level={self.distillation_level!r}": self.distillation_level != "logit",
            f"distillation_advantage_clip={self.distillation_advantage_clip}": bool(
                self.distillation_advantage_clip
            ),
        }
        for setting, given in needs_reverse_kl.items():
            if given and self.distillation_alpha != 1:
                raise ValueError(
                    f"{setting} needs distillation_alpha=1 (the policy gradient it changes is "
                    f"that of the reverse KL), got {self.distillation_alpha}"
                )
        if self.teacher_entropy_beta and self.distillation_level != "logit":
            raise ValueError(
                f"teacher_entropy_beta={self.teacher_entropy_beta} weighs divergences, which "
                f"distillation_level={self.distillation_level!r} has none of; use 'logit'"
            )
        if (self.distillation_weight < 1 or self.route_to_grpo) and self.num_generations < 2:
            setting = (
                "route_to_grpo=true"
                if self.route_to_grpo
                else f"distillation_weight={self.distillation_weight}"
            )
            raise ValueError(
                f"{setting} adds GRPO, which compares rollouts of a group: num_generations must "
                "be at least 2"
            )
        if not (self.include_environment_feedback or self.use_successful_as_teacher):
            raise ValueError(
                "include_environment_feedback and use_successful_as_teacher are both false: "
                "the teacher would see nothing the student does not"
            )
        alone = self.num_generations < 2 and self.dont_reprompt_on_self_success
        if alone and not self.include_environment_feedback:
            raise ValueError(
                "num_generations=1 leaves a rollout no sibling to be shown, and "
                "include_environment_feedback is false: the teacher would see nothing the student "
                "does not; set num_generations to at least 2"
            )
        return self


class GRPOConfig(TrainerConfig):
    """GRPO, with TRL's knobs and TRL's defaults."""

    beta: Annotated[float, _switch(1e-9, 1e6)] = Field(
        0.0, ge=0, description="weight of the KL to the reference; [TRL] 0.0"
    )
    sync_ref_model: bool = Field(
        False,
        description="let the reference follow the policy; [TRL] False. With ref_model_sync_steps=1 "
        "and a small ref_model_mixup_alpha it is the moving average that SDPO's teacher is",
    )
    ref_model_mixup_alpha: Annotated[float, _switch(1e-6, 1)] = Field(
        0.6, ge=0, le=1, description="weight of the policy in the new reference; [TRL] 0.6"
    )
    ref_model_sync_steps: int = Field(
        512, ge=1, le=MOST_STEPS, description="steps between; [TRL] 512"
    )
    delta: float | None = Field(
        None, gt=1, le=1e6, description="dual clip of negative advantages; [TRL] None; [P] 3"
    )
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field(
        "dapo",
        description="what the sum over tokens is divided by. grpo: each reply's by its length, "
        "then by the replies (arXiv 2402.03300); dr_grpo: by replies * max_completion_length, no "
        "bias by length (2503.20783); dapo: by all tokens of the step (2503.14476); bnpo: by those "
        "of the process; [TRL] dapo",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide advantages by the standard deviation of the group's rewards, of the "
        "whole batch's, or not at all (Dr. GRPO; [P] too); [TRL] group",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token",
        description="one ratio per token, or one per reply, the geometric mean of its tokens' "
        "(GSPO, arXiv 2507.18071); [TRL] token",
    )
    mask_truncated_completions: bool = Field(
        False, description="leave replies that max_completion_length cut off out; [TRL] False"
    )

    @model_validator(mode="after")
    def _check_grpo(self) -> GRPOConfig:
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: GRPO compares rollouts of a group, "
                "so it needs at least 2"
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"delta={self.delta} must exceed 1 + epsilon_high = {1 + high:g}, or it clips "
                "before the clip does"
            )
        if self.sync_ref_model and not self.beta:
            raise ValueError(
                "sync_ref_model=true moves a reference that nothing uses: set beta above 0"
            )
        return self
