"""Two processes on the CPU do what one does on the same batch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import torch.distributed as dist  # noqa: E402

from rlrf import Prompt, SamplingParams, UsageError, user  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model import distributed as d  # noqa: E402
from tests.tiny_model import tiny_model, tiny_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft on transformers 5.23
]

LIMIT_S = 60  # of a rank's work, and of its wait for the other
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])


# --- two processes --------------------------------------------------------------------------


def child(rank, port, function, kwargs, timeout_s, pipe):
    """One rank, started as torchrun starts one: its agent holds the store."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    try:
        answer = ("returned", function(d.World.start(timeout_s), **kwargs))
    except BaseException as error:
        traceback.print_exc()
        answer = ("raised", f"{type(error).__name__}: {error}")
    pipe.send_bytes(pickle.dumps(answer))


def outcomes(function, timeout_s=LIMIT_S, **kwargs):
    """What each of two ranks returned or raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    try:
        for rank in range(2):
            ours, theirs = FORKSERVER.Pipe(duplex=False)
            process = FORKSERVER.Process(
                target=child,
                args=(rank, store.port, function, kwargs, timeout_s, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        answers = []
        for process, ours in ranks:
            try:
                assert ours.poll(LIMIT_S), f"{process.name} did not answer in {LIMIT_S} s"
                answers.append(pickle.loads(ours.recv_bytes()))
            except EOFError:
                answers.append(("died", None))
        for process, _ in ranks:
            process.join(LIMIT_S)
            assert not process.is_alive(), f"{process.name} did not end"
        return answers
    finally:
        for process, ours in ranks:
            process.kill()
            process.join()
            ours.close()


def both(function, **kwargs):
    """What each of two ranks returned."""
    answers = outcomes(function, **kwargs)
    assert [a[0] for a in answers] == ["returned"] * 2, answers
    return [a[1] for a in answers]


ALONE = d.World(0, 1, torch.device("cpu"))


# --- training -------------------------------------------------------------------------------


def prepared(world, fsdp, *, dtype=torch.float64, lora=False, checkpointing=False, **overrides):
    """A model of rank 0's weights, an adapter in it or not, sharded or not."""
    model = tiny_model(world.rank, **overrides).to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(world.rank)
        adapter = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, adapter)
    if checkpointing:
        # Renamed in transformers 5.23.
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)()
    model.train(checkpointing)
    d.sync_weights(model)
    if fsdp:
        d.shard(model)
        assert d.is_sharded(model) == (world.size > 1)
    return model


class HeadLoss(torch.autograd.Function):
    """Cross-entropy whose gradient in head and hidden states is made by hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        assert type(weight) in (torch.Tensor, torch.nn.Parameter)
        log_p = (hidden @ weight.T).log_softmax(-1)
        grad = log_p.exp() - targets
        ctx.grads = grad @ weight, grad.T @ hidden if ctx.needs_input_grad[1] else None
        return -(targets * log_p).sum()

    @staticmethod
    def backward(ctx, upstream):
        return (*(None if g is None else g * upstream for g in ctx.grads), None)


def hidden_states(model, ids, share):
    """``[T - 1, H]``; in two forwards joined by a cache if ``share``."""
    ids = torch.tensor([ids[:-1]])
    if not share:
        return d.decoder_forward(model, input_ids=ids, use_cache=False)[0]
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    first = d.decoder_forward(model, input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
    cut = ids[:, 3:]
    rest = d.decoder_forward(model, input_ids=cut, past_key_values=cache, use_cache=True)
    return torch.cat([first, rest], 1)[0]


def idle(model):
    """Zero, at the price of one forward of one token: what a rank runs while others have work."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    hidden = d.decoder_forward(model, input_ids=ids, use_cache=False)
    return 0 * (hidden.sum() + head(model)[0].sum())


def head(model):
    return d.base_model(model).get_output_embeddings().weight


