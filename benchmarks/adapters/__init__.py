"""What a configuration is called by other simulators: one file per peer.

Each file has `settings(config)`, the peer's own words for a configuration of ours, and runs as a
script in the peer's interpreter, where it needs nothing of this project. None of the peers' code
is here.
"""
