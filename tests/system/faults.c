/* Faults inside a process under test, by LD_PRELOAD. The folder $FAULTS steers them, at any time:

     order   "fail N ERRNO"  the N-th sync since this order was given fails; N = 0: every one
             "hold N"        the N-th sync waits until there is another order, and makes the file "held" meanwhile
     clock   seconds to add to the wall clock
     syncs   gets a line for each sync: its path

   Only syncs of files and directories below $FAULTS_BELOW count. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ino_t order_inode;
static long counted;

/* The content of a file of $FAULTS as text; its inode, which is another one for each order. 0: there is none. */
static ino_t look(const char *name, char *text, size_t size) {
    char path[4096];
    struct stat info;
    const char *folder = getenv("FAULTS");
    text[0] = 0;
    if (!folder) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, size - 1);
    text[length < 0 ? 0 : length] = 0;
    if (fstat(fd, &info) != 0) info.st_ino = 0;
    close(fd);
    return info.st_ino;
}

static void note(const char *name, const char *line) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", getenv("FAULTS"), name);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return;
    dprintf(fd, "%s\n", line);
    close(fd);
}

/* 0, or the error that this sync is to end with. */
static int fault_of_sync(int fd) {
    char link[64], path[4096], order[128], again[128], below[4096];
    const char *prefix = getenv("FAULTS_BELOW");
    long wanted = -1;
    int code = 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!prefix || !getenv("FAULTS") || length < 0) return 0;
    path[length] = 0;
    snprintf(below, sizeof below, "%s/", prefix);
    if (strncmp(path, below, strlen(below)) != 0) return 0;
    pthread_mutex_lock(&lock);
    note("syncs", path);
    ino_t inode = look("order", order, sizeof order);
    if (inode != order_inode) {
        order_inode = inode;
        counted = 0;
    }
    counted++;
    if (sscanf(order, "fail %ld %d", &wanted, &code) == 2) {
        if (wanted != 0 && wanted != counted) code = 0;
    } else if (sscanf(order, "hold %ld", &wanted) == 1 && wanted == counted) {
        note("held", path);
        while (look("order", again, sizeof again) == inode) usleep(1000);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

#define SYNC(name)                                                           \
    int name(int fd) {                                                       \
        int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, #name);            \
        int code = fault_of_sync(fd);                                        \
        if (code) {                                                          \
            errno = code;                                                    \
            return -1;                                                       \
        }                                                                    \
        return next(fd);                                                     \
    }

SYNC(fsync)
SYNC(fdatasync)

static long offset_s(void) {
    char text[64];
    look("clock", text, sizeof text);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*next)(clockid_t, struct timespec *) = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = next(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset_s();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int (*next)(struct timeval *, void *) = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int result = next(now, zone);
    if (result == 0) now->tv_sec += offset_s();
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
