/* The relay: what its parts know of each other. */
#ifndef VSWITCH_RELAY_H
#define VSWITCH_RELAY_H

#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "wire.h"

#define SCM_FDS_MAX 253 /* SCM_MAX_FD of the kernel: no message has more */

/* Somebody who is connected, is being connected to, or is a listening socket at its end: whatever has
 * to be closed in a thread of its own. Made and freed by the main thread. */
struct connection {
    struct connection *next;
    uint64_t source, number;
    enum mode mode;
    enum { ACCEPTS, CONNECTS, CLOSES } task;
    int fd; /* the listening socket at first; -1 if nobody was there */
    char path[PATH_LEN];
    struct ucred peer;
    sem_t apart;              /* the thread has descriptors of its own, */
    sem_t go;                 /* and the main thread has given away its copies */
    bool failed;              /* it cannot have them */
    int error;                /* of accept4() */
    _Atomic pid_t tid;
    _Atomic int64_t busy_since; /* milliseconds; 0 where nothing of the peer's is touched */
    _Atomic bool ended;       /* but for what the kernel has to close */
    bool told;
};

/* Room for a packet on its way. Threads that wait have none: see room_get. */
struct room {
    struct room *next;
    size_t len, at;
    int n_fds;
    int fds[FDS_MAX];
    uint32_t own; /* bits of those that are closed when they are sent */
    _Alignas(8) uint8_t bytes[sizeof(struct say) + FDS_MAX * sizeof(struct found) + DATA_MAX];
    union {
        struct cmsghdr head;
        uint8_t bytes[CMSG_SPACE(SCM_FDS_MAX * sizeof(int))];
    } control;
};

extern int control_fd, wake_fd; /* the same numbers in every thread's table */
extern _Atomic int top_fd;      /* no descriptor of the main thread's is greater, but for one just accepted */

int64_t now_ms(void);
struct room *room_get(void);
void room_put(struct room *room);

/* connection.c: the thread of a connection. */
void *connection_run(void *connection);

/* found.c: what a descriptor is. Waits wherever its owner likes. */
void look_at(int fd, struct found *found);

/* sharing.c: whether a process has a file mapped privately at an address. */
bool is_private_copy(pid_t pid, uint64_t uva, uint64_t dev, uint64_t ino);

/* confine.c: give up whatever this program does not need. -1 and errno if it cannot be had. */
int confine(void);

#endif
