// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later
/*
 * The executable that the container runtime runs, under four names: spiderpool, coordinator,
 * ifacer, vlan.
 *
 * It decides nothing. It hands the call (CNI_* variables, standard input, the open network
 * namespace) to the agent over a Unix socket and prints the reply; PROTOCOL.md in this folder is
 * the contract. What it does own is the moment when there is no agent: a runtime must always read
 * well-formed JSON, and a deletion must never be lost. So ADD, CHECK and STATUS without a valid
 * reply become CNI errors, and DEL and GC are made durable in a queue directory that the agent
 * drains.
 *
 * All memory is static: the limits are the protocol's, and a small machine that is out of memory is
 * exactly when pods get deleted.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SPIDERPOOL_SOCKET
#define SPIDERPOOL_SOCKET "/var/run/spidernet/cni.sock"
#endif
#ifndef SPIDERPOOL_QUEUE
#define SPIDERPOOL_QUEUE "/var/lib/spidernet/queue"
#endif
#ifndef OVERALL_MS
#define OVERALL_MS 115000 /* the agent's own deadlines are shorter; runtimes give up at 120 s */
#endif
#define SIDECAR		".spiderpool.paths" /* beside the executable: line 1 socket, line 2 queue */
#define MAGIC		"SPD1"
#define HEADER_SIZE	12
#define MAX_ENV		(128u << 10)
#define MAX_STDIN	(1u << 20)
#define MAX_REPLY	(1u << 20)
#define MAX_ECHO	120  /* characters of foreign text in an error */
#define PATH_SIZE	4096 /* PATH_MAX */
#define REDIAL_MS	20
#define DEFAULT_VERSION "1.0.0" /* for errors, when the caller's is absent or unknown */

enum reply_status { DONE = 0, FAILED = 1, BUSY = 75, STOPPING = 76 };
enum cni_code {
	BAD_ENVIRONMENT = 4,
	IO_FAILURE = 5,
	BAD_STDIN = 6,
	TRY_LATER = 11,
	UNAVAILABLE = 50
};

static const char *const versions[] = {"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"};
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/*
 * `code` is the error when the agent gives no valid reply; 0: queue the call instead. Only ADD
 * waits for an agent that restarts: a failed ADD costs the pod kubelet's back-off, and nothing is
 * lost by a queued DEL.
 */
static const struct command {
	const char *name;
	int code;
	int dial_ms;
} commands[] = {
	{"ADD", TRY_LATER, 5000},
	{"CHECK", TRY_LATER, 0},
	{"STATUS", UNAVAILABLE, 0},
	{"DEL", 0, 0},
	{"GC", 0, 0},
};

extern char **environ;
static char header[HEADER_SIZE], env[MAX_ENV], input[MAX_STDIN + 1], reply[MAX_REPLY];
static size_t env_size, input_size, reply_size;
static char asked_version[16]; /* cniVersion of the configuration, if it looks like one */
static char socket_path[PATH_SIZE] = SPIDERPOOL_SOCKET, queue_path[PATH_SIZE] = SPIDERPOOL_QUEUE;
static int64_t overall_deadline;
static char reason[512]; /* why there is no valid reply */

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Pause, or wait for `events` on `fd` if that is not -1, until `deadline`; -1 with ETIMEDOUT after
 * it. */
static int wait_until(int fd, short events, int64_t deadline)
{
	struct pollfd p = {.fd = fd, .events = events};

	for (;;) {
		int64_t left = deadline - now_ms();
		int n = poll(&p, 1, left > 0 ? (int)left : 0);

		if (n > 0)
			return 0;
		if (n == 0 || errno != EINTR) {
			errno = n == 0 ? ETIMEDOUT : errno;
			return -1;
		}
	}
}

static int write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t n = write(fd, data, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN && !wait_until(fd, POLLOUT, overall_deadline))
			continue;
		if (n < 0)
			return -1;
		data += n;
		size -= (size_t)n;
	}
	return 0;
}

