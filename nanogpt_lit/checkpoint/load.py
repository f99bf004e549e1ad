"""A checkpoint read for its network alone."""

from pathlib import Path

import torch

from nanogpt_lit.checkpoint.run_file import load_stored_network
from nanogpt_lit.data.tokenizer import Tokenizer, tokenizer_from_files
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT, config_of_checkpoint


def load_network(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """The network of a checkpoint, in eval mode, and the tokenizer that it was trained with.

    Raises UserError, naming the file, for anything that is not a whole checkpoint of this project.
    """
    stored = load_stored_network(path)
    weights = {name.removeprefix("gpt."): tensor for name, tensor in stored.weights.items()}
    try:
        with torch.device("meta"):
            gpt = GPT(config_of_checkpoint(stored.hyper_parameters["gpt"]))
        # assign: the network is never initialised, it takes the tensors of the file as they are.
        gpt.load_state_dict(weights, assign=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds another network than LitNanoGPT's, which generate cannot run.") from error
    return gpt.to(device).eval(), tokenizer_from_files(stored.tokenizer_files)
