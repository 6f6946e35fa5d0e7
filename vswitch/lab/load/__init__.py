"""Load for any vhost-user switch, and what it is measured with."""
