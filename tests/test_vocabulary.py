"""The chunked loss must be the naive one, in value and gradient, and never hold the logits."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402
from transformers import CohereConfig, Gemma2Config, GraniteConfig  # noqa: E402

from rlrf_trainers.losses import (  # noqa: E402
    Divergence,
    aggregation_weights,
    clipped_surrogate,
    importance_weights,
    rollout_importance_weights,
    selected_logps,
)
from rlrf_trainers.losses.vocabulary import vocabulary_logps, vocabulary_loss  # noqa: E402
from rlrf_trainers.model.head import Head  # noqa: E402
from rlrf_trainers.model.prefix import Layout, completion_hidden, completion_logits  # noqa: E402
from tests import golden_loss  # noqa: E402
from tests.reference_losses import entropy, self_distillation_loss  # noqa: E402
from tests.test_losses import SMALL_GOLDEN  # noqa: E402
from tests.tiny_model import tiny_model  # noqa: E402

N, H, V = 23, 8, 50
CHUNK = 7 * 6 * 4 * V  # bytes: seven rows, so several chunks and an uneven last one


class Case:
    """Random hidden states, head, teacher and weights of one dtype."""

    def __init__(self, dtype, *, bias=True, cap=None, scale=1.0, temperature=1.0, seed=0):
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(H, V, bias=bias).to(dtype)
        self.head = Head(self.linear, scale, cap, temperature)
        self.hidden = (3 * torch.randn(N, H)).to(dtype).requires_grad_()
        self.teacher_hidden = (3 * torch.randn(N, H)).to(dtype)
        self.ids = torch.randint(0, V, (N,))
        self.wide = torch.promote_types(dtype, torch.float32)
        self.a = torch.rand(N).to(self.wide)
        self.b = torch.randn(N).to(self.wide)

    @property
    def parameters(self):
        return [self.hidden, *self.linear.parameters()]

    def student_logits(self):
        u = torch.nn.functional.linear(self.hidden, self.linear.weight, self.linear.bias)
        u = u.to(self.wide) * self.head.scale
        if self.head.cap is not None:
            u = self.head.cap * torch.tanh(u / self.head.cap)
        return u / self.head.temperature

    def teacher_logits(self, rows=slice(None)):
        with torch.no_grad():
            return self.head.logits(self.teacher_hidden[rows])

    def chunked(self, objective, divergence=None):
        teacher = None if divergence is None else lambda rows, _: self.teacher_logits(rows)
        loss, metrics = vocabulary_loss(
            self.hidden, self.head, self.ids, objective, divergence, teacher, chunk_bytes=CHUNK
        )
        wanted = [p for p in self.parameters if p.requires_grad]
        return loss.detach(), torch.autograd.grad(loss, wanted), metrics


def assert_near(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        scale = y.abs().max().clamp(min=1e-30)
        assert ((x - y).abs().max() / scale).item() <= tolerance


DIVERGENCES = [
    Divergence(alpha, topk, tail)
    for alpha in (0.0, 0.5, 1.0)
    for topk, tail in ((None, True), (5, True), (5, False))
] + [Divergence(1.0, None, True, 0.7), Divergence(1.0, 5, True, 0.7)]
# A bf16 gradient of the weight is rounded once by us and per product by autograd.
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_equals_the_naive_loss(divergence, dtype, tolerance):
    case = Case(dtype)

    def objective(tokens, rows):
        ratio = importance_weights(tokens.logps, case.b[rows], clip=2.0)
        return (tokens.divergence * case.a[rows] * ratio + case.b[rows] * tokens.logps).sum()

    loss, grads, metrics = case.chunked(objective, divergence)
    per_token, naive = self_distillation_loss(
        case.student_logits(),
        case.teacher_logits(),
        alpha=divergence.alpha,
        topk=divergence.topk,
        add_tail=divergence.add_tail,
        advantage_clip=divergence.advantage_clip,
        completion_ids=case.ids,
    )
    logps = selected_logps(case.student_logits(), case.ids)
    ratio = importance_weights(logps, case.b, clip=2.0)
    expected = (per_token * case.a * ratio + case.b * logps).sum()
    assert_near([loss], [expected.detach()], tolerance)
    assert_near(grads, torch.autograd.grad(expected, case.parameters), tolerance)
    for name in ("entropy", "teacher_entropy", "teacher_student_kl", "topk_coverage"):
        torch.testing.assert_close(metrics[name], naive[name], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["logps"], naive["student_logps"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        metrics["teacher_logps"], naive["teacher_logps"], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.25},
        {"temperature": 1.7},
        {"cap": 3.0},
        {"cap": 3.0, "scale": 0.5, "temperature": 0.6},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("distils", [True, False])
def test_scaled_and_capped_heads(options, distils):
    case = Case(torch.float64, **options)
    divergence = Divergence(1.0, 5) if distils else None

    def objective(tokens, rows):
        loss = (case.b[rows] * tokens.logps).sum()
        return loss + (case.a[rows] * tokens.divergence).sum() if distils else loss

    loss, grads, _ = case.chunked(objective, divergence)
    expected = (case.b * selected_logps(case.student_logits(), case.ids)).sum()
    if distils:
        per_token, _ = self_distillation_loss(
            case.student_logits(), case.teacher_logits(), alpha=1.0, topk=5
        )
        expected = expected + (case.a * per_token).sum()
    assert_near([loss], [expected.detach()], 1e-12)
    assert_near(grads, torch.autograd.grad(expected, case.parameters), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_policy_gradient_without_a_teacher(dtype, tolerance):
    case = Case(dtype)

    def surrogate(logps, old, advantages):
        return clipped_surrogate(logps - old, advantages, epsilon=0.2, epsilon_high=0.3)[0].sum()

    old = selected_logps(case.student_logits(), case.ids).detach() + 0.3 * case.b
    loss, grads, metrics = case.chunked(
        lambda tokens, rows: surrogate(tokens.logps, old[rows], case.b[rows])
    )
    logits = case.student_logits()
    expected = surrogate(selected_logps(logits, case.ids), old, case.b)
    assert_near([loss], [expected.detach()], tolerance)
    assert_near(grads, torch.autograd.grad(expected, case.parameters), tolerance)
    torch.testing.assert_close(metrics["entropy"], entropy(case.student_logits()))


def test_gradcheck():
    case = Case(torch.float64)

    def loss(hidden, weight, bias):
        case.head = Head(_Fixed(weight, bias), 0.5, 4.0, 1.3)
        return vocabulary_loss(
            hidden,
            case.head,
            case.ids,
            lambda t, rows: (t.divergence * case.a[rows] + t.logps * case.b[rows]).sum(),
            Divergence(1.0, None),
            lambda rows, _: torch.randn(N, V, generator=torch.Generator().manual_seed(3)).double()[
                rows
            ],
            chunk_bytes=CHUNK,
        )[0]

    class _Fixed:
        def __init__(self, weight, bias):
            self.weight, self.bias = weight, bias

    inputs = [x.detach().clone().requires_grad_() for x in case.parameters]
    grads = torch.autograd.grad(loss(*inputs), inputs)
    # torch.autograd.gradcheck asks for the gradient twice, which this loss refuses; so along
    # random directions, by central differences.
    for i, grad in enumerate(grads):
        for _ in range(3):
            direction = torch.randn_like(grad)
            ends = [
                loss(*(x + sign * 1e-6 * direction if j == i else x for j, x in enumerate(inputs)))
                for sign in (1, -1)
            ]
            slope = ((ends[0] - ends[1]) / 2e-6).item()
            assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_a_second_backward_pass_is_refused():
    case = Case(torch.float64)
    loss, _ = vocabulary_loss(
        case.hidden, case.head, case.ids, lambda t, rows: t.logps.sum(), chunk_bytes=CHUNK
    )
    torch.autograd.grad(loss, case.hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, case.hidden)


def test_a_frozen_head_gets_no_gradient_and_no_buffer():
    case = Case(torch.float64)
    with Sizes() as sizes:
        full = case.chunked(lambda t, rows: (t.logps * case.b[rows]).sum())[1]
    assert "aten.addmm_.default" in sizes.called
    case.linear.requires_grad_(False)
    with Sizes() as sizes:
        _, (grad,), _ = case.chunked(lambda t, rows: (t.logps * case.b[rows]).sum())
    torch.testing.assert_close(grad, full[0])
    assert "aten.addmm_.default" not in sizes.called
    assert case.linear.weight.grad is None


class Sizes(TorchDispatchMode):
    """The number of elements of everything any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.called.add(str(function))
        self.seen |= {x.numel() for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("topk", [None, 5])
def test_nothing_of_the_size_of_all_logits_is_ever_made(topk):
    case = Case(torch.float32)
    objective = lambda t, rows: (t.divergence * case.a[rows]).sum()  # noqa: E731
    with Sizes() as sizes:
        case.chunked(objective, Divergence(1.0, topk))
    assert max(sizes.seen - {V * H}) <= 7 * V  # a chunk
    with Sizes() as sizes:
        per_token, _ = self_distillation_loss(case.student_logits(), case.teacher_logits())
        per_token.sum().backward()
    assert max(sizes.seen) >= N * V  # the naive one does: so the check can fail


def test_the_chunk_size_changes_nothing():
    case = Case(torch.float64)
    objective = lambda t, rows: (t.divergence * case.a[rows]).sum()  # noqa: E731

    def run(chunk_bytes):
        loss, _ = vocabulary_loss(
            case.hidden,
            case.head,
            case.ids,
            objective,
            Divergence(0.5, 5),
            lambda rows, _: case.teacher_logits(rows),
            chunk_bytes=chunk_bytes,
        )
        return torch.autograd.grad(loss, case.parameters)

    for other in (1, CHUNK):
        assert_near(run(other), run(1 << 30), 1e-12)


def test_tokens_that_nothing_depends_on_and_no_tokens_at_all():
    case = Case(torch.float64)
    loss, grads, _ = case.chunked(lambda t, rows: torch.zeros(()))
    assert loss == 0
    assert all(not g.any() for g in grads)
    empty = vocabulary_logps(lambda rows: None, torch.zeros(0, dtype=torch.long), V, CHUNK)
    assert empty.shape == (0,)


def test_logps_in_chunks():
    case = Case(torch.float64)
    found = vocabulary_logps(
        lambda rows: case.head.logits(case.hidden.detach()[rows]), case.ids, V, CHUNK
    )
    torch.testing.assert_close(found, selected_logps(case.student_logits(), case.ids).detach())


@pytest.mark.parametrize("case", golden_loss.load_cases(SMALL_GOLDEN), ids=lambda c: c["name"])
def test_the_official_losses_through_chunks(case):
    """The golden cases again, as the trainer computes them: flat, in chunks, weights first."""
    b, t, v = case["shape"]
    config = case["config"]

    def array(name, *shape):
        return torch.tensor(case[name], dtype=torch.float64).reshape(shape)

    student = array("student_logits", b * t, v).requires_grad_()
    teacher = array("teacher_logits", b * t, v)
    old = array("old_logps", b * t)
    mask = array("completion_mask", b, t) * array("sample_mask", b, 1)
    weights = aggregation_weights(mask, "token_mean", dtype=torch.float64).flatten()
    if case["rollout_logps"] is not None and config["rollout_is"] is not None:
        weights = weights * rollout_importance_weights(
            old, array("rollout_logps", b * t), config["rollout_is"]
        )
    sampled_only = not config["full_logit_distillation"]
    ids = torch.tensor(case["completion_ids"]).flatten()
    advantages = selected_logps(teacher, ids) - selected_logps(student.detach(), ids)

    def objective(tokens, rows):
        per_token = -advantages[rows] * tokens.logps if sampled_only else tokens.divergence
        ratio = importance_weights(tokens.logps, old[rows], config["is_clip"])
        return (per_token * ratio * weights[rows]).sum()

    divergence = Divergence(
        config["alpha"], config["distillation_topk"], config["distillation_add_tail"]
    )
    loss, _ = vocabulary_loss(
        student,
        Head(None),
        ids,
        objective,
        None if sampled_only else divergence,
        lambda rows, _: teacher[rows].clone(),
        chunk_bytes=3 * 6 * 4 * v,
    )
    (grad,) = torch.autograd.grad(loss, student)
    assert abs(loss.item() - case["expected_loss"]) <= 1e-6
    expected = torch.tensor(case["expected_grad_student_logits"], dtype=torch.float64)
    assert (grad - expected.reshape(grad.shape)).abs().max() <= 1e-6


# --- heads of real architectures --------------------------------------------------------------

SMALL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": None,
    "gemma2 (cap)": lambda: Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "cohere (scale)": lambda: CohereConfig(**{k: SMALL[k] for k in list(SMALL)[:6]}),
    "granite (scaling)": lambda: GraniteConfig(
        **{k: SMALL[k] for k in list(SMALL)[:6]}, logits_scaling=8.0
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_is_the_models(name):
    make = CONFIGS[name]
    model = tiny_model(config=make() if make else None)
    head = Head.of(model, temperature=0.5)
    assert head.module is not None
    layout = Layout([[5, 6, 7], [8]])
    prompts = [[1, 2, 3], [4]]
    with torch.no_grad():
        found = head.logits(completion_hidden(model, prompts, layout))
        expected = completion_logits(model, prompts, layout, temperature=0.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_head_is_noticed_and_its_logits_are_used():
    model = tiny_model()
    lm_head = model.lm_head

    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    model.lm_head = Odd(32, 272, bias=False)
    model.lm_head.weight = lm_head.weight
    assert Head.of(model).module is None
    model.lm_head = lm_head
    lm_head.register_forward_hook(lambda *a: a[2] + 1.0)  # a plain layer that is not the whole map
    head = Head.of(model, temperature=2.0)
    assert head.module is None
    layout = Layout([[5, 6, 7]])
    logits = completion_hidden(model, [[1, 2]], layout, logits=True)
    ids = torch.tensor([5, 6, 7])
    loss, _ = vocabulary_loss(logits, head, ids, lambda t, rows: t.logps.sum(), chunk_bytes=1)
    expected = selected_logps(completion_logits(model, [[1, 2]], layout, 2.0), ids).sum()
    torch.testing.assert_close(loss, expected)
    pairs = itertools.pairwise(
        [torch.autograd.grad(x, model.model.norm.weight)[0] for x in (loss, expected)]
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
