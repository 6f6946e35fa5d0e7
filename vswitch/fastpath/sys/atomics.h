/* Memory order, cache hints and the few system calls of the fast path.
 *
 * Everything shared with a guest or with another thread is read and written through these helpers,
 * so that the compiler can neither tear, repeat nor drop an access: a guest may change its memory
 * between two reads of ours, hence what is checked must be a private copy made by exactly one read.
 *
 * A fence's comment, where it is used, names the fence on the other side that it pairs with.
 */
#ifndef VSWITCH_ATOMICS_H
#define VSWITCH_ATOMICS_H

#include <stdint.h>
#include <string.h>
#include <time.h>

static inline uint16_t vs_load_acquire16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint32_t vs_load_acquire32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t vs_load_acquire64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void *vs_load_acquire_ptr(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

static inline void vs_store_release16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void vs_store_release32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void vs_store_release64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void vs_store_release_ptr(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

static inline uint8_t vs_load8(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint16_t vs_load16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint32_t vs_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint64_t vs_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline int vs_load_int(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

static inline void vs_store8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void vs_store16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void vs_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void vs_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void vs_store_int(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }

static inline void vs_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline int vs_cas64(uint64_t *p, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline void *vs_exchange_ptr(void **p, void *v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
static inline int vs_cas_ptr(void **p, void *expected, void *desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Release: whoever finds the bit sees what was written before it. */
static inline void vs_set_bit(uint8_t *p, unsigned bit) { __atomic_fetch_or(p, 1u << bit, __ATOMIC_RELEASE); }

/* A spin lock for the places that are not the common path. vs_trylock's acquire pairs with
 * vs_unlock's release. */
static inline int vs_trylock(uint32_t *lock) {
    return __atomic_load_n(lock, __ATOMIC_RELAXED) == 0 && __atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) == 0;
}
static inline void vs_unlock(uint32_t *lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

static inline void vs_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline void vs_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
/* Asks for the line with the right to write to it. GCC makes a plain prefetch of its builtin unless it
 * may assume a CPU of the last ten years; then the line comes as shared and the store that follows
 * waits for the other core once more. (Older CPUs take prefetchw for a nop.) */
static inline void vs_prefetch_write(const void *p) {
#if defined(__x86_64__)
    __asm__ __volatile__("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1, 3);
#endif
}

/* For 16 to 128 bytes, which is most frames by number: a call of memcpy and its choice among many
 * sizes costs more than the copy. Two halves overlap where the length is not a power of two. */
static inline void vs_copy_short(char *to, const char *from, uint32_t len) {
    typedef uint64_t pair __attribute__((vector_size(16), aligned(1), may_alias));
#define VS_PAIR(p, at) (*(pair *)((char *)(p) + (at)))
    if (len > 64) {
        pair a = VS_PAIR(from, 0), b = VS_PAIR(from, 16), c = VS_PAIR(from, 32), d = VS_PAIR(from, 48);
        pair e = VS_PAIR(from, len - 64), f = VS_PAIR(from, len - 48);
        pair g = VS_PAIR(from, len - 32), h = VS_PAIR(from, len - 16);
        VS_PAIR(to, 0) = a, VS_PAIR(to, 16) = b, VS_PAIR(to, 32) = c, VS_PAIR(to, 48) = d;
        VS_PAIR(to, len - 64) = e, VS_PAIR(to, len - 48) = f;
        VS_PAIR(to, len - 32) = g, VS_PAIR(to, len - 16) = h;
    } else if (len >= 32) {
        pair a = VS_PAIR(from, 0), b = VS_PAIR(from, 16);
        pair c = VS_PAIR(from, len - 32), d = VS_PAIR(from, len - 16);
        VS_PAIR(to, 0) = a, VS_PAIR(to, 16) = b, VS_PAIR(to, len - 32) = c, VS_PAIR(to, len - 16) = d;
    } else {
        pair a = VS_PAIR(from, 0), b = VS_PAIR(from, len - 16);
        VS_PAIR(to, 0) = a, VS_PAIR(to, len - 16) = b;
    }
#undef VS_PAIR
}

/* What a function returns that stays a function. Inlined where it is hardly ever called, it would take
 * registers of what always runs. (noinline would be warned of beside `inline`, which Cython writes.) */
#if defined(__has_attribute) && __has_attribute(noipa)
#define VS_APART_VOID __attribute__((noipa)) void
#else
#define VS_APART_VOID __attribute__((noinline)) void
#endif

#define vs_likely(x) __builtin_expect(!!(x), 1)
#define vs_unlikely(x) __builtin_expect(!!(x), 0)

static inline unsigned vs_lowest_bit(unsigned v) { return (unsigned)__builtin_ctz(v); }

/* Unaligned loads from switch-owned or guest memory, one access each. */
static inline uint64_t vs_get64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline uint32_t vs_get32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint16_t vs_get16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }

/* An unaligned store; torn or not is all the same before an index or flag makes it count. */
static inline void vs_put64(void *p, uint64_t v) { memcpy(p, &v, 8); }

/* Keeps the compiler from reading a private copy's source again. */
static inline void vs_compiler_barrier(void) { __asm__ __volatile__("" ::: "memory"); }

/* The time-stamp counter, which runs at one rate whatever the core's clock does; 0 where a program
 * cannot read one. */
static inline uint64_t vs_cycles(void) {
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    return 0;
#endif
}

static inline uint64_t vs_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* The cheapest clock there is: rises at one rate, in units of its own (turns.pxd finds out which). Not
 * ordered with what stands around it, and may be some ticks apart on two CPUs. */
static inline uint64_t vs_ticks(void) {
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;
    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
    return vs_now_ns();
#endif
}

#endif
