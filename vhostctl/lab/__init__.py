"""Throw-away VMs with a real kernel: fetch it, boot it, run a command, bring its result back."""
