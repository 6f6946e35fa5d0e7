/* post_event against Worker._check and Engine.arm_events (events.pxd, worker.pyx, engine.pyx).
 *
 * A ring of records with one writer and one reader, and an eventfd that is written only while the
 * reader has asked for it.
 *
 * Holds: every event is taken once, in order and whole, or counted as lost; the main thread never
 * sleeps for ever while one waits.
 */
#define THREADS 2
#define MAIN 0
#define WORKER 1
#define SLOTS 2
#define CELLS 5
#define HEAD 0
#define TAIL 1
#define ARMED 2
#define SLOT(i) (3 + ((i) % SLOTS))
#include "tso.h"

#ifndef EVENTS
#define EVENTS 8
#endif

#ifdef NO_FENCE_POST
#define FENCE_POST skip
#else
#define FENCE_POST FENCE(WORKER)
#endif
#ifdef NO_FENCE_ARM
#define FENCE_ARM skip
#else
#define FENCE_ARM FENCE(MAIN)
#endif

byte lost;
byte took;
bool eventfd;

active proctype worker() {
    byte head, n;
    (LOAD(ARMED) == 1); /* set before the thread starts */
    for (n : 1 .. EVENTS) {
        if
        :: head - LOAD(TAIL) >= SLOTS -> lost = lost + 1
        :: else ->
            STORE(WORKER, SLOT(head), n);
            head = head + 1;
            STORE(WORKER, HEAD, head);
            FENCE_POST;
            if
            :: LOAD(ARMED) == 1 ->
                STORE(WORKER, ARMED, 0);
                SIGNAL(WORKER, eventfd)
            :: else -> skip
            fi
        fi
    }
}

active proctype main_thread() {
    byte tail, head, last;
    STORE(MAIN, ARMED, 1);
    FENCE(MAIN);
end_asleep:
    atomic { eventfd -> eventfd = false }
again:
    head = LOAD(HEAD);
    do
    :: tail != head ->
        assert(LOAD(SLOT(tail)) > last);
        last = LOAD(SLOT(tail));
        tail = tail + 1;
        took = took + 1
    :: else -> break
    od;
    STORE(MAIN, TAIL, tail);
    STORE(MAIN, ARMED, 1);
    FENCE_ARM;
    if
    :: LOAD(HEAD) != tail -> goto again
    :: else -> goto end_asleep
    fi
}

active proctype observer() {
    timeout;
    assert(took + lost == EVENTS)
}
