"""Bytes through TCP connections between guests, hashed on both sides.

nc only opens the connection (-e) and leaves it to programs that read and write large blocks: its
own copying is most of the work otherwise. The hash is MD5: nobody attacks it, and under TCG a
guest takes several times as long for SHA-256 as for the transfer.
"""

from __future__ import annotations

from vswitch.lab.guest import Guest

BLOCK_LEN = 2_000_000


class Transfer:
    """A connection from one guest to another that carries at least `size` bytes.

    `address` is one of the receiver's, its usual one if left out. Transfers at the same time need
    ports of their own. With `made`, the hash that an earlier `make_data` returned, what that made
    is sent once more.
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
    ) -> None:
        self._sender = sender
        self._receiver = receiver
        self._port = port
        self.sent_sum = made or make_data(sender, size)
        receive(receiver, port)
        sender.check(
            f"rm -f /tmp/sent-{port}\n"
            f"(nc {address or receiver.ip} {port} -e /tmp/data; echo $? >/tmp/sent-{port}) "
            ">/dev/null 2>&1 &"
        )
        # Whoever breaks the network now shall break a connection, not an attempt at one.
        receiver.check(f"until [ -e /tmp/taken-{port} ]; do usleep 20000; done")

    def finish(self, timeout_s: float = 60.0) -> None:
        """Wait for the end; the receiver's hash must be the sender's."""
        received = received_sum(self._receiver, self._port, timeout_s)
        assert received == self.sent_sum, f"received {received!r}, sent {self.sent_sum!r}"
        sent = f"/tmp/sent-{self._port}"
        said = self._sender.check(f"until [ -s {sent} ]; do usleep 20000; done; cat {sent}")
        assert said.strip() == "0"

    def goes_on_in(self, guest: Guest) -> bool:
        """The receiver has moved to another QEMU; whether the transfer is still under way there."""
        self._receiver = guest
        return self.under_way()

    def under_way(self) -> bool:
        return self._receiver.run(f"[ -e /tmp/sum-{self._port} ]").exit_code != 0


def make_data(guest: Guest, size: int) -> str:
    """Make /tmp/data, a program that writes `size` bytes or a little more; returns their hash.

    A random block over and over, each time with its number: random numbers for all of it would
    take a guest longer than to send it, and still no two places may be mistaken for each other.
    """
    block_len = min(size, BLOCK_LEN)
    return guest.check(
        f"head -c {block_len} /dev/urandom >/tmp/block\n"
        f"echo 'for i in $(seq {-(-size // block_len)}); do echo $i; cat /tmp/block; done' "
        ">/tmp/data\n"
        "chmod +x /tmp/data; sh /tmp/data | md5sum",
        timeout_s=30 + size / 5_000_000,
    )


def receive(guest: Guest, port: int) -> None:
    """Have a guest take one TCP connection and hash what comes; see `received_sum`."""
    result, program = f"/tmp/sum-{port}", f"/tmp/receive-{port}"
    guest.check(
        f"rm -f {result} /tmp/taken-{port}; echo ': >/tmp/taken-{port}' >{program}\n"
        f"echo 'dd bs=64k 2>/tmp/dd-{port} | md5sum >{result}.part' >>{program}\n"
        f"echo 'tail -n 1 /tmp/dd-{port} >>{result}.part; mv {result}.part {result}' >>{program}\n"
        f"chmod +x {program}\n"
        f"nc -l -p {port} -e {program} >/dev/null 2>&1 &\n"
        f"until netstat -ltn | grep -q ':{port} '; do usleep 20000; done"
    )


def received_sum(guest: Guest, port: int, timeout_s: float = 60.0) -> str:
    """Wait for the end of the connection that `receive` waits for; the hash of what came.

    What dd says of its length is logged: a test that fails shows whether any of it was missing.
    """
    result = f"/tmp/sum-{port}"
    said = guest.check(f"until [ -s {result} ]; do usleep 20000; done; cat {result}", timeout_s)
    md5, length = said.splitlines()
    print(f"port {port} of guest {guest.name} received: {length}")
    return f"{md5}\n"
