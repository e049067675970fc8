"""Compiled kernels as files, for use without this package, without the DSL, or without Python (`flashmla-cute export`).

For each configuration, in one directory:
  NAME.o       the object: host code and cubin, one public TVM-FFI symbol; for C++ (examples/cpp)
  NAME.so      the same, linked; for tvm_ffi.load_module
  NAME.cubin   the device code alone; for a driver-API launch (examples/cubin_launch.py)
  NAME.json    what such a launch must pass: kernels, parameters, shared memory, attributes (flashmla_cute/launches.py)
and for the directory flashmla_cute.h, which declares the symbols, and manifest.json, by which $FLASHMLA_CUTE_OBJECTS serves the
objects to this package.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import compile, launches, store, workers

HEADER = "flashmla_cute.h"
SUFFIXES = {"object": ".o", "library": ".so", "cubin": ".cubin", "description": ".json"}


def export(wanted: Sequence[tuple[type, object]], folder: Path) -> list[dict]:
    """Exports each (op class, config), in parallel processes when there are several.  Objects that `folder` already has stay,
    but for those of the same name.  Returns the manifest's new entries; raises RuntimeError when one does not compile, and
    ValueError when two configurations would have one name."""
    wanted = list(dict.fromkeys(wanted))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = _kept(folder, wanted)
    if len(wanted) == 1:
        made = [export_one(*wanted[0], folder)]
    else:
        made = workers.run(export_one, [(*pair, folder) for pair in wanted], f"exporting for {compile.ARCH}")
    failed = [result for result in made if isinstance(result, workers.Failed)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} configurations were not exported: {failed[0]}")
    objects = sorted([*kept, *made], key=lambda entry: entry["name"])
    _write(folder / HEADER, _header(objects))
    _write(folder / store.MANIFEST, json.dumps({"format": store.FORMAT, "objects": objects}, indent=1) + "\n")
    return made


def export_one(op_class: type, config, folder: Path) -> dict:
    """the files of one configuration; returns its entry of the manifest"""
    op = op_class(config)
    with compile._compile_lock:
        compiled = compile.compile_object(op)
    with tempfile.TemporaryDirectory(dir=folder, prefix=store.UNFINISHED) as scratch:
        made = {part: Path(scratch) / f"{name_of(op)}{suffix}" for part, suffix in SUFFIXES.items()}
        compile.export_object(compiled, op, str(made["object"]))
        cubin = launches.trimmed_cubin(made["object"].read_bytes())
        made["cubin"].write_bytes(cubin)
        kernels = launches.describe(op, compiled, cubin)
        description = {"cubin": made["cubin"].name, **compile.content(op), "kernels": kernels}
        made["description"].write_text(json.dumps(description, indent=1) + "\n")
        if not link(made["object"], made["library"]):
            del made["library"]
            (folder / f"{name_of(op)}{SUFFIXES['library']}").unlink(missing_ok=True)  # (it would be of another object)
        files = {part: {"name": path.name, "sha256": _digest(path)} for part, path in made.items()}
        for path in made.values():
            os.replace(path, folder / path.name)
    return {"name": name_of(op), "symbol": f"__tvm_ffi_{compile.symbol(op)}", **compile.content(op), "files": files}


def c_compiler() -> str | None:
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def link(made: Path, library: Path) -> bool:
    """`made` as a shared library; False without a C compiler.  What it does not define comes from TVM-FFI and from the runtime
    library of the DSL, which whoever loads it has loaded before."""
    compiler = c_compiler()
    if compiler is None:
        return False
    run = subprocess.run([compiler, "-shared", "-o", str(library), str(made)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{compiler} cannot link {made.name}: {run.stderr.strip()}")
    return True


def name_of(op) -> str:
    """of the files"""
    return op.config.name if op.config.name.startswith(op.name) else f"{op.name}-{op.config.name}"


# ---------------------------------------------------------------------- the directory
def _kept(folder: Path, wanted: Sequence[tuple[type, object]]) -> list[dict]:
    """manifest entries of `folder` that the new ones do not replace"""
    ours = {}
    for op_class, config in wanted:
        op = op_class(config)
        if name_of(op) in ours:
            raise ValueError(f"two configurations are called {name_of(op)}: export them into directories of their own")
        ours[name_of(op)] = compile.content(op)["config"]
    try:
        entries = store.read_manifest(folder)
    except (OSError, store.Damaged):
        return []
    for entry in entries:
        if entry["name"] in ours and entry["config"] != ours[entry["name"]]:
            raise ValueError(f"{folder} has another configuration called {entry['name']}: export into another directory")
    return [entry for entry in entries if entry["name"] not in ours]


def _header(objects: list[dict]) -> str:
    """declares every symbol, under a name that changes neither with sources nor with versions"""
    declared, ops = [], [entry["op"] for entry in objects]
    for entry in objects:
        declared.append(f"int {entry['symbol']}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);")
        declared.append(f"#define flashmla_cute_{_identifier(entry['name'])} {entry['symbol']}")
        if ops.count(entry["op"]) == 1:
            declared.append(f"#define flashmla_cute_{entry['op']} {entry['symbol']}")
    lines = "\n".join(declared)
    return f"""\
/* The objects of this directory, written by `flashmla-cute export`.  An op of which it has one object only has a short name. */
#pragma once
#include <tvm/ffi/c_api.h>

#ifdef __cplusplus
extern "C" {{
#endif
{lines}
#ifdef __cplusplus
}}
#endif
"""


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, text: str) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=store.UNFINISHED)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
