# Runs in the virtual machine: sets up the host environment that the lab expects, runs the jobs one after the other, and
# ends.
# @KERNEL_ROOT@, @OUTPUT@ and @PATH@ are filled in.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /sys/fs/cgroup
mount -t devpts pts /dev/pts
# Not /tmp: the programs to run may lie there.
for directory in /dev/shm /run; do mount -t tmpfs tmp "$directory"; done
mkdir /run/output
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 output /run/output
# An emulated processor is slow.
export PATH='@PATH@' HOME=/root BRIDGE_PATIENCE=15
release=$(uname -r)
mkdir -p "/lib/modules/$release"
mount --bind "@KERNEL_ROOT@/lib/modules/$release" "/lib/modules/$release"
# iptables asks the kernel for modules, and the kernel asks this.
printf '#!/bin/sh\nexec /bin/busybox modprobe "$@"\n' > /run/modprobe
chmod +x /run/modprobe
echo /run/modprobe > /proc/sys/kernel/modprobe
busybox ip link set lo up
echo "Linux $release"
cd '@WORKSPACE@' || busybox poweroff -f
while IFS='	' read -r name seconds command; do
    before=$(cut -d' ' -f1 /proc/uptime)
    timeout "$seconds" sh -c "$command" > "/run/output/$name.out" 2> "/run/output/$name.err" < /dev/null
    status=$?
    echo "$status" > "/run/output/$name.status"
    echo "$name: exit code $status, from $before s to $(cut -d' ' -f1 /proc/uptime) s"
done < /run/output/jobs
busybox sync
busybox poweroff -f
