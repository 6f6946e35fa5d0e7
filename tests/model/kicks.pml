/* arm_rings, take_split and sleep_until_event against a driver that adds buffers (split.pxd,
 * loop.pxd; VIRTIO 1.2, 2.7.10 and 2.7.13).
 *
 * With EVENT_IDX the driver kicks when it moves the index past avail_event; with FLAGS it kicks
 * unless NO_NOTIFY is set. A packed ring is the same with a descriptor's flags for the index and the
 * device event suppression structure for avail_event.
 *
 * Holds: the worker never sleeps for ever while a buffer waits.
 */
#define THREADS 2
#define DRIVER 0
#define WORKER 1
#define CELLS 2
#define AVAIL 0
#define EVENT 1 /* avail_event, or the used flags */
#include "tso.h"

#ifndef BUFFERS
#define BUFFERS 8
#endif

#ifdef NO_FENCE_DRIVER
#define FENCE_DRIVER skip
#else
#define FENCE_DRIVER FENCE(DRIVER)
#endif
#ifdef NO_FENCE_ARM
#define FENCE_ARM skip
#else
#define FENCE_ARM FENCE(WORKER)
#endif

#ifdef FLAGS
#define WANT 0
#define REFUSE STORE(WORKER, EVENT, 1)
#define DRIVER_KICKS (LOAD(EVENT) == 0)
#else
#define WANT taken
#define REFUSE skip
#define DRIVER_KICKS (LOAD(EVENT) == added - 1)
#endif

byte taken;
byte added;
bool kick;

active proctype driver() {
    do
    :: added < BUFFERS ->
        added = added + 1;
        STORE(DRIVER, AVAIL, added);
        FENCE_DRIVER;
        if
        :: DRIVER_KICKS -> SIGNAL(DRIVER, kick)
        :: else -> skip
        fi
    :: else -> break
    od
}

active proctype worker() {
    bool armed = true;
    byte idx;
top:
    idx = LOAD(AVAIL);
    if
    :: idx != taken ->
        if
        :: armed -> REFUSE; armed = false
        :: else -> skip
        fi;
        if
        :: taken = idx
        :: taken = taken + 1 /* a burst ends */
        fi;
        goto top
    :: else -> skip
    fi;
    if
    :: goto top /* still polling */
    :: skip
    fi;
    if
    :: !armed -> STORE(WORKER, EVENT, WANT); armed = true
    :: else -> skip
    fi;
    FENCE_ARM;
    if
    :: LOAD(AVAIL) != taken -> goto top
    :: else -> skip
    fi;
end_asleep:
    atomic { kick -> kick = false }
    goto top
}

active proctype observer() {
    timeout;
    assert(taken == BUFFERS)
}
