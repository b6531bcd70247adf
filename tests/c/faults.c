/*
 * A disk that fails on command, for LD_PRELOAD: what is done to files below one directory is counted, and at a given
 * count something goes wrong.
 *
 *   FAULT_DIRECTORY  the directory, as /proc shows it
 *   FAULT_KIND       kill   the process dies before the operation
 *                    tear   of a write, only the beginning is done; then the process dies
 *                    power  what was not synced is lost, sector by sector, some of it and some not; then the process dies
 *                    eio    this one operation fails with EIO
 *                    full   from here on nothing grows: ENOSPC
 *   FAULT_AT         the count, from 1
 *   FAULT_SEED       for what is left to chance
 *   FAULT_ARM        a file: counting begins once it is there; without, at the start
 *
 * A rename that was not synced is not undone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512

enum kind { NONE, KILL, TEAR, POWER, EIO_ONCE, FULL };

/* What a write replaced, as long as the file was not synced. */
struct undo {
	struct undo *before;
	ino_t inode;
	int fd;
	off_t at, old_size;
	size_t length, kept;
	unsigned char *old;
};

static enum kind kind;
static unsigned long at, count;
static uint64_t chance;
static char directory[PATH_MAX];
static struct undo *undos;
static const char *arm;
/* One operation at a time. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_ftruncate)(int, off_t);
static int (*real_rename)(const char *, const char *);
static int (*real_linkat)(int, const char *, int, const char *, int);
static int (*real_unlink)(const char *);

__attribute__((constructor)) static void begin(void)
{
	const char *kinds[] = { "", "kill", "tear", "power", "eio", "full" };
	const char *wanted = getenv("FAULT_KIND"), *where = getenv("FAULT_DIRECTORY");
	*(void **)&real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
	*(void **)&real_write = dlsym(RTLD_NEXT, "write");
	*(void **)&real_fsync = dlsym(RTLD_NEXT, "fsync");
	*(void **)&real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
	*(void **)&real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
	*(void **)&real_rename = dlsym(RTLD_NEXT, "rename");
	*(void **)&real_linkat = dlsym(RTLD_NEXT, "linkat");
	*(void **)&real_unlink = dlsym(RTLD_NEXT, "unlink");
	for (int k = 1; wanted && where && k <= FULL; k++)
		if (!strcmp(wanted, kinds[k]))
			kind = k;
	if (kind == NONE)
		return;
	snprintf(directory, sizeof directory, "%s/", where);
	at = strtoul(getenv("FAULT_AT"), NULL, 10);
	chance = strtoull(getenv("FAULT_SEED"), NULL, 10) | 1;
	arm = getenv("FAULT_ARM");
}

static uint64_t below(uint64_t n)
{
	chance ^= chance << 13;
	chance ^= chance >> 7;
	chance ^= chance << 17;
	return chance % n;
}

static int is_ours(int fd, struct stat *found)
{
	char link[64], path[PATH_MAX];
	if (kind == NONE || fstat(fd, found) || !S_ISREG(found->st_mode))
		return 0;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t length = readlink(link, path, sizeof path - 1);
	return length > 0 && (path[length] = 0, !strncmp(path, directory, strlen(directory)));
}

static void die(void)
{
	kill(getpid(), SIGKILL);
	for (;;)
		pause();
}

/* What was not synced reached the disk in part: each sector as it is or as it was. */
static void lose(void)
{
	for (struct undo *undo = undos; undo; undo = undo->before) {
		uint64_t how = below(4);
		for (size_t from = 0; how && from < undo->kept; from += SECTOR) {
			size_t length = undo->kept - from < SECTOR ? undo->kept - from : SECTOR;
			if (how == 1 || below(2))
				real_pwrite(undo->fd, undo->old + from, length, undo->at + (off_t)from);
		}
		/* The file had not grown yet. */
		if (how == 1 && undo->old_size < undo->at + (off_t)undo->length)
			real_ftruncate(undo->fd, undo->old_size);
	}
}

