"""fit --init_from: another model's weights and tokenizer, and everything else of a run's own, in every loop."""

import importlib.util
import json
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_networks import new_tokenizer, randomised, saved, trained
from small_runs import BOTTLES, LOOPS, accelerate, curves, different, fit, small_run

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.cli.beginning import option_of
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.tokenizer import CharTokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_file
from nanogpt_lit.gpt.layers import RopeScaling
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.trainer_section import loop_settings

ROOT = Path(__file__).parents[1]
WIDE = ["--model.gpt.n_embd=16", "--model.gpt.vocab_size=301"]
SHAPE = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture
def start(tmp_path):
    """A checkpoint far into a run: what is fine-tuned must not go on with its step, its rate or its best."""
    tokenizer = new_tokenizer("bpe")
    path = saved(tmp_path / "start.safetensors", trained(tokenizer, **SHAPE), tokenizer)
    save_run(
        path, replace(load_run(path), step=500, batches=500, validations={"latest": (500, 0.1), "best": (500, 0.1)})
    )
    return path


def own_run(text, root, *more):
    return small_run(text, root, f"--data.shards_dir={root / 'shards'}", "--model.gpt.dropout=0", *more)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_llama_is_fine_tuned_from_a_yaml_of_gpt2_and_goes_on_to_the_same_bits(text, tmp_path, loop):
    """With a head of its own, rotations that are stretched, and a new word, which both matrices get a row for."""
    llama = LlamaConfig(
        **SHAPE, vocab_size=257, n_kv_head=1, qk_norm=True, tied_head=False, rope_scaling=RopeScaling(2, 1, 4, 16)
    )
    begun = saved(tmp_path / "llama.safetensors", randomised(llama), new_tokenizer("byte"))
    options = [f"--init_from={begun}", "--data.special_tokens=[<|x|>]", "--trainer.val_check_interval=4"]

    assert loop(*own_run(text, tmp_path / "whole", *options)) == 0
    whole = tmp_path / "whole" / LOOPS[loop] / "checkpoints" / "last.safetensors"
    state = load_run(whole)
    assert state.hyper_parameters["network"] == "llama"
    shape = state.hyper_parameters["llama"]
    assert (shape["vocab_size"], shape["n_kv_head"], shape["rope_scaling"]["factor"]) == (258, 1, 2)
    assert (
        state.weights["gpt.lm_head.weight"].shape == state.weights["gpt.model.embed_tokens.weight"].shape == (258, 16)
    )
    assert not torch.equal(state.weights["gpt.lm_head.weight"], state.weights["gpt.model.embed_tokens.weight"])

    halves = tmp_path / "halves"
    assert loop(*own_run(text, halves, *options, "--trainer.max_time=00:00:00:00")) == 0
    (stopped,) = halves.rglob("last.safetensors")
    assert load_run(stopped).step == 1
    assert loop(*own_run(text, halves, *options, "--resume=auto")) == 0
    assert not different(stopped, whole)


@pytest.mark.parametrize("loop", LOOPS)
def test_it_begins_at_step_0_with_the_weights_the_tokenizer_and_a_best_of_its_own(text, tmp_path, capsys, loop, start):
    assert loop(*own_run(text, tmp_path, f"--init_from={start}", "--model.optim.lr=1e-9")) == 0
    assert (
        f"init: the weights and the tokenizer of {start}, a checkpoint of nanogpt_lit: 1 layers"
        in capsys.readouterr().out
    )
    folder = tmp_path / LOOPS[loop]
    points = curves(folder)
    assert sorted(step for tag, step in points if tag == "train/loss") == list(range(1, 9))
    assert points["train/lr", 1] < points["train/lr", 2]  # its own warm-up
    last = load_run(folder / "checkpoints/last.safetensors")
    assert (last.step, last.batches) == (8, 16)
    assert last.validations["best"][1] > 0.1
    assert (folder / "checkpoints/best.safetensors").is_file()
    before = load_run(start)
    assert last.data["tokenizer"] == before.data["tokenizer"]
    assert last.hyper_parameters["gpt"]["n_embd"] == 16  # and not the 8 of small_run
    for name, tensor in before.weights.items():  # a rate of 1e-9 moves next to nothing
        ours = last.weights[name]
        assert torch.allclose(ours, tensor[: len(ours)], rtol=0, atol=1e-6)
    assert len(last.weights["gpt.transformer.wpe.weight"]) == 16  # the block_size of small_run, of 32 positions


