"""The node daemon: runs the CNI plugins for the shim, keeps the eBPF dataplane, and tells how it is."""
