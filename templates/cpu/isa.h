// What this library is compiled for: one place decides. MICROMIX_PORTABLE and MICROMIX_NO_AMX turn instruction sets
// off, so that every path can be tested on one machine.
#pragma once

#if !defined(MICROMIX_PORTABLE) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__GFNI__)
#define MICROMIX_AVX512_BF16 1
#else
#define MICROMIX_AVX512_BF16 0
#endif

#if MICROMIX_AVX512_BF16 && !defined(MICROMIX_NO_AMX) && defined(__AMX_BF16__) && defined(__linux__)
#define MICROMIX_AMX_BF16 1
#else
#define MICROMIX_AMX_BF16 0
#endif

namespace micromix {

// Whether the tiles may be used: compiled in, and permitted by the kernel (asked once per process).
bool amx_permitted();

// "amx-bf16", "avx512-bf16" or "portable".
const char* isa_name();

}  // namespace micromix
