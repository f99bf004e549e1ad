"""Which settings do not go together."""

import pytest

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops import trainer_section
from nanogpt_lit.loops.compatibility import CLASHES, check_saves_whole_steps, check_together, keys_of
from nanogpt_lit.loops.trainer_section import strategy_settings

FINE = {
    "trainer.strategy": "DDPStrategy", "trainer.accelerator": "cuda", "trainer.devices": 2,
    "trainer.precision": "16-mixed", "trainer.gradient_clip_val": 1.0, "trainer.enable_checkpointing": None,
    "trainer.strategy.tensor_parallel_size": 1, "trainer.strategy.start_method": "popen", "spike_factor": None,
    "model.compile": False, "model.memory.weights": "device", "model.memory.optimizer_state": "host",
    "model.optim.state_bits": 32, "model.optim.matrices": "adamw",
}  # fmt: skip
CLASHING = [
    ({"model.optim.state_bits": 8}, "model.optim.state_bits=8 does not go with model.memory.optimizer_state=host"),
    (
        {"model.optim.state_bits": 8, "model.memory.optimizer_state": "device", "model.memory.weights": "streamed"},
        "model.memory.weights=streamed",
    ),
    *(
        ({"model.optim.class_path": "torch.optim.SGD", "model.memory.optimizer_state": state,
          "model.memory.weights": weights, "trainer.devices": 1}, "model.optim.class_path=torch.optim.SGD does not go")
        for state, weights in (("host", "device"), ("device", "streamed"))
    ),
    ({"model.optim.class_path": None, "trainer.strategy.offload_optimizer": True}, "DeepSpeedCPUAdam"),
    ({"model.compile": True, "model.memory.weights": "host", "trainer.devices": 1}, "model.compile=true does not go"),
    ({"model.memory.weights": "host"}, "trainer.accelerator=cuda and trainer.devices=2"),
    ({"trainer.strategy": "FSDPStrategy", "trainer.accelerator": "cpu"}, "does not go with trainer.accelerator=cpu"),
    ({"trainer.strategy": "FSDPStrategy"}, "trainer.gradient_clip_val=1.0 does not go with"),
    ({"trainer.strategy": "ModelParallelStrategy"}, "no gradient scaler"),
    ({"trainer.strategy": "DeepSpeedStrategy"}, "=16-mixed does not go with trainer.strategy=DeepSpeedStrategy"),
    ({"trainer.strategy.stage": 0}, "trainer.strategy.stage=0 shares nothing out"),
    ({"trainer.strategy.stage": 3, "model.compile": True}, "model.compile=true does not go with"),
    ({"trainer.strategy": "DeepSpeedStrategy", "trainer.precision": "32-true", "model.memory.optimizer_state": "device",
      "model.optim.class_path": "torch.optim.Adafactor"}, "model.optim.class_path=torch.optim.Adafactor does not go"),
    ({"trainer.strategy.tensor_parallel_size": 2}, "tensor_parallel_size=2 would divide single matrices"),
    ({"trainer.strategy.start_method": "spawn"}, "set trainer.strategy=ddp"),
    ({"spike_factor": 2.0, "trainer.enable_checkpointing": False}, "spike_factor=2.0 does not go with"),
    ({"early_stopping_patience": 3, "trainer.limit_val_batches": 0}, "early_stopping_patience=3 does not go with"),
    ({"spike_factor": 2.0, "trainer.strategy": None}, "set trainer.strategy=auto or ddp"),
    ({"teachers": ["a"], "model.memory.weights": "host", "trainer.devices": 1},
     "does not go with model.memory.weights=host"),
    ({"teachers": ["a"], "trainer.strategy": "ModelParallelStrategy", "trainer.precision": "bf16-mixed",
      "model.memory.optimizer_state": "device"}, "does not go with trainer.strategy=ModelParallelStrategy"),
    *(
        ({"trainer.strategy": "ModelParallelStrategy", "trainer.precision": "bf16-mixed", "trainer.accelerator": "cpu",
          "model.memory.optimizer_state": "device", key: value}, f"{key}={value} does not go with")
        for key, value in (
            ("model.memory.optimizer_state", "host"), ("model.memory.weights", "streamed"),
            ("model.optim.state_bits", 8), ("model.optim.matrices", "muon"),
        )
    ),
]  # fmt: skip


def test_every_clash_of_the_table_is_told_with_its_keys_and_what_works():
    told = []
    for changes, words in CLASHING:
        settings = FINE | changes
        with pytest.raises(UserError) as error:
            check_together(settings)
        assert words in str(error.value)
        assert "; set " in str(error.value)
        told.append(next(clash for clash in CLASHES if clash.holds(settings)))
    assert {id(clash) for clash in told} == {id(clash) for clash in CLASHES}


def test_settings_that_go_together_and_those_that_are_not_known_pass():
    check_together(FINE)
    check_together({})
    check_together({"model.memory.weights": "host", "trainer.accelerator": "cpu", "trainer.devices": 2})


def test_a_strategy_whose_package_is_missing_says_so(monkeypatch):
    trainer = {"strategy": "deepspeed_stage_2", "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    monkeypatch.setattr(trainer_section, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="strategy=deepspeed_stage_2 needs the package deepspeed: pip install"):
        strategy_settings(trainer, "cuda")
    monkeypatch.setattr(trainer_section, "find_spec", lambda name: object())
    check_together(strategy_settings(trainer, "cuda"))


def test_a_short_name_and_a_class_say_the_same_of_a_strategy():
    trainer = {"precision": "16", "gradient_clip_val": 1.0}
    by_name = strategy_settings(trainer | {"strategy": "ddp_fork_find_unused_parameters_true"}, "cuda")
    by_class = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "fork"}}
    assert by_name == strategy_settings(trainer | {"strategy": by_class}, "cuda")
    assert (by_name["trainer.strategy.start_method"], by_name["trainer.precision"]) == ("fork", "16-mixed")
    sizes = {"class_path": "ModelParallelStrategy", "init_args": {"tensor_parallel_size": 2}}
    with pytest.raises(UserError, match="tensor_parallel_size=2 would divide"):
        check_together(strategy_settings(trainer | {"strategy": sizes, "precision": "bf16-mixed"}, "cuda"))
    with pytest.raises(UserError, match="did you mean ddp"):
        strategy_settings(trainer | {"strategy": "dpp"}, "cuda")


def test_nested_settings_get_the_keys_of_the_yaml():
    assert keys_of("model", {"compile": False, "memory": {"weights": "host"}}) == {
        "model.compile": False,
        "model.memory.weights": "host",
    }


def test_a_checkpoint_inside_a_step_is_refused():
    trainer = {"accumulate_grad_batches": 4, "enable_checkpointing": None, "limit_val_batches": None}
    check_saves_whole_steps(trainer | {"val_check_interval": 8})
    check_saves_whole_steps(trainer | {"val_check_interval": 6, "limit_val_batches": 0})
    with pytest.raises(UserError, match="4 or 8 works"):
        check_saves_whole_steps(trainer | {"val_check_interval": 6})
