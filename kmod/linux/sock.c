// SPDX-License-Identifier: GPL-2.0-only
/*
 * Frames to and from the socket behind a tun, tap or packet descriptor.
 *
 * To a tun or tap with room without limit, frames go as buffers that become
 * packets as they are, up to VHM_BATCH in one call; to others one by one. From a
 * tun or tap they come through the ring of pointers behind the socket, VHM_BATCH
 * of which are taken at a time; from others through the socket's queue.
 */
#include <linux/err.h>
#include <linux/etherdevice.h>
#include <linux/file.h>
#include <linux/if_packet.h>
#include <linux/if_tap.h>
#include <linux/if_tun.h>
#include <linux/if_vlan.h>
#include <linux/net.h>
#include <linux/skb_array.h>
#include <linux/virtio_net.h>
#include <net/sock.h>
#include "frag.h"
#include "mirror.h"

/* The longest header that a tun may look at: with the fields for tunnels of Linux 6.17. */
#define LONGEST_HEADER	24

/* What a packet's buffer has behind and before the frame. */
#define TAIL_ROOM	SKB_DATA_ALIGN(sizeof(struct skb_shared_info))
#define HEAD_ROOM	(NET_IP_ALIGN + NET_SKB_PAD)

struct port_backend {
	struct file *file;
	struct socket *sock;
	struct msghdr message;
	struct ptr_ring *ring;		/* of a tun or tap, else NULL */
	bool transmit;

	/* Received, and taken from the ring ahead of the device. */
	unsigned int next;
	unsigned int taken;
	void *frames[VHM_BATCH];

	/* To transmit, kept until the flush. */
	struct frag frag;
	struct tun_msg_ctl control;
	struct xdp_buff kept[VHM_BATCH];
};

static struct socket *socket_of(struct file *file, struct ptr_ring **ring)
{
	struct socket *sock = sock_from_file(file);

	*ring = NULL;
	if (sock) {
		if (sock->sk->sk_family != AF_PACKET || sock->sk->sk_type != SOCK_RAW)
			return NULL;
		return sock;
	}
	sock = tun_get_socket(file);
	if (!IS_ERR(sock)) {
		*ring = tun_get_tx_ring(file);
		return sock;
	}
	sock = tap_get_socket(file);
	if (!IS_ERR(sock)) {
		*ring = tap_get_ptr_ring(file);
		return sock;
	}
	return NULL;
}

int port_backend_get(int fd, bool transmit, struct port_backend **backend)
{
	struct file *file = fget(fd);
	struct port_backend *new;
	struct ptr_ring *ring;
	struct socket *sock;

	if (!file)
		return -ENOTSOCK;
	sock = socket_of(file, &ring);
	if (!sock) {
		fput(file);
		return -ENOTSOCK;
	}
	new = port_alloc(sizeof(*new));
	if (!new) {
		fput(file);
		return -ENOMEM;
	}
	new->file = file;
	new->sock = sock;
	new->ring = ring;
	new->transmit = transmit;
	new->control.type = TUN_MSG_PTR;
	new->control.ptr = new->kept;
	*backend = new;
	return 0;
}

static void free_kept(struct port_backend *backend)
{
	unsigned int i;

	for (i = 0; i < backend->control.num; i++)
		put_page(virt_to_head_page(backend->kept[i].data));
	backend->control.num = 0;
}

void port_backend_put(struct port_backend *backend)
{
	if (!backend)
		return;
	if (backend->next != backend->taken)
		ptr_ring_unconsume(backend->ring, backend->frames + backend->next,
				   backend->taken - backend->next, tun_ptr_free);
	free_kept(backend);
	frag_free(&backend->frag);
	fput(backend->file);
	port_free(backend);
}

bool port_backend_same(const struct port_backend *a, const struct port_backend *b)
{
	return a->sock == b->sock;
}

int port_poll_backend(struct port_poll *poll, struct port_backend *backend, bool transmit)
{
	if (transmit)
		return mirror_watch(poll, backend->file, NULL, EPOLLOUT);
	return mirror_watch(poll, backend->file, backend->ring, EPOLLIN);
}

/* An iterator over one piece costs less, with each copy that the socket makes. */
static void set_pieces(struct msghdr *message, unsigned int direction, const struct iovec *iov,
		       unsigned int count, size_t length)
{
	if (count == 1)
		iov_iter_ubuf(&message->msg_iter, direction, iov->iov_base, length);
	else
		iov_iter_init(&message->msg_iter, direction, iov, count, length);
}

