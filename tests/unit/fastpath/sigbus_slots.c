/* What the SIGBUS handler reads of a slot that the main thread gives to other regions meanwhile.
 *
 * One thread is both: the slot is changed between two reads of the handler, after each of them in turn
 * and in each of three ways. Exits 0 if the handler never took a mixture for a region.
 */
#include <stdint.h>
#include <stdio.h>

static void between(void);
#define VS_SIGBUS_BETWEEN() between()
#include "sigbus.h"

static uint32_t lost[2];
static char *const bases[] = {(char *)0x10000000, (char *)0x10000000};
static const size_t lens[] = {0x1000, 0x200000};
static int reads, change_after, way, changes;

static void add(int which) {
    if (vs_add_region(bases[which], lens[which], &lost[which]) != 0)
        printf("not in the first slot\n");
}

static void between(void) {
    if (++reads != change_after)
        return;
    changes++;
    vs_remove_region(0);
    if (way >= 1)
        add(1);
    if (way == 2) {
        vs_remove_region(0);
        add(0);
    }
}

int main(void) {
    struct vs_region_slot found;
    int failed = 0;
    for (way = 0; way < 3; way++) {
        for (change_after = 1;; change_after++) {
            changes = reads = 0;
            add(0);
            int is_found = vs_find_region(bases[0] + 1, &found);
            if (!changes)
                break; /* it reads no more often */
            for (int which = 0; which < 2; which++)
                if (is_found && found.len == lens[which] && found.lost == &lost[which])
                    is_found = 0;
            if (is_found) {
                printf("way %d, after read %d: len %#zx, lost %td\n", way, change_after, found.len, found.lost - lost);
                failed = 1;
            }
            vs_remove_region(0);
        }
        if (change_after <= 4) {
            printf("changed after %d reads only\n", change_after - 1);
            failed = 1;
        }
        /* Nobody changes it: then it is found. */
        change_after = 0;
        if (!vs_find_region(bases[0] + 1, &found) || found.lost != &lost[0]) {
            printf("a region is not found\n");
            failed = 1;
        }
        vs_remove_region(0);
    }
    return failed;
}
