"""The losses against an independent implementation, closed forms, and their own invariances."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from rlrf.errors import ConfigError, UsageError  # noqa: E402
from rlrf_trainers.losses import (  # noqa: E402
    AGGREGATIONS,
    BatchCounts,
    aggregation_weights,
    group_advantages,
    importance_weights,
    k3_kl,
    reward_statistics,
    rollout_importance_weights,
    selected_logps,
)
from tests import golden_loss  # noqa: E402
from tests.reference_losses import (  # noqa: E402  # noqa: E402
    aggregate,
    entropy,
    masked_mean,
    policy_gradient_loss,
    sampled_token_loss,
    self_distillation_loss,
)

SMALL_GOLDEN = Path(__file__).parent / "data" / "golden_small.json"
F64 = torch.float64
Tensor = torch.Tensor


def randn(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(dtype)


def divergence_and_grad(
    student: Tensor, teacher: Tensor, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    student = student.clone().requires_grad_()
    loss, metrics = self_distillation_loss(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad, metrics


def by_autograd(
    student: Tensor, teacher: Tensor, alpha: float, topk: int | None, add_tail: bool
) -> Tensor:
    """The definition, term by term, left to autograd; the tail as log(1 - exp(S)), S <= -1e-7."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if topk is not None:
        ids = student.topk(topk, -1).indices
        log_p, log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
        if add_tail:

            def with_tail(x: Tensor) -> Tensor:
                mass = x.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
                return torch.cat([x, torch.log(-torch.expm1(mass))], -1)

            log_p, log_q = with_tail(log_p), with_tail(log_q)
        else:
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if alpha == 0:
        return (q * (log_q - log_p)).sum(-1)
    if alpha == 1:
        return (p * (log_p - log_q)).sum(-1)
    m = (1 - alpha) * p + alpha * q
    return (1 - alpha) * (p * (log_p - m.log())).sum(-1) + alpha * (q * (log_q - m.log())).sum(-1)


VARIANTS = [
    pytest.param(alpha, topk, tail, id=f"alpha{alpha}-{name}")
    for alpha in (0.0, 0.3, 0.5, 1.0)
    for topk, tail, name in ((None, True, "full"), (3, True, "top3+tail"), (3, False, "top3"))
]


# ------------------------------------------------------------------- golden values


@pytest.mark.parametrize("case", golden_loss.load_cases(SMALL_GOLDEN), ids=lambda c: c["name"])
def test_loss_and_gradient_equal_the_golden_values(case: dict[str, Any]) -> None:
    loss_error, grad_error = golden_loss.errors(case)
    assert loss_error <= 1e-6
    assert grad_error <= 1e-6


