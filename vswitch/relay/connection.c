/* One connection: a thread that may wait, in the kernel, for as long as its peer likes.
 *
 * It has a table of descriptors of its own. Whatever the peer hands over, it is received here, looked at
 * here and closed here, last of all, when the switch has released its copy; should that wait, nobody
 * else does. What is left at the end is not closed but left to the end of the thread, where the kernel
 * does not linger for TCP. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "relay.h"

enum { HEADER_LEN = 12, CHANNELS = 4 };

/* A socket of SET_BACKEND_REQ_FD, and what the switch has in its place. */
struct channel {
    int theirs, ours; /* -1 if it is none */
    struct room *in, *out;
};

struct talk {
    struct connection *c;
    int pair, peer;
    struct room *in, *out; /* on their way to the switch, and to the peer */
    uint8_t header[HEADER_LEN];
    uint32_t header_len;
    uint64_t payload_left;
    bool deaf;     /* nothing is taken from the peer any more */
    bool at_end;   /* for it has hung up ... */
    bool end_told; /* ... and the switch knows */
    bool done;
    bool answers;
    struct say answer;
    struct channel channels[CHANNELS];
};

static void busy(struct connection *c)
{
    atomic_store(&c->busy_since, now_ms());
}

static void idle(struct connection *c)
{
    atomic_store(&c->busy_since, 0);
}

/* 0 when all went, 1 when some of it waits for room, -1 at the end of the connection. */
static int send_room(int fd, struct room *room)
{
    union {
        struct cmsghdr head;
        uint8_t bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control;
    struct iovec data = {room->bytes + room->at, room->len - room->at};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (room->n_fds) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(room->n_fds * sizeof(int));
        memset(&control, 0, sizeof control);
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(room->n_fds * sizeof(int));
        memcpy(CMSG_DATA(&control.head), room->fds, room->n_fds * sizeof(int));
    }
    ssize_t n = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR || errno == ENOBUFS ? 1 : -1;
    for (int i = 0; i < room->n_fds; i++)
        if (room->own & 1u << i)
            close(room->fds[i]);
    room->n_fds = 0;
    room->at += (size_t)n;
    return room->at < room->len;
}

/* Bytes and descriptors; what `recvmsg` returned. `n_fds` is FDS_UNKNOWN where some were lost. */
static ssize_t receive(int fd, struct room *room, uint8_t *to, size_t len, uint32_t *n_fds, int *fds)
{
    struct iovec data = {to, len};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = &room->control,
        .msg_controllen = sizeof room->control,
    };
    *n_fds = 0;
    ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return n;
    for (struct cmsghdr *one = CMSG_FIRSTHDR(&message); one; one = CMSG_NXTHDR(&message, one))
        if (one->cmsg_level == SOL_SOCKET && one->cmsg_type == SCM_RIGHTS) {
            uint32_t count = (uint32_t)((one->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            if (*n_fds + count <= FDS_MAX)
                memcpy(fds + *n_fds, CMSG_DATA(one), count * sizeof(int));
            *n_fds += count;
        }
    if (message.msg_flags & MSG_CTRUNC)
        *n_fds = FDS_UNKNOWN;
    return n;
}

static int open_channel(struct talk *t, int theirs)
{
    for (int i = 0; i < CHANNELS; i++)
        if (t->channels[i].theirs < 0) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
                return -1;
            t->channels[i].theirs = theirs;
            t->channels[i].ours = pair[0];
            return pair[1];
        }
    return -1;
}

static void count_bytes(struct talk *t, const uint8_t *data, size_t n)
{
    uint32_t size;
    if (t->payload_left) {
        t->payload_left -= n;
        return;
    }
    memcpy(t->header + t->header_len, data, n);
    t->header_len += (uint32_t)n;
    if (t->header_len == HEADER_LEN) {
        memcpy(&size, t->header + 8, sizeof size);
        t->payload_left = size;
        t->header_len = 0;
    }
}

