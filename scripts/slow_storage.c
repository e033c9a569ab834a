/* A slow file system, simulated: a library for LD_PRELOAD that sleeps in the calls that a network
 * file system answers with a round trip, for paths below a prefix.
 *
 *     SLOW_STORAGE_PREFIX     an absolute folder, without links in it; without it nothing is slow
 *     SLOW_STORAGE_OPEN_US    microseconds for each open and each stat by name
 *     SLOW_STORAGE_READ_US    microseconds for each read that returns bytes
 *     SLOW_STORAGE_COUNTS     a file of 4 x 8 bytes, to which all processes add: opens, stats,
 *                             reads, and the nanoseconds that were slept
 *
 * A process's children inherit all of it, by fork and by exec. What is not delayed: mmap, reads
 * inside libc (fread), sendfile, fstat of an open file, reads at a file's end, listings of folders,
 * and programs that call the kernel without libc. A read is delayed also if the page cache has it.
 * Paths are compared as they are written, after the current folder; `..` is not resolved. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPENS, STATS, READS, SLEPT, COUNTERS };

static uint64_t unshared[COUNTERS];
static uint64_t *counters = unshared;
static const char *prefix;
static size_t prefix_length;
static long open_us, read_us;

static long microseconds(const char *name)
{
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("SLOW_STORAGE_COUNTS");
    open_us = microseconds("SLOW_STORAGE_OPEN_US");
    read_us = microseconds("SLOW_STORAGE_READ_US");
    if (file) {
        int fd = REAL(open)(file, O_RDWR | O_CLOEXEC);
        void *shared = MAP_FAILED;
        if (fd >= 0) {
            shared = mmap(NULL, sizeof unshared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            close(fd);
        }
        if (shared == MAP_FAILED) {
            fprintf(stderr, "slow_storage: cannot count in %s: %s\n", file, strerror(errno));
            abort();
        }
        counters = shared;
    }
    prefix = getenv("SLOW_STORAGE_PREFIX");
    prefix_length = prefix ? strlen(prefix) : 0;
}

static int is_below(const char *path)
{
    return strncmp(path, prefix, prefix_length) == 0 &&
           (path[prefix_length] == '/' || path[prefix_length] == '\0');
}

/* Whether the file behind a descriptor is below the prefix; sockets and pipes are not. */
static int is_slow_fd(int fd)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = '\0';
    return is_below(path);
}

static int is_slow(int folder, const char *path)
{
    if (!prefix_length || !path)
        return 0;
    if (path[0] == '/')
        return is_below(path);
    char whole[2 * PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX))
            return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0)
            return 0;
        whole[length] = '\0';
    }
    size_t length = strlen(whole);
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return is_below(whole);
}

/* Sleep, then count the call: whatever is counted has slept, also while others sleep. errno stays. */
static void delay(int counter, long us)
{
    int error = errno;
    if (us > 0) {
        struct timespec start, left = {us / 1000000, us % 1000000 * 1000}, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        while (nanosleep(&left, &left) != 0 && errno == EINTR)
            ;
        clock_gettime(CLOCK_MONOTONIC, &end);
        int64_t slept = (end.tv_sec - start.tv_sec) * 1000000000LL + end.tv_nsec - start.tv_nsec;
        __atomic_fetch_add(&counters[SLEPT], slept, __ATOMIC_SEQ_CST);
    }
    __atomic_fetch_add(&counters[counter], 1, __ATOMIC_SEQ_CST);
    errno = error;
}

static void slow_open(int folder, const char *path)
{
    if (is_slow(folder, path))
        delay(OPENS, open_us);
}

static void slow_stat(int folder, const char *path)
{
    if (path && path[0] == '\0') /* of the descriptor: AT_EMPTY_PATH */
        return;
    if (is_slow(folder, path))
        delay(STATS, open_us);
}

static ssize_t slow_read(int fd, ssize_t got)
{
    if (prefix_length && got > 0) {
        int error = errno;
        int slow = is_slow_fd(fd);
        errno = error;
        if (slow)
            delay(READS, read_us);
    }
    return got;
}

