"""What turns rewritten graphs into code, and the only place that knows the device and torch's private parts."""

if __name__ == "lowering":
    raise ImportError(
        "import micromix_compile.lowering: the folder at the repository's root is not a package of its own"
    )
