/* Whether a frontend shares the guest's memory or keeps a private copy of the file it handed over.
 *
 * A private mapping (QEMU without share=on) of the same file looks like shared memory: the kernel even
 * allocates a zeroed page in the file wherever the guest writes. Only the frontend's own list of mappings
 * tells the two apart. Reading it takes as long as the frontend has mappings, and waits for whoever
 * changes them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "relay.h"

enum { LINE_LEN = 128 }; /* all but the path of a line; "%lx-%lx %4s %llx %x:%x %lu" has less */

/* 1 or 0 if the line has the address, -1 if a later one may. */
static int judge(const char *line, uint64_t uva, uint64_t dev, uint64_t ino)
{
    char *at;
    uint64_t start = strtoull(line, &at, 16);
    if (*at++ != '-')
        return -1;
    uint64_t end = strtoull(at, &at, 16);
    if (uva < start)
        return 0;
    if (uva >= end || strlen(at) < 6)
        return -1;
    char shared = at[4];
    at += 5;
    strtoull(at, &at, 16);
    unsigned major_id = (unsigned)strtoul(at, &at, 16);
    if (*at++ != ':')
        return 0;
    unsigned minor_id = (unsigned)strtoul(at, &at, 16);
    uint64_t inode = strtoull(at, &at, 10);
    return major_id == major(dev) && minor_id == minor(dev) && inode == ino && shared == 'p';
}

bool is_private_copy(pid_t pid, uint64_t uva, uint64_t dev, uint64_t ino)
{
    char path[32], line[LINE_LEN];
    size_t len = 0;
    int answer = -1;

    if (pid <= 0)
        return false;
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    struct room *room = room_get();
    while (answer < 0) {
        ssize_t n = room == NULL ? 0 : read(fd, room->bytes, sizeof room->bytes);
        if (n <= 0)
            break;
        for (ssize_t i = 0; i < n && answer < 0; i++)
            if (room->bytes[i] == '\n') {
                line[len] = 0;
                len = 0;
                answer = judge(line, uva, dev, ino);
            } else if (len < LINE_LEN - 1) {
                line[len++] = (char)room->bytes[i];
            }
    }
    if (room != NULL)
        room_put(room);
    close(fd);
    return answer == 1;
}
