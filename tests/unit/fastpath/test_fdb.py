"""The FDB against a dictionary that does the same, slowly."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vswitch.fastpath.main.fdb import (
    GONE_A_TURN,
    GROWS_MAX,
    SLOTS_A_TURN,
    Fdb,
    key_mac,
    mac_key,
)
from vswitch.fastpath.main.fdb_table import Shares

LIMIT = 64
# So few that most steps are about one that is there already, often at another port.
keys = st.integers(1, 12).map(lambda n: mac_key(f"52:54:00:00:00:{n:02x}", n % 3))
ports = st.integers(0, 3)


class FdbAgainstModel(RuleBasedStateMachine):
    """Entries are (port, static, tick of the last sighting)."""

    def __init__(self) -> None:
        super().__init__()
        self.fdb = Fdb(LIMIT)
        self.model: dict[int, tuple[int, bool, int]] = {}
        self.tick = self.fdb.tick
        self.most = dict.fromkeys(range(4), LIMIT)

    def dynamic(self, port: int) -> int:
        return sum(at == port and not static for at, static, _ in self.model.values())

    # Many at a time, for most of the other rules take some away.
    @rule(seen=st.lists(st.tuples(keys, ports, st.booleans()), min_size=4, max_size=24))
    def learn(self, seen: list[tuple[int, int, bool]]) -> None:
        for key, port, late in seen:
            self.learn_one(key, port, late)

    def learn_one(self, key: int, port: int, late: bool) -> None:
        learned = (self.fdb.learn_late if late else self.fdb.learn)(key, port)
        old = self.model.get(key)
        if self.dynamic(port) >= self.most[port] and (
            old is None or (not old[1] and old[0] != port)
        ):
            assert not learned, "a port has as many as it may"
            return
        if old is None and not learned:
            return  # no room; that there is some at half load is a test of its own
        if old is None or not old[1]:
            self.model[key] = (port, False, self.tick)

    @rule(port=ports, most=st.integers(1, 4))
    def limit(self, port: int, most: int) -> None:
        self.fdb.limit(port, most)
        self.most[port] = most

    @rule(key=keys, port=ports)
    def add_static(self, key: int, port: int) -> None:
        if self.fdb.add_static(key, port):
            self.model[key] = (port, True, self.tick)
        else:
            assert key not in self.model

    @rule(key=keys)
    def delete(self, key: int) -> None:
        assert self.fdb.delete(key) == (self.model.pop(key, None) is not None)

    @rule(port=st.none() | ports, statics=st.booleans())
    def flush(self, port: int | None, statics: bool) -> None:
        gone = [
            key
            for key, (at, static, _) in self.model.items()
            if (port is None or at == port) and (statics or not static)
        ]
        assert self.fdb.flush(port, statics) == len(gone)
        for key in gone:
            del self.model[key]

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.tick += seconds
        self.fdb.tick = self.tick

    @rule(limit=st.integers(1, 15))
    def age(self, limit: int) -> None:
        gone = {
            (key, port)
            for key, (port, static, seen) in self.model.items()
            if not static and self.tick - seen >= limit
        }
        assert set(self.fdb.age(limit)) == gone
        for key, _ in gone:
            del self.model[key]

    @rule(key=keys)
    def lookup(self, key: int) -> None:
        assert self.fdb.lookup(key) == self.model.get(key, (None,))[0]

    @invariant()
    def same_entries(self) -> None:
        assert len(self.fdb) == len(self.model)
        for port in self.most:
            assert self.fdb.learned(port) == self.dynamic(port)
        assert {key: (port, static, age) for key, port, static, age in self.fdb.entries()} == {
            key: (port, static, self.tick - seen)
            for key, (port, static, seen) in self.model.items()
        }


FdbAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestFdbAgainstModel = FdbAgainstModel.TestCase


def mac(n: int) -> int:
    return mac_key((0x525400000000 + n).to_bytes(6, "big").hex(":"))


@pytest.mark.parametrize("size", [16, 1000, 65536])
def test_a_table_takes_what_it_was_made_for(size: int) -> None:
    """Two choices of four places may refuse a few of the last entries, never more than 2 %."""
    fdb = Fdb(size)
    refused = sum(not fdb.learn(mac(n), n % 7) for n in range(size))
    assert refused <= size * 0.02
    assert len(fdb) == size - refused
    assert all(fdb.lookup(mac(n)) in (n % 7, None) for n in range(size))


def test_no_more_than_the_limit() -> None:
    fdb = Fdb(16)
    for n in range(100):
        fdb.learn(mac(n), 1)
    assert len(fdb) <= 16
    assert fdb.full == 100 - len(fdb)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_a_full_port_keeps_what_it_has_and_gets_no_more(late: bool) -> None:
    """Nor from another port, whatever was looked at before the table was locked."""
    fdb = Fdb(16)
    learn = fdb.learn_late if late else fdb.learn
    fdb.learn(mac(1), 1)
    fdb.learn(mac(2), 2)
    fdb.limit(1, 1)
    fdb.tick += 5
    assert not learn(mac(2), 1)
    assert not learn(mac(3), 1)
    assert learn(mac(1), 1), "its own stays, and is seen"
    assert sorted(fdb.entries()) == [(mac(1), 1, False, 0), (mac(2), 2, False, 5)]
    assert (fdb.learned(1), fdb.learned(2)) == (1, 1)
    assert learn(mac(1), 2), "what goes elsewhere leaves room"
    assert learn(mac(3), 1)
    assert (fdb.learned(1), fdb.learned(2)) == (1, 2)


def test_a_static_entry_replaces_and_is_not_moved() -> None:
    fdb = Fdb(16)
    fdb.learn(mac(1), 1)
    assert fdb.add_static(mac(1), 2)
    fdb.learn(mac(1), 3)
    assert fdb.entries() == [(mac(1), 2, True, 0)]


def test_lookups_beside_a_writer_never_see_a_third_port() -> None:
    """A reader on another thread sees the old port, the new one or nothing."""
    fdb = Fdb(1024)
    key = mac(1)
    done = threading.Event()
    seen: set[int | None] = set()

    def read() -> None:
        while not done.is_set():
            for _ in range(1000):
                seen.add(fdb.lookup(key))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in range(20000):
            fdb.learn(key, 1 + n % 2)
            fdb.learn(mac(2 + n % 500), 3)
            if n % 10 == 0:
                fdb.delete(key)
    finally:
        done.set()
        reader.join()
    assert seen <= {1, 2, None}


def test_all_zeros_is_an_address_that_nobody_has() -> None:
    """It once was the key of every empty place, with port 0 in it."""
    fdb = Fdb(16)
    assert fdb.lookup(0) is None
    fdb.learn(mac(1), 5)
    fdb.delete(mac(1))
    assert fdb.lookup(0) is None
    assert not fdb.delete(0)
    assert fdb.entries() == []


def test_a_group_address_is_no_key() -> None:
    """Nor is that of an empty place, which is one."""
    fdb = Fdb(16)
    for key in (1, 2**64 - 1):
        for call in (fdb.lookup, fdb.delete):
            with pytest.raises(ValueError, match="group address"):
                call(key)
        for change in (fdb.learn, fdb.add_static):
            with pytest.raises(ValueError, match="group address"):
                change(key, 1)
    assert len(fdb) == 0


def test_a_place_is_filled_again_and_again() -> None:
    """More often than a round counts to."""
    fdb = Fdb(1)
    keys = [mac(n) for n in range(5)]
    for n in range(1 << 20 | 3):
        key = keys[n % 5]
        assert fdb.learn(key, n % 1024)
        assert fdb.lookup(key) == n % 1024
        assert fdb.delete(key)
    fdb.tick = 2**32 - 1
    assert fdb.learn(mac(1), 1023)
    assert fdb.entries() == [(mac(1), 1023, False, 0)]
    assert fdb.add_static(mac(1), 1022)
    assert fdb.entries() == [(mac(1), 1022, True, 0)]


def test_addresses_as_text() -> None:
    assert key_mac(mac_key("52:54:00:AB:cd:01", 4094)) == ("52:54:00:ab:cd:01", 4094)
    assert key_mac(mac_key("02:00:00:00:00:00")) == ("02:00:00:00:00:00", 0)


@pytest.mark.parametrize(
    ("text", "vlan", "why"),
    [
        ("", 0, "is not a MAC address"),
        ("52:54:00:12:34", 0, "is not a MAC address"),
        ("52-54-00-12-34-56", 0, "write it as"),
        ("01:00:5e:00:00:01", 0, "is not a unicast address"),
        ("00:00:00:00:00:00", 0, "is not a unicast address"),
        ("52:54:00:12:34:56", 4095, "VLAN 4095 is not between"),
        ("52:54:00:12:34:56", -1, "VLAN -1"),
    ],
)
def test_what_is_no_address(text: str, vlan: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mac_key(text, vlan)


def test_pages_have_what_stays_once_while_others_come_and_go() -> None:
    fdb = Fdb(4 * SLOTS_A_TURN)
    staying = {mac(n) for n in range(2000)}
    for key in staying:
        assert fdb.learn(key, 1)
    seen: list[int] = []
    pages, fresh = 0, 3000
    start: int | None = 0
    while start is not None:
        some, start = fdb.page(start, 100)
        assert len(some) <= 100
        seen += [key for key, *_ in some if key in staying]
        pages += 1
        for key, *_ in some:
            if key not in staying:
                fdb.delete(key)
        for _ in range(50):
            fdb.learn(mac(fresh), 2)
            fresh += 1
    assert len(seen) == len(set(seen)) == len(staying)
    assert pages >= max(len(staying) // 100, fdb.slots // SLOTS_A_TURN)
    assert fdb.page(1 << 40, 100) == ([], None)


def test_a_turn_of_flushing_and_aging_is_limited() -> None:
    fdb = Fdb(4 * SLOTS_A_TURN)
    assert fdb.slots > 5 * SLOTS_A_TURN
    for n in range(2000):
        assert fdb.learn(mac(n), n % 2)
    fdb.add_static(mac(9000), 0)
    removed, start = fdb.flush_on(0, 0)
    assert start == SLOTS_A_TURN, "so many places, and no more"
    assert 0 < removed < 1000
    while start is not None:
        some, start = fdb.flush_on(start, 0)
        removed += some
    assert removed == 1000
    assert (fdb.learned(0), fdb.pinned(0), fdb.learned(1)) == (0, 1, 1000)
    # Who has nothing costs nothing, however big the table.
    assert fdb.flush_on(0, 0) == (0, None)
    assert fdb.flush_on(0, 7, True) == (0, None)
    fdb.tick += 10
    turns, start = 0, 0
    gone: list[tuple[int, int]] = []
    while start is not None:
        aged, start = fdb.age_on(start, 10)
        assert len(aged) <= GONE_A_TURN
        gone += aged
        turns += 1
    assert sorted(gone) == sorted((mac(n), 1) for n in range(1, 2000, 2))
    assert turns >= fdb.slots // SLOTS_A_TURN
    assert fdb.flush(0, True) == 1
    assert fdb.pinned(0) == 0


def test_static_entries_are_counted_a_port() -> None:
    fdb = Fdb(16)
    fdb.learn(mac(1), 1)
    assert fdb.find(mac(1)) == (1, False)
    fdb.add_static(mac(1), 2)
    fdb.add_static(mac(1), 2)
    assert (fdb.pinned(2), fdb.learned(1)) == (1, 0)
    fdb.add_static(mac(1), 3)
    assert (fdb.pinned(2), fdb.pinned(3)) == (0, 1)
    assert fdb.find(mac(1)) == (3, True)
    fdb.delete(mac(1))
    assert fdb.pinned(3) == 0
    assert fdb.find(mac(1)) is None


def many(count: int) -> list[int]:
    return [
        mac_key(f"52:54:00:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}") for n in range(count)
    ]


def filled(fdb: Fdb, keys: list[int]) -> list[object]:
    """Have these learned, with the tables that are needed for it; those that were replaced."""
    old: list[object] = []
    for n, key in enumerate(keys):
        if not fdb.learn(key, n % 7):
            # In a crowded bucket: with the next table there is room.
            old.append(fdb.grow())
            assert fdb.learn(key, n % 7)
        elif fdb.must_grow:
            old.append(fdb.grow())
    return old


def test_a_table_grows_with_what_is_in_it() -> None:
    fdb = Fdb(65536, grows=True)
    assert fdb.memory_len == 8192
    pinned = mac_key("52:54:00:ff:00:01")
    fdb.add_static(pinned, 9)
    keys = many(30000)
    fdb.tick = 3
    old = filled(fdb, keys)
    assert len(old) == 4
    assert fdb.memory_len == Fdb(65536).memory_len
    assert fdb.grow() is None
    fdb.tick = 10
    found = {key: (port, static, age) for key, port, static, age in fdb.entries()}
    assert found.pop(pinned) == (9, True, 9)
    assert found == {key: (n % 7, False, 7) for n, key in enumerate(keys)}
    assert sum(fdb.learned(port) for port in range(7)) == len(keys)


def test_a_table_for_very_many_is_made_whole() -> None:
    assert Fdb(GROWS_MAX + 1, grows=True).memory_len == Fdb(GROWS_MAX + 1).memory_len


@pytest.mark.parametrize("page", [1, 3, 5, 64, 1000] * 4)
def test_a_listing_has_all_once_although_the_table_grows(page: int) -> None:
    fdb = Fdb(65536, grows=True)
    early = many(200)
    filled(fdb, early)
    late = iter(many(5000)[200:])
    found: list[int] = []
    start: int | None = 0
    while start is not None:
        entries, start = fdb.page(start, page)
        assert len(entries) <= page
        found += [key for key, *_ in entries]
        filled(fdb, [key for key, _ in zip(late, range(min(100, 20 * page)), strict=False)])
    assert fdb.memory_len > 8192
    counts = {key: found.count(key) for key in early}
    # Where a page ended within a bucket that was divided, three of its entries may come again.
    assert set(counts.values()) <= {1, 2}
    assert sum(counts.values()) <= len(early) + 3 * 4


def test_aging_reaches_all_although_the_table_grows() -> None:
    fdb = Fdb(65536, grows=True)
    early = many(200)
    filled(fdb, early)
    fdb.tick += 5
    late = many(6000)[200:]
    gone, following = fdb.age_on(0, 5)
    assert following is None or len(gone) < len(early)
    filled(fdb, late)
    while following is not None:
        more, following = fdb.age_on(following, 5)
        gone += more
    assert {key for key, _ in gone} == set(early)
    assert len(fdb) == len(late)


def test_learning_beside_a_table_that_grows() -> None:
    """Two workers' threads learn; nothing is lost, counted twice or put behind another port."""
    fdb = Fdb(65536, grows=True)
    keys = many(20000)
    stop = threading.Event()
    wrong: list[tuple[int, int | None]] = []

    def learn(port: int) -> None:
        for key in keys[port::2]:
            while not fdb.learn(key, port) or fdb.lookup(key) is None:
                pass  # somebody else is writing, or there is no room yet
            found = fdb.lookup(key)
            if found != port:
                wrong.append((key, found))

    def grow() -> None:
        while not stop.is_set():
            kept.append(fdb.grow())

    kept: list[object] = []
    learners = [threading.Thread(target=learn, args=(port,)) for port in (0, 1)]
    grower = threading.Thread(target=grow)
    for thread in (grower, *learners):
        thread.start()
    for thread in learners:
        thread.join()
    stop.set()
    grower.join()
    assert wrong == []
    assert fdb.learned(0) == fdb.learned(1) == len(keys) // 2
    assert {key: port for key, port, *_ in fdb.entries()} == {
        key: n % 2 for n, key in enumerate(keys)
    }


def test_networks_share_what_is_counted_a_port() -> None:
    shares = Shares()
    one, other = Fdb(64, shares=shares), Fdb(64, shares=shares)
    one.limit(3, 2)
    for key in many(3):
        one.learn(key, 3)
    assert (one.learned(3), len(one), len(other)) == (2, 2, 0)
    assert other.learned(3) == 2, "a port is in one of them at a time"
