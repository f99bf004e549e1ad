"""The commands as a user types them, on a text of a few kilobytes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BOTTLES, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nanogpt_lit.__main__
from nanogpt_lit.__main__ import COMMANDS, exit_code, main
from nanogpt_lit.checkpoint.run_file import load_run

TAGS = {
    "train/loss", "train/lr", "train/grad_norm", "train/skipped_steps", "train/tokens",
    "throughput/tokens_per_s", "throughput/trained_hours", "val/loss", "val/perplexity", "val/bits_per_byte",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder: whatever a command leaves there is noticed."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_text(folder):
    path = folder / "text.txt"
    path.write_text(BOTTLES)
    return path


def small_run(text, root):
    """A run of a second: 6 steps of 2 micro-batches."""
    return [
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", "--trainer.max_steps=6",
        "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6", "--trainer.log_every_n_steps=1",
        "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=8", "--model.schedule.warmup_steps=2",
        f"--data.source={text}", "--data.tokenizer=byte", "--data.block_size=16", "--data.batch_size=2",
        "--data.val_fraction=0.1",
    ]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def options(tmp_path, text):
    return small_run(text, tmp_path / "root")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """(text, folder of runs) of one fit, made once and not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    text = write_text(folder)
    assert run("fit", *small_run(text, folder / "root")) == 0
    return text, folder / "root"


@pytest.fixture
def trained(finished_run):
    return finished_run[1] / "version_0"


@pytest.fixture
def more(finished_run, tmp_path):
    """Options for one more command on a copy of the finished run."""
    text, root = finished_run
    shutil.copytree(root, tmp_path / "root")
    return small_run(text, tmp_path / "root")


def run(*arguments):
    """The exit code, also where the parser leaves by SystemExit."""
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return exit.code


