#include "dispatch.h"
#include "target.h"

#if defined(__x86_64__) || defined(_M_X64)
#define QUANTO_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(QUANTO_ARM64)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace quanto {

#if defined(QUANTO_X86)
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx512_vnni {
extern const Level level;
}
namespace amx {
extern const Level level;
}
namespace avx512_bf16 {
extern const Level level;
}

namespace {
struct Registers {
    unsigned a, b, c, d;
};
Registers cpuid(unsigned leaf, unsigned sub) {
#if defined(_MSC_VER)
    int r[4];
    __cpuidex(r, static_cast<int>(leaf), static_cast<int>(sub));
    return {unsigned(r[0]), unsigned(r[1]), unsigned(r[2]), unsigned(r[3])};
#else
    Registers r = {0, 0, 0, 0};
    __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
    return r;
#endif
}
unsigned long long enabled_state() {  // by the operating system
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    unsigned a, d;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (static_cast<unsigned long long>(d) << 32) | a;
#endif
}
#if !defined(QUANTO_EMULATE_AMX)
// Linux gives a process the state of the tiles (8 KB per thread) when it asks. Other systems: not tried yet.
bool allow_tiles() {
#if defined(__linux__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif
bool bit(unsigned value, int n) { return (value >> n) & 1; }
}  // namespace

int available_levels(const Level** out) {
    int count = 0;
    const Registers one = cpuid(1, 0);
    if (!bit(one.c, 27)) return 0;  // OSXSAVE
    const unsigned long long state = enabled_state();
    const Registers seven = cpuid(7, 0), seven1 = cpuid(7, 1);
    const bool avx2 = (state & 0x6) == 0x6 && bit(seven.b, 5) && bit(one.c, 12) && bit(one.c, 28) && bit(one.c, 29) &&
                      bit(one.c, 23);  // AVX2, FMA, AVX, F16C, and POPCNT, which compilers take for granted with AVX
    const bool avx512 = avx2 && (state & 0xE6) == 0xE6 && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) &&
                        bit(seven.b, 31);                                                   // F, DQ, BW, VL
    const bool vnni = avx512 && bit(seven.c, 11);
    const bool bf16 = vnni && bit(seven1.a, 5) && bit(seven.c, 1);  // BF16, VBMI
#if defined(QUANTO_EMULATE_AMX)
    if (bf16) out[count++] = &amx::level;
#else
    const bool amx = bf16 && (state & 0x60000) == 0x60000 && bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25);
    if (amx && allow_tiles()) out[count++] = &amx::level;  // BF16, TILE, INT8
#endif
    if (bf16) out[count++] = &avx512_bf16::level;
    if (vnni) out[count++] = &avx512_vnni::level;
    if (avx512) out[count++] = &avx512::level;
    if (avx2) out[count++] = &avx2::level;
    return count;
}
#elif defined(QUANTO_ARM64)
namespace neon {
extern const Level level;
}
#if defined(QUANTO_ARM64_ASSEMBLY)
namespace neon_dotprod {
extern const Level level;
}
namespace neon_bf16 {
extern const Level level;
}

namespace {
struct Features {
    bool dotprod, i8mm, bf16;
};
Features features() {
#if defined(__linux__)  // by number: older headers lack HWCAP_ASIMDDP, HWCAP2_I8MM and HWCAP2_BF16
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return {(first >> 20 & 1) != 0, (second >> 13 & 1) != 0, (second >> 14 & 1) != 0};
#elif defined(__APPLE__)  // names of macOS 12; earlier ones have no such name, and get plain NEON
    const auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof(value);
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"), has("hw.optional.arm.FEAT_BF16")};
#else
    return {false, false, false};
#endif
}
}  // namespace
#endif

int available_levels(const Level** out) {
    int count = 0;
#if defined(QUANTO_ARM64_ASSEMBLY)
    const Features has = features();
    if (has.bf16 && has.i8mm && has.dotprod) out[count++] = &neon_bf16::level;
    if (has.dotprod) out[count++] = &neon_dotprod::level;
#endif
    out[count++] = &neon::level;
    return count;
}
#else
int available_levels(const Level**) { return 0; }
#endif

}  // namespace quanto
