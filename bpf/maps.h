/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The maps and what is in them. agent/dataplane/pack.py encodes the same layouts; changing one
 * means changing both.
 *
 * One set of maps serves both families. Two sets would save 7 ns of the 43 that a lookup takes
 * among 10,000 services, where a connect takes tens of microseconds, and would double maps,
 * programs and the ways in which they can disagree.
 */
#ifndef SPIDERPOOL_MAPS_H
#define SPIDERPOOL_MAPS_H

#include "consts.h"

/* One end of a connection. All members in network byte order but `tag`. */
struct address {
	__be32 ip[4];
	__be16 port;
	__u16 tag; /* of a frontend: the IP protocol; of a flow: FLOW_TO_*; of a backend: 0 */
};

/*
 * `id` names a service's slots and members. It is not used again while the agent lives, so a
 * program that holds an old one finds nothing rather than another service's backends.
 */
struct service {
	__u32 id;
	__u32 count; /* backends, in slots 0 to count - 1 */
};

struct slot {
	__u32 service;
	__u32 index;
};

/* That a backend belongs to a service: what a remembered UDP conversation is checked against. */
struct member {
	__u32 service;
	struct address backend;
};

/* `cookie` is the kernel's number for a socket, never used twice. */
struct flow {
	__u64 cookie;
	struct address end;
	__u32 pad;
};

/* What one socket must remember to show its user the service, as long as the socket lives. */
struct peer {
	struct address frontend;
	struct address backend;
	__u16 holds; /* PEER_*: which conversation frontend and backend are of */
	__u16 flows; /* the socket has entries in the map `flows` */
};

_Static_assert(sizeof(struct address) == 20, "agent/dataplane/pack.py: ADDRESS");
_Static_assert(sizeof(struct service) == 8, "agent/dataplane/pack.py: SERVICE");
_Static_assert(sizeof(struct slot) == 8, "agent/dataplane/pack.py: SLOT");
_Static_assert(sizeof(struct member) == 24, "agent/dataplane/pack.py: MEMBER");
_Static_assert(sizeof(struct flow) == 32, "agent/dataplane/pack.py: FLOW");
_Static_assert(sizeof(struct peer) == 44, "agent/dataplane/pack.py: PEER");

/* BCC takes a pinned map's path as part of its type. Without PINS (lint) nothing is pinned. */
#ifdef PINS
#define MAP(type, name) type ":" PINS "/" name
#else
#define MAP(type, name) type
#endif

/* Written by the agent; entries take memory when they exist (BPF_F_NO_PREALLOC). */
BPF_F_TABLE(MAP("hash", "services"), struct address, struct service, services, MAX_SERVICES,
	    BPF_F_NO_PREALLOC);
BPF_F_TABLE(MAP("hash", "slots"), struct slot, struct address, slots, MAX_BACKENDS,
	    BPF_F_NO_PREALLOC);
BPF_F_TABLE(MAP("hash", "members"), struct member, __u8, members, MAX_BACKENDS, BPF_F_NO_PREALLOC);

/* Written by the programs. `peers` dies with the socket; `flows` cannot: a socket has one for each
 * further conversation. */
BPF_F_TABLE(MAP("lru_hash", "flows"), struct flow, struct address, flows, MAX_FLOWS, 0);
BPF_F_TABLE(MAP("sk_storage", "peers"), int, struct peer, peers, 0, BPF_F_NO_PREALLOC);

/* Counters, one per CPU: how often a service's backend was chosen (key: struct service.id), and
 * what went wrong. */
BPF_F_TABLE(MAP("percpu_hash", "chosen"), __u32, __u64, chosen, MAX_SERVICES, BPF_F_NO_PREALLOC);
BPF_F_TABLE(MAP("percpu_array", "errors"), int, __u64, errors, ERRORS, 0);

#endif
