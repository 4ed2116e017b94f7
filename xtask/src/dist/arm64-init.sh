#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
for m in veth sch_ingress cls_bpf nf_conntrack nf_conntrack_netlink; do modprobe $m || echo "no module $m"; done
fail() { echo "RESULT failed: $1"; poweroff -f; }
# A station: a network namespace with an address, behind a veth of this node.
station() {
    unshare -n sleep 3600 &
    pid=$!
    until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/1/ns/net)" ]; do :; done
    before=$(ls /sys/class/net)
    ip link add $1 type veth
    for name in $(ls /sys/class/net); do
        case " $(echo $before) $1 " in *" $name "*) ;; *) peer=$name ;; esac
    done
    ip link set $peer netns $pid
    ip addr add $2 dev $1
    ip link set $1 up
    nsenter -t $pid -n ip addr add $3 dev $peer
    nsenter -t $pid -n ip link set $peer up
    nsenter -t $pid -n ip route add default via ${2%/*}
}
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
station lan0 192.168.31.17/24 192.168.31.67/24; lan=$pid
station cali0 10.200.1.1/24 10.200.1.91/24; pod=$pid
for port in 8080 8081; do
    nsenter -t $pod -n sh -c "while :; do echo hello | nc -l -p $port; done" &
done
mkdir -p /etc/bridge
cat > /etc/bridge/bridge.yaml <<'C'
role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
enforcement: {engines: [ebpf]}
rules: [{name: api, direction: inbound, protocol: tcp, ports: [8080]}]
persistence: {save: never}
C
connect() { nsenter -t $lan -n sh -c "echo x | nc -w 5 10.200.1.91 $1" 2>/dev/null; }
sleep 1
[ "$(connect 8081)" = hello ] || fail "before the agent, port 8081"
bridge-agent check >/dev/null || fail check
bridge-agent run &
n=0; until bridge-agent status --ready >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 60 ] || fail ready; sleep 1; done
bridge-agent status
[ "$(connect 8080)" = hello ] || fail "the allowed port"
[ "$(connect 8081)" != hello ] || fail "the denied port"
bridge-agent flows
kill -9 $(pidof bridge-agent)
[ "$(connect 8081)" != hello ] || fail "the denied port, without the agent"
[ "$(connect 8080)" = hello ] || fail "the allowed port, without the agent"
bridge-agent down --yes || fail down
[ "$(connect 8081)" = hello ] || fail "after down"
echo "RESULT ok on $(uname -mr)"
poweroff -f
