/* Guest memory that its owner takes away.
 *
 * A frontend may truncate its memory file after we mapped it; touching what is missing raises SIGBUS
 * in whichever thread does. The handler puts zero pages over the whole region, so that the access and
 * all later ones succeed, marks the memory as lost and signals an eventfd. A SIGBUS anywhere else is
 * left to whoever handled it before.
 *
 * Regions are added and removed by the main thread only. The handler may run in any thread, at any
 * time; it takes a slot as valid when its base is set.
 */
#ifndef VSWITCH_SIGBUS_H
#define VSWITCH_SIGBUS_H

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define VS_SIGBUS_SLOTS 65536 /* MAX_PORTS ports of MAX_REGIONS regions */

struct vs_region_slot {
    char *base;
    size_t len;
    uint32_t *lost;
};

static struct vs_region_slot vs_slots[VS_SIGBUS_SLOTS];
static int vs_slots_used; /* slots at and beyond it were never in use */
static int vs_lost_fd = -1;
static struct sigaction vs_old_sigbus;

static void vs_on_sigbus(int number, siginfo_t *info, void *context) {
    char *address = (char *)info->si_addr;
    int used = __atomic_load_n(&vs_slots_used, __ATOMIC_ACQUIRE), saved = errno;
    /* An unaligned access is no missing page, and would be repeated for ever. */
    if (info->si_code == BUS_ADRALN)
        used = 0;
    for (int i = 0; i < used; i++) {
        struct vs_region_slot *slot = &vs_slots[i];
        /* Acquire: length and flag after the base; pairs with the release in vs_add_region. */
        char *base = __atomic_load_n(&slot->base, __ATOMIC_ACQUIRE);
        if (base == NULL || address < base || address >= base + slot->len)
            continue;
        if (mmap(base, slot->len, PROT_READ | PROT_WRITE,
                 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            break;
        __atomic_store_n(slot->lost, 1, __ATOMIC_RELEASE);
        uint64_t one = 1;
        if (write(vs_lost_fd, &one, sizeof one) < 0) {
            /* Full: it is readable already. */
        }
        errno = saved;
        return;
    }
    errno = saved;
    if (vs_old_sigbus.sa_flags & SA_SIGINFO) {
        vs_old_sigbus.sa_sigaction(number, info, context);
    } else if (vs_old_sigbus.sa_handler != SIG_DFL && vs_old_sigbus.sa_handler != SIG_IGN) {
        vs_old_sigbus.sa_handler(number);
    } else {
        /* The access is repeated on return and ends the process as it would have without us. */
        signal(SIGBUS, SIG_DFL);
    }
}

/* The eventfd that is signalled when memory is lost; -1 and errno on failure. */
static int vs_watch_sigbus(void) {
    if (vs_lost_fd >= 0)
        return vs_lost_fd;
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return -1;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = vs_on_sigbus;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    vs_lost_fd = fd;
    if (sigaction(SIGBUS, &action, &vs_old_sigbus) < 0) {
        close(fd);
        vs_lost_fd = -1;
        return -1;
    }
    return fd;
}

/* Returns a slot number for vs_remove_region, -1 if all are taken. */
static int vs_add_region(char *base, size_t len, uint32_t *lost) {
    for (int i = 0; i < VS_SIGBUS_SLOTS; i++) {
        struct vs_region_slot *slot = &vs_slots[i];
        if (slot->base != NULL)
            continue;
        slot->len = len;
        slot->lost = lost;
        /* Release: pairs with the acquire in vs_on_sigbus. */
        __atomic_store_n(&slot->base, base, __ATOMIC_RELEASE);
        if (i >= vs_slots_used)
            __atomic_store_n(&vs_slots_used, i + 1, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

/* Before the region is unmapped; no worker touches it any more. */
static void vs_remove_region(int slot) {
    if (slot >= 0)
        __atomic_store_n(&vs_slots[slot].base, NULL, __ATOMIC_RELEASE);
}

#endif