/* The real function, looked up once: NULL where this libc does not have it, and nobody calls it. */
#define NEXT(kind, name, types)                                \
    static kind(*next) types;                                  \
    if (!next)                                                 \
        next = (kind(*) types)dlsym(RTLD_NEXT, #name)

#define WRAP_OPEN(name)                                                     \
    int name(const char *path, int flags, ...)                              \
    {                                                                       \
        NEXT(int, name, (const char *, int, ...));                          \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        mode_t mode = __OPEN_NEEDS_MODE(flags) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                       \
        slow_open(AT_FDCWD, path);                                          \
        return next(path, flags, mode);                                     \
    }
WRAP_OPEN(open)
WRAP_OPEN(open64)

#define WRAP_OPENAT(name)                                                   \
    int name(int folder, const char *path, int flags, ...)                  \
    {                                                                       \
        NEXT(int, name, (int, const char *, int, ...));                     \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        mode_t mode = __OPEN_NEEDS_MODE(flags) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                       \
        slow_open(folder, path);                                            \
        return next(folder, path, flags, mode);                             \
    }
WRAP_OPENAT(openat)
WRAP_OPENAT(openat64)

/* What open becomes in programs compiled with _FORTIFY_SOURCE. */
#define WRAP_OPEN_2(name)                                                   \
    int name(const char *path, int flags)                                   \
    {                                                                       \
        NEXT(int, name, (const char *, int));                               \
        slow_open(AT_FDCWD, path);                                          \
        return next(path, flags);                                           \
    }
WRAP_OPEN_2(__open_2)
WRAP_OPEN_2(__open64_2)

#define WRAP_OPENAT_2(name)                                                 \
    int name(int folder, const char *path, int flags)                       \
    {                                                                       \
        NEXT(int, name, (int, const char *, int));                          \
        slow_open(folder, path);                                            \
        return next(folder, path, flags);                                   \
    }
WRAP_OPENAT_2(__openat_2)
WRAP_OPENAT_2(__openat64_2)

#define WRAP_FOPEN(name)                                                    \
    FILE *name(const char *path, const char *mode)                          \
    {                                                                       \
        NEXT(FILE *, name, (const char *, const char *));                   \
        slow_open(AT_FDCWD, path);                                          \
        return next(path, mode);                                            \
    }
WRAP_FOPEN(fopen)
WRAP_FOPEN(fopen64)

#define WRAP_STAT(name, kind)                                               \
    int name(const char *path, struct kind *out)                            \
    {                                                                       \
        NEXT(int, name, (const char *, struct kind *));                     \
        slow_stat(AT_FDCWD, path);                                          \
        return next(path, out);                                             \
    }
WRAP_STAT(stat, stat)
WRAP_STAT(lstat, stat)
WRAP_STAT(stat64, stat64)
WRAP_STAT(lstat64, stat64)

#define WRAP_STATAT(name, kind)                                             \
    int name(int folder, const char *path, struct kind *out, int flags)     \
    {                                                                       \
        NEXT(int, name, (int, const char *, struct kind *, int));           \
        slow_stat(folder, path);                                            \
        return next(folder, path, out, flags);                              \
    }
WRAP_STATAT(fstatat, stat)
WRAP_STATAT(fstatat64, stat64)

int statx(int folder, const char *path, int flags, unsigned mask, struct statx *out)
{
    NEXT(int, statx, (int, const char *, int, unsigned, struct statx *));
    slow_stat(folder, path);
    return next(folder, path, flags, mask, out);
}

/* What stat was called before glibc 2.33. */
#define WRAP_XSTAT(name, kind)                                              \
    int name(int version, const char *path, struct kind *out)               \
    {                                                                       \
        NEXT(int, name, (int, const char *, struct kind *));                \
        slow_stat(AT_FDCWD, path);                                          \
        return next(version, path, out);                                    \
    }
WRAP_XSTAT(__xstat, stat)
WRAP_XSTAT(__lxstat, stat)
WRAP_XSTAT(__xstat64, stat64)
WRAP_XSTAT(__lxstat64, stat64)

#define WRAP_XSTATAT(name, kind)                                                \
    int name(int version, int folder, const char *path, struct kind *out, int flags) \
    {                                                                           \
        NEXT(int, name, (int, int, const char *, struct kind *, int));          \
        slow_stat(folder, path);                                                \
        return next(version, folder, path, out, flags);                         \
    }
WRAP_XSTATAT(__fxstatat, stat)
WRAP_XSTATAT(__fxstatat64, stat64)

ssize_t read(int fd, void *buffer, size_t size)
{
    NEXT(ssize_t, read, (int, void *, size_t));
    return slow_read(fd, next(fd, buffer, size));
}

ssize_t readv(int fd, const struct iovec *buffers, int count)
{
    NEXT(ssize_t, readv, (int, const struct iovec *, int));
    return slow_read(fd, next(fd, buffers, count));
}

#define WRAP_PREAD(name, offset_type)                                       \
    ssize_t name(int fd, void *buffer, size_t size, offset_type offset)     \
    {                                                                       \
        NEXT(ssize_t, name, (int, void *, size_t, offset_type));            \
        return slow_read(fd, next(fd, buffer, size, offset));               \
    }
WRAP_PREAD(pread, off_t)
WRAP_PREAD(pread64, off64_t)

#define WRAP_PREADV(name, offset_type)                                           \
    ssize_t name(int fd, const struct iovec *buffers, int count, offset_type offset) \
    {                                                                            \
        NEXT(ssize_t, name, (int, const struct iovec *, int, offset_type));      \
        return slow_read(fd, next(fd, buffers, count, offset));                  \
    }
WRAP_PREADV(preadv, off_t)
WRAP_PREADV(preadv64, off64_t)

#define WRAP_PREADV2(name, offset_type)                                                       \
    ssize_t name(int fd, const struct iovec *buffers, int count, offset_type offset, int flags) \
    {                                                                                         \
        NEXT(ssize_t, name, (int, const struct iovec *, int, offset_type, int));              \
        return slow_read(fd, next(fd, buffers, count, offset, flags));                        \
    }
WRAP_PREADV2(preadv2, off_t)
WRAP_PREADV2(preadv64v2, off64_t)
