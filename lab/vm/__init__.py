"""A virtual machine on a kernel of the distribution's, for what the kernel of this machine may lack."""