def train(world, fsdp, *, share=False, steps=3, **options):
    """Steps of distillation from an EMA teacher; what there is to compare, on rank 0."""
    model = prepared(world, fsdp, **options)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters.items()}
    masters = {n: p.detach().to(wide[n]).requires_grad_() for n, p in parameters.items()}
    teacher = {n: m.detach().clone() for n, m in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2)
    seen = {"norms": [], "losses": []}
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randint(272, (n,), generator=generator).tolist() for n in (9, 5, 7, 6, 12)]
        mine = batch[world.rank :: world.size]
        (tokens,) = world.sum([sum(len(ids) - 1 for ids in mine)])
        losses = []
        for micro_batch in range(world.max(len(mine))):
            if micro_batch >= len(mine):  # the others have one more
                with torch.no_grad(), d.swapped(model, teacher):
                    for _ in range(1 + share):
                        idle(model)
                sum(idle(model) for _ in range(1 + share)).backward()
                continue
            ids = mine[micro_batch]
            share_this = share and len(ids) % 3  # else one forward of its own, and an idle one
            with torch.no_grad(), d.swapped(model, teacher):
                soft = (hidden_states(model, ids, share_this) @ head(model).T).softmax(-1)
                if share and not share_this:
                    idle(model)
            hard = torch.nn.functional.one_hot(torch.tensor(ids[1:]), soft.shape[-1])
            hidden = hidden_states(model, ids, share_this)
            targets = ((soft + hard) / 2).to(hidden.dtype)
            loss = HeadLoss.apply(hidden, head(model), targets) / tokens
            if share and not share_this:
                loss = loss + idle(model)
            loss.backward()
            losses.append(loss.item())
        d.sum_gradients(parameters.values())
        seen["losses"].append(world.sum([sum(losses)])[0])
        seen["norms"].append(d.grad_norm(parameters.values()))
        if step == 0:
            grads = [(n, p.grad) for n, p in parameters.items() if p.grad is not None]
            seen["gradients"] = d.full_state(grads)
        for name, parameter in parameters.items():
            masters[name].grad = parameter.grad.to(wide[name]).mul_(1 / seen["norms"][-1])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
                teacher[name].lerp_(masters[name].detach(), 0.3)
                parameter.grad = None
    seen["weights"] = d.full_state(model.named_parameters())
    seen["teacher"] = d.full_state(teacher.items())
    seen["moments"] = d.full_state((n, optimizer.state[m]["exp_avg"]) for n, m in masters.items())
    return seen


def close(found, expected, tolerance):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], tolerance)
    else:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"lora": True},
        {"share": True},
        {"share": True, "lora": True},
        {"checkpointing": True},
        {"checkpointing": True, "lora": True},
        {"dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
def test_two_ranks_train_as_one(fsdp, options):
    expected = train(ALONE, fsdp, **options)
    main, other = both(train, fsdp=fsdp, **options)
    assert other["norms"] == main["norms"]
    assert not other["weights"]
    double = options.get("dtype") is None
    close(main, expected, 1e-10 if double else 1e-4)


def first_gradients(world, fsdp, **options):
    model_seen = train(world, fsdp, steps=1, **options)
    return {k: model_seen[k] for k in ("losses", "norms", "gradients")}


@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
@pytest.mark.parametrize("lora", [False, True])
def test_half_precision(fsdp, lora):
    """Frozen weights in bf16 with an fp32 adapter; or all in bf16, summed in fp32."""
    options = {"dtype": torch.bfloat16, "lora": lora}
    expected = first_gradients(ALONE, fsdp, **options)
    main, _ = both(first_gradients, fsdp=fsdp, **options)
    dtype = torch.float32 if lora else torch.bfloat16
    assert {g.dtype for g in main["gradients"].values()} == {dtype}
    for name, gradient in expected["gradients"].items():
        print(name, (main["gradients"][name] - gradient).norm() / gradient.norm())
        assert (main["gradients"][name] - gradient).norm() < 0.02 * gradient.norm(), name


def partial_gradients(world):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(4)]
    parameters[2] = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    parameters[0].grad = torch.arange(6.0).view(3, 2).T  # not contiguous
    if world.rank == 1:
        parameters[1].grad = torch.ones(2, 3)
        parameters[2].grad = torch.ones(3, dtype=torch.bfloat16)
    d.BUCKET = 4
    d.sum_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def test_gradients_that_only_some_ranks_have():
    expected = [[[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]], [[1.0] * 3] * 2, [1.0] * 3, None]
    assert both(partial_gradients) == [expected] * 2


# --- sampling -------------------------------------------------------------------------------


def sampled(policy, prompts):
    params = SamplingParams(max_tokens=12, seed=1)
    return [c.token_ids for c in policy.generate([Prompt((user(p),)) for p in prompts], params)]


def sample(world, prompts, lora):
    """Different prompts and lengths on each rank, before and after a step of training."""
    model = prepared(world, True, dtype=torch.float32, lora=lora)
    policy = HFPolicy(model, tiny_tokenizer())
    replies = []
    for _ in range(2):
        with d.whole(model), d.whole(model):
            replies.append([sampled(policy, p) for p in prompts[world.rank :: world.size]])
            score = policy.score([[1, 2]], [[3] * (4 + world.rank)])[0].logprobs[:4]
        d.decoder_forward(model, input_ids=torch.tensor([[1, 2, 3]])).sum().backward()
        d.sum_gradients(model.parameters())
        norm = d.grad_norm(model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad / norm)
                    p.grad = None
    return replies, score


