"""The devices of a service by name; every method is idempotent where that makes sense."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from vhostctl.errors import InvalidArgument
from vhostctl.host.closing import Closing
from vhostctl.service.device import Device, Wired
from vhostctl.service.schema import DeviceNotFound
from vhostctl.service.spec import DeviceSpec, DeviceStatus
from vhostctl.service.state import StateDirectory

Emit = Callable[[str, dict[str, object]], None]

_WATCH = 0.5  # seconds between two looks at rings and guests


class Manager(Closing):
    """A set of devices; all of them go at `close()`.

    Its methods are for any thread: one runs at a time. They raise VhostctlError: DeviceNotFound
    for a name that is not there, StateError for a call that the device's state does not
    allow, and what the kernel refuses.
    """

    def __init__(self, state: StateDirectory, emit: Emit) -> None:
        """Keep state files in `state`; `emit(event, data)` is called from any thread."""
        self._state = state
        self._emit = emit
        self._devices: dict[str, Device] = {}
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vhostctl-watcher")
        self._watcher.start()

    def add(self, spec: DeviceSpec, start: bool = True) -> bool:
        """Have a device as `spec` says, and start it; False if it was there with that spec.

        Raises InvalidArgument if its name is another's, or its tap.
        """
        with self._lock:
            there = self._devices.get(spec.name)
            if there is not None:
                _check_same(there.spec, spec)
                return False
            for other in self._devices.values():
                if other.spec.tap == spec.tap:
                    raise InvalidArgument(
                        f"tap {spec.tap} belongs to device {other.spec.name!r}",
                        hint="remove that one first",
                    )
            device = Device(spec, self._state)
            if start:
                device.start()
            self._devices[spec.name] = device
            self._emit("DEVICE_ADDED", {"device": spec.name})
            self._tell_state(device)
        return True

    def remove(self, name: str) -> bool:
        """Stop and forget a device; False if it was not there."""
        with self._lock:
            device = self._devices.get(name)
            if device is None:
                return False
            del self._devices[name]
            try:
                device.close()
            finally:
                self._tell_state(device)
                self._emit("DEVICE_DELETED", {"device": name})
        return True

    def start(self, name: str) -> bool:
        """Wire a device that is stopped or failed; False if it runs."""
        with self._lock:
            return self._changing(self._find(name), Device.start)

    def stop(self, name: str) -> bool:
        """Take the wiring of a device down; False if it has none."""
        with self._lock:
            return self._changing(self._find(name), Device.stop)

    def _changing(self, device: Device, change: Callable[[Device], bool]) -> bool:
        try:
            return change(device)
        finally:
            self._tell_state(device)

    def set_link(self, name: str, up: bool) -> bool:
        """Take the link of a running device down or up; False if it is so already."""
        with self._lock:
            session = self._running(name, "set-link").session
            if session.link == up:
                return False
            session.set_link(up)
            self._emit("LINK_CHANGED", {"device": name, "up": up})
        return True

    def set_pairs(self, name: str, pairs: int) -> int:
        """Have the first `pairs` pairs take part and no others; return the frames dropped."""
        with self._lock:
            wired = self._running(name, "set-pairs")
            before = wired.session.enabled
            try:
                return wired.set_pairs(pairs)
            finally:
                now = wired.session.enabled
                if now != before:
                    self._emit("PAIRS_CHANGED", {"device": name, "pairs": sum(now)})

    def set_mtu(self, name: str, mtu: int) -> bool:
        """Change the MTU of a device's tap while frames flow; False if it is that."""
        with self._lock:
            return self._find(name).set_mtu(mtu)

    def add_memory(self, name: str, region: str, size: int, gpa: int | None) -> int:
        """Give the guest a region of `size` bytes more; return its guest physical address.

        Without `gpa` it comes behind all others.
        """
        with self._lock:
            place = self._wired(name, "memory-add").add_memory(region, size, gpa)
            self._memory_changed(name, region)
        return place

    def remove_memory(self, name: str, region: str) -> None:
        """Take a region away."""
        with self._lock:
            self._wired(name, "memory-del").remove_memory(region)
            self._memory_changed(name, region)

    def _memory_changed(self, name: str, region: str) -> None:
        self._emit("MEMORY_CHANGED", {"device": name, "region": region})

    def start_log(self, name: str) -> None:
        """Log from now on which pages the device writes."""
        with self._lock:
            self._wired(name, "log-start").session.start_log()

    def sync_log(self, name: str) -> list[tuple[int, int]]:
        """Return (gpa, bytes) of what was written since the last time it was asked for."""
        with self._lock:
            return list(self._wired(name, "log-sync").session.sync_log())

    def stop_log(self, name: str) -> list[tuple[int, int]]:
        """Log no longer; return what `sync_log()` would."""
        with self._lock:
            return list(self._wired(name, "log-stop").session.stop_log())

    def set_busyloop(self, name: str, microseconds: int) -> None:
        """Have the device's workers poll for so long before they sleep; 0: not at all."""
        with self._lock:
            self._wired(name, "busyloop-set").session.set_busyloop(microseconds)

    def suspend(self, name: str) -> dict[str, object]:
        """Stop the rings of a device and keep all else; return its snapshot as JSON data."""
        with self._lock:
            device = self._find(name)
            try:
                return device.suspend()
            finally:
                self._tell_state(device)

    def resume(self, name: str) -> None:
        """Have a suspended device go on."""
        with self._lock:
            device = self._find(name)
            try:
                device.resume()
            finally:
                self._tell_state(device)

    def query(self, name: str | None = None) -> list[DeviceStatus]:
        """Return what the device is, or what all of them are."""
        with self._lock:
            chosen = list(self._devices.values()) if name is None else [self._find(name)]
            return [device.status() for device in chosen]

    def _find(self, name: str) -> Device:
        try:
            return self._devices[name]
        except KeyError:
            there = ", ".join(self._devices) or "none"
            raise DeviceNotFound(f"no device {name!r}", hint=f"there is: {there}") from None

    def _running(self, name: str, call: str) -> Wired:
        return self._find(name).wired(call, "running")

    def _wired(self, name: str, call: str) -> Wired:
        return self._find(name).wired(call)

    def _tell_state(self, device: Device) -> None:
        state = device.state
        if state == device.told:
            return
        device.told = state
        self._emit("DEVICE_STATE", {"device": device.spec.name, "state": state})
        if state == "failed" and (error := device.guest_error()):
            self._emit("GUEST_FAILED", {"device": device.spec.name, "error": error})

    def _watch(self) -> None:
        while not self._ending.wait(_WATCH):
            with self._lock:
                for device in self._devices.values():
                    for queue, count in device.new_ring_errors().items():
                        data = {"device": device.spec.name, "queue": queue, "count": count}
                        self._emit("RING_ERROR", data)
                    self._tell_state(device)

    def close(self) -> None:
        """Take every device down; a second call does nothing. Raises the first error at the end."""
        self._ending.set()
        self._watcher.join()
        with self._lock, ExitStack() as stack:
            for name in list(self._devices):
                stack.callback(self.remove, name)


def _check_same(there: DeviceSpec, wanted: DeviceSpec) -> None:
    different = [
        key.replace("_", "-")
        for key in DeviceSpec.__struct_fields__
        if getattr(there, key) != getattr(wanted, key)
    ]
    if different:
        raise InvalidArgument(
            f"device {there.name!r} is there already, but not with this {', '.join(different)}",
            hint="take it down first",
        )
