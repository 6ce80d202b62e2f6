/* scalar.h - put before gemma3.c (-include), it leaves the vector kernels out: the definition
 * alone runs. Sanitizers take minutes to compile those kernels, provers do not read them, and
 * their bits are compared with the definition's elsewhere (test/kernels.c).
 *
 * The C library's headers must see the machine as it is, so they come first.
 */
#define _GNU_SOURCE 1
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#undef __x86_64__
#undef __i386__
#undef __aarch64__
