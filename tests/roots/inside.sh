#!/bin/bash
# What roots.py runs in namespaces of its own: inside.sh ROOT WORD...
#
# Mounts what a system has over ROOT, goes in, and does what WORD says. Every mount ends with this
# mount namespace, however that ends.
set -eo pipefail
root=$1
shift

if [ -z "$INSIDE" ]; then
	mount --make-rprivate /
	# The new root has to be a mount of its own.
	mount --bind "$root" "$root"
	mount -t proc proc "$root/proc"
	mount -t sysfs sysfs "$root/sys"
	mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup" || true
	mount -t tmpfs -o mode=755 tmpfs "$root/run"
	mount -t tmpfs -o mode=755 tmpfs "$root/dev"
	mkdir "$root"/dev/{net,pts,shm}
	for device in null zero full random urandom tty net/tun kvm userfaultfd fuse; do
		[ -e "/dev/$device" ] || continue
		touch "$root/dev/$device"
		mount --bind "/dev/$device" "$root/dev/$device"
	done
	mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
	mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
	ln -s pts/ptmx "$root/dev/ptmx"
	ln -s /proc/self/fd "$root/dev/fd"
	ln -s /proc/self/fd/0 "$root/dev/stdin"
	ln -s /proc/self/fd/1 "$root/dev/stdout"
	ln -s /proc/self/fd/2 "$root/dev/stderr"
	hostname "$(cat "$root/etc/hostname")"
	cp "$0" "$root/root/inside.sh"
	mkdir -p "$root/.outside"
	cd "$root"
	pivot_root . .outside
	cd /root
	INSIDE=1 exec /bin/bash -c 'umount -l /.outside && rmdir /.outside && exec /bin/bash /root/inside.sh "$@"' inside / "$@"
fi

export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -q -o APT::Sandbox::User=root "$@"; }

prepare() {
	[ ! -e /root/prepared ] || return 0
	apt_get update
	# What the README asks for, and nothing else.
	apt_get install --yes --no-install-recommends $ASKED_FOR
	touch /root/prepared
}

own_certificates() {
	[ -n "$CERTIFICATES" ] || return 0
	# A network that has certificates of its own: a fresh system there has been told of them.
	command -v update-ca-certificates >/dev/null || apt_get install --yes --no-install-recommends ca-certificates
	update-ca-certificates
	export PIP_CERT=/etc/ssl/certs/ca-certificates.crt
}

case $1 in
keyring)
	apt_get update
	cd /tmp
	apt_get download "$2"
	mkdir -p /root/keyring
	dpkg-deb -x "$2"_*.deb /root/keyring
	;;
demo | test)
	prepare
	own_certificates
	cd /root/vswitch
	make "$1"
	;;
user)
	prepare
	own_certificates
	# What only root may install.
	make -C /root/vswitch setup
	id newcomer 2>/dev/null || useradd --create-home --shell /bin/bash newcomer
	rm -rf /home/newcomer/vswitch
	git clone --quiet --no-hardlinks /root/vswitch /home/newcomer/vswitch
	chown -R newcomer: /home/newcomer
	cp /root/vswitch/tests/roots/user.sh /home/newcomer/
	setpriv --reuid newcomer --regid newcomer --init-groups env -i PATH="$PATH" HOME=/home/newcomer \
		LANG=C.UTF-8 TERM=dumb ${PIP_CERT:+PIP_CERT="$PIP_CERT"} ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} \
		${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
		/bin/bash /home/newcomer/user.sh
	;;
esac
