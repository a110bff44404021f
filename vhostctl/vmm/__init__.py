"""Pieces for a VMM on /dev/kvm whose network is vhost-net's."""