/* The stack wants all that it will look at in the linear part, and hdr_len says so. */
static int fix_header(struct virtio_net_hdr *header, size_t length)
{
	u32 end;

	if (!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return 0;
	end = __virtio16_to_cpu(true, header->csum_start) +
	      __virtio16_to_cpu(true, header->csum_offset) + sizeof(__sum16);
	if (end <= __virtio16_to_cpu(true, header->hdr_len))
		return 0;
	if (end > length)
		return -EINVAL;
	header->hdr_len = __cpu_to_virtio16(true, end);
	return 0;
}

/* Frame and header together right before the frame, the header to the front as well. */
static int fill(void *buffer, size_t pad, const struct iovec *iov, unsigned int count,
		size_t length, size_t header)
{
	void *to = vhm_tun_header(buffer);
	void *from = buffer + pad - header;

	if (unlikely(frag_copy(from, iov, count)))
		return -EFAULT;
	if (!header) {
		memset(to, 0, LONGEST_HEADER);
		return 0;
	}
	memcpy(to, from, sizeof(struct virtio_net_hdr_v1));
	memset(to + sizeof(struct virtio_net_hdr_v1), 0,
	       LONGEST_HEADER - sizeof(struct virtio_net_hdr_v1));
	if (unlikely(header > sizeof(struct virtio_net_hdr_v1)))
		memcpy(to, from, header);
	return fix_header(to, length);
}

/* 0, -ENOSPC if the frame is too long for this, or as port_send(). */
static int keep(struct port_backend *backend, const struct iovec *iov, unsigned int count,
		size_t length, size_t header)
{
	struct xdp_buff *xdp = &backend->kept[backend->control.num];
	size_t pad = SKB_DATA_ALIGN(HEAD_ROOM + header);
	size_t size;
	void *buffer;
	int error;

	if (unlikely(length < header))
		return -EFAULT;
	if (sock_flag(backend->sock->sk, SOCK_XDP))
		pad += XDP_PACKET_HEADROOM;
	size = SKB_DATA_ALIGN(pad + length - header) + TAIL_ROOM;
	if (unlikely(size > PAGE_SIZE))
		return -ENOSPC;
	buffer = frag_reserve(&backend->frag, size);
	if (unlikely(!buffer))
		return -EAGAIN;
	error = fill(buffer, pad, iov, count, length, header);
	if (unlikely(error))
		return error;
	frag_commit(&backend->frag, size);
	vhm_tun_buffer_size(buffer, size);
	xdp_init_buff(xdp, size, NULL);
	xdp_prepare_buff(xdp, buffer, pad, length - header, true);
	backend->control.num++;
	return 0;
}

int port_send_flush(struct port_backend *backend)
{
	struct msghdr *message = &backend->message;
	int error;

	if (!backend->control.num)
		return 0;
	message->msg_control = &backend->control;
	message->msg_controllen = sizeof(backend->control);
	message->msg_flags = MSG_DONTWAIT;
	error = backend->sock->ops->sendmsg(backend->sock, message, 0);
	if (unlikely(error < 0)) {
		free_kept(backend);
		return error;
	}
	backend->control.num = 0;
	return 0;
}

static int send_alone(struct port_backend *backend, const struct iovec *iov, unsigned int count,
		      size_t length, bool more)
{
	struct msghdr *message = &backend->message;
	int error;

	message->msg_control = NULL;
	message->msg_controllen = 0;
	message->msg_flags = MSG_DONTWAIT | (more ? MSG_MORE : 0);
	set_pieces(message, ITER_SOURCE, iov, count, length);
	error = backend->sock->ops->sendmsg(backend->sock, message, length);
	if (error == -EAGAIN || error == -ENOMEM || error == -ENOBUFS)
		return -EAGAIN;
	return 0;
}

int port_send(struct port_backend *backend, const struct iovec *iov, unsigned int count,
	      size_t length, size_t header, bool more)
{
	int error;

	if (vhm_fails(PORT_FAULT_SEND))
		return -EAGAIN;
	if (unlikely(!backend->ring || READ_ONCE(backend->sock->sk->sk_sndbuf) != INT_MAX)) {
		port_send_flush(backend);
		return send_alone(backend, iov, count, length, more);
	}
	if (unlikely(backend->control.num == VHM_BATCH))
		port_send_flush(backend);
	error = keep(backend, iov, count, length, header);
	if (likely(error != -ENOSPC))
		return error;
	port_send_flush(backend);
	return send_alone(backend, iov, count, length, false);
}

static size_t length_of(void *frame)
{
	if (unlikely(tun_is_xdp_frame(frame)))
		return tun_ptr_to_xdp(frame)->len;
	return __skb_array_len_with_tag(frame);
}

/* What is at the head of the queue of a socket without a ring. */
static size_t peek_queue(struct sk_buff_head *queue)
{
	struct sk_buff *first;
	unsigned long flags;
	size_t length = 0;

	spin_lock_irqsave(&queue->lock, flags);
	first = skb_peek(queue);
	if (first)
		length = __skb_array_len_with_tag(first);
	spin_unlock_irqrestore(&queue->lock, flags);
	return length;
}

size_t port_receive_peek(struct port_backend *backend)
{
	if (unlikely(!backend->ring))
		return peek_queue(&backend->sock->sk->sk_receive_queue);
	if (unlikely(backend->next == backend->taken)) {
		backend->next = 0;
		backend->taken = ptr_ring_consume_batched(backend->ring, backend->frames,
							  VHM_BATCH);
		if (!backend->taken)
			return 0;
	}
	return length_of(backend->frames[backend->next]);
}

/* The socket frees a frame that it is handed, whatever becomes of it. */
long port_receive(struct port_backend *backend, const struct iovec *iov, unsigned int count,
		  size_t length, size_t header)
{
	struct msghdr *message = &backend->message;

	if (vhm_fails(PORT_FAULT_RECEIVE)) {
		port_receive_drop(backend);
		return -EIO;
	}
	message->msg_control = NULL;
	if (likely(backend->next != backend->taken))
		message->msg_control = backend->frames[backend->next++];
	message->msg_controllen = 0;
	message->msg_flags = 0;
	set_pieces(message, ITER_DEST, iov, count, length);
	return backend->sock->ops->recvmsg(backend->sock, message, length,
					   MSG_DONTWAIT | MSG_TRUNC);
}

void port_receive_drop(struct port_backend *backend)
{
	struct msghdr message = {};

	if (backend->next != backend->taken) {
		tun_ptr_free(backend->frames[backend->next++]);
		return;
	}
	iov_iter_kvec(&message.msg_iter, ITER_DEST, NULL, 0, 0);
	backend->sock->ops->recvmsg(backend->sock, &message, 0, MSG_DONTWAIT | MSG_TRUNC);
}
