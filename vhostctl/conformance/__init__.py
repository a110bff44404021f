"""One suite of rules for every vhost-net: the kernel's own, our module, our engine."""
