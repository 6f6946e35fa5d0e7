/* x86-TSO (Sewell et al., 2010) for spin: each thread has a FIFO of stores that others do not see
 * yet; they reach memory one by one, at any time; a full fence waits until all have.
 *
 * No thread here loads what it has stored and not yet flushed, so loads may go to memory at once.
 */
#define FIFO 3

byte mem[CELLS];
chan buffer[THREADS] = [FIFO] of { byte, byte };

#define STORE(thread, cell, value) buffer[thread]!cell, value
#define LOAD(cell) mem[cell]
#define FENCE(thread) (empty(buffer[thread]))

/* A system call that signals somebody: the kernel's lock in it orders our earlier stores before. */
#ifdef UNORDERED_WRITE
#define SIGNAL(thread, what) what = 1
#else
#define SIGNAL(thread, what) FENCE(thread); what = 1
#endif

active [THREADS] proctype flush() {
    byte cell, value;
end:
    do
    :: atomic { buffer[_pid]?cell, value -> mem[cell] = value; cell = 0; value = 0 }
    od
}
