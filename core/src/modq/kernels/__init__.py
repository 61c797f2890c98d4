"""Compiled kernels: the library that holds them, and who calls it when.

Nothing is imported here: `modq.get_include()` passes through, and builds of plugins call that without torch.
"""
