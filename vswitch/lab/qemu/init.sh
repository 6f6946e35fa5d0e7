#!/bin/busybox sh
# /init of the lab's guests. Configures eth0 from the kernel command line
# (lab.name=, lab.ip=ADDR/LEN) and then serves commands on the second serial port.
#
# Protocol on that port, binary clean, one command at a time:
#   guest -> host   "ready BOOT_ID\n"                  once after every boot
#   host  -> guest  "TOKEN SECONDS BASE64\n"           run this script, for at most SECONDS
#   guest -> host   "done TOKEN EXIT_CODE SIZE\n" and SIZE bytes of output
# `lab.probe=1` powers the guest off at once: the host only asks whether it boots.

/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /dev /proc /sys /tmp /run /etc
/bin/busybox --install -s
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TERM=dumb
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

name=guest ip= probe=
for word in $(cat /proc/cmdline); do
    case $word in
    lab.name=*) name=${word#*=} ;;
    lab.ip=*) ip=${word#*=} ;;
    lab.probe=*) probe=1 ;;
    esac
done
[ -n "$probe" ] && { echo "lab: probe reached /init"; reboot -f; }

mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs -o size=85% tmp /tmp
hostname "$name"
for module in /modules/*.ko; do
    insmod "$module" || echo "lab: cannot load $module"
done

ip link set lo up
waited=0
while [ ! -e /sys/class/net/eth0 ] && [ $waited -lt 100 ]; do
    usleep 50000
    waited=$((waited + 1))
done
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    [ -n "$ip" ] && ip addr add "$ip" dev eth0
else
    echo "lab: no eth0"
fi

exec 3<>/dev/ttyS1
stty raw -echo <&3
printf '\nready %s\n' "$(cat /proc/sys/kernel/random/boot_id)" >&3
cd /tmp

serve() {
    while true; do
        IFS=' ' read -r token seconds script <&3 || { usleep 100000; continue; }
        [ -n "$script" ] || continue
        echo "$script" | base64 -d >/run/script
        timeout -s KILL "$seconds" sh /run/script >/run/output 2>&1 </dev/null 3>&-
        code=$?
        # The size is fixed now: what a background job adds to the file later is not part of the answer.
        size=$(stat -c %s /run/output)
        printf 'done %s %s %s\n' "$token" "$code" "$size" >&3
        head -c "$size" /run/output >&3
        # A job left in the background may still write to the old file: give the next command a new one.
        rm -f /run/output
    done
}

# Not in process 1: jobs left in the background become its children, and the shell's `read`, when
# the end of a child interrupts it, forgets what it has of the line.
serve &
while true; do wait; sleep 1; done
