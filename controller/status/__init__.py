"""Views of pools for people: counts, addresses, conditions."""