static const char *output_version(void)
{
	for (size_t i = 0; i < COUNT(versions); i++)
		if (!strcmp(asked_version, versions[i]))
			return versions[i];
	return DEFAULT_VERSION;
}

/* `text` as the inside of a JSON string. Bytes that may not be UTF-8 become escapes: always valid
 * JSON. */
static void escape(char *out, size_t size, const char *text)
{
	size_t used = 0;

	for (; *text && used + 7 < size; text++) {
		unsigned char c = (unsigned char)*text;

		if (c == '"' || c == '\\')
			used += (size_t)snprintf(out + used, size - used, "\\%c", c);
		else if (c < 0x20 || c >= 0x7f)
			used += (size_t)snprintf(out + used, size - used, "\\u%04x", c);
		else
			out[used++] = (char)c;
	}
	out[used] = 0;
}

/* Print a CNI error object and return the exit status. */
__attribute__((format(printf, 3, 4))) static int fail(int code, const char *msg, const char *format,
						      ...)
{
	static char details[1024], escaped[6 * sizeof(details) + 1], out[sizeof(escaped) + 256];
	va_list args;
	int n;

	va_start(args, format);
	vsnprintf(details, sizeof(details), format, args);
	va_end(args);
	escape(escaped, sizeof(escaped), details);
	n = snprintf(out, sizeof(out),
		     "{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}\n",
		     output_version(), code, msg, escaped);
	write_all(STDOUT_FILENO, out, (size_t)n);
	return FAILED;
}

/*
 * The top-level "cniVersion" of `input`. A real parser would refuse malformed input, and the agent
 * does that; here it must only not be fooled: by members of prevResult, by text inside strings, by
 * a text cut short. As decoders do, the last of several wins.
 */