def run_golden(path: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden_loss", str(path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_every_case_of_the_golden_file_named_by_the_environment() -> None:
    path = os.environ.get("RLRF_GOLDEN_LOSS")
    if not path:
        pytest.skip("RLRF_GOLDEN_LOSS names no file of golden loss cases")
    code, summary = run_golden(Path(path))
    assert code == 0, summary
    assert summary["cases"] == len(golden_loss.load_cases(path)) > 0
    assert summary["max_loss_error"] <= 1e-6
    assert summary["max_grad_error"] <= 1e-6


@pytest.mark.parametrize("field", ["expected_loss", "expected_grad_student_logits"])
@pytest.mark.parametrize("wrong", [1e-5, math.nan])
def test_the_golden_comparison_notices_a_wrong_number(
    field: str, wrong: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(SMALL_GOLDEN.read_text())
    if field == "expected_loss":
        data["cases"][1][field] += wrong
    else:
        data["cases"][1][field][0] += wrong
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    assert golden_loss.main([str(tmp_path / "wrong.json")]) == 1
    assert golden_loss.main([str(SMALL_GOLDEN)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary.keys() == {"cases", "max_loss_error", "max_grad_error"}


def test_a_golden_file_without_cases_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"about": "", "cases": []}')
    assert golden_loss.main([str(tmp_path / "empty.json")]) == 1


# ----------------------------------------------------------------- by hand, p and q known

STUDENT = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=F64).log()
TEACHER = torch.tensor([[0.2, 0.6, 0.1, 0.1]], dtype=F64).log()


@pytest.mark.parametrize(
    ("alpha", "tail", "expected"),
    [
        (0.0, True, 0.23263016),
        (1.0, True, 0.25020121),
        (0.5, True, 0.05869201),
        (0.3, True, 0.04883187),
        (1.0, False, 0.31275151),
        (0.0, False, 0.29078770),
    ],
)
def test_two_buckets_and_tail_by_hand(alpha: float, tail: bool, expected: float) -> None:
    loss, metrics = self_distillation_loss(STUDENT, TEACHER, alpha=alpha, topk=2, add_tail=tail)
    assert loss.item() == pytest.approx(expected, abs=1e-8)
    assert metrics["topk_coverage"].item() == pytest.approx(0.8)
    assert metrics["teacher_topk_coverage"].item() == pytest.approx(0.8)
    if tail:
        assert metrics["teacher_student_kl"].item() == pytest.approx(0.25020121, abs=1e-8)


@pytest.mark.parametrize(
    ("alpha", "bucket_grad"),
    [(1.0, [0.33304476, -0.28300452, -0.05004024]), (0.0, [0.3, -0.3, 0.0])],
)
def test_gradient_by_hand(alpha: float, bucket_grad: list[float]) -> None:
    _, grad, _ = divergence_and_grad(STUDENT, TEACHER, alpha=alpha, topk=2)
    # The tail's logits share its gradient in proportion to their probability, .15 to .05.
    first, second, tail = bucket_grad
    expected = torch.tensor([[first, second, tail * 0.75, tail * 0.25]], dtype=F64)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=0)


def test_alpha_one_is_student_first_and_alpha_zero_teacher_first() -> None:
    p, q = STUDENT.exp(), TEACHER.exp()
    reverse, _ = self_distillation_loss(STUDENT, TEACHER, alpha=1.0, topk=None)
    forward, _ = self_distillation_loss(STUDENT, TEACHER, alpha=0.0, topk=None)
    assert reverse.item() == pytest.approx((p * (p / q).log()).sum().item())
    assert forward.item() == pytest.approx((q * (q / p).log()).sum().item())
    assert abs(reverse.item() - forward.item()) > 1e-3
    swapped, _ = self_distillation_loss(TEACHER, STUDENT, alpha=0.0, topk=None)
    assert swapped.item() == pytest.approx(reverse.item())


def test_endpoints_are_kl_and_not_the_limit_of_the_jsd() -> None:
    student, teacher = randn(5, 7), randn(5, 7, seed=1)
    for end, near in ((0.0, 1e-3), (1.0, 1 - 1e-3)):
        kl, _ = self_distillation_loss(student, teacher, alpha=end, topk=None)
        jsd, _ = self_distillation_loss(student, teacher, alpha=near, topk=None)
        assert (kl > 0.05).all()
        assert (jsd < 1e-2).all()


def test_near_agreement_the_jsd_is_alpha_times_one_minus_alpha_of_the_kl() -> None:
    student = randn(5, 7)
    teacher = student + 1e-3 * randn(5, 7, seed=1)
    kl, _ = self_distillation_loss(student, teacher, alpha=1.0, topk=None)
    for alpha in (0.2, 0.5):
        jsd, _ = self_distillation_loss(student, teacher, alpha=alpha, topk=None)
        torch.testing.assert_close(
            jsd / kl, torch.full_like(kl, alpha * (1 - alpha)), rtol=1e-2, atol=0
        )


# ------------------------------------------------------- against the definition, by autograd


@pytest.mark.parametrize(("alpha", "topk", "tail"), VARIANTS)
def test_value_and_gradient_are_those_of_the_definition(
    alpha: float, topk: int | None, tail: bool
) -> None:
    student, teacher = randn(6, 11, scale=3), randn(6, 11, seed=1, scale=3)
    loss, grad, _ = divergence_and_grad(student, teacher, alpha=alpha, topk=topk, add_tail=tail)
    leaf = student.clone().requires_grad_()
    expected = by_autograd(leaf, teacher, alpha, topk, tail)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("alpha", "topk", "tail"), VARIANTS)
def test_gradcheck(alpha: float, topk: int | None, tail: bool) -> None:
    student = randn(2, 3, 6).requires_grad_()
    teacher = randn(2, 3, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda z: self_distillation_loss(z, teacher, alpha=alpha, topk=topk, add_tail=tail)[0],
        student,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [7, 9])
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(
    alpha: float, tail: bool, k: int
) -> None:
    student, teacher = randn(4, 7), randn(4, 7, seed=1)
    full = divergence_and_grad(student, teacher, alpha=alpha, topk=None)
    topk = divergence_and_grad(student, teacher, alpha=alpha, topk=k, add_tail=tail)
    torch.testing.assert_close(topk[0], full[0])
    torch.testing.assert_close(topk[1], full[1])


def test_topk_with_tail_approaches_the_full_divergence_from_below() -> None:
    student, teacher = randn(8, 40), randn(8, 40, seed=1)
    values = [
        self_distillation_loss(student, teacher, alpha=1.0, topk=k)[0] for k in (1, 5, 20, None)
    ]
    for smaller, larger in pairwise(values):  # merging buckets loses KL
        assert (smaller <= larger + 1e-12).all()


