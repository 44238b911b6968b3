"""Where resources live: one narrow port, and its adapters."""
