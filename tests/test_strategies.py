"""The table between Lightning's Trainer and accelerate's file, held against both as they are installed."""

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.commands.to_fsdp2 import to_fsdp2_command, to_fsdp2_command_parser
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    PrecisionType,
    write_basic_config,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry

from nanogpt_lit.__main__ import main
from nanogpt_lit.accelerate_config.accelerate_file import (
    DISTRIBUTED_TYPES,
    ROW_OF,
    TABLE,
    read_accelerate_file,
)
from nanogpt_lit.accelerate_config.from_accelerate import to_trainer
from nanogpt_lit.accelerate_config.into_accelerate import into_accelerate
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.networks import section_of
from nanogpt_lit.loops.compatibility import check_together
from nanogpt_lit.loops.trainer_section import SHORT_NAMES, STRATEGIES
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.runtime.precision import OF_ACCELERATE

THREE_NODES = {
    "distributed_type": "MULTI_GPU",
    "num_processes": 6,
    "num_machines": 3,
    "main_process_ip": "node0",
    "main_process_port": 29501,
}
ONE = {"distributed_type": "NO", "num_processes": 1}
RTX2050 = Path(__file__).parents[1] / "configs" / "rtx2050.yaml"
TWO_CARDS = {"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "fp16"}
FSDP2 = {**TWO_CARDS, "distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config.fsdp_version": 2}
DEEPSPEED = {**TWO_CARDS, "distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}


def write(folder, values):
    """An accelerate file from `section.key` values."""
    content = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content.setdefault(section, {}) if section else content)[name] = value
    path = folder / "default_config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def read(folder, **values):
    return read_accelerate_file(write(folder, values))


# The table names keys that both frameworks have.


def test_the_keys_of_the_table_are_accelerates_and_the_trainers():
    file = {field.name for field in dataclasses.fields(ClusterConfig)}
    arguments = {action.dest for action in launch_command_parser()._actions}
    for key in ROW_OF:
        section, _, name = key.rpartition(".")
        assert (section in file and name in arguments) if section else name in file, key
    rows = {row.lightning.split(".")[1] for row in TABLE if (row.lightning or "").startswith("trainer.")}
    assert rows <= set(inspect.signature(Trainer.__init__).parameters)


def test_every_key_without_a_counterpart_says_what_to_do():
    assert [row for row in TABLE if row.lightning is None and not row.instead] == []


def test_the_short_names_are_lightnings():
    for name, (strategy, arguments) in SHORT_NAMES.items():
        assert arguments == StrategyRegistry[name]["init_params"]
        assert StrategyRegistry[name]["strategy"].__name__ == strategy


def test_the_classes_and_their_arguments_are_lightnings():
    import lightning.pytorch.strategies as installed

    classes = {name: getattr(installed, name) for name in STRATEGIES}
    arguments = {name for cls in classes.values() for name in inspect.signature(cls).parameters}
    named = {row.lightning.rpartition(".")[2] for row in TABLE if ".init_args." in (row.lightning or "")}
    assert named <= arguments


def test_every_distributed_type_and_precision_is_known_or_refused(tmp_path):
    known = {name for names in DISTRIBUTED_TYPES.values() for name in names}
    for kind in DistributedType:
        if kind.value not in known:
            with pytest.raises(ValueError, match=f"distributed_type={kind.value} is no strategy of Lightning"):
                read(tmp_path, distributed_type=kind.value)
    for precision in set(PrecisionType.list()) - set(OF_ACCELERATE):
        with pytest.raises(UserError, match=f"mixed_precision={precision} is not known"):
            to_trainer(read(tmp_path, **TWO_CARDS | {"mixed_precision": precision}))


# There and back: every key with a counterpart keeps its value, every other one is named.

ROUND_TRIPS = [
    *((ONE, "mixed_precision", value) for value in ("no", "fp16", "bf16")),
    (ONE, "use_cpu", True),
    (ONE, "use_cpu", False),
    (ONE, "gpu_ids", "3"),
    (ONE, "dynamo_config.dynamo_backend", "INDUCTOR"),
    ({"num_processes": 1}, "distributed_type", "NO"),
    ({"num_processes": 2}, "distributed_type", "MULTI_GPU"),
    ({"num_processes": 2, "use_cpu": True}, "distributed_type", "MULTI_GPU"),
    ({**FSDP2, "use_cpu": True}, "distributed_type", "FSDP"),
    ({"num_processes": 2}, "distributed_type", "DEEPSPEED"),
    ({**DEEPSPEED, "use_cpu": True}, "distributed_type", "DEEPSPEED"),
    ({"distributed_type": "MULTI_GPU"}, "num_processes", 8),
    (TWO_CARDS, "gpu_ids", "0,2"),
    *(
        (THREE_NODES, key, value)
        for key, value in (
            ("num_machines", 2), ("machine_rank", 1), ("main_process_ip", "10.1.1.1"), ("main_process_port", 12345),
        )
    ),
    (FSDP2, "fsdp_config.fsdp_version", 2),
    (DEEPSPEED, "deepspeed_config.deepspeed_config_file", "ds.json"),
    *((DEEPSPEED, "deepspeed_config.zero_stage", stage) for stage in (1, 2, 3)),
    *(
        ({**DEEPSPEED, "deepspeed_config.zero_stage": 3}, f"deepspeed_config.offload_{what}_device", device)
        for what in ("optimizer", "param") for device in ("none", "cpu", "nvme")
    ),
    *(
        ({**DEEPSPEED, "deepspeed_config.zero_stage": 3, f"deepspeed_config.offload_{what}_device": "nvme"},
         f"deepspeed_config.offload_{what}_nvme_path", "/disk")
        for what in ("optimizer", "param")
    ),
    (DEEPSPEED, "deepspeed_config.gradient_accumulation_steps", 4),
    (DEEPSPEED, "deepspeed_config.gradient_clipping", 0.5),
]  # fmt: skip
OTHER_WORDS = {
    "parallelism_config.parallelism_config_dp_shard_size": "the number of processes",
}


@pytest.fixture(scope="module")
def defaults():
    """The trainer section of fit, as plain data."""
    cli = SettingsCLI(args=[])
    return yaml.safe_load(cli.parser.dump(cli.config))["trainer"]


def there_and_back(folder, defaults, values):
    """The flat values of the file that is made from the trainer section that is made from a file."""
    translation = to_trainer(read(folder, **values))
    trainer = translation.content["trainer"]
    words = " ".join(translation.remarks).split()
    environ = dict(word.split("=") for word in words if word.startswith(("NODE_RANK=", "MASTER_")))
    compiles = translation.content.get("model", {}).get("compile", False)
    back = into_accelerate({**defaults, **trainer}, trainer, compiles, environ).content
    return read_accelerate_file(write(folder, back))


def test_a_key_with_a_counterpart_comes_back_with_its_value(defaults, tmp_path):
    for base, key, value in ROUND_TRIPS:
        assert there_and_back(tmp_path, defaults, {**base, key: value})[key] == value, (key, value)


def test_the_round_trips_leave_out_no_key_that_has_a_counterpart():
    made = {key for _, key, _ in ROUND_TRIPS} | set(OTHER_WORDS)
    assert made == {row.accelerate for row in TABLE if row.lightning is not None}


BASE_OF = {
    "fsdp_config": FSDP2, "parallelism_config": FSDP2, "rdzv_backend": THREE_NODES, "same_network": THREE_NODES,
}  # fmt: skip


def test_a_key_without_a_counterpart_is_named_or_refused_and_its_default_is_neither(tmp_path):
    for row in (row for row in TABLE if row.lightning is None):
        key, base = row.accelerate, BASE_OF.get(row.accelerate.partition(".")[0], TWO_CARDS)
        other = {bool: not row.default, int: 7}.get(type(row.default), "something")
        if row.refused:
            with pytest.raises(UserError, match=rf"{key}={other} has no"):
                to_trainer(read(tmp_path, **{**base, key: other}))
        else:
            remarks = to_trainer(read(tmp_path, **{**base, key: other})).remarks
            assert f"{key}={other}: {row.instead.format(value=other)}" in remarks
        remarks = to_trainer(read(tmp_path, **{**base, key: row.default})).remarks
        assert [line for line in remarks if line.startswith(key)] == []


@pytest.mark.parametrize(
    ("values", "remark"),
    [
        ({"enable_cpu_affinity": True}, "enable_cpu_affinity: Lightning's Trainer has no such key"),
        ({"mpirun_config.mpirun_hostfile": "a"}, "mpirun_config: Lightning's Trainer has no such key"),
        ({"tpu_vm": ["a", "b"]}, "tpu_vm: Lightning's Trainer has no such key"),
        ({"num_proceses": 4}, "num_proceses: did you mean num_processes?"),
        ({"dynamo_config.dynamo_mode": "max-autotune"}, "dynamo_config.dynamo_mode: Lightning's Trainer has no"),
    ],
)
def test_a_key_that_the_table_does_not_have_is_listed_without_a_counterpart(values, remark, tmp_path):
    remarks = to_trainer(read(tmp_path, **TWO_CARDS | values)).remarks
    assert [line for line in remarks if line.startswith(remark)] != []


def test_what_accelerate_itself_writes_has_no_remark_but_of_the_script(tmp_path):
    path = tmp_path / "default_config.yaml"
    write_basic_config(mixed_precision="no", save_location=str(path))
    (remark,) = to_trainer(read_accelerate_file(path)).remarks
    assert "accelerate keeps both in your script" in remark


@pytest.mark.parametrize(("strategy", "trains"), [("ddp", "trains alone"), ("ModelParallelStrategy", "trains DDP")])
def test_a_script_of_the_users_is_told_what_accelerate_does_on_cpus(strategy, trains, defaults):
    changes = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    remarks = into_accelerate({**defaults, **changes}, changes, False, {}).remarks
    assert [line for line in remarks if line.startswith("use_cpu") and trains in line] != []


@pytest.mark.parametrize("network", ["gpt2", "llama"])
def test_accelerate_finds_the_layers_that_the_file_names(network, defaults):
    changes = {"devices": 2, "strategy": "ModelParallelStrategy"}
    section = into_accelerate({**defaults, **changes}, changes, False, {}, network).content["fsdp_config"]
    shape = {"vocab_size": 9, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}
    module = LitNanoGPT(network=network, **{section_of({"network": network}): shape})
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=section["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=[section["fsdp_transformer_layer_cls_to_wrap"]],
    )
    plugin.set_auto_wrap_policy(module)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, module)
    assert [part for part in module.modules() if wraps(part)] == list(module.gpt.blocks)


