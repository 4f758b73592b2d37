"""REINFORCE with a batch-mean baseline, with a loop of its own in plain torch."""

import torch
from pydantic import BaseModel

import rlrf
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.losses import group_advantages, selected_logps
from rlrf_trainers.model.prefix import Layout, completion_logits


class OwnLoopConfig(BaseModel, extra="forbid"):
    """Knobs of :class:`OwnLoop`."""

    max_steps: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_completion_length: int = 16
    seed: int = 0


class OwnLoop:
    """Maximise E[r]: the gradient is (r - mean r) * grad log pi(y | x)."""

    config_class = OwnLoopConfig

    def __init__(self, model, env, config=None, *, run_dir=None, eval_env=None, on_step=None):
        self.policy = model if isinstance(model, HFPolicy) else HFPolicy(model)
        self.env, self.config, self.on_step = env, config or OwnLoopConfig(), on_step
        trained = [p for p in self.policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.config.learning_rate)

    def train(self):
        """Run to the end."""
        history, tasks = [], self.env.tasks()
        params = rlrf.SamplingParams(max_tokens=self.config.max_completion_length)
        for step in range(1, self.config.max_steps + 1):
            batch = [tasks[(step * 7 + i) % len(tasks)] for i in range(self.config.batch_size)]
            seed = self.config.seed * 1000 + step
            rollouts = rlrf.rollout(self.env, self.policy, batch, params=params, seed=seed)
            scored = [r for r in rollouts if r.scored]  # unscored is not zero
            layout = Layout([r.completion_ids for r in scored])
            logits = completion_logits(self.policy.model, [r.prompt_ids for r in scored], layout)
            ids = layout.flat(layout.completions, logits.device)  # [N], every row's tokens
            sampled = layout.flat([r.completion_mask for r in scored], logits.device)
            logps = layout.padded(selected_logps(logits, ids) * sampled).sum(1)  # [B]
            rewards = torch.tensor([r.reward for r in scored], device=logits.device)  # [B]
            # r - mean r, and exactly 0 if all are equal, whatever rounding makes of their mean
            advantages = group_advantages(rewards, [0] * len(scored), scale_rewards="none")
            loss = -(advantages * logps).mean()
            if advantages.any():  # else there is nothing to learn, not even by weight decay
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            history.append({"step": step, "reward": rewards.mean().item(), "loss": loss.item()})
            if self.on_step:
                self.on_step(history[-1])
        return rlrf.TrainResult(history)
