"""The vhost-user protocol: codec, connection and backend state machine.

Knows neither the switch nor the fast path: the backend drives whatever implements
`vswitch.vhost_user.datapath.DataPath`.
"""
