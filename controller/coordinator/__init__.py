"""SpiderCoordinators: their admission, and finding out which networks the cluster's pods and services have."""
