"""The `vlan` CNI plugin: a VLAN of a NIC of the node, in the pod's network namespace."""
