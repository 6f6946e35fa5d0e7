"""All kinds of ports: each registers itself when it is imported. A line a kind."""

from vswitch.ports import guest as guest
from vswitch.ports import tap as tap
