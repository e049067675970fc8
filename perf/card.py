"""The card and the software a number belongs to: device, clocks, power, reasons to throttle, versions, commit."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import flashmla_cute

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "FLASHMLA_CUTE_COMMIT"
SAMPLE_S = 0.05  # between two questions to nvidia-smi, each of which takes about as long
FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # (driver 535 renamed it)
REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


def why_unusable() -> str | None:
    """None on a Hopper GPU, else what is missing"""
    if not torch.cuda.is_available():
        return "no CUDA device that torch can use; measuring needs a Hopper GPU (H100, H200, H20, GH200)"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability != (9, 0):
        major, minor = capability
        return f"{name} has compute capability {major}.{minor}; the kernels are sm_90a code and need a Hopper GPU (9.0)"
    return None


def slug(device_name: str) -> str:
    """short name of the card, for file names"""
    known = re.search(r"\b(GH200|H200|H100|H800|H20)\b", device_name)
    return (known.group(1) if known else re.sub(r"\W+", "-", device_name).strip("-")).lower()


def versions() -> dict[str, str]:
    found = {"flashmla_cute": flashmla_cute.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or "none"
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> dict[str, str | bool | None]:
    """{"commit", "dirty"} of the checkout; elsewhere what FLASHMLA_CUTE_COMMIT says, and dirty is unknown (None)"""
    if _git("rev-parse", "--show-toplevel") == str(ROOT):  # (a copy inside another project's checkout is not ours)
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return {"commit": os.environ.get(COMMIT_VARIABLE, "unknown"), "dirty": None}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def identity(gpu: bool = True) -> dict:
    """what every stored result begins with; without `gpu`, device is "none" and driver None"""
    driver = None
    if gpu:
        try:
            driver = ask("driver_version")
        except RuntimeError as error:
            driver = f"unknown ({error})"
    return {
        "device": torch.cuda.get_device_name() if gpu else "none",
        "driver": driver,
        **commit(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


# ---------------------------------------------------------------------- nvidia-smi
@dataclass(frozen=True)
class Sample:
    begin: float  # seconds of time.monotonic() around the question
    end: float
    sm_mhz: float | None
    mem_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    reasons: int | None  # bits of REASONS

    @classmethod
    def parse(cls, line: str, begin: float, end: float) -> "Sample":
        *numbers, reasons = (text.strip() for text in line.split(","))
        return cls(begin, end, *map(_number, numbers), int(reasons, 16) if reasons.startswith("0x") else None)


def _number(text: str) -> float | None:
    """nvidia-smi writes [N/A] or [Not Supported] for what a card does not tell"""
    try:
        return float(text)
    except ValueError:
        return None


@functools.cache
def _uuid() -> str:
    """of torch's current device: its index means nothing to nvidia-smi, which ignores CUDA_VISIBLE_DEVICES"""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def ask(*fields: str) -> str:
    """One line of `nvidia-smi --query-gpu` about torch's current device.  Raises RuntimeError with nvidia-smi's own words."""
    command = ["nvidia-smi", "-i", _uuid(), f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"nvidia-smi: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"nvidia-smi: {(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


class Sampler:
    """Asks nvidia-smi again and again from a thread, so that every row can say under which clocks it was measured.

    Where nvidia-smi does not answer, `absent` holds the reason and summaries are None: nothing is made up."""

    def __init__(self):
        self.absent: str | None = None
        self.samples: list[Sample] = []
        self._fields: tuple[str, ...] = ()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        failures = []
        for reason_field in REASON_FIELDS:
            try:
                ask(*FIELDS, reason_field)
            except RuntimeError as error:
                failures.append(str(error))
            else:
                self._fields = (*FIELDS, reason_field)
                self._thread.start()
                return self
        self.absent = failures[0]
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._fields:
            self._thread.join()

    def _run(self):
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                line = ask(*self._fields)
            except RuntimeError as error:
                self.absent = str(error)
                return
            self.samples.append(Sample.parse(line, begin, time.monotonic()))
            self._stop.wait(SAMPLE_S)

    def summary(self, begin: float, end: float) -> dict | None:
        """what was seen between two times of time.monotonic(): [min, median, max] of each number, and all reasons"""
        inside = [sample for sample in self.samples if sample.end >= begin and sample.begin <= end]
        if not inside:
            return None
        result: dict = {"samples": len(inside)}
        for name in ("sm_mhz", "mem_mhz", "power_w", "temperature_c"):
            values = [value for sample in inside if (value := getattr(sample, name)) is not None]
            result[name] = [min(values), statistics.median(values), max(values)] if values else None
        masks = [sample.reasons for sample in inside if sample.reasons is not None]
        result["reasons"] = [name for bit, name in REASONS.items() if any(mask & bit for mask in masks)] if masks else None
        return result


def clocks_now() -> dict | None:
    """one look at the card, for runs whose numbers a Sampler beside them would disturb; None: nvidia-smi does not answer"""
    begin = time.monotonic()
    with Sampler() as sampler:
        while sampler.absent is None and not sampler.samples and time.monotonic() < begin + 3.0:
            time.sleep(SAMPLE_S)
    return sampler.summary(begin, time.monotonic())
