"""The out-of-tree module vhost_net_mirror: building it, loading it, what state it is in."""

NAME = "vhost_net_mirror"
NODE = "/dev/vhost-net-mirror"