def test_both_loops_end_with_the_same_bits_and_a_resume_goes_on_with_the_run_and_not_from_the_start(
    text, tmp_path, start
):
    options = own_run(text, tmp_path, f"--init_from={start}")
    for loop in LOOPS:
        assert loop(*options) == 0
    ends = [tmp_path / name / "checkpoints/last.safetensors" for name in LOOPS.values()]
    assert not different(*ends)
    halfway = [*options, "--trainer.val_check_interval=8"]
    assert fit(*halfway, "--trainer.limit_val_batches=1") == 0
    middle = tmp_path / "version_1/checkpoints/previous.safetensors"
    assert load_run(middle).step == 4
    start.unlink()  # a run that has begun needs it no more
    for loop, name in ((fit, "version_2"), (accelerate, "accelerate_1")):
        assert loop(*halfway, f"--ckpt_path={middle}") == 0
        assert not different(
            tmp_path / name / "checkpoints/last.safetensors", tmp_path / "version_1/checkpoints/last.safetensors"
        )


def test_the_plain_loop_ends_with_the_same_weights(text, tmp_path, start):
    options = own_run(text, tmp_path, f"--init_from={start}")
    assert fit(*options) == 0
    cli = SettingsCLI(options)
    cli.complete_settings()
    module, data = cli.build()
    data.setup()
    settings = loop_settings(vars(cli.settings.trainer), val_batches=len(data.val_dataloader()), seed=cli.seed)
    reference.train(module, data.train_dataloader(), data.val_dataloader(), settings)
    last = load_run(tmp_path / "version_0/checkpoints/last.safetensors")
    assert all(torch.equal(tensor, last.weights[name]) for name, tensor in module.state_dict().items())


def test_it_begins_from_a_folder_of_hugging_face_too(text, tmp_path):
    tokenizer = new_tokenizer("byte")
    gpt = trained(tokenizer, gelu="erf", **SHAPE)
    theirs = tmp_path / "folder"
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), theirs, to="hf")
    assert fit(*own_run(text, tmp_path, f"--init_from={theirs}", "--model.optim.lr=1e-9", "--trainer.max_steps=2")) == 0
    last = load_run(tmp_path / "version_0/checkpoints/last.safetensors")
    assert torch.allclose(last.weights["gpt.lm_head.weight"], gpt.lm_head.weight, rtol=0, atol=1e-6)
    assert last.hyper_parameters["gpt"]["gelu"] == "erf"


