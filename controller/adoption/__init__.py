"""Taking pools over from upstream, whose records of who has which address lie in the pools, and giving them back."""
