"""Configurations as words of the command line."""

from dataclasses import fields
from fnmatch import fnmatchcase

from . import heuristics, ops
from .kernels.config import FORMATS, FP8_FORMATS, PRESETS, SCALED_FORMATS, Fp8AppendConfig, MLAConfig, ScheduleConfig

HELP = """\
CONFIG is one of
  schedule, append               the schedule, the cache writes
  a preset, or a pattern of them dense_bfloat16_512_64_page64_full_flat, 'dense_bfloat16_*'
  field=value,..                 any decode configuration: kv=float16,causal=false,head_tile=16
  op:field=value,..              the same of another op: append:kv=float16
  fp8_decode:field=value,..      decode over an e4m3 cache; beside the fields of decode (kv is that of q
                                 and out) q=float8_e4m3fn, terms=1 (of q), scales=4 (of a token)
  fp8_append:field=value,..      its writes: source=float16,scales=4,page=128"""
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
    if op in FP8_OPS:
        return [FP8_OPS[op](assignments)]
    if op in OPS:
        op_class, config = OPS[op]
        return [(op_class, _with(config, assignments))]
    matches = [config for config in PRESETS if fnmatchcase(config.name, word)]
    if not matches:
        names = "\n  ".join((*OPS, *FP8_OPS, *(config.name for config in PRESETS)))
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


def _fp8_decode(assignments: str) -> tuple[type, object]:
    own, others = _own(assignments, q="", terms=2, scales=0)
    base = _with(MLAConfig(), others)
    if own["scales"] and (own["q"] or own["terms"] != 2):
        raise ValueError(f"scales is {own['scales']}; allowed: 0 with q or terms, q is 16 bit and exact otherwise")
    return ops.Fp8DecodeOp, heuristics.fp8_config(base, _cache(own["scales"]), own["q"] or base.kv.dtype, own["terms"])


def _fp8_append(assignments: str) -> tuple[type, object]:
    own, others = _own(assignments, source="bfloat16", scales=0, page=64)
    if others:
        raise ValueError(f"{others} is no field of {Fp8AppendConfig.__name__}; allowed: {', '.join(own)}")
    return ops.Fp8AppendOp, Fp8AppendConfig(kv=_cache(own["scales"]), source=own["source"], page=own["page"])


FP8_OPS = {"fp8_decode": _fp8_decode, "fp8_append": _fp8_append}


def _own(assignments: str, **values) -> tuple[dict, str]:
    """the assignments to `values`, and all others"""
    others = []
    for assignment in filter(None, assignments.split(",")):
        name, _, text = assignment.partition("=")
        if name in values:
            values[name] = _value(name, text, values[name])
        else:
            others.append(assignment)
    return values, ",".join(others)


def _cache(scales: int):
    rows = {0: FP8_FORMATS["float8_e4m3fn"], **SCALED_FORMATS}
    if scales not in rows:
        raise ValueError(f"scales is {scales}; allowed: {', '.join(map(str, rows))}")
    return rows[scales]


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
