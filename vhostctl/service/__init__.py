"""Devices that are kept: objects by name behind a QMP socket."""
