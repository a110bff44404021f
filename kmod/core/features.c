// SPDX-License-Identifier: GPL-2.0-only
/* The requests that need no owner: feature bits, and the kind of worker. */
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include "device.h"
#include "iotlb.h"
#include "memory.h"

/* Newer than the oldest headers that this is built with. */
#ifndef VIRTIO_F_RING_RESET
#define VIRTIO_F_RING_RESET 40
#endif
#ifndef VHOST_GET_FEATURES_ARRAY
#define VHOST_GET_FEATURES_ARRAY _IOR(VHOST_VIRTIO, 0x83, __u64)
#define VHOST_SET_FEATURES_ARRAY _IOW(VHOST_VIRTIO, 0x83, __u64)
#endif

#define GUEST_UDP_TUNNEL_GSO	65
#define HOST_UDP_TUNNEL_GSO	67
#define TUNNEL_HEADER		24	/* the v1 header with hash report and tunnel offsets */

#define FEATURE_WORDS		0x10000	/* far more than there will be, and no long loop */

#define BIT64(bit)	(1ULL << (bit))
#define BACKEND_FEATURES BIT64(VHOST_BACKEND_F_IOTLB_MSG_V2)

/* Bits 0 to 63 and 64 to 127 that the device offers. */
static const u64 offered[2] = {
	BIT64(VIRTIO_NET_F_MRG_RXBUF) | BIT64(VIRTIO_F_NOTIFY_ON_EMPTY) |
	BIT64(VHOST_F_LOG_ALL) | BIT64(VHOST_NET_F_VIRTIO_NET_HDR) |
	BIT64(VIRTIO_RING_F_INDIRECT_DESC) | BIT64(VIRTIO_RING_F_EVENT_IDX) |
	BIT64(VIRTIO_F_VERSION_1) | BIT64(VIRTIO_F_ACCESS_PLATFORM) |
	BIT64(VIRTIO_F_IN_ORDER) | BIT64(VIRTIO_F_RING_RESET),
	BIT64(GUEST_UDP_TUNNEL_GSO - 64) | BIT64(HOST_UDP_TUNNEL_GSO - 64),
};

static unsigned int header_size(u64 low, u64 high)
{
	if (high)
		return TUNNEL_HEADER;
	if (low & (BIT64(VIRTIO_NET_F_MRG_RXBUF) | BIT64(VIRTIO_F_VERSION_1)))
		return sizeof(struct virtio_net_hdr_v1);
	return sizeof(struct virtio_net_hdr);
}

/* An empty IOTLB for every time that the bit is set, none when it is not. */
static int switch_iotlb(struct vhm_dev *dev, bool wanted)
{
	struct vhm_table *old = dev->iotlb;
	struct vhm_table *new = NULL;
	unsigned int i;

	if (!wanted && !old)
		return 0;
	if (wanted) {
		new = dev->limits->iotlb_entries > 0 ? vhm_table_new() : NULL;
		if (!new)
			return -EFAULT;
	}
	vhm_lock_queues(dev);
	dev->iotlb = new;
	for (i = 0; i < VHM_QUEUES; i++) {
		/* Addresses of the one kind mean nothing among those of the other. */
		if (!new != !old)
			memset(dev->queue[i].place.part, 0, sizeof(dev->queue[i].place.part));
		vhm_ring_forget(&dev->queue[i]);
	}
	vhm_unlock_queues(dev);
	vhm_table_free(old);
	if (!new)
		vhm_iotlb_clear(dev);
	return 0;
}

static bool logs_ok(struct vhm_dev *dev)
{
	bool ok = true;
	unsigned int i;

	for (i = 0; i < VHM_QUEUES; i++) {
		struct vhm_queue *queue = &dev->queue[i];

		port_lock(&queue->lock);
		if (queue->backend && !vhm_table_ok(dev->memory, queue->log_base, true))
			ok = false;
		port_unlock(&queue->lock);
	}
	return ok;
}