def test_topk_indices_are_the_students() -> None:
    student = torch.tensor([[5.0, 4.0, 0.0, 0.0]], dtype=F64)
    teacher = torch.tensor([[0.0, 0.0, 5.0, 4.0]], dtype=F64)
    _, metrics = self_distillation_loss(student, teacher, topk=2)
    assert metrics["topk_coverage"].item() > 0.9
    assert metrics["teacher_topk_coverage"].item() < 0.1


def test_without_a_tail_the_other_logits_get_no_gradient_and_with_it_they_do() -> None:
    student, teacher = randn(4, 9), randn(4, 9, seed=1)
    outside = torch.ones(4, 9, dtype=torch.bool).scatter_(1, student.topk(3).indices, False)
    _, renormalised, _ = divergence_and_grad(student, teacher, alpha=1.0, topk=3, add_tail=False)
    _, with_tail, _ = divergence_and_grad(student, teacher, alpha=1.0, topk=3, add_tail=True)
    assert (renormalised[outside] == 0).all()
    assert (with_tail[outside] != 0).all()


def test_the_teacher_never_gets_a_gradient() -> None:
    for options in ({}, {"topk": 2}, {"full_logit_distillation": False, "alpha": 1.0}):
        student, teacher = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1).requires_grad_()
        ids = torch.zeros(2, 3, dtype=torch.long)
        loss, metrics = self_distillation_loss(student, teacher, completion_ids=ids, **options)
        loss.sum().backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert not any(value.requires_grad for value in metrics.values())
        assert all(value.shape == loss.shape for value in metrics.values())


def test_no_graph_is_built_when_none_is_asked_for() -> None:
    loss, _ = self_distillation_loss(randn(3, 5), randn(3, 5, seed=1), topk=2)
    assert not loss.requires_grad
    with torch.no_grad():
        loss, _ = self_distillation_loss(randn(3, 5).requires_grad_(), randn(3, 5, seed=1))
    assert not loss.requires_grad


# ----------------------------------------------------------------------- metrics, sampled token


@pytest.mark.parametrize("topk", [None, 3])
def test_metrics_are_the_quantities_they_are_named_for(topk: int | None) -> None:
    student, teacher = randn(4, 9), randn(4, 9, seed=1)
    ids = torch.tensor([8, 0, 3, 3])
    _, metrics = self_distillation_loss(student, teacher, alpha=0.5, topk=topk, completion_ids=ids)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    rows = torch.arange(4)
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_student_kl": by_autograd(student, teacher, 1.0, topk, True),
        "topk_coverage": torch.ones(4, dtype=F64),
        "teacher_topk_coverage": torch.ones(4, dtype=F64),
        "student_logps": log_p[rows, ids],
        "teacher_logps": log_q[rows, ids],
    }
    if topk is not None:
        chosen = log_p.topk(topk).indices
        expected["topk_coverage"] = log_p.exp().gather(-1, chosen).sum(-1)
        expected["teacher_topk_coverage"] = log_q.exp().gather(-1, chosen).sum(-1)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=name)
    torch.testing.assert_close(entropy(student), expected["entropy"])
    torch.testing.assert_close(selected_logps(student, ids), expected["student_logps"])


def test_the_surrogate_has_the_policy_gradient_of_reverse_kl() -> None:
    # Averaged over the student's own samples its gradient is the gradient of reverse KL.
    student, teacher = randn(1, 6), randn(1, 6, seed=1)
    _, exact, _ = divergence_and_grad(student, teacher, alpha=1.0, topk=None)
    total = torch.zeros_like(exact)
    for token in range(6):
        _, grad, metrics = divergence_and_grad(
            student,
            teacher,
            alpha=1.0,
            full_logit_distillation=False,
            completion_ids=torch.tensor([token]),
        )
        total += metrics["student_logps"].exp() * grad
    torch.testing.assert_close(total, exact)


def test_surrogate_value_and_clip() -> None:
    student = torch.tensor([-1.0, -1.0], dtype=F64, requires_grad=True)
    teacher = torch.tensor([-4.0, -0.5], dtype=F64, requires_grad=True)
    assert sampled_token_loss(student, teacher).tolist() == [-3.0, 0.5]
    sampled_token_loss(student, teacher, per_token_kl_clip=2.0).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [2.0, -0.5]
    assert teacher.grad is None


def test_per_token_clip_caps_the_loss_and_drops_the_capped_gradient() -> None:
    student, teacher = randn(6, 9, scale=3), randn(6, 9, seed=1, scale=3)
    free, free_grad, _ = divergence_and_grad(student, teacher, alpha=1.0, topk=4)
    cap = free.median().item()
    loss, grad, metrics = divergence_and_grad(
        student, teacher, alpha=1.0, topk=4, per_token_kl_clip=cap
    )
    above = free > cap
    assert above.any()
    assert not above.all()
    torch.testing.assert_close(loss, free.clamp(max=cap))
    assert (grad[above] == 0).all()
    torch.testing.assert_close(grad[~above], free_grad[~above])
    torch.testing.assert_close(metrics["teacher_student_kl"], free)  # metrics stay unclipped


