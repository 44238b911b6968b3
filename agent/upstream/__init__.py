"""Upstream's HTTP API on upstream's socket, so that its executables, left on a node during a swap, go on working."""
