"""Compare the SDPO loss with cases computed by another implementation.

    python -m tests.golden_loss FILE

FILE is JSON ``{"about": ..., "cases": [...]}``. A case holds flat row-major arrays of ``shape``
``[B, T, V]`` (``student_logits``, ``teacher_logits``, ``expected_grad_student_logits``), of
``[B, T]`` (``completion_ids``, ``old_logps``, ``rollout_logps`` or null, ``completion_mask``) and
``[B]`` (``sample_mask``), the scalar ``expected_loss`` (token mean over ``completion_mask *
sample_mask``) and a ``config``. Everything is computed in float64. The last line printed is JSON
with ``cases``, ``max_loss_error`` and ``max_grad_error``; the exit code is 1 when either is above
1e-6, or when the file holds no case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrf_trainers.losses import importance_weights, rollout_importance_weights
from tests.reference_losses import aggregate, self_distillation_loss

TOLERANCE = 1e-6


def load_cases(path: str | Path) -> list[dict[str, Any]]:
    cases = json.loads(Path(path).read_text())["cases"]
    assert isinstance(cases, list)
    return cases


def loss_and_grad(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The batch loss of a case and its gradient in the student's logits, both in float64."""
    b, t, v = case["shape"]
    config = case["config"]

    def array(name: str, *shape: int) -> Tensor:
        return torch.tensor(case[name], dtype=torch.float64).reshape(shape)

    student = array("student_logits", b, t, v).requires_grad_()
    old_logps = array("old_logps", b, t)
    rollout_logps = array("rollout_logps", b, t) if case["rollout_logps"] is not None else None
    mask = array("completion_mask", b, t) * array("sample_mask", b, 1)

    per_token, metrics = self_distillation_loss(
        student,
        array("teacher_logits", b, t, v),
        alpha=config["alpha"],
        topk=config["distillation_topk"],
        add_tail=config["distillation_add_tail"],
        full_logit_distillation=config["full_logit_distillation"],
        completion_ids=torch.tensor(case["completion_ids"]).reshape(b, t),
    )
    per_token = per_token * importance_weights(
        metrics["student_logps"], old_logps, config["is_clip"]
    )
    per_token = per_token * rollout_importance_weights(
        old_logps, rollout_logps, config["rollout_is"]
    )
    loss = aggregate(per_token, mask, "token_mean")
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def errors(case: dict[str, Any]) -> tuple[float, float]:
    """Largest absolute error of the loss and of the gradient of one case."""
    loss, grad = loss_and_grad(case)
    expected = torch.tensor(case["expected_grad_student_logits"], dtype=torch.float64)
    return (
        abs(float(loss) - float(case["expected_loss"])),
        float((grad - expected.reshape(grad.shape)).abs().max()),
    )


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m tests.golden_loss FILE", file=sys.stderr)
        return 2
    found = []
    for case in load_cases(argv[0]):
        found.append(errors(case))
        print(f"{case['name']}: loss {found[-1][0]:.2e}, gradient {found[-1][1]:.2e}")
    # max() would drop a NaN depending on its position; a comparison that must hold does not.
    good = bool(found) and all(error <= TOLERANCE for pair in found for error in pair)
    summary = {
        "cases": len(found),
        "max_loss_error": max((pair[0] for pair in found), default=None),
        "max_grad_error": max((pair[1] for pair in found), default=None),
    }
    print(json.dumps(summary))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