# ------------------------------------------------------------------------- numerical stability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "topk", "tail"), VARIANTS)
def test_extreme_logits_stay_finite(
    alpha: float, topk: int | None, tail: bool, dtype: torch.dtype
) -> None:
    sharp = torch.zeros(1, 8)
    sharp[0, 0] = 200.0
    other = torch.zeros(1, 8)
    other[0, 7] = 200.0
    masked = torch.zeros(1, 8)
    masked[0, 4:] = -torch.inf
    rows = [sharp, other, masked, torch.zeros(1, 8), randn(1, 8, dtype=torch.float32) * 5]
    student = torch.cat([a for a in rows for _ in rows]).to(dtype)
    teacher = torch.cat(rows * len(rows)).to(dtype)
    ids = torch.zeros(len(student), dtype=torch.long)
    loss, grad, metrics = divergence_and_grad(
        student, teacher, alpha=alpha, topk=topk, add_tail=tail, completion_ids=ids
    )
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert all(value.isfinite().all() for value in metrics.values())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tiny_tail_is_as_exact_in_float32_as_in_float64(alpha: float) -> None:
    # Student's tail ~ 3e-6, teacher's ~ 0.5: log(1 - mass of the top-K) in float32 is off by
    # percents here, and its gradient by 1/tail as much.
    student = torch.zeros(1, 50, dtype=F64)
    student[0, :2] = torch.tensor([17.0, 16.0], dtype=F64)
    teacher = randn(1, 50, scale=0.5)
    exact, exact_grad, _ = divergence_and_grad(student, teacher, alpha=alpha, topk=2)
    loss, grad, _ = divergence_and_grad(student.float(), teacher.float(), alpha=alpha, topk=2)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, exact_grad.float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tail_below_its_floor_is_a_constant_of_1e_minus_7(alpha: float) -> None:
    student = torch.full((1, 6), -40.0, dtype=F64)
    student[0, :2] = torch.tensor([1.0, 0.0], dtype=F64)
    teacher = randn(1, 6, seed=1)
    leaf = student.clone().requires_grad_()
    expected = by_autograd(leaf, teacher, alpha, 2, True)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    loss, grad, _ = divergence_and_grad(student, teacher, alpha=alpha, topk=2)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-7)


@pytest.mark.parametrize("topk", [None, 4])
def test_bfloat16_logits_lose_nothing_beyond_their_own_rounding(topk: int | None) -> None:
    student, teacher = (
        randn(16, 64, dtype=torch.bfloat16),
        randn(16, 64, seed=1, dtype=torch.bfloat16),
    )
    exact, exact_grad, _ = divergence_and_grad(student.double(), teacher.double(), topk=topk)
    loss, grad, _ = divergence_and_grad(student, teacher, topk=topk)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-7, atol=1e-7)


finite_logits = st.lists(
    st.floats(-30, 30, allow_nan=False, width=32), min_size=12, max_size=12
).map(lambda x: torch.tensor(x, dtype=F64).reshape(2, 6))


