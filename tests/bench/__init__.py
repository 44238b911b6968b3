"""Benchmarks: the shipped path beside a rival or a floor, in one run, alternating."""
