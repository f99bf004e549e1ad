"""`convert`: its arguments. It imports torch late."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_lit.cli.options import parser_of

if TYPE_CHECKING:
    from nanogpt_lit.checkpoint.exchange import Described


def convert(arguments: list[str]) -> int:
    """`convert FROM TO`: a checkpoint from or to a format of others."""
    parser = parser_of(
        "convert",
        "Convert the checkpoint FROM to TO. FROM is a checkpoint of nanogpt_lit, a .ckpt of Lightning's Trainer, a "
        "folder of accelerate's save_state, a Hugging Face folder of GPT-2, Llama or Qwen3, a GGUF file of llama.cpp, "
        "nanoGPT's ckpt.pt, or a model of llm.c; its content tells which.",
    )
    parser.add_argument("source", metavar="FROM", help="a file, a folder, or hf:OWNER/NAME[@REVISION] of the hub")
    parser.add_argument(
        "target",
        type=Path,
        metavar="TO",
        help="FILE.safetensors for nanogpt_lit (all loops), FILE.ckpt for Lightning, a name without suffix for "
        "accelerate's load_state; each with the whole state of the run",
    )
    parser.add_argument(
        "--to",
        choices=["hf", "gguf", "nanogpt"],
        help="hf: a folder for transformers' AutoModelForCausalLM and AutoTokenizer. gguf: FILE.gguf for llama.cpp, "
        "with a Modelfile for Ollama beside it. nanogpt: FILE.pt for nanoGPT's train.py and sample.py, of a GPT-2",
    )
    parser.add_argument(
        "--dtype", choices=["f32", "f16", "bf16", "q8_0"], help="dtype of the matrices in FILE.gguf (f32)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, byte or FILE.tiktoken, for a FROM that holds none")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the YAML of the run, and more options of fit if need be, for a FROM that a loop of your own saved "
        "(accelerate's save_state, Lightning's Trainer): it does not say which network and data it belongs to",
    )
    options, settings_of_fit = parser.parse_known_args(arguments[1:])
    if settings_of_fit and options.config is None:
        parser.error(f"unrecognized arguments: {' '.join(settings_of_fit)}")

    from nanogpt_lit.checkpoint.convert import convert, fetched

    source, pinned = fetched(options.source)
    if pinned != options.source:
        print(f"{options.source} is {pinned} today")
    described = None
    if options.config is not None:
        described = described_by([f"--config={options.config}", *settings_of_fit])
    for line in convert(source, options.target, options.to, options.dtype, options.tokenizer, described):
        print(line)
    return 0


def described_by(settings_of_fit: list[str]) -> "Described":
    """Describe a run by its YAML. Raises UserError where a tokenizer that is made from text is not made yet."""
    from nanogpt_lit.checkpoint.exchange import Described, chosen_tokenizer
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
    from nanogpt_lit.data.datamodule import ORDER_FIELDS
    from nanogpt_lit.data.tokenizer_files import parse_tokenizer
    from nanogpt_lit.gpt.networks import config_of, section_of
    from nanogpt_lit.optim.adamw import AdamWConfig
    from nanogpt_lit.optim.schedule import ScheduleConfig

    quiet_lightning()
    cli = SettingsCLI(args=settings_of_fit)
    settings, data = cli.settings, cli.data_module()
    name = settings.data.tokenizer
    made_of_text = parse_tokenizer(name)[0] in ("char", "bpe")
    tokenizer = data.tokenizer if made_of_text else chosen_tokenizer(Path(name), 0, name)
    vocab_size = settings.model[section_of(settings.model)].vocab_size or tokenizer.vocab_size
    return Described(
        network=config_of(settings.model, vocab_size=vocab_size),
        optim=AdamWConfig(**settings.model.optim),
        schedule=ScheduleConfig(**settings.model.schedule),
        tokenizer=tokenizer,
        order={name: settings.data[name] for name in ORDER_FIELDS},
        accumulate_grad_batches=settings.trainer.accumulate_grad_batches,
    )
