"""The number of times that a run may read its text before it learns the text by heart, and settings for more."""

from nanogpt_lit.gpt.network import Network
from nanogpt_lit.optim.adamw import AdamWConfig

READINGS = {"muon": 12.0, "adamw": 72.0}
"""Readings after which the validation loss turns, where the text has as many tokens as the network parameters, by the
optimizer of the matrices: a text that Muon learns by heart takes AdamW six times as many readings."""
DECAY = {"muon": (3.0, 5e-3), "adamw": (1.0, 2e-3)}
"""Weight decay of the recipe `limited` (docs/recipes.md), and the matrices' learning rate at which it was measured."""
STEPS_OF_A_READING = 39
"""Steps in which the text was read once where that was measured."""
DROPOUT, OFTEN = 0.1, 3.0
"""Dropout beside it, where a text is read so many times as often as a network without either gains from."""


def useful_readings(parameters: int, tokens: int, matrices: str) -> float:
    """Readings of a text of so many tokens from which a network without dropout gains.

    A rule of thumb between what scripts/small_texts.py measures: with 3 parameters a token the loss of characters
    turns after 6 readings with Muon and 36 with AdamW, and with 5 that of code after 3 and 18. Never fewer than 4,
    which are worth nearly as much as new text (Muennighoff et al., arXiv:2305.16264).
    """
    return max(4.0, READINGS[matrices] * (tokens / parameters) ** 0.5)


def limited(gpt: Network, readings: float, steps: int, tokens: int, optim: AdamWConfig) -> dict[str, float]:
    """Settings of the recipe `limited` for a run that reads its text too often, by their keys in a YAML.

    The longer a reading takes, the less decay is best: in proportion to its steps where Wang and Aitchison measured it
    (arXiv:2405.13698), and to the 2/3rd power of them between the two sizes of docs/recipes.md. It acts by the product
    with the learning rate. No larger one is named than was measured.

    Empty where the run does not read too often, or has dropout or half that decay already. An optimizer of class_path
    gets dropout alone: SGD's weight decay, say, is another thing.

    readings: of the text in the whole run   steps: of the whole run   tokens: in the text
    """
    useful = useful_readings(gpt.parameter_count(non_embedding=False), tokens, optim.matrices)
    if readings <= useful or gpt.config.dropout >= DROPOUT / 2:
        return {}
    decay, measured_at = DECAY[optim.matrices]
    share = measured_at / (optim.muon_lr or optim.lr) * (STEPS_OF_A_READING * readings / steps) ** (2 / 3)
    decay = float(f"{decay * min(1.0, share):.1g}")
    settings = {}
    if optim.class_path is None and optim.weight_decay < decay / 2:
        settings["model.optim.weight_decay"] = decay
    if optim.class_path is not None or readings > OFTEN * useful:
        settings[gpt.config.key("dropout")] = DROPOUT
    return settings


def overfitting(gpt: Network, readings: float, steps: int, tokens: int, optim: AdamWConfig) -> str | None:
    """A sentence where a run reads its text too often; None where `limited` has nothing to set."""
    settings = limited(gpt, readings, steps, tokens, optim)
    if not settings:
        return None
    useful = useful_readings(gpt.parameter_count(non_embedding=False), tokens, optim.matrices)
    return (
        f"text: {tokens:,} tokens will be read {readings:,.0f} times, and after about {useful:,.0f} a network of this "
        "size begins to learn them by heart; the recipe limited of docs/recipes.md "
        f"({' and '.join(f'{key}={value:g}' for key, value in settings.items())}) goes on learning from them"
    )