@settings(max_examples=60, deadline=None)
@given(
    student=finite_logits,
    teacher=finite_logits,
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    topk=st.sampled_from([None, 1, 3, 5]),
    tail=st.booleans(),
    shift=st.floats(-50, 50),
)
def test_divergence_properties(
    student: Tensor, teacher: Tensor, alpha: float, topk: int | None, tail: bool, shift: float
) -> None:
    if topk is not None:  # ties in the top-K may be broken either way after a shift
        gaps = student.sort(-1).values.diff(dim=-1)
        assume(bool((gaps > 1e-6).all()))
    options = {"alpha": alpha, "topk": topk, "add_tail": tail}
    loss, grad, metrics = divergence_and_grad(student, teacher, **options)
    assert (loss >= -1e-6).all()  # the floor of the tail lets KL dip to -1e-7 log(1e7)
    assert (metrics["entropy"] >= -1e-9).all()
    assert (metrics["entropy"] <= math.log(6) + 1e-9).all()
    if 0 < alpha < 1:
        assert (loss <= math.log(2) + 1e-6).all()
    # A softmax does not notice a constant, so the gradient sums to 0 and a shift changes nothing.
    assert grad.sum(-1).abs().max() <= 1e-6
    shifted, shifted_grad, _ = divergence_and_grad(student + shift, teacher - shift, **options)
    torch.testing.assert_close(shifted, loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-6, atol=1e-9)
    same, same_grad, _ = divergence_and_grad(student, student, **options)
    assert same.abs().max() <= 1e-9
    assert same_grad.abs().max() <= 2e-7  # a tail at its floor, as a constant, pulls this much


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"alpha": 1.5}, "1.5"),
        ({"alpha": math.nan}, "nan"),
        ({"topk": 0}, "distillation_topk=0"),
        ({"per_token_kl_clip": 0.0}, "per_token_kl_clip=0.0"),
        ({"alpha": 0.5, "full_logit_distillation": False}, "distillation_alpha=0.5"),
        ({"alpha": 1.0, "full_logit_distillation": False}, "completion_ids"),
        ({"completion_ids": torch.zeros(3, dtype=torch.long)}, "completion_ids"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        self_distillation_loss(randn(2, 5), randn(2, 5), **options)


def test_teacher_and_student_must_score_the_same_tokens() -> None:
    with pytest.raises(UsageError, match=r"\[2, 5\].*\[3, 5\]"):
        self_distillation_loss(randn(2, 5), randn(3, 5))


# ------------------------------------------------------------------------- importance weights


def test_importance_weights_truncate_above_only_and_carry_no_gradient() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0, -900.0], dtype=F64, requires_grad=True)
    old = torch.tensor([-1.0, -3.0, -2.0 + math.log(2), 0.0], dtype=F64)
    weights = importance_weights(logps, old, 2.0)
    expected = torch.tensor([1.0, 2.0, math.e / 2, math.exp(-20)], dtype=F64)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)
    assert not weights.requires_grad
    for off in (importance_weights(logps, None, 2.0), importance_weights(logps, old, None)):
        assert off.tolist() == [1.0] * 4
        assert not off.requires_grad


def test_rollout_weights_are_old_over_rollout() -> None:
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    weights = rollout_importance_weights(old, torch.tensor([-0.5, -9.0]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-0.5), 2.0]))
    assert not weights.requires_grad
    assert rollout_importance_weights(old, None, 2.0).tolist() == [1.0, 1.0]
    assert rollout_importance_weights(old, old, 2.0).tolist() == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"rollout_is_threshold=0\.0"):
        rollout_importance_weights(old, old, 0.0)


def test_rollout_weights_of_every_mode() -> None:
    old = torch.tensor([[0.0, math.log(3.0), 5.0], [math.log(0.5), math.log(0.5), 0.0]])
    sampled = torch.zeros_like(old)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def weights(mode: str) -> list[list[float]]:
        found = rollout_importance_weights(old, sampled, 2.0, mode, mask)  # type: ignore[arg-type]  # one of the modes
        return [[round(x, 4) for x in row] for row in found.tolist()]

    assert weights("token_truncate") == [[1, 2, 2], [0.5, 0.5, 1]]
    assert weights("token_mask") == [[1, 0, 0], [0.5, 0.5, 1]]
    # The third token of the first row was not sampled, so it is no part of the product.
    assert weights("sequence_truncate") == [[2, 2, 2], [0.25, 0.25, 0.25]]
    assert weights("sequence_mask") == [[0, 0, 0], [0.25, 0.25, 0.25]]
    with pytest.raises(ConfigError, match="token_mask"):
        weights("tokens")
    with pytest.raises(UsageError, match="mask"):
        rollout_importance_weights(old, sampled, 2.0, "sequence_mask")


# -------------------------------------------------------------------------------- aggregation

# Rows of 3, 1, 0 and 2 active tokens.
MASK = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]])
PER_TOKEN = torch.tensor([[1.0, 2.0, 6.0], [9.0, 4.0, 9.0], [9.0, 9.0, 9.0], [5.0, 9.0, 1.0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 19 / 6),
        ("dapo", 19 / 6),
        ("bnpo", 19 / 6),
        ("sequence_mean", (3 + 4 + 0 + 3) / 4),
        ("grpo", (3 + 4 + 0 + 3) / 4),
        ("sequence_mean_active", (3 + 4 + 3) / 3),
        ("dr_grpo", 19 / (4 * 10)),
    ],
)
def test_aggregation_by_hand(mode: Any, expected: float) -> None:
    loss = aggregate(PER_TOKEN, MASK, mode, max_completion_length=10)
    assert loss.item() == pytest.approx(expected)
    weights = aggregation_weights(MASK, mode, max_completion_length=10)
    assert (weights * PER_TOKEN).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [1, 3]])