static long apply(struct vhm_dev *dev, u64 low, u64 high)
{
	bool own = low & BIT64(VHOST_NET_F_VIRTIO_NET_HDR);
	unsigned int header = header_size(low, high);
	unsigned int i;

	if (low & BIT64(VHOST_F_LOG_ALL) && !logs_ok(dev))
		return -EFAULT;
	if (switch_iotlb(dev, low & BIT64(VIRTIO_F_ACCESS_PLATFORM)))
		return -EFAULT;
	for (i = 0; i < VHM_QUEUES; i++) {
		struct vhm_queue *queue = &dev->queue[i];

		port_lock(&queue->lock);
		queue->features = low;
		queue->features_high = high;
		queue->header_own = own ? header : 0;
		queue->header_backend = own ? 0 : header;
		port_unlock(&queue->lock);
	}
	return 0;
}

static long set_features(struct vhm_dev *dev, u64 low, u64 high)
{
	long result;

	if (low & ~offered[0] || high & ~offered[1])
		return -EOPNOTSUPP;
	port_lock(&dev->lock);
	result = apply(dev, low, high);
	port_unlock(&dev->lock);
	return result;
}

static long get_array(u64 uaddr)
{
	const u64 none = 0;
	u64 count, rest;

	if (port_copy_in(&count, uaddr, sizeof(count)))
		return -EFAULT;
	uaddr += sizeof(count);
	if (port_copy_out(uaddr, offered, min_t(u64, count, 2) * sizeof(u64)))
		return -EFAULT;
	if (count <= 2)
		return 0;
	rest = min_t(u64, count, FEATURE_WORDS) - 2;
	for (uaddr += sizeof(offered); rest--; uaddr += sizeof(none))
		if (port_copy_out(uaddr, &none, sizeof(none)))
			return -EFAULT;
	return count > FEATURE_WORDS ? -EFAULT : 0;
}

static long set_array(struct vhm_dev *dev, u64 uaddr)
{
	u64 words[2] = {};
	u64 count, i;

	if (port_copy_in(&count, uaddr, sizeof(count)) ||
	    port_copy_in(words, uaddr + sizeof(count), min_t(u64, count, 2) * sizeof(u64)))
		return -EFAULT;
	for (i = 2; i < count; i++) {
		u64 word;

		if (i == FEATURE_WORDS)
			return -EFAULT;
		if (port_copy_in(&word, uaddr + sizeof(count) + i * sizeof(word), sizeof(word)))
			return -EFAULT;
		if (word)
			return -EOPNOTSUPP;
	}
	return set_features(dev, words[0], words[1]);
}

static long set_backend_features(struct vhm_dev *dev, u64 uaddr)
{
	u64 features;

	if (port_copy_in(&features, uaddr, sizeof(features)))
		return -EFAULT;
	if (features & ~BACKEND_FEATURES)
		return -EOPNOTSUPP;
	port_lock(&dev->lock);
	port_lock(&dev->message_lock);
	dev->backend_features = features;
	port_unlock(&dev->message_lock);
	port_unlock(&dev->lock);
	return 0;
}

long vhm_features_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr)
{
	const u64 backend_features = BACKEND_FEATURES;
	u64 features;

	switch (request) {
	case VHOST_GET_FEATURES:
		return port_copy_out(uaddr, &offered[0], sizeof(u64));
	case VHOST_SET_FEATURES:
		if (port_copy_in(&features, uaddr, sizeof(features)))
			return -EFAULT;
		return set_features(dev, features, 0);
	case VHOST_GET_FEATURES_ARRAY:
		return get_array(uaddr);
	case VHOST_SET_FEATURES_ARRAY:
		return set_array(dev, uaddr);
	case VHOST_GET_BACKEND_FEATURES:
		return port_copy_out(uaddr, &backend_features, sizeof(u64));
	case VHOST_SET_BACKEND_FEATURES:
		return set_backend_features(dev, uaddr);
	default:
		return -ENOTTY;
	}
}
