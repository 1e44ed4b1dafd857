"""What turns rewritten graphs into code, a file an op family; torch's private parts are in `torch_private`."""

if __name__ == "lowering":
    raise ImportError(
        "import micromix_compile.lowering: the folder at the repository's root is not a package of its own"
    )