def test_a_deepspeed_that_offloads_is_told_of_the_optimizer_that_it_takes(defaults, tmp_path):
    values = {**DEEPSPEED, "deepspeed_config.zero_stage": 2, "deepspeed_config.offload_optimizer_device": "cpu"}
    (option,) = re.findall(r"--model\.optim\.class_path=(\S+)", " ".join(to_trainer(read(tmp_path, **values)).remarks))
    offloads = {"trainer.strategy": "DeepSpeedStrategy", "trainer.strategy.offload_optimizer": True}
    with pytest.raises(UserError, match=option):
        check_together({**offloads, "model.optim.class_path": None})
    check_together({**offloads, "model.optim.class_path": option})
    changes = {"devices": 2, "strategy": "deepspeed_stage_2_offload"}
    remarks = into_accelerate({**defaults, **changes}, changes, False, {}).remarks
    assert any(option in line for line in remarks)


@pytest.mark.parametrize(
    ("name", "words"),
    [("max_steps", "from the YAML"), ("barebones", "without effect"), ("fast_dev_run", "only Lightning")],
)
def test_a_key_of_the_trainer_without_a_counterpart_is_named_when_it_is_set(name, words, defaults):
    remarks = into_accelerate({**defaults, name: "set"}, {name: "set"}, False, {}).remarks
    (line,) = (line for line in remarks if f"trainer.{name}" in line.partition(": ")[0].split(", "))
    assert words in line
    assert not any(f"trainer.{name}" in line for line in into_accelerate(defaults, {}, False, {}).remarks)


