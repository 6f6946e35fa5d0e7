/* Engine.publish and passed against worker_loop and sleep_until_event (engine.pyx, loop.pxd).
 *
 * Main publishes views and frees the old one after quiescence; the memory of a freed view is used
 * for the next, as malloc does it, so that pointers repeat. The worker uses its view at any time
 * between the top of its loop and the next, or its sleep.
 *
 * Holds: nobody uses a freed view; whoever sleeps in the end does so by the newest one; main always
 * gets to free what it replaced.
 */
#define THREADS 2
#define MAIN 0
#define WORKER 1
#define CELLS 3
#define VIEW 0
#define EPOCH 1
#define STATE 2
#define RUNNING 0
#define SLEEPING 1
#include "tso.h"

#ifndef PUBLISHES
#define PUBLISHES 3
#endif
#define PLACES 3

#ifdef NO_FENCE_PUBLISH
#define FENCE_PUBLISH skip
#else
#define FENCE_PUBLISH FENCE(MAIN)
#endif
#ifdef NO_FENCE_LOOP
#define FENCE_LOOP skip
#else
#define FENCE_LOOP FENCE(WORKER)
#endif
#ifdef NO_FENCE_SLEEP
#define FENCE_SLEEP skip
#else
#define FENCE_SLEEP FENCE(WORKER)
#endif
#ifdef NO_FENCE_WAKE
#define FENCE_WAKE skip
#else
#define FENCE_WAKE FENCE(WORKER)
#endif

bool freed[PLACES];
byte version[PLACES]; /* which publish a place holds */
byte seen;            /* version that the worker goes by */
bool wake;
bool done;

#define USE(view) assert(!freed[view])

active proctype main_thread() {
    byte old = 0, new, epoch, n;
    bool running;
    freed[1] = true;
    freed[2] = true;
    for (n : 1 .. PUBLISHES) {
        /* calloc gives any place that is free. */
        if
        :: freed[0] -> new = 0
        :: freed[1] -> new = 1
        :: freed[2] -> new = 2
        fi;
        freed[new] = false;
        version[new] = n;
        STORE(MAIN, VIEW, new);
        FENCE_PUBLISH;
        running = (LOAD(STATE) == RUNNING);
        epoch = LOAD(EPOCH);
        if
        :: running ->
            /* Engine.passed, asked again and again. */
            (LOAD(STATE) != RUNNING || LOAD(EPOCH) != epoch)
        :: else -> SIGNAL(MAIN, wake)
        fi;
        freed[old] = true;
        old = new
    }
    done = true
}

active proctype worker() {
    byte view, current, epoch;
top:
    epoch = (epoch + 1) % 16;
    STORE(WORKER, EPOCH, epoch);
    FENCE_LOOP;
    view = LOAD(VIEW);
    USE(view);
    seen = version[view];
    USE(view);
    if
    :: goto top /* there was work */
    :: skip
    fi;
    USE(view); /* arm_rings */
    STORE(WORKER, STATE, SLEEPING);
    FENCE_SLEEP;
    if
    :: LOAD(VIEW) != view ->
        STORE(WORKER, STATE, RUNNING);
        FENCE_WAKE;
        goto top
    :: else -> skip
    fi;
end_asleep:
    atomic { wake -> wake = false }
    STORE(WORKER, STATE, RUNNING);
    FENCE_WAKE;
    current = LOAD(VIEW);
    USE(current); /* counting kicks by the view */
    USE(current);
    goto top
}

/* When nothing can go on any more. */
active proctype observer() {
    timeout;
    assert(done);
    assert(seen == PUBLISHES)
}
