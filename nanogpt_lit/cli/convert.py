"""`convert`: its arguments. It imports torch late."""

from pathlib import Path

from nanogpt_lit.cli.options import parser_of


def convert(arguments: list[str]) -> int:
    """`convert FROM TO`: a checkpoint from or to a format of others."""
    parser = parser_of(
        "convert",
        "Writes the checkpoint FROM anew as TO. FROM is a checkpoint of nanogpt_lit, a .ckpt of Lightning's Trainer, a "
        "folder of accelerate's save_state, a Hugging Face folder of GPT-2, Llama or Qwen3, a GGUF file of llama.cpp, "
        "nanoGPT's ckpt.pt, or a model of llm.c; which, is seen from its content.",
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
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16", "q8_0"], help="of the matrices in FILE.gguf (f32)")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, byte or FILE.tiktoken, for a FROM that holds none")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the YAML of the run, and more options of fit, for a FROM of your own loop (accelerate's save_state, "
        "Lightning's Trainer), which does not say what network and data it belongs to",
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
        from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

        quiet_lightning()
        described = SettingsCLI(args=[f"--config={options.config}", *settings_of_fit]).described()
    for line in convert(source, options.target, options.to, options.dtype, options.tokenizer, described):
        print(line)
    return 0
