"""A thread that runs a vCPU and hands what the guest does at ports and in MMIO to the models.

The thread blocks one real-time signal, which only KVM_RUN lets through: `pthread_kill`
then makes KVM_RUN return, now or when it is entered next, and no signal handler, which
would be the whole process's, is needed.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from vhostctl.errors import KernelError, StateError
from vhostctl.host.vcpu import (
    Failure,
    Halted,
    Interrupted,
    Mmio,
    PortIo,
    Shutdown,
    SystemEvent,
    Vcpu,
)
from vhostctl.vmm.bus import Bus

KICK = signal.SIGRTMIN
"""The signal that brings a vCPU's thread out of KVM_RUN."""


@dataclass(frozen=True, slots=True)
class CpuEnd:
    """Why vCPU `index` runs no more: what the guest or KVM did, or what a model raised."""

    index: int
    cause: Halted | Shutdown | SystemEvent | Failure | BaseException


class _Wanted(Enum):
    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"


class CpuThread:
    """Runs a vCPU on a thread of its own, in the guest until a model is needed.

    The thread calls models, by way of `ports` and `mmio`, with `lock` held. `on_end` is
    called once, by the thread and without the lock, if the vCPU ends by itself; the thread
    ends with it. It notes the end and returns: stopping vCPUs is for somebody else.
    `pause()` and `stop()` wait for the thread, and give up `lock` meanwhile if their caller
    holds it: what it protects may be another when they return.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        ports: Bus,
        mmio: Bus,
        lock: threading.RLock,
        on_end: Callable[[CpuEnd], None],
    ) -> None:
        """Take a vCPU that nobody else runs; it stays its owner's to close after `stop()`."""
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._on_end = on_end
        self._wanted = _Wanted.PAUSED
        self._parked = True  # nobody is in KVM_RUN
        self._ended = False
        self._kickable: int | None = None  # the thread, while the signal does not kill it
        # A vCPU whose thread hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._main, name=vcpu.label, daemon=True)

    def start(self) -> None:
        """Make the thread; the vCPU is paused. Call once."""
        self._thread.start()

    def resume(self) -> None:
        """Let the vCPU run. Raises StateError after `stop()`."""
        with self._changed:
            if self._wanted is _Wanted.STOPPED:
                raise StateError(f"{self.vcpu.label} was stopped", hint="make another CpuThread")
            self._want(_Wanted.RUNNING)

    def pause(self) -> None:
        """Return when the vCPU is out of the guest and its last exit is finished.

        Its state can be saved then. Called by a model on the vCPU's own thread, it returns at
        once and holds from the end of that exit on.
        """
        with self._changed:
            if self._wanted is _Wanted.RUNNING:
                self._want(_Wanted.PAUSED)
            if threading.current_thread() is not self._thread:
                # Somebody else may have it run again meanwhile.
                self._changed.wait_for(
                    lambda: self._parked or self._ended or self._wanted is _Wanted.RUNNING
                )

    def stop(self) -> None:
        """Return when the thread has ended, for good; the last exit is finished as in `pause`.

        On the vCPU's own thread it returns at once. A second call does nothing.
        """
        with self._changed:
            self._want(_Wanted.STOPPED)
            if threading.current_thread() is self._thread or self._thread.ident is None:
                return
            self._changed.wait_for(lambda: self._ended)
        self._thread.join()

    def _want(self, wanted: _Wanted) -> None:
        self._wanted = wanted
        self._changed.notify_all()
        if self._kickable is not None:
            signal.pthread_kill(self._kickable, KICK)

    def _main(self) -> None:
        cause = self._outcome()
        try:
            if cause is not None:
                self._on_end(CpuEnd(self.vcpu.index, cause))
        finally:
            # Behind it: who waits for the end may hold the lock that it takes.
            with self._changed:
                self._ended = True
                self._kickable = None
                self._changed.notify_all()

    def _outcome(self) -> Halted | Shutdown | SystemEvent | Failure | BaseException | None:
        """Run the vCPU until it is stopped (None) or ends by itself."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK}) - {KICK}
        with self._lock:
            self._kickable = threading.get_ident()
        try:
            self.vcpu.set_signal_mask(sum(1 << number - 1 for number in blocked))
            return self._serve()
        except BaseException as error:  # noqa: BLE001 -- whatever a model raises is for on_end
            # The last exit, which they hold, would keep the vCPU from being closed.
            traceback.clear_frames(error.__traceback__)
            return error

    def _serve(self) -> Halted | Shutdown | SystemEvent | Failure | None:
        finished = True  # the last exit, which only KVM_RUN can finish
        while True:
            if finished and not self._may_run():
                return None
            # Read without the lock: a change that this misses has sent the signal.
            done = self.vcpu.run(immediate=self._wanted is not _Wanted.RUNNING)
            finished = isinstance(done, Interrupted)
            match done:
                case Interrupted():
                    signal.sigtimedwait({KICK}, 0)
                case PortIo():
                    with self._lock:
                        self._port_io(done)
                case Mmio():
                    with self._lock:
                        self._memory_io(done)
                case _:
                    return done

    def _may_run(self) -> bool:
        """Wait while the vCPU is paused; return whether it is to run, else it is stopped."""
        with self._changed:
            self._parked = paused = self._wanted is _Wanted.PAUSED
            while self._wanted is _Wanted.PAUSED:
                self._changed.notify_all()
                self._changed.wait()
            self._parked = False
            if paused:
                # Or the guest's watchdogs take it for a processor that hangs.
                with suppress(KernelError):  # a guest without KVM's clock is not told
                    self.vcpu.clock_paused()
            return self._wanted is _Wanted.RUNNING

    def _port_io(self, io: PortIo) -> None:
        for at in range(0, io.size * io.count, io.size):
            if io.write:
                self._ports.write(io.port, bytes(io.data[at : at + io.size]))
            else:
                io.data[at : at + io.size] = self._ports.read(io.port, io.size)

    def _memory_io(self, io: Mmio) -> None:
        if io.write:
            self._mmio.write(io.address, bytes(io.data))
        else:
            io.data[:] = self._mmio.read(io.address, len(io.data))
