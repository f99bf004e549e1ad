"""A real network of 30 layers, from a GGUF file of 4 bits: read by us, by transformers and by llama.cpp.

What is compared is what the file holds, dequantised to float32; the network as it was published was rounded to make it.
"""

import pytest
import torch
from small_networks import LANGUAGES
from test_checkpoint_gguf import answer, asked, server
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.data.conversations import Chat

pytestmark = pytest.mark.long

PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):\n", "1, 2, 3, 4,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)  # fmt: skip
NEW = 64


@pytest.fixture(scope="module")
def read(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "ours.safetensors"
    assert main(["convert", str(smollm2), str(path)]) == 0
    return path, *load_network(path)


def compared(gpt, tokenizer, there, prompt):
    """Of llama.cpp's likeliest continuation: how many tokens are ours as well, after the same text, and how far apart
    the two likeliest of ours are where they are not; all differences of the five largest log-probabilities."""
    said = answer(there, prompt, NEW)
    prompted = tokenizer.encode(prompt).tolist()
    tokens = torch.tensor([prompted + [entry["id"] for entry in said]])
    with torch.no_grad():
        ours = gpt(tokens)[0, len(prompted) - 1 : -1].log_softmax(-1)
    differences = [
        abs(other["logprob"] - float(ours[n, other["id"]]))
        for n, entry in enumerate(said)
        for other in entry["top_logprobs"]
    ]
    ours[:, list(tokenizer.ends)] = -torch.inf  # it is asked to go on where it would end
    chosen = torch.tensor([entry["id"] for entry in said])
    gaps = ours.max(dim=-1).values - ours.gather(1, chosen[:, None])[:, 0]
    return int((gaps == 0).sum()), float(gaps.max()), differences


def test_its_weights_are_those_that_transformers_reads_and_the_logits_of_our_folder_are_ours(read, smollm2, tmp_path):
    path, gpt, tokenizer = read
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    weights = gpt.state_dict()
    assert theirs.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())
    convert(path, tmp_path / "hf", to="hf")
    model, there = (Auto.from_pretrained(tmp_path / "hf") for Auto in (AutoModelForCausalLM, AutoTokenizer))
    tokens = torch.randint(0, 49_152, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, logits = gpt(tokens), model.eval()(tokens).logits
    assert torch.allclose(logits, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))  # of size 34, in another order
    messages = [{"role": "user", "content": "Hi 12"}]
    text = there.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text == Chat(tokenizer).render(messages, add_generation_prompt=True)
    for sample in (*LANGUAGES, text):
        assert there(sample)["input_ids"] == tokenizer.encode(sample).tolist()


def test_llama_cpp_says_the_same_as_far_as_4_bits_and_float32_agree(read, smollm2, tmp_path):
    """With the 4-bit file llama.cpp rounds what goes into a matrix to 8 bits, and with ours in float32 it does not."""
    path, gpt, tokenizer = read
    there = server(smollm2, 1024)
    for sample in (*LANGUAGES, *PROMPTS, "a  1 b\n 23  "):
        question = {"content": sample, "add_special": True, "parse_special": True}
        assert asked(there, "tokenize", question)["tokens"] == tokenizer.encode(sample).tolist()
    same, gaps, differences = zip(*(compared(gpt, tokenizer, there, prompt) for prompt in PROMPTS), strict=True)
    every = [difference for one in differences for difference in one]
    report = f"{sum(same)} of {NEW * len(PROMPTS)} tokens; log-probabilities differ by {max(every):.2f} at most, "
    report += f"{sum(every) / len(every):.3f} in the mean; gaps up to {max(gaps):.2f}"
    print(report)
    assert sum(same) >= 0.95 * NEW * len(PROMPTS), report
    assert max(every) < 1, report
    assert max(gaps) < 0.5, report  # another token only where two are about as likely
    del there
    convert(path, tmp_path / "float32.gguf")
    exact = server(tmp_path / "float32.gguf", 1024)
    for prompt in PROMPTS:
        same_here, _, apart = compared(gpt, tokenizer, exact, prompt)
        assert same_here == NEW
        assert max(apart) < 2e-3
