"""`prepare`: what fit does first, by itself. It imports torch late."""

from nanogpt_lit.cli.options import program


def prepare(arguments: list[str]) -> int:
    """`prepare --config FILE`: what fit does first, by itself."""
    if set(arguments[1:]) & {"-h", "--help"}:
        print(
            f"usage: {program()} prepare --config FILE [--data.source TEXT] [--data.KEY VALUE ...]\n\n"
            "Turn the text of data.source into token shards in data.shards_dir, as fit does when they are missing.\n"
            "Takes every option of fit, so that both read the same YAML; `fit --help` lists them."
        )
        return 0

    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

    quiet_lightning()
    cli = SettingsCLI(arguments[1:])
    cli.find_beginning()  # which brings the tokenizer
    cli.prepare_data()
    return 0
