"""Bytes through TCP connections between guests, hashed on both sides.

nc only opens the connection (-e) and leaves it to programs that read and write large blocks: its
own copying is most of the work otherwise. The hash is MD5: nobody attacks it, and under TCG a
guest takes several times as long for SHA-256 as for the transfer.
"""

from __future__ import annotations

from tests.e2e.testbed import PATIENCE_S
from vswitch.lab.qemu.guest import Guest

BLOCK_LEN = 2_000_000
RECORD_LEN = 65536
PROGRESS_LEN = 200_000
"""More than any test sends besides, in bytes."""


class Transfer:
    """A connection from one guest to another that carries at least `size` bytes.

    `address` is one of the receiver's, its usual one if left out. Transfers at the same time need
    ports of their own. With `made`, the hash that an earlier `make_data` returned, what that made
    is sent once more. With `until_told` it goes on after `size` bytes until `finish` ends it,
    however long what is tested takes: without it nobody knows whether it is still under way.
    """

    def __init__(
        self,
        sender: Guest,
        receiver: Guest,
        size: int,
        *,
        address: str | None = None,
        port: int = 5000,
        made: str | None = None,
        until_told: bool = False,
    ) -> None:
        self._sender = sender
        self._receiver = receiver
        self._port = port
        self._size = size
        self._until_told = until_told
        data = f"/tmp/data-{port}" if until_told else "/tmp/data"
        self._sent_sum = made or ""
        if until_told:
            make_endless_data(sender, size, port)
        elif made is None:
            self._sent_sum = make_data(sender, size)
        receive(receiver, port)
        sender.check(
            f"rm -f /tmp/sent-{port}\n"
            f"(nc {address or receiver.ip} {port} -e {data}; echo $? >/tmp/sent-{port}) "
            ">/dev/null 2>&1 &"
        )
        # Whoever breaks the network now shall break a connection, not an attempt at one.
        receiver.check(f"until [ -e /tmp/taken-{port} ]; do usleep 20000; done", PATIENCE_S)

    def finish(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the end; the receiver's hash must be the sender's."""
        if self._until_told:
            self._sender.check(f": >/tmp/enough-{self._port}")
        received, records = received_data(self._receiver, self._port, timeout_s)
        sent = f"/tmp/sent-{self._port}"
        said = self._sender.check(
            f"until [ -s {sent} ]; do usleep 20000; done; cat {sent}", PATIENCE_S
        )
        assert said.strip() == "0", f"the sender's end: {said!r}, received: {records}"
        blocks, block_len = _blocks(self._size)
        if self._until_told:
            blocks = int(self._sender.check(f"cat /tmp/blocks-{self._port}"))
            self._sent_sum = hash_data(self._sender, blocks, block_len)
        sent_len = blocks * block_len + sum(len(f"{n}\n") for n in range(1, blocks + 1))
        # Bytes that are missing and bytes that are wrong are different defects.
        assert records[-1] == _records_out(sent_len), f"{sent_len} bytes sent, received: {records}"
        assert received == self._sent_sum, f"received {received!r}, sent {self._sent_sum!r}"

    def moves_on(self) -> None:
        """Wait until it has got further: it is under way, and the network carries it."""
        assert self._until_told, "it may be over at any time"
        counter = "/sys/class/net/eth0/statistics/rx_bytes"
        self._receiver.check(
            f"until=$(($(cat {counter}) + {PROGRESS_LEN}))\n"
            f"while [ ! -e /tmp/sum-{self._port} ] && [ $(cat {counter}) -lt $until ]; do\n"
            "    usleep 20000\n"
            "done\n"
            f"[ ! -e /tmp/sum-{self._port} ]",
            PATIENCE_S,
        )

    def goes_on_in(self, guest: Guest) -> None:
        """The receiver has moved to another QEMU: wait until the transfer has got further there."""
        self._receiver = guest
        self.moves_on()

    def under_way(self) -> bool:
        """Whether the connection is still there, whatever it carries at the moment."""
        assert self._until_told, "it may be over at any time"
        return self._receiver.run(f"[ -e /tmp/sum-{self._port} ]").exit_code != 0


def make_data(guest: Guest, size: int) -> str:
    """Make /tmp/data, a program that writes `size` bytes or a little more; returns their hash.

    A random block over and over, each time with its number: random numbers for all of it would
    take a guest longer than to send it, and still no two places may be mistaken for each other.
    """
    blocks, block_len = _make_block(guest, size)
    guest.check(f"echo '{_in_order(blocks)}' >/tmp/data; chmod +x /tmp/data")
    return hash_data(guest, blocks, block_len)


def make_endless_data(guest: Guest, size: int, port: int) -> None:
    """Make /tmp/data-PORT, which writes the same until there is /tmp/enough-PORT, `size` at least.

    How many blocks that were stands in /tmp/blocks-PORT afterwards.
    """
    blocks, _ = _make_block(guest, size)
    guest.check(
        f"rm -f /tmp/enough-{port} /tmp/blocks-{port}\n"
        f"cat >/tmp/data-{port} <<'END'\n"
        "n=0\n"
        f"while [ $n -lt {blocks} ] || [ ! -e /tmp/enough-{port} ]; do\n"
        "    n=$((n + 1))\n"
        "    echo $n && cat /tmp/block || exit 1\n"
        "done\n"
        f"echo $n >/tmp/blocks-{port}\n"
        "END\n"
        f"chmod +x /tmp/data-{port}"
    )


def hash_data(guest: Guest, blocks: int, block_len: int) -> str:
    """The hash of so many blocks of what was made in a guest."""
    return guest.check(
        f"({_in_order(blocks)}) | md5sum", timeout_s=30 + blocks * block_len / 5_000_000
    )


def _make_block(guest: Guest, size: int) -> tuple[int, int]:
    """Make /tmp/block; returns how many of it `size` bytes are, and its length in bytes."""
    blocks, block_len = _blocks(size)
    guest.check(f"head -c {block_len} /dev/urandom >/tmp/block")
    return blocks, block_len


def _blocks(size: int) -> tuple[int, int]:
    block_len = min(size, BLOCK_LEN)
    return -(-size // block_len), block_len


def _in_order(blocks: int) -> str:
    return f"for i in $(seq {blocks}); do echo $i; cat /tmp/block; done"


def receive(guest: Guest, port: int) -> None:
    """Have a guest take one TCP connection and hash what comes; see `received_data`."""
    result, program = f"/tmp/sum-{port}", f"/tmp/receive-{port}"
    guest.check(
        f"rm -f {result} /tmp/taken-{port}; echo ': >/tmp/taken-{port}' >{program}\n"
        f"echo 'dd bs={RECORD_LEN} iflag=fullblock 2>/tmp/dd-{port} |' >>{program}\n"
        f"echo 'md5sum >{result}.part' >>{program}\n"
        f"echo 'cat /tmp/dd-{port} >>{result}.part; mv {result}.part {result}' >>{program}\n"
        f"chmod +x {program}\n"
        f"nc -l -p {port} -e {program} >/dev/null 2>&1 &\n"
        f"until netstat -ltn | grep -q ':{port} '; do usleep 20000; done",
        PATIENCE_S,
    )


def received_sum(guest: Guest, port: int, timeout_s: float = PATIENCE_S) -> str:
    """Wait for the end of the connection that `receive` waits for; the hash of what came."""
    return received_data(guest, port, timeout_s)[0]


def received_data(guest: Guest, port: int, timeout_s: float = PATIENCE_S) -> tuple[str, list[str]]:
    """The same, and what dd says of it: errors, if any, and how many records it was."""
    result = f"/tmp/sum-{port}"
    said = guest.check(f"until [ -s {result} ]; do usleep 20000; done; cat {result}", timeout_s)
    md5, *records = said.splitlines()
    print(f"port {port} of guest {guest.name} received: {', '.join(records)}")
    return f"{md5}\n", records


def _records_out(length: int) -> str:
    """How dd ends that has passed so many bytes on."""
    return f"{length // RECORD_LEN}+{1 if length % RECORD_LEN else 0} records out"
