/* What a descriptor is that somebody handed over, without trusting its file system to answer.
 *
 * The kinds that honest frontends send are told apart by calls that ask nobody: F_GET_SEALS knows files
 * of tmpfs and hugetlbfs, the name in /proc an eventfd, SO_DOMAIN a Unix socket. Only what is left is
 * asked of its file system, whose answer the sender may keep back (FUSE). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "relay.h"

static const struct {
    uint32_t magic; /* linux/magic.h */
    const char *name;
} file_systems[] = {
    {0x01021994, "tmpfs"},    {0x958458f6, "hugetlbfs"}, {0x858458f6, "ramfs"},   {0xef53, "ext4"},
    {0x58465342, "xfs"},      {0x9123683e, "btrfs"},     {0xf2f52010, "f2fs"},    {0x2fc12fc1, "zfs"},
    {0x794c7630, "overlayfs"}, {0x65735546, "fuse"},     {0x6969, "nfs"},         {0xff534d42, "cifs"},
    {0xfe534d42, "smb2"},     {0x01021997, "9p"},        {0x9fa0, "proc"},        {0x62656572, "sysfs"},
    {0x00c36400, "ceph"},     {0x4d44, "vfat"},          {0x2011bab0, "exfat"},   {0xca451a4e, "bcachefs"},
    {0x5346544e, "ntfs"},     {0x73717368, "squashfs"},  {0xe0f5e1e2, "erofs"},   {0x52654973, "reiserfs"},
    {0x3153464a, "jfs"},      {0x5345434d, "secretmem"},
};

/* The log gets this: nothing in it may look like a line of its own. */
static void set_text(struct found *found, const char *text)
{
    size_t i;
    for (i = 0; i < TEXT_LEN && text[i]; i++)
        found->text[i] = text[i] < ' ' || text[i] > '~' ? '?' : text[i];
    found->text[i] = 0;
}

static void name_file_system(int fd, struct found *found)
{
    struct statfs info;
    char text[TEXT_LEN];
    if (fstatfs(fd, &info) < 0) {
        set_text(found, "a file of an unknown file system");
        return;
    }
    uint32_t magic = (uint32_t)info.f_type;
    for (size_t i = 0; i < sizeof file_systems / sizeof *file_systems; i++)
        if (file_systems[i].magic == magic) {
            snprintf(text, sizeof text, "a file on %s", file_systems[i].name);
            set_text(found, text);
            return;
        }
    snprintf(text, sizeof text, "a file on a file system of type %#x", magic);
    set_text(found, text);
}

static void name_kind(const char *link, mode_t mode, bool by_path, struct found *found)
{
    char text[TEXT_LEN + 64];
    const char *kind = S_ISDIR(mode)    ? "a directory"
                       : S_ISCHR(mode)  ? "a character device"
                       : S_ISBLK(mode)  ? "a block device"
                       : S_ISFIFO(mode) ? "a pipe"
                       : S_ISREG(mode)  ? "a file"
                       : S_ISLNK(mode)  ? "a symbolic link"
                                        : "a socket";
    snprintf(text, sizeof text, "%s%s (%.60s)", kind, by_path ? ", opened by path only" : "", link);
    set_text(found, text);
}

void look_at(int fd, struct found *found)
{
    char path[64], link[256];
    struct stat status;
    int value;
    socklen_t len = sizeof value;

    *found = (struct found){.kind = FOUND_OTHER, .id = (uint32_t)fd};
    if (fcntl(fd, F_GET_SEALS) >= 0) {
        if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode)) {
            found->kind = FOUND_MEMORY;
            found->size = (uint64_t)status.st_size;
            found->dev = status.st_dev;
            found->ino = status.st_ino;
            found->block = (uint32_t)status.st_blksize;
        }
        name_file_system(fd, found);
        return;
    }
    /* Not /proc/self, whose descriptors are the main thread's. */
    snprintf(path, sizeof path, "/proc/self/task/%ld/fd/%d", syscall(SYS_gettid), fd);
    ssize_t n = readlink(path, link, sizeof link - 1);
    if (n < 0) {
        set_text(found, "of an unknown kind, for /proc cannot be read");
        return;
    }
    link[n] = 0;
    if (strcmp(link, "anon_inode:[eventfd]") == 0) {
        found->kind = FOUND_EVENTFD;
        set_text(found, "an eventfd");
        return;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &value, &len) == 0) {
        int type = 0;
        len = sizeof type;
        getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len);
        if (value == AF_UNIX && type == SOCK_STREAM)
            found->kind = FOUND_SOCKET;
        set_text(found, value != AF_UNIX ? "a socket, but no Unix socket"
                        : type != SOCK_STREAM ? "a Unix socket, but no stream socket"
                                              : "a Unix stream socket");
        return;
    }
    if (link[0] != '/') {
        set_text(found, link); /* pipe:[4711], anon_inode:[eventpoll] */
        return;
    }
    bool by_path = fcntl(fd, F_GETFL) & O_PATH;
    if (fstat(fd, &status) < 0) {
        set_text(found, "of an unknown kind");
        return;
    }
    if (!S_ISREG(status.st_mode) || by_path) {
        name_kind(link, status.st_mode, by_path, found);
        return;
    }
    found->kind = FOUND_FILE;
    found->size = (uint64_t)status.st_size;
    found->dev = status.st_dev;
    found->ino = status.st_ino;
    name_file_system(fd, found);
}
