/* The relay: where the vhost-user sockets of a switch end, so that its event loop has none.
 *
 * Whoever is connected to a Unix socket can send descriptors, and some make others wait who receive
 * them, look at them or close them, or close a socket in whose queue or backlog they lie: a TCP socket
 * that lingers, a file on a FUSE mount, an eventfd in an epoll whose lock is held. Here each connection
 * has a thread for that, and a table of descriptors of its own; so has each listening socket at its end.
 * This thread, the first, starts them, and never closes the last descriptor of anything.
 *
 * Started by process.py with a SOCK_SEQPACKET socket as its only argument. See wire.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "relay.h"

enum {
    STUCK_MS = 5000,
    PAUSE_MS = 1000,  /* before a source that could not be served is tried again */
    REAP_MS = 10,
    TICK_MS = 1000,
    GOODBYE_MS = 300, /* for threads to close what they have, at the end */
    ROOMS = 8,        /* made at a time */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    STACK_LEN = 1 << 20,
#else
    STACK_LEN = 64 << 10,
#endif
};

/* Connections of one source at a time, those included that cannot be closed. */
static const int crowd_of[] = {[MODE_VHOST_USER] = 8, [MODE_PLAIN] = 128};

struct source {
    struct source *next;
    uint64_t number;
    enum mode mode;
    int fd;
    int n;
    int64_t paused_until, crowded_since;
    bool crowd_told, closing;
};

int control_fd, wake_fd;
_Atomic int top_fd;

static struct source *sources;
static struct connection *connections;
static uint64_t last_number;
static pthread_attr_t attributes;

static pthread_mutex_t rooms_lock = PTHREAD_MUTEX_INITIALIZER;
static struct room *rooms;

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Lent while a packet is on its way: a thread that waits takes a page or two of its stack and no more. */
struct room *room_get(void)
{
    pthread_mutex_lock(&rooms_lock);
    if (rooms == NULL) {
        struct room *fresh = mmap(NULL, ROOMS * sizeof *fresh, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int i = 0; fresh != MAP_FAILED && i < ROOMS; i++) {
            fresh[i].next = rooms;
            rooms = &fresh[i];
        }
    }
    struct room *room = rooms;
    if (room != NULL)
        rooms = room->next;
    pthread_mutex_unlock(&rooms_lock);
    if (room != NULL) {
        room->len = room->at = 0;
        room->n_fds = 0;
        room->own = 0;
    }
    return room;
}

void room_put(struct room *room)
{
    pthread_mutex_lock(&rooms_lock);
    room->next = rooms;
    rooms = room;
    pthread_mutex_unlock(&rooms_lock);
}

