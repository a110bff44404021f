"""QEMU's role: negotiation, memory table, rings, bring-up, session."""
