"""The same YAML on one process and on two real ones: the same samples, losses and weights.

Two processes with one micro-batch per step and one process with two see the same global batch. The mean over two is
half of each in both, and a half is exact in floating point: everything is the same bits. But for one thing: FSDP2 sums
the gradients' norm shard by shard, in another order. Here it is measured and nothing is clipped by it.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_commands import clone, printed_by
from small_runs import LOOPS, accelerate, curves, different, on_two_processes
from small_runs import fit as lightning
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.loops import trainer_section
from nanogpt_lit.loops.compatibility import check_together, keys_of
from nanogpt_lit.loops.trainer_section import strategy_settings
from nanogpt_lit.runtime.launch import lost_restart

PAGE = Path(__file__).parents[1] / "docs" / "scale_out.md"
STEPS, BATCH_SIZE, BLOCK_SIZE = 5, 2, 16
RECORDED_FIT = '''
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

from nanogpt_lit.cli import fit as cli
from nanogpt_lit.__main__ import main


class Recorder(Callback):
    """Everything that this process trained on, its losses, and the weights at the end."""

    def __init__(self, folder):
        self.folder, self.tokens, self.losses = Path(folder), [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.tokens.append(batch[0].clone())
        self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer, module):
        weights = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in module.named_parameters()}
        shares = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in module.parameters())
        record = {"tokens": torch.stack(self.tokens), "losses": torch.stack(self.losses)}
        torch.save(record | {"weights": weights, "shares": shares}, self.folder / f"rank_{trainer.global_rank}.pt")


class RecordedCLI(cli.NanoGPTCLI):
    def instantiate_trainer(self, **kwargs):
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(Recorder(trainer.default_root_dir))
        return trainer


class Killer(Callback):
    """Ends the second process in its third step as a power loss would, once."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        is_first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if trainer.global_step == 3 and trainer.global_rank == 1 and is_first_time:
            os.kill(os.getpid(), signal.SIGKILL)


if "--kill" in sys.argv:
    sys.argv.remove("--kill")
    Recorder = lambda folder: Killer()  # noqa: E731
