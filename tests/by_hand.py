"""What trainers compute, written down by hand: one rollout after another, autograd, float64.

The losses follow the definitions (papers, TRL's formulas) token by token and take nothing from
:mod:`rlrf_trainers` but the configuration: no chunks, no shared prompts, no written-down gradients.
:func:`steps_of` catches what a trainer computes instead.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlrf import Rollout
from rlrf_trainers.engines.hf import HFPolicy
from tests.tiny_model import tiny_model, tiny_tokenizer


def double_policy() -> HFPolicy:
    """The tiny model in float64."""
    return HFPolicy(tiny_model(num_hidden_layers=1).double(), tiny_tokenizer())


# --- what a trainer does ----------------------------------------------------------------------


def gradient(model: Any) -> Tensor:
    """The gradients that have been added up in a model, one after another."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone()
            for p in model_parameters(model)
        ]
    )


class Step(NamedTuple):
    """An optimizer step: the model before it, and the gradient and loss it is taken with."""

    model: Any
    gradient: Tensor
    loss: float


def steps_of(trainer: Any, rollouts: Sequence[Rollout], noise: float = 0.02) -> list[Step]:
    """What the optimizer steps of one generation batch are taken with.

    Each step is followed by a random one, so that ratios leave every clip on both sides, whatever
    the advantage.
    """
    learner, found = trainer.learner, []
    take, generator = learner.optimizer_step, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def spy() -> bool:
        model = copy.deepcopy(learner.model)
        found.append(Step(model, gradient(learner.model), learner._loss))
        model.zero_grad()
        moved = take()
        for p in model_parameters(learner.model):
            p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        return bool(moved)

    learner.optimizer_step = spy
    learner.step += 1
    trainer.learn(rollouts)
    learner.optimizer_step = take
    return found


def model_parameters(model: Any) -> list[Any]:
    """What is trained, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: Any) -> dict[str, Tensor]:
    """What is trained, by name, as it is now."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    """Equal to a millionth of the largest number.

    Not closer: the models' norms and the trainers' weights of tokens are float32 even here.
    """
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(found / scale, expected / scale, atol=atol, rtol=0)


def apart(found: Tensor, other: Tensor) -> bool:
    """Whether two differ by far more than :func:`assert_near` overlooks."""
    return bool((found - other).abs().max() > 1e-3 * other.abs().max())


# --- what it should do ------------------------------------------------------------------------


def gradient_of(loss: Tensor, of: Any) -> Tensor:
    """The gradient of a loss in a model, as :func:`gradient` has it, or in some tensors."""
    tensors = of if isinstance(of, list) else model_parameters(of)
    found = torch.autograd.grad(
        loss, tensors, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return torch.cat([g.flatten() for g in found])


def with_weights(weights: Mapping[str, Tensor], lora_scale: float = 0.0) -> Any:
    """The tiny model with such weights; those of a LoRA adapter are added to the layers'."""
    model = tiny_model(num_hidden_layers=1).double()
    if not lora_scale:
        unknown = model.load_state_dict(dict(weights), strict=False).unexpected_keys
        assert not unknown
        return model
    for name, b in weights.items():
        if "lora_B" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_B")[0]
            a = weights[name.replace("lora_B", "lora_A")]
            model.get_submodule(layer).weight.data += lora_scale * b @ a
    return model


def token_logits(
    model: Any, prompt: Sequence[int], reply: Sequence[int], mask: Sequence[int], temperature: float
) -> Tensor:
    """``[S, V]``: what each sampled token is drawn from."""
    logits = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
    before = [len(prompt) + t - 1 for t, sampled in enumerate(mask) if sampled]
    return logits[before] / temperature


def student_logits(model: Any, r: Rollout, temperature: float = 1.0) -> Tensor:
    """``[S, V]`` after the rollout's own prompt."""
    return token_logits(model, r.prompt_ids, r.completion_ids, r.completion_mask, temperature)


def sampled(r: Rollout, values: Sequence[Any]) -> Tensor:
    """``[S]``: what there is for each completion token, of the sampled ones."""
    return torch.tensor([v for v, m in zip(values, r.completion_mask, strict=True) if m])


