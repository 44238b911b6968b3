"""A real Kubernetes API server, with its etcd and controllers, on this machine's loopback: `python -m lab.kube`."""
