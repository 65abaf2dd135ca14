// Sums over ranks and gathering on rank 0, through memory that the ranks of one host share.
//
//   flags: one a rank, in cache lines of their own: the number of the last round that it has written
//   slots: two a rank, for odd and even rounds
//
// A collective takes a round for each slotful. In a round each rank writes its slot, raises its flag, and reads the slots of
// those that it needs once their flags are up. A slot is written again two rounds later, and by then all ranks have
// raised their flags for the round between, so they have read it.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <ctime>

#include "vectors.h"

namespace {

constexpr int64_t MAX_RANKS = 64, SLOT = 1 << 18;  // bytes; shared_memory.py knows them too
constexpr int SPINS = 2000, YIELDS = 200;  // some 50 us, and some 50 us more if nobody else wants the core
constexpr int64_t FAILED = -1;

struct alignas(64) Flag {
    std::atomic<int64_t> written;
    std::atomic<int32_t> sleepers;  // ranks that sleep until it is raised

    void raise(int64_t round) {
        // Sequentially consistent, as in `sleep`: either the sleeper sees the round, or this sees the sleeper.
        written.store(round);
        if (sleepers.load()) futex(FUTEX_WAKE, INT_MAX, nullptr);
    }

    // Until the flag is raised, or for `seconds` at most, or for no reason.
    void sleep(int64_t least, double seconds) {
        sleepers.fetch_add(1);
        int64_t now = written.load();
        timespec limit = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
        if (now < least) futex(FUTEX_WAIT, (uint32_t)now, &limit);
        sleepers.fetch_sub(1);
    }

private:
    // Not FUTEX_PRIVATE: the ranks are processes. It looks at the lower half of `written`.
    void futex(int operation, uint32_t value, const timespec* limit) {
        static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
        syscall(SYS_futex, &written, operation, value, limit, nullptr, 0);
    }
};

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct Ranks {
    char* region;
    int64_t rank, size, round;
    double timeout;

    Flag& flag(int64_t of) const { return reinterpret_cast<Flag*>(region)[of]; }

    template <typename T>
    T* slot(int64_t of) const {
        return reinterpret_cast<T*>(region + MAX_RANKS * sizeof(Flag) + (2 * of + round % 2) * SLOT);
    }

    // Until rank `of` has written round `least`. A rank that computes is soon done, and waking up takes as long as a sum;
    // but one that lost its core, or is stuck, must not be waited for on a core that it may want.
    bool wait(int64_t of, int64_t least) const {
        auto there = [&] { return flag(of).written.load(std::memory_order_acquire) >= least; };
        for (int i = 0; i < SPINS; i++) {
            if (there()) return true;
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
        double deadline = seconds() + timeout;
        for (int64_t i = 0; !there(); i++) {
            double left = deadline - seconds();
            if (left <= 0) return false;
            if (i < YIELDS) sched_yield();
            else flag(of).sleep(least, left);
        }
        return true;
    }

    bool wait_for_all(int64_t least) const {
        for (int64_t of = 0; of < size; of++)
            if (of != rank && !wait(of, least)) return false;
        return true;
    }

    // Begins the next round with this rank's values.
    template <typename T>
    bool write(const T* x, int64_t count) {
        if (!wait_for_all(round)) return false;
        round++;
        std::memcpy(slot<T>(rank), x, count * sizeof(T));
        flag(rank).raise(round);
        return true;
    }
};

// x becomes the sum, in float32 and in the order of ranks, so that it has the same bits everywhere.
template <typename T>
int64_t all_reduce(Ranks ranks, T* x, int64_t count) {
    constexpr int64_t PART = SLOT / sizeof(T);
    for (int64_t first = 0; first < count; first += PART) {
        int64_t part = count - first < PART ? count - first : PART;
        if (!ranks.write(x + first, part) || !ranks.wait_for_all(ranks.round)) return FAILED;
        for (int64_t i = 0; i < part; i += LANES) {
            Floats sum = load(ranks.slot<T>(0) + i, part - i);
            for (int64_t of = 1; of < ranks.size; of++) sum += load(ranks.slot<T>(of) + i, part - i);
            store(x + first + i, sum, part - i);
        }
    }
    return ranks.round;
}

// On rank 0, `out` gets the ranks' rows side by side; elsewhere it is not looked at.
template <typename T>
int64_t gather(Ranks ranks, const T* x, T* out, int64_t rows, int64_t width) {
    constexpr int64_t PART = SLOT / sizeof(T);
    int64_t count = rows * width;
    for (int64_t first = 0; first < count; first += PART) {
        int64_t end = count - first < PART ? count : first + PART;
        if (!ranks.write(x + first, end - first)) return FAILED;
        if (ranks.rank) continue;
        if (!ranks.wait_for_all(ranks.round)) return FAILED;
        for (int64_t of = 0; of < ranks.size; of++)
            for (int64_t i = first, some; i < end; i += some) {
                int64_t row = i / width, column = i % width;
                some = width - column < end - i ? width - column : end - i;
                std::memcpy(
                    out + (row * ranks.size + of) * width + column, ranks.slot<T>(of) + (i - first), some * sizeof(T));
            }
    }
    return ranks.round;
}

}  // namespace

// They return the number of the last round, to be given to the next call, or -1 when a rank did not come in time.
#define EXPORT(T, suffix)                                                                                             \
    extern "C" {                                                                                                      \
    int64_t all_reduce_##suffix(                                                                                      \
        void* region, int64_t rank, int64_t size, int64_t round, double timeout, T* x, int64_t count) {               \
        return all_reduce(Ranks{(char*)region, rank, size, round, timeout}, x, count);                                \
    }                                                                                                                 \
    int64_t gather_##suffix(                                                                                          \
        void* region, int64_t rank, int64_t size, int64_t round, double timeout, const T* x, T* out, int64_t rows,    \
        int64_t width) {                                                                                              \
        return gather(Ranks{(char*)region, rank, size, round, timeout}, x, out, rows, width);                         \
    }                                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