def test_micro_batches_add_up_to_the_batch(mode: Any, sizes: list[int]) -> None:
    per_token = PER_TOKEN.clone().requires_grad_()
    counts = BatchCounts.of(MASK)
    whole = aggregate(per_token, MASK, mode, max_completion_length=10)
    (whole_grad,) = torch.autograd.grad(whole, per_token)
    parts = [
        aggregate(x, m, mode, counts=counts, max_completion_length=10)
        for x, m in zip(per_token.split(sizes), MASK.split(sizes), strict=True)
    ]
    for part in parts:
        part.backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item())
    assert per_token.grad is not None
    torch.testing.assert_close(per_token.grad, whole_grad)


def test_bnpo_averages_the_local_means_of_the_processes() -> None:
    def share(rows: slice) -> float:
        x, m = PER_TOKEN[rows], MASK[rows]
        counts = BatchCounts(
            rows=4, active_rows=4, tokens=6, local_tokens=float(m.sum()), processes=2
        )
        return float(aggregate(x, m, "bnpo", counts=counts))

    means = [
        float((PER_TOKEN[r] * MASK[r]).nan_to_num().sum() / MASK[r].sum())
        for r in (slice(0, 2), slice(2, None))
    ]
    shares = [share(slice(0, 2)), share(slice(2, None))]
    assert sum(shares) == pytest.approx(sum(means) / 2)


@pytest.mark.parametrize("topk", [None, 3])
def test_chunks_of_selected_tokens_give_the_loss_and_gradient_of_the_batch(
    topk: int | None,
) -> None:
    student, teacher = randn(4, 3, 9), randn(4, 3, 9, seed=1)
    old = randn(4, 3, seed=2) - 2
    ids = torch.arange(12).reshape(4, 3) % 9

    leaf = student.clone().requires_grad_()
    per_token, metrics = self_distillation_loss(leaf, teacher, topk=topk, completion_ids=ids)
    per_token = per_token * importance_weights(metrics["student_logps"], old, 2.0)
    loss = aggregate(per_token, MASK, "sequence_mean")
    loss.backward()

    chunked = student.clone().requires_grad_()
    select = MASK.bool()
    weights = aggregation_weights(MASK, "sequence_mean", dtype=F64)[select]
    total = 0.0
    for piece in torch.arange(int(select.sum())).split(4):
        part, found = self_distillation_loss(
            chunked[select][piece],
            teacher[select][piece],
            topk=topk,
            completion_ids=ids[select][piece],
        )
        ratio = importance_weights(found["student_logps"], old[select][piece], 2.0)
        (part * ratio * weights[piece]).sum().backward()
        total += (part * ratio * weights[piece]).sum().item()
    assert total == pytest.approx(loss.item())
    torch.testing.assert_close(chunked.grad, leaf.grad)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_masked_tokens_contribute_nothing_even_when_not_a_number(mode: Any) -> None:
    clean = PER_TOKEN.clone().requires_grad_()
    dirty = PER_TOKEN.masked_fill(MASK == 0, math.nan).requires_grad_()
    losses = [aggregate(x, MASK, mode, max_completion_length=10) for x in (clean, dirty)]
    grads = [
        torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (clean, dirty), strict=True)
    ]
    assert losses[0].item() == losses[1].item()
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[1][MASK == 0] == 0).all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_batch_with_nothing_active_is_a_zero_loss_attached_to_the_graph(mode: Any) -> None:
    student = randn(2, 3, 5).requires_grad_()
    per_token, _ = self_distillation_loss(student, randn(2, 3, 5, seed=1))
    loss = aggregate(per_token, torch.zeros(2, 3), mode, max_completion_length=10)
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_aggregation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"'mean'.*token_mean"):
        aggregate(PER_TOKEN, MASK, "mean")  # type: ignore[arg-type]  # the wrong value under test
    with pytest.raises(ConfigError, match="max_completion_length"):
        aggregate(PER_TOKEN, MASK, "dr_grpo")
    with pytest.raises(UsageError, match=r"\[4, 3\].*\[4\]"):
        aggregate(PER_TOKEN, MASK[:, 0], "grpo")


def test_masked_mean() -> None:
    assert masked_mean(PER_TOKEN, MASK).item() == pytest.approx(19 / 6)
    assert masked_mean(PER_TOKEN * math.nan, MASK * 0).item() == 0.0


