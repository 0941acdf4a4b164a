/* To be preloaded: counts the calls that change anything in a folder and, at a chosen one, kills the process before,
   during or after it, lets it fail, or sets the clock. cc -shared -fPIC -o faults.so faults.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, BEFORE, HALFWAY, AFTER, ONCE, FROM_THEN_ON, CLOCK };

static char folder[PATH_MAX];
static long calls, chosen;
static int how, number;

/* Start counting; at call `at` of those in the folder do `what`: failures with the error number `with`; CLOCK sets the
   time of day `with` seconds ahead, as an operator or NTP may. */
void faults_arm(const char *where, long at, int what, int with) {
    snprintf(folder, sizeof folder, "%s", where);
    calls = 0, chosen = at, how = what, number = with;
}

long faults_calls(void) { return calls; }

static int is_inside(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int is_inside_at(int directory, const char *path) {
    char link[64], whole[2 * PATH_MAX];
    if (*path == '/' || directory == AT_FDCWD) return is_inside(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, PATH_MAX);
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "%s%s", *path ? "/" : "", path);
    return is_inside(whole);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

/* What is to happen at this call. */
static int due(int inside) {
    if (!inside || how == NOTHING) return NOTHING;
    calls++;
    if (calls == chosen && how == BEFORE) die();
    if (how == CLOCK) return NOTHING;
    if (calls == chosen || (how == FROM_THEN_ON && calls > chosen)) return how;
    return NOTHING;
}

static int ahead(void) { return how == CLOCK && calls >= chosen ? number : 0; }

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define CALL(inside, grows, ...)                                                   \
    int fault = due(inside);                                                       \
    if (fault == ONCE || (fault == FROM_THEN_ON && (grows))) {                     \
        errno = number;                                                            \
        return -1;                                                                 \
    }                                                                              \
    __typeof__(real(__VA_ARGS__)) result = real(__VA_ARGS__);                      \
    if (fault == AFTER || fault == HALFWAY) die();                                 \
    return result

int rename(const char *from, const char *to) {
    REAL(rename);
    CALL(is_inside(from) || is_inside(to), 0, from, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    CALL(is_inside(path), 1, path, mode);
}
int rmdir(const char *path) {
    REAL(rmdir);
    CALL(is_inside(path), 0, path);
}
int unlink(const char *path) {
    REAL(unlink);
    CALL(is_inside(path), 0, path);
}
int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    CALL(is_inside_at(directory, path), 0, directory, path, flags);
}
int chmod(const char *path, mode_t mode) {
    REAL(chmod);
    CALL(is_inside(path), 0, path, mode);
}
int fsync(int file) {
    REAL(fsync);
    CALL(is_inside_at(file, ""), 1, file);
}
int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    CALL(is_inside_at(file, ""), 0, file, size);
}
ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    int inside = file > 2 && is_inside_at(file, "");
    if (inside && how == HALFWAY && calls + 1 == chosen) {
        real(file, data, size / 2);
        die();
    }
    CALL(inside, 1, file, data, size);
}

#define OPEN(name, signature, inside, ...)                                         \
    int name signature {                                                           \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                              \
        REAL(name);                                                                \
        CALL((flags & (O_WRONLY | O_RDWR | O_CREAT)) && (inside), 1, __VA_ARGS__, mode); \
    }
OPEN(open, (const char *path, int flags, ...), is_inside(path), path, flags)
OPEN(open64, (const char *path, int flags, ...), is_inside(path), path, flags)
OPEN(openat, (int directory, const char *path, int flags, ...), is_inside_at(directory, path), directory, path, flags)
OPEN(openat64, (int directory, const char *path, int flags, ...), is_inside_at(directory, path), directory, path, flags)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += ahead();
    return result;
}
time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
