#!/bin/bash
# A Slurm cluster of virtual machines on this one. cluster.py runs this as the first process of its own
# process, mount, network and host-name namespaces, so that the end of this process is the end of everything.
#
#     unshare --mount --pid --net --uts --fork --kill-child=KILL --mount-proc machine.sh FOLDER NUM_NODES
#
# The login host `lg` (10.77.0.254, slurmctld, munged) and the nodes n1, n2, ... (10.77.0.1, ..., slurmd), each
# with its own network, host name, mounts and process numbers. A node can resolve no other node's name, as on
# many sites. /mnt is a node's own scratch folder. Commands come as lines on standard input:
# `start n2`; `crash n2` ends all its processes; `cut n2` pulls its cable first, so that nobody is told.
set -eu
folder=$1 num_nodes=$2
net=10.77.0
export SLURM_CONF=$folder/slurm.conf

declare -A machine
start() {
    ip -n "$1" link set eth0 up
    mkdir -p "$folder/spool/$1"
    # shellcheck disable=SC2016 # the inner shell's own arguments
    # The first process of a node reaps orphans, as an init does; slurmd is its child.
    nsenter --net="/run/netns/$1" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc bash -c '
        hostname "$0" && mount --bind "$1/hosts.node" /etc/hosts && mount -t tmpfs tmpfs /mnt
        slurmd -D -f "$1/slurm.conf" -c -N "$0" &
        wait' "$1" "$folder" </dev/null >>"$folder/log/$1.out" 2>&1 &
    machine[$1]=$!
}

cut() {
    ip -n "$1" link set eth0 down
    crash "$1"
}

crash() {
    kill -KILL "${machine[$1]}"
    wait "${machine[$1]}" 2>/dev/null || true
}

hostname lg
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip link add br0 type bridge && ip addr add $net.254/24 dev br0 && ip link set br0 up
echo "127.0.0.1 localhost" >"$folder/hosts.node"
cp "$folder/hosts.node" "$folder/hosts.login"
echo "$net.254 lg" >>"$folder/hosts.login"
for i in $(seq "$num_nodes"); do
    ip netns add "n$i"
    ip -n "n$i" link set lo up
    ip link add eth0 netns "n$i" type veth peer name "v$i"
    ip link set "v$i" master br0 up
    ip -n "n$i" addr add $net."$i"/24 dev eth0
    ip -n "n$i" link set eth0 up
    echo "$net.$i n$i" >>"$folder/hosts.login"
done
mount --bind "$folder/hosts.login" /etc/hosts

munged --force --key-file="$folder/munge/munge.key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
slurmctld -D -f "$SLURM_CONF" -c </dev/null >>"$folder/log/slurmctld.out" 2>&1 &
for i in $(seq "$num_nodes"); do start "n$i"; done
echo started
while read -r command node; do
    "$command" "$node"
    printf 'obeyed\n'
done