static void find_version(void)
{
	static const char key[] = "\"cniVersion\"";
	const char *p = input, *const end = input + input_size;
	char before = 0; /* the last token's character */
	int depth = 0, ours = 0;

	for (; p < end; p++) {
		if (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')
			continue;
		if (!depth && *p != '{')
			return;
		if (*p == '"') {
			const char *start = p++;
			size_t size;

			while (p < end && *p != '"')
				p += *p == '\\' ? 2 : 1;
			if (p >= end)
				return;
			size = (size_t)(p - start) - 1;
			if (depth == 1 && before != ':') {
				ours = size == sizeof(key) - 3 &&
				       !memcmp(start, key, sizeof(key) - 1);
			} else if (depth == 1 && ours) {
				asked_version[0] = 0;
				if (size < sizeof(asked_version) &&
				    strspn(start + 1, "0123456789.") == size)
					memcpy(asked_version, start + 1, size),
						asked_version[size] = 0;
			}
			before = '"';
			continue;
		}
		if (*p == '{' || *p == '[')
			depth++;
		if ((*p == '}' || *p == ']') && !--depth)
			return;
		before = *p;
	}
}

/* Read standard input whole: 0, or an exit status after an error was printed. */
static int read_input(void)
{
	while (input_size <= MAX_STDIN) {
		ssize_t n;

		if (wait_until(STDIN_FILENO, POLLIN, overall_deadline))
			return fail(IO_FAILURE, "cannot read standard input", "%s",
				    strerror(errno));
		n = read(STDIN_FILENO, input + input_size, sizeof(input) - input_size);
		if (n == 0)
			break;
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			return fail(IO_FAILURE, "cannot read standard input", "%s",
				    strerror(errno));
		input_size += (size_t)n;
	}
	find_version();
	if (input_size > MAX_STDIN)
		return fail(BAD_STDIN, "standard input is too large", "the limit is %u bytes",
			    MAX_STDIN);
	return 0;
}

/* Append `prefix` and `text` as one string of the request's environment. -1: it does not fit. */
static int put_env(const char *prefix, const char *text)
{
	size_t a = strlen(prefix), b = strlen(text) + 1;

	if (a + b > MAX_ENV - env_size)
		return -1;
	memcpy(env + env_size, prefix, a);
	memcpy(env + env_size + a, text, b);
	env_size += a + b;
	return 0;
}

static const char *get_env(const char *name)
{
	size_t size = strlen(name);

	for (char **p = environ; *p; p++)
		if (!strncmp(*p, name, size) && (*p)[size] == '=')
			return *p + size + 1;
	return NULL;
}

/* Build the request's header and environment; -1: too large. */
static int pack_request(const char *plugin, const char *netns_error)
{
	uint32_t sizes[2];
	int bad = put_env("SPIDERPOOL_PLUGIN=", plugin);

	bad |= put_env("SPIDERPOOL_CNI_VERSION=", output_version());
	if (netns_error)
		bad |= put_env("SPIDERPOOL_NETNS_ERROR=", netns_error);
	for (char **p = environ; *p && !bad; p++)
		if (!strncmp(*p, "CNI_", 4))
			bad |= put_env("", *p);
	sizes[0] = htonl((uint32_t)env_size);
	sizes[1] = htonl((uint32_t)input_size);
	memcpy(header, MAGIC, 4);
	memcpy(header + 4, sizes, sizeof(sizes));
	return bad;
}

/* Settle the two paths at installation: an environment variable could send a root call to anybody's
 * socket. */
static int read_sidecar(void)
{
	static char path[PATH_SIZE + sizeof(SIDECAR)], text[2 * PATH_SIZE];
	ssize_t n = readlink("/proc/self/exe", path, PATH_SIZE - 1);
	char *slash, *line[2], *end;
	int fd;

	if (n <= 0)
		return 0;
	path[n] = 0;
	slash = strrchr(path, '/');
	memcpy(slash + 1, SIDECAR, sizeof(SIDECAR));
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 && errno == ENOENT)
		return 0;
	if (fd < 0)
		return fail(IO_FAILURE, "cannot read the installed paths", "%s: %s", path,
			    strerror(errno));
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	line[0] = text;
	end = strchr(line[0], '\n');
	line[1] = end ? end + 1 : text + strlen(text);
	line[0][strcspn(line[0], "\n")] = 0;
	line[1][strcspn(line[1], "\n")] = 0;
	if (*line[0] != '/' || *line[1] != '/' || strlen(line[0]) >= PATH_SIZE ||
	    strlen(line[1]) >= PATH_SIZE)
		return fail(IO_FAILURE, "the installed paths are malformed",
			    "%s: two lines with absolute paths are expected", path);
	strcpy(socket_path, line[0]);
	strcpy(queue_path, line[1]);
	return 0;
}

/* A connection to the agent, tried until `deadline`; -1 with `reason` set. Never blocks on a full
 * backlog. */
static int dial(int64_t deadline)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd, error;

	if (strlen(socket_path) >= sizeof(address.sun_path)) {
		snprintf(reason, sizeof(reason), "the socket's path is too long: %.200s",
			 socket_path);
		return -1;
	}
	strcpy(address.sun_path, socket_path);
	for (;;) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd >= 0 && !connect(fd, (struct sockaddr *)&address, sizeof(address)))
			return fd;
		error = errno;
		if (fd >= 0)
			close(fd);
		if ((error != ENOENT && error != ECONNREFUSED && error != EAGAIN &&
		     error != EINTR) ||
		    now_ms() + REDIAL_MS > deadline)
			break;
		wait_until(-1, 0, now_ms() + REDIAL_MS);
	}
	snprintf(reason, sizeof(reason), "%.200s: %s", socket_path, strerror(error));
	return -1;
}

