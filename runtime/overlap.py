"""Steps that run while their results are awaited elsewhere: the compiled program in a thread of its own.

A native call gives Python's interpreter lock free, and so does waiting for a GPU. The thread that takes the steps may
then hand out the results of the step before, and do what the next one needs whatever this one brings (`prepare` of the
scheduler and of a run of decodes). Which tokens a step computes depends on those before it, so it begins once these are
known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from llmopt.compiler.options import Options
from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.scheduler import StepPlan


def overlaps(options: Options, device: torch.device) -> bool:
    """Whether steps run beside what the caller does: as `async_scheduling` says, by default on a GPU.

    On a CPU a step keeps all threads busy, and what runs beside it takes their time.
    """
    return device.type != "cpu" if options.async_scheduling == "auto" else options.async_scheduling is True


class Worker:
    """The thread that steps run in, made for the first one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(1, "llmopt-step")

    def submit(self, run: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        """Runs it after what was submitted before."""
        # Gradients and the current GPU are settings of each thread.
        return self._pool.submit(self._run, run, torch.is_grad_enabled())

    def _run(self, run: Callable[[], torch.Tensor], gradients: bool) -> torch.Tensor:
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with torch.set_grad_enabled(gradients), on_device:
            return run()


class Flight:
    """A step on its way: in the worker, or without one in the call of `logits`. Those of a run are one after the other.

    Args:
        work: what it computes, the chunks of a plan or a run.
        run: computes the logits.
        worker: where.

    num_left: the scheduler's count of requests that stopped running, when the step was planned.
    """

    __slots__ = ("_future", "_run", "_worker", "num_left", "work")

    def __init__(self, work: StepPlan | DecodeRun, run: Callable[[], torch.Tensor], worker: Worker | None) -> None:
        self.work, self._run, self._worker, self.num_left = work, run, worker, 0
        self._future: Future[torch.Tensor] | None = None

    def begin(self, num_left: int) -> Flight:
        """Begins the step, or the next of its run; gives itself."""
        self.num_left = num_left
        if self._worker is not None:
            self._future = self._worker.submit(self._run)
        return self

    def wait(self) -> None:
        """Returns once the step is over, however it ended."""
        if self._future is not None:
            wait([self._future])

    def logits(self) -> torch.Tensor:
        """What the step computed; raises what it raised."""
        return self._run() if self._future is None else self._future.result()
