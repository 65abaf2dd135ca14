// Which threads compute: those of the OpenMP team that a kernel called from this thread would get.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

// Writes up to `most` of their Linux thread ids, and returns how many there are.
extern "C" int64_t thread_ids(int64_t* ids, int64_t most) {
    int64_t count = 1;
#pragma omp parallel
    {
        int64_t thread = omp_get_thread_num();
        if (thread < most) ids[thread] = syscall(SYS_gettid);
        if (thread == 0) count = omp_get_num_threads();
    }
    return count;
}
