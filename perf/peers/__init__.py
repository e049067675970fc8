"""Other MLA decode implementations, each behind the same three functions.

find()                  raises Absent where the peer is not there
prepare(problem)        raises Refused for a row it cannot run; else an object with
  .launch(pool)           one decode call with that KV pool, on torch's current stream, capturable
  .result()               (out [b, s_q, h_q, 512], lse [b, h_q, s_q] natural log or None) of the latest launch
  .schedule               None, or a function that makes the once-a-step schedule alone
  .launch_with_schedule   None, or launch and schedule in one call, for a peer that cannot make its schedule alone
  .problem                what it decodes: `problem`, or one made from it, with as many pools, where it takes other types
  .tolerance              (only where it is less accurate by design) of out and of lse, instead of the tests'
  .note                   (only where there is one) stored with its numbers: what is different about them

perf/peers/README.md says where the peers come from.
"""

import importlib
import os
import sys
from types import ModuleType

NAMES = ("flashmla", "flashmla_fp8", "fa3", "triton_mla", "sdpa")


class Absent(Exception):
    """the peer is not on this machine"""


class Refused(Exception):
    """the peer is there but does not do this row"""


def load(names: list[str]) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers that are there, and for the others why not."""
    found, absent = {}, {}
    for name in names:
        module = importlib.import_module(f".{name}", __package__)
        try:
            module.find()
        except Absent as reason:
            absent[name] = str(reason)
        else:
            found[name] = module
    return found, absent


def import_from(variable: str, module: str) -> ModuleType:
    """`module` from the directory that environment variable `variable` names, put in front of sys.path"""
    directory = os.environ.get(variable)
    if not directory:
        raise Absent(f"{variable} is not set; it names the directory that holds {module}")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer built for another torch or Python fails in many ways: its own words are the reason
        reason = f"import {module} from ${variable}: {type(error).__name__}: {error}"
        raise Absent(reason.replace(directory, f"${variable}")) from error


def need(ok: bool, message: str):
    """raises Refused unless ok"""
    if not ok:
        raise Refused(message)
