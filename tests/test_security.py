"""What SECURITY.md promises, each with an attack."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import nanogpt_lit.__main__
from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.prepare import PrepareConfig, prepare
from nanogpt_lit.data.shards import MANIFEST, TokenShards
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, BytePairTokenizer
from nanogpt_lit.data.tokenizer_files import read_tokenizer_files, tokenizer_from_files
from nanogpt_lit.loops.accelerate_environment import check_environment, launched_processes
from nanogpt_lit.untrusted.config_values import check_paths, file_inside

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted([*(REPOSITORY / "nanogpt_lit").rglob("*.py"), *(REPOSITORY / "scripts").rglob("*.py")])
PLUGINS = "lightning.pytorch.callbacks"


def run(*arguments):
    return exit_code(lambda: main(list(arguments)))


def exit_code(command):
    try:
        return nanogpt_lit.__main__.exit_code(command)
    except SystemExit as exit:
        return exit.code


def one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def parser():
    """The one that every command makes, made once: that takes longer than to parse."""
    return SettingsCLI(args=[]).parser


@pytest.fixture
def refusal(parser, capsys):
    """The sentence by which a command line is refused."""

    def refused(*arguments):
        code = exit_code(lambda: parser.parse_args(list(arguments)) and 0)
        assert code == 2, arguments
        return one_line(capsys)

    return refused


# A configuration runs no code.


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A module `payload` that leaves a mark when it is imported; the file of the mark."""
    mark = tmp_path / "payload_was_imported"
    (tmp_path / "payload.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from lightning.pytorch import Callback\n"
        "class Evil(Callback): pass\n"
        "def evil(*arguments): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("payload", None)


HIDDEN = {
    "a callback": "trainer: {callbacks: [{class_path: payload.Evil}]}",
    "a logger": "trainer: {logger: {class_path: payload.Evil}}",
    "a strategy": "trainer: {strategy: {class_path: payload.Evil}}",
    "a class within a class": "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, "
    "init_args: {cluster_environment: {class_path: payload.Evil}}}}",
    "a function": f"trainer: {{callbacks: [{{class_path: {PLUGINS}.LambdaCallback, "
    "init_args: {on_fit_start: payload.evil}}]}",
    "a function as a class": f"trainer: {{callbacks: [{{class_path: {PLUGINS}.LambdaCallback, "
    "init_args: {on_fit_start: {class_path: payload.Evil}}}]}",
    "a class in a set": "trainer: {strategy: {class_path: lightning.pytorch.strategies.FSDPStrategy, "
    "init_args: {auto_wrap_policy: [payload.Evil]}}}",
    "dict_kwargs": "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, "
    "dict_kwargs: {x: {class_path: payload.Evil}}}}",
    "a value of any kind": f"trainer: {{callbacks: [{{class_path: {PLUGINS}.LambdaCallback, "
    "dict_kwargs: {on_fit_start: {class_path: payload.Evil}}}]}",
    "the network": "model: {gpt: {class_path: payload.Evil}}",
}


@pytest.mark.parametrize("yaml", HIDDEN.values(), ids=HIDDEN)
def test_a_yaml_has_nothing_imported(yaml, mark, tmp_path, refusal):
    path = tmp_path / "hostile.yaml"
    path.write_text(yaml)
    line = refusal("--config", str(path))
    assert not mark.exists()
    assert re.search(r"names payload\.[Ee]vil, and a configuration may name only|class_path", line)


def test_the_refusal_names_the_key_the_class_and_the_way_out(mark, refusal):
    assert refusal("--trainer.callbacks=payload.Evil") == (
        "trainer.callbacks names payload.Evil, and a configuration may name only classes of Lightning and of "
        "nanogpt_lit, for naming one runs its code; if you trust payload, add --trust payload to the command."
    )


def test_neither_the_command_line_nor_a_second_file_gets_past(mark, tmp_path, refusal):
    hostile, harmless, inner = tmp_path / "hostile.yaml", tmp_path / "harmless.yaml", tmp_path / "inner.yaml"
    hostile.write_text("trainer: {callbacks: [{class_path: payload.Evil}]}")
    harmless.write_text("trainer: {max_steps: 3}")
    inner.write_text("callbacks: [{class_path: payload.Evil}]")
    (tmp_path / "outer.yaml").write_text(f"trainer: {inner}")
    (tmp_path / "callbacks.yaml").write_text("[{class_path: payload.Evil}]")
    for arguments in (
        ["--trainer.callbacks+=payload.Evil"],
        ["--trainer.callbacks", '{"class_path": "payload.Evil"}'],
        [f"--trainer.callbacks={PLUGINS}.Timer", "--trainer.callbacks.class_path=payload.Evil"],
        ["--trainer.callbacks.help=payload.Evil"],
        [f"--config={harmless}", f"--config={hostile}"],
        [f"--config={hostile}", f"--config={harmless}", "--trainer.callbacks=null"],
        [f"--config={tmp_path / 'outer.yaml'}"],
        [f"--trainer={inner}"],
        [f"--trainer.callbacks={tmp_path / 'callbacks.yaml'}"],
        ["--trust=nanogpt_lit", f"--config={hostile}"],
    ):
        refusal(*arguments)
        assert not mark.exists(), arguments


def test_the_environment_does_not_get_past(mark, tmp_path, monkeypatch, capsys):
    """jsonargparse reads settings from it when this variable says so."""
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER__CALLBACKS", "payload.Evil")
    assert run("prepare") == 2
    assert not mark.exists()
    assert "names payload.Evil" in one_line(capsys)


@pytest.mark.parametrize("command", ["fit", "fit-accelerate", "accelerate-config"])
def test_every_command_reads_a_yaml_by_the_same_rule(command, mark, tmp_path, capsys):
    path = tmp_path / "hostile.yaml"
    path.write_text("trainer: {callbacks: [{class_path: payload.Evil}]}")
    option = "--from" if command == "accelerate-config" else "--config"
    assert run(command, option, str(path)) == 2
    assert not mark.exists()
    assert "--trust payload" in capsys.readouterr().err


def test_only_the_command_line_trusts_and_only_for_itself(mark, tmp_path, parser, refusal):
    path = tmp_path / "hostile.yaml"
    path.write_text("trust: payload\ntrainer: {callbacks: [{class_path: payload.Evil}]}")
    refusal(f"--config={path}")
    assert not mark.exists()
    config = parser.parse_args(["--trust", "payload", "--trainer.callbacks=payload.Evil"])
    assert mark.exists()
    assert config.trainer.callbacks.class_path == "payload.Evil"
    mark.unlink()
    del sys.modules["payload"]
    refusal("--trainer.callbacks=payload.Evil")
    assert not mark.exists()
    for words in (["--trust"], ["--trust=os.path:x"], ["--trust", "jsonargparse.typing"]):
        refusal(*words)


def test_what_an_allowed_module_has_imported_is_not_allowed_by_that(refusal):
    """model_checkpoint.py imports shutil: its name there is another name of the same function."""
    for function in (f"{PLUGINS}.model_checkpoint.shutil.rmtree", "os.abort", "builtins.exec", "torch.load"):
        yaml = f'{{"class_path": "{PLUGINS}.LambdaCallback", "init_args": {{"on_fit_start": "{function}"}}}}'
        assert re.search(r"names \S+, and a configuration may name only", refusal("--trainer.callbacks", yaml))


def test_classes_of_lightning_and_ours_need_no_trust(parser):
    fsdp = {
        "class_path": "lightning.pytorch.strategies.FSDPStrategy",
        "init_args": {
            "mixed_precision": {"param_dtype": "torch.float16"},
            "auto_wrap_policy": ["nanogpt_lit.gpt.gpt2.Block"],
        },
    }
    ddp = {
        "class_path": "DDPStrategy",
        "init_args": {
            "ddp_comm_hook": "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_hook",
            "timeout": "0:10:0",
        },
    }
    for strategy in (fsdp, ddp):
        arguments = [
            f"--trainer.strategy={json.dumps(strategy)}",
            "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.profiler=SimpleProfiler",
            "--trainer.callbacks=nanogpt_lit.loops.lightning.TextSamples",
            "--trainer.callbacks+=LearningRateMonitor", "--trainer.plugins=TorchCheckpointIO",
        ]  # fmt: skip
        assert len(parser.parse_args(arguments).trainer.callbacks) == 2


def test_a_yaml_that_builds_objects_is_refused(tmp_path, refusal):
    path, mark = tmp_path / "hostile.yaml", tmp_path / "mark"
    path.write_text(f"!!python/object/apply:os.system ['touch {mark}']")
    refusal("--config", str(path))
    assert not mark.exists()


# Files of this machine.


def test_an_address_is_refused_where_a_path_is_meant(refusal):
    addresses = {
        "config": "https://a.example/x.yaml", "trainer.default_root_dir": "s3://a/x", "data.source": "memory::x",
        "data.tokenizer": "file:///etc/passwd",
    }  # fmt: skip
    for key, address in addresses.items():
        assert refusal(f"--{key}={address}").startswith(f"{key}={address} is an address, and only files")


def test_no_checkpoint_comes_from_an_address_or_from_a_search():
    for value, said in (
        ("https://a.example/x.ckpt", "is an address"),
        ("s3://a/x.ckpt", "is an address"),
        *((word, "leaves it to Lightning") for word in ("best", "last", "hpc", "registry", "registry:model:v1")),
    ):
        with pytest.raises(ValueError, match=f"ckpt_path={value} {said}"):
            check_paths({"ckpt_path": value})


def test_drives_and_dots_are_no_addresses():
    check_paths(
        {
            "ckpt_path": "C:/runs/last.ckpt",
            "data": {"source": "hf:owner/name:config", "tokenizer": "bpe:32000"},
            "trainer": {
                "default_root_dir": "D:\\runs",
                "callbacks": [{"class_path": "x.ModelCheckpoint", "init_args": {"filename": "{step}-{val/loss:.2f}"}}],
                "logger": {"class_path": "x.CSVLogger", "init_args": {"name": "a/b", "version": 3, "save_dir": "x"}},
            },
        }
    )


OUTSIDE = ["../x", "a/../../x", "..", "a\\..\\..\\x", "/etc/x", "\\\\host\\x", "C:\\x", "C:x", "~/x", "$HOME/x", "a\0b"]


def test_a_name_that_leaves_its_folder_is_refused():
    for name in OUTSIDE:
        for section, key in (("logger", "name"), ("logger", "sub_dir"), ("callbacks", "filename")):
            trainer = {section: [{"class_path": "x.X", "init_args": {"save_dir": "runs", key: name}}]}
            with pytest.raises(ValueError, match=rf"trainer\.{section}\.init_args\.{key}=.*(leads out of|NUL)"):
                check_paths({"trainer": trainer})


def test_a_link_in_a_name_is_followed_before_it_is_believed(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    link(tmp_path / "runs" / "x", tmp_path / "elsewhere")
    logger = {"class_path": "x.X", "init_args": {"save_dir": str(tmp_path / "runs"), "name": "x"}}
    with pytest.raises(ValueError, match="leads out of"):
        check_paths({"trainer": {"logger": logger}})


def link(path, target):
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this account may not make links")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("A line of text, and another one.\n" * 200)
    prepare(PrepareConfig(str(folder / "text.txt"), "byte"), folder / "shards", show_progress=False)
    return folder / "shards"


@pytest.fixture
def shards(prepared, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_manifest_names_files_of_its_folder_only(shards):
    manifest = json.loads((shards / MANIFEST).read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", ".hidden", "", None):
        manifest["splits"]["train"]["shards"][0]["file"] = name
        (shards / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=re.escape(f"{MANIFEST} names {name!r}; a plain file name")):
            TokenShards.open(shards, "train")


def test_neither_a_shard_nor_a_tokenizer_is_a_link_out_of_its_folder(shards, tmp_path):
    for name, read in (
        ("train_000000.bin", lambda: TokenShards.open(shards, "train")),
        (TOKENIZER_JSON, lambda: read_tokenizer_files(shards)),
    ):
        read()
        (shards / name).rename(tmp_path / name)
        link(shards / name, tmp_path / name)
        with pytest.raises(ValueError, match="is a link to"):
            read()


def test_a_folder_that_is_a_link_itself_and_links_within_it_are_welcome(shards, tmp_path):
    link(tmp_path / "elsewhere", shards)
    (shards / "x.bin").write_bytes(b"")
    link(shards / "train.bin", shards / "x.bin")
    assert file_inside(tmp_path / "elsewhere", "train.bin").is_file()


def test_a_tokenizer_cannot_ask_for_all_memory_or_decode_backwards():
    ranks = {bytes([byte]): byte for byte in range(256)}
    for eot in (10**15, -1, 2.0, "256", None):
        with pytest.raises(ValueError, match="has the token id"):
            BytePairTokenizer("x", ranks, ".", {"<|endoftext|>": eot})
    with pytest.raises(ValueError, match="no JSON"):
        tokenizer_from_files({TOKENIZER_JSON: "[" * 100_000})


# Nothing is unpickled.


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture
def small(tmp_path):
    """The options of a run of two steps."""
    (tmp_path / "text.txt").write_text("A line of text, and another one.\n" * 200)
    return [
        f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.accelerator=cpu", "--trainer.max_steps=2",
        "--model.gpt.n_layer=1", "--model.gpt.n_head=1", "--model.gpt.n_embd=8", "--model.schedule.warmup_steps=1",
        f"--data.source={tmp_path / 'text.txt'}", "--data.tokenizer=byte", "--data.block_size=8",
        "--data.batch_size=2",
    ]  # fmt: skip


def test_a_checkpoint_with_a_bomb_in_it_does_not_go_off(small, tmp_path, capfd):
    mark, path, renamed = tmp_path / "mark", tmp_path / "bomb.ckpt", tmp_path / "bomb.safetensors"
    torch.save({"state_dict": {}, "hyper_parameters": Bomb(mark), "global_step": 1}, path)
    renamed.write_bytes(path.read_bytes())
    folder = tmp_path / "accelerate"
    folder.mkdir()
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "model.safetensors"):
        torch.save({"x": Bomb(mark)}, folder / name)
    kept = {key: {} for key in ("hyper_parameters", "data", "validations")}
    counts = dict.fromkeys(("batches", "processes", "accumulate_grad_batches", "tokens"), 1)
    (folder / "nanogpt_lit.json").write_text(json.dumps(kept | counts))
    out = str(tmp_path / "out.safetensors")
    for arguments in (
        ["fit", *small, f"--ckpt_path={path}"],
        ["generate", "--ckpt", str(path)],
        ["generate", "--ckpt", str(renamed)],
        ["convert", str(path), out],
        ["convert", str(renamed), out],
        ["convert", str(folder), out],
    ):
        assert run(*arguments) == 2, arguments
        assert not mark.exists(), arguments
        assert "Traceback" not in capfd.readouterr().err


def test_fit_unpickles_nothing_at_the_users_wish_and_fetches_no_checkpoint(capsys):
    assert run("fit", "--weights_only=false") == 2
    assert "there is no option weights_only" in one_line(capsys)
    assert run("fit", "--ckpt_path=https://a.example/x.ckpt") == 2
    assert "ckpt_path=https://a.example/x.ckpt is an address" in one_line(capsys)


RUN_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE = re.compile(
    r"(c?[pP]ickle|dill|marshal|shelve|joblib)\.(loads?|open|Unpickler)"
    r"|yaml\.(load|load_all|unsafe_load|full_load)(_all)?|(torch\.)?hub\.load.*|torch\.jit\.load|os\.(system|popen)"
)
# What a process of ours wrote for another of the same run, in a temporary folder of its own.
OUR_OWN_PICKLES = {"nanogpt_lit/parity/processes.py"}


def unsafe_calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {o.arg: ast.unparse(o.value) for o in node.keywords}
        if (
            name in RUN_CODE
            or UNSAFE.fullmatch(name)
            or (name == "torch.load" and options.get("weights_only") != "True")
            or options.get("allow_pickle", "False") != "False"
            or options.get("shell", "False") != "False"
            or options.get("trust_remote_code", "False") != "False"
        ):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


def test_no_file_of_ours_unpickles_or_evaluates():
    for path in SOURCES:
        found = list(unsafe_calls(path))
        assert bool(found) == (path.relative_to(REPOSITORY).as_posix() in OUR_OWN_PICKLES), found


# Versions, network, accelerate, documents.


def requirements():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {r.name: r for r in map(Requirement, project["dependencies"])}


@pytest.mark.parametrize(
    ("package", "bad", "good"),
    [
        ("lightning", ["2.6.2", "2.6.3", "2.6.5", "2.5.0"], "2.6.6"),  # GHSA-w37p-236h-pfx3, CVE-2026-58659
        ("torch", ["2.5.1", "2.9.1"], "2.10.0"),  # CVE-2025-32434, CVE-2026-24747
        ("jsonargparse", ["4.45.0", "5.0.0"], "4.53.0"),  # without an allowlist
    ],
)
def test_versions_that_run_foreign_code_cannot_be_installed_with_this(package, bad, good):
    specifier = requirements()[package].specifier
    assert not [number for number in bad if specifier.contains(number)]
    assert specifier.contains(good)
    assert specifier.contains(Version(version(package)).base_version)


@pytest.mark.slow
def test_what_python_keeps_out_of_itself_it_keeps_out_of_the_processes_it_starts(small, tmp_path):
    """-P counts for one process. A dependency starts `python -c` of its own, Lightning the second process of a run."""
    (tmp_path / "json.py").write_text("import os, sys\nopen('ran', 'a').write(f'{sys.orig_argv}')")
    safe = [sys.executable, "-P", "-m", "nanogpt_lit", "fit", *small, "--trainer.devices=2", "--trainer.strategy=ddp"]
    result = subprocess.run(safe, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    unsafe = [sys.executable, "-m", "nanogpt_lit", "convert", "--help"]  # it is there to be run
    subprocess.run(unsafe, cwd=tmp_path, capture_output=True, timeout=300)
    assert (tmp_path / "ran").exists()


WATCHED = """
import socket, sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        seen.append((event, str(arguments)))
sys.addaudithook(watch)
socket.getaddrinfo("localhost", 1)
assert seen, "the watch sees nothing"
seen.clear()
import nanogpt_lit.__main__
from nanogpt_lit.__main__ import main
code = main(sys.argv[1:])
assert not seen, seen
sys.exit(code)
"""


def test_a_fit_connects_to_nothing(small, tmp_path):
    """From its first import to its last line, under the interpreter's own audit of sockets."""
    command = [sys.executable, "-c", WATCHED, "fit", *small]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_what_no_loop_follows_in_accelerates_environment_is_shown():
    environ = {"ACCELERATE_FP8_BACKEND": "TE", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/tmp/x.json"}
    shown = check_environment("32-true", 1, "cpu", environ)
    assert shown is not None
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE=/tmp/x.json, ACCELERATE_FP8_BACKEND=TE" in shown


def test_mpirun_counts_as_a_launcher_and_nonsense_does_not():
    assert launched_processes({"OMPI_COMM_WORLD_SIZE": "2"}) == 2
    assert launched_processes({}) == 1
    with pytest.raises(ValueError, match="WORLD_SIZE=two"):
        launched_processes({"WORLD_SIZE": "two"})


def test_every_test_that_security_md_points_to_is_there():
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").glob("*.py"))
    assert len(named) >= 8
    assert not [name for name in named if f"def {name}(" not in sources]
