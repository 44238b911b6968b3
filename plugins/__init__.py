"""The CNI plugins: `spiderpool` (IPAM), `coordinator` and `ifacer`, run inside the agent."""
