"""`spiderpool-init`: the objects that an installation begins with, made once by a Job."""