@pytest.mark.parametrize("lora", [False, True])
def test_ranks_sample_each_at_its_own_pace(lora):
    prompts = [["Hi"], ["Name a river.", "Why?", "Hi"], [], ["One"]]
    expected, score = sample(ALONE, prompts, lora)
    (main, main_score), (other, _) = both(sample, prompts=prompts, lora=lora)
    for step in range(2):
        assert main[step] == expected[step][0::2]
        assert other[step] == expected[step][1::2]
    assert expected[0] != expected[1]
    assert main_score == pytest.approx(score, abs=1e-5)


# --- state ----------------------------------------------------------------------------------


def save(world, folder, lora, options):
    model = prepared(world, True, dtype=torch.float32, lora=lora, **options)
    state = d.full_state(model.named_parameters())
    if world.is_main:
        model.save_pretrained(folder, state_dict=state)
    return state


@pytest.mark.parametrize(
    ("lora", "options"), [(False, {}), (False, {"tie_word_embeddings": False}), (True, {})]
)
def test_a_sharded_model_is_saved_whole(tmp_path, lora, options):
    expected = save(ALONE, tmp_path / "one", lora, options)
    found, _ = both(save, folder=tmp_path / "two", lora=lora, options=options)
    close(found, expected, 0)
    for one in (tmp_path / "one").iterdir():
        if one.suffix == ".safetensors":
            assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes()
    assert {f.name for f in (tmp_path / "one").iterdir()} == {
        f.name for f in (tmp_path / "two").iterdir()
    }


def load(world, state):
    model = prepared(world, True, vocab_size=273)  # which two ranks cannot share evenly
    with pytest.raises(UsageError, match=r"1 of 26 tensors .* 'model\.norm\.weight'"):
        d.load_full(model.named_parameters(), {**state, "model.norm.weight": torch.zeros(3)})
    d.load_full(model.named_parameters(), state if world.is_main else {})
    buffer = torch.zeros(2)
    d.load_full([("b", buffer)], {"b": torch.ones(2)} if world.is_main else {})
    assert buffer.tolist() == [1, 1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 272, 3]])).logits
    head = d.gathered(model.get_input_embeddings().weight)  # as a teacher's
    return d.full_state(model.named_parameters()), logits, head


def test_a_whole_state_is_loaded_into_shards():
    other = tiny_model(7, vocab_size=273).double()
    state = {n: p.detach().clone() for n, p in other.named_parameters()}
    expected = load(ALONE, state)
    for rank, (found, logits, head) in enumerate(both(load, state=state)):
        close(found, expected[0] if rank == 0 else {}, 0)
        close(logits, expected[1], 1e-10)
        assert torch.equal(head, state["model.embed_tokens.weight"])


def test_trainable_weights_of_several_dtypes_are_refused():
    for answer in outcomes(mixed_dtypes):
        assert answer[0] == "raised"
        assert "trainable parameters of one dtype" in answer[1]


def mixed_dtypes(world):
    model = tiny_model()
    model.model.layers[0].to(torch.bfloat16)
    d.shard(model)


# --- the world ------------------------------------------------------------------------------


def talk(world):
    return (
        world.gather({"rank": world.rank}),
        world.broadcast(f"from {world.rank}"),
        world.sum([0.1 * (world.rank + 1), 1e100 * (-1) ** world.rank]),
        world.max(5 + world.rank),
        world.is_main,
        world.close(),
    )


def test_ranks_talk():
    main, other = both(talk)
    assert main == ([{"rank": 0}, {"rank": 1}], "from 0", [0.1 + 0.2, 0.0], 6, True, None)
    assert other == (*main[:4], False, None)
    assert talk(ALONE) == ([{"rank": 0}], "from 0", [0.1, 1e100], 5, True, None)


def one_raises(world):
    if world.rank == 1:
        raise KeyError("rank 1 has a problem")
    world.barrier()


def test_when_one_rank_fails_the_others_fail():
    waiting, failed = outcomes(one_raises)
    assert failed == ("raised", "KeyError: 'rank 1 has a problem'")
    assert waiting[0] == "raised"


def one_is_stuck(world):
    from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

    world.barrier()
    if world.rank == 1:
        _get_default_store().wait(["the other gave up"])
        return "went on"
    _set_pg_timeout(d.timedelta(milliseconds=200))
    try:
        world.barrier()
    finally:
        _get_default_store().set("the other gave up", "")
    return "met"


def test_a_rank_does_not_wait_for_ever():
    waiting, stuck = outcomes(one_is_stuck)
    assert waiting[0] == "raised"
    assert "imed out" in waiting[1]
    assert stuck == ("returned", "went on")