# What is written is loaded by the framework it is for.


@pytest.mark.parametrize(
    ("changes", "launches"),
    [
        (
            {"precision": "16-mixed"},
            {"multi_gpu": False, "use_fsdp": False, "mixed_precision": "fp16", "num_processes": 1},
        ),
        ({"devices": 2}, {"multi_gpu": True, "num_processes": 2}),
        ({"devices": 2, "accelerator": "cpu"}, {"multi_gpu": True, "num_processes": 2, "use_cpu": True, "cpu": False}),
        (
            {"devices": 2, "accelerator": "cpu", "strategy": "ModelParallelStrategy"},
            {"use_fsdp": True, "num_processes": 2, "use_cpu": True, "cpu": False},
        ),
        (
            {"devices": 2, "strategy": "ModelParallelStrategy", "precision": "bf16-mixed"},
            {"use_fsdp": True, "fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "GPTBlock"},
        ),
        (
            {"devices": 2, "strategy": "deepspeed_stage_3", "accumulate_grad_batches": 4},
            {"use_deepspeed": True, "zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0},
        ),
    ],
)
def test_accelerate_loads_the_file_and_would_launch_what_the_trainer_says(changes, launches, tmp_path, defaults):
    path = tmp_path / "default_config.yaml"
    path.write_text(into_accelerate({**defaults, **changes}, changes, False, {}).text("Without a counterpart:"))
    assert isinstance(load_config_from_file(str(path)), ClusterConfig)
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    assert {name: getattr(args, name) for name in launches} == launches


def test_the_command_writes_the_file_of_a_yaml_and_of_the_first_node(monkeypatch, capsys):
    for variable, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(variable, value)
    options = ["--trainer.num_nodes=2", "--trainer.devices=[0,2]", "--trainer.precision=bf16-mixed"]
    assert main(["accelerate-config", f"--from={RTX2050}", *options]) == 0
    out = capsys.readouterr().out
    asked = {"num_machines": 2, "num_processes": 4, "gpu_ids": "0,2", "mixed_precision": "bf16"}
    node = {"machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29501}
    assert asked.items() | node.items() <= yaml.safe_load(out).items()
    assert "trainer.accumulate_grad_batches: Accelerator(gradient_accumulation_steps=4)" in out


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (ONE, None),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, DDPStrategy),
        (TWO_CARDS, None),
        (FSDP2, ModelParallelStrategy),
        ({**DEEPSPEED, "deepspeed_config.zero_stage": 2, "deepspeed_config.offload_optimizer_device": "cpu"}, None),
    ],
)  # fmt: skip
def test_our_parser_and_lightning_take_the_trainer_section(values, kind, tmp_path, capsys):
    assert main(["accelerate-config", f"--to-trainer={write(tmp_path, values)}"]) == 0
    path = tmp_path / "trainer.yaml"
    path.write_text(capsys.readouterr().out)
    settings = SettingsCLI(args=[f"--config={RTX2050}", f"--config={path}"]).settings.trainer
    assert settings.max_steps == 6000  # the rest of the YAML stays
    if settings.accelerator != "gpu":
        trainer = Trainer(
            accelerator=settings.accelerator, devices=settings.devices, strategy=settings.strategy,
            precision="32-true", logger=False, enable_checkpointing=False,
        )  # fmt: skip
        assert trainer.world_size == values["num_processes"]
        assert kind is None or isinstance(trainer.strategy, kind)
    elif kind is not None:
        parser = ArgumentParser()
        parser.add_argument("--strategy", type=Strategy)
        strategy = parser.instantiate(parser.parse_object({"strategy": settings.strategy})).strategy
        assert isinstance(strategy, kind)


