#!/usr/bin/env bash
# Two network namespaces joined by a veth pair whose both ends send at RATE (tc tbf). Needs root and iproute2.
#   benchmarks/link.sh up 1gbit | benchmarks/link.sh rate 500mbit | benchmarks/link.sh down
set -euo pipefail

shape() { # a bucket of 128 kB and 100 ms of queue: what gloo's sockets keep full
  for side in 0 1; do
    ip netns exec "dbo$side" tc qdisc replace dev "veth-dbo$side" root tbf rate "$1" burst 128kb latency 100ms
  done
}

case "$1" in
  up)
    ip netns add dbo0
    ip netns add dbo1
    ip link add veth-dbo0 netns dbo0 type veth peer name veth-dbo1 netns dbo1
    for side in 0 1; do
      ip -n "dbo$side" address add "10.77.0.$((side + 1))/24" dev "veth-dbo$side"
      ip -n "dbo$side" link set "veth-dbo$side" up
      ip -n "dbo$side" link set lo up
    done
    shape "$2"
    ;;
  rate) shape "$2" ;;
  down)
    ip netns delete dbo0 || true
    ip netns delete dbo1 || true
    ;;
  *) echo "usage: $0 up RATE | rate RATE | down" >&2; exit 2 ;;
esac