/* Send the whole request, the namespace with its first byte. */
static int send_request(int fd, int netns)
{
	struct iovec parts[] = {{header, HEADER_SIZE}, {env, env_size}, {input, input_size}};
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {{0}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = COUNT(parts)};

	if (netns >= 0) {
		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
		struct cmsghdr *c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &netns, sizeof(int));
	}
	while (message.msg_iovlen) {
		ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN && !wait_until(fd, POLLOUT, overall_deadline))
			continue;
		if (n < 0)
			return -1;
		message.msg_control = NULL;
		message.msg_controllen = 0;
		for (; message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len;
		     message.msg_iovlen--)
			n -= (ssize_t)message.msg_iov++->iov_len;
		if (message.msg_iovlen) {
			message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + n;
			message.msg_iov->iov_len -= (size_t)n;
		}
	}
	return 0;
}

static int receive(int fd, char *data, size_t size)
{
	while (size) {
		ssize_t n = recv(fd, data, size, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN && !wait_until(fd, POLLIN, overall_deadline))
			continue;
		if (n <= 0) {
			errno = n == 0 ? ECONNRESET : errno;
			return -1;
		}
		data += n;
		size -= (size_t)n;
	}
	return 0;
}

/* One request, one reply: its status, or -1 with `reason` set. */
static int exchange(int netns, int64_t dial_deadline)
{
	char head[HEADER_SIZE];
	uint32_t status, size;
	int fd = dial(dial_deadline), result = -1;

	if (fd < 0)
		return -1;
	/* An agent that is busy or stopping answers without reading: a failed send may still have a
	 * reply. */
	send_request(fd, netns);
	if (receive(fd, head, sizeof(head))) {
		snprintf(reason, sizeof(reason), "the agent did not answer: %s", strerror(errno));
		goto out;
	}
	memcpy(&status, head + 4, 4);
	memcpy(&size, head + 8, 4);
	status = ntohl(status);
	size = ntohl(size);
	if (memcmp(head, MAGIC, 4) || size > MAX_REPLY ||
	    (status != DONE && status != FAILED && status != BUSY && status != STOPPING)) {
		snprintf(reason, sizeof(reason), "the agent's reply is malformed");
	} else if (receive(fd, reply, size)) {
		snprintf(reason, sizeof(reason), "the agent's reply is cut short: %s",
			 strerror(errno));
	} else {
		reply_size = size;
		result = (int)status;
		if (status == BUSY || status == STOPPING)
			snprintf(reason, sizeof(reason), "the agent did not take the call: %.*s",
				 (int)(size < 200 ? size : 200), reply);
	}
out:
	close(fd);
	return result;
}

/* The queue directory, created with its parents if it is missing; -1 with errno. */
static int open_queue(void)
{
	int fd = open(queue_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd >= 0 || errno != ENOENT)
		return fd;
	for (char *slash = queue_path + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = 0;
		mkdir(queue_path, 0755); /* what matters is whether the last one can be opened */
		*slash = '/';
	}
	mkdir(queue_path, 0700);
	fd = open(queue_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0 && syncfs(fd)) { /* the new directories' own entries, whichever they are */
		close(fd);
		return -1;
	}
	return fd;
}

/*
 * Put the request into the queue: it is there whole, after a power failure too, or -1 with errno is
 * returned. The wall clock orders the names because the order must hold across reboots.
 */
static int enqueue(void)
{
	char name[64], temporary[72];
	int dir = open_queue(), fd = -1, error;

	if (dir < 0)
		return -1;
	for (int i = 0; i < 3 && fd < 0;
	     i++) { /* the same pid at the same time: another pid namespace */
		struct timespec t;

		clock_gettime(CLOCK_REALTIME, &t);
		snprintf(name, sizeof(name), "%011lld%09ld-%010ld.call", (long long)t.tv_sec,
			 t.tv_nsec, (long)getpid());
		snprintf(temporary, sizeof(temporary), "%s.tmp", name);
		fd = openat(dir, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0 && errno != EEXIST)
			break;
	}
	if (fd < 0) {
		error = errno;
	} else if (write_all(fd, header, HEADER_SIZE) || write_all(fd, env, env_size) ||
		   write_all(fd, input, input_size) || fsync(fd) ||
		   renameat(dir, temporary, dir, name)) {
		error = errno;
		unlinkat(dir, temporary, 0);
	} else {
		error = fsync(dir) ? errno : 0;
	}
	if (fd >= 0)
		close(fd);
	close(dir);
	errno = error;
	return error ? -1 : 0;
}

