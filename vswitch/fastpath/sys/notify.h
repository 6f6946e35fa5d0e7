/* Signalling the eventfds of frontends without ever waiting.
 *
 * The file behind such a descriptor is the frontend's as well: it can fill the counter and clear
 * O_NONBLOCK at any time, and write(2) would then sleep until it pleases to read. The kernel's own way
 * to signal an eventfd has no such wait: it adds one, and leaves a full counter as it is. Linux AIO
 * takes it at each completion (IOCB_FLAG_RESFD), so a read of nothing from /dev/null, which completes
 * within io_submit(2), signals any eventfd.
 *
 * One system call a notification, as with write(2), and one more in VS_NOTIFY_SLOTS to take the
 * completions away. One thread uses a notifier at a time.
 *
 * Where there is no AIO (a kernel without CONFIG_AIO, a sandbox, fs.aio-max-nr used up) O_NONBLOCK is
 * set once more right before each write(2). That leaves a frontend the time between two system
 * calls.
 */
#ifndef VSWITCH_NOTIFY_H
#define VSWITCH_NOTIFY_H

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VS_NOTIFY_SLOTS 32

struct vs_notifier {
    aio_context_t context; /* 0: there is none, write(2) is used */
    int file;              /* what is read from; -1 */
    uint32_t completed;    /* operations whose completions wait to be taken */
};

static inline void vs_notifier_close(struct vs_notifier *n) {
    if (n->context)
        syscall(SYS_io_destroy, n->context);
    if (n->file >= 0)
        close(n->file);
    n->context = 0;
    n->file = -1;
}

/* 0, or the errno for which there is no AIO; the notifier works either way. */
static inline int vs_notifier_open(struct vs_notifier *n) {
    int error;
    n->context = 0;
    n->completed = 0;
    n->file = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (n->file >= 0 && syscall(SYS_io_setup, VS_NOTIFY_SLOTS, &n->context) == 0)
        return 0;
    error = errno;
    n->context = 0;
    vs_notifier_close(n);
    return error;
}

static inline void vs_notify_by_write(int fd) {
    uint64_t one = 1;
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0 && !(flags & O_NONBLOCK))
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    if (write(fd, &one, sizeof one) < 0) {
        /* EAGAIN, a full counter: a notification is pending already. */
    }
}

static inline void vs_notify(struct vs_notifier *n, int fd) {
    struct io_event events[VS_NOTIFY_SLOTS];
    struct iocb operation, *operations[1] = {&operation};
    int i;
    if (__builtin_expect(n->context == 0, 0)) {
        vs_notify_by_write(fd);
        return;
    }
    memset(&operation, 0, sizeof operation);
    operation.aio_fildes = (uint32_t)n->file;
    operation.aio_lio_opcode = IOCB_CMD_PREAD;
    operation.aio_flags = IOCB_FLAG_RESFD;
    operation.aio_resfd = (uint32_t)fd;
    /* Once more, should the kernel find no room or no memory for it. */
    for (i = 0; i < 2; i++) {
        long submitted = syscall(SYS_io_submit, n->context, 1, operations);
        n->completed += submitted == 1;
        if (submitted != 1 || n->completed == VS_NOTIFY_SLOTS) {
            syscall(SYS_io_getevents, n->context, 0, VS_NOTIFY_SLOTS, events, NULL);
            n->completed = 0;
        }
        if (submitted == 1)
            return;
    }
    vs_notify_by_write(fd);
}

#endif
