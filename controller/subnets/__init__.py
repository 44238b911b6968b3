"""Subnets: what their addresses are given to, and the pools that are cut from them for applications."""
