"""The `triton` backend: the whole chain after the Gram product as Triton kernels.

`launch` holds what the backend calls; the other files hold one stage each, by the stages' names.
Nothing here is imported, and Triton is not, before a tensor is computed on.
"""