cli.NanoGPTCLI = RecordedCLI
sys.exit(main(["fit", *sys.argv[1:]]))
'''


def options(folder):
    return [
        f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}",
        "--trainer.log_every_n_steps=1", "--trainer.gradient_clip_val=100", "--model.gpt.n_layer=2",
        "--model.gpt.n_head=2", "--model.gpt.n_embd=16", "--model.schedule.warmup_steps=2", "--model.optim.lr=0.003",
        f"--data.source={folder.parent / 'text.txt'}", "--data.tokenizer=byte", f"--data.block_size={BLOCK_SIZE}",
        f"--data.batch_size={BATCH_SIZE}", "--data.val_fraction=0.1",
    ]  # fmt: skip


def validation(batches):
    """After every second step, over 2 batches of all processes together. batches: of a step, of each process"""
    return [f"--trainer.val_check_interval={2 * batches}", "--trainer.limit_val_batches=2"]


class Run:
    def __init__(self, folder, processes, said=""):
        self.said = said
        ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(processes)]
        # In the order of the endless stream of batches: the processes take turns.
        self.tokens = torch.stack([rank["tokens"] for rank in ranks], dim=1).flatten(0, 1)
        self.losses = torch.stack([rank["losses"] for rank in ranks], dim=1).flatten(0, 1)
        self.weights = ranks[0]["weights"]
        self.shares = [rank["shares"] for rank in ranks]
        events = EventAccumulator(str(folder / "version_0")).Reload()
        self.curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("scale_out")
    # Squares never line up: no two windows of the text are the same.
    (home / "text.txt").write_text("".join(f"{n * n} is the square of {n}\n" for n in range(300)))
    (home / "fit.py").write_text(RECORDED_FIT)
    return home


def run_as_script(*command):
    sys.argv = [*command]
    torch.set_num_threads(1)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit:
        return exit.code


@pytest.fixture(scope="module")
def one(home):
    more = ["--trainer.accumulate_grad_batches=2", *validation(2)]
    printed_by("one", home, run_as_script, str(home / "fit.py"), *options(home / "one"), *more)
    return Run(home / "one", 1)


@pytest.fixture(scope="module")
def ddp(home):
    """Started as torchrun starts processes."""
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", *validation(1)]
    answers = on_two_processes(run_as_script, str(home / "fit.py"), *options(home / "ddp"), *more)
    assert answers == [(0, [])] * 2
    return Run(home / "ddp", 2)


@pytest.fixture(scope="module")
def fsdp2(home):
    """The second process is started by Lightning."""
    more = ["--trainer.devices=2", "--trainer.strategy=ModelParallelStrategy", *validation(1)]
    said = printed_by("fsdp2", home, run_as_script, str(home / "fit.py"), *options(home / "fsdp2"), *more)
    return Run(home / "fsdp2", 2, said)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_two_processes_train_on_the_samples_of_one_each_once(strategy, one, request):
    two = request.getfixturevalue(strategy)
    assert two.tokens.shape == (2 * STEPS, BATCH_SIZE, BLOCK_SIZE)
    assert torch.equal(two.tokens, one.tokens)
    windows = two.tokens.flatten(0, 1)
    assert len(windows.unique(dim=0)) == len(windows)
    assert two.curves["train/tokens"] == one.curves["train/tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_and_weights_of_one_bit_for_bit(strategy, one, request):
    two = request.getfixturevalue(strategy)
    assert torch.equal(two.losses, one.losses)
    for name, weight in one.weights.items():
        assert torch.equal(two.weights[name], weight), name
    for tag in ("val/loss", "val/perplexity", "train/lr"):
        assert two.curves[tag] == one.curves[tag], tag
    # The losses of a step, summed in another order.
    for (step, loss), (_, expected) in zip(two.curves["train/loss"], one.curves["train/loss"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6, abs=0), f"step {step}"
    # Under FSDP2 a sum of squares in another order: some float32 roundings, 6e-8 each.
    tolerance = 1e-6 if strategy == "fsdp2" else 0
    for (step, norm), (_, expected) in zip(two.curves["train/grad_norm"], one.curves["train/grad_norm"], strict=True):
        assert norm == pytest.approx(expected, rel=tolerance, abs=0), f"step {step}"


@pytest.mark.slow
def test_accelerates_fsdp2_gives_the_bits_of_lightnings(home, fsdp2):
    home = home / "fsdp2"
    more = ["--trainer.devices=2", "--trainer.strategy=ModelParallelStrategy", *validation(1)]
    assert on_two_processes(accelerate, *options(home), *more) == [(0, [])] * 2
    points = curves(home / "accelerate_0")
    assert points == curves(home / "version_0")
    assert {tag for tag, _ in points} >= {"train/loss", "train/grad_norm", "val/loss"}
    assert not different(*(home / name / "checkpoints/last.safetensors" for name in ("version_0", "accelerate_0")))


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "lightnings"), [("ddp", "ddp"), ("ModelParallelStrategy", "fsdp2")])
def test_accelerate_launch_starts_on_cpus_what_the_file_of_accelerate_config_says(
    strategy, lightnings, home, capsys, request
):
    request.getfixturevalue(lightnings)
    folder = home / f"launched_{strategy}"
    more = [*options(folder), "--trainer.devices=2", f"--trainer.strategy={strategy}", *validation(1)]
    assert main(["accelerate-config", f"--from={PAGE.parents[1] / 'configs' / 'quickstart.yaml'}", *more]) == 0
    file = folder.with_suffix(".yaml")
    file.write_text(capsys.readouterr().out)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "nanogpt_lit", "fit-accelerate"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, *launch, *more], env=environ, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert curves(folder / "accelerate_0") == curves(home / lightnings / "version_0")


@pytest.mark.long
@pytest.mark.parametrize("loop", [lightning, accelerate])
@pytest.mark.parametrize("more", ["--data.documents=separate", "--model.compile=true"])
def test_fsdp2_beside_separate_documents_and_beside_compile_draws_the_losses_of_ddp(loop, more, home):
    texts = home / "texts"
    texts.mkdir(exist_ok=True)
    for n in range(300):  # a file is a document
        (texts / f"{n}.txt").write_text(f"{n * n} is the square of {n}")
    losses = []
    for strategy in ("ddp", "ModelParallelStrategy"):
        folder = home / f"{loop.__name__}{more}_{strategy}"
        of_run = [*options(folder), *validation(1), "--trainer.devices=2", f"--trainer.strategy={strategy}"]
        answers = on_two_processes(loop, *of_run, f"--data.source={texts}", more)
        assert [code for code, *_ in answers] == [0, 0], answers
        points = curves(folder / LOOPS[loop])
        losses.append({point: value for point, value in points.items() if point[0] in ("train/loss", "val/loss")})
    if more == "--data.documents=separate":
        assert losses[0] == losses[1]
    else:  # the compiled blocks are others, and add up in other orders
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_under_fsdp2_each_process_holds_half_of_the_weights(one, fsdp2):
    total = sum(weight.numel() for weight in one.weights.values())
    assert sum(fsdp2.shares) == total
    assert max(fsdp2.shares) < 0.51 * total


@pytest.mark.slow
def test_what_a_sharded_run_says_to_type_for_more_text_can_be_typed(home, fsdp2, capsys, monkeypatch):
    monkeypatch.chdir(home)
    (command,) = re.findall(r"^write more +python -m nanogpt_lit (.+)$", fsdp2.said, flags=re.MULTILINE)
    assert main([*shlex.split(command), "--max-new-tokens=2"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.long
def test_torchrun_restarts_killed_processes_which_go_on_to_the_same_bits(home, ddp, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", *validation(1), "--checkpoint_every_steps=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, str(home / "fit.py"), *options(home / "killed"), *more, "--resume=auto", "--kill"]
    # Threads are pinned: the sum of a matrix product depends on their number.
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert "going on from" in answer.stdout
    runs = [home / name / "version_0" for name in ("ddp", "killed")]
    assert not different(*(run / "checkpoints" / "last.safetensors" for run in runs))
    undisturbed, killed = (curves(run) for run in runs)
    assert {point: killed[point] for point in undisturbed} == undisturbed


@pytest.mark.parametrize(
    ("environ", "warns"),
    [
        ({}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_a_restart_that_would_find_no_other_process_is_announced(environ, warns):
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (lost_restart(environ) or "")) == warns


@pytest.mark.slow
def test_another_number_of_processes_than_torchrun_started_is_refused(home, monkeypatch, capsys):
    started = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for variable, value in {**started, "GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    assert main(["fit", *options(home / "refused"), "--trainer.devices=3", "--trainer.strategy=ddp"]) == 2
    assert "devices" in capsys.readouterr().err


def commands_of(page):
    """The commands of its bash blocks, as lists of arguments."""
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "-m nanogpt_lit" in line and "trainer.yaml" not in line:
                yield shlex.split(line.partition(" > ")[0], comments=True)


SMALLEST = [
    "--model.gpt.n_layer=1", "--model.gpt.n_head=1", "--model.gpt.n_embd=8", "--model.gpt.vocab_size=100",
    "--data.block_size=8", "--data.batch_size=1", "--trainer.limit_val_batches=0",
]  # fmt: skip


def test_every_command_of_the_page_is_one_that_we_understand(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(clone(tmp_path))
    monkeypatch.setattr(trainer_section, "find_spec", lambda package: object())  # DeepSpeed is an extra
    commands = list(commands_of(PAGE.read_text(encoding="utf-8")))
    assert len(commands) >= 7
    for command in commands:
        arguments = command[command.index("nanogpt_lit") + 1 :]
        if arguments[0] in ("fit", "fit-accelerate"):
            settings = SettingsCLI(args=arguments[1:]).settings
            of_network = keys_of("model", settings.model.as_dict())
            check_together(of_network | strategy_settings(vars(settings.trainer), "cuda"))
        elif arguments[0] == "plan":
            assert main([*arguments, *SMALLEST]) == 0
            assert "on 2 x 8 devices, ddp" in capsys.readouterr().out
        else:
            assert main([*arguments, *(["--data.block_size=8"] if arguments[0] == "prepare" else [])]) == 0
        if arguments[0] == "accelerate-config":
            assert "distributed_type: MULTI_GPU" in capsys.readouterr().out
