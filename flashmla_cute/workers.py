"""A function over many arguments, each call in an interpreter of its own, some at a time.

cute.compile is not thread-safe, so that several configurations compile in parallel in processes only.  They are started as
`python -c`, not by multiprocessing: that would run the caller's script again in every child, unless it is written for it.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

CHILD = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); from flashmla_cute import workers; workers._child()"


class Failed(Exception):
    """what a child said when it failed"""


def run(function: Callable, jobs: Sequence[tuple], title: str) -> list:
    """[function(*job) for job in jobs], as many at a time as this process has CPUs, with a progress bar on a terminal.
    Function, arguments and results are pickled.  A call that fails gives a Failed in place of its result."""
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with _bar(title, len(jobs)) as advance, ThreadPoolExecutor(max(workers, 1)) as pool:

        def call(job):
            result = _call_apart(function, job)
            advance()
            return result

        return list(pool.map(call, jobs))


def _call_apart(function: Callable, job: tuple):
    request = pickle.dumps(sys.path) + pickle.dumps((function, job))
    child = subprocess.run([sys.executable, "-c", CHILD], input=request, capture_output=True)
    if child.returncode:
        return Failed(child.stderr.decode(errors="replace")[-4000:])
    return pickle.loads(child.stdout)


def _child() -> None:
    """the process of `_call_apart`: what to call on stdin, the result on stdout, where nothing else may print"""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function, job = pickle.load(sys.stdin.buffer)
    result = pickle.dumps(function(*job))
    with results:
        results.write(result)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:  # (a machine may have the kernels' dependencies only)
        yield lambda: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
