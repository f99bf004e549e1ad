"""The networks there are, and the one that a YAML's or a checkpoint's `model` section describes."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.llama import Llama, LlamaConfig
from nanogpt_lit.gpt.network import Network, NetworkConfig

NETWORKS: dict[str, tuple[type[NetworkConfig], type[Network]]] = {
    "gpt2": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}
"""Config and network, by the name that model.network has in the YAML."""

ONCE_IN_GPT2 = {"positions": "learned", "qk_norm": False, "activation": "gelu"}
"""Fields that GPTConfig had before 0.2, with the value that is GPT-2's."""


def section_of(model: Mapping[str, Any]) -> str:
    """The section with the network's shape: "gpt" or "llama". Raises UserError for a network that is not known."""
    name = model.get("network", "gpt2")
    if name not in NETWORKS:
        raise UserError(f"model.network={name!r} is not known; use {' or '.join(NETWORKS)}.")
    return NETWORKS[name][0].SECTION


def config_of(model: Mapping[str, Any], **changes: Any) -> NetworkConfig:
    """The shape of a network, from the `model` section of a YAML or the hyperparameters of a checkpoint.

    changes: of its fields
    Raises UserError for a network that this version does not have.
    """
    section = section_of(model)
    kind, _ = NETWORKS[model.get("network", "gpt2")]
    saved = {**model[section], **changes}
    if kind is GPTConfig:
        for name, published in ONCE_IN_GPT2.items():
            if saved.pop(name, published) != published:
                raise UserError(
                    f"the checkpoint's network has model.gpt.{name}={model[section][name]}, which nanogpt_lit had "
                    "before 0.2 and no published network has; use the version that wrote it, or train one with "
                    "model.network=llama."
                )
    for name in saved.keys() - {field.name for field in fields(kind)}:
        raise UserError(
            f"the checkpoint's network has model.{section}.{name}={saved[name]}, which this version of nanogpt_lit "
            "does not know; use the version that wrote it."
        )
    return kind(**saved)


def described(config: NetworkConfig) -> dict[str, Any]:
    """The network's name, and the section with its shape, as config_of reads them."""
    name = next(name for name, (kind, _) in NETWORKS.items() if kind is type(config))
    return {"network": name, config.SECTION: asdict(config)}


def network_class(config: NetworkConfig) -> type[Network]:
    """The network of that shape."""
    return next(network for kind, network in NETWORKS.values() if kind is type(config))


def build(config: NetworkConfig) -> Network:
    """The network, with new weights."""
    return network_class(config)(config)


def check_same_network(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint holds another network. saved, here: as config_of reads them"""
    before, now = described(config_of(saved)), described(config_of(here))
    section = section_of(here)
    if before["network"] != now["network"]:
        differing = [f"network is {before['network']} there and {now['network']} here"]
    else:
        differing = [
            f"{section}.{name} is {before[section][name]} there and {value} here"
            for name, value in now[section].items()
            if before[section][name] != value and name not in ("dropout", "document_start", "document_end")
        ]
    if differing:
        raise UserError(
            f"The checkpoint holds another network: model.{', '.join(differing)}; use the YAML that it was trained "
            "with."
        )