def curves(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_fit_leaves_one_folder_with_curves_checkpoints_and_configuration(options, here, tmp_path):
    assert run("fit", *options) == 0
    root = tmp_path / "root"
    assert {p.name for p in root.iterdir() if p.suffix != ".lock"} == {"shards", "version_0"}
    assert {p.stem for p in (root / "version_0" / "checkpoints").iterdir()} == {"best", "last", "previous"}
    assert "block_size: 16" in (root / "version_0" / "config.yaml").read_text()
    assert not list(here.iterdir())


def test_curves_have_the_names_of_the_design_over_optimizer_steps(trained):
    events = curves(trained)
    assert set(events.Tags()["scalars"]) == TAGS  # no hp_metric, no epoch
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/loss")] == [3, 6]
    assert [e.value for e in events.Scalars("train/tokens")] == [64.0 * step for step in range(1, 7)]
    rates = [e.value for e in events.Scalars("train/lr")]
    assert rates[0] == pytest.approx(6e-4 / 3)  # the rate that step 1 was taken with
    assert rates[2] == pytest.approx(6e-4)
    assert set(events.Tags()["tensors"]) == {"config/text_summary", "sample/text_summary", "custom_scalars__config__"}
    assert b"block_size: 16" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_the_last_step_is_validated_and_saved_also_off_the_interval(options, tmp_path):
    assert run("fit", *options, "--trainer.max_steps=5") == 0
    events = curves(tmp_path / "root" / "version_0")
    assert [e.step for e in events.Scalars("val/loss")] == [3, 5]
    assert load_run(tmp_path / "root/version_0/checkpoints/last.safetensors").step == 5


def test_the_closing_table_says_what_came_of_it_and_where_it_is(options, capsys):
    assert run("fit", *options) == 0
    table = capsys.readouterr().out
    for expected in (
        r"steps +6\b",
        r"tokens +384\b",
        r"validation loss +\d\.\d{4}, perplexity \d+",
        r"best +\d\.\d+ at",
    ):
        assert re.search(expected, table), expected
    checkpoint = re.search(r"best checkpoint +(\S+)", table)[1]
    assert Path(checkpoint).is_file()
    assert re.search(r"tensorboard --logdir (\S+)", table)
    assert "generate --ckpt " + checkpoint in table


def test_a_second_fit_is_a_run_of_its_own_on_the_same_shards(more, tmp_path, capsys):
    trained = tmp_path / "root" / "version_0"
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    assert run("fit", *more) == 0
    assert "preparing" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before
    assert (trained.parent / "version_1" / "checkpoints" / "last.safetensors").is_file()


def test_shards_are_made_anew_when_the_text_or_the_tokenizer_differs(options, text, capsys):
    assert run("prepare", *options) == 0
    text.write_text(text.read_text() + "Take one down, pass it around.\n")
    capsys.readouterr()
    assert run("prepare", *options) == 0
    assert "preparing" in capsys.readouterr().out
    assert run("fit", *options, "--data.tokenizer=char", "--trainer.max_steps=1") == 0
    assert "preparing" in capsys.readouterr().out


def test_samples_leave_the_training_bit_for_bit_the_same(options, tmp_path):
    without = ["--trainer.callbacks=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=1"]
    dropout = "--model.gpt.dropout=0.1"
    assert run("fit", *options, dropout) == run("fit", *options, dropout, *without) == 0
    first, second = (load_run(tmp_path / f"root/version_{n}/checkpoints/last.safetensors").weights for n in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_continued_run_takes_the_rest_of_the_steps_and_the_command_lines_word(trained, more, tmp_path):
    last = trained / "checkpoints" / "last.safetensors"
    rest = [f"--ckpt_path={last}", "--trainer.max_steps=8", "--model.optim.beta2=0.5"]
    assert run("fit", *more, *rest) == 0
    events = curves(tmp_path / "root" / "version_1")
    assert [e.step for e in events.Scalars("train/loss")] == [7, 8]
    assert [e.value for e in events.Scalars("train/tokens")] == [448.0, 512.0]
    assert "beta2: 0.5" in (tmp_path / "root/version_1/config.yaml").read_text()


def test_validate_repeats_the_validation_loss_of_the_run(trained, more, tmp_path, capsys):
    expected = curves(trained).Scalars("val/loss")[-1].value
    assert run("validate", *more, f"--ckpt_path={trained / 'checkpoints' / 'last.safetensors'}") == 0
    printed = re.search(r"validation loss (\d+\.\d+), perplexity", capsys.readouterr().out)
    assert printed[1] == f"{expected:.4f}"
    assert [p.name for p in (tmp_path / "root").glob("version_*")] == ["version_0"]


def test_validate_needs_no_max_steps(trained, more, capsys):
    without = [option for option in more if "max_steps" not in option]
    assert run("validate", *without, f"--ckpt_path={trained / 'checkpoints/last.safetensors'}") == 0
    assert "validation loss" in capsys.readouterr().out


def test_generate_decodes_with_the_tokenizer_of_the_checkpoint(trained, tmp_path, capsys):
    alone = shutil.copy(trained / "checkpoints" / "best.safetensors", tmp_path)
    checkpoint = f"--ckpt={alone}"
    assert run("generate", checkpoint, "--prompt=9 bottles", "--max-new-tokens=20") == 0
    first = capsys.readouterr().out
    assert first.startswith("9 bottles")
    assert run("generate", checkpoint, "--prompt=9 bottles", "--max-new-tokens=20") == 0
    assert capsys.readouterr().out == first
    assert run("generate", checkpoint, "--prompt=9 bottles", "--max-new-tokens=20", "--seed=2") == 0
    assert capsys.readouterr().out != first


def test_prepare_alone_makes_the_shards_that_fit_then_uses(options, tmp_path, capsys):
    assert run("prepare", *options) == 0
    assert {p.name for p in (tmp_path / "root").iterdir() if p.suffix != ".lock"} == {"shards"}
    capsys.readouterr()
    assert run("fit", *options) == 0
    assert "preparing" not in capsys.readouterr().out


def test_without_a_gpu_16_mixed_says_what_it_falls_back_to(options, capsys):
    assert run("fit", *options, "--trainer.precision=16-mixed", "--trainer.max_steps=1") == 0
    out = capsys.readouterr().out
    assert "16-mixed needs a GPU and there is none, training in 32-true" in out
    assert "32-true on" in out


@pytest.mark.skipif(os.name == "nt" or torch.version.cuda is not None, reason="needs a shell script and a CPU torch")
def test_a_card_that_this_torch_cannot_use_is_named_with_what_to_install(options, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho NVIDIA GeForce RTX 2050\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    assert run("fit", *options, "--trainer.max_steps=1") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "RTX 2050" in line]
    assert "without CUDA" in line
    assert "pip install" in line


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["prepare", "--help"]])
def test_help_of_the_light_commands_imports_no_torch(arguments):
    script = (
        "import sys\nfrom nanogpt_lit.__main__ import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "usage:" in answer.stdout


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")


def refusal(capsys, *arguments):
    """The one sentence that a command refuses with."""
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


BEFORE_ANYTHING_IS_MADE = [
    ("--trainer.max_stepz=3", "no option trainer.max_stepz; did you mean trainer.max_steps?"),
    ("--model.gpt.n_head=3", "model.gpt.n_embd=8 does not divide into n_head=3 equal heads"),
    ("--model.optim.lr=-1", "model.optim.lr=-1.0 must be positive"),
    ("--trainer.max_steps=-1", "trainer.max_steps=-1 gives the learning rate no end"),
    ("--trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5 must be at least 1"),
    ("--trainer.precision=8-mixed", "trainer.precision"),
    ("--trainer.precision=fp16", "trainer.precision=fp16 does not work; did you mean 16-mixed? what does: "),
    pytest.param("--trainer.accelerator=gpu", "trainer.accelerator=gpu is not here: torch", marks=without_gpu),
    ("--trainer.accelerator=tpu", "trainer.accelerator=tpu is not known; auto, cpu, gpu, cuda and mps are"),
    ("--trainer.logger=WandbLogger", "trainer.logger=WandbLogger needs the package wandb: pip install wandb"),
    ("--trainer.logger=MLFlowLogger", "trainer.logger=MLFlowLogger needs the package mlflow: pip install mlflow"),
    ("--config=nowhere/quikstart.yaml", "--config=nowhere/quikstart.yaml does not exist"),
    ("configs/x.yaml", "configs/x.yaml stands alone; an option goes before it, as in --config configs/x.yaml"),
    ("--data.block_size=sixteen", "data.block_size"),
    ("--data.source=~no-such-user/text.txt", "~no-such-user/text.txt names the home of a user that is not here"),
    ("--trainer.devices=99", "trainer.devices=99 starts 99 processes on "),
    ("--trainer.gradient_clip_algorithm=top", "trainer.gradient_clip_algorithm=top is not known; norm and value are."),
    ("--trainer.profiler=top", "trainer.profiler=top is not known; simple and advanced and pytorch are."),
    ("--trainer.max_epochs=0", "trainer.max_epochs=0 trains nothing"),
    ("--trainer.limit_train_batches=0", "trainer.limit_train_batches=0 trains nothing"),
    ("--trainer.num_nodes=2", "trainer.num_nodes=2 waits for other machines"),
    ("--model.memory=[]", "model.memory=[] does not work; what does: keys below it"),
    ("--model.optim=null", "model.optim=null does not work; what does: keys below it"),
    ("--data.tokenizer=gpt5", "data.tokenizer=gpt5"),
    ("--data.source=nowhere.txt", "data.source=nowhere.txt does not exist"),
    ("--data.source=\x1b[31m", r"data.source=\x1b[31m does not exist"),
]
ONCE_THERE_ARE_SHARDS = [
    ("--data.block_size=4096", "data.block_size=4096"),
    ("--model.gpt.vocab_size=100", "model.gpt.vocab_size=100"),
]


@pytest.mark.parametrize(("option", "sentence"), [*BEFORE_ANYTHING_IS_MADE, *ONCE_THERE_ARE_SHARDS])
def test_a_mistake_is_refused_in_one_sentence_and_starts_no_run(options, option, sentence, capsys, tmp_path):
    assert sentence in refusal(capsys, "fit", *options, option)
    left = {path.name for path in (tmp_path / "root").glob("*") if path.suffix != ".lock"}
    assert left == ({"shards"} if (option, sentence) in ONCE_THERE_ARE_SHARDS else set())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["convert", "a.pt"], "the following arguments are required: TO; `python -m nanogpt_lit convert --help` lists"),
        (["generate", "--cpkt=a"], "the following arguments are required: --ckpt"),
        (["eval", "--ckpt=a", "--picturee=b"], "unrecognized arguments: --picturee=b"),
        (["plan", "--os=beos"], "argument --os: invalid choice: 'beos'"),
        (["init-config", "a", "b", "c"], "unrecognized arguments: c"),
        (["parity", "--steps=0"], "argument --steps: 0 should be a whole number, at least 1."),
    ],
)
def test_a_wrong_option_of_any_command_is_refused_in_one_sentence(command, sentence, capsys):
    assert sentence in refusal(capsys, *command)