def test_the_loss_begins_where_the_model_was_and_not_where_a_new_one_is(text, tmp_path):
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, BOTTLES, steps=150, **SHAPE), tokenizer)
    first = {}
    for name, more in (("new", []), ("tuned", [f"--init_from={source}"])):
        root = tmp_path / name
        assert fit(*own_run(text, root, *more)) == 0
        first[name] = curves(root / "version_0")["train/loss", 1]
    assert first["new"] > 5.3  # about log 257
    assert first["tuned"] < 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.block_size=64"], "data.block_size=64 is longer than the 32 positions of init_from="),
        (["--init_from=nowhere"], "nowhere does not exist"),
        (["--init_from=out/ckpt.pt"], "out/ckpt.pt does not exist"),
        (
            ["--init_from=gpt2"],
            "init_from=gpt2 is no file or folder here; a model of the hub is named as in hf:openai-",
        ),
        (["--init_from=Qwen/Qwen3-0.6B"], "a model of the hub is named as in hf:Qwen/Qwen3-0.6B."),
        (["--init_from=hf:gpt2"], "hf:gpt2: a model of the hub is written hf:OWNER/NAME"),
        (["--init_from=https://x/y"], "is an address"),
    ],
)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_cannot_begin_is_refused_in_one_sentence(text, tmp_path, capsys, start, loop, options, sentence):
    assert loop(*own_run(text, tmp_path, f"--init_from={start}", *options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line


def test_a_char_tokenizer_of_another_text_is_refused(text, tmp_path, capsys):
    tokenizer = CharTokenizer("xyz")
    source = saved(tmp_path / "ours.safetensors", trained(tokenizer, "xyz" * 99, **SHAPE), tokenizer)
    assert fit(*own_run(text, tmp_path, f"--init_from={source}")) == 2
    assert "vocab_size" in (said := capsys.readouterr().err) or "was trained with another tokenizer" in said


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its library asks for: the newest commit, what a commit holds, and each file."""

    asked: ClassVar[list[str]]

    def do_GET(self):
        path = unquote(self.path).partition("?")[0]
        self.asked.append(path)
        match path.split("/")[1:]:
            case ["api", "models", "some", "model", "revision", "main" | "abc123"]:
                self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
            case ["api", "models", "some", "model", "tree", commit] if commit == COMMIT:
                files = [path for path in self.folder.iterdir() if path.is_file()]
                sizes = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                self.answer(json.dumps(sizes).encode())
            case ["some", "model", "resolve", commit, name] if commit == COMMIT and (self.folder / name).is_file():
                self.answer((self.folder / name).read_bytes(), ETag=f'"{name}"', **{"X-Repo-Commit": COMMIT})
            case _:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if "/some/model/" in path else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Keeps quiet."""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model on a hub that the real library downloads from, with files beside it that are no part of the model."""
    tokenizer = new_tokenizer("byte")
    folder = tmp_path / "on_the_hub"
    convert(saved(tmp_path / "ours.safetensors", trained(tokenizer, steps=0, **SHAPE), tokenizer), folder, to="hf")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "rust_model.ot").write_text("of others")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_by_its_revision(text, tmp_path, capsys, hub):
    assert main(["convert", "hf:some/model@abc123", str(tmp_path / "x.safetensors")]) == 0
    assert "/api/models/some/model/revision/abc123" in hub.asked
    assert not any(name.endswith((".py", ".ot", ".bin")) for name in hub.asked)
    assert main(["convert", "hf:some/model", str(tmp_path / "newest.safetensors")]) == 0
    assert f"hf:some/model is hf:some/model@{COMMIT} today" in capsys.readouterr().out
    assert main(["generate", "--ckpt", "hf:some/model", "--max-new-tokens=1"]) == 0
    # A run keeps which one it began with.
    assert fit(*own_run(text, tmp_path, "--trainer.max_steps=2"), "--init_from=hf:some/model") == 0
    kept = yaml.safe_load((tmp_path / "version_0/config.yaml").read_text())
    assert kept["init_from"] == f"hf:some/model@{COMMIT}"
    capsys.readouterr()
    for name, sentence in (("some/other", "RepositoryNotFoundError"), ("some/model@v9", "RevisionNotFoundError")):
        assert main(["convert", f"hf:{name}", str(tmp_path / "none.safetensors")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"hf:{name} could not be downloaded ({sentence}" in line


def test_a_model_of_the_hub_with_files_of_torch_alone_is_fetched_too(tmp_path, hub):
    torch.save(load_file(hub.folder / "model.safetensors"), hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    assert main(["convert", "hf:some/model", str(tmp_path / "x.safetensors")]) == 0


def test_without_the_library_of_the_hub_its_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["convert", "hf:some/model", str(tmp_path / "y.safetensors")]) == 2
    assert 'pip install "nanogpt_lit[hub]"' in capsys.readouterr().err


def test_prepare_makes_the_shards_that_the_run_then_takes(text, tmp_path, capsys, start):
    options = own_run(text, tmp_path, f"--init_from={start}", "--trainer.max_steps=2")
    assert main(["prepare", *options]) == 0
    assert "bpe:301" in capsys.readouterr().out
    assert fit(*options) == 0
    assert "preparing" not in capsys.readouterr().out


def test_plan_counts_the_network_that_is_tuned_and_tune_refuses_it(text, tmp_path, capsys, start):
    options = own_run(text, tmp_path, f"--init_from={start}")
    assert main(["plan", "--vram=4GiB", "--os=linux", "--json", *options]) == 0
    with_it = json.loads(capsys.readouterr().out)
    assert main(["plan", "--vram=4GiB", "--os=linux", "--json", *options, "--init_from=null", *WIDE]) == 0
    assert json.loads(capsys.readouterr().out) == with_it
    config = tmp_path / "x.yaml"
    config.write_text(f"init_from: {start}\n")
    assert main(["tune", f"--config={config}"]) == 2
    assert "begins with a trained model, and tune measures" in capsys.readouterr().err


def test_the_tokenizer_file_that_a_run_begins_with_says_the_same(tmp_path):
    tokenizer = new_tokenizer("pattern")
    path = Path(option_of(tokenizer, tmp_path / "root"))
    assert path == Path(option_of(tokenizer, tmp_path / "root"))
    assert json.loads(path.with_suffix(".json").read_text())["specials"]["<|user|>"] == 301
    assert tokenizer_from_file(path).sha256 == tokenizer.sha256


def test_the_recorded_curve_is_of_the_recipe_as_it_is_and_does_not_turn_up():
    """Half an hour of a CPU, by scripts/finetune_curve.py."""
    spec = importlib.util.spec_from_file_location("finetune_curve", ROOT / "scripts/finetune_curve.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = json.loads((ROOT / "docs/finetune.json").read_text())
    assert record["recipe"] == script.recipe(), "docs/finetune.json is of an earlier recipe"
    steps, losses = zip(*record["validation"], strict=True)
    assert list(steps) == list(range(20, record["recipe"]["max_steps"] + 1, 20))
    assert sorted([record["before"], *losses], reverse=True) == [record["before"], *losses]
    told = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert all(f"{loss:.3f}" in told for loss in (record["before"], losses[0], losses[-1]))
