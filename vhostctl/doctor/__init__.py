"""What keeps vhost-net from working on this machine: typed findings, each with its remedy."""
