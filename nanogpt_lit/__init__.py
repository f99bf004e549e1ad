"""Train a GPT-2-class NanoGPT on a 4 GB laptop."""
