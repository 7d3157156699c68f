"""The interfaces of other libraries, on the kernels of this one."""
