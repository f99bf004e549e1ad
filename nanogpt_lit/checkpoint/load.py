"""A checkpoint read for its network alone, without Lightning."""

import pickle
from pathlib import Path

import torch

from nanogpt_lit.data.tokenizer import Tokenizer, tokenizer_from_files
from nanogpt_lit.gpt.model import GPT, GPTConfig


def load_network(path: Path, device: str = "cpu") -> tuple[GPT, Tokenizer]:
    """The network of a Lightning checkpoint, in eval mode, and the tokenizer that it was trained with.

    Raises ValueError, naming the file, for anything that is not a checkpoint of this project.
    """
    if not path.is_file():
        raise ValueError(f"--ckpt {path} does not exist; fit writes best.ckpt and last.ckpt, and prints where.")
    try:
        # weights_only: the file may come from elsewhere, and an ordinary pickle can run code.
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        config = GPTConfig(**checkpoint["hyper_parameters"]["gpt"])
        weights = checkpoint["state_dict"]
        tokenizer_files = checkpoint["TokenDataModule"]["tokenizer"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(
            f"--ckpt {path} is damaged or is not a checkpoint that fit wrote ({type(error).__name__}); "
            "try last.ckpt beside it."
        ) from error
    with torch.device("meta"):
        gpt = GPT(config)
    # assign: the network is never initialised, it takes the tensors of the file as they are.
    gpt.load_state_dict({name.removeprefix("gpt."): tensor for name, tensor in weights.items()}, assign=True)
    return gpt.to(device).eval(), tokenizer_from_files(tokenizer_files)
