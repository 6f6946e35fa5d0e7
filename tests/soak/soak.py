"""`make soak`: everything that happens in months, in minutes, and not a frame unaccounted for.

    python -m tests.soak.soak --minutes 10 [--seed N]

Ports come and go, guests reboot and are killed, their memory table changes, the switch is stopped
and killed, all under traffic. Every frame says who sent it, to whom and as the how manyth, and has
a checksum. Addresses are static entries of the FDB, so each frame has one end: delivered, or
dropped.

Audits hold, to the frame: what the guests of a port had taken off their rings is its
ingress_frames; what they were given is its egress_frames; the sum of ingress is the sum of egress
plus that of all drops; and the drops that were provoked are counted under their reasons. Of a guest
that was killed the rings tell. A stopped switch takes its counters along: its last frames are
counted by the rings of all guests, and all that it took it delivered. A killed switch may have had
one burst a guest in its hands; these are counted as lost with it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.soak.crasher import Crasher
from tests.soak.traffic import DEADLINE_S, FILLER, SoakError, Station, mac_of
from tests.support.running import RunningSwitch
from vswitch.lab.guest import DEFAULT_FEATURES, Region
from vswitch.lab.guest.packets import format_mac
from vswitch.vhost_user.protocol import Feature

BURST = 64
WINDOW = 150
"""Frames on their way to one station; it has 256 buffers posted."""
SPARE = Region(1 << 32, 1 << 21, 0x7E00_0000_0000, file=1)
MTU = 2000
KINDS = (
    Feature(0),
    Feature.RING_PACKED,
    Feature.RING_PACKED | Feature.IN_ORDER,
)
ANON_GROWTH_KIB = 3072
"""What the switch's memory may grow by within one life, after it has warmed up."""


class Port:
    """A port of the switch and what was said about it there."""

    def __init__(self, name: str, socket: Path, number: int) -> None:
        self.name, self.socket, self.number = name, socket, number
        self.provoked: Counter[str] = Counter()
        """Drops that are due at this port."""
        self.taken = self.received = 0
        """What its station had counted when this port began."""


