#!/bin/sh
# The first program of the machine: mounts this host's files, read-only, under a layer that forgets, and goes on there.
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in virtio_pci 9pnet_virtio 9p overlay; do modprobe "$module"; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host || poweroff -f
mount -t tmpfs layer /layer
mkdir /layer/changed /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/changed,workdir=/layer/work root /root
exec switch_root /root /bin/sh "$(sed 's/.* bridge.guest=\([^ ]*\).*/\1/' /proc/cmdline)"