/* Counts. Says whether this operation fails, with errno set. */
static int fails(int grows)
{
	if (arm && access(arm, F_OK))
		return 0;
	arm = NULL;
	count++;
	if (kind == FULL && count >= at && grows)
		return errno = ENOSPC, 1;
	if (count != at)
		return 0;
	if (kind == POWER)
		lose();
	if (kind == KILL || kind == POWER)
		die();
	if (kind == EIO_ONCE)
		return errno = EIO, 1;
	return 0;
}

/* Whether what is done to a name fails. */
static int fails_by_name(const char *path, int grows)
{
	if (kind == NONE || strncmp(path, directory, strlen(directory)))
		return 0;
	pthread_mutex_lock(&turn);
	int failed = fails(grows);
	pthread_mutex_unlock(&turn);
	return failed;
}

static void remember(int fd, const struct stat *found, size_t length, off_t offset)
{
	struct undo *undo = malloc(sizeof *undo);
	undo->before = undos;
	undo->inode = found->st_ino;
	undo->fd = dup(fd);
	undo->at = offset;
	undo->old_size = found->st_size;
	undo->length = length;
	undo->old = malloc(length ? length : 1);
	ssize_t kept = pread(fd, undo->old, length, offset);
	undo->kept = kept > 0 ? (size_t)kept : 0;
	undos = undo;
}

static void forget(ino_t inode)
{
	for (struct undo **link = &undos; *link;) {
		struct undo *undo = *link;
		if (undo->inode != inode) {
			link = &undo->before;
			continue;
		}
		*link = undo->before;
		close(undo->fd);
		free(undo->old);
		free(undo);
	}
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off_t offset)
{
	struct stat found;
	if (!is_ours(fd, &found))
		return real_pwrite(fd, bytes, length, offset);
	pthread_mutex_lock(&turn);
	if (kind == POWER)
		remember(fd, &found, length, offset);
	ssize_t written = -1;
	if (!fails(offset + (off_t)length > found.st_size)) {
		if (kind == TEAR && count == at) {
			real_pwrite(fd, bytes, below(length + 1), offset);
			die();
		}
		written = real_pwrite(fd, bytes, length, offset);
	}
	pthread_mutex_unlock(&turn);
	return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
	return pwrite64(fd, bytes, length, offset);
}

ssize_t write(int fd, const void *bytes, size_t length)
{
	struct stat found;
	if (!is_ours(fd, &found))
		return real_write(fd, bytes, length);
	pthread_mutex_lock(&turn);
	ssize_t written = fails(1) ? -1 : real_write(fd, bytes, length);
	pthread_mutex_unlock(&turn);
	return written;
}

static int sync_with(int (*real)(int), int fd)
{
	struct stat found;
	if (!is_ours(fd, &found))
		return real(fd);
	pthread_mutex_lock(&turn);
	int done = fails(0) ? -1 : real(fd);
	if (!done)
		forget(found.st_ino);
	pthread_mutex_unlock(&turn);
	return done;
}

int fsync(int fd)
{
	return sync_with(real_fsync, fd);
}

int fdatasync(int fd)
{
	return sync_with(real_fdatasync, fd);
}

int ftruncate64(int fd, off_t length)
{
	struct stat found;
	if (!is_ours(fd, &found))
		return real_ftruncate(fd, length);
	pthread_mutex_lock(&turn);
	if (kind == POWER && length < found.st_size)
		remember(fd, &found, (size_t)(found.st_size - length), length);
	int done = fails(length > found.st_size) ? -1 : real_ftruncate(fd, length);
	pthread_mutex_unlock(&turn);
	return done;
}

int ftruncate(int fd, off_t length)
{
	return ftruncate64(fd, length);
}

int rename(const char *from, const char *to)
{
	return fails_by_name(to, 0) ? -1 : real_rename(from, to);
}

int linkat(int from_in, const char *from, int to_in, const char *to, int flags)
{
	return fails_by_name(to, 1) ? -1 : real_linkat(from_in, from, to_in, to, flags);
}

int unlink(const char *path)
{
	return fails_by_name(path, 0) ? -1 : real_unlink(path);
}
