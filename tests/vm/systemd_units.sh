#!/bin/sh
# Run as root inside a lab VM, in the checkout: the units under a systemd of their own, as far as one
# user's request to the broker and a device of the service. Says what came of it, and ends with 0.
set -eu

program=$(command -v vhostctl)
directory=/run/systemd/system

install_units() {
    mkdir -p $directory /etc/vhostctl
    for unit in vhostctl.service vhostctl.socket vhostctl-broker.service vhostctl-broker.socket; do
        sed "s#/usr/bin/vhostctl#$program#" "systemd/$unit" >"$directory/$unit"
        # Nothing of this machine's is to be started along; the checkout may lie in a home, or in /tmp.
        mkdir "$directory/$unit.d"
        printf '[Unit]\nDefaultDependencies=no\n' >"$directory/$unit.d/lab.conf"
        case $unit in *.service)
            printf '[Service]\nProtectHome=no\nPrivateTmp=no\nTimeoutStartSec=300\nStandardError=append:/run/%s.log\n' \
                "$unit" >>"$directory/$unit.d/lab.conf" ;;
        esac
    done
    printf '[Unit]\nDefaultDependencies=no\nRequires=vhostctl.socket vhostctl-broker.socket\n' \
        >$directory/lab.target
    printf '[[allow]]\nusers = ["nobody"]\ntaps = ["vm-*"]\nmax_queues = 2\n' >/etc/vhostctl/broker.toml
}

start_systemd() {
    container=lab unshare --pid --fork --mount --mount-proc \
        /lib/systemd/systemd --system --unit=lab.target --log-target=kmsg &
    tries=0
    until [ -S /run/vhostctl-broker.sock ] && [ -S /run/vhostctl/qmp.sock ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || return 1
        sleep 1
    done
}

logs() {
    dmesg | tail -n 60 >&2
    tail -n 30 /run/*.service.log >&2
}

# Capabilities and restrictions of the process that runs `vhostctl $1`.
restrictions() {
    for status in /proc/[0-9]*/status; do
        if tr '\0' ' ' <"${status%status}cmdline" 2>/dev/null | grep -q "vhostctl $1"; then
            sed -n 's/^\(CapBnd\|CapEff\|NoNewPrivs\|Seccomp\):\t/\1 /p' "$status" | tr '\n' ' '
            echo
        fi
    done
}

trap logs EXIT
install_units
start_systemd
as_nobody="setpriv --reuid=65534 --regid=65534 --clear-groups"
$as_nobody vhostctl run --broker --tap vm-1 --queues 2 -- \
    sh -c 'cd /proc/self/fd; echo user "$(id -u)"; readlink $(echo {tapfds}:{vhostfds} | tr : " ")'
echo broker "$(restrictions broker)"

vhostctl up demo --detach --tap tap0 --device /dev/vhost-net --queues 2 --addr 192.0.2.1/24 >&2
busybox ping -c 1 -W 60 192.0.2.2 | grep received
python -c '
from pathlib import Path
from vhostctl.service.client import ServiceClient
with ServiceClient(Path("/run/vhostctl/qmp.sock")) as client:
    client.execute("set-pairs", name="demo", pairs=1)
'
busybox ping -c 1 -W 60 192.0.2.2 | grep received
echo service "$(restrictions service)"
vhostctl down demo --quit >&2
