"""Gluon kernels: persistent programs with a role a warp group, for Hopper. A kernel's parts are modules beside it."""