# --------------------------------------------------------------------------------------- GRPO


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 4.0, 2.0, 1.0, 3.0], dtype=F64)
    ids = ["a", "b", "b", "b", "a", "c"]  # a: 1, 1; b: 0, 4, 2; c: alone
    centred = torch.tensor([0.0, -2.0, 2.0, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards, ids, scale_rewards="none"), centred)
    torch.testing.assert_close(
        group_advantages(rewards, ids), centred / (2.0 + 1e-4)
    )  # std of 0, 4, 2 with n - 1
    torch.testing.assert_close(
        group_advantages(rewards, ids, scale_rewards="batch"), centred / (rewards.std() + 1e-4)
    )
    statistics = reward_statistics(rewards, ids)
    assert statistics == pytest.approx(
        {"reward": 11 / 6, "reward_std": 2 / 3, "frac_reward_zero_std": 2 / 3}
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscored_rows_are_not_rows_with_reward_zero(scale: Any) -> None:
    rewards = torch.tensor([1.0, math.nan, 0.5, 7.0, 0.0, 1.0])
    scored = torch.tensor([True, True, True, False, True, True])
    ids = torch.tensor([3, 3, 3, 3, 8, 8])
    keep = torch.tensor([0, 2, 4, 5])
    advantages = group_advantages(rewards, ids, scale_rewards=scale, scored=scored)
    alone = group_advantages(rewards[keep], ids[keep], scale_rewards=scale)
    torch.testing.assert_close(advantages[keep], alone)
    assert (advantages[[1, 3]] == 0).all()
    assert reward_statistics(rewards, ids, scored=scored) == pytest.approx(
        reward_statistics(rewards[keep], ids[keep])
    )


def test_a_batch_nobody_scored_has_no_advantages() -> None:
    rewards = torch.full((4,), math.nan)
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, [0, 0, 1, 1], scale_rewards=scale).tolist() == [0.0] * 4
    assert all(math.isnan(value) for value in reward_statistics(rewards, [0, 0, 1, 1]).values())


def test_group_advantages_refuse_nonsense() -> None:
    rewards = torch.tensor([1.0, math.inf])
    with pytest.raises(UsageError, match="infinite"):
        group_advantages(rewards, [0, 0])
    group_advantages(rewards, [0, 0], scored=torch.tensor([True, False]))
    with pytest.raises(UsageError, match="one id for each"):
        group_advantages(rewards, [0])
    with pytest.raises(ConfigError, match="'std'"):
        group_advantages(rewards, [0, 0], scale_rewards="std")  # type: ignore[arg-type]  # under test


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.floats(-10, 10, width=32)), min_size=1, max_size=20
    ),
    scale=st.sampled_from(["group", "batch", "none"]),
    offset=st.floats(-5, 5),
)
def test_advantages_sum_to_zero_in_each_group_and_ignore_an_offset(
    rows: list[tuple[int, float]], scale: Any, offset: float
) -> None:
    ids = torch.tensor([row[0] for row in rows])
    rewards = torch.tensor([row[1] for row in rows], dtype=F64)
    advantages = group_advantages(rewards, ids, scale_rewards=scale)
    for group in ids.unique():
        assert abs(advantages[ids == group].sum().item()) < 1e-8
    shifted = group_advantages(rewards + offset, ids, scale_rewards=scale)
    torch.testing.assert_close(shifted, advantages, atol=1e-8, rtol=1e-8)