static bool tell(enum report_kind kind, int error, uint64_t source, uint64_t number)
{
    struct report report = {.kind = kind, .error = error, .source = source, .number = number};
    return send(control_fd, &report, offsetof(struct report, groups), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

/* Start a thread for it. False, and nothing has happened, if there can be none. */
static bool spawn(struct source *source, int task, const char *path)
{
    pthread_t thread;
    struct connection *c = calloc(1, sizeof *c);
    if (c == NULL)
        return false;
    c->source = source->number;
    c->mode = source->mode;
    c->number = ++last_number;
    c->task = task;
    c->fd = task == CONNECTS ? -1 : source->fd;
    if (path != NULL)
        memcpy(c->path, path, sizeof c->path);
    sem_init(&c->apart, 0, 0);
    sem_init(&c->go, 0, 0);
    if (pthread_create(&thread, &attributes, connection_run, c) != 0) {
        free(c);
        return false;
    }
    while (sem_wait(&c->apart) < 0)
        ;
    int error = c->error;
    if (c->failed) {
        /* It could have no table of its own. Open and useless is better than to wait for it here. */
        if (c->fd >= 0)
            shutdown(c->fd, SHUT_RDWR);
        source->paused_until = now_ms() + PAUSE_MS;
    } else if (task != CONNECTS && c->fd >= 0) {
        close(c->fd); /* the thread has it, and does not go on before this */
    }
    sem_post(&c->go);
    c->next = connections;
    connections = c;
    source->n++;
    if (task == ACCEPTS && error != 0 && error != EAGAIN && error != ECONNABORTED && error != EINTR)
        source->paused_until = now_ms() + PAUSE_MS; /* out of descriptors or memory */
    return true;
}

static struct source *find(uint64_t number)
{
    struct source *source = sources;
    while (source != NULL && source->number != number)
        source = source->next;
    return source;
}

static struct source *find_or_make(uint64_t number, enum mode mode)
{
    struct source *source = find(number);
    if (source == NULL && (source = calloc(1, sizeof *source)) != NULL) {
        *source = (struct source){.next = sources, .number = number, .mode = mode, .fd = -1};
        sources = source;
    }
    return source;
}

static void close_source(struct source *source)
{
    shutdown(source->fd, SHUT_RDWR); /* nobody connects from now on, whoever holds it open */
    source->closing = true;
    if (spawn(source, CLOSES, NULL)) {
        source->fd = -1;
        source->closing = false;
    }
}

/* 0 when the switch is done with us, -1 when it is gone. */
static int obey(void)
{
    struct order order;
    struct source *source;
    union {
        struct cmsghdr head;
        uint8_t bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {&order, sizeof order};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int fd = -1;
    ssize_t n = recvmsg(control_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 1;
    if (n != sizeof order)
        return -1;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    if (head != NULL && head->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(head), sizeof fd);
    if (fd > atomic_load(&top_fd))
        atomic_store(&top_fd, fd);
    switch (order.kind) {
    case ORDER_LISTEN:
        source = find_or_make(order.source, order.mode == MODE_PLAIN ? MODE_PLAIN : MODE_VHOST_USER);
        if (source != NULL)
            source->fd = fd;
        break;
    case ORDER_CLOSE:
        source = find(order.source);
        if (source != NULL && source->fd >= 0)
            close_source(source);
        break;
    case ORDER_CONNECT:
        order.path[PATH_LEN - 1] = 0;
        source = find_or_make(order.source, MODE_VHOST_USER);
        if (source == NULL || source->n >= crowd_of[MODE_VHOST_USER] || !spawn(source, CONNECTS, order.path))
            tell(REPORT_FAILED, EBUSY, order.source, 0);
        break;
    case ORDER_QUIT:
        return 0;
    }
    return 1;
}

/* Whether the kernel has closed all that a thread had: until then it is one of this process. */
static bool is_gone(const struct connection *c)
{
    return atomic_load(&c->ended) &&
           syscall(SYS_tgkill, getpid(), atomic_load(&c->tid), 0) < 0 && errno == ESRCH;
}

/* Forget threads that are gone; how many have ended and are not. */
static int reap(int64_t now)
{
    int ending = 0;
    for (struct connection **at = &connections; *at != NULL;) {
        struct connection *c = *at;
        if (is_gone(c)) {
            struct source *source = find(c->source);
            if (source != NULL)
                source->n--;
            *at = c->next;
            sem_destroy(&c->apart);
            sem_destroy(&c->go);
            free(c);
            continue;
        }
        ending += atomic_load(&c->ended);
        int64_t since = atomic_load(&c->busy_since);
        if (since && now - since > STUCK_MS && !c->told)
            c->told = tell(REPORT_STUCK, 0, c->source, c->number);
        at = &c->next;
    }
    for (struct source **at = &sources; *at != NULL;) {
        struct source *source = *at;
        if (source->closing)
            close_source(source);
        if (source->fd < 0 && source->n == 0) {
            *at = source->next;
            free(source);
        } else {
            at = &source->next;
        }
    }
    return ending;
}

/* Whether somebody more may come from a source; the switch is told if that lasts. */
static bool has_room(struct source *source, int64_t now)
{
    bool room = source->n < crowd_of[source->mode];
    if (room) {
        source->crowded_since = 0;
        if (source->crowd_told)
            source->crowd_told = !tell(REPORT_CROWDED, 0, source->number, 0);
    } else if (source->crowded_since == 0) {
        source->crowded_since = now;
    } else if (!source->crowd_told && now - source->crowded_since > PAUSE_MS) {
        source->crowd_told = tell(REPORT_CROWDED, source->n, source->number, 0);
    }
    return room && now >= source->paused_until;
}

/* Let nobody wait for us: hang up everywhere, and go when the switch holds nothing that would be closed
 * last by it. Threads that are stuck by then hold their own descriptors and nobody else's. */
static void wind_down(bool quit, int switch_fd)
{
    for (struct source *source = sources; source != NULL; source = source->next)
        if (source->fd >= 0)
            shutdown(source->fd, SHUT_RDWR);
    if (!quit && switch_fd >= 0)
        poll(&(struct pollfd){switch_fd, POLLIN, 0}, 1, -1);
    for (struct source *source = sources; source != NULL; source = source->next)
        if (source->fd >= 0)
            close_source(source);
    int64_t until = now_ms() + GOODBYE_MS;
    while (reap(now_ms()), connections != NULL && now_ms() < until)
        poll(NULL, 0, REAP_MS);
    _exit(0);
}

int main(int argc, char **argv)
{
    static const int ignored[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2};
    static struct pollfd *fds;
    static size_t room;

    if (argc != 3) {
        fprintf(stderr, "vswitch-relay is a part of vswitch, which starts it\n");
        return 2;
    }
    control_fd = atoi(argv[1]);
    /* Started by a descriptor of the program, whose number became the name. */
    close(atoi(argv[2]));
    prctl(PR_SET_NAME, "vswitch-relay");
    wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    int switch_fd = (int)syscall(SYS_pidfd_open, getppid(), 0); /* -1 before Linux 5.3 */
    top_fd = control_fd > wake_fd ? control_fd : wake_fd;
    if (switch_fd > top_fd)
        top_fd = switch_fd;
    /* Whoever ends the switch ends us: by its end of the socket. */
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_LEN);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (wake_fd < 0 || confine() < 0) {
        tell(REPORT_READY, errno, 0, 0);
        return 1;
    }
    tell(REPORT_READY, 0, 0, 0);

    for (int64_t last_end = 0;;) {
        int64_t now = now_ms();
        int ending = reap(now);
        size_t n = 2;
        for (struct source *source = sources; source != NULL; source = source->next)
            n++;
        if (n > room) {
            struct pollfd *more = realloc(fds, 2 * n * sizeof *fds);
            if (more == NULL)
                return 1;
            fds = more;
            room = 2 * n;
        }
        fds[0] = (struct pollfd){control_fd, POLLIN, 0};
        fds[1] = (struct pollfd){wake_fd, POLLIN, 0};
        n = 2;
        for (struct source *source = sources; source != NULL; source = source->next)
            fds[n++] = (struct pollfd){source->closing || !has_room(source, now) ? -1 : source->fd, POLLIN, 0};
        bool soon = ending && now - last_end < TICK_MS;
        if (poll(fds, n, soon ? REAP_MS : n > 2 || connections != NULL ? TICK_MS : -1) < 0)
            continue;
        n = 2;
        for (struct source *source = sources; source != NULL; source = source->next)
            if (fds[n++].revents && !spawn(source, ACCEPTS, NULL))
                source->paused_until = now_ms() + PAUSE_MS;
        if (fds[1].revents) {
            uint64_t count;
            (void)!read(wake_fd, &count, sizeof count);
            last_end = now_ms();
        }
        if (fds[0].revents) {
            int go_on = obey();
            if (go_on != 1)
                wind_down(go_on == 0, switch_fd);
        }
    }
}