@pytest.mark.skipif(os.name != "posix", reason="quotes of a shell that is not Windows'")
def test_the_commands_that_a_run_ends_with_can_be_copied_from_a_folder_with_a_space(text, tmp_path, capsys):
    assert fit(*small_run(text, tmp_path / "my runs"), "--trainer.max_steps=2") == 0
    shown = capsys.readouterr().out
    for name in ("curves", "write more"):
        (command,) = re.findall(rf"^{name} +(.+)$", shown, flags=re.M)
        assert Path(shlex.split(command)[-1]).exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word_but_not_as_done():
    command = f"{sys.executable} -m nanogpt_lit accelerate-config --help | head -c 1"
    program = (
        "from nanogpt_lit.__main__ import exit_code; exit(exit_code(lambda: [print('x' * 999) for _ in range(9999)]))"
    )
    for shown, code in ((command, 0), (f'{sys.executable} -c "{program}" | head -c 1', 141)):
        answer = subprocess.run(["bash", "-o", "pipefail", "-c", shown], capture_output=True, text=True)
        assert (answer.returncode, answer.stderr) == (code, "")


def test_another_pipe_that_breaks_is_not_taken_for_a_reader_that_has_gone(capsys):
    def breaks():
        raise BrokenPipeError(32, "Broken pipe")

    assert nanogpt_lit.__main__.exit_code(breaks) == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value", "said"), [("memory", "[]", "[]"), ("optim", "null", "None")])
