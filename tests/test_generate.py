import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from nanogpt_lit.data.tokenizer import ByteTokenizer
from nanogpt_lit.gpt.attention import KeyValueCache, LayerCache
from nanogpt_lit.gpt.generate import candidates, generate, sample
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
BLOCK, V = 16, 50
PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.5)  # far from uniform: the likeliest token wins by more than float32 noise
    return gpt


def run(gpt: GPT, tokens: torch.Tensor, n: int, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(gpt, tokens, n, generator=generator, **options)), dim=1)  # (B, n)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_cached_logits_equal_uncached_ones_at_every_position(gpt):
    tokens = torch.randint(V, (3, BLOCK), generator=seeded())
    cache = KeyValueCache(gpt.config.n_layer, BLOCK)
    with torch.no_grad():
        full = gpt(tokens)
        parts = [gpt.lm_head(gpt.hidden(part, cache)) for part in (tokens[:, :7], *tokens[:, 7:].split(1, dim=1))]
    assert cache.length == BLOCK
    # The same products in matrices of another shape, so in another order: float32 noise on logits of order 1 to 10.
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("prompt_length", [1, 5, BLOCK, BLOCK + 7])
def test_cached_tokens_equal_uncached_ones_far_beyond_the_block(gpt, options, prompt_length):
    prompt = torch.randint(V, (3, prompt_length), generator=seeded(1))
    n = 3 * BLOCK
    assert torch.equal(run(gpt, prompt, n, **options), run(gpt, prompt, n, use_cache=False, **options))


def test_context_rule_is_crop_the_prompt_then_restart_from_half_a_block(gpt):
    prompt = torch.randint(V, (2, BLOCK + 3), generator=seeded(2))
    context, expected = prompt[:, -BLOCK:], []
    for _ in range(3 * BLOCK):
        token = gpt(context)[:, -1].argmax(dim=-1)
        expected.append(token)
        context = torch.cat([context, token[:, None]], dim=1)
        if context.size(1) > BLOCK:
            context = context[:, -BLOCK // 2 :]
    assert torch.equal(run(gpt, prompt, 3 * BLOCK, temperature=0), torch.stack(expected, dim=1))


def test_cached_model_reads_each_token_once_and_half_a_block_when_full(gpt, monkeypatch):
    lengths = []
    hidden = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda tokens, *rest: lengths.append(tokens.size(1)) or hidden(tokens, *rest))
    run(gpt, PROMPT, 30)
    # 5 of the prompt and 12 new ones overflow 16: 8 are read again; 9 new ones overflow it once more.
    assert lengths == [5, *[1] * 11, 8, *[1] * 8, 8, *[1] * 8]


def test_a_block_of_one_token_works():
    gpt = GPT(GPTConfig(block_size=1, vocab_size=V, n_layer=1, n_head=1, n_embd=4))
    assert torch.equal(run(gpt, PROMPT, 4), run(gpt, PROMPT, 4, use_cache=False))


def test_rows_of_a_batch_do_not_see_each_other(gpt):
    together = run(gpt, PROMPT, 40, temperature=0)
    apart = [run(gpt, row[None], 40, temperature=0) for row in PROMPT]
    assert torch.equal(together, torch.cat(apart))


class AsItComes(LayerCache):
    """Keys and values in their own dtype."""

    def append(self, k, v):
        keys = [k] if self.keys is None else [self.keys, k]
        values = [v] if self.values is None else [self.values, v]
        self.keys, self.values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self.length += k.size(2)
        return self.keys, self.values


@pytest.mark.parametrize("prompt_length", [5, 140])  # attention is computed in float32 for up to 128 queries
def test_keys_of_a_bfloat16_network_wait_in_float32_on_a_cpu_and_no_bit_changes(prompt_length):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=160, vocab_size=V, n_layer=2, n_head=2, n_embd=32)).bfloat16()
    tokens = torch.randint(V, (2, prompt_length + 8), generator=seeded())
    kept, plain = KeyValueCache(2, 160), KeyValueCache(2, 160)
    plain.layers = [AsItComes(160) for _ in range(2)]
    with torch.no_grad():
        for part in (tokens[:, :prompt_length], *tokens[:, prompt_length:].split(1, dim=1)):
            assert torch.equal(gpt.hidden(part, kept), gpt.hidden(part, plain))
    assert kept.layers[0].keys.dtype == kept.layers[0].values.dtype == torch.float32
    assert plain.layers[0].keys.dtype == torch.bfloat16


def test_top_k_of_one_and_tiny_top_p_are_greedy(gpt):
    greedy = run(gpt, PROMPT, 40, temperature=0)
    assert torch.equal(run(gpt, PROMPT, 40, top_k=1), greedy)
    assert torch.equal(run(gpt, PROMPT, 40, top_p=1e-6), greedy)


def naive_distribution(logits, temperature, top_k, top_p):
    """{id: probability} by the book: sort, keep k, add until p is reached, normalise."""
    ranked = sorted(((math.exp(logit / temperature), i) for i, logit in enumerate(logits)), reverse=True)
    ranked = ranked[:top_k]
    total = sum(weight for weight, _ in ranked)
    kept, mass = {}, 0.0
    for weight, i in ranked:
        if top_p not in (None, 1.0) and mass >= top_p:
            break
        kept[i] = weight
        mass += weight / total
    return {i: weight / sum(kept.values()) for i, weight in kept.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.75, 1.0])
