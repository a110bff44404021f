"""The other half of a virtqueue, in this process: a virtio-net driver over guest memory."""
