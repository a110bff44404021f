#!/bin/sh
# What tests/vm/vmm_proof.py has its guest do. Names of ports are those of tests/vm/tcp_qemu.py.
receiver=7001 sender=7002 statistics=7003 echo=7004 iperf=5201
net=/sys/class/net/eth0

listeners() {
	cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A '
}

# An iperf3 for each queue pair, on a CPU of its own, which is what the driver chooses by. One
# ends over a client that it lost, and says so.
serve() {
	echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save
	printf '#!/bin/sh\ntee /tmp/file | sha256sum\n' >/bin/receive
	chmod +x /bin/receive
	nc -ll -p $receiver -e /bin/receive &
	nc -ll -p $sender -e cat /tmp/file &
	nc -ll -p $statistics -e grep -r . $net/statistics/ &
	nc -ll -p $echo -e cat &
	pair=0
	while [ -d $net/queues/tx-$pair ]; do
		while :; do
			taskset $((1 << pair)) iperf3 -s -J -p $((iperf + pair)) | grep '"error"' >>/tmp/iperf3
		done &
		pair=$((pair + 1))
	done
	until [ "$(listeners)" = $((pair + 4)) ]; do usleep 100000; done
}

# Where the MSI-X capability (11) is in the configuration space $1.
msix() {
	at=$(peek "$1" 52)
	while [ "$at" != 0 ]; do
		[ "$(peek "$1" "$at")" = 17 ] && break
		at=$(peek "$1" $((at + 1)))
	done
	echo "$at"
}

peek() {
	hexdump -s "$2" -n 1 -e '1/1 "%d"' "$1"
}

poke() {
	printf "$3" | dd bs=1 seek="$2" conv=notrunc of="$1" 2>/dev/null
}

# Mask (\300) or unmask (\200) every vector at once: the high byte of the MSI-X control word.
function_mask() {
	poke "$config" $control "$1"
}

find_control() {
	config=$(readlink -f $net/device/..)/config
	control=$(($(msix "$config") + 3))
	[ $control -gt 3 ]
}

# While /tmp/mask is there, mask every vector and unmask it again, four times at least; with two
# CPUs also send each interrupt to the other CPU in turn, for which Linux masks it.
mask() {
	numbers=$(sed -n 's/^ *\([0-9]*\):.*virtio0-.*/\1/p' /proc/interrupts)
	cpu=1 rounds=0
	find_control || return
	while [ -e /tmp/mask ] || [ $rounds -lt 4 ]; do
		function_mask '\300'
		function_mask '\200'
		if [ "$(nproc)" -gt 1 ]; then
			for number in $numbers; do echo $cpu >"/proc/irq/$number/smp_affinity"; done
			cpu=$((3 - cpu))
		fi
		rounds=$((rounds + 1))
	done
	echo $rounds >/tmp/rounds
}

case $1 in
hold) find_control && function_mask '\300' ;;
release) find_control && function_mask '\200' ;;
serve) serve >/dev/null 2>&1 </dev/null ;;
mask)
	touch /tmp/mask
	mask >/dev/null 2>&1 </dev/null &
	;;
unmask)
	rm /tmp/mask
	until [ -s /tmp/rounds ]; do usleep 100000; done
	cat /tmp/rounds
	rm /tmp/rounds
	;;
esac