def logps_of(logits: Tensor, r: Rollout) -> Tensor:
    """``[S]``: log-probabilities of the sampled tokens."""
    return logits.log_softmax(-1)[range(len(logits)), sampled(r, r.completion_ids)]


def logps(model: Any, rollouts: Sequence[Rollout], temperature: float = 1.0) -> list[Tensor]:
    """``[S]`` of each rollout, with their gradients."""
    return [logps_of(student_logits(model, r, temperature), r) for r in rollouts]


@torch.no_grad()
def fixed_logps(model: Any, rollouts: Sequence[Rollout], temperature: float = 1.0) -> list[Tensor]:
    """``[S]`` of each rollout, of a model that is not trained."""
    return logps(model, rollouts, temperature)


def advantages(rollouts: Sequence[Rollout], scale_rewards: str) -> list[float]:
    """Reward minus the group's mean, over a deviation; 0 of unscored rollouts."""
    scored = [r for r in rollouts if r.reward is not None]
    found = []
    for r in rollouts:
        group = [other.reward for other in scored if other.group_id == r.group_id]
        everyone = [other.reward for other in scored]
        scale = {
            "none": lambda: 1.0,
            "group": lambda group=group: statistics.stdev(group) + 1e-4,
            "batch": lambda everyone=everyone: statistics.stdev(everyone) + 1e-4,
        }[scale_rewards]
        found.append(0.0 if r.reward is None else (r.reward - statistics.mean(group)) / scale())
    return found


