"""Cables: two ports each, what enters one of which leaves the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

from vswitch.api import LinkInfo, Page
from vswitch.config.settings import LinkSettings
from vswitch.errors import ExistsError, NotFoundError
from vswitch.fastpath.main.port import Port
from vswitch.ports import pages


class Cables:
    """All cables of a switch, `declared` those of its file: their ends may be added later.

    `find` has the fast path's port of a name, None if there is none.
    """

    def __init__(
        self, declared: Iterable[LinkSettings], find: Callable[[str], Port | None]
    ) -> None:
        self._find = find
        self._by_title: dict[str, LinkSettings] = {}
        self._by_end: dict[str, LinkSettings] = {}
        self._serials: dict[str, int] = {}
        self._next_serial = count(1)
        for link in declared:
            self.add(link)

    @property
    def settings(self) -> list[LinkSettings]:
        """What a file would have of them."""
        return list(self._by_title.values())

    def of(self, port: str) -> LinkSettings | None:
        """The cable that ends at a port."""
        return self._by_end.get(port)

    def peer(self, port: str) -> str | None:
        """The port at the other end of its cable."""
        link = self._by_end.get(port)
        if link is None:
            return None
        return link.ports[1] if link.ports[0] == port else link.ports[0]

    def add(self, link: LinkSettings) -> None:
        """Note a cable. Raises ExistsError if its name is in use, or one of its ends."""
        if link.title in self._by_title:
            raise ExistsError(f'there is a link "{link.title}" already', hint="choose another name")
        for end in link.ports:
            if end in self._by_end:
                raise ExistsError(
                    f'"{end}" is an end of link {self._by_end[end].title} already',
                    hint=f"delete that first: vswitchctl link del {self._by_end[end].title}",
                )
        self._by_title[link.title] = link
        self._by_end |= dict.fromkeys(link.ports, link)
        self._serials[link.title] = next(self._next_serial)

    def remove(self, name: str) -> LinkSettings:
        """Forget a cable by its name. Raises NotFoundError."""
        link = self._by_title.pop(name, None)
        if link is None:
            raise NotFoundError(
                f'there is no link "{name}"', hint="vswitchctl link list lists them"
            )
        for end in link.ports:
            del self._by_end[end]
        del self._serials[name]
        return link

    def plug(self, port: Port) -> bool:
        """Make a port the end of its cable; False if it is no cable's. Workers see neither end."""
        peer_name = self.peer(port.name)
        if peer_name is None:
            return False
        peer = self._find(peer_name)
        port.connect(peer)
        if peer is not None:
            peer.connect(port)
        return True

    def unplug(self, port: Port) -> None:
        """A port is about to go: nobody is at that end of its cable then."""
        if port.peer is not None:
            port.peer.connect(None)
            port.connect(None)

    def check_free(self, port: str, what: str) -> None:
        """Raise ExistsError if a port is the end of a cable, which does not go with `what`."""
        link = self._by_end.get(port)
        if link is not None:
            raise ExistsError(
                f'"{port}" is an end of link {link.title}: {what}',
                hint=f"delete the link first: vswitchctl link del {link.title}",
            )

    def page(self, after: int, most: int) -> Page[LinkInfo]:
        """Cables from the one on that was added after number `after`, `most` of them."""
        links, following = self.declared(after, most)
        return Page([LinkInfo(name=link.title, ports=link.ports) for link in links], following)

    def declared(self, after: int, most: int) -> Page[LinkSettings]:
        """The same, as a file would have them."""
        rows = ((self._serials[title], link) for title, link in self._by_title.items())
        return pages.page(rows, after, most, lambda link: (link, 1))
