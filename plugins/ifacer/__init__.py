"""The `ifacer` CNI plugin: makes the VLANs and bonds that pods' NICs have as their masters."""
