"""Directories of compiled objects: the user's cache, and packaged ones (flashmla_cute/export.py), which are only read.

Beside every object lies its record, a JSON file: what the object was compiled from (op, config, hashes of the sources,
versions: the content of its key) and the SHA-256 of its bytes.  Three things keep a wrong object from running: the name of the
file contains the key, the record's digest must fit the bytes, and the symbol that is looked up in the object contains the key
too, which a valid object of another configuration under this name lacks.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
UNFINISHED = ".compile-"  # what a killed process leaves
KEY_FIELDS = ("op", "config", "source", "arch", "sources", "dsl", "tvm_ffi", "flavour")
_warned: set[str] = set()


class Damaged(Exception):
    """an object that cannot be what its name says"""


def key_of(content: dict) -> str:
    """of the KEY_FIELDS of a record"""
    text = json.dumps({field: content[field] for field in KEY_FIELDS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def symbol_of(op_name: str, key: str) -> str:
    return f"flashmla_cute_{op_name}_{key}"


# ---------------------------------------------------------------------- one object
def record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def read_record(path: Path) -> dict:
    """what the object `path` was compiled from; raises Damaged when that is not known"""
    try:
        record = json.loads(record_path(path).read_bytes())
        complete = {*KEY_FIELDS, "sha256"} <= set(record)
    except (OSError, ValueError, TypeError):
        raise Damaged("its record is missing or unreadable") from None
    if not complete:
        raise Damaged("its record is none of an object")
    return record


def load(path: Path, symbol: str, sha256: str | None = None) -> Callable:
    """The function of an object.  sha256: None takes the record's.  Raises Damaged, or OSError where it cannot be read."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != (sha256 or read_record(path)["sha256"]):
        raise Damaged("has other bytes than its record says")
    import cutlass.cute as cute

    try:
        return getattr(cute.runtime.load_module(str(path), enable_tvm_ffi=True), symbol)
    except Exception as error:  # foreign bytes raise whatever the object loader finds first
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Damaged(f"does not load, or lacks {symbol}: {reason}") from None


def write(path: Path, content: dict, export: Callable[[str], None]) -> None:
    """`export` writes the object to the path it is given.  Object and record appear whole or not at all, the record first."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as scratch:
        made, record = Path(scratch) / path.name, Path(scratch) / "record.json"
        export(str(made))
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        record.write_text(json.dumps({**content, "sha256": digest}, indent=1) + "\n")
        os.replace(record, record_path(path))
        os.replace(made, path)


def remove(path: Path) -> None:
    for part in (path, record_path(path), lock_path(path)):
        with contextlib.suppress(OSError):
            part.unlink()


def lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def lock(path: Path):
    """processes that want the same object wait for the one that compiles it"""
    with open(lock_path(path), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------- a cache directory
@dataclass(frozen=True)
class Entry:
    """an object of a cache directory"""

    path: Path
    record: dict | None  # None: damaged

    @property
    def op(self) -> str:
        return self.path.stem.split("-")[0]

    @property
    def config(self) -> str:
        return self.path.stem.partition("-")[2].rpartition("-")[0]

    @property
    def key(self) -> str:
        return self.path.stem.rpartition("-")[2]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def age_s(self) -> float:
        return max(time.time() - self.path.stat().st_mtime, 0.0)

    def damage(self) -> str | None:
        """why the object cannot be used; None when it loads and has its symbol"""
        try:
            if key_of(read_record(self.path)) != self.key:
                return "its record is the record of another object"
            load(self.path, symbol_of(self.op, self.key))
        except (Damaged, OSError) as error:
            return str(error)
        return None


def entries(folder: Path) -> list[Entry]:
    """the objects of a cache directory, by name; none where there is no such directory"""
    found = []
    for path in sorted(folder.glob("*.o")):
        try:
            found.append(Entry(path, read_record(path)))
        except Damaged:
            found.append(Entry(path, None))
    return found


def remove_leftovers(folder: Path, older_than_s: float) -> None:
    """what killed processes left: unfinished objects, and records and locks without an object"""
    for path in (*folder.glob(f"{UNFINISHED}*"), *folder.glob("*.json"), *folder.glob("*.o.lock")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < older_than_s:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not path.with_suffix("" if path.suffix == ".lock" else ".o").exists():
                path.unlink()


# ---------------------------------------------------------------------- packaged objects
def read_manifest(folder: Path) -> list[dict]:
    """the objects that flashmla_cute/export.py has put into `folder`; raises Damaged or OSError"""
    path = folder / MANIFEST
    return _read_manifest(path, path.stat().st_mtime_ns)


@functools.cache
def _read_manifest(path: Path, _modified: int) -> list[dict]:
    try:
        manifest = json.loads(path.read_bytes())
        known, objects = manifest["format"] == FORMAT, manifest["objects"]
        complete = all({*KEY_FIELDS, "files"} <= set(entry) and "object" in entry["files"] for entry in objects)
    except (ValueError, TypeError, KeyError):
        raise Damaged(f"{path} is not a manifest of exported objects") from None
    if not known or not complete:
        raise Damaged(f"{path} has another format than this version reads")
    return objects


def packaged(folders: list[Path], content: dict) -> Iterator[tuple[Path, dict]]:
    """(object, manifest entry) compiled from exactly `content`; one warning for each that is of this op and config but of other
    sources, another target or other versions"""
    for folder in folders:
        try:
            objects = read_manifest(folder)
        except (Damaged, OSError) as error:
            warn_once(f"{folder} has no usable {MANIFEST}, its objects are not used: {error}")
            continue
        for entry in objects:
            if (entry["op"], entry["config"]) == (content["op"], content["config"]):
                other = [field for field in KEY_FIELDS if entry[field] != content[field]]
                path = folder / entry["files"]["object"]["name"]
                if other:
                    told = ", ".join(f"{field} {_short(entry[field])}, here {_short(content[field])}" for field in other)
                    warn_once(f"{path} is not used, it was exported from something else: {told}; export it again")
                else:
                    yield path, entry


def _short(value) -> str:
    return str(value)[:12]


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
