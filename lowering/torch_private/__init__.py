"""Every private part of torch that this package uses, by what it is for; a rule of the linter keeps it so.

    operators           operators' schemas, and operators and functions without a public name
    tensors             fake tensors, wrapper subclasses, memory, streams
    tracing             symbolic sizes, tracing a function
    packages            what AOTInductor's packages can't hold
    dynamo              graph inputs and their sources, guards, copies of Dynamo's graphs, its settings
    regions             which module is compiled or runs
    recompile_limit     what counts towards Dynamo's limit
    inductor            compiling a graph, also for a file, options, passes of one's own
    patterns            the pattern matcher
    lowerings           Inductor's IR, lowerings, sizes
    user_kernels        launches of Triton kernels in Inductor's graphs
    templates           Triton templates

The first four load neither Dynamo nor Inductor: `numerics`, `linear` and the like may import them. Works on torch 2.11
to 2.15. What looks for names or texts inside of torch, where a change would not be an error by itself:

    user_kernels        the text "triton_meta={" of a generated kernel, and which function finds what a kernel writes:
                        RuntimeError
    recompile_limit     the caller's variables "code" and "compiler_fn", and the function that is replaced: RuntimeError
    regions             the function "compile_wrapper" and its variable "fn": RuntimeError
    regions             the function "aot_compile" beside it: tests/verbs/test_ahead.py
    dynamo              the texts of sources, which name weights, masks and what is resumed, and the key "grapharg":
                        tests/lowering/test_torch_private.py
    dynamo              the mark of inputs that stay where they are: tests/lowering/test_torch_private.py
    inductor            the mark of nodes to compile: tests/lowering/test_codegen.py
    packages            the mark of a package: tests/verbs/test_ahead.py
"""
