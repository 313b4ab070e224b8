// What library.py asks before it uses a library.
#include <cstdint>
#ifdef __AMX_TILE__
#include <asm/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The version of the operations: a library compiled from other sources is refused.
extern "C" int64_t infoquant_abi_version() { return 11; }

// Why this process cannot run the library's code, null where it can. Linux keeps AMX's registers for processes that
// have asked it to (Documentation/arch/x86/xstate.rst).
extern "C" const char* infoquant_problem() {
#ifdef __AMX_TILE__
    constexpr int TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) return "Linux does not give AMX to this process";
#endif
    return nullptr;
}
