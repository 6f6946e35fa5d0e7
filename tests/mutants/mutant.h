/* Which mutant runs, and which ones a run came by. Only in the tree that `make mutants` builds.
 *
 * VSWITCH_MUTANT is the number of the mutant that is on, none if unset. VSWITCH_REACHED names a file
 * of one byte a mutant, shared by all processes of a test run. */
#ifndef VSWITCH_MUTANT_H
#define VSWITCH_MUTANT_H

#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define VS_MUTANTS_MAX 4096

static int vs_mutant = -1;
static uint8_t vs_reached_here[VS_MUTANTS_MAX];
static uint8_t *vs_reached = vs_reached_here;

__attribute__((constructor)) static void vs_mutant_init(void)
{
    const char *number = getenv("VSWITCH_MUTANT"), *path = getenv("VSWITCH_REACHED");
    if (number)
        vs_mutant = atoi(number);
    if (path) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        void *base = fd < 0 ? MAP_FAILED
                            : mmap(NULL, VS_MUTANTS_MAX, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (fd >= 0)
            close(fd);
        if (base != MAP_FAILED)
            vs_reached = base;
    }
}

static inline int vs_mutated(int number)
{
    if (!vs_reached[number])
        vs_reached[number] = 1;
    return vs_mutant == number;
}

#endif