class Lab:
    """The switch, its ports and its stations."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.run_dir = run_dir
        self.switch = RunningSwitch(run_dir)
        self.lives = self.sockets = 0
        self.ports: dict[int, Port] = {}
        self.stations: dict[int, Station] = {}
        self.gone: Counter[str] = Counter()
        """Counters of ports that were removed in this life of the switch."""
        self.done: Counter[str] = Counter()
        self.samples: list[tuple[int, int]] = []
        self.resident = 3
        for number in range(self.resident):
            features = DEFAULT_FEATURES | KINDS[number]
            spare = [SPARE] if number == 0 else []
            self.add(number, features=features, required_features=features, spare_regions=spare)

    def close(self) -> None:
        for station in self.stations.values():
            station.guest.close()
        self.switch.stop()

    # Ports and stations

    def add_port(self, number: int, socket: Path | None = None) -> Port:
        if socket is None:
            self.sockets += 1
            socket = self.run_dir / f"{self.sockets}.sock"
        port = self.ports[number] = Port(f"s{number}", socket, number)
        self.switch.client.add_port(port.name, socket, mtu=MTU)
        self.switch.client.fdb_add(format_mac(mac_of(number)), port.name)
        return port

    def add(self, number: int, **options: Any) -> Station:
        port = self.add_port(number)
        self.lives += 1
        rng = random.Random(self.rng.random())
        station = Station(number, self.lives, rng, **options)
        station.guest.connect(port.socket)
        self.stations[number] = station
        return station

    def stats(self, number: int) -> dict[str, Any]:
        return dict(self.switch.client.stats(self.ports[number].name)[0])

    def remove_port(self, number: int) -> None:
        """Take a port away; what it counted stays in the books."""
        port = self.ports.pop(number)
        stats = self.switch.client.stats(port.name)[0]
        self.book(self.gone, stats)
        self.switch.client.del_port(port.name)

    @staticmethod
    def book(books: Counter[str], stats: Any) -> None:
        books["ingress"] += stats["ingress_frames"]
        books["egress"] += stats["egress_frames"]
        for reason, n in stats["drops"].items():
            books[reason] += n

    def wait_state(self, number: int, state: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while (info := self.switch.client.port(self.ports[number].name))["state"] != state:
            if time.monotonic() > deadline:
                raise SoakError(f"port s{number} is {info['state']} ({info['error']}), not {state}")
            time.sleep(0.001)  # between two looks

    # Traffic

    def traffic(self, seconds: float) -> None:
        """All send to all, no faster than they are heard."""
        sent: Counter[int] = Counter()
        before = {n: s.received for n, s in self.stations.items()}
        until = time.monotonic() + seconds
        everybody = list(self.stations)
        while time.monotonic() < until:
            for number, station in self.stations.items():
                to = self.rng.choice([n for n in everybody if n != number])
                waiting = sent[to] - (self.stations[to].received - before[to])
                sent[to] += station.send(to, max(0, min(32, WINDOW - waiting)))
            for station in self.stations.values():
                station.take()

    def quiet(self) -> None:
        """Wait until all is delivered that was sent."""
        for station in self.stations.values():
            station.drain()
        for station in self.stations.values():
            station.take()

    # Books

    def audit(self) -> Counter[str]:
        """Hold the switch's counters against the guests'. Returns the sums of this life."""
        self.quiet()
        books = Counter(self.gone)
        for number, port in self.ports.items():
            stats = self.stats(number)
            self.book(books, stats)
            station = self.stations.get(number)
            if station is not None:
                told = stats["ingress_frames"], stats["egress_frames"]
                known = station.taken - port.taken, station.received - port.received
                if told != known:
                    raise SoakError(f"{port.name}: the switch counts {told}, its guest {known}")
            drops = Counter(stats["drops"])
            for reason, n in port.provoked.items():
                if drops[reason] != n:
                    raise SoakError(f"{port.name}: {n} {reason} are due, counted are {drops}")
            surprising = drops.keys() - port.provoked.keys() - {"no-buffer"}
            if surprising:
                raise SoakError(f"{port.name}: nobody provoked {surprising}: {drops}")
        dropped = sum(n for name, n in books.items() if name not in ("ingress", "egress"))
        if books["ingress"] != books["egress"] + dropped:
            raise SoakError(f"{books}: ingress is not egress and drops")
        self.done["audits"] += 1
        self.sample()
        return books

    def sample(self) -> None:
        """Open descriptors and private memory, while only residents are there."""
        if len(self.ports) != self.resident:
            return
        pid = self.switch.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        anon = int(status.split("RssAnon:")[1].split()[0])
        self.samples.append((len(os.listdir(f"/proc/{pid}/fd")), anon))

    def check_growth(self) -> None:
        """Within a life of the switch neither descriptors nor memory grow."""
        samples, self.samples = self.samples, []
        if len(samples) < 2:
            return
        fds = {fds for fds, _ in samples}
        if len(fds) != 1:
            raise SoakError(f"open descriptors were {sorted(fds)} with the same ports")
        anon = [anon for _, anon in samples]
        if len(anon) >= 12:
            early, late = statistics.median(anon[4:8]), statistics.median(anon[-4:])
            if late > early + ANON_GROWTH_KIB:
                raise SoakError(f"the switch grew from {early} to {late} KiB: {anon}")
            self.done["growth KiB, most"] = max(self.done["growth KiB, most"], int(late - early))

    # What happens

    def come_and_go(self) -> None:
        """A port and its guest for a while."""
        number = self.resident + self.rng.randrange(40)
        features = DEFAULT_FEATURES | self.rng.choice(KINDS)
        self.add(number, features=features)
        self.traffic(0.1)
        self.quiet()
        station = self.stations[number]
        if self.rng.random() < 0.5:
            station.guest.disconnect()
        self.audit_leaving(number)
        if self.rng.random() < 0.5:
            station.guest.drop()
            self.wait_state(number, "listening")
            # Frames to a port where nobody is end there.
            n = self.stations[0].send(number, 40)
            self.ports[0].provoked["egress-down"] += n
            self.stations[0].drain()
        self.remove_port(number)
        station.guest.close()

    def audit_leaving(self, number: int) -> None:
        """The books of a port whose guest leaves now, quiet already."""
        station, port = self.stations.pop(number), self.ports[number]
        stats = self.stats(number)
        told = stats["ingress_frames"], stats["egress_frames"]
        known = station.taken - port.taken, station.received - port.received
        if told != known:
            raise SoakError(f"{port.name}: the switch counts {told}, its guest {known}")

    def reboot(self) -> None:
        """A guest forgets all and begins anew, while others go on sending to it."""
        number = self.rng.randrange(self.resident)
        station = self.stations[number]
        others = [s for n, s in self.stations.items() if n != number]
        for other in others:
            other.send(number, 40)
        station.send(others[0].number, 40)
        self.drops_allowed(others, "egress-down", station.reboot)
        # What lay in the transmitq between its disabling and its stop.
        self.ports[number].provoked["disabled"] = self.stats(number)["drops"].get("disabled", 0)

    def drops_allowed(self, senders: list[Station], reason: str, deed: Callable[[], None]) -> None:
        """Do it; some frames may be dropped meanwhile, how many the books say themselves."""
        deed()
        for sender in senders:
            sender.drain()
            counted = self.stats(sender.number)["drops"].get(reason, 0)
            self.ports[sender.number].provoked[reason] = counted

    def crash(self) -> None:
        """A frontend process is killed in the middle of sending and receiving."""
        number = 200 + self.rng.randrange(8)
        port = self.add_port(number)
        self.lives += 1
        crasher = Crasher(
            number, self.lives, self.rng.randrange(1 << 30), port.socket, list(self.stations)
        )
        try:
            crasher.wait()
            until = time.monotonic() + self.rng.uniform(0.02, 0.3)
            while time.monotonic() < until:
                for station in self.stations.values():
                    station.send(number, self.rng.randrange(16))
                    station.take()
            crasher.kill()
            self.wait_state(number, "listening")
            # Whoever sent to it after its end had its frames dropped there.
            self.drops_allowed(list(self.stations.values()), "egress-down", self.quiet)
            stats = self.stats(number)
            told = stats["ingress_frames"], stats["egress_frames"]
            if told != crasher.left():
                raise SoakError(
                    f"{port.name}: the switch counts {told}, the rings say {crasher.left()}"
                )
            self.done["frames of killed guests"] += sum(told)
        finally:
            crasher.close()
        self.remove_port(number)

    def hot_plug(self) -> None:
        """The memory table changes under running rings; now and then the rings move there."""
        guest = self.stations[0].guest
        guest.plug(SPARE)
        self.traffic(0.05)
        self.quiet()
        if self.rng.random() < 0.5:
            self.stations[0].reboot()
            self.traffic(0.05)
            self.quiet()
        # What lies in the region is given up first.
        self.stations[0].guest.stop_rings()
        self.stations[0].take()
        guest.unplug(SPARE)
        guest.reboot_stopped()

    def noise(self) -> None:
        """Frames that are to be dropped, each kind under its reason."""
        station = self.rng.choice(list(self.stations.values()))
        to, own = mac_of((station.number + 1) % self.resident), mac_of(station.number)
        kinds = {
            "runt": FILLER[:10],
            "bad-source": to + b"\xff" * 6 + FILLER[:50],
            "same-port": own + own + FILLER[:50],
        }
        for reason, frame in kinds.items():
            n = station.send_raw([frame] * self.rng.randrange(1, 40))
            self.ports[station.number].provoked[reason] += n
            station.drain()

    def overrun(self) -> None:
        """A guest that posts no buffers for a while: what does not fit is counted at its port."""
        number = self.rng.randrange(self.resident)
        station = self.stations[number]
        station.guest.auto_post = False
        try:
            for other in self.stations.values():
                if other is not station:
                    for _ in range(3):
                        other.send(number, 200)
                        other.drain()
        finally:
            station.guest.auto_post = True
        station.take()
        station.guest.receiveqs[0].ring.post()
        station.guest.receiveqs[0].notify()
        dropped = self.stats(number)["drops"].get("no-buffer", 0)
        if not dropped:
            raise SoakError(f"{station.name}: 1200 frames for 256 buffers and none was dropped")

    def restart(self, kill: bool) -> None:
        """The switch ends in the middle of traffic, and its guests go on with another one."""
        self.audit()
        self.check_growth()
        taken = sum(s.taken for s in self.stations.values())
        received = sum(s.received for s in self.stations.values())
        # In the middle of it: the guests poll, and notice nothing for now.
        deed = self.switch.process.kill if kill else self.switch.process.terminate
        timer = threading.Timer(self.rng.uniform(0.02, 0.1), deed)
        timer.start()
        self.traffic(0.2)
        timer.join()
        self.switch.process.wait(DEADLINE_S)
        if kill:
            self.switch.kill()
        else:
            self.switch.stop()
        for station in self.stations.values():
            station.guest.drop()
        self.switch = RunningSwitch(self.run_dir)
        self.gone.clear()
        sockets = {number: port.socket for number, port in self.ports.items()}
        for number in sorted(self.stations):
            self.add_port(number, sockets[number])
        for station in self.stations.values():
            station.guest.reconnect()
        self.quiet()
        # What the new switch has counted so far; the rest of what was taken was the old one's.
        ingress = egress = 0
        for number, station in self.stations.items():
            stats = self.stats(number)
            # To guests that came back later than their sender.
            self.ports[number].provoked["egress-down"] = stats["drops"].get("egress-down", 0)
            ingress += stats["ingress_frames"]
            egress += stats["egress_frames"]
            self.ports[number].taken = station.taken - stats["ingress_frames"]
            self.ports[number].received = station.received - stats["egress_frames"]
        old_taken = sum(s.taken for s in self.stations.values()) - taken - ingress
        old_received = sum(s.received for s in self.stations.values()) - received - egress
        lost = old_taken - old_received
        if not 0 <= lost <= (BURST * len(self.stations) if kill else 0):
            raise SoakError(
                f"the switch that {'was killed' if kill else 'stopped'} had taken {old_taken} "
                f"frames and delivered {old_received}"
            )
        self.done["lost with a killed switch"] += lost
        self.done["frames of a switch's last moments"] += old_taken


def soak(seconds: float, seed: int, run_dir: Path, say: Callable[[str], None]) -> Counter[str]:
    """Go on for so long. Raises SoakError; returns what was done, and the sums of frames."""
    lab = Lab(run_dir, seed)
    sums: Counter[str] = Counter()
    events: list[tuple[str, Callable[[], None]]] = [
        ("ports that came and went", lab.come_and_go),
        ("reboots", lab.reboot),
        ("killed guests", lab.crash),
        ("memory tables changed", lab.hot_plug),
        ("bursts of noise", lab.noise),
        ("overruns", lab.overrun),
    ]
    begun = said = time.monotonic()
    try:
        n = 0
        while time.monotonic() - begun < seconds:
            # All of them in turn, in another order each time, then an end of the switch.
            for name, event in lab.rng.sample(events, len(events)):
                lab.traffic(0.05)
                event()
                lab.done[name] += 1
                lab.audit()
            n += 1
            if n % 5 == 0 or seconds < 60:
                sums += lab.audit()
                kill = lab.rng.random() < 0.5
                lab.restart(kill)
                lab.done["killed switches" if kill else "stopped switches"] += 1
                lab.audit()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{said - begun:.0f} s: " + describe(lab.done))
        sums += lab.audit()
        lab.check_growth()
        total = sum(station.received for station in lab.stations.values())
        lab.done["frames checked by those who stayed"] = total
    finally:
        lab.close()
    lab.done.update({f"frames: {name}": n for name, n in sums.items()})
    return lab.done


def describe(done: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(done.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak the switch.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, {options.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="vswitch-") as run_dir:
        try:
            done = soak(
                60 * options.minutes, seed, Path(run_dir), lambda text: print(text, flush=True)
            )
        except SoakError as exc:
            print(f"FAILED: {exc}")
            return 1
    print("passed:")
    for name, n in sorted(done.items()):
        print(f"  {name:40} {n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
