"""A run's model as a plain folder: merged or not, from the end or from a checkpoint."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from rlrf import UsageError, make_trainer  # noqa: E402
from rlrf._files import Claim, InUse  # noqa: E402
from rlrf_trainers.commands.export import export_model  # noqa: E402
from rlrf_trainers.commands.models import app  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from tests.resume_driver import CountA  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402

CONFIG = {
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "eval_tasks": 2,
    "eval_steps": 1,
    "learning_rate": 1e-1,
    "save_steps": 1,
    "probe_tasks": 0,
}
IDS = torch.tensor([[1, 2, 3, 4]])


def trained(tmp_path, *, model=None, **config):
    folder = save_tiny(tmp_path / "base")
    trainer = make_trainer(
        "sdpo",
        model=model or str(folder),
        env=CountA(),
        config={**CONFIG, **config},
        run_dir=tmp_path / "run",
    )
    trainer.train()
    return trainer.learner.model


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize("lora_r", [0, 2])
def test_the_exported_model_is_the_trained_one(tmp_path, lora_r):
    model = trained(tmp_path, lora_r=lora_r)
    with torch.no_grad():
        expected = model(IDS).logits
    out = export_model(tmp_path / "run", tmp_path / "out")
    torch.testing.assert_close(logits(out), expected, atol=1e-4, rtol=1e-4)
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template
    first = logits(export_model(tmp_path / "run", tmp_path / "first", checkpoint="1"))
    second = logits(export_model(tmp_path / "run", tmp_path / "second", checkpoint="2"))
    torch.testing.assert_close(second, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, second, atol=1e-4)
    assert logits(export_model(tmp_path / "run", tmp_path / "best", checkpoint="best")).shape
    (tmp_path / "plain").touch()  # as the umask says
    files = [p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "base" not in p.parents]
    assert len({p.stat().st_mode for p in files}) == 1


def test_an_adapter_can_stay_one(tmp_path):
    trained(tmp_path, lora_r=2)
    out = export_model(tmp_path / "run", tmp_path / "out", checkpoint="2", merge=False)
    assert (out / "adapter_config.json").exists()
    assert not (out / "model.safetensors").exists()


def test_all_weights_are_no_adapter(tmp_path):
    trained(tmp_path)
    for checkpoint in ("final", "2"):
        with pytest.raises(UsageError, match="no adapter to export; leave out --adapter"):
            export_model(tmp_path / "run", tmp_path / "out", checkpoint=checkpoint, merge=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_given_by_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    trained(tmp_path, model="base", lora_r=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert logits(export_model(tmp_path / "run", tmp_path / "merged")).shape
    assert logits(export_model(tmp_path / "run", tmp_path / "step", checkpoint="1")).shape


def test_the_command(tmp_path):
    trained(tmp_path)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    done = CliRunner().invoke(app, ["export", run, out])
    assert done.exit_code == 0, done.output
    assert out in done.output.replace("\n", "")
    with pytest.raises(UsageError, match="there already"):
        export_model(run, out)
    with pytest.raises(UsageError, match="there are step 1, step 2, best"):
        export_model(run, tmp_path / "new", checkpoint="7")
    with pytest.raises(UsageError, match="no run"):
        export_model(tmp_path / "base", tmp_path / "new")


def test_a_model_from_memory_cannot_be_loaded_again(tmp_path):
    trained(tmp_path, model=HFPolicy(tiny_model(), tiny_tokenizer()), lora_r=2)
    with pytest.raises(UsageError, match="in memory"):
        export_model(tmp_path / "run", tmp_path / "out")


@pytest.mark.slow
def test_a_lora_run_can_be_trained_on(tmp_path):
    trained(tmp_path, lora_r=2)
    after = {}
    for name, config in {"more": {}, "same_rank": {"lora_r": 2}}.items():
        trainer = make_trainer(
            "sdpo",
            model=str(tmp_path / "run" / "model"),
            env=CountA(),
            config={**CONFIG, **config},
            run_dir=tmp_path / name,
        )
        start = {n: p.clone() for n, p in trainer.learner.optimizer.masters.items()}
        assert start
        assert all("lora" in n for n in start)  # the adapter, and nothing else
        trainer.train()
        model = trainer.learner.model
        with torch.no_grad():
            after[name] = model(IDS).logits
        whole = logits(export_model(tmp_path / name, tmp_path / f"{name}-out"))
        torch.testing.assert_close(whole, after[name], atol=1e-4, rtol=1e-4)
        step = logits(export_model(tmp_path / name, tmp_path / f"{name}-2", checkpoint="2"))
        torch.testing.assert_close(step, after[name], atol=1e-4, rtol=1e-4)
        # What it began with is the trained adapter, not a new one.
        assert any(bool(p.abs().sum()) for n, p in start.items() if "lora_B" in n)
    torch.testing.assert_close(after["more"], after["same_rank"])
    for more in ({"lora_r": 3}, {"lora_alpha": 7}, {"lora_target_modules": ["q_proj"]}):
        with pytest.raises(UsageError, match=f"{next(iter(more))} is .* has an adapter already"):
            make_trainer(
                "sdpo",
                model=str(tmp_path / "run" / "model"),
                env=CountA(),
                config={**CONFIG, **more},
            )


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize(
    ("change", "name"), [({"num_hidden_layers": 3}, "layers.2"), ({"intermediate_size": 16}, "mlp")]
)
def test_a_checkpoint_does_not_go_onto_another_model(change, name, lora_r, tmp_path):
    trained(tmp_path, lora_r=lora_r)
    shutil.rmtree(tmp_path / "base")
    save_tiny(tmp_path / "base", **change)
    with pytest.raises(UsageError, match=f"not the one the run began with: .*{name}"):
        export_model(tmp_path / "run", tmp_path / "out", checkpoint="2")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_model_is_gone_says_so(tmp_path):
    trained(tmp_path, lora_r=2)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"holds an adapter of the model .*base"):
        HFPolicy(tmp_path / "run" / "model")


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path):
    trained(tmp_path)
    other = Claim(tmp_path / ".out.lock", "it")
    with pytest.raises(InUse, match="out' is in use"):
        export_model(tmp_path / "run", tmp_path / "out")
    other.close()
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export_model(tmp_path / "run", tmp_path / "file" / "out")
