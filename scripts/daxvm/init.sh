#!/bin/busybox sh
# The guest's first process: makes the root and the persistent memory, runs the command, cleans up.
#
# The kernel passes WORK, a directory of the host with `settings` (END, KEEP, SHARE) and
# `command`. Three virtio ports lead to the host: 1 control, 2 and 3 the command's stdout and stderr.
# A write to one has reached the host when it returns, and is never mixed with another.

# Tells the host why there is no command to run; the host ends the VM.
fail() {
    echo "fail $*" >&9
    sleep 1000000
}

# Runs a command and fails with its last line if that fails.
try() {
    said=$("$@" 2>&1) || fail "$*: $(echo "$said" | tail -n 1)"
}

/bin/busybox --install -s /bin
mkdir /proc /sys /dev /host /memory /root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
    insmod "$module" || echo "insmod $module failed"
done
until [ -c /dev/vport0p1 ] && [ -c /dev/vport0p2 ] && [ -c /dev/vport0p3 ]; do
    usleep 10000
done
exec 9<>/dev/vport0p1

options=trans=virtio,version=9p2000.L,msize=262144
try mount -t 9p -o $options,ro,cache=loose host /host
. "/host$WORK/settings"
try mount -t tmpfs -o size=75% memory /memory
mkdir /memory/upper /memory/work
try mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs devtmpfs /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
for directory in dev/shm run; do
    mount -t tmpfs tmpfs /root/$directory
done
mount -t fusectl fusectl /root/sys/fs/fuse/connections
chmod 666 /root/dev/fuse
ln -s /proc/self/fd /root/dev/fd
for stream in 0:stdin 1:stdout 2:stderr; do
    ln -s /proc/self/fd/${stream%:*} /root/dev/${stream#*:}
done
hostname dax-vm
ulimit -Hn 524288 && ulimit -Sn 1024 # as an installed Debian has it
ip link set lo up

if [ -n "$SHARE" ]; then
    mkdir -p "/root$SHARE"
    try mount -t 9p -o $options,cache=none share "/root$SHARE"
fi
if [ -z "$KEEP" ]; then
    try chroot /root ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
    # DAX wants blocks of a page, which small filesystems do not get by default.
    try chroot /root mkfs.ext4 -q -F -b 4096 -E nodiscard /dev/pmem0
fi
# By their addresses, since the kernel numbers them in the order of a list that QEMU reverses.
memories=$(for block in /sys/block/pmem*; do
    printf '%020d %s\n' "$(cat "$block/device/resource")" "${block##*/}"
done | sort | cut -d ' ' -f 2)
number=
for memory in $memories; do
    mkdir -p "/root/pmem$number"
    try mount -t ext4 -o dax=always "/dev/$memory" "/root/pmem$number"
    number=$((number + 1))
done

echo start >&9
exec 7>/dev/vport0p2 8>/dev/vport0p3
chroot /root /bin/sh "$WORK/command" </dev/null >&7 2>&8 7>&- 8>&- 9>&-
status=$?
# The host takes nothing for the end of the output before it has seen this.
printf '\0%s' "$END" >&7
printf '\0%s' "$END" >&8
echo "exit $status" >&9

# What the command left running, and mounted on top of the persistent memory.
kill -9 -1
sync
while grep -q '^/dev/pmem' /proc/mounts; do
    tac /proc/mounts | awk '$2 ~ "^/root/" { print $2 }' | xargs -n 1 umount 2>/dev/null
    usleep 10000
done
echo down >&9
sleep 1000000
