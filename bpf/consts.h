/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Every number the programs use. Those in #ifndef are set by the loader (-D) from the agent's
 * settings. */
#ifndef SPIDERPOOL_CONSTS_H
#define SPIDERPOOL_CONSTS_H

/* Frontends: one per address, port and protocol of a service. */
#ifndef MAX_SERVICES
#define MAX_SERVICES 65536
#endif

/* Backends, counted once per frontend that they serve. */
#ifndef MAX_BACKENDS
#define MAX_BACKENDS 262144
#endif

/* Remembered directions of UDP conversations beyond a socket's last: two per socket and frontend;
 * the least recently used goes. */
#ifndef MAX_FLOWS
#define MAX_FLOWS 131072
#endif

/* linux/socket.h is not a UAPI header; the cgroup's socket hooks need one number of errno.h. */
#define ECONNREFUSED 111

/* What a hook of connect or sendmsg tells the kernel: go on, or fail the system call. Other hooks
 * may only go on. */
#define HOOK_REFUSE  0
#define HOOK_PROCEED 1

/*
 * How often the programs look again when a service shrank between the look at its size and the look
 * at the slot. The agent writes the new size before it removes a slot, so the second look can only
 * fail if it happened again.
 */
#define CHOOSE_ATTEMPTS 3

/* An IPv4 address is kept as its IPv4-mapped IPv6 address, ::ffff:a.b.c.d (RFC 4291
 * section 2.5.5.2). */
#define MAPPED_PREFIX bpf_htonl(0x0000ffff)

/* `holds` of a peer: the last connect, or the datagram that an unconnected socket sent last. */
#define PEER_NOTHING   0
#define PEER_CONNECTED 1
#define PEER_SENT      2

/* `tag` of a flow's key: which of the two ends the key names, and so which one the value is. */
#define FLOW_TO_BACKEND	 1
#define FLOW_TO_FRONTEND 2

/* Index into the map `errors`; agent/dataplane/pack.py has the same list. */
enum error {
	/* connect or sendmsg to a service without endpoints: refused */
	ERROR_NO_BACKEND,
	/* a slot that the service's size promises was not there: refused */
	ERROR_SLOT_MISSING,
	/* no memory for a socket's record: it gets through, and is told the backend's address */
	ERROR_PEER_UNRECORDED,
	/* no room for a further UDP conversation: the datagram goes, its answer may come from the
	   backend's address */
	ERROR_FLOW_UNRECORDED,
	ERRORS,
};

#endif
