"""The filter of system calls: what code in the jail may ask of the kernel; all else is refused.

An allow list: what a Python program needs for its own memory, files, threads, clocks and pipes. No socket but a pair
that is connected to itself, nothing that starts a program, sees another process, mounts, makes namespaces, or reaches
the parts of the kernel in which holes are found (bpf, io_uring, keyctl, perf_event_open, userfaultfd, splice, ptrace,
...): what is not on the list fails with EPERM, so system calls of kernels to come are refused too. The program is
classic BPF (linux/filter.h), run by the kernel at every call (linux/seccomp.h).
"""

import errno
import struct
from collections.abc import Sequence

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
X32 = 0x40000000  # system calls of the x32 kind have numbers from here on
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, HAS_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld abs, jeq, jge, jset, ret
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

# Name, number on x86-64, number on aarch64 (asm/unistd_64.h, asm-generic/unistd.h).
ALLOWED = """
read 0 63   write 1 64   open 2 -   close 3 57   stat 4 -   fstat 5 80   lstat 6 -   newfstatat 262 79
statx 332 291   poll 7 -   ppoll 271 73   lseek 8 62   mmap 9 222   mprotect 10 226   munmap 11 215
mremap 25 216   msync 26 227   mincore 27 232   madvise 28 233   brk 12 214   rt_sigaction 13 134
rt_sigprocmask 14 135   rt_sigreturn 15 139   rt_sigpending 127 136   rt_sigtimedwait 128 137
rt_sigsuspend 130 133   sigaltstack 131 132   pread64 17 67   pwrite64 18 68   readv 19 65   writev 20 66
preadv 295 69   pwritev 296 70   preadv2 327 286   pwritev2 328 287   access 21 -   faccessat 269 48
faccessat2 439 439   pipe 22 -   pipe2 293 59   select 23 -   pselect6 270 72   sched_yield 24 124
dup 32 23   dup2 33 -   dup3 292 24   pause 34 -   nanosleep 35 101   clock_nanosleep 230 115
getitimer 36 102   setitimer 38 103   alarm 37 -   getpid 39 172   gettid 186 178   getppid 110 173
getpgid 121 155   getpgrp 111 -   getsid 124 156   sendfile 40 71   recvfrom 45 207   shutdown 48 210
getsockname 51 204   getpeername 52 205   exit 60 93   exit_group 231 94   wait4 61 260   waitid 247 95
kill 62 129   tkill 200 130   tgkill 234 131   uname 63 160   fsync 74 82   fdatasync 75 83
truncate 76 45   ftruncate 77 46   fallocate 285 47   fadvise64 221 223   copy_file_range 326 285
getdents64 217 61   getcwd 79 17   chdir 80 49   fchdir 81 50   rename 82 -   renameat 264 38
renameat2 316 276   mkdir 83 -   mkdirat 258 34   rmdir 84 -   creat 85 -   link 86 -   linkat 265 37
unlink 87 -   unlinkat 263 35   symlink 88 -   symlinkat 266 36   readlink 89 -   readlinkat 267 78
chmod 90 -   fchmod 91 52   fchmodat 268 53   umask 95 166   utimensat 280 88   utime 132 -   utimes 235 -
futimesat 261 -   gettimeofday 96 169   time 201 -   times 100 153   clock_gettime 228 113
clock_getres 229 114   getrlimit 97 163   getrusage 98 165   getuid 102 174   getgid 104 176
geteuid 107 175   getegid 108 177   getresuid 118 148   getresgid 120 150   getgroups 115 158
capget 125 90   statfs 137 43   fstatfs 138 44   futex 202 98   set_tid_address 218 96
set_robust_list 273 99   get_robust_list 274 100   rseq 334 293   restart_syscall 219 128
membarrier 324 283   getcpu 309 168   sched_getaffinity 204 123   sched_getscheduler 145 120
sched_getparam 143 121   sched_get_priority_max 146 125   sched_get_priority_min 147 126
getpriority 140 141   epoll_create 213 -   epoll_create1 291 20   epoll_ctl 233 21   epoll_wait 232 -
epoll_pwait 281 22   eventfd 284 -   eventfd2 290 19   getrandom 318 278   close_range 436 436
openat 257 56
"""
# These depend on their arguments: see `conditions`.
CONDITIONAL = """
clone 56 220   clone3 435 435   fork 57 -   vfork 58 -   socketpair 53 199   sendto 44 206   ioctl 16 29
fcntl 72 25   prctl 157 167   prlimit64 302 261
"""
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of linux/sched.h
THREAD = 0x00010000  # CLONE_THREAD
UNIX = 1  # AF_UNIX
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # duplicate, flags, locks, F_GETPIPE_SZ
PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def numbers(table: str, machine: str) -> dict[str, int]:
    """Return name and number of a table's system calls, as far as this machine has them."""
    words = table.split()
    column = 1 if machine == "x86_64" else 2
    rows = (words[index : index + 3] for index in range(0, len(words), 3))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def filter_program(machine: str, processes: int = 1) -> bytes:
    """Return the program for a machine of `MACHINES`, as the kernel takes it; with one process there is no fork."""
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        *([(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)] if machine == "x86_64" else []),
    ]
    known = numbers(CONDITIONAL, machine)
    for name, body in conditions(processes).items():
        if name in known:
            program += [(EQUAL, 0, len(body), known[name]), *body]
    for number in numbers(ALLOWED, machine).values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    program.append(refuse(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def conditions(processes: int) -> dict[str, list[Instruction]]:
    """Return what is asked of the arguments of each system call that depends on them."""
    fork = [(RETURN, 0, 0, ALLOW)] if processes > 1 else [refuse(errno.EPERM)]
    threads = [] if processes > 1 else [(HAS_BIT, 1, 0, THREAD), refuse(errno.EPERM)]
    flags = [(LOAD, 0, 0, ARGUMENTS), (HAS_BIT, 0, 1, NEW_NAMESPACES), refuse(errno.EPERM)]
    return {
        "clone": [*flags, *threads, (RETURN, 0, 0, ALLOW)],
        "clone3": [refuse(errno.ENOSYS)],  # its flags are out of sight: the C library then takes clone
        "fork": fork,
        "vfork": fork,
        "socketpair": one_of(0, (UNIX,)),
        "sendto": null(4),  # no address: to the other end of a pair
        "ioctl": one_of(1, IOCTLS),
        "fcntl": one_of(1, FCNTLS),
        "prctl": one_of(0, PRCTLS),
        "prlimit64": null(2),  # limits are read, not set
    }


def refuse(error: int) -> Instruction:
    return (RETURN, 0, 0, ERRNO | error)


def one_of(argument: int, values: Sequence[int]) -> list[Instruction]:
    """Allow if an argument, of which the kernel reads 32 bits, is one of these values."""
    tests = [(EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *tests, refuse(errno.EPERM), (RETURN, 0, 0, ALLOW)]


def null(argument: int) -> list[Instruction]:
    """Allow if all 64 bits of an argument are zero."""
    low = ARGUMENTS + 8 * argument
    halves = [(LOAD, 0, 0, low), (EQUAL, 0, 3, 0), (LOAD, 0, 0, low + 4), (EQUAL, 0, 1, 0)]
    return [*halves, (RETURN, 0, 0, ALLOW), refuse(errno.EPERM)]
