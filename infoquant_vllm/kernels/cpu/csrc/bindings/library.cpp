// Functions that library.py calls before it uses a library.
#include <cstdint>
#ifdef __AMX_TILE__
#include <asm/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// hatch_build.py passes the ABI_VERSION of targets.py; library.py refuses a library of another version.
extern "C" int64_t infoquant_abi_version() { return INFOQUANT_ABI_VERSION; }

// Returns why this process cannot run the library's code, or null. Linux lets a process use AMX only after it has asked
// for it (Documentation/arch/x86/xstate.rst).
extern "C" const char* infoquant_problem() {
#ifdef __AMX_TILE__
    constexpr int TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) return "Linux does not give AMX to this process";
#endif
    return nullptr;
}