def test_candidates_equal_a_naive_reference(temperature, top_k, top_p):
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.0], [0.0, 0.5, -5.0, 4.0, 1.5, -1.0]])
    weights, ids = candidates(logits, temperature, top_k, top_p)
    for row, row_weights, row_ids in zip(logits.tolist(), weights, ids, strict=True):
        drawn = {int(i): w for i, w in zip(row_ids, (row_weights / row_weights.sum()).tolist(), strict=True) if w > 0}
        # float32 against Python's float64
        assert drawn == pytest.approx(naive_distribution(row, temperature, top_k, top_p), rel=1e-5)


def test_samples_follow_the_distribution():
    row = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.0])
    n = 20_000
    drawn = sample(row.expand(n, -1), 0.8, 4, 0.9, seeded())
    for i, probability in naive_distribution(row.tolist(), 0.8, 4, 0.9).items():
        # Four standard errors of a frequency over n draws; the seed is fixed, so it either holds or does not.
        error = 4 * math.sqrt(probability * (1 - probability) / n)
        assert (drawn == i).float().mean().item() == pytest.approx(probability, abs=error)


def test_padded_ids_are_never_drawn(gpt):
    with torch.no_grad():
        padded = GPT(gpt.config)
        padded.load_state_dict(gpt.state_dict())
        padded.lm_head.weight[V - 10 :] *= 20  # the padding would win almost every draw
    assert run(padded, PROMPT, 60, temperature=1.5).max() >= V - 10
    assert run(padded, PROMPT, 60, temperature=0).max() >= V - 10
    assert run(padded, PROMPT, 60, temperature=1.5, vocab_size=V - 10).max() < V - 10
    assert run(padded, PROMPT, 60, temperature=0, vocab_size=V - 10).max() < V - 10


def test_same_seed_same_text_other_seed_other_text(gpt):
    first = run(gpt, PROMPT, 40, seed=1, temperature=1.0)
    assert torch.equal(first, run(gpt, PROMPT, 40, seed=1, temperature=1.0))
    assert not torch.equal(first, run(gpt, PROMPT, 40, seed=2, temperature=1.0))


def test_without_a_generator_each_call_draws_anew_and_the_global_one_rests(gpt):
    before = torch.get_rng_state()
    first, second = (torch.stack(list(generate(gpt, PROMPT, 40, temperature=2.0))) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_come_back_even_when_the_caller_stops_early(gpt):
    gpt.train()
    gpt.transformer.drop.eval()
    before = [module.training for module in gpt.modules()]
    for stop in ("end", "close", "error"):
        stream = generate(gpt, PROMPT, 5)
        assert [module.training for module in gpt.modules()] == before  # nothing happens before the first token
        next(stream)
        assert not any(module.training for module in gpt.modules())
        if stop == "end":
            assert len(list(stream)) == 4
        elif stop == "close":
            stream.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        assert [module.training for module in gpt.modules()] == before
    gpt.eval()


def test_gradients_stay_on_in_the_caller_and_off_in_the_model(gpt):
    for token in islice(generate(gpt, PROMPT, 10), 3):
        assert torch.is_grad_enabled()
        assert token.dtype == torch.int64
        assert token.shape == (2,)
        assert not token.requires_grad
        assert not token.is_inference()


def test_autocast_is_respected_with_and_without_the_cache(gpt):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(gpt, PROMPT, 20).shape == run(gpt, PROMPT, 20, use_cache=False).shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "--temperature=-0.5"),
        ({"temperature": math.nan}, "--temperature=nan"),
        ({"temperature": math.inf}, "--temperature=inf"),
        ({"top_k": 0}, "--top-k=0"),
        ({"top_p": 0.0}, "--top-p=0.0"),
        ({"top_p": 1.5}, "--top-p=1.5"),
        ({"max_new_tokens": 0}, "--max-new-tokens=0"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "--prompt"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_the_first_token(gpt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt, **{"tokens": PROMPT, "max_new_tokens": 5, **options})


@pytest.mark.long
def test_the_time_of_a_token_is_measured_beside_transformers_and_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_generate_others as bench

    tiny = GPTConfig(n_layer=1, n_head=1, n_embd=32)
    monkeypatch.setattr(bench, "SIZES", {"tiny": (tiny, ByteTokenizer)})
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda threads: None)
    out = tmp_path / "record.json"
    bench.main(
        [f"--work={tmp_path / 'models'}", "--threads=1", "--prompt=5", "--tokens=3", "--turns=1", f"--json={out}"]
    )
    measured = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [run["precision"] for run in measured] == ["float32", "bfloat16"]
    for run in measured:
        assert list(run["ms"]) == ["ours", "transformers", "llama.cpp"]
        assert min(run["ms"].values()) > 0
    assert bench.between([1.0, 1.5, 3.0]) == 1000.0