def test_reading_accelerates_file_needs_no_torch(tmp_path):
    code = (
        "import sys; from nanogpt_lit.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "accelerate-config", f"--to-trainer={write(tmp_path, TWO_CARDS)}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "strategy: ddp" in answer.stdout


# Mistakes, one sentence each.


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"distributed_type": "NO", "num_processes": 2}, "contradicts distributed_type=NO"),
        ({**TWO_CARDS, "num_machines": 3}, "num_processes=2 does not divide over num_machines=3"),
        ({**DEEPSPEED, "mixed_precision": "fp16"}, "precision=16-mixed does not go with"),
        ({**DEEPSPEED, "deepspeed_config.zero_stage": 0}, "strategy.stage=0 shares nothing out"),
        ({"distributed_type": "MULTI_CPU", "use_cpu": False}, "use_cpu=False contradicts distributed_type=MULTI_CPU"),
        ({**TWO_CARDS, "num_machines": 2}, "num_machines=2 needs main_process_ip and main_process_port"),
        ({**TWO_CARDS, "fsdp_config.fsdp_version": 2}, "does not read fsdp_config.fsdp_version beside"),
        ({**FSDP2, "mixed_precision": "fp16"}, "precision=16-mixed does not go with"),
        ({**FSDP2, "parallelism_config.parallelism_config_tp_size": 2}, "tp_size=2 has no counterpart"),
        ({**FSDP2, "parallelism_config.parallelism_config_dp_shard_size": 4}, "dp_shard_size=4 leaves some"),
        (
            {**DEEPSPEED, "deepspeed_config.deepspeed_config_file": "a.json", "deepspeed_config.zero_stage": 2},
            "deepspeed_config_file=a.json and zero_stage both configure DeepSpeed",
        ),
        ({"distributed_type": False}, "YAML reads a bare NO so; write 'NO' in quotes"),
    ],
)  # fmt: skip
def test_an_accelerate_file_at_odds_with_itself_is_refused_in_one_sentence(values, sentence, tmp_path, capsys):
    assert main(["accelerate-config", f"--to-trainer={write(tmp_path, values)}"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert sentence in line
    assert captured.out == ""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")
def test_lightnings_own_deepspeed_runs_on_no_cpu():
    """Where it one day does, loops/lightning_sharded.py can leave its set-up to it."""
    trainer = Trainer(accelerator="cpu", devices=1, strategy="deepspeed_stage_2", logger=False)
    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
        trainer.strategy.setup_environment()


def test_a_file_of_fsdp1_is_told_of_accelerates_own_command_and_is_taken_once_that_was_run(tmp_path):
    asked = {
        "version": 1,
        "sharding_strategy": "FULL_SHARD",
        "use_orig_params": True,
        "backward_prefetch": "NO_PREFETCH",
    }
    first = write(tmp_path, FSDP2 | {f"fsdp_config.fsdp_{name}": value for name, value in asked.items()})
    with pytest.raises(UserError, match="fsdp_version=1 is not translated, 2 is;") as told:
        to_trainer(read_accelerate_file(first))
    (command,) = re.findall("`accelerate to-fsdp2 (.*?)`", str(told.value))
    second = tmp_path / "second.yaml"
    words = command.replace("FILE", str(first)).replace("NEW", str(second)).split()
    to_fsdp2_command(to_fsdp2_command_parser().parse_args(words))
    strategy = to_trainer(read_accelerate_file(second)).content["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    assert strategy["init_args"]["data_parallel_size"] == 2


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["accelerate-config", f"--to-trainer={tmp_path / 'nowhere.yaml'}"]) == 2
    assert "nowhere.yaml is no file; `accelerate config` writes one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"precision": "64-true"}, "trainer.precision=64-true has no name in accelerate"),
        ({"strategy": "ddp"}, "trainer.devices=auto leaves the number of processes open"),
        ({"strategy": "my.Strategy"}, "trainer.strategy=my.Strategy is not translated"),
        ({"strategy": "deepspeed", "precision": "16-mixed", "devices": 2}, "=16-mixed does not go with"),
        ({"strategy": "ModelParallelStrategy", "precision": "16-mixed", "devices": 2}, "=16-mixed does not go with"),
        ({"strategy": "fsdp", "devices": 2}, "trainer.strategy=fsdp is not translated"),
        ({"accelerator": "hpu"}, "trainer.accelerator=hpu is not translated"),
    ],
)
def test_a_trainer_section_that_accelerate_has_no_word_for_is_refused(changes, sentence, defaults):
    with pytest.raises(ValueError, match=sentence):
        into_accelerate({**defaults, **changes}, changes, False, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.strategy=fsdp"], "FSDPStrategy does not go with trainer.accelerator=cpu"),
        (["--trainer.strategy=ModelParallelStrategy"], "trainer.devices=auto leaves open over how many processes"),
        (["--trainer.strategy=DDPStrategy", "--trainer.strategy.start_method=spawn", "--trainer.devices=2"], "popen"),
        *(([f"--trainer.strategy=ddp_{way}", "--trainer.devices=2"], "popen") for way in ("spawn", "fork", "notebook")),
    ],
)
def test_fit_says_what_a_strategy_lacks_before_it_makes_anything(options, words, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc " * 500)
    fixed = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.precision=32-true",
             f"--trainer.default_root_dir={tmp_path / 'root'}", f"--data.source={tmp_path / 'text.txt'}"]  # fmt: skip
    assert main(["fit", *fixed, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "root").exists()
