#!/bin/bash
# Boot systemd as the first process of new namespaces, over a copy-on-write view of this machine, with
# vswitch and its unit installed as config/vswitch.service says. As root:
#
#   boot.sh WORK SITE_PACKAGES PACKAGE CONFIGURATION DRIVER
#
# WORK is a directory; WORK/out is /out inside, for what DRIVER has to say, a Python program that systemd
# runs when it is up. SITE_PACKAGES has what PACKAGE, the vswitch package, needs. Nothing outside WORK
# changes.
set -e
work=$1 site=$2 package=$3 configuration=$4 driver=$5

if [ -z "$INSIDE" ]; then
	group=$(findmnt -n -o TARGET -t cgroup2 | head -1)/vswitch-test-$$
	mkdir -p "$work"/{out,inside}
	mkdir "$group"
	# This shell stays outside, to clean up.
	(
		echo $BASHPID >"$group/cgroup.procs"
		INSIDE=1 exec timeout -s KILL 250 unshare --mount --pid --uts --ipc --net --cgroup --fork --kill-child "$0" "$@"
	) || true
	# What was in there may take a moment to be gone.
	while [ -e "$group" ]; do
		find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || true
		sleep 0.1
	done
	exit 0
fi

mount -t tmpfs -o mode=755 tmpfs "$work/inside"
mkdir "$work"/inside/{upper,work,root}
root=$work/inside/root
mount -t overlay -o "lowerdir=/,upperdir=$work/inside/upper,workdir=$work/inside/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for place in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs "$root/$place"; done
chmod 1777 "$root/tmp"
mkdir "$root"/dev/{net,pts,shm}
for device in null zero full random urandom tty net/tun; do
	touch "$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/out"
mount --bind "$work/out" "$root/out"

/usr/bin/python3 -m venv --without-pip "$root/opt/vswitch"
for one in "$site"/*; do
	case $one in *.pth | */__editable__* | */vswitch) ;; *) cp -r "$one" "$root"/opt/vswitch/lib/python3*/site-packages/ ;; esac
done
cp -rL "$package" "$root"/opt/vswitch/lib/python3*/site-packages/
for program in vswitch:main vswitchctl:ctl; do
	printf '#!/opt/vswitch/bin/python3\nfrom vswitch.cli.%s import main\nraise SystemExit(main())\n' \
		"${program#*:}" >"$root/opt/vswitch/bin/${program%:*}"
done
chmod -R a+rX "$root/opt/vswitch"
chmod a+x "$root"/opt/vswitch/bin/*
cp "$driver" "$root/opt/driver.py"
chroot "$root" useradd --system --user-group --shell /usr/sbin/nologin vswitch
install -D -m 644 "$configuration" "$root/etc/vswitch/ports.toml"

# Of this machine's units only what vswitch.service needs.
units=$root/etc/systemd/system
rm -rf "$units"/*.wants "$units/default.target"
for one in /lib/systemd/system/{sysinit,local-fs,sockets,timers,paths}.target.wants/*; do
	case $one in
	*journald* | *tmpfiles-setup.service) ;;
	*) ln -sf /dev/null "$units/$(basename "$one")" ;;
	esac
done
install -m 644 "$root$(chroot "$root" /opt/vswitch/bin/vswitch examples)/vswitch.service" "$units/"
printf '[Unit]\nDefaultDependencies=no\nRequires=driver.service\n' >"$units/driver.target"
printf '[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\n%s\n%s\n%s\n' \
	'ExecStart=/opt/vswitch/bin/python3 /opt/driver.py' \
	'StandardOutput=append:/out/log' 'StandardError=append:/out/log' >"$units/driver.service"

ip link set lo up
mkdir "$root/old"
cd "$root"
pivot_root . old
umount -l /old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
	/lib/systemd/systemd --system --unit=driver.target --log-target=console --show-status=no
