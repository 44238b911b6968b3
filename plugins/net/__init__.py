"""Netlink, nf_tables and network namespaces: the kernel work that the plugins share."""
