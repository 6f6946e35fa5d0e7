/* What is left of the switch's rights in this program: a file is read, a socket is a Unix socket. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "relay.h"

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#elif defined(__riscv) && __riscv_xlen == 64
#define ARCH AUDIT_ARCH_RISCV64
#endif

/* The lower half of an argument. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ARG(n) offsetof(struct seccomp_data, args[n])
#else
#define ARG(n) (offsetof(struct seccomp_data, args[n]) + 4)
#endif

#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (offset))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, (value))
#define DENY RETURN(SECCOMP_RET_ERRNO | EPERM)
#define IF_EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), yes, no)
#define IF_ANY_BIT(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (value), yes, no)

/* The number of the call stays loaded from one of these to the next. */
#define ALLOW(call) IF_EQUAL(__NR_##call, 0, 1), RETURN(SECCOMP_RET_ALLOW)
#define ALLOW_WITH(call, n, value) \
    IF_EQUAL(__NR_##call, 0, 4), LOAD(ARG(n)), IF_EQUAL(value, 0, 1), RETURN(SECCOMP_RET_ALLOW), DENY
#define ALLOW_WITHOUT(call, n, bits) \
    IF_EQUAL(__NR_##call, 0, 4), LOAD(ARG(n)), IF_ANY_BIT(bits, 1, 0), RETURN(SECCOMP_RET_ALLOW), DENY
#define ALLOW_WITH_BIT(call, n, bit) \
    IF_EQUAL(__NR_##call, 0, 4), LOAD(ARG(n)), IF_ANY_BIT(bit, 0, 1), RETURN(SECCOMP_RET_ALLOW), DENY

#ifdef ARCH
static struct sock_filter program[] = {
    LOAD(offsetof(struct seccomp_data, arch)),
    IF_EQUAL(ARCH, 1, 0),
    RETURN(SECCOMP_RET_KILL_PROCESS),
    LOAD(offsetof(struct seccomp_data, nr)),
    /* Relaying. */
    ALLOW(recvmsg), ALLOW(sendmsg), ALLOW(recvfrom), ALLOW(sendto), ALLOW(ppoll), ALLOW(close),
    ALLOW(accept4), ALLOW(shutdown), ALLOW(connect), ALLOW(getsockopt),
    ALLOW_WITH(socket, 0, AF_UNIX), ALLOW_WITH(socketpair, 0, AF_UNIX),
    ALLOW(read), ALLOW(write), ALLOW(lseek),
#ifdef __NR_poll
    ALLOW(poll),
#endif
    /* Looking at what came. */
    ALLOW(fcntl), ALLOW(fstat), ALLOW(fstatfs), ALLOW(readlinkat), ALLOW(newfstatat),
    ALLOW_WITHOUT(openat, 2, O_ACCMODE | O_CREAT | O_TRUNC),
#ifdef __NR_readlink
    ALLOW(readlink),
#endif
    /* Threads, each with a table of descriptors of its own. */
    ALLOW_WITH(unshare, 0, CLONE_FILES), ALLOW_WITH_BIT(clone, 0, CLONE_THREAD),
    ALLOW_WITHOUT(mmap, 2, PROT_EXEC), ALLOW_WITHOUT(mprotect, 2, PROT_EXEC), ALLOW(munmap),
    ALLOW(madvise), ALLOW(brk), ALLOW(futex), ALLOW(set_robust_list), ALLOW(exit), ALLOW(exit_group),
    ALLOW(gettid), ALLOW(getpid), ALLOW(rt_sigprocmask), ALLOW(rt_sigreturn), ALLOW(restart_syscall),
    ALLOW(clock_gettime), ALLOW(sched_yield), ALLOW_WITH(tgkill, 2, 0), /* see is_gone() */
#ifdef __NR_rseq
    ALLOW(rseq),
#endif
#ifdef __NR_close_range
    ALLOW(close_range),
#endif
#ifdef __NR_clone3
    /* Its flags lie in memory, where no filter sees them: as if the kernel did not know it. */
    IF_EQUAL(__NR_clone3, 0, 1), RETURN(SECCOMP_RET_ERRNO | ENOSYS),
#endif
    DENY,
};
#endif

static int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    uint32_t kept = 0;

    if (syscall(SYS_capget, &header, data) < 0)
        return -1;
    /* A switch that is root connects to sockets of others, and reads their lists of mappings. */
    if (geteuid() == 0)
        kept = (1u << CAP_DAC_OVERRIDE | 1u << CAP_SYS_PTRACE) & data[0].permitted;
    data[0] = (struct __user_cap_data_struct){.effective = kept, .permitted = kept};
    data[1] = (struct __user_cap_data_struct){0};
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); /* not before Linux 4.3, nor needed */
    return (int)syscall(SYS_capset, &header, data);
}

int confine(void)
{
    setrlimit(RLIMIT_CORE, &(struct rlimit){0});
    if (drop_capabilities() < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -1;
    /* A sanitizer's runtime makes calls of its own. */
#if defined(ARCH) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0);
#else
    return 0;
#endif
}
