// Chooses the instruction set level. Compiled without architecture flags: it must run anywhere.
#include <cstring>

#include "level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace memos_engine {

// ME_LEVELS, from CMake, lists what was compiled as X(name), worst first.
#define X(name)               \
    namespace name {          \
    extern const Level level; \
    }
ME_LEVELS
#undef X

namespace {

#if defined(__x86_64__)
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Leaf(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

// What the operating system saves on a context switch; an unsaved register set must not be used.
unsigned saved_state() {
    if (!all(Leaf(1, 0).c, 1u << 27)) return 0;  // OSXSAVE
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool supports_v2() {
    const Leaf basic(1, 0);
    return all(basic.c, 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23);
}

bool supports_avx2() {
    const Leaf basic(1, 0), more(7, 0), extended(0x80000001u, 0);
    return supports_v2() && all(basic.c, 1u << 12 | 1u << 22 | 1u << 28 | 1u << 29) &&
           all(more.b, 1u << 3 | 1u << 5 | 1u << 8) && all(extended.c, 1u << 5) && all(saved_state(), 0x6);
}

bool supports_avx512() {
    return supports_avx2() && all(Leaf(7, 0).b, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31) &&
           all(saved_state(), 0xe6);
}

// Every machine with AVX512_BF16 has AVX512_VNNI as well; the level uses both.
bool supports_avx512bf16() {
    return supports_avx512() && all(Leaf(7, 1).a, 1u << 5) && all(Leaf(7, 0).c, 1u << 11);
}

// Linux lends the AMX tile registers only to a process that asked for them.
bool supports_amx() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return supports_avx512bf16() && all(Leaf(7, 0).d, 1u << 22 | 1u << 24) && all(saved_state(), 0x60000) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#else
bool supports_neon() { return true; }  // part of the aarch64 baseline
#endif

struct Choice {
    const char* name;
    const Level* level;
    bool (*supported)();
};

const Choice choices[] = {
#define X(name) {std::strcmp(#name, "v2") == 0 ? "x86-64-v2" : #name, &name::level, supports_##name},
    ME_LEVELS
#undef X
};
constexpr int kChoices = sizeof(choices) / sizeof(choices[0]);

const Choice* selected = nullptr;

const Choice* best() {
    for (int i = kChoices - 1; i >= 0; --i)
        if (choices[i].supported()) return &choices[i];
    return nullptr;
}

}  // namespace

const char* isa_name(int index) { return index >= 0 && index < kChoices ? choices[index].name : nullptr; }

bool isa_supported(int index) { return index >= 0 && index < kChoices && choices[index].supported(); }

bool isa_select(const char* name) {
    for (const Choice& choice : choices) {
        if (std::strcmp(choice.name, name) == 0 && choice.supported()) {
            selected = &choice;
            return true;
        }
    }
    return false;
}

const char* isa_selected() {
    if (!selected) selected = best();
    return selected ? selected->name : nullptr;
}

const Level* selected_level() {
    isa_selected();
    return selected ? selected->level : nullptr;
}

}  // namespace memos_engine