def pg(
    ratios: list[list[float]], advantages: list[float], mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient in the log-probabilities, and metrics at the given ratios."""
    logps = torch.tensor(ratios, dtype=F64).log().requires_grad_()
    mask = torch.ones_like(logps) if mask is None else mask
    loss, metrics = policy_gradient_loss(
        logps, torch.zeros_like(logps), torch.tensor(advantages, dtype=F64), mask, **options
    )
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    return loss.detach(), grad, metrics


def test_the_clip_takes_the_gradient_only_where_it_should() -> None:
    ratios = [[0.5, 1.0, 1.25, 1.5]]
    loss, grad, metrics = pg(ratios, [2.0], epsilon=0.2, epsilon_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([[-1.0, -2.0, -2.5, -2.56]], dtype=F64))
    torch.testing.assert_close(grad, torch.tensor([[-1.0, -2.0, -2.5, 0.0]], dtype=F64))
    assert metrics["clip_ratio/high"].tolist() == [[0, 0, 0, 1]]
    assert metrics["clip_ratio/low"].sum() == 0

    loss, grad, metrics = pg(ratios, [-2.0], epsilon=0.2, epsilon_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([[1.6, 2.0, 2.5, 3.0]], dtype=F64))
    torch.testing.assert_close(grad, torch.tensor([[0.0, 2.0, 2.5, 3.0]], dtype=F64))
    assert metrics["clip_ratio/low"].tolist() == [[1, 0, 0, 0]]
    assert metrics["clip_ratio/region"].tolist() == [[1, 0, 0, 0]]


def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage_only() -> None:
    loss, grad, _ = pg([[2.0, 10.0]], [-1.0], delta=3.0)
    assert loss[0].tolist() == pytest.approx([2.0, 3.0])
    assert grad[0].tolist() == pytest.approx([2.0, 0.0])
    with_delta, _, _ = pg([[0.1, 1.1, 10.0]], [1.0], delta=3.0)
    without, _, _ = pg([[0.1, 1.1, 10.0]], [1.0])
    torch.testing.assert_close(with_delta, without)


def test_without_old_logps_the_loss_is_reinforce() -> None:
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0], dtype=F64)
    loss, metrics = policy_gradient_loss(logps, None, advantages, torch.ones(2, 2))
    assert loss.tolist() == [[-1.0, -1.0], [2.0, 2.0]]
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert grad.tolist() == [[-1.0, -1.0], [2.0, 2.0]]
    assert metrics["ratio"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert metrics["approx_kl"].abs().max() == 0


def test_sequence_level_ratio_is_the_geometric_mean_over_the_masked_row() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, grad, metrics = pg(
        [[1.2, 0.9, 50.0], [1.0, 1.1, 1.2]],
        [1.0, 1.0],
        mask=mask,
        epsilon=0.5,
        importance_sampling_level="sequence",
    )
    first, second = math.sqrt(1.2 * 0.9), (1.1 * 1.2) ** (1 / 3)
    torch.testing.assert_close(loss, -torch.tensor([[first, first, 0.0], [second] * 3], dtype=F64))
    # Each of n tokens moves each of the row's n losses by ratio / n.
    torch.testing.assert_close(grad, -torch.tensor([[first, first, 0.0], [second] * 3], dtype=F64))
    assert (metrics["ratio"][0] - first).abs().max() < 1e-12


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_gradient_gradcheck(level: Any) -> None:
    logps = (randn(3, 4, scale=0.3) - 1).requires_grad_()
    old, advantages = randn(3, 4, seed=1, scale=0.3) - 1, randn(3, seed=2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient_loss(
            x, old, advantages, mask, delta=3.0, importance_sampling_level=level
        )[0],
        logps,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_cannot_poison_the_policy_gradient(level: Any) -> None:
    mask = torch.tensor([[1, 1, 0]])
    logps = torch.tensor([[-1.0, -2.0, -math.inf]], requires_grad=True)
    old = torch.tensor([[-1.5, -2.0, math.nan]])
    loss, metrics = policy_gradient_loss(
        logps, old, torch.tensor([1.0]), mask, importance_sampling_level=level
    )
    aggregate(loss, mask, "grpo").backward()
    assert loss.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert logps.grad[0, 2] == 0
    assert all(masked_mean(value, mask).isfinite() for value in metrics.values())


def test_a_collapsed_old_probability_does_not_overflow() -> None:
    logps = torch.tensor([[0.0]], requires_grad=True)
    loss, _ = policy_gradient_loss(
        logps, torch.tensor([[-500.0]]), torch.tensor([-1.0]), torch.ones(1, 1)
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": -0.1},
        {"epsilon": 1.0},
        {"epsilon_high": -0.1},
        {"epsilon_high": 0.28, "delta": 1.2},
        {"importance_sampling_level": "word"},
    ],
)
def test_policy_gradient_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(options))):
        pg([[1.0]], [1.0], **options)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 2)), ((6,), (6,))], ids=["different", "one-dimensional"]
)
def test_policy_gradient_refuses_wrong_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(UsageError, match="must both be"):
        policy_gradient_loss(torch.zeros(shapes[0]), None, torch.zeros(2), torch.ones(shapes[1]))


def test_k3_is_an_unbiased_nonnegative_estimate_of_the_kl_to_the_reference() -> None:
    log_p, log_ref = randn(7).log_softmax(-1), randn(7, seed=1).log_softmax(-1)
    estimate = k3_kl(log_p, log_ref)
    assert (estimate >= 0).all()
    kl = (log_p.exp() * (log_p - log_ref)).sum()
    torch.testing.assert_close((log_p.exp() * estimate).sum(), kl)
    assert k3_kl(log_p, log_p).abs().max() == 0


def test_k3_gradient_is_the_policys_alone_and_stays_finite() -> None:
    logps = torch.tensor([-1.0, -200.0, -0.1], requires_grad=True)
    ref = torch.tensor([-2.0, -1.0, -300.0], requires_grad=True)
    value = k3_kl(logps, ref)
    value.sum().backward()
    assert value.isfinite().all()
    assert ref.grad is None
    assert logps.grad is not None
    # d/dlogp (exp(d) - d - 1) = 1 - exp(d), except beyond the cap.
    assert logps.grad.tolist() == pytest.approx([1 - math.exp(-1.0), 0.0, 1.0])


def test_only_the_buffers_promised_are_kept_for_the_backward_pass() -> None:
    n, vocab = 4, 1000
    for topk in (None, 20):
        student = randn(n, vocab, dtype=torch.float32).requires_grad_()
        kept: list[int] = []

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        unpack: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            self_distillation_loss(student, randn(n, vocab, dtype=torch.float32), topk=topk)
        assert sum(kept) <= n * vocab + 10 * n