def test_a_section_of_a_yaml_without_keys_is_refused(key, value, said, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"model: {{{key}: {value}}}")
    assert f"model.{key}={said} holds no keys" in refusal(capsys, "fit", f"--config={tmp_path / 'a.yaml'}")


@pytest.mark.parametrize("command", ["fit", "fit-accelerate"])
@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "SLURM_NTASKS"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(command, variable, options, monkeypatch, capsys):
    monkeypatch.setenv(variable, "x")
    assert f"{variable}=x in the environment is not a whole number" in refusal(capsys, command, *options)


@pytest.mark.parametrize(
    ("command", "option", "variable", "said"),
    [
        ("fit", "--trainer.barebones=true", ("X", ""), "disabled in barebones mode. (lightning says so)"),
        ("fit", "--trainer.devices=1", ("SLURM_NTASKS", "2"), "`--ntasks-per-node=2` instead. (lightning says so)"),
        ("fit", '--trainer.callbacks={"class_path": "EarlyStopping", "init_args": {"monitor": "nope"}}', ("X", ""),
         "metric `nope` which is not available"),
        ("fit-accelerate", "--trainer.devices=1", ("ACCELERATE_USE_CPU", "x"), "truth value x (accelerate says so)"),
    ],
)  # fmt: skip
def test_what_a_framework_itself_refuses_is_one_sentence(command, option, variable, said, options, monkeypatch, capsys):
    monkeypatch.setenv(*variable)
    assert run(command, *options, option) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_root_that_is_null_is_that_which_is_not_set(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("fit", *options, "--trainer.default_root_dir=null", "--trainer.max_steps=1") == 0
    assert (tmp_path / "runs/version_0/checkpoints/last.safetensors").is_file()


def test_an_unknown_key_in_the_yaml_is_refused_with_the_nearest_known_one(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("trainer:\n  max_steps: 3\nmodel:\n  gpt:\n    n_layers: 3\n")
    sentence = refusal(capsys, "fit", "--config", str(tmp_path / "run.yaml"))
    assert "no option model.gpt.n_layers; did you mean model.gpt.n_layer?" in sentence


def test_a_yaml_that_is_no_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("trainer: [\n")
    assert "run.yaml cannot be read as YAML" in refusal(capsys, "fit", "--config", str(tmp_path / "run.yaml"))


def test_an_empty_source_is_refused_and_leaves_nothing(options, tmp_path, text, capsys):
    text.write_text("")
    assert "data.source" in refusal(capsys, "fit", *options)
    assert not list(tmp_path.glob("root/shards*"))


def test_undecodable_text_is_refused_with_the_file_and_the_way_round(options, text, capsys):
    text.write_bytes(b"caf\xe9 " * 100)
    sentence = refusal(capsys, "fit", *options)
    assert str(text) in sentence
    assert "data.skip_undecodable" in sentence


def test_a_damaged_shard_is_refused_by_name(more, tmp_path, capsys):
    shard = tmp_path / "root" / "shards" / "train_000000.bin"
    ready = [option for option in more if "source" not in option] + [f"--data.source={shard.parent}"]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 10)
    assert "train_000000.bin" in refusal(capsys, "fit", *ready)


def test_a_checkpoint_of_another_shape_is_refused_by_name(trained, more, capsys):
    last = trained / "checkpoints" / "last.safetensors"
    sentence = refusal(capsys, "fit", *more, "--model.gpt.n_embd=16", f"--ckpt_path={last}")
    assert "model.gpt.n_embd is 8 there and 16 here" in sentence


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--ckpt=runs"], ["eval", "--ckpt=runs"], ["convert", "runs", "to.safetensors"],
     ["fit", "--data.source=text.txt", "--data.tokenizer=byte", "--init_from=runs", "--trainer.max_steps=2"]],
)  # fmt: skip
def test_a_folder_of_runs_is_no_checkpoint_and_one_in_it_is_named(tmp_path, monkeypatch, capsys, text, arguments):
    monkeypatch.chdir(text.parent)
    checkpoints = Path("runs/version_0/checkpoints")
    checkpoints.mkdir(parents=True)
    for name in ("last", "best"):
        (checkpoints / f"{name}.safetensors").touch()
    sentence = refusal(capsys, *arguments)
    assert f"runs is a folder of runs; name a checkpoint in it, such as {checkpoints / 'best.safetensors'}." in sentence