def surrogate(ratio: Tensor, advantage: float, config: Any) -> Tensor:
    """PPO's clipped objective, to be minimised."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clipped = ratio.clamp(1 - config.epsilon, 1 + high)
    delta = getattr(config, "delta", None)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantage, clipped * advantage)


def assert_clipping_is_told(
    trainer: Any, rollouts: Sequence[Rollout], takes_part: Sequence[bool]
) -> None:
    """``clip_ratio/*`` of two optimizer steps on the same rollouts are what was clipped.

    Args:
        trainer: with the knobs.
        rollouts: of a generation batch.
        takes_part: of each, whether it is in a forward.
    """
    steps = steps_of(trainer, rollouts)
    first, second = (fixed_logps(step.model, rollouts) for step in steps)
    low = high = tokens = 0
    columns = zip(advantages(rollouts, "none"), first, second, takes_part, strict=True)
    for a, old, new, counts in columns:
        ratio = (new - old).exp()
        low += int(((ratio < 1 - trainer.config.epsilon) & (a < 0)).sum())
        high += int(((ratio > 1 + trainer.config.epsilon_high) & (a > 0)).sum())
        tokens += len(ratio) * counts
    assert 0 < low != high > 0
    for name, count in {"low": low, "high": high, "region": low + high}.items():
        told = trainer.learner.record.metrics[f"clip_ratio/{name}"]
        # The first step, on as many tokens, clips nothing.
        assert round(sum(value * n for value, n in told), 3) == count
        assert sum(n for _, n in told) == 2 * tokens


def sampler_weights(old: Tensor, r: Rollout, config: Any) -> Tensor:
    """``[S]``: the correction for a sampler that draws from another distribution."""
    mode, most = config.rollout_is, config.rollout_is_threshold
    if mode == "none" or config.top_p < 1 or config.top_k > 0:
        return torch.ones_like(old)
    log_ratio = old - sampled(r, r.logprobs)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum().expand_as(old)
    ratio = log_ratio.exp()
    found = ratio.clamp(max=most) if mode.endswith("truncate") else ratio * (ratio <= most)
    by_row = getattr(config, "importance_sampling_level", "token") == "sequence"
    return found.mean().expand_as(old) if by_row else found


def grpo_loss(
    rollouts: Sequence[Rollout],
    config: Any,
    logps: Sequence[Tensor],
    *,
    everyone: Sequence[Rollout] | None = None,
    old: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
) -> Tensor:
    """GRPO's loss of one optimizer step.

    Args:
        rollouts: those of the step.
        config: which GRPO.
        logps: ``[S]`` of each, before the step.
        everyone: the rollouts of the generation batch, if there are more.
        old: as `logps`, by the policy that sampled; None: the same.
        reference: as `logps`, of what the KL is to.
    """
    everyone = everyone or rollouts
    advantage = dict(
        zip(map(id, everyone), advantages(everyone, config.scale_rewards), strict=True)
    )
    cut = [config.mask_truncated_completions and r.finish_reason == "length" for r in rollouts]
    rows = sum(r.reward is not None for r in rollouts)
    counted = [i for i, r in enumerate(rollouts) if r.reward is not None and not cut[i]]
    tokens = sum(len(logps[i]) for i in counted)
    total = torch.zeros((), dtype=torch.float64)
    for i in counted:
        r, before = rollouts[i], (old or logps)[i].detach()
        log_ratio = logps[i] - before
        if config.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand_as(before)
        loss = surrogate(log_ratio.exp(), advantage[id(r)], config)
        loss = loss * sampler_weights(before, r, config)
        if config.beta and reference is not None:
            d = reference[i].detach() - logps[i]
            loss = loss + config.beta * (d.exp() - d - 1)
        total = (
            total
            + {
                "grpo": loss.mean() / rows,
                "dr_grpo": loss.sum() / (rows * config.max_completion_length),
                "dapo": loss.sum() / tokens,
                "bnpo": loss.sum() / tokens,
            }[config.loss_type]
        )
    return total


def divergence(student: Tensor, teacher: Tensor, config: Any) -> Tensor:
    """``[S]`` of ``[S, V]`` logits: SDPO's eq. 1, over the student's likeliest tokens."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    if config.distillation_topk:
        top = student.topk(config.distillation_topk).indices
        p, q = p.gather(-1, top), q.gather(-1, top)
        if config.distillation_add_tail:
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        else:
            p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    alpha = config.distillation_alpha
    if alpha in (0, 1):
        return kl(p, q) if alpha else kl(q, p)
    m = (1 - alpha) * p + alpha * q
    return (1 - alpha) * kl(p, m) + alpha * kl(q, m)


def sdpo_loss(
    model: Any,
    targets: Sequence[Any],
    config: Any,
    *,
    per_token: Any = None,
    old: Any = None,
    teacher: Any = None,
) -> Tensor:
    """SDPO's loss of one optimizer step, rewards included where they have weight.

    Args:
        model: as it is before the step.
        targets: the rollouts with their teachers' prompts.
        config: which SDPO.
        per_token: ``(student [S, V], teacher [S, V], rollout) -> [S]``; None: the divergence.
        old: the model that sampled; None: `model`.
        teacher: None: `model`.
    """
    weight, temperature = config.distillation_weight, config.temperature
    rewards = advantages([t.rollout for t in targets], "none")
    total = torch.zeros((), dtype=torch.float64)
    for target, advantage in zip(targets, rewards, strict=True):
        r, shown = target.rollout, target.reprompt
        student = student_logits(model, r, temperature)
        (before,) = fixed_logps(old or model, [r], temperature)
        ratio = (logps_of(student, r) - before).exp()
        loss = torch.zeros_like(before)
        if shown is not None:
            with torch.no_grad():
                q = teacher_logits(teacher or model, shown, temperature)
            if per_token is not None:
                distilled = per_token(student, q, r)
            else:
                distilled = divergence(student, q, config)
                if config.distillation_kl_clip:
                    distilled = distilled.clamp(max=config.distillation_kl_clip)
            if config.distillation_is_clip:
                distilled = distilled * ratio.detach().clamp(max=config.distillation_is_clip)
            loss = loss + weight * distilled
        if weight < 1:
            loss = loss + (1 - weight) * surrogate(ratio, advantage, config)
        loss = loss * sampler_weights(before, r, config)
        total = total + loss.mean() / len(targets)
    return total


def teacher_logits(model: Any, shown: Any, temperature: float = 1.0) -> Tensor:
    """``[S, V]`` after a reprompt."""
    return token_logits(
        model, shown.prompt_ids, shown.completion_ids, shown.completion_mask, temperature
    )
