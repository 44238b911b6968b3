"""The cluster's one controller: admission, reclaim, automatic pools, Multus configuration."""
