"""The CNI IPAM plugin: addresses from pools, one claim per address. The plugin itself is `plugins.ipam.plugin.Ipam`."""
