/* Preloaded: lets the n-th writing call below a folder fail, whoever makes it (Python, Rust). What opens by C's stdio is not seen.
   Counted are open for writing, write, fsync, rename, mkdir and ftruncate. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long at, count, hit;
static int error, full;
static char watched[65536];

/* nth: the call that fails, from 1 on, 0 for none; for_ever: all later calls that need space fail as well. */
void fault_arm(const char *prefix, long nth, int number, int for_ever) {
  strncpy(folder, prefix, sizeof folder - 1);
  at = nth, error = number, full = for_ever, count = hit = 0;
  memset(watched, 0, sizeof watched);
}
/* There is space again. */
void fault_end(void) { at = full = 0; }
long fault_count(void) { return count; }
long fault_hit(void) { return hit; }

static int below(const char *path) {
  if (!folder[0] || !path) return 0;
  return path[0] != '/' || strncmp(path, folder, strlen(folder)) == 0;
}
static int fails(int needs_space) {
  ++count;
  if (at && (count == at || (full && needs_space && count > at))) {
    ++hit;
    errno = error;
    return 1;
  }
  return 0;
}
static int opened(int fd, int writing) {
  if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = (char)writing;
  return fd;
}
static int is_watched(int fd) { return fd >= 0 && fd < (int)sizeof watched && watched[fd]; }

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list list; \
    va_start(list, flags); \
    mode = va_arg(list, mode_t); \
    va_end(list); \
  } \
  const int writing = (flags & O_ACCMODE) != O_RDONLY && below(path)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, name, const char *, int, ...); \
    MODE; \
    if (writing && fails(flags & O_CREAT)) return -1; \
    return opened(real(path, flags, mode), writing); \
  }
#define OPENAT(name) \
  int name(int at_fd, const char *path, int flags, ...) { \
    REAL(int, name, int, const char *, int, ...); \
    MODE; \
    if (writing && fails(flags & O_CREAT)) return -1; \
    return opened(real(at_fd, path, flags, mode), writing); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
  REAL(int, close, int);
  if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = 0;
  return real(fd);
}
ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  if (is_watched(fd) && fails(1)) return -1;
  return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  if (is_watched(fd) && fails(1)) return -1;
  return real(fd, parts, n);
}
int fsync(int fd) {
  REAL(int, fsync, int);
  if (is_watched(fd) && fails(1)) return -1;
  return real(fd);
}
int ftruncate64(int fd, off64_t size) {
  REAL(int, ftruncate64, int, off64_t);
  if (is_watched(fd) && fails(1)) return -1;
  return real(fd, size);
}
int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  if (below(to) && fails(0)) return -1;
  return real(from, to);
}
int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  if (below(path) && fails(1)) return -1;
  return real(path, mode);
}
