"""Networks exchanged with other programs: one that was trained elsewhere as a run of ours, the network of any run, and
what another program will compute otherwise.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.checkpoint.run_file import StoredNetwork
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import ByteTokenizer, Tokenizer, gpt2_tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_file
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.layers import Rotary
from nanogpt_lit.gpt.network import HEAD, Network, NetworkConfig
from nanogpt_lit.gpt.networks import build, config_of, described
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay

PREFIX = "gpt."
"""The prefix of the network's names in a module's state_dict()."""
GPT2_SIZES = (50257, 50304)
"""GPT-2's vocabulary, and the one that nanoGPT pads it to."""
LONGEST_BLOCK = 2**20
"""Tokens. A Llama has a table of all positions, which no weight in a file bears out."""


def new_run(
    path: Path,
    weights: Mapping[str, Tensor],
    config: NetworkConfig,
    tokenizer: Tokenizer,
    optim: AdamWConfig = AdamWConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
) -> RunState:
    """A run at step 0 of the network with these weights, under its own names and in any floating-point type.

    A tied head may be missing. Raises UserError, naming the file, where the weights are not those of the network.
    """
    gpt = network(path, weights, config)
    if tokenizer.vocab_size > gpt.embedding.num_embeddings:
        raise UserError(
            f"{path} has a vocabulary of {gpt.embedding.num_embeddings:,} and the tokenizer {tokenizer.name} one "
            f"of {tokenizer.vocab_size:,}; name the tokenizer it was trained with by --tokenizer."
        )
    optimizer = build_optimizer(gpt.named_parameters(), optim)
    rate = WarmupDecay(optimizer, schedule)
    return RunState(
        weights={PREFIX + name: tensor for name, tensor in gpt.state_dict().items()},
        hyper_parameters={**described(config), "optim": asdict(optim), "schedule": asdict(schedule)},
        data={"tokenizer": tokenizer.files()},
        optimizer=optimizer.state_dict(),
        schedule=rate.state_dict(),
        scaler=None,
        random=[],
        step=0,
        batches=0,
        processes=1,
        accumulate_grad_batches=1,
    )


def with_moments(path: Path, begun: RunState, optim: AdamWConfig, saved: Any) -> dict[str, Any]:
    """The optimizer's state of a run, with the moments of another of its kind.

    begun: by new_run   saved: its state_dict()
    Raises UserError for moments of another shape than their weights, or that stand in another order.
    """
    gpt = network_of(path, begun)
    groups = build_optimizer(gpt.named_parameters(), optim).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    try:
        state = {number: {**moments} for number, moments in saved["state"].items()}
        theirs, ours = ([len(group["params"]) for group in side] for side in (saved["param_groups"], groups))
        if theirs != ours:
            raise ValueError(f"groups of {theirs} parameters where LitNanoGPT has {ours}")
        for number, moments in state.items():
            if "step" in moments:
                moments["step"] = torch.as_tensor(moments["step"], dtype=torch.float32)
            for name, moment in moments.items():
                matters = isinstance(moment, Tensor) and moment.dim() and optim.state_bits == 32
                if matters and moment.shape != parameters[number].shape:
                    raise ValueError(f"{name} {number} has shape {tuple(moment.shape)}")
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{path} holds an optimizer that is not ours for its network ({error}); fit --init_from begins a run with "
            "the weights alone."
        ) from error
    return {**begun.optimizer, "state": state}


def network(path: Path, weights: Mapping[str, Tensor], config: NetworkConfig) -> Network:
    """The network, in float32 and in eval mode."""
    # Before it is built: a number that lies must not make us build for hours.
    if config.n_layer > len(weights):
        raise UserError(f"{path} says n_layer={config.n_layer} and holds {len(weights)} tensors.")
    if config.block_size > LONGEST_BLOCK:
        raise UserError(f"{path} is for {config.block_size:,} tokens at a time; {LONGEST_BLOCK:,} is the most.")
    weights = dict(weights)
    with torch.device("meta"):
        gpt = build(config)
    if config.tied_head:
        head, embedding = weights.get(HEAD), weights.get(gpt.EMBEDDING)
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise UserError(f"{path} says that {HEAD} is tied to {gpt.EMBEDDING}, and the two differ.")
        weights.pop(HEAD, None)
    elsewhere = {name: tensor.shape for name, tensor in weights.items()}
    expected = {name: tensor.shape for name, tensor in gpt.state_dict().items() if not config.tied_head or name != HEAD}
    for name in sorted(expected.keys() | elsewhere.keys()):
        if name not in elsewhere:
            raise UserError(f"{path} lacks {name}, which the network that it describes has.")
        if name not in expected:
            raise UserError(f"{path} has {name}, which the network that it describes lacks.")
        if elsewhere[name] != expected[name]:
            raise UserError(
                f"{path} has {name} of shape {tuple(elsewhere[name])}, and the network that it describes has "
                f"{tuple(expected[name])}."
            )
        if not weights[name].is_floating_point():
            raise UserError(f"{path} has {name} in {weights[name].dtype}; floating-point weights can be read.")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path} has numbers in {name} that are not finite.")
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    if config.tied_head:
        tensors[HEAD] = tensors[gpt.EMBEDDING]
    gpt.load_state_dict(tensors, assign=True)
    gpt.tie()
    for module in gpt.modules():
        if isinstance(module, Rotary):
            module.fill()  # no checkpoint holds the angles, which follow from the shape
    return gpt.eval()