def test_generate_refuses_what_is_no_checkpoint_of_ours(tmp_path, capsys):
    assert "nowhere.safetensors does not exist" in refusal(capsys, "generate", "--ckpt=nowhere.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a checkpoint")
    assert f"{foreign} is not a checkpoint" in refusal(capsys, "generate", f"--ckpt={foreign}")
    torch.save({"state_dict": {}}, foreign)  # a pickle under our name
    assert f"{foreign} is not a checkpoint" in refusal(capsys, "generate", f"--ckpt={foreign}")


def test_an_unknown_command_is_refused_with_those_there_are(capsys):
    assert f"there are {', '.join(COMMANDS)}" in refusal(capsys, "xyzzy")


@pytest.mark.parametrize(
    ("word", "meant"), [("fti", "fit"), ("train", "fit"), ("sample", "generate"), ("Plan", "plan")]
)
def test_an_unknown_command_is_told_the_nearest(word, meant, capsys):
    assert f"there is no command '{word}'; did you mean {meant}?" in refusal(capsys, word)


def test_a_warm_up_that_outlasts_the_run_is_told(options, capsys):
    refusal_of_the_data = ["--model.schedule.warmup_steps=100", "--data.source=nowhere.txt"]
    assert run("fit", *options, *refusal_of_the_data) == 2
    said = "warmup_steps=100 does not end within trainer.max_steps=6: the learning rate reaches 6% of its peak; 0 "
    assert said in capsys.readouterr().out


def test_a_missing_yaml_is_told_the_nearest_that_is_there(here, capsys):
    (here / "configs").mkdir()
    for name in ("quickstart", "rtx2050"):
        (here / "configs" / f"{name}.yaml").touch()
    for wrong in ("configs/quikstart.yaml", "quickstart.yaml", "config/quickstart"):
        assert f"--config={wrong} does not exist; did you mean configs/quickstart.yaml?" in refusal(
            capsys, "fit", "--config", wrong
        )


def test_an_error_that_is_no_users_mistake_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        int("x")

    monkeypatch.setattr("nanogpt_lit.cli.generate.generate", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["generate"])


@pytest.mark.parametrize("defect", ["int('x')", "list(zip([1], [], strict=True))", "a, b = [1]", "float('x')"])
def test_a_defect_in_a_file_of_ours_is_not_told_as_the_users_mistake(defect):
    code = compile(defect, nanogpt_lit.__main__.__file__, "exec")
    with pytest.raises(ValueError, match=r"invalid literal|shorter|unpack|could not convert"):
        exit_code(lambda: exec(code))


def test_another_process_that_was_killed_is_no_mistake_of_the_user():
    def reads_from_it():
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        exit_code(reads_from_it)
