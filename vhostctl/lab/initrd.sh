#!/bin/sh
# Started once by the guest's init (busybox), before the shell on the console.
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
modprobe virtio_pci
modprobe virtio_net
ip link set lo up
network
