"""One-machine labs: they start Spiderpool as a user would and look at it from outside, through its public surface."""
