"""Known formats of others are named, and never called damaged."""

import json
import pickle
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nanogpt_lit.__main__ import main


def a_gguf(path, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("x", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def a_folder(path, name):
    path.mkdir()
    (path / name).write_text("{}")


def a_zip(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


FILES = {
    "NumPy's zip": (lambda p: np.savez(p.open("wb"), x=np.zeros(3)), "arrays of NumPy (.npz)"),
    "Keras": (lambda p: a_zip(p, "config.json", "model.weights.h5"), "a model of Keras"),
    "zip": (lambda p: a_zip(p, "model.safetensors"), "a zip archive; unpack it"),
    "weights of torch": (lambda p: torch.save({"w": torch.zeros(1)}, p), "without the network that its weights are of"),
    "another's checkpoint": (
        lambda p: torch.save({"state_dict": {"w": torch.zeros(1)}, "epoch": 3}, p),
        "another program than Lightning's",
    ),
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>"), "a web page, saved in the place of a file"),
    "Git LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "a pointer of Git LFS"),
    "GGUF of no network": (a_gguf, "has a tokenizer of type None"),
    "GGUF with absurd counts": (lambda p: p.write_bytes(b"GGUF" + b"\xff" * 64), "a GGUF file in version 4294967295"),
    "GGUF of another architecture": (lambda p: a_gguf(p, "mamba"), "of the architecture 'mamba'; convert reads gpt2"),
    "NumPy": (lambda p: np.save(p.open("wb"), np.zeros(3)), "an array of NumPy"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({})), "a pickle, which could run code"),
    "old torch": (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "a pickle, which could run code"),
    "safetensors": (lambda p: save_file({"w": torch.zeros(1)}, p), "weights without their network; give the folder"),
    "LoRA": (lambda p: save_file({"x.lora_A.weight": torch.zeros(1)}, p), "a LoRA adapter of PEFT"),
    "LitGPT": (lambda p: a_folder(p, "lit_model.pth"), "a checkpoint of LitGPT"),
    "OpenAI": (lambda p: a_folder(p, "encoder.json"), "GPT-2 as OpenAI published it"),
    "adapter": (lambda p: a_folder(p, "adapter_config.json"), "holds a PEFT adapter"),
    "text": (lambda p: p.write_text(json.dumps({"a": 1})), "of none of the formats that"),
    "nothing": (lambda p: p.write_bytes(b""), "only the beginning of a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_named_in_one_sentence(tmp_path, capsys, name):
    write, sentence = FILES[name]
    write(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert "damaged" not in line
    assert "nanogpt_lit convert" not in line  # which is the command that was just given


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out.safetensors")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text", "GGUF of no network", "weights of torch", "pickle"])
def test_it_is_named_where_a_run_should_begin_from_it(tmp_path, capsys, name):
    write, sentence = FILES[name]
    write(tmp_path / "theirs")
    assert (
        main(["fit", f"--init_from={tmp_path / 'theirs'}", "--trainer.max_steps=9", "--model.schedule.warmup_steps=1"])
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert sentence in line


def test_a_damaged_file_of_torch_is_called_so(tmp_path, capsys):
    torch.save({"model_args": {}, "model": {}, "iter_num": 1}, tmp_path / "ckpt.pt")
    content = bytearray((tmp_path / "ckpt.pt").read_bytes())
    content[content.index(b"model_args")] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "is a damaged file of torch.save (BadZipFile)" in capsys.readouterr().err