/* A piece of a message, never of two: descriptors belong to the message with which they came. */
static void take_from_peer(struct talk *t)
{
    int fds[FDS_MAX];
    uint32_t n_fds;
    struct found found;
    struct say say = {.kind = SAY_DATA};
    struct room *room = room_get();
    if (room == NULL) {
        t->done = true;
        return;
    }
    uint8_t *data = room->bytes + sizeof say + FDS_MAX * sizeof found;
    size_t want = HEADER_LEN - t->header_len;
    if (t->payload_left)
        want = t->payload_left < DATA_MAX ? (size_t)t->payload_left : DATA_MAX;
    busy(t->c);
    ssize_t n = receive(t->peer, room, data, want, &n_fds, fds);
    if (n <= 0) {
        idle(t->c);
        if (n == 0 || (errno != EAGAIN && errno != EINTR))
            t->deaf = t->at_end = true;
        room_put(room);
        return;
    }
    say.count = n_fds;
    uint8_t *end = room->bytes + sizeof say;
    if (n_fds > FDS_MAX) {
        t->deaf = true; /* the switch ends it for that */
    } else {
        for (uint32_t i = 0; i < n_fds; i++) {
            look_at(fds[i], &found);
            if (found.kind == FOUND_SOCKET) {
                int ours = open_channel(t, fds[i]);
                if (ours >= 0) {
                    room->own |= 1u << room->n_fds;
                    room->fds[room->n_fds++] = ours;
                } else {
                    found.kind = FOUND_OTHER;
                    snprintf(found.text, sizeof found.text, "one Unix socket too many");
                }
            } else if (found.kind == FOUND_EVENTFD || found.kind == FOUND_MEMORY) {
                room->fds[room->n_fds++] = fds[i];
            }
            memcpy(end, &found, sizeof found);
            end += sizeof found;
        }
    }
    idle(t->c);
    count_bytes(t, data, (size_t)n);
    memmove(end, data, (size_t)n);
    memcpy(room->bytes, &say, sizeof say);
    room->len = (size_t)(end - room->bytes) + (size_t)n;
    t->in = room;
}

static bool is_own(const struct talk *t, uint32_t id)
{
    int fd = (int)id;
    if (fd <= 2 || fd == t->pair || fd == t->peer || fd == wake_fd)
        return true;
    for (int i = 0; i < CHANNELS; i++)
        if (fd == t->channels[i].theirs || fd == t->channels[i].ours)
            return true;
    return false;
}

static void answer(struct talk *t, uint32_t kind, uint32_t count)
{
    t->answer = (struct say){kind, count};
    t->answers = true;
}

static void take_from_switch(struct talk *t)
{
    struct ask ask;
    uint32_t n_fds;
    struct room *room = room_get();
    ssize_t n = -1;
    if (room != NULL)
        n = receive(t->pair, room, room->bytes, sizeof room->bytes, &n_fds, room->fds);
    if (n < 0 && room != NULL && (errno == EAGAIN || errno == EINTR)) {
        room_put(room);
        return;
    }
    if (n < (ssize_t)sizeof ask) {
        t->done = true; /* the switch has nothing of this connection any more, or is gone */
        if (room != NULL)
            room_put(room);
        return;
    }
    memcpy(&ask, room->bytes, sizeof ask);
    if (ask.kind == ASK_SEND && n_fds <= FDS_MAX) {
        room->n_fds = (int)n_fds;
        room->own = (1u << n_fds) - 1;
        room->at = sizeof ask;
        room->len = (size_t)n;
        t->out = room;
        return;
    }
    room_put(room);
    struct pollfd peer = {t->peer, POLLRDHUP, 0};
    switch (ask.kind) {
    case ASK_RELEASE:
        if (is_own(t, ask.id))
            break;
        busy(t->c);
        close((int)ask.id);
        idle(t->c);
        break;
    case ASK_SHARING:
        busy(t->c);
        answer(t, SAY_SHARING, is_private_copy(t->c->peer.pid, ask.uva, ask.dev, ask.ino));
        idle(t->c);
        break;
    case ASK_HERE:
        answer(t, SAY_HERE, t->at_end || (poll(&peer, 1, 0) > 0 && peer.revents));
        break;
    case ASK_END:
        t->deaf = true;
        shutdown(t->peer, SHUT_RDWR);
        break;
    }
}

static void drop(struct room **room)
{
    if (*room != NULL)
        room_put(*room);
    *room = NULL;
}

/* Take bytes where there is room for them and send them on. False at the end. */
static bool pump(int from, short events, int to, struct room **room)
{
    int fds[FDS_MAX];
    uint32_t n_fds = 0;
    if (*room == NULL && events & (POLLIN | POLLHUP | POLLERR)) {
        if ((*room = room_get()) == NULL)
            return false;
        ssize_t n = receive(from, *room, (*room)->bytes, DATA_MAX, &n_fds, fds);
        int error = errno;
        (*room)->len = n < 0 ? 0 : (size_t)n;
        if (n <= 0)
            drop(room);
        /* Nobody sends descriptors here. What came goes with this thread. */
        if (n == 0 || n_fds || (n < 0 && error != EAGAIN && error != EINTR))
            return false;
    }
    if (*room != NULL) {
        int sent = send_room(to, *room);
        if (sent < 0)
            return false;
        if (sent == 0)
            drop(room);
    }
    return true;
}

