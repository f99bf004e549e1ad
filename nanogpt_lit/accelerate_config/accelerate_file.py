"""accelerate's default_config.yaml, read with suspicion (somebody else may have written it), and what is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from nanogpt_lit.accelerate_config.table import DISTRIBUTED_TYPES, ROW_OF
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

# Sections that have counterparts, and what their keys begin with; accelerate also takes the keys without that.
SECTIONS = {
    "deepspeed_config": "",
    "dynamo_config": "dynamo_",
    "fsdp_config": "fsdp_",
    "parallelism_config": "parallelism_config_",
}
# A section that accelerate does not read unless another key asks for it.
ASKED_BY = {
    "deepspeed_config": ("distributed_type", "DEEPSPEED"),
    "fsdp_config": ("distributed_type", "FSDP"),
    "parallelism_config": ("distributed_type", "FSDP"),
}
WHOLE_NUMBERS = {
    "num_processes", "num_machines", "machine_rank", "main_process_port", "fsdp_config.fsdp_version",
    "deepspeed_config.zero_stage", "deepspeed_config.gradient_accumulation_steps",
    "parallelism_config.parallelism_config_dp_shard_size",
}  # fmt: skip
NUMBERS = {"deepspeed_config.gradient_clipping"}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass
class Translation:
    content: dict[str, Any]
    """What goes into the file."""
    remarks: list[str] = field(default_factory=list)
    """What has no place in it: `key=value: what to do`."""

    def text(self, title: str) -> str:
        """YAML, with the remarks as comments at its end, under their title."""
        text: str = yaml.safe_dump(self.content)
        comments = [title, *("  " + remark for remark in self.remarks)] if self.remarks else []
        return text + "".join(f"# {line}\n" for comment in comments for line in comment.splitlines())


def read_accelerate_file(path: Path) -> dict[str, Any]:
    """The keys of the file, those of a section as `section.key`. Raises UserError for what accelerate would ignore,
    or read as something else, without a word."""
    if not path.is_file():
        raise FileNotFoundError(f"--to-trainer={path} is no file; `accelerate config` writes one and says where.")
    content = load_yaml_file(path)
    if not isinstance(content, dict):
        raise UserError(f"--to-trainer={path} holds no keys; `accelerate config` writes one a line.")
    values = {key: _value(key, value) for key, value in _flat(content)}
    values.setdefault("mixed_precision", "no")
    _check_sections(values)
    return values


def asks_for_nothing(key: str, value: Any) -> bool:
    """Whether a value needs no counterpart: it is empty, off, or accelerate's default."""
    return value in (ROW_OF[key].default if key in ROW_OF else False, None, "", "none", "no", "default", [], [""], {})


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    content = dict(content)
    # As accelerate reads its own older files.
    if "fp16" in content and content.pop("fp16") is True:
        content.setdefault("mixed_precision", "fp16")
    if "dynamo_backend" in content:
        content["dynamo_config"] = {"dynamo_backend": content.pop("dynamo_backend")}
    for key, value in content.items():
        if key not in SECTIONS:
            yield _printable(key), value
            continue
        if not isinstance(value, dict | None):
            raise UserError(
                f"accelerate's {key} should hold keys of its own; `accelerate config` writes them indented."
            )
        for name, inner in (value or {}).items():
            full = name if str(name).startswith(SECTIONS[key]) else f"{SECTIONS[key]}{name}"
            yield _printable(f"{key}.{full}"), inner


def _printable(key: Any) -> str:
    return str(key)[:100] if str(key).isprintable() else ascii(str(key)[:100])


def _value(key: str, value: Any) -> Any:
    """The value as a bool, number or string; that of a key without a counterpart as it is."""
    if key not in ROW_OF:
        return value
    if not isinstance(value, str | int | float | bool | None):
        raise UserError(f"accelerate's {key} should be one value; `accelerate config` writes no more.")
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"accelerate's {key} holds characters that a terminal would obey; write it in plain ones.")
    if value is None:
        return None
    if key == "distributed_type" and value is False:
        raise UserError("accelerate's distributed_type is false: YAML reads a bare NO so; write 'NO' in quotes.")
    if key == "mixed_precision" and value is False:
        return "no"
    if isinstance(ROW_OF[key].default, bool) or key == "use_cpu":
        return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}.get(str(value).lower(), value)
    if key in WHOLE_NUMBERS | NUMBERS:
        try:
            return int(str(value)) if key in WHOLE_NUMBERS else float(value)
        except ValueError:
            raise UserError(f"accelerate's {key}={str(value)[:100]} should be a number, for example 1.") from None
    return value


def _check_sections(values: Mapping[str, Any]) -> None:
    kind = values.get("distributed_type")
    kinds = [name for names in DISTRIBUTED_TYPES.values() for name in names]
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UserError(
            f"accelerate's compute_environment={values['compute_environment']} has no Trainer to go to; "
            "LOCAL_MACHINE has."
        )
    if kind not in kinds:
        raise UserError(
            f"accelerate's distributed_type={kind} is no strategy of Lightning; {', '.join(dict.fromkeys(kinds))} are."
        )
    for section, (key, asked) in ASKED_BY.items():
        inside = next((name for name in values if name.startswith(section + ".")), None)
        if inside is not None and values.get(key) != asked:
            raise UserError(
                f"accelerate does not read {inside} beside {key}={values.get(key)}; "
                f"set {key}: {asked}, or take {section} out."
            )
