"""The typed resources of `spiderpool.spidernet.io`, their validation and defaulting, and IP arithmetic."""
