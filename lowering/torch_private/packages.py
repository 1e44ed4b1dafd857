"""AOTInductor's packages, which torch documents under a private name."""

from torch._inductor import aoti_compile_and_package, aoti_load_package

__all__ = ["aoti_compile_and_package", "aoti_load_package"]
