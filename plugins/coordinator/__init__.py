"""The `coordinator` CNI plugin: the wiring of a pod's NIC, and the probing of its addresses."""
