"""Tap and vhost descriptors for callers that may not open them, by a policy."""

SOCKET = "/run/vhostctl-broker.sock"
"""Where a broker listens unless it is told otherwise."""
