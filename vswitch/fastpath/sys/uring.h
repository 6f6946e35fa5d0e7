/* Several writes in one system call, with io_uring.
 *
 * What is queued is submitted and waited for in one io_uring_enter(2), so memory that an operation reads
 * is the caller's again when vs_uring_submit() returns. The kernel tries each write within the call, in
 * their order. One that would have to wait ends with EAGAIN: by RWF_NOWAIT, for O_NONBLOCK does not say
 * it to io_uring, which waits until such a file can be polled for writing. TAPs know RWF_NOWAIT since
 * Linux 5.11, sockets since 4.20. Of a file that does not, each write is done again by write(2).
 *
 * Older kernels than 5.6, containers and the sysctl kernel.io_uring_disabled may leave a program
 * without; who uses it has another way. One thread uses a ring at a time.
 */
#ifndef VSWITCH_URING_H
#define VSWITCH_URING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define VS_URING_SLOTS 64 /* a power of two */

struct vs_uring {
    int fd; /* -1: there is none */
    uint32_t queued;
    uint32_t refused; /* a file did not know RWF_NOWAIT: writes by themselves are cheaper */
    uint32_t *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_len, sqes_len;
    int32_t results[VS_URING_SLOTS]; /* of the last submit: bytes or -errno, in the order of queuing */
};

static inline void vs_uring_close(struct vs_uring *u) {
    if (u->sqes != NULL)
        munmap(u->sqes, u->sqes_len);
    if (u->rings != NULL)
        munmap(u->rings, u->rings_len);
    if (u->fd >= 0)
        close(u->fd);
    memset(u, 0, sizeof *u);
    u->fd = -1;
}

/* 0, or the errno for which there is no ring. */
static inline int vs_uring_open(struct vs_uring *u) {
    const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    struct io_uring_params p;
    int error;
    memset(u, 0, sizeof *u);
    memset(&p, 0, sizeof p);
    u->fd = (int)syscall(SYS_io_uring_setup, VS_URING_SLOTS, &p);
    if (u->fd < 0)
        return errno;
    /* The last of them came with the plain write operation. */
    if ((p.features & needed) != needed) {
        vs_uring_close(u);
        return ENOSYS;
    }
    u->rings_len = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    if (u->rings_len < p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe))
        u->rings_len = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    u->sqes_len = p.sq_entries * sizeof(struct io_uring_sqe);
    void *rings = mmap(NULL, u->rings_len, prot, flags, u->fd, IORING_OFF_SQ_RING);
    error = errno;
    if (rings != MAP_FAILED)
        u->rings = rings;
    void *sqes = mmap(NULL, u->sqes_len, prot, flags, u->fd, IORING_OFF_SQES);
    if (sqes != MAP_FAILED)
        u->sqes = sqes;
    else
        error = errno;
    if (u->rings == NULL || u->sqes == NULL) {
        vs_uring_close(u);
        return error;
    }
    char *base = rings;
    u->sq_tail = (uint32_t *)(base + p.sq_off.tail);
    u->sq_mask = *(uint32_t *)(base + p.sq_off.ring_mask);
    u->cq_head = (uint32_t *)(base + p.cq_off.head);
    u->cq_tail = (uint32_t *)(base + p.cq_off.tail);
    u->cq_mask = *(uint32_t *)(base + p.cq_off.ring_mask);
    u->cqes = (struct io_uring_cqe *)(base + p.cq_off.cqes);
    for (uint32_t i = 0; i < p.sq_entries; i++)
        ((uint32_t *)(base + p.sq_off.array))[i] = i;
    return 0;
}

static inline void vs_uring_queue(struct vs_uring *u, uint8_t operation, int fd, const void *at, uint32_t n) {
    struct io_uring_sqe *sqe = &u->sqes[(*u->sq_tail + u->queued) & u->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = operation;
    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)at;
    sqe->len = n;
    sqe->rw_flags = RWF_NOWAIT;
    sqe->user_data = u->queued++;
}

/* Queue a write of `n` bytes. Not more than VS_URING_SLOTS may be queued. */
static inline void vs_uring_write(struct vs_uring *u, int fd, const void *buffer, uint32_t n) {
    vs_uring_queue(u, IORING_OP_WRITE, fd, buffer, n);
}

/* Queue a write of what `n` entries of `iov` name; both are read when it is submitted. */
static inline void vs_uring_writev(struct vs_uring *u, int fd, const struct iovec *iov, uint32_t n) {
    vs_uring_queue(u, IORING_OP_WRITEV, fd, iov, n);
}

/* Do again, without io_uring, what a file refused for RWF_NOWAIT. It is the n-th of the last submit,
 * whose entries end at `tail`. The file must be non-blocking. */
static inline void vs_uring_redo(struct vs_uring *u, uint32_t tail, uint32_t queued, uint32_t n) {
    const struct io_uring_sqe *sqe = &u->sqes[(tail - queued + n) & u->sq_mask];
    void *at = (void *)(uintptr_t)sqe->addr;
    ssize_t done = sqe->opcode == IORING_OP_WRITE ? write(sqe->fd, at, sqe->len)
                                                  : writev(sqe->fd, at, (int)sqe->len);
    u->results[n] = done < 0 ? -errno : (int32_t)done;
    u->refused = 1;
}

/* Do what is queued. Afterwards `results` has what became of each. */
static inline void vs_uring_submit(struct vs_uring *u) {
    uint32_t n = u->queued, submitted = 0, done = 0, i;
    int failed = 0;
    /* Release: the entries before the tail. Pairs with the kernel's acquire in io_uring_enter(2), and
     * its release of the completions with our acquire below. */
    __atomic_store_n(u->sq_tail, *u->sq_tail + n, __ATOMIC_RELEASE);
    u->queued = 0;
    while (done < n) {
        long taken =
            syscall(SYS_io_uring_enter, u->fd, n - submitted, n - done, IORING_ENTER_GETEVENTS, NULL, 0);
        if (taken >= 0) {
            submitted += (uint32_t)taken;
        } else if (errno != EINTR) {
            /* The kernel has no memory: what it has not taken is taken back, the rest is waited for.
             * Nothing is known to make a wait fail; nobody could use the memory again. */
            if (failed++)
                abort();
            for (i = submitted; i < n; i++)
                u->results[i] = -errno;
            __atomic_store_n(u->sq_tail, *u->sq_tail - (n - submitted), __ATOMIC_RELEASE);
            n = submitted;
        }
        uint32_t head = *u->cq_head, tail = __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++, done++) {
            const struct io_uring_cqe *cqe = &u->cqes[head & u->cq_mask];
            u->results[cqe->user_data & (VS_URING_SLOTS - 1)] = cqe->res;
        }
        __atomic_store_n(u->cq_head, head, __ATOMIC_RELEASE);
    }
    for (i = 0; i < n; i++)
        if (u->results[i] == -EOPNOTSUPP)
            vs_uring_redo(u, *u->sq_tail, n, i);
}

#endif
