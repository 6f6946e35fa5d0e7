/* Memory order and waiting, as the driver side of a virtqueue needs them.
 *
 * The device is another process: volatile is not enough and locks are not to be had. Each use in
 * split.pxd names the access on the device's side that it pairs with.
 */
#ifndef VSWITCH_GUEST_BARRIERS_H
#define VSWITCH_GUEST_BARRIERS_H

#include <stdint.h>
#include <time.h>

static inline uint16_t guest_load_acquire_u16(const uint16_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline uint16_t guest_load_relaxed_u16(const uint16_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void guest_store_release_u16(uint16_t *p, uint16_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline void guest_store_relaxed_u16(uint16_t *p, uint16_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

static inline uint32_t guest_load_acquire_u32(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void guest_store_release_u32(uint32_t *p, uint32_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline int guest_load_relaxed_int(const int *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void guest_store_relaxed_int(int *p, int value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

/* A full fence, too: what is read after it is at least as new as what the other side wrote before it
 * set the bits. */
static inline uint64_t guest_exchange_u64(uint64_t *p, uint64_t value)
{
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}

/* The only fence that keeps an earlier store before a later load. */
static inline void guest_fence_full(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void guest_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

static inline int guest_lowest_bit(uint64_t word)
{
    return __builtin_ctzll(word);
}

static inline void guest_prefetch(const void *p)
{
    __builtin_prefetch(p);
}

/* With the right to write the line; GCC's builtin asks for that only where it may assume a newer CPU. */
static inline void guest_prefetch_write(const void *p)
{
#if defined(__x86_64__)
    __asm__ __volatile__("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1);
#endif
}

/* Nanoseconds of CLOCK_MONOTONIC; a vDSO call of some 25 ns. */
static inline uint64_t guest_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
