#!/bin/sh
# PID 1 of a lab VM. virtme's initramfs starts it on the host's root, which it has mounted read-only
# and without a cache: `busybox sh init BUSYBOX DIRECTORY`. Run by busybox because its applets start
# without reading a file; a program of the host's costs 0.2 s here.
#
# DIRECTORY is what vhostctl/lab/compose.py wrote for this boot: `init` (this file), `setup` (the
# variables and functions that are not defined here) and `command` (a script that ends in exec).
#
# This shell stays outside the root that it builds, whose applets would have to be read first. Hence
# the relative paths: the working directory is the command's root.

busybox=$1 directory=$2

lost() {
    echo "lab init: $*" >/dev/console
    power_off
}

power_off() {
    echo o >/proc/sysrq-trigger
    while :; do sleep 60; done
}

# Print the device node of a virtio-serial port. There is no udev to make a link with its name, and
# the ports appear one by one while the driver talks to the device.
port() {
    while :; do
        for entry in /sys/class/virtio-ports/*/name; do
            if read -r name <"$entry" && [ "$name" = "$1" ]; then
                entry=${entry%/name}
                echo "/dev/${entry##*/}"
                return
            fi
        done
        usleep 10000
    done 2>/dev/null
}

# Lay a writable root over the host's: reads come from a second 9p mount, this one cached, writes
# stay in memory.
build_root() {
    mount -t tmpfs layers /run
    mkdir /run/lower /run/upper /run/work /run/root
    mount -t 9p -o "ro,trans=virtio,version=9p2000.L,access=any,cache=loose,msize=$msize" \
        lab.root /run/lower || lost "cannot mount the host's root"
    load_modules
    mount -t overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work root /run/root ||
        lost "cannot lay a writable root over the host's"
    cd /run/root || lost "cannot enter the new root"
    # A move before the chroot: without it the command could not make user namespaces.
    mount --move . / || lost "cannot move to the new root"
}

populate() {
    mount -t proc proc proc
    mount -t sysfs sys sys
    mount -t cgroup2 cgroup sys/fs/cgroup
    mount -t debugfs debug sys/kernel/debug
    mount -t tracefs tracing sys/kernel/tracing
    mount -t devtmpfs dev dev
    mkdir -p dev/pts dev/shm
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
    mount -t tmpfs -o mode=1777 shm dev/shm
    ln -s /proc/self/fd dev/fd
    ln -s fd/0 dev/stdin
    ln -s fd/1 dev/stdout
    ln -s fd/2 dev/stderr
    mount -t tmpfs -o mode=755 run run
    mkdir run/lock

    # Where modprobe looks; the host has no such release, and perhaps no such directory.
    mkdir -p "lib/modules/$release"
    mount --bind ".$modules" "lib/modules/$release"

    # The kernel runs it in this shell's root, which is not the command's.
    printf '#!%s sh\nexec %s chroot /proc/1/cwd /sbin/modprobe "$@"\n' "$busybox" "$busybox" \
        >/run/modprobe
    chmod 755 /run/modprobe
    echo /run/modprobe >/proc/sys/kernel/modprobe

    hostname lab
    ip link set lo up
    # No address, no announcement: the frames on a test's tap are the test's.
    for knob in accept_ra=0 autoconf=0 addr_gen_mode=1; do
        echo "${knob#*=}" >"/proc/sys/net/ipv6/conf/default/${knob%=*}"
    done 2>/dev/null
}

share() {
    mkdir -p ".$2"
    mount -t 9p -o "trans=virtio,version=9p2000.L,access=any,cache=mmap,msize=$msize" \
        "$1" ".$2" || lost "cannot mount the shared directory $2"
}

# The command writes to pipes: a port can be opened only once, so /dev/stdout would not work on it.
# $marker goes the same way, so the host knows that everything before it has arrived.
run_piped() {
    mkfifo run/in run/out run/err
    cat <run/out >"$(port lab.stdout)" &
    cat <run/err >"$(port lab.stderr)" &
    exec 5>run/out 6>run/err
    if [ "$stdin" = yes ]; then
        cat <"$(port lab.stdin)" >run/in &
        exec 4<run/in
    else
        exec 4</dev/null
    fi
    rm run/in run/out run/err
    # A session of its own, so that kill(0) in it does not reach the cats. It takes the descriptors by
    # itself: this shell would announce a death by signal on the stderr that it redirects.
    setsid chroot . /bin/sh "$directory/command"
    status=$?
    printf %s "$marker" >&5
    printf %s "$marker" >&6
}

run_on_terminal() {
    setsid -c chroot . /bin/sh "$directory/command" </dev/ttyS0 >/dev/ttyS0 2>&1
    status=$?
}

# A program of its own: applets start through /proc/self/exe.
"$busybox" mount -t proc proc /proc || lost "cannot mount /proc"
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. "$directory/setup"
exec 3<>"$(port lab.control)"
echo up >&3

build_root
populate
mount_shares
if [ "$terminal" = yes ]; then run_on_terminal; else run_piped; fi
sync_shares
echo "exit $status" >&3
# The host ends the VM when it has read everything.
read -r _ <&3
power_off
