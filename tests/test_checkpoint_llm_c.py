"""llm.c's model files, against a file written by hand from transformers' GPT-2 in the order of train_gpt2.c."""

import os

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import load_network

V, PADDED, T, L, H, C = 257, 384, 16, 2, 3, 48
PARTS = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias")
PARTS += ("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)).eval()


def write(path, model, dtype=torch.float32, **header):
    numbers = {"magic": 20240326, "version": 3 if dtype == torch.float32 else 5, "T": T, "V": V, "L": L, "H": H, "C": C}
    numbers = {**numbers, "padded": PADDED, **header}
    weights = model.transformer.state_dict()
    ordered = [torch.cat([weights["wte.weight"], torch.zeros(PADDED - V, C)]), weights["wpe.weight"]]
    for part in PARTS:  # each of all layers; Conv1D's matrices turned to (out, in)
        tensors = [weights[f"h.{layer}.{part}"] for layer in range(L)]
        ordered += [tensor.t() if tensor.dim() == 2 else tensor for tensor in tensors]
    ordered += [weights["ln_f.weight"], weights["ln_f.bias"]]
    with path.open("wb") as file:
        file.write(np.array([*numbers.values()] + [0] * (256 - len(numbers)), dtype="<i4").tobytes())
        for tensor in ordered:
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_of_llm_c_computes_what_transformers_computes(tmp_path, capsys, model, dtype, tolerance):
    source = write(tmp_path / "gpt2.bin", model, dtype)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--tokenizer", "byte"]) == 0
    assert "a model of llm.c; 2 layers, 3 heads, 48 channels, block 16, vocabulary 257" in capsys.readouterr().out
    gpt, _ = load_network(tmp_path / "x.safetensors")
    tokens = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(gpt(tokens), model(tokens).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "in version 2; 3 (float32) and 5 (bfloat16) can be read"),
        ({"L": -1}, "whose header makes no sense"),
        ({"V": 1000}, "whose header makes no sense"),
        ({"L": 2**31 - 1}, "it is cut short"),
        ({"C": 2**31 - 1}, "it is cut short"),
        ({"H": 5}, "does not divide into n_head=5 equal heads"),
        ({"magic": 20240520}, "it is token shards of llm.c; data.source reads"),
        ({"magic": 20240527}, "it is llm.c's optimizer state"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_in_one_sentence(tmp_path, capsys, model, change, sentence):
    source = write(tmp_path / "gpt2.bin", model, **change)
    named = [] if "magic" in change else ["--tokenizer", "byte"]
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), *named]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


@pytest.mark.parametrize("length", [4, 500, 1024, 5000])
def test_a_file_that_is_cut_short_is_refused_in_one_sentence(tmp_path, capsys, model, length):
    source = write(tmp_path / "gpt2.bin", model)
    os.truncate(source, length)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--tokenizer", "byte"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cut short" in line or "the beginning of a model of llm.c" in line