static void channel_turn(struct talk *t, struct channel *channel, short theirs, short ours)
{
    busy(t->c); /* it may have been sent descriptors */
    if (!pump(channel->theirs, theirs, channel->ours, &channel->in) ||
        !pump(channel->ours, ours, channel->theirs, &channel->out)) {
        drop(&channel->in);
        drop(&channel->out);
        close(channel->ours);
        channel->ours = -1;
        shutdown(channel->theirs, SHUT_RDWR);
        close(channel->theirs);
        channel->theirs = -1;
    }
    idle(t->c);
}

/* Nothing of what waits for room is asked for: POLLHUP alone would wake us for ever. */
static struct pollfd watch(int fd, bool read, bool write)
{
    short events = (short)((read ? POLLIN | POLLRDHUP : 0) | (write ? POLLOUT : 0));
    return (struct pollfd){events ? fd : -1, events, 0};
}

static void turn(struct talk *t)
{
    struct pollfd fds[2 + 2 * CHANNELS];
    bool more = !t->deaf && t->in == NULL;
    fds[0] = watch(t->pair, t->out == NULL && !t->answers, t->in != NULL || t->answers);
    fds[0].fd = t->pair; /* that the switch is done is heard in any case */
    fds[1] = watch(t->peer, more, t->out != NULL);
    for (int i = 0; i < CHANNELS; i++) {
        struct channel *one = &t->channels[i];
        fds[2 + 2 * i] = watch(one->theirs, one->in == NULL, one->out != NULL);
        fds[3 + 2 * i] = watch(one->ours, one->out == NULL, one->in != NULL);
    }
    if (poll(fds, 2 + 2 * CHANNELS, -1) < 0)
        return;
    for (int i = 0; i < CHANNELS; i++)
        if (fds[2 + 2 * i].revents | fds[3 + 2 * i].revents && t->channels[i].theirs >= 0)
            channel_turn(t, &t->channels[i], fds[2 + 2 * i].revents, fds[3 + 2 * i].revents);
    if (t->out != NULL && fds[1].revents & ~(POLLIN | POLLRDHUP) && send_room(t->peer, t->out) != 1)
        drop(&t->out);
    /* Whoever does not read its replies is heard all the same, until the switch loses its patience. */
    if (more && fds[1].revents & ~POLLOUT)
        take_from_peer(t);
    if (t->answers && fds[0].revents && send(t->pair, &t->answer, sizeof t->answer, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        t->answers = false;
    if (t->in != NULL) {
        int sent = send_room(t->pair, t->in);
        if (sent < 0)
            t->done = true;
        if (sent <= 0)
            drop(&t->in);
    }
    if (t->at_end && !t->end_told && t->in == NULL) {
        shutdown(t->pair, SHUT_WR);
        t->end_told = true;
    }
    if (fds[0].revents & (POLLIN | POLLHUP | POLLERR) && !t->done) {
        if (t->out == NULL && !t->answers)
            take_from_switch(t);
        else if (fds[0].revents & POLLHUP)
            t->done = true;
    }
}

static void talk(struct talk *t)
{
    while (!t->done)
        turn(t);
    shutdown(t->peer, SHUT_RDWR);
    for (int i = 0; i < CHANNELS; i++) {
        if (t->channels[i].theirs >= 0)
            shutdown(t->channels[i].theirs, SHUT_RDWR);
        drop(&t->channels[i].in);
        drop(&t->channels[i].out);
    }
    drop(&t->in);
    drop(&t->out);
}

/* MODE_PLAIN: bytes both ways. What was on its way when one end hung up still arrives. */
static void pass_bytes(struct talk *t)
{
    for (;;) {
        struct pollfd fds[2] = {
            watch(t->peer, t->in == NULL, t->out != NULL),
            watch(t->pair, t->out == NULL, t->in != NULL),
        };
        if (poll(fds, 2, -1) < 0)
            continue;
        busy(t->c);
        bool goes_on = (fds[0].revents == 0 && t->in == NULL) || pump(t->peer, fds[0].revents, t->pair, &t->in);
        goes_on = ((fds[1].revents == 0 && t->out == NULL) || pump(t->pair, fds[1].revents, t->peer, &t->out)) && goes_on;
        idle(t->c);
        if (!goes_on)
            break;
    }
    shutdown(t->pair, SHUT_RDWR);
    shutdown(t->peer, SHUT_RDWR);
    drop(&t->in);
    drop(&t->out);
}

static void close_between(int first, int last)
{
#ifdef SYS_close_range
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return;
#endif
    for (int fd = first; fd <= last && fd <= atomic_load(&top_fd); fd++)
        close(fd);
}

/* Close all but these and the standard ones in this thread's table. The main thread waits meanwhile and
 * has all of them: none of these is a last close. */
static void keep_only(int fd)
{
    int kept[] = {2, control_fd, wake_fd, fd};
    for (int i = 1; i < 4; i++)
        for (int j = i; j > 0 && kept[j] < kept[j - 1]; j--) {
            int swap = kept[j];
            kept[j] = kept[j - 1];
            kept[j - 1] = swap;
        }
    int from = 3;
    for (int i = 0; i < 4; i++)
        if (kept[i] >= from) {
            close_between(from, kept[i] - 1);
            from = kept[i] + 1;
        }
    close_between(from, INT32_MAX);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    memcpy(address.sun_path, path, sizeof address.sun_path - 1);
    return connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ? -1 : fd;
}

/* Tell the switch, with `fd` if it is one; waits for room in its queue. */
static bool report(struct connection *c, enum report_kind kind, int error, int fd)
{
    int sent;
    struct room *room = room_get();
    if (room == NULL)
        return false;
    struct report *r = (struct report *)room->bytes;
    socklen_t len = sizeof r->groups;
    *r = (struct report){.kind = kind, .error = error, .source = c->source, .number = c->number};
    r->pid = (uint32_t)c->peer.pid;
    r->uid = c->peer.uid;
    r->gid = c->peer.gid;
    if (c->mode == MODE_PLAIN && getsockopt(c->fd, SOL_SOCKET, SO_PEERGROUPS, r->groups, &len) == 0)
        r->n_groups = len / sizeof *r->groups;
    room->len = offsetof(struct report, groups) + r->n_groups * sizeof *r->groups;
    room->n_fds = fd >= 0;
    room->fds[0] = fd;
    while ((sent = send_room(control_fd, room)) > 0)
        poll(&(struct pollfd){control_fd, POLLOUT, 0}, 1, -1);
    room_put(room);
    return sent == 0;
}

static void serve(struct connection *c)
{
    struct talk t = {.c = c};
    socklen_t len = sizeof c->peer;
    int pair[2];
    if (c->task == CONNECTS) {
        busy(c);
        c->fd = connect_to(c->path);
        int error = errno;
        idle(c);
        if (c->fd < 0) {
            report(c, REPORT_FAILED, error, -1);
            return;
        }
    }
    getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &c->peer, &len);
    int type = c->mode == MODE_PLAIN ? SOCK_STREAM : SOCK_SEQPACKET;
    if (socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
        return;
    bool told = report(c, REPORT_NEW, 0, pair[1]);
    close(pair[1]);
    close(control_fd);
    if (!told)
        return;
    t.pair = pair[0];
    t.peer = c->fd;
    for (int i = 0; i < CHANNELS; i++)
        t.channels[i].theirs = t.channels[i].ours = -1;
    if (c->mode == MODE_PLAIN)
        pass_bytes(&t);
    else
        talk(&t);
}

void *connection_run(void *argument)
{
    struct connection *c = argument;
    atomic_store(&c->tid, (pid_t)syscall(SYS_gettid));
    if (c->task == ACCEPTS)
        c->fd = accept4(c->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    bool nobody = c->task == ACCEPTS && c->fd < 0;
    c->error = nobody ? errno : 0;
    if (!nobody && unshare(CLONE_FILES) < 0)
        c->failed = true;
    else if (!nobody)
        keep_only(c->fd);
    sem_post(&c->apart);
    while (sem_wait(&c->go) < 0)
        ;
    bool apart = !nobody && !c->failed;
    if (apart && c->task != CLOSES)
        serve(c);
    atomic_store(&c->ended, true); /* and it is the main thread's */
    if (apart) /* else it is the main thread's table, and that knows */
        (void)!write(wake_fd, &(uint64_t){1}, sizeof(uint64_t));
    return NULL;
}
