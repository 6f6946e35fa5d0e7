#!/bin/bash
# A normal user with nothing set, in a clone in the home directory: the README from its first command to
# the lab of one's own.
set -eo pipefail
cd ~/vswitch
make demo
make test

python3 -m venv ~/venv
~/venv/bin/pip install --quiet .
# In the clone, whose sources are not built for this environment.
~/venv/bin/vswitch demo --guests software
~/venv/bin/vswitch start --config config/user.toml 2>~/vswitch.log &
until grep -q 'vswitch: ready' ~/vswitch.log; do
	kill -0 $! || { cat ~/vswitch.log; exit 1; }
	sleep 0.1
done
~/venv/bin/vswitchctl add-port vm3 config/vm3.sock
~/venv/bin/vswitchctl show
~/venv/bin/vswitchctl fdb show
~/venv/bin/vswitchctl stats
~/venv/bin/vswitchctl stop
wait $!
