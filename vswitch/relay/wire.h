/* What the switch and its relay say to each other; wire.py is the other side of it.
 *
 * Every message is one packet of a SOCK_SEQPACKET socket, in the byte order of the machine. */
#ifndef VSWITCH_RELAY_WIRE_H
#define VSWITCH_RELAY_WIRE_H

#include <stdint.h>

#define DATA_MAX 4096    /* bytes of a stream in one packet */
#define FDS_MAX 8        /* descriptors that may come with them: VHOST_MEMORY_BASELINE_NREGIONS */
#define FDS_UNKNOWN UINT32_MAX
#define PATH_LEN 112     /* more than sun_path has */
#define GROUPS_MAX 256
#define TEXT_LEN 80

/* From the switch to the relay. */
enum order_kind {
    ORDER_LISTEN = 1, /* a listening socket comes along */
    ORDER_CLOSE,      /* that of an earlier ORDER_LISTEN */
    ORDER_CONNECT,    /* to `path` */
    ORDER_QUIT,       /* the switch holds nothing of anybody's any more */
};

enum mode {
    MODE_VHOST_USER, /* whole messages, descriptors that were looked at */
    MODE_PLAIN,      /* bytes, and nobody may send a descriptor */
};

struct order {
    uint32_t kind, mode;
    uint64_t source; /* the switch's name for a socket file and whoever comes from there */
    char path[PATH_LEN];
};

/* From the relay to the switch. */
enum report_kind {
    REPORT_READY = 1,
    REPORT_NEW,     /* a connection: the switch's end of it comes along */
    REPORT_FAILED,  /* ORDER_CONNECT, with `error` an errno */
    REPORT_STUCK,   /* connection `number` waits for something that its peer handed over */
    REPORT_CROWDED, /* nobody else is let in: `error` former connections cannot be closed; 0: they can */
};

struct report {
    uint32_t kind;
    int32_t error;
    uint64_t source, number;
    uint32_t pid, uid, gid, n_groups;
    uint32_t groups[GROUPS_MAX];
};

/* From a connection to the switch, where it is not MODE_PLAIN. */
enum say_kind {
    SAY_DATA = 1, /* then `count` of struct found, then bytes; FDS_UNKNOWN or > FDS_MAX: none of them */
    SAY_SHARING,  /* `count` is 1 if the peer has that file mapped privately there */
    SAY_HERE,     /* `count` is 1 if the peer is gone */
};

struct say {
    uint32_t kind, count;
};

enum found_kind {
    FOUND_EVENTFD = 1, /* passed on */
    FOUND_MEMORY,      /* passed on: a regular file of tmpfs or hugetlbfs */
    FOUND_SOCKET,      /* a Unix stream socket: an end of another takes its place */
    FOUND_FILE,        /* not passed on: a regular file of another file system */
    FOUND_OTHER,       /* not passed on */
};

struct found {
    uint32_t kind, id;
    uint64_t size, dev, ino;
    uint32_t block;
    char text[TEXT_LEN + 4]; /* what it is, for people */
};

/* From the switch to a connection. */
enum ask_kind {
    ASK_SEND = 1, /* bytes follow, descriptors may come along */
    ASK_RELEASE,  /* the switch is done with the descriptor called `id` */
    ASK_SHARING,  /* see SAY_SHARING */
    ASK_HERE,     /* see SAY_HERE */
    ASK_END,      /* hang up; what the switch still holds it releases later */
};

struct ask {
    uint32_t kind, id;
    uint64_t uva, dev, ino;
};

#endif