/* A closed standard descriptor would be taken by the next open(), and the error text sent there. */
static void fill_standard_descriptors(void)
{
	int fd;

	do
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

static int print_versions(void)
{
	char out[256];
	int n = snprintf(out, sizeof(out), "{\"cniVersion\":\"%s\",\"supportedVersions\":[",
			 *asked_version ? asked_version : DEFAULT_VERSION);

	for (size_t i = 0; i < COUNT(versions); i++)
		n += snprintf(out + n, sizeof(out) - (size_t)n, "%s\"%s\"", i ? "," : "",
			      versions[i]);
	n += snprintf(out + n, sizeof(out) - (size_t)n, "]}\n");
	return write_all(STDOUT_FILENO, out, (size_t)n) ? FAILED : DONE;
}

/* Have the call carried out, or do what its command asks for without an agent. Returns the exit
 * status. */
static int forward(const struct command *command, const char *plugin)
{
	const char *path = get_env("CNI_NETNS"), *netns_error = NULL;
	int64_t dial_deadline = now_ms() + command->dial_ms;
	int netns = -1, status;

	/* O_NONBLOCK: the path may name a FIFO, and opening that would wait for a writer. */
	if (path && *path) {
		netns = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		netns_error = netns < 0 ? strerror(errno) : NULL;
	}
	if (pack_request(plugin, netns_error))
		return fail(BAD_ENVIRONMENT, "the environment is too large",
			    "the limit for all CNI_* variables is %u bytes", MAX_ENV);
	/* A call that a stopping agent refused was not executed: its successor may do it. */
	while ((status = exchange(netns, dial_deadline)) == STOPPING && now_ms() < dial_deadline)
		wait_until(-1, 0, now_ms() + REDIAL_MS);
	if (status == DONE || status == FAILED)
		return write_all(STDOUT_FILENO, reply, reply_size) ? FAILED : status;
	if (command->code)
		return fail(command->code, "the Spiderpool agent is not available", "%s", reason);
	if (enqueue())
		return fail(IO_FAILURE, "the call can neither be executed nor queued",
			    "%s; %.200s: %s", reason, queue_path, strerror(errno));
	return DONE;
}

int main(int argc, char **argv)
{
	const char *name = get_env("CNI_COMMAND"), *slash = argc ? strrchr(argv[0], '/') : NULL;
	const char *plugin = slash ? slash + 1 : argc ? argv[0] : "";
	char echo[MAX_ECHO];
	int error;

	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a full quota is an error to report, as a full disk is */
	fill_standard_descriptors();
	overall_deadline = now_ms() + OVERALL_MS;
	if ((name || !isatty(STDIN_FILENO)) && (error = read_input()))
		return error;
	if (!name || !*name)
		return fail(BAD_ENVIRONMENT, "CNI_COMMAND is missing",
			    "this is a CNI plugin, executed by a container runtime");
	if (!strcmp(name, "VERSION"))
		return print_versions();
	for (size_t i = 0; i < COUNT(commands); i++)
		if (!strcmp(name, commands[i].name))
			return (error = read_sidecar()) ? error : forward(&commands[i], plugin);
	snprintf(echo, sizeof(echo), "%s", name);
	return fail(BAD_ENVIRONMENT, "CNI_COMMAND is invalid",
		    "'%s' is not one of ADD, DEL, CHECK, STATUS, GC, VERSION", echo);
}
