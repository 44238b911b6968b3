"""The CNI plugins: `spiderpool` (IPAM), `coordinator`, `ifacer` and `vlan`, run inside the agent."""