def network_of(path: Path, run: RunState | StoredNetwork) -> Network:
    """The network of a run. Raises UserError for the run of another module."""
    try:
        config = config_of(run.hyper_parameters)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds another network than LitNanoGPT's, which only the formats of Lightning and accelerate carry."
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return network(path, {name.removeprefix(PREFIX): tensor for name, tensor in run.weights.items()}, config)


def chosen_tokenizer(path: Path, vocab_size: int, named: str | None) -> Tokenizer:
    """The tokenizer of a network that brings none. Raises UserError where neither its name nor the vocabulary tells."""
    match named:
        case None if vocab_size in GPT2_SIZES:
            return gpt2_tokenizer()
        case None:
            raise UserError(
                f"{path} holds no tokenizer, and a vocabulary of {vocab_size:,} is not GPT-2's; convert takes "
                "its name: --tokenizer gpt2, byte or FILE.tiktoken."
            )
        case "gpt2":
            return gpt2_tokenizer()
        case "byte":
            return ByteTokenizer()
        case file if file.endswith(".tiktoken") and Path(file).expanduser().is_file():
            return tokenizer_from_file(Path(file))
    raise UserError(f"--tokenizer={named} is neither gpt2, nor byte, nor a .tiktoken file that exists.")


def size(config: NetworkConfig) -> str:
    """The shape of a network in words."""
    kv_heads = getattr(config, "n_kv_head", None)
    shared = f" ({kv_heads} of keys and values)" if kv_heads else ""
    return (
        f"{config.n_layer} layers, {config.n_head} heads{shared}, {config.n_embd} channels, block {config.block_size}, "
        f"vocabulary {config.vocab_size:,}"
    )


@dataclass(frozen=True)
class Described:
    network: NetworkConfig
    optim: AdamWConfig
    schedule: ScheduleConfig
    tokenizer: Tokenizer
    order: Mapping[str, int]
    """The values that the order of samples is a function of: seed, block_size, batch_size."""
    accumulate_grad_batches: int

    @property
    def data(self) -> dict[str, Any]:
        """The data of a run, as TokenDataModule.state_dict() has it."""
        return {"tokenizer": self.tokenizer.files(), **self.order}

    def complete(self, state: RunState) -> RunState:
        """The run with the data and the tokens that its checkpoint did not know of."""
        data = {**self.data, **state.data}
        tokens = state.batches * state.processes * data["batch_size"] * data["block_size"]
        return replace(state, data=data, tokens=state.tokens or tokens)


# What another program cannot express, and what it computes otherwise, measured.


TEXTS, TOKENS = 4, 256


def gpt2_config(path: Path, gpt: Network, name: str) -> GPTConfig:
    """The shape of a GPT-2. Raises UserError for another network, which the format called `name` cannot express."""
    if not isinstance(gpt, GPT):
        raise UserError(
            f"{path} holds a network of the Llama family (model.network=llama), which {name} cannot express; --to hf "
            "and --to gguf carry it."
        )
    return gpt.config


def measured_effect(gpt: Network, exported: Network, tokenizer: Tokenizer) -> str:
    """Both losses on text that the network writes itself, which needs no data and is what it is good at.

    exported: the network as the other program will compute it
    """
    start = torch.full((TEXTS, 1), tokenizer.eot)
    length = min(gpt.config.block_size, TOKENS)
    drawn = generate(
        gpt, start, length, temperature=1.0, generator=torch.Generator().manual_seed(1), vocab_size=tokenizer.vocab_size
    )
    text = torch.cat([start, *(tokens[:, None] for tokens in drawn)], dim=1)[:, : length + 1]  # (4, T + 1)
    here, there = loss(gpt, text), loss(exported, text)
    return f"on {TEXTS * length:,} tokens that it wrote itself the loss is {there:.4f} there and {here:.4f} here"


@torch.no_grad()
def loss(gpt: Network, text: Tensor) -> float:
    return float(F.cross_entropy(gpt.eval()(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))
