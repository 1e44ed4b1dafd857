"""What Gluon calls differently from one version of Triton to the next, and how kernels get their constants.

3.6 to 3.8 compile these kernels; 3.9 has other names for more than is mended here.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of the threads of a partition: 3.6 calls it `thread_barrier`."""


class Constants:
    """A frozen dataclass whose fields, and those of dataclasses in it, a kernel sees as constants.

    Gluon takes plain numbers of a Python object for values that are known only when a kernel runs. The repr is what
    Triton's cache knows a kernel by.
    """

    def __init__(self, fields):
        self.fields = fields
        self._add(fields)

    def _add(self, fields):
        for name in fields.__dataclass_fields__:
            value = getattr(fields, name)
            if hasattr(value, "__dataclass_fields__"):
                self._add(value)
            else:
                setattr(self, name, tl.constexpr(value))

    def __repr__(self):
        return repr(self.fields)

    def __eq__(self, other):
        return isinstance(other, Constants) and self.fields == other.fields

    def __hash__(self):
        return hash(self.fields)


@gluon.jit
def wait_for_inputs():
    """As `templates.triton.ahead`'s."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def uniform(value):
    """An int32 that all threads of a warp have the same, as one that the compiler knows to be so."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1
    )
