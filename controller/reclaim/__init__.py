"""Taking back addresses whose holders are gone, and what is left of them."""
