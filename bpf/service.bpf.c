// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Services at the socket: the destination of connect() and sendto() is replaced in the caller's own
 * system call, so packets leave already addressed to the backend, from the caller's own address,
 * and no packet is ever rewritten.
 *
 * In BCC's dialect; needs UAPI headers only. One program per hook, all of them thin: read the
 * address out of the context, ask helpers.h, write it back.
 */
/* What the kernel compares has no blanks around the slash. */
/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>

#include "consts.h"
#include "helpers.h"
#include "maps.h"

static __always_inline struct address read4(struct bpf_sock_addr *ctx, __u16 tag)
{
	struct address end = {
		.ip = {0, 0, MAPPED_PREFIX, ctx->user_ip4},
		.port = (__be16)ctx->user_port,
		.tag = tag,
	};

	return end;
}

static __always_inline void write4(struct bpf_sock_addr *ctx, const struct address *end)
{
	ctx->user_ip4 = end->ip[3];
	ctx->user_port = end->port;
}

/* An IPv4-mapped destination needs no care: it is written in the maps as it stands in the socket
 * call. */
static __always_inline struct address read6(struct bpf_sock_addr *ctx, __u16 tag)
{
	struct address end = {
		.ip = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]},
		.port = (__be16)ctx->user_port,
		.tag = tag,
	};

	return end;
}

static __always_inline void write6(struct bpf_sock_addr *ctx, const struct address *end)
{
	ctx->user_ip6[0] = end->ip[0];
	ctx->user_ip6[1] = end->ip[1];
	ctx->user_ip6[2] = end->ip[2];
	ctx->user_ip6[3] = end->ip[3];
	ctx->user_port = end->port;
}

/* Without a return value of ours the caller would see EPERM, which no client takes for "nobody
 * listens". */
static __always_inline int refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return HOOK_REFUSE;
}

int spider_connect4(struct bpf_sock_addr *ctx)
{
	struct address frontend = read4(ctx, ctx->protocol), backend;
	enum verdict verdict = forward_connect(ctx, &frontend, &backend);

	if (verdict == REFUSE)
		return refuse();
	if (verdict == TRANSLATE)
		write4(ctx, &backend);
	return HOOK_PROCEED;
}

int spider_connect6(struct bpf_sock_addr *ctx)
{
	struct address frontend = read6(ctx, ctx->protocol), backend;
	enum verdict verdict = forward_connect(ctx, &frontend, &backend);

	if (verdict == REFUSE)
		return refuse();
	if (verdict == TRANSLATE)
		write6(ctx, &backend);
	return HOOK_PROCEED;
}

int spider_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct address frontend = read4(ctx, IPPROTO_UDP), backend;
	enum verdict verdict = forward_datagram(ctx, &frontend, &backend);

	if (verdict == REFUSE)
		return refuse();
	if (verdict == TRANSLATE)
		write4(ctx, &backend);
	return HOOK_PROCEED;
}

int spider_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct address frontend = read6(ctx, IPPROTO_UDP), backend;
	enum verdict verdict = forward_datagram(ctx, &frontend, &backend);

	if (verdict == REFUSE)
		return refuse();
	if (verdict == TRANSLATE)
		write6(ctx, &backend);
	return HOOK_PROCEED;
}

int spider_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address end = read4(ctx, 0);

	if (reverse_datagram(ctx, &end))
		write4(ctx, &end);
	return HOOK_PROCEED;
}

int spider_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address end = read6(ctx, 0);

	if (reverse_datagram(ctx, &end))
		write6(ctx, &end);
	return HOOK_PROCEED;
}

int spider_peer4(struct bpf_sock_addr *ctx)
{
	struct address end = read4(ctx, 0);

	if (reverse_peer(ctx, &end))
		write4(ctx, &end);
	return HOOK_PROCEED;
}

int spider_peer6(struct bpf_sock_addr *ctx)
{
	struct address end = read6(ctx, 0);

	if (reverse_peer(ctx, &end))
		write6(ctx, &end);
	return HOOK_PROCEED;
}
