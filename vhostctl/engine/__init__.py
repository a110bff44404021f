"""A vhost-net in this process: the device core of kmod/, which needs no module and no node."""
