/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the hooks have in common: which backend, and how a socket remembers it. Nothing here knows a
 * family. */
#ifndef SPIDERPOOL_HELPERS_H
#define SPIDERPOOL_HELPERS_H

#include "maps.h"

/* BCC declares this helper with a 32-bit result; two sockets would share a number after four
 * billion others. */
static __u64 (*socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

enum verdict { NO_SERVICE, TRANSLATE, REFUSE };

static __always_inline void count_error(int which)
{
	__u64 *value = errors.lookup(&which);

	if (value)
		*value += 1;
}

/* The entry is made at the first use: most services of a cluster are never used on one node. */
static __always_inline void count_choice(__u32 id)
{
	__u64 first = 1;
	__u64 *value = chosen.lookup(&id);

	if (value)
		*value += 1;
	else
		chosen.update(&id, &first);
}

static __always_inline int same(const struct address *one, const struct address *other)
{
	return one->ip[3] == other->ip[3] && one->port == other->port &&
	       one->ip[2] == other->ip[2] && one->ip[1] == other->ip[1] &&
	       one->ip[0] == other->ip[0];
}

/*
 * A random backend of the service at `frontend`.
 *
 * Size and slot are two looks, and the agent may write in between. What was found is always a
 * backend that the service had a moment ago or has now: slots are overwritten in place, and removed
 * only after the size says so.
 */
static __always_inline enum verdict choose(struct address *frontend, struct address *backend)
{
#pragma unroll
	for (int attempt = 0; attempt < CHOOSE_ATTEMPTS; attempt++) {
		struct service *service = services.lookup(frontend);
		struct slot slot = {};
		struct address *found;
		__u32 count;

		if (!service)
			return NO_SERVICE;
		count = service->count;
		if (!count) {
			count_error(ERROR_NO_BACKEND);
			return REFUSE;
		}
		slot.service = service->id;
		/* The high half of random * count is below count, without a division. */
		slot.index = ((__u64)bpf_get_prandom_u32() * count) >> 32;
		found = slots.lookup(&slot);
		if (found) {
			*backend = *found;
			count_choice(slot.service);
			return TRANSLATE;
		}
	}
	count_error(ERROR_SLOT_MISSING);
	return REFUSE;
}

/*
 * connect(): the whole translation. The kernel connects to the backend, so nothing remains to be
 * done per packet; the socket remembers both ends for getpeername and for the source address of
 * what a connected UDP socket receives.
 */
static __always_inline enum verdict
forward_connect(struct bpf_sock_addr *ctx, struct address *frontend, struct address *backend)
{
	enum verdict verdict = choose(frontend, backend);
	struct peer *peer;

	if (verdict == REFUSE)
		return verdict;
	if (verdict == NO_SERVICE) {
		/* The same socket may have used a service before. */
		peer = peers.sk_storage_get(ctx->sk, 0, 0);
		if (peer)
			peer->holds = PEER_NOTHING;
		return verdict;
	}
	peer = peers.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!peer) {
		count_error(ERROR_PEER_UNRECORDED);
		return verdict;
	}
	peer->frontend = *frontend;
	peer->backend = *backend;
	peer->holds = PEER_CONNECTED;
	return verdict;
}

static __always_inline int is_member(__u32 service, const struct address *backend)
{
	struct member member = {.service = service, .backend = *backend};

	return members.lookup(&member) != 0;
}

/* Put a conversation of a socket that has several into the map `flows`, both ways. */
static __always_inline void record_flow(struct bpf_sock_addr *ctx, struct peer *peer,
					const struct address *frontend,
					const struct address *backend)
{
	struct flow flow = {.cookie = socket_cookie(ctx), .end = *frontend};
	struct address value = *backend;
	long failed;

	flow.end.tag = FLOW_TO_BACKEND;
	failed = flows.update(&flow, &value);
	flow.end = *backend;
	flow.end.tag = FLOW_TO_FRONTEND;
	value = *frontend;
	failed |= flows.update(&flow, &value);
	if (failed)
		count_error(ERROR_FLOW_UNRECORDED);
	peer->flows = 1;
}

/*
 * sendto() of an unconnected UDP socket: the kernel asks for each datagram, and a conversation must
 * not wander. So the choice is kept per (socket, frontend), and holds while the backend is a member
 * of the service.
 *
 * The socket itself keeps the conversation that it used last, so that the many sockets which use
 * one service depend on no map that other sockets can fill. Its others are in `flows`; so is what a
 * connected socket sends elsewhere, for its record belongs to getpeername.
 */
static __always_inline enum verdict
forward_datagram(struct bpf_sock_addr *ctx, struct address *frontend, struct address *backend)
{
	struct service *service = services.lookup(frontend);
	struct address *kept = 0;
	struct flow flow = {};
	enum verdict verdict;
	struct peer *peer;

	if (!service)
		return NO_SERVICE;
	peer = peers.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!peer) {
		count_error(ERROR_PEER_UNRECORDED);
		return choose(frontend, backend);
	}
	if (peer->holds && same(&peer->frontend, frontend)) {
		kept = &peer->backend;
	} else if (peer->flows) {
		flow.cookie = socket_cookie(ctx);
		flow.end = *frontend;
		flow.end.tag = FLOW_TO_BACKEND;
		kept = flows.lookup(&flow);
	}
	if (kept && is_member(service->id, kept)) {
		*backend = *kept;
	} else {
		verdict = choose(frontend, backend);
		if (verdict != TRANSLATE)
			return verdict;
	}
	if (peer->holds == PEER_CONNECTED) {
		record_flow(ctx, peer, frontend, backend);
		return TRANSLATE;
	}
	if (peer->holds && !same(&peer->frontend, frontend))
		record_flow(ctx, peer, &peer->frontend, &peer->backend);
	peer->frontend = *frontend;
	peer->backend = *backend;
	peer->holds = PEER_SENT;
	return TRANSLATE;
}

/* getpeername(): the frontend that the socket was connected to, if `end` is the backend it got. */
static __always_inline int reverse_peer(struct bpf_sock_addr *ctx, struct address *end)
{
	struct peer *peer = peers.sk_storage_get(ctx->sk, 0, 0);

	if (!peer || peer->holds != PEER_CONNECTED || !same(&peer->backend, end))
		return 0;
	*end = peer->frontend;
	return 1;
}

/* recvfrom(): the frontend that the sender `end` answers for. A socket that never used a service
 * costs one look. */
static __always_inline int reverse_datagram(struct bpf_sock_addr *ctx, struct address *end)
{
	struct peer *peer = peers.sk_storage_get(ctx->sk, 0, 0);
	struct flow flow = {};
	struct address *frontend;

	if (!peer)
		return 0;
	if (peer->holds && same(&peer->backend, end)) {
		*end = peer->frontend;
		return 1;
	}
	if (!peer->flows)
		return 0;
	flow.cookie = socket_cookie(ctx);
	flow.end = *end;
	flow.end.tag = FLOW_TO_FRONTEND;
	frontend = flows.lookup(&flow);
	if (!frontend)
		return 0;
	*end = *frontend;
	return 1;
}

#endif
