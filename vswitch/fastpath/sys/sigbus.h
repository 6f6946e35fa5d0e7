/* Guest memory that its owner takes away.
 *
 * A frontend may truncate its memory file after we mapped it; touching what is missing raises SIGBUS
 * in whichever thread does. The handler puts zero pages over the whole region, so that the access and
 * all later ones succeed, marks the memory as lost and signals an eventfd. A SIGBUS anywhere else is
 * left to whoever handled it before.
 *
 * Regions are added and removed by the main thread only. The handler may run in any thread, at any
 * time, also while slots that do not concern it are emptied and filled with other regions. Each slot has a
 * number that is odd meanwhile and another one afterwards, by which the handler knows that what it has read
 * of one belongs together. A slot that changes is not the one it looks for: whoever touches a region
 * keeps it mapped until it has done so.
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

#ifndef VS_SIGBUS_BETWEEN
#define VS_SIGBUS_BETWEEN() /* where tests/unit/fastpath/sigbus_slots.c has a slot change */
#endif

#define VS_SIGBUS_SLOTS 262144 /* MAX_PORTS ports of MAX_REGIONS regions */

struct vs_region_slot {
    uint32_t version; /* odd while the rest changes */
    char *base;       /* NULL: a free slot */
    size_t len;
    uint32_t *lost;
};

static struct vs_region_slot vs_slots[VS_SIGBUS_SLOTS];
static int vs_slots_used; /* slots at and beyond it were never in use */
static int vs_lost_fd = -1;
static struct sigaction vs_old_sigbus;

/* A copy of the slot whose region holds an address; 0 if there is none. */
static int vs_find_region(const char *address, struct vs_region_slot *found) {
    int used = __atomic_load_n(&vs_slots_used, __ATOMIC_ACQUIRE);
    for (int i = 0; i < used; i++) {
        const struct vs_region_slot *slot = &vs_slots[i];
        /* Acquire: the rest after the version; pairs with the release in vs_set_slot. */
        found->version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
        VS_SIGBUS_BETWEEN();
        found->base = __atomic_load_n(&slot->base, __ATOMIC_RELAXED);
        VS_SIGBUS_BETWEEN();
        found->len = __atomic_load_n(&slot->len, __ATOMIC_RELAXED);
        VS_SIGBUS_BETWEEN();
        found->lost = __atomic_load_n(&slot->lost, __ATOMIC_RELAXED);
        VS_SIGBUS_BETWEEN();
        /* The rest before the version is read once more; pairs with the fence in vs_set_slot. */
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (found->version & 1 || __atomic_load_n(&slot->version, __ATOMIC_RELAXED) != found->version)
            continue;
        if (found->base != NULL && address >= found->base && address < found->base + found->len)
            return 1;
    }
    return 0;
}

static void vs_on_sigbus(int number, siginfo_t *info, void *context) {
    char *address = (char *)info->si_addr;
    struct vs_region_slot region;
    int saved = errno;
    /* An unaligned access is no missing page, and would be repeated for ever. */
    if (info->si_code != BUS_ADRALN && vs_find_region(address, &region) &&
        mmap(region.base, region.len, PROT_READ | PROT_WRITE,
             MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED) {
        __atomic_store_n(region.lost, 1, __ATOMIC_RELEASE);
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

static void vs_set_slot(struct vs_region_slot *slot, char *base, size_t len, uint32_t *lost) {
    __atomic_store_n(&slot->version, slot->version + 1, __ATOMIC_RELAXED);
    /* The odd version before the rest; pairs with the fence in vs_find_region. */
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&slot->base, base, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->len, len, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->lost, lost, __ATOMIC_RELAXED);
    /* Release: the rest before the version; pairs with the acquire in vs_find_region. */
    __atomic_store_n(&slot->version, slot->version + 1, __ATOMIC_RELEASE);
}

/* Returns a slot number for vs_remove_region, -1 if all are taken. */
static int vs_add_region(char *base, size_t len, uint32_t *lost) {
    for (int i = 0; i < VS_SIGBUS_SLOTS; i++) {
        if (vs_slots[i].base != NULL)
            continue;
        vs_set_slot(&vs_slots[i], base, len, lost);
        if (i >= vs_slots_used)
            __atomic_store_n(&vs_slots_used, i + 1, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

/* Before the region is unmapped; no worker touches it any more. */
static void vs_remove_region(int slot) {
    if (slot >= 0)
        vs_set_slot(&vs_slots[slot], NULL, 0, NULL);
}

#endif
