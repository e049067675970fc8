"""Configurations as words of the command line."""

from dataclasses import fields
from fnmatch import fnmatchcase

from . import ops
from .kernels.config import FORMATS, PRESETS, MLAConfig, ScheduleConfig

HELP = """\
CONFIG is one of
  schedule, append               the schedule, the cache writes
  a preset, or a pattern of them dense_bfloat16_512_64_page64_full_flat, 'dense_bfloat16_*'
  field=value,..                 any decode configuration: kv=float16,causal=false,head_tile=16
  op:field=value,..              the same of another op: append:kv=float16"""
OPS = {"decode": (ops.DecodeOp, MLAConfig()), "schedule": (ops.ScheduleOp, ScheduleConfig())}
OPS["append"] = (ops.AppendOp, MLAConfig(causal=False))
BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def default() -> list[tuple[type, object]]:
    """the schedule, the cache writes of every format, and all presets of decode"""
    appends = [(ops.AppendOp, MLAConfig(kv=kv, causal=False)) for kv in FORMATS.values()]
    return [(ops.ScheduleOp, ScheduleConfig()), *appends, *((ops.DecodeOp, config) for config in PRESETS)]


def parse(word: str) -> list[tuple[type, object]]:
    """(op class, config) of one CONFIG.  Raises ValueError, which says what is allowed."""
    op, colon, assignments = word.partition(":")
    if not colon and "=" in word:
        op, assignments = "decode", word
    if op in OPS:
        op_class, config = OPS[op]
        return [(op_class, _with(config, assignments))]
    matches = [config for config in PRESETS if fnmatchcase(config.name, word)]
    if not matches:
        names = "\n  ".join((*OPS, *(config.name for config in PRESETS)))
        raise ValueError(f"{word} is no configuration; allowed: field=value,.. or one of\n  {names}")
    return [(ops.DecodeOp, config) for config in matches]


def _with(config, assignments: str):
    """`config` with other values; raises ValueError"""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for assignment in filter(None, assignments.split(",")):
        name, _, text = assignment.partition("=")
        if name not in values:
            raise ValueError(f"{name} is no field of {type(config).__name__}; allowed: {', '.join(values)}")
        values[name] = _value(name, text, values[name])
    return type(config)(**values)


def _value(name: str, text: str, now):
    """`text` as the type that the field has now"""
    if name == "kv":
        if text not in FORMATS:
            raise ValueError(f"kv is {text}; allowed: {', '.join(FORMATS)}")
        return FORMATS[text]
    if isinstance(now, bool):
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{name} is {text}; allowed: {', '.join(BOOLEANS)}")
        return BOOLEANS[text.lower()]
    try:
        return type(now)(text)
    except ValueError:
        raise ValueError(f"{name} is {text}; allowed: a value of type {type(now).__name__}") from None
